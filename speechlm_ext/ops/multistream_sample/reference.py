"""multistream_sample in plain torch: the oracle of the tests and the definition of every bit of a token.

Random numbers are Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a function of
(seed, row, stream) without any state, so a request's tokens do not depend on which other requests share its batch.

A token must not depend on the order of additions, so all sums that decide are sums of integers: a column's weight is
``round(2^40 e^((x - max) / temperature))``, with e^x by one polynomial whose products and sums are rounded one by one.
Against an exact softmax a probability has a relative error of 2e-7, and columns below 2^-41 of the largest have none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops.multistream_sample.decode_state import DecodeState

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ONE = 2.0**40


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10 of 4 counter words and 2 key words, each an int64 tensor holding 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps every bit of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def uniform(seed: Tensor, row: Tensor, stream: int | Tensor) -> Tensor:
    """Uniform float64 numbers in [0, 1): int64 ``seed``, ``row`` and ``stream`` that broadcast to one shape."""
    zero = torch.zeros_like(seed)
    counter = [row & _MASK32, (row >> 32) & _MASK32, zero + stream, zero]
    words = philox(counter, [seed & _MASK32, (seed >> 32) & _MASK32])
    return ((words[0] << 21) ^ (words[1] >> 11)).double() * 2.0**-53


def exponential(x: Tensor) -> Tensor:
    """e^x of float32 x <= 0 within 2 units in the last place, 0 below -87; the same bits everywhere.

    x = k ln 2 + r with \\|r\\| <= ln 2 / 2, e^r by the polynomial of Cephes' expf (Moshier 1989).
    """
    kept = x.clamp_min(-87.0)
    shifted = kept * 1.44269504088896341 + 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number
    k = shifted - 12582912.0
    r = (kept - k * 0.693359375) + k * 2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    return torch.where(x < -87.0, 0.0, (p * (r * r) + r + 1.0) * torch.exp2(k))


def lowest_argmax(x: Tensor) -> Tensor:
    """Index of each row's maximum; the lowest index among equals, on every device."""
    size = x.shape[-1]
    index = torch.arange(size, device=x.device)
    is_max = x == x.amax(dim=-1, keepdim=True)
    return torch.where(is_max, index, size).amin(dim=-1).clamp_(max=size - 1)


def weights(x: Tensor, temperature: Tensor) -> Tensor:
    """int64 ``[B, V]`` sampling weights of float32 logits ``[B, V]`` at ``temperature`` ``[B]`` > 0, up to 2^40.

    -inf is a column that may not be sampled. The difference from the maximum is taken before dividing, so that no
    temperature overflows.
    """
    scaled = (x - x.amax(dim=-1, keepdim=True)) / temperature[:, None]
    weight = (exponential(scaled).double() * _ONE).round().long()
    return weight.masked_fill(x == float("-inf"), 0)  # at temperature infinity too


