"""multistream_sample: one row of tokens (one per stream) for every request of a batch, in one call per decode step.

It contains the state machine of a delayed segment. Let row 0 be the row in which a stream without delay has the
segment's frame 0. In row ``j`` stream s has frame ``j - delays[s]``: padding before frame 0 (ramp-in), content, and
padding again from the frame at which stream 0 sampled end-of-segment (ramp-out). After the last segment's ramp-out the
request is done and all its rows are padding; after another segment's come ``tail`` rows of padding, the next segment's
marker in stream 0, and its content.

    state = DecodeState.new(batch_size, scope_ids=..., delays=..., pad_ids=..., eos_id=..., top_k=30)
    while True:
        step = multistream_sample(head(hidden), state)  # logits [B, C] of all streams side by side
        if bool(step.done.all()):
            break
        hidden = body(embed(step.tokens))               # tokens [B, S]

A row may also be sampled in several calls, a few streams at a time, if a stream's logits depend on the tokens of
earlier streams in the same row:

    step = None
    for s in range(S):
        step = multistream_sample(logits, state, streams=(s, s + 1), partial=step)
        logits[:, bounds[s + 1] : bounds[s + 2]] = next_head(step.tokens[:, s])   # not after the last stream
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native, stream_handle
from speechlm_ext.ops.multistream_sample.decode_state import DecodeState

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SampledStep(NamedTuple):
    """One row for every request."""

    tokens: Tensor
    """int64 ``[B, S]``: token ids; the pad id where a stream has no content in this row."""
    logprob: Tensor
    """float32 ``[B, S]``: log-probability of each content token at temperature 1 among the allowed columns, after
    guidance and before the repetition penalty; 0 for padding, for a forced token outside them, and for stream 0 of a
    request that fails; NaN for a forced token if its row of logits has a NaN or +inf."""
    is_content: Tensor
    """bool ``[B, S]``: the stream has content in this row, end-of-segment included."""
    failed: Tensor
    """bool ``[B]``: a logit in use was NaN or +inf, or no column was allowed. Such a request is done: stream 0 has
    ``eos_id``, a stream that failed has padding."""
    done: Tensor
    """bool ``[B]``: this row is the request's last one, or it was done before."""


def multistream_sample(
    logits: Tensor | Sequence[Tensor],
    state: DecodeState,
    *,
    streams: tuple[int, int] | None = None,
    partial: SampledStep | None = None,
) -> SampledStep:
    """Sample the next row of every request and advance ``state``, in one launch and without synchronization.

    Per stream: guidance, mask by scope, ``allowed`` and the length limits, repetition penalty, then top-k, top-p (the
    token that crosses the threshold is kept) and min-p of the softmax at the temperature, and a draw by inverse
    transform in column order. Temperature 0 takes the maximum, the lowest column among equals. Tokens are a function of
    the request's own logits, settings and rows: not of the batch, the device, threads, or the processor.

    With ``streams`` a row is sampled in several calls, streams 0 to a - 1, then a to b - 1, and so on to S - 1, each
    with the previous call's result. After the last call, results and state are bit-equal to those of one call with all
    logits. Until then the state is unchanged, streams not sampled yet are padding, ``failed`` covers the streams so
    far, ``done`` the rows before, and stream 0's token is the sampled one even if a later stream fails. The caller
    keeps the order of the calls, without gaps and without changing the state in between.

    Args:
        logits: float32, bfloat16 or float16 ``[R, C]``, R at least B, all streams' columns side by side as in
            ``state.column_ids``; or S tensors ``[R, V_s]``, which are concatenated.
        state: `DecodeState`, changed in place; with ``streams`` only by the call that samples the last stream.
        streams: ``(first, last)``: sample streams ``first`` to ``last - 1``; no column of another stream is read.
        partial: if ``first`` is above 0, the result of the call that sampled the streams before; completed in place.

    Returns:
        `SampledStep`; with ``partial``, that object.

    Raises:
        OpError: (a ValueError) shapes, dtypes or devices that differ from the state's; ``streams`` that is not a range
            of streams; ``partial`` missing, or given at the start of a row.
    """
    B, C = state.batch_size, state.column_ids.shape[0]
    if not isinstance(logits, Tensor):
        logits = _side_by_side(logits, state)
    if logits.dim() != 2 or logits.shape[0] < B or logits.shape[1] != C or logits.dtype not in _DTYPES:
        raise OpError(
            f"multistream_sample: logits must be float32, bfloat16 or float16 [{B} or more, {C}]; "
            f"got {describe(logits)}"
        )
    if logits.device != state.progress.device:
        raise OpError(
            f"multistream_sample: logits is {describe(logits)} but the state is on {state.progress.device}"
        )
    arguments = (logits.detach(), *[getattr(state, name) for name in _STATE_FIELDS])
    if streams is None and partial is None:
        return SampledStep(*_OP(*arguments))
    row, first, last = _checked_part(logits, state, streams, partial)
    _STREAMS_OP(*arguments, *row, first, last)
    return row


