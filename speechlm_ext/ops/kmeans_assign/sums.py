"""kmeans_sums: the sums of each cluster's rows for K-Means, exact and therefore the same for every order."""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, call_kernel, native, stream_handle

LIBRARY.define(
    "kmeans_sums(Tensor x, Tensor labels, Tensor offset, Tensor step, Tensor(a!) sums, Tensor(b!) counts) -> ()"
)


def kmeans_sums(
    x: Tensor, labels: Tensor, offset: Tensor, step: Tensor, sums: Tensor, counts: Tensor
) -> None:
    """``sums[labels[n]] += round(x[n] - offset)`` and ``counts[labels[n]] += 1``, in place.

    Args:
        x: ``[N, F]``, float32, float64, bfloat16 or float16.
        labels: int32 ``[N]``; a row with a label outside ``[0, K)`` is ignored.
        offset: float64 ``[F]``.
        step: float64 ``[F]``, powers of two: each summand is rounded to a multiple. The caller chooses it so that all
            partial sums are exact (`speechlm_ext.kmeans.fit.fixed_point`).
        sums: float64 ``[K, F]``, contiguous.
        counts: int64 ``[K]``.
    """
    torch.ops.speechlm_ext.kmeans_sums(x, labels, offset, step, sums, counts)


def _sums_cpu(x: Tensor, labels: Tensor, offset: Tensor, step: Tensor, sums: Tensor, counts: Tensor) -> None:
    call_kernel(
        native.kmeans_sums,
        x.contiguous(), labels.contiguous(), offset.contiguous(), step.contiguous(), sums, counts, None,
        torch.get_num_threads(), 0,
    )  # fmt: skip


def _sums_cuda(x: Tensor, labels: Tensor, offset: Tensor, step: Tensor, sums: Tensor, counts: Tensor) -> None:
    num_clusters = counts.shape[0]
    is_label = (labels >= 0) & (labels < num_clusters)
    counts += torch.zeros_like(counts).scatter_add_(
        0, labels.long().clamp(0, num_clusters - 1), is_label.long()
    )
    by_label, order = labels.sort()
    call_kernel(
        native.kmeans_sums,
        x.contiguous(), by_label, offset.contiguous(), step.contiguous(), sums, None, order, 0, stream_handle(x),
    )  # fmt: skip


LIBRARY.impl("kmeans_sums", _sums_cpu, "CPU")
LIBRARY.impl("kmeans_sums", _sums_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::kmeans_sums", lib=LIBRARY)
def _fake(x: Tensor, labels: Tensor, offset: Tensor, step: Tensor, sums: Tensor, counts: Tensor) -> None:
    return None
