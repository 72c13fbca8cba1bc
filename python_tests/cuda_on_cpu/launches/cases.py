"""The counted calls of the ops: their typical call, and the options that change the path.

The layout is OpusLM's: nine streams, one of SSL units and text (5,000 and 49,152 ids) and eight of codes (1,024 each).
Rows are few and hidden states narrow, since neither changes a count; the vocabulary does, so it has its full size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
from torch import Tensor

import speechlm_ext.ops as ops
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops import decode_layer
from speechlm_ext.ops.common.cublas import has_cublas
from speechlm_ext.ops.kmeans_assign import kmeans_assign as assign_module
from speechlm_ext.ops.kmeans_assign.sums import kmeans_sums
from speechlm_ext.ops.multistream_loss import chunks as loss_chunks

#: What is counted: the call that a setup on a device returns.
Setup = Callable[[torch.device], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    page: str
    """The op's name, or ``training`` or ``decoding``."""
    name: str
    setup: Setup
    is_capturing: bool = False
    """Whether a CUDA graph is being captured."""


@cache
def opus_layout() -> TokenLayout:
    return TokenLayout.build(ssl=5000, codec=[1024] * 8, text=49152)


# ---- delay_pack -----------------------------------------------------------------------------------------------------
def _segments(device: torch.device) -> list[Tensor]:
    return [torch.randint(0, 9, (n, 9), device=device) for n in (4, 6, 3)]


def _pack(device: torch.device, **options: object) -> Callable[[], object]:
    segments = _segments(device)
    return lambda: ops.delay_pack(segments, delays=range(9), pad_ids=[0] * 9, **options)  # type: ignore[arg-type]


def _pack_weighted(device: torch.device) -> Callable[[], object]:
    segments = _segments(device)
    weights = [torch.ones(s.shape, device=device) for s in segments]
    return lambda: ops.delay_pack(segments, delays=range(9), pad_ids=[0] * 9, loss_weight=weights)


def _pack_flat(device: torch.device) -> Callable[[], object]:
    flat = torch.cat(_segments(device))
    return lambda: ops.delay_pack((flat, [0, 4, 10, 13]), delays=range(9), pad_ids=[0] * 9)


def _unpack(device: torch.device) -> Callable[[], object]:
    packed = ops.delay_pack(_segments(device), delays=range(9), pad_ids=[0] * 9)
    return lambda: ops.delay_unpack(packed.ids, packed.cu_seqlens, delays=range(9))


# ---- multistream_embed ----------------------------------------------------------------------------------------------
def _embed(device: torch.device, features: bool = False, **options: bool) -> Callable[[], Tensor]:
    ids = torch.randint(0, 50, (12, 9), device=device)
    table = torch.randn(50, 8, device=device, requires_grad=True)
    if not features:
        return lambda: ops.multistream_embed(ids, table, **options)  # type: ignore[arg-type]
    rows = torch.randn(3, 8, device=device, requires_grad=True)
    positions = torch.arange(3, device=device)
    return lambda: ops.multistream_embed(ids, table, features=rows, feature_positions=positions)


def _embed_backward(
    device: torch.device, features: bool = False, sparse: bool = False
) -> Callable[[], object]:
    return _gradients(_embed(device, features, sparse=sparse)())


def _gradients(out: Tensor) -> Callable[[], object]:
    """The backward of ``out``, whose gradients go into no ``.grad``."""
    grad, leaves, nodes = torch.ones_like(out), [], [out.grad_fn]
    while nodes:
        node = nodes.pop()
        leaves += [node.variable] if hasattr(node, "variable") else []
        nodes += [] if node is None else [before for before, _ in node.next_functions if before is not None]
    return lambda: torch.autograd.grad(out, leaves, grad)


def _segment_sum(device: torch.device) -> Callable[[], Tensor]:
    values, ids = torch.randn(12, 8, device=device), torch.arange(12, device=device) // 3
    return lambda: ops.segment_sum(values, ids, 4)


