"""kmeans_assign: the nearest centroid of every feature row, certified to be the float64 argmin."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import FLOAT_DTYPES, LIBRARY, OpError, describe, native, stream_handle
from speechlm_ext.ops.kmeans_assign.index import CentroidIndex

logger = logging.getLogger("speechlm_ext")
#: On a GPU: bytes of the products of a chunk, which should stay in its second-level cache, and of the rounded rows.
_PRODUCT_BYTES, _CODE_BYTES = 32 << 20, 128 << 20

LIBRARY.define(
    "kmeans_assign(Tensor x, Tensor centroids, Tensor codes, Tensor terms, Tensor centre, Tensor unit, "
    "Tensor coarse_codes, Tensor coarse_terms, bool exact, bool want_distance) -> (Tensor, Tensor, Tensor)"
)


class AssignStats(NamedTuple):
    """Counters of an assignment: int64 scalars on the device of ``x``."""

    num_reranked: Tensor
    """Rows that were re-ranked in float64."""
    num_compared: Tensor
    """Distances that were computed for them."""
    num_nonfinite: Tensor
    """Rows with a NaN or an infinity."""


_Mode = Literal["exact", "fast"]
_Nonfinite = Literal["label", "error"]


@overload
def kmeans_assign(
    x: Tensor,
    centroids: Tensor | CentroidIndex,
    *,
    mode: _Mode = ...,
    return_distance: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    nonfinite: _Nonfinite = ...,
) -> Tensor: ...
@overload
def kmeans_assign(
    x: Tensor,
    centroids: Tensor | CentroidIndex,
    *,
    mode: _Mode = ...,
    return_distance: Literal[True],
    return_stats: Literal[False] = ...,
    nonfinite: _Nonfinite = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def kmeans_assign(
    x: Tensor,
    centroids: Tensor | CentroidIndex,
    *,
    mode: _Mode = ...,
    return_distance: Literal[False] = ...,
    return_stats: Literal[True],
    nonfinite: _Nonfinite = ...,
) -> tuple[Tensor, AssignStats]: ...
@overload
def kmeans_assign(
    x: Tensor,
    centroids: Tensor | CentroidIndex,
    *,
    mode: _Mode = ...,
    return_distance: Literal[True],
    return_stats: Literal[True],
    nonfinite: _Nonfinite = ...,
) -> tuple[Tensor, Tensor, AssignStats]: ...
def kmeans_assign(
    x: Tensor,
    centroids: Tensor | CentroidIndex,
    *,
    mode: _Mode = "exact",
    return_distance: bool = False,
    return_stats: bool = False,
    nonfinite: _Nonfinite = "label",
) -> Any:
    """Label each row with its nearest centroid (squared Euclidean distance).

    A product in low precision (bfloat16 and 16-bit integers on the CPU, float16 on a GPU) gives every distance with an
    error bound per pair; rows with more than one centroid within the bounds are re-ranked in float64
    (docs/ops/kmeans_assign.md). An N×K matrix is never materialized. Not differentiable.

    Args:
        x: ``[N, F]``, float32, float64, bfloat16 or float16.
        centroids: float ``[K, F]`` finite, or a `CentroidIndex` built from it once, for many calls.
        mode: ``"exact"`` gives the argmin of the float64 distance, the lowest index among equals, the same on every
            machine. ``"fast"`` takes the minimum of the approximate distances, without bounds; only ties are compared
            in float64. On a CPU with a tile unit this applies to the rows that bfloat16 cannot decide; the others are
            exact.
        return_distance: also return the squared distances.
        return_stats: also return `AssignStats`.
        nonfinite: ``"label"`` gives a row with a NaN or an infinity label -1 and distance NaN; ``"error"`` raises (on a
            GPU this synchronizes).

    Returns:
        ``labels [N]`` int32; with ``return_distance`` also ``[N]`` float32 (float64 for float64 ``x``), summed in
        float64; with ``return_stats`` also the statistics, last.

    Raises:
        OpError: (a ValueError) shapes or dtypes that do not fit; no centroid; a centroid that is not finite; a row that
            is not finite if ``nonfinite="error"``.
    """
    op = "kmeans_assign"
    if mode not in ("exact", "fast"):
        raise OpError(f'{op}: mode must be "exact" or "fast"; got {mode!r}')
    if nonfinite not in ("label", "error"):
        raise OpError(f'{op}: nonfinite must be "label" or "error"; got {nonfinite!r}')
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise OpError(f"{op}: x must be float [N, F]; got {describe(x)}")
    index = centroids if isinstance(centroids, CentroidIndex) else CentroidIndex.build(centroids)
    if index.wide.shape[1] != x.shape[1]:
        raise OpError(
            f"{op}: centroids must be float [K, {x.shape[1]}] to fit x; got {describe(index.centroids)}"
        )
    if index.wide.device != x.device:
        raise OpError(f"{op}: x is on {x.device} but centroids is {describe(index.centroids)}")
    labels, distance, counts = torch.ops.speechlm_ext.kmeans_assign(
        x.detach(),
        index.wide,
        index.codes,
        index.terms,
        index.centre,
        index.unit,
        index.coarse_codes,
        index.coarse_terms,
        mode == "exact",
        return_distance,
    )
    if nonfinite == "error":
        _require_finite(x, labels, counts)
    stats = AssignStats(*counts.unbind())
    if return_distance:
        return (labels, distance, stats) if return_stats else (labels, distance)
    return (labels, stats) if return_stats else labels


def _require_finite(x: Tensor, labels: Tensor, counts: Tensor) -> None:
    if int(counts[2]) == 0:
        return
    row = int((labels < 0).nonzero()[0])
    raise OpError(
        f"kmeans_assign: {int(counts[2])} of {x.shape[0]} rows of x are not finite, the first is x[{row}]; fix them, "
        f'or pass nonfinite="label" to give them label -1'
    )


def _results(x: Tensor, want_distance: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = x.shape[0]
    return (
        x.new_empty(num_rows, dtype=torch.int32),
        x.new_empty(num_rows if want_distance else 0, dtype=torch.float64),
        x.new_zeros(3, dtype=torch.int64),
    )


def _distance_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _coarse(codes: Tensor, terms: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    return (codes, terms) if codes.numel() else (None, None)


def _assign_cpu(  # type: ignore[no-untyped-def]
    x, centroids, codes, terms, centre, unit, coarse_codes, coarse_terms, exact: bool, want_distance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    labels, distance, counts = _results(x, want_distance)
    native.kmeans_assign(
        x.contiguous(), centroids, codes, terms, centre, unit, *_coarse(coarse_codes, coarse_terms), exact, labels,
        distance if want_distance else None, counts, torch.get_num_threads(),
    )  # fmt: skip
    return labels, distance.to(_distance_dtype(x)), counts


def _assign_cuda(  # type: ignore[no-untyped-def]
    x, centroids, codes, terms, centre, unit, coarse_codes, coarse_terms, exact: bool, want_distance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    labels, distance, counts = _results(x, want_distance)
    num_rows, num_clusters, padded = x.shape[0], centroids.shape[0], codes.shape[1]
    x, stream = x.contiguous(), stream_handle(x)
    chunk = min(max(256, _PRODUCT_BYTES // (4 * num_clusters) // 256 * 256), max(num_rows, 1))
    step = max(1, _CODE_BYTES // (2 * padded * chunk)) * chunk
    row_codes = x.new_empty(min(step, num_rows), padded, dtype=torch.float16)
    row_terms = x.new_empty(min(step, num_rows), 6, dtype=torch.float32)
    products = x.new_empty(chunk, num_clusters, dtype=torch.float32)
    for begin in range(0, num_rows, step):
        rows = x[begin : begin + step]
        native.kmeans_rows_cuda(rows, centre, unit, exact, row_codes, row_terms, stream)
        for i in range(0, len(rows), chunk):
            part = slice(i, min(i + chunk, len(rows)))
            to = slice(begin + part.start, begin + part.stop)
            z = products[: part.stop - part.start]
            _multiply(z, row_codes[part], codes)
            native.kmeans_rescore_cuda(
                z, x[to], centroids, terms, row_terms[part], labels[to],
                distance[to] if want_distance else None, counts, stream,
            )  # fmt: skip
    return labels, distance.to(_distance_dtype(x)), counts


@functools.cache
def has_half_products() -> bool:
    """Whether torch multiplies float16 matrices with sums in float32; where it does not, that is logged once."""
    if hasattr(torch.ops.aten.mm, "dtype_out"):
        return True
    logger.warning(
        "kmeans_assign: torch %s has no product of float16 matrices summed in float32 (aten::mm.dtype_out), so float32 "
        "matrices are multiplied: the same labels, several times slower. Install torch 2.8 or later.",
        torch.__version__,
    )
    return False


def _multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a bᵀ`` of float16 matrices, summed in float32."""
    if out.is_cuda and has_half_products():
        torch.ops.aten.mm.dtype_out(a, b.T, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float().T, out=out)


LIBRARY.impl("kmeans_assign", _assign_cpu, "CPU")
LIBRARY.impl("kmeans_assign", _assign_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::kmeans_assign", lib=LIBRARY)
def _fake(  # type: ignore[no-untyped-def]
    x, centroids, codes, terms, centre, unit, coarse_codes, coarse_terms, exact: bool, want_distance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    labels, distance, counts = _results(x, want_distance)
    return labels, distance.to(_distance_dtype(x)), counts
