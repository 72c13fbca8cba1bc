"""Centroids prepared for kmeans_assign: centered, rounded to the operands of a fast product, with rounding error norms.

``CentroidIndex`` is public; the op ``kmeans_index`` makes its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speechlm_ext.ops.common.memory import empty_in_huge_pages
from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native

#: On the CPU: centroids per panel of codes, and the multiple that their number is padded to (csrc/kmeans_assign).
_PANEL, _MULTIPLE = 16, 32
#: On a GPU: the multiple that the number of centroids is padded to, those of a thread's load.
_GROUP = 4
#: The multiple that pairs of coarse codes are padded to.
_COARSE_PAIRS = 16
#: Half norm of a copy of an earlier centroid, and of padding: never the minimum.
_NEVER = float("inf")
#: A norm of more than this factor of the median norm pulls the mean away from most centroids.
_FAR = 64
_SLACK = 1 + 2.0**-20  # for bounds that must not be rounded down

_Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

LIBRARY.define("kmeans_index(Tensor centroids) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


@dataclass(frozen=True)
class CentroidIndex:
    """Centroids prepared once for many calls of :func:`kmeans_assign`.

    It takes about half the memory of float32 centroids, with coarse codes the same. It is a snapshot: build another one
    after the centroids change.
    """

    centroids: Tensor
    """``[K, F]``, the argument of :meth:`build`."""
    wide: Tensor
    """The same in float32 (float64 for float64), contiguous."""
    codes: Tensor
    """The centroids less ``centre`` in low precision: on the CPU int32 ``[K/16, F/2, 16]``, pairs of 16-bit integers;
    on a GPU float16 ``[K, F]``. Both padded in both dimensions."""
    terms: Tensor
    """float32 ``[4, K]``, padded: scale of the codes, half squared norm, norm, and norm of the rounding error, all
    relative to ``unit``."""
    centre: Tensor
    """float64 ``[F]``: mean centroid, or the mean of the inner half if some are far away."""
    unit: Tensor
    """float64 ``[1]``: largest distance of a centroid from the centre."""
    coarse_codes: Tensor
    """int32 ``[K/16, F/2, 16]``, padded: pairs of bfloat16 if the CPU has a tile unit (AMX), else empty."""
    coarse_terms: Tensor
    """As ``terms``, of ``coarse_codes``."""

    @classmethod
    def build(cls, centroids: Tensor) -> CentroidIndex:
        """The index of finite float ``centroids [K, F]``.

        Raises:
            OpError: (a ValueError) other shapes or dtypes, no centroid, or a centroid that is not finite.
        """
        if not (
            isinstance(centroids, Tensor)
            and centroids.dim() == 2
            and centroids.is_floating_point()
            and centroids.shape[0] > 0
            and centroids.shape[1] > 0
        ):
            raise OpError(
                f"kmeans_assign: centroids must be float [K, F] with K >= 1 and F >= 1; got {describe(centroids)}"
            )
        wide = centroids.detach()
        wide = wide.to(torch.float64 if wide.dtype == torch.float64 else torch.float32).contiguous()
        return cls(centroids.detach(), wide, *torch.ops.speechlm_ext.kmeans_index(wide))


def _check_finite(centroids: Tensor) -> None:
    if bool(((centroids * 0).sum(dim=1) == 0).all()):
        return
    bad = int((~centroids.isfinite().all(dim=1)).nonzero()[0])
    raise OpError(
        f"kmeans_assign: centroids[{bad}] is not finite; remove it, or fit again on features without NaN and "
        "infinity"
    )


def _inner_mean(centroids: Tensor, norms: Tensor) -> Tensor:
    """Mean of the half of the centroids with the smallest ``norms``."""
    return centroids[norms.argsort()[: centroids.shape[0] // 2 + 1]].mean(0)


def _as_centre(mean: Tensor) -> Tensor:
    """float64 ``[F]``. The labels do not depend on the centre; one near the centroids keeps the bounds tight."""
    return torch.where(mean.isfinite(), mean.double(), 0.0)  # sums of float32 may overflow


def _coarse_pairs(width: int) -> int:
    """Pairs of coarse codes of a centroid; 0 without a tile unit."""
    return -(-width // (2 * _COARSE_PAIRS)) * _COARSE_PAIRS if native.has_coarse_tiles() else 0


def _empty_codes(padded: int, pairs: int) -> Tensor:
    return empty_in_huge_pages(padded // _PANEL, pairs * _PANEL, torch.int32).view(-1, pairs, _PANEL)


def _no_coarse(centroids: Tensor) -> tuple[Tensor, Tensor]:
    return centroids.new_empty(0, dtype=torch.int32), centroids.new_empty(0, dtype=torch.float32)


def _index_cpu(centroids: Tensor) -> _Index:
    num_clusters, width = centroids.shape
    padded = -(-num_clusters // _MULTIPLE) * _MULTIPLE
    pairs = (width + 1) // 2
    # The tiles read all codes: with small pages there would be a TLB miss for each page.
    codes = _empty_codes(padded, pairs)
    coarse_pairs = _coarse_pairs(width)
    coarse = (_empty_codes(padded, coarse_pairs), torch.empty(4, padded)) if coarse_pairs else None
    terms, unit = torch.empty(4, padded), torch.empty(1, dtype=torch.float64)
    norms = terms[2, :num_clusters]

    def fill(centre: Tensor) -> None:
        call_kernel(
            native.kmeans_index,
            centroids,
            centre,
            codes,
            terms,
            unit,
            *(coarse or (None, None)),
            torch.get_num_threads(),
        )

    centre = _as_centre(centroids.mean(0))
    fill(centre)
    if not bool(norms.isfinite().all()):
        _check_finite(centroids)
    elif bool(norms.median() * _FAR < norms.max()):
        centre = _as_centre(_inner_mean(centroids, norms))
        fill(centre)
    return codes, terms, centre, unit, *(coarse or _no_coarse(centroids))


def _index_cuda(centroids: Tensor) -> _Index:
    _check_finite(centroids)
    num_clusters, width = centroids.shape
    mean = centroids.mean(0)
    norms = torch.linalg.vector_norm(centroids - mean, dim=1)
    centre = _as_centre(torch.where(norms.max() > _FAR * norms.median(), _inner_mean(centroids, norms), mean))
    value = centroids.double() - centre
    norm = torch.linalg.vector_norm(value, dim=1)
    largest = value.abs().amax(dim=1)
    # Squares that overflow or underflow bound nothing: such a centroid is always a candidate.
    fits = (norm < 1e150) & ((largest == 0) | (largest > 1e-140))
    unit = torch.where(fits, norm, 0.0).amax().reshape(1)
    unit = torch.where(unit == 0, 1.0, unit)
    scale = torch.where(fits & (largest > 0), torch.exp2(largest.log2().floor() - 13), 1.0)
    codes = torch.where(fits[:, None], value / scale[:, None], 0.0).half()
    hat = codes.double() * scale[:, None]
    residual = torch.linalg.vector_norm(torch.where(fits[:, None], value - hat, 0.0), dim=1) + norm * 2.0**-50
    terms = torch.stack(
        [scale / unit, (norm / unit).square() / 2, norm / unit * _SLACK, residual / unit * _SLACK]
    )
    terms[1] = torch.where(fits, torch.where(_copies(centroids), _NEVER, terms[1]), 0.0)
    terms[2] = torch.where(fits, terms[2], torch.inf)
    terms[3] = torch.where(fits, terms[3], 0.0)
    # Rows of 16 bytes, and loads of 16 bytes of the terms and the products; a padded centroid is never the nearest.
    more = -num_clusters % _GROUP
    codes = torch.nn.functional.pad(codes, (0, -width % 8, 0, more))
    return codes, _padded(terms.float(), more), centre, unit, *_no_coarse(centroids)


def _padded(terms: Tensor, more: int) -> Tensor:
    """``terms`` with ``more`` centroids that no row is near."""
    out = torch.nn.functional.pad(terms, (0, more))
    out[1, terms.shape[1] :] = _NEVER
    return out


def _copies(centroids: Tensor) -> Tensor:
    """bool ``[K]``: whether a centroid equals an earlier one.

    Neighbors in the order of a hash are compared. A third centroid of the same hash between two equal ones hides them,
    which costs time only.
    """
    words = (centroids.double() + 0.0).view(torch.int64)
    column = torch.arange(1, words.shape[1] + 1, device=words.device)
    mixed = (words ^ (words >> 29)) * (column * -7046029254386353131 | 1)  # splitmix's constant
    order = ((mixed ^ (mixed >> 32)).sum(dim=1)).sort(stable=True).indices
    same = (centroids[order[1:]] == centroids[order[:-1]]).all(dim=1)
    out = torch.zeros(centroids.shape[0], dtype=torch.bool, device=centroids.device)
    out[order[1:]] = same
    return out


LIBRARY.impl("kmeans_index", _index_cpu, "CPU")
LIBRARY.impl("kmeans_index", _index_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::kmeans_index", lib=LIBRARY)
def _fake(centroids: Tensor) -> _Index:
    num_clusters, width = centroids.shape
    padded = -(-num_clusters // _MULTIPLE) * _MULTIPLE
    if centroids.device.type == "cuda":
        padded = num_clusters + -num_clusters % _GROUP
        codes = centroids.new_empty(padded, width + -width % 8, dtype=torch.float16)
        coarse = _no_coarse(centroids)
    else:
        codes = centroids.new_empty(padded // _PANEL, (width + 1) // 2, _PANEL, dtype=torch.int32)
        coarse = _no_coarse(centroids)
        if pairs := _coarse_pairs(width):
            coarse = (
                centroids.new_empty(padded // _PANEL, pairs, _PANEL, dtype=torch.int32),
                centroids.new_empty(4, padded, dtype=torch.float32),
            )
    terms = centroids.new_empty(4, padded, dtype=torch.float32)
    return (
        codes,
        terms,
        centroids.new_empty(width, dtype=torch.float64),
        centroids.new_empty(1, dtype=torch.float64),
        *coarse,
    )