# ---- multistream_loss -----------------------------------------------------------------------------------------------
def _loss(
    device: torch.device,
    scope: str = "own",
    dtype: torch.dtype = torch.bfloat16,
    one_row_chunks: bool = False,
    needs_grad: bool = True,
    recompute: bool = False,
    is_planned: bool = False,
) -> Callable[[], ops.MultiStreamLoss]:
    """Four rows: two of text, one of speech, one without a target. ``is_planned``: as in a training step."""
    layout, N, S = opus_layout(), 4, 9
    targets, weight = torch.zeros(N, S, dtype=torch.int64), torch.zeros(N, S)
    text, speech = layout.content_ranges("text_bpe"), layout.content_ranges("codec_ssl")
    for n, spans in enumerate((text, text, speech)):
        for s, span in enumerate(spans):
            if span is not None:
                targets[n, s], weight[n, s] = span[0] + n, 0.5
    has_cublas(weight.to(device))  # it multiplies and waits once on each device
    scopes = layout.scopes(scope)
    kinds = torch.tensor([1, 1, 0, 0]) if scope == "modality" else None
    rows = ops.plan_loss_rows(weight, scopes=scopes, row_scope=kinds).to(device) if is_planned else None
    targets, weight = targets.to(device), weight.to(device)
    kinds = None if kinds is None else kinds.to(device)
    D, new = 8, {"device": device, "dtype": dtype}
    hidden = torch.randn(N, D, **new).requires_grad_(needs_grad)  # type: ignore[arg-type]
    table = torch.randn(layout.vocab_size, D, **new).requires_grad_(needs_grad)  # type: ignore[arg-type]
    vectors = torch.randn(S - 1, D, **new).requires_grad_(needs_grad)  # type: ignore[arg-type]

    def call() -> ops.MultiStreamLoss:
        with ExitStack() as stack:
            if one_row_chunks:
                stack.enter_context(mock.patch.object(loss_chunks, "MIN_ROWS", 1))
            return ops.multistream_loss(
                *(hidden, table, targets, weight),
                scopes=scopes,
                row_scope=kinds,
                stream_embed=vectors,
                recompute=recompute,
                chunk_bytes=1 if one_row_chunks else None,
                rows=rows,
                check_values=not is_planned,
            )

    return call


def _loss_backward(device: torch.device, **options: object) -> Callable[[], object]:
    return _gradients(_loss(device, **options)().loss_sum)  # type: ignore[arg-type]


def _logprobs(device: torch.device) -> Callable[[], object]:
    layout = opus_layout()
    targets = torch.tensor([[span[0] for span in layout.content_ranges("codec_ssl") if span]] * 6).to(device)
    hidden = torch.randn(6, 8, device=device, dtype=torch.bfloat16)
    table = torch.randn(layout.vocab_size, 8, device=device, dtype=torch.bfloat16)
    return lambda: ops.multistream_logprobs(hidden, table, targets, scopes=layout.scopes("own"))


# ---- kmeans_assign --------------------------------------------------------------------------------------------------
def _index(device: torch.device) -> Callable[[], object]:
    centroids = torch.randn(16, 8, device=device)
    return lambda: ops.CentroidIndex.build(centroids)


def _assign(device: torch.device, num_chunks: int = 1, nonfinite: str = "label") -> Callable[[], object]:
    index = ops.CentroidIndex.build(torch.randn(16, 8, device=device))
    x = torch.randn(128 * num_chunks, 8, device=device)
    assign_module.has_cublas(x)  # which multiplies and waits once on each device

    def call() -> object:
        with mock.patch.object(assign_module, "_PRODUCT_BYTES", 1):  # chunks of 128 rows
            return ops.kmeans_assign(x, index, nonfinite=nonfinite)  # type: ignore[call-overload]

    return call


def _sums(device: torch.device) -> Callable[[], object]:
    x, labels = torch.randn(40, 8, device=device), (torch.arange(40, device=device) % 16).int()
    offset, step = (torch.full((8,), v, dtype=torch.float64, device=device) for v in (0.0, 2.0**-30))
    sums = torch.zeros(16, 8, dtype=torch.float64, device=device)
    counts = torch.zeros(16, dtype=torch.int64, device=device)
    return lambda: kmeans_sums(x, labels, offset, step, sums, counts)


# ---- multistream_sample ---------------------------------------------------------------------------------------------
def _sample(device: torch.device, in_parts: bool = False) -> Callable[[], object]:
    scope_ids = [torch.arange(10 * s, 10 * s + 10) for s in range(9)]
    state = ops.DecodeState.new(
        2, scope_ids=scope_ids, delays=range(9), pad_ids=[0] * 9, eos_id=9, top_k=5, num_rows=8, device=device
    )
    logits = torch.randn(2, 90, device=device, dtype=torch.bfloat16)
    if not in_parts:
        return lambda: ops.multistream_sample(logits, state)

    def call() -> object:
        row = ops.multistream_sample(logits, state, streams=(0, 1))
        return ops.multistream_sample(logits, state, streams=(1, 9), partial=row)

    return call


# ---- decode_layer ---------------------------------------------------------------------------------------------------
def _rope(device: torch.device, **norms: object) -> Callable[[], object]:
    qkv, cos = torch.randn(3, 8 * 16, device=device), torch.randn(20, 16, device=device)
    keys, values = (torch.zeros(3, 20, 2, 16, device=device) for _ in range(2))
    index = torch.arange(3, device=device)
    weights = (torch.randn(16, device=device),) * 2 if norms else ()
    return lambda: decode_layer.rope_and_store(qkv, cos, cos, index, index, keys, values, 4, *weights)