def keep(x: Tensor, weight: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Bool mask of the columns that top-k, then top-p, then min-p keep.

    Columns are ranked by (logit, then the lower index). top-p keeps the fewest whose weights reach p of what top-k
    kept: the one that crosses the border is in. The first one is always kept.

    Args:
        x: float32 ``[B, V]``.
        weight: int64 ``[B, V]``, see :func:`weights`.
        top_k: int ``[B]``, 0 keeps all. top_p: float32 ``[B]``, 1 keeps all. min_p: float32 ``[B]``, 0 keeps all.
    """
    size = x.shape[-1]
    order = x.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(size, device=x.device)
    k = torch.where(top_k > 0, top_k.long(), size)[:, None]
    ordered = weight.gather(-1, order).masked_fill(rank >= k, 0)
    before = ordered.cumsum(-1) - ordered
    limit = (top_p.nan_to_num(1.0).double() * ordered.sum(-1).double()).ceil().long()[:, None]
    min_weight = (min_p.nan_to_num(0.0).clamp(0.0, 1.0).double() * _ONE).ceil().long()[:, None]
    below = (before < limit) | ~(top_p < 1)[:, None]
    kept = (rank < k) & below & (ordered >= min_weight) | (rank == 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def choose(
    x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, number: Tensor
) -> Tensor:
    """One column int64 ``[B]`` of finite-topped float32 logits ``[B, V]``, by inverse transform in column order.

    ``temperature`` 0 is greedy: the maximum, the lowest column among equals. ``number``: float64 ``[B]`` in [0, 1).
    """
    is_greedy = ~(temperature > 0)
    weight = weights(x, torch.where(is_greedy, 1.0, temperature))
    cumulative = weight.masked_fill(~keep(x, weight, top_k, top_p, min_p), 0).cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum((number * total.double()).floor().long(), total - 1)
    drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    return torch.where(is_greedy, lowest_argmax(x), drawn)


def multistream_sample(
    logits: Tensor,
    state: DecodeState,
    streams: tuple[int, int] | None = None,
    partial: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample the next row of every request and advance ``state``; see the op for the results.

    Args:
        logits: float ``[rows, C]``.
        state: its ``progress``, ``history`` and ``history_logprob`` are written, with the last stream.
        streams: ``(first, last)``, a part of the row. partial: the previous call's result; it is not changed.

    Returns:
        ``(tokens int64 [B, S], logprob float32 [B, S], is_content bool [B, S], failed bool [B], done bool [B])``.
    """
    B, S, request = state.batch_size, state.num_streams, torch.arange(state.batch_size, device=logits.device)
    was_done = state.is_done
    G = state.limits.shape[1]
    segment, num_segments = state.segment.clamp(0, G - 1), state.num_segments.clamp_max(G)
    step, row, finish = (x.clone() for x in (state.step, state.row, state.finish))
    has_next = segment + 1 < num_segments
    following = finish + state.tail + 2  # frame 0 of the next segment, counted from this one
    logits = torch.cat([logits.float(), logits.new_full((1, logits.shape[1]), torch.nan).float()])
    conditional, unconditional = logits[_row_of(state.source, logits)], logits[_row_of(state.guide, logits)]
    guided = unconditional + state.guidance[:, None] * (conditional - unconditional)
    use_guide = (state.guide >= 0)[:, None] & (conditional != float("-inf"))
    logits = torch.where(use_guide, guided, conditional)

    def frame_of(s: int) -> tuple[Tensor, Tensor]:
        frame = step - state.delays[s]
        # A stream that runs ahead of stream 0 may be in the next segment already.
        ahead = (finish >= 0) & has_next & (frame >= following)
        return torch.where(ahead, frame - following, frame), ahead

    start, stop = (0, S) if streams is None else streams
    if partial is None:
        tokens = torch.tensor(state.pad_ids, device=logits.device).repeat(B, 1)
        logprobs = torch.zeros(B, S, device=logits.device)
        contents = torch.zeros(B, S, dtype=torch.bool, device=logits.device)
        bad_any = torch.zeros(B, dtype=torch.bool, device=logits.device)
    else:
        tokens, logprobs, contents, bad_any = (x.clone() for x in partial[:4])
    ended = finish  # what streams behind stream 0 go by: stream 0's end counts in its own row
    if start > 0:
        ended = torch.where(contents[:, 0] & (tokens[:, 0] == state.eos_id), frame_of(0)[0], finish)
    says_next = torch.zeros_like(was_done)
    for s in range(start, stop):
        frame, ahead = frame_of(s)
        g = segment + ahead
        origin = row - step + torch.where(ahead, following, 0)
        limit = torch.minimum(state.max_frames[request, g], state.row_limit[request, g] - origin)
        end = torch.where(ahead, -1, ended)
        first, last = state.first_column[request, g, s], state.end_column[request, g, s]
        columns = torch.arange(state.bounds[s], state.bounds[s + 1], device=logits.device)
        inside = (columns >= first[:, None]) & (columns < last[:, None])
        content = (last > first) & (frame >= 0) & ~was_done
        if s == 0:
            content &= end < 0
            is_eos = columns == state.eos_column
            past = (frame >= limit)[:, None]
            may_end = past | (frame >= state.min_frames[request, g])[:, None]
            inside = torch.where(is_eos, may_end, inside & ~past)
            says_next = (finish >= 0) & has_next & (frame == following - 1) & ~was_done
        else:
            content &= torch.where(end < 0, frame < limit, frame < end)
        if state.allowed is not None:
            inside = inside & state.allowed[:, state.bounds[s] : state.bounds[s + 1]]
        x = logits[:, state.bounds[s] : state.bounds[s + 1]].masked_fill(~inside, float("-inf"))
        top = x.amax(-1)
        bad = x.isnan().any(-1) | ~top.isfinite()
        x = torch.where(bad[:, None], torch.zeros_like(x), x)
        number = uniform(state.seed, row, s)
        column = choose(
            _penalised(x, state, g, s, row),
            state.temperature[request, g, s],
            state.top_k[request, g, s],
            state.top_p[request, g, s],
            state.min_p[request, g, s],
            number,
        )
        instead = state.eos_id if s == 0 else state.pad_ids[s]
        token = torch.where(bad, instead, state.column_ids[state.bounds[s] + column])
        forced = _forced(state, row, s)
        is_forced = (forced >= 0) & ~was_done
        unknown = bad & is_forced
        bad &= content & ~is_forced
        bad_any |= bad
        token = torch.where(content, token, state.pad_ids[s])
        if s == 0:
            token = torch.where(says_next, state.marker[request, (g + 1).clamp_max(G - 1)], token)
        token = torch.where(is_forced, forced, token)
        found = (state.column_ids[state.bounds[s] : state.bounds[s + 1]] == token[:, None]) & inside
        logprob = x.double().log_softmax(-1).masked_fill(~found, 0).sum(-1).masked_fill(unknown, torch.nan)
        logprobs[:, s] = torch.where(content & ~bad & found.any(-1), logprob.float(), 0.0)
        tokens[:, s], contents[:, s] = token, content
        if s == 0:
            ended = torch.where(content & (token == state.eos_id), frame, finish)
    if stop < S:
        return tokens, logprobs, contents, bad_any, was_done.clone()
    # A stream that fails after stream 0 was sampled ends its request in this row too.
    is_cut = bad_any & contents[:, 0]
    tokens[:, 0] = torch.where(is_cut, state.eos_id, tokens[:, 0])
    logprobs[:, 0].masked_fill_(is_cut, 0.0)
    _advance(state, tokens, logprobs, contents, bad_any, ended, following)
    return tokens, logprobs, contents, bad_any, state.is_done.clone()


def _row_of(index: Tensor, logits: Tensor) -> Tensor:
    """``index``, or the logits' last row, which is all NaN, where it is not a row of the logits."""
    last = logits.shape[0] - 1
    return torch.where((index >= 0) & (index < last), index, last)


def _penalised(x: Tensor, state: DecodeState, g: Tensor, s: int, row: Tensor) -> Tensor:
    """Logits after the repetition penalty; the end is never penalised."""
    B, num_rows = state.history.shape[:2]
    request = torch.arange(B, device=x.device)
    penalty, window = state.repetition_penalty[request, g, s], state.repetition_window[request, g, s]
    if num_rows == 0:
        return x
    index = torch.arange(num_rows, device=x.device)
    recent = (index < row[:, None]) & (index >= row[:, None] - window[:, None])
    said = state.history[:, :, s].masked_fill(~recent, -1)
    ids = state.column_ids[state.bounds[s] : state.bounds[s + 1]]
    repeated = (said[:, :, None] == ids).any(1) & (ids != state.eos_id if s == 0 else ids >= 0)
    largest = torch.finfo(torch.float32).max
    changed = torch.where(x > 0, x / penalty[:, None], x * penalty[:, None]).clamp(-largest, largest)
    applies = (penalty > 0) & penalty.isfinite() & (penalty != 1)
    return torch.where(repeated & applies[:, None] & x.isfinite(), changed, x)


def _forced(state: DecodeState, row: Tensor, s: int) -> Tensor:
    num_rows = state.forced.shape[1]
    if num_rows == 0:
        return torch.full_like(row, -1)
    request = torch.arange(len(row), device=row.device)
    given = state.forced[request, row.clamp(0, num_rows - 1), s]
    return torch.where((row >= 0) & (row < num_rows), given, -1)


def _advance(
    state: DecodeState,
    tokens: Tensor,
    logprobs: Tensor,
    contents: Tensor,
    failed: Tensor,
    ended: Tensor,
    following: Tensor,
) -> None:
    """Write the history and advance every request that is not done by one row."""
    request = torch.arange(state.batch_size, device=tokens.device)
    live, row = ~state.is_done, state.row.clone()
    kept = live & (row >= 0) & (row < state.history.shape[1])
    state.history[request[kept], row[kept]] = tokens[kept]
    state.history_logprob[request[kept], row[kept]] = torch.where(contents, logprobs, torch.nan)[kept]
    G = state.limits.shape[1]
    segment, num_segments = state.segment.clamp(0, G - 1), state.num_segments.clamp_max(G)
    step, finish = state.step + 1, torch.where(failed, state.finish, ended)
    is_last = segment + 1 >= num_segments
    delays = torch.tensor(state.delays, device=tokens.device)
    used = state.end_column[request, segment] > state.first_column[request, segment]
    slowest = torch.where(used, delays, 0).amax(1)
    level = state.delays[0] + 1
    needed = finish + torch.where(finish > 0, slowest.clamp_min(level), level)
    done = failed | (is_last & (finish >= 0) & (step >= needed))
    switch = ~is_last & (state.finish >= 0) & (step - state.delays[0] >= following) & ~done
    new = torch.stack(
        [
            segment + switch,
            torch.where(switch, step - following, step),
            row + 1,
            torch.where(switch, -1, finish),
            done.long(),
            failed.long(),
            torch.zeros_like(row),
        ],
        dim=1,
    )
    state.progress.copy_(torch.where(live[:, None], new, state.progress))
