"""multistream_sample: one row of tokens (one per stream) for every request of a batch, in one call per decode step.

The state machine of a delayed segment lives here too. Count rows from the row in which a stream without delay shows the
segment's frame 0. In row ``j`` stream s carries frame ``j - delays[s]``: fill before frame 0 (ramp-in), content, and
fill again from the frame on at which stream 0 said end-of-segment (ramp-out). The end counts in the row in which it is
sampled. After the last segment's ramp-out the request is done and all its rows are fill; after another one's come
``tail`` rows of fill, the next segment's marker in stream 0, and its content.

    state = DecodeState.new(batch_size, scope_ids=..., delays=..., pad_ids=..., eos_id=..., top_k=30)
    while True:
        step = multistream_sample(head(hidden), state)  # logits [B, C] of all streams side by side
        if bool(step.done.all()):
            break
        hidden = body(embed(step.tokens))               # tokens [B, S]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops._native import LIBRARY, OpError, check, describe, native, stream_handle
from speechlm_ext.ops.decode_state import DecodeState

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SampledStep(NamedTuple):
    """One row for every request."""

    tokens: Tensor
    """``[B, S]`` int64 token ids, fill where a stream has no content in this row."""
    logprob: Tensor
    """``[B, S]`` float32 log-probability of each content token at temperature 1 among the columns that were allowed,
    after guidance and before the repetition penalty; 0 for fill, for a forced token outside of them, and for stream 0
    of a request that fails; NaN for a forced token whose row of logits has a NaN or +inf."""
    is_content: Tensor
    """``[B, S]`` bool: the stream has content in this row, end-of-segment included."""
    failed: Tensor
    """``[B]`` bool: a logit that mattered was NaN or +inf, or nothing was allowed. Such a request is done: stream 0
    says ``eos_id``, a stream that failed is fill."""
    done: Tensor
    """``[B]`` bool: this row is the request's last one, or it was done before."""


def multistream_sample(logits: Tensor | Sequence[Tensor], state: DecodeState) -> SampledStep:
    """Sample the next row of every request and move ``state`` past it, in one launch and without a wait.

    Per stream: guidance, mask by scope, ``allowed`` and the length limits, repetition penalty, then top-k, top-p (the
    token that crosses the border is kept) and min-p of the softmax at the temperature, and a draw by inverse transform
    in column order. Temperature 0 takes the maximum, the lowest column among equals. Tokens are a function of the
    request's own logits, settings and rows: not of the batch, the device, threads, or the processor.

    Args:
        logits: float32, bfloat16 or float16 ``[R, C]``, R at least B, all streams' columns side by side as in
            ``state.column_ids``; or S tensors ``[R, V_s]``, which are copied together.
        state: `DecodeState`, changed in place.

    Returns:
        `SampledStep`.

    Raises:
        OpError: (a ValueError) if shapes, dtypes or devices differ from the state's.
    """
    B, C = state.batch_size, state.column_ids.shape[0]
    if not isinstance(logits, Tensor):
        logits = _side_by_side(logits, state)
    # Messages are made where they are needed: they would take longer than a small batch's step.
    check(
        logits.dim() == 2 and logits.shape[0] >= B and logits.shape[1] == C and logits.dtype in _DTYPES,
        lambda: (
            f"multistream_sample: logits must be float32, bfloat16 or float16 [{B} or more, {C}]; "
            f"got {describe(logits)}"
        ),
    )
    check(
        logits.device == state.progress.device,
        lambda: (
            f"multistream_sample: logits is {describe(logits)} but the state is on {state.progress.device}"
        ),
    )
    return SampledStep(
        *_OP(
            logits.detach(),
            state.column_ids,
            state.sampling,
            state.choice,
            state.limits,
            state.request,
            state.guidance,
            state.progress,
            state.forced,
            state.history,
            state.history_logprob,
            state.allowed,
            state.bounds,
            state.delays,
            state.pad_ids,
            state.eos_id,
            state.eos_column,
            state.tail,
        )
    )


def _side_by_side(parts: Sequence[Tensor], state: DecodeState) -> Tensor:
    S = state.num_streams
    check(len(parts) == S, f"multistream_sample: logits has {len(parts)} streams, the state has {S}")
    for s, part in enumerate(parts):
        width = state.bounds[s + 1] - state.bounds[s]
        check(
            part.dim() == 2 and part.shape[1] == width,
            f"multistream_sample: logits[{s}] must be float [R, {width}]; got {describe(part)}",
        )
    return torch.cat(list(parts), dim=1)


LIBRARY.define(
    "multistream_sample(Tensor logits, Tensor column_ids, Tensor sampling, Tensor choice, Tensor limits, "
    "Tensor request, Tensor guidance, Tensor(a!) progress, Tensor forced, Tensor(b!) history, "
    "Tensor(c!) history_logprob, Tensor? allowed, int[] bounds, int[] delays, int[] pad_ids, int eos_id, "
    "int eos_column, int tail) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_OP = torch.ops.speechlm_ext.multistream_sample.default


def _sample(logits: Tensor, *state: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _sample_fake(logits, *state)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    try:
        native.multistream_sample(logits, *state, *out, torch.get_num_threads(), stream_handle(logits))
    except ValueError as error:
        raise OpError(str(error)) from None
    return out


LIBRARY.impl("multistream_sample", _sample, "CPU")
LIBRARY.impl("multistream_sample", _sample, "CUDA")


@torch.library.register_fake("speechlm_ext::multistream_sample", lib=LIBRARY)
def _sample_fake(logits, column_ids, sampling, choice, limits, request, guidance, progress, *rest):  # type: ignore[no-untyped-def]
    shape = (progress.shape[0], choice.shape[2])
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.bool),
        logits.new_empty(shape[:1], dtype=torch.bool),
        logits.new_empty(shape[:1], dtype=torch.bool),
    )