def _attention(device: torch.device, window: int | None = None) -> Callable[[], object]:
    query, index = torch.randn(3, 4, 16, device=device), torch.arange(3, device=device)
    keys, values = (torch.zeros(3, 600, 2, 16, device=device) for _ in range(2))
    return lambda: decode_layer.decode_attention(query, keys, values, index, index, 0.3, window)


def _norm(device: torch.device) -> Callable[[], object]:
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    return lambda: decode_layer.add_rms_norm(x, x, weight, 1e-6)


def _silu(device: torch.device) -> Callable[[], object]:
    x = torch.randn(3, 16, device=device)
    return lambda: decode_layer.silu_mul(x)


def _linear(device: torch.device) -> Callable[[], object]:
    x, weight = torch.randn(3, 16, device=device), torch.randn(8, 16, device=device)
    return lambda: decode_layer.decode_linear(x, weight)


def _no_grad(setup: Callable[..., Callable[[], object]], **options: object) -> Setup:
    def no_grad(device: torch.device) -> Callable[[], object]:
        return torch.no_grad()(setup(device, **options))

    return no_grad


def _with(setup: Callable[..., Callable[[], object]], **options: object) -> Setup:
    return lambda device: setup(device, **options)


CASES = [
    Case("delay_pack", "three segments", _pack),
    Case("delay_pack", "three segments, with weights", _pack_weighted),
    Case("delay_pack", "`(flat, offsets)`", _pack_flat),
    Case("delay_pack", "`check_ids=True`, int32 out", _with(_pack, check_ids=True, dtype=torch.int32)),
    Case("delay_pack", "`delay_unpack`", _unpack),
    Case("multistream_embed", "forward", _embed),
    Case("multistream_embed", "forward, features", _with(_embed, features=True)),
    Case("multistream_embed", "forward, `check_ids=True`", _with(_embed, check_ids=True)),
    Case("multistream_embed", "backward", _embed_backward),
    Case("multistream_embed", "backward, features", _with(_embed_backward, features=True)),
    Case("multistream_embed", "backward, `sparse=True`", _with(_embed_backward, sparse=True)),
    Case("multistream_embed", "`segment_sum`", _segment_sum),
    Case("multistream_loss", "forward, own scopes", _loss),
    Case("multistream_loss", "the same with planned rows", _with(_loss, is_planned=True)),
    Case("multistream_loss", "the same with two chunks more", _with(_loss, one_row_chunks=True)),
    Case("multistream_loss", "the same in float32", _with(_loss, dtype=torch.float32)),
    Case("multistream_loss", "the same without gradients", _with(_loss, needs_grad=False)),
    Case("multistream_loss", "the same in a captured graph", _loss, is_capturing=True),
    Case("multistream_loss", "backward, own scopes", _loss_backward),
    Case("multistream_loss", "forward, `recompute=True`", _with(_loss, recompute=True)),
    Case("multistream_loss", "backward, `recompute=True`", _with(_loss_backward, recompute=True)),
    Case("multistream_loss", "forward, scopes by modality", _with(_loss, scope="modality")),
    Case(
        "multistream_loss",
        "planned rows, by modality",
        _with(_loss, scope="modality", is_planned=True),
    ),
    Case("multistream_loss", "`multistream_logprobs`, own scopes", _logprobs),
    Case("kmeans_assign", "a call, 1 chunk", _assign),
    Case("kmeans_assign", "a call, 3 chunks", _with(_assign, num_chunks=3)),
    Case("kmeans_assign", '`nonfinite="error"`, 1 chunk', _with(_assign, nonfinite="error")),
    Case("kmeans_assign", "`CentroidIndex.build`", _index),
    Case("kmeans_assign", "`kmeans_sums`", _sums),
    Case("multistream_sample", "a row in one call", _sample),
    Case("multistream_sample", "a row in two calls", _with(_sample, in_parts=True)),
    Case("decode_layer", "`rope_and_store`", _rope),
    Case("decode_layer", "`rope_and_store`, with norms", _with(_rope, norms=True)),
    Case("decode_layer", "`decode_attention`", _attention),
    Case("decode_layer", "`decode_attention`, captured", _with(_attention, window=300), is_capturing=True),
    Case("decode_layer", "`add_rms_norm`", _norm),
    Case("decode_layer", "`silu_mul`", _silu),
    Case("decode_layer", "`decode_linear`", _linear),
]
