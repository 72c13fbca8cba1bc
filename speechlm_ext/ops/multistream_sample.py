"""multistream_sample: one row of tokens (one per stream) for every request of a batch, in one call per decode step.

The state machine of a delayed segment lives here too. Count rows from the first row after the target's marker. In row
``j`` stream s carries frame ``j - delays[s]``: fill before frame 0 (ramp-in), content, and fill again from the frame on
at which stream 0 said end-of-segment (ramp-out). The end counts in the row in which it is sampled. `advance` moves a
state past a row; `DecodeState.is_done` says when nothing is left to generate.

    state = DecodeState.new(batch_size, scope_ids=..., delays=..., pad_ids=..., eos_id=..., top_k=30)
    while not bool(state.is_done.all()):
        logits = [head(hidden, s) for s in range(S)]      # [B, V_s], the scope's columns only
        tokens = multistream_sample(logits, state).tokens  # [B, S]
        state = advance(state, tokens)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speechlm_ext.ops._native import check, describe
from speechlm_ext.ops.reference import multistream_sample as reference

_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class DecodeState:
    """Where each of B requests stands in its segment, and how it samples. All tensors are on one device."""

    scope_ids: tuple[Tensor, ...]
    """Per stream int64 ``[V_s]``: the id of each column of that stream's logits. Stream 0's include ``eos_id``."""
    delays: tuple[int, ...]
    """Rows by which each stream is shifted, S values."""
    pad_ids: tuple[int, ...]
    """Fill of each stream, S values."""
    eos_id: int
    """Ends the segment when stream 0 says it."""
    temperature: Tensor
    """``[B, S]`` float32; 0 is greedy."""
    top_k: Tensor
    """``[B, S]`` int64; 0 is off."""
    top_p: Tensor
    """``[B, S]`` float32; 1 is off."""
    seed: Tensor
    """``[B]`` int64. The random number of a token is a function of (seed, rng_offset + step, stream) alone."""
    step: Tensor
    """``[B]`` int64, rows of this segment generated so far."""
    rng_offset: Tensor
    """``[B]`` int64, rows generated in earlier segments of the request, so that no random number is used twice."""
    active: Tensor
    """``[B, S]`` bool: streams that carry content in this segment (text uses stream 0 alone); others are fill."""
    min_frames: Tensor
    """``[B]`` int64; end-of-segment is forbidden before as many frames."""
    max_frames: Tensor
    """``[B]`` int64; end-of-segment is forced after as many frames."""
    finish: Tensor
    """``[B]`` int64, content frames of a finished segment; -1 while stream 0 goes on."""
    allowed: tuple[Tensor | None, ...] | None = None
    """Per stream bool ``[V_s]`` or ``[B, V_s]``: columns that may be sampled; None allows all. Needed where requests
    of one batch have different scopes: give each stream the union of the scopes and mask per request."""

    @classmethod
    def new(
        cls,
        batch_size: int,
        *,
        scope_ids: Sequence[Tensor],
        delays: Sequence[int],
        pad_ids: Sequence[int],
        eos_id: int,
        temperature: float | Sequence[float] | Tensor = 1.0,
        top_k: int | Sequence[int] | Tensor = 0,
        top_p: float | Sequence[float] | Tensor = 1.0,
        seed: int | Tensor = 0,
        min_frames: int | Tensor = 0,
        max_frames: int | Tensor = _NO_LIMIT,
        active: Sequence[bool] | Tensor | None = None,
        rng_offset: int | Tensor = 0,
        allowed: Sequence[Tensor | None] | None = None,
        device: torch.device | str | None = None,
    ) -> DecodeState:
        """A state before its first row.

        Sampling settings are one value, one per stream (a list of S), or ``[B, S]``; ``seed``, ``min_frames`` and
        ``max_frames`` one value or ``[B]``. An int seed gives request b the seed ``seed + b``; pass a tensor to choose
        them, e.g. so that a request's tokens do not depend on its place in the batch.
        """
        num_streams = len(delays)
        check(
            len(scope_ids) == num_streams and len(pad_ids) == num_streams,
            f"DecodeState: delays has {num_streams} streams, scope_ids {len(scope_ids)}, pad_ids {len(pad_ids)}",
        )
        device = scope_ids[0].device if device is None else torch.device(device)

        def per_stream(value: object, dtype: torch.dtype) -> Tensor:
            tensor = torch.as_tensor(value, dtype=dtype, device=device)
            return tensor.expand(batch_size, num_streams).clone()

        def per_request(value: object) -> Tensor:
            return torch.as_tensor(value, dtype=torch.int64, device=device).expand(batch_size).clone()

        state = cls(
            scope_ids=tuple(ids.to(device, torch.int64) for ids in scope_ids),
            delays=tuple(int(d) for d in delays),
            pad_ids=tuple(int(p) for p in pad_ids),
            eos_id=int(eos_id),
            temperature=per_stream(temperature, torch.float32),
            top_k=per_stream(top_k, torch.int64),
            top_p=per_stream(top_p, torch.float32),
            seed=per_request(torch.arange(batch_size) + seed if isinstance(seed, int) else seed),
            step=per_request(0),
            rng_offset=per_request(rng_offset),
            active=per_stream(True if active is None else active, torch.bool),
            min_frames=per_request(min_frames),
            max_frames=per_request(max_frames),
            finish=per_request(-1),
            allowed=None if allowed is None else tuple(allowed),
        )
        check(
            bool((state.temperature >= 0).all())
            and bool((state.top_k >= 0).all())
            and bool((state.top_p > 0).all()),
            "DecodeState: temperature and top_k must be 0 or more and top_p above 0; "
            f"got temperature {temperature}, top_k {top_k}, top_p {top_p}",
        )
        check(
            bool((state.min_frames <= state.max_frames).all()),
            f"DecodeState: min_frames {min_frames} is above max_frames {max_frames}",
        )
        check(
            bool((state.scope_ids[0] == state.eos_id).any()),
            f"DecodeState: eos_id {eos_id} is not among scope_ids[0]; no request could ever end",
        )
        return state

    @property
    def is_done(self) -> Tensor:
        """``[B]`` bool: end-of-segment is out and so is every frame before it, in every active stream."""
        delays = torch.tensor(self.delays, device=self.step.device)
        last_delay = torch.where(self.active, delays, 0).amax(dim=1)
        rows = torch.maximum(self.finish + last_delay, self.finish + self.delays[0] + 1)
        return (self.finish >= 0) & (self.step >= rows)


@dataclass(frozen=True)
class SampledStep:
    """One row for every request."""

    tokens: Tensor
    """``[B, S]`` int64 token ids, fill where a stream has no content in this row."""
    logprob: Tensor
    """``[B, S]`` float32 log-probability of each sampled token at temperature 1 within its scope; 0 for fill."""
    is_content: Tensor
    """``[B, S]`` bool: the token was sampled (end-of-segment included), not filled in."""
    failed: Tensor
    """``[B]`` bool: a logit that mattered was NaN or +inf, or nothing was allowed. Such a request ends: stream 0 says
    ``eos_id``, the others fill."""


@torch.no_grad()
def multistream_sample(logits: Sequence[Tensor], state: DecodeState) -> SampledStep:
    """Sample the next row of every request.

    Per stream: mask by ``state.allowed`` and the length limits, divide by temperature, keep top-k, then top-p (the
    token that crosses the border is kept), draw by inverse transform in the order of the columns. Temperature 0 takes
    the maximum, the lowest column among equals.

    Args:
        logits: S float tensors ``[B, V_s]``; column c of stream s stands for id ``state.scope_ids[s][c]``.
        state: `DecodeState`; not changed. Call `advance` with the tokens that were really used.

    Returns:
        `SampledStep`.

    Raises:
        OpError: (a ValueError) if the number of streams, B or a V_s differ from the state's.
    """
    batch_size, num_streams = state.temperature.shape
    check(
        len(logits) == num_streams,
        f"multistream_sample: logits has {len(logits)} streams, the state has {num_streams}",
    )
    for s, stream_logits in enumerate(logits):
        shape = (batch_size, state.scope_ids[s].shape[0])
        check(
            tuple(stream_logits.shape) == shape and stream_logits.is_floating_point(),
            f"multistream_sample: logits[{s}] must be float {list(shape)}; got {describe(stream_logits)}",
        )
    minus_inf = float("-inf")
    stream = torch.arange(num_streams, device=state.step.device)
    # All streams' numbers at once: the generator is many tiny operations.
    number = reference.uniform(state.seed[:, None], (state.rng_offset + state.step)[:, None], stream)
    tokens, logprobs, contents = [], [], []
    failed = torch.zeros_like(state.active[:, 0])
    finish = state.finish
    for s in range(num_streams):
        frame = state.step - state.delays[s]
        scope = state.scope_ids[s]
        row = logits[s].float()
        allowed = state.allowed[s] if state.allowed is not None else None
        if allowed is not None:
            row = row.masked_fill(~allowed, minus_inf)
        if s == 0:
            is_eos = scope == state.eos_id
            row = row.masked_fill(is_eos & (frame < state.min_frames)[:, None], minus_inf)
            row = row.masked_fill(~is_eos & (frame >= state.max_frames)[:, None], minus_inf)
            content = state.active[:, 0] & (frame >= 0) & (finish < 0)
        else:
            content = state.active[:, s] & (frame >= 0) & ((finish < 0) | (frame < finish))
        column, logprob, bad = reference.sample_rows(
            row, state.temperature[:, s], state.top_k[:, s], state.top_p[:, s], number[:, s]
        )
        bad = bad & content
        failed = failed | bad
        fallback = state.eos_id if s == 0 else state.pad_ids[s]
        token = torch.where(bad, fallback, scope[column])
        tokens.append(torch.where(content, token, state.pad_ids[s]))
        logprobs.append(torch.where(content & ~bad, logprob, 0.0))
        contents.append(content)
        if s == 0:
            finish = torch.where(content & (token == state.eos_id), frame, finish)
    token_BS = torch.stack(tokens, dim=1)
    # A stream that fails after stream 0 was sampled ends its request in this row too.
    late = failed & state.active[:, 0] & (state.step >= state.delays[0]) & (state.finish < 0)
    token_BS[:, 0] = torch.where(late, state.eos_id, token_BS[:, 0])
    return SampledStep(token_BS, torch.stack(logprobs, dim=1), torch.stack(contents, dim=1), failed)


def advance(state: DecodeState, tokens: Tensor) -> DecodeState:
    """The state after a row of ``tokens`` ``[B, S]``: one step on, and finished where stream 0 said end-of-segment.

    Pure: returns a new state. ``tokens`` may be forced ones (a prompt to continue) as well as sampled ones.
    """
    frame = state.step - state.delays[0]
    ends = (state.finish < 0) & (frame >= 0) & state.active[:, 0] & (tokens[:, 0] == state.eos_id)
    return replace(state, step=state.step + 1, finish=torch.where(ends, frame, state.finish))