def _checked_part(
    logits: Tensor, state: DecodeState, streams: tuple[int, int] | None, partial: SampledStep | None
) -> tuple[SampledStep, int, int]:
    """The row to complete, and the range of streams to sample."""
    op, B, S = "multistream_sample", state.batch_size, state.num_streams
    if not (
        isinstance(streams, (tuple, list)) and len(streams) == 2 and all(type(s) is int for s in streams)
    ):
        raise OpError(
            f"{op}: streams must be two integers (first, last); got {streams}"
            + (": with partial, give the streams to sample" if streams is None else "")
        )
    first, last = streams
    if not 0 <= first < last <= S:
        raise OpError(
            f"{op}: streams must be (first, last) with 0 <= first < last <= {S}; got ({first}, {last})"
        )
    if first == 0:
        if partial is not None:
            raise OpError(
                f"{op}: streams ({first}, {last}) start a row, so partial must be None; to continue a row, give the "
                "streams after those of the previous call"
            )
        return SampledStep(*_empty(logits, B, S)), first, last
    if not isinstance(partial, SampledStep):
        raise OpError(
            f"{op}: streams ({first}, {last}) continue a row, so partial must be the SampledStep of the call that "
            f"sampled the streams before {first}; got {describe(partial)}"
        )
    return partial, first, last


def _side_by_side(parts: Sequence[Tensor], state: DecodeState) -> Tensor:
    """The streams' logits as one tensor ``[R, C]``."""
    S = state.num_streams
    if len(parts) != S:
        raise OpError(f"multistream_sample: logits has {len(parts)} streams, the state has {S}")
    for s, part in enumerate(parts):
        width = state.bounds[s + 1] - state.bounds[s]
        if part.dim() != 2 or part.shape[1] != width:
            raise OpError(f"multistream_sample: logits[{s}] must be float [R, {width}]; got {describe(part)}")
    return torch.cat(list(parts), dim=1)


_STATE = (
    "Tensor logits, Tensor column_ids, Tensor sampling, Tensor choice, Tensor limits, "
    "Tensor request, Tensor guidance, Tensor(a!) progress, Tensor forced, Tensor(b!) history, "
    "Tensor(c!) history_logprob, Tensor? allowed, int[] bounds, int[] delays, int[] pad_ids, int eos_id, "
    "int eos_column, int tail"
)
_STATE_FIELDS = [argument.split()[1] for argument in _STATE.split(", ")[1:]]
LIBRARY.define(f"multistream_sample({_STATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
# A separate op, because it completes its arguments; the op for a whole row allocates its results.
LIBRARY.define(
    f"multistream_sample_streams({_STATE}, Tensor(d!) tokens, Tensor(e!) logprob, Tensor(f!) is_content, "
    "Tensor(g!) failed, Tensor(h!) done, int first, int last) -> ()"
)


_OP = torch.ops.speechlm_ext.multistream_sample.default
_STREAMS_OP = torch.ops.speechlm_ext.multistream_sample_streams.default


def _sample(logits: Tensor, *state: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _sample_fake(logits, *state)
    _run(logits, *state, *out)
    return out


def _sample_some(logits: Tensor, *rest: Any) -> None:
    *tensors, first, last = rest  # the state, then the row
    _run(logits, *tensors, streams=(first, last))


def _run(logits: Tensor, *tensors: Any, streams: tuple[int, ...] = ()) -> None:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    threads, stream = torch.get_num_threads(), stream_handle(logits)
    call_kernel(native.multistream_sample, logits, *tensors, threads, stream, *streams)


LIBRARY.impl("multistream_sample", _sample, "CPU")
LIBRARY.impl("multistream_sample", _sample, "CUDA")
LIBRARY.impl("multistream_sample_streams", _sample_some, "CPU")
LIBRARY.impl("multistream_sample_streams", _sample_some, "CUDA")


@torch.library.register_fake("speechlm_ext::multistream_sample", lib=LIBRARY)
def _sample_fake(logits, column_ids, sampling, choice, limits, request, guidance, progress, *rest):  # type: ignore[no-untyped-def]
    return _empty(logits, progress.shape[0], choice.shape[2])


@torch.library.register_fake("speechlm_ext::multistream_sample_streams", lib=LIBRARY)
def _sample_some_fake(logits, *rest):  # type: ignore[no-untyped-def]
    return None


def _empty(logits: Tensor, B: int, S: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        logits.new_empty((B, S), dtype=torch.int64),
        logits.new_empty((B, S), dtype=torch.float32),
        logits.new_empty((B, S), dtype=torch.bool),
        logits.new_empty((B,), dtype=torch.bool),
        logits.new_empty((B,), dtype=torch.bool),
    )
