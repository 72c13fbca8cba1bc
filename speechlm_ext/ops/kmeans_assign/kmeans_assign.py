"""kmeans_assign: the nearest centroid of every feature row, certified to be the float64 argmin."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from speechlm_ext.ops.common.cublas import blas_handle, has_cublas
from speechlm_ext.ops.common.native import (
    FLOAT_DTYPES,
    LIBRARY,
    OpError,
    call_kernel,
    describe,
    native,
    stream_handle,
)
from speechlm_ext.ops.common.precision import float32_sums, multiply_float16
from speechlm_ext.ops.kmeans_assign.index import CentroidIndex

#: On a GPU: bytes of a chunk's products, two of which should stay in the second-level cache, and of the rounded rows.
_PRODUCT_BYTES, _CODE_BYTES = 16 << 20, 128 << 20
#: Rows and centroids of a tile of the vendor's product.
_TILE_ROWS, _TILE_CLUSTERS = 128, 256

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
    call_kernel(
        native.kmeans_assign,
        x.contiguous(), centroids, codes, terms, centre, unit, *_coarse(coarse_codes, coarse_terms), exact, labels,
        distance if want_distance else None, counts, torch.get_num_threads(),
    )  # fmt: skip
    return labels, distance.to(_distance_dtype(x)), counts


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def chunk_rows(num_clusters: int, num_bytes: int, num_multiprocessors: int) -> int:
    """Rows of a chunk, whose products have up to ``num_bytes``, or one tile of rows.

    As many tiles of the product as fill the multiprocessors in whole waves, or nearly; of equal ones the largest.
    """
    most = max(1, num_bytes // (4 * num_clusters * _TILE_ROWS))
    tiles = -(-num_clusters // _TILE_CLUSTERS)

    def busy(num: int) -> float:
        return num * tiles / (-(-num * tiles // num_multiprocessors) * num_multiprocessors)

    return max(range(-(-most // 2), most + 1), key=lambda num: (busy(num), num)) * _TILE_ROWS


def _assign_cuda(  # type: ignore[no-untyped-def]
    x, centroids, codes, terms, centre, unit, coarse_codes, coarse_terms, exact: bool, want_distance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    labels, distance, counts = _results(x, want_distance)
    num_rows, (num_clusters, width) = x.shape[0], codes.shape  # padded
    x = x.contiguous()
    chunk = chunk_rows(num_clusters, _PRODUCT_BYTES, _num_multiprocessors(x.device) if x.is_cuda else 1)
    chunk = min(chunk, max(num_rows, 1))
    step = min(max(1, _CODE_BYTES // (2 * width * chunk)) * chunk, num_rows)
    row_codes = x.new_empty(step, width, dtype=torch.float16)
    row_terms = x.new_empty(num_rows, 6, dtype=torch.float32)
    products = x.new_empty(1 + (num_rows > chunk), chunk, num_clusters, dtype=torch.float32)
    to = distance if want_distance else None
    if has_cublas(x):
        call_kernel(
            native.kmeans_assign_cuda,
            x, centroids, codes, terms, centre, unit, exact, labels, to, counts, row_codes, row_terms, products,
            blas_handle(x), stream_handle(x),
        )  # fmt: skip
    elif num_rows > 0:
        _assign_by_torch(
            x, centroids, codes, terms, centre, unit, exact, labels, to, counts, row_codes, row_terms, products[0]
        )  # fmt: skip
    return labels, distance.to(_distance_dtype(x)), counts


def _assign_by_torch(  # type: ignore[no-untyped-def]
    x,
    centroids,
    codes,
    terms,
    centre,
    unit,
    exact: bool,
    labels,
    distance,
    counts,
    row_codes,
    row_terms,
    products,
) -> None:
    """The same with torch's products, on one stream."""
    num_rows, step, chunk, stream = len(x), len(row_codes), len(products), stream_handle(x)
    with float32_sums():  # the bounds of the products assume it
        for begin in range(0, num_rows, step):
            rows = slice(begin, min(begin + step, num_rows))
            call_kernel(
                native.kmeans_rows_cuda, x[rows], centre, unit, exact, row_codes, row_terms[rows], stream
            )
            for first in range(rows.start, rows.stop, chunk):
                part = slice(first, min(first + chunk, rows.stop))
                z = products[: part.stop - part.start]
                multiply_float16(z, row_codes[part.start - begin : part.stop - begin], codes)
                call_kernel(
                    native.kmeans_rescore_cuda,
                    z, x[part], centroids, terms, row_terms[part], labels[part],
                    None if distance is None else distance[part], counts, stream,
                )  # fmt: skip


LIBRARY.impl("kmeans_assign", _assign_cpu, "CPU")
LIBRARY.impl("kmeans_assign", _assign_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::kmeans_assign", lib=LIBRARY)
def _fake(  # type: ignore[no-untyped-def]
    x, centroids, codes, terms, centre, unit, coarse_codes, coarse_terms, exact: bool, want_distance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    labels, distance, counts = _results(x, want_distance)
    return labels, distance.to(_distance_dtype(x)), counts
