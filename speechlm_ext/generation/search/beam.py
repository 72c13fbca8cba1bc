"""Beam search for targets of one stream: text, or units.

Each step extends ``beam_size`` hypotheses by every token and keeps the ``beam_size`` most probable (Graves, "Sequence
transduction with recurrent neural networks", 2012). A hypothesis with the end token leaves the beam; the search stops
when none in the beam can beat the worst of ``beam_size`` ended ones, or at the maximum length. Ended hypotheses are
compared by ``log p / n^length_penalty`` with n tokens, the end included (Wu et al. 2016 with the plain power).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine.rows import Decoded, delayed_rows, failed_result
from speechlm_ext.generation.engine.sampler_state import Columns
from speechlm_ext.generation.requests.prompt import Prompt, pad_frames
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.lm import SpeechLMModel


@dataclass(frozen=True, eq=False)
class _Hypothesis:
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool

    def score(self, penalty: float) -> float:
        return sum(self.logprobs) / max(len(self.logprobs), 1) ** penalty


@torch.inference_mode()
def beam_search(
    model: SpeechLMModel, prompt: Prompt, beam_size: int, length_penalty: float = 1.0, num_best: int = 1
) -> list[Decoded]:
    """The most probable targets of stream 0.

    Args:
        model: in eval mode.
        prompt: of a task with one target; its lengths apply, its sampling settings do not.
        beam_size: number of hypotheses in the beam, >= 1.
        length_penalty: 0 compares sums of log-probabilities, which favors short targets; 1 their means.
        num_best: number of results, at most ``beam_size``.

    Returns:
        The results, best first; one ``failed`` result if the logits are not finite.
    """
    layout, where = model.layout, f"request {prompt.id!r}"
    if len(prompt.segments) != 1:
        raise GenerationError(f"{where}: beam search is for tasks with one target.")
    (segment,) = prompt.segments
    ranges = layout.content_ranges(segment.modality)
    if ranges[0] is None or any(r is not None for r in ranges[1:]):
        raise GenerationError(
            f"{where}: beam search is for targets of one stream; {segment.modality} has more."
        )
    if not 1 <= num_best <= beam_size:
        raise GenerationError(
            f"{where}: beam_size must be from 1, and at least {num_best} for as many results; got {beam_size}."
        )
    head = model.scope_head(Columns(layout, [segment.modality]).ranges)
    ids_V = head.ids[0].to(model.device)
    is_end = ids_V == layout.sos_eos_id
    prefix_RS = delayed_rows(
        prompt.frames_PS, len(prompt.frames_PS) + layout.delays[0], layout, layout.pad_id
    )
    cache = model.new_cache(beam_size, len(prefix_RS) + 64)
    if len(prefix_RS) > 1:
        model.prefill(torch.from_numpy(prefix_RS[:-1]).to(model.device), cache, [0], [len(prefix_RS) - 1])
    row_BS = torch.from_numpy(prefix_RS[-1:]).to(model.device)
    beam, done = [_Hypothesis((), (), False)], list[_Hypothesis]()
    while beam:
        logits_BV = head(model.step_hidden(row_BS, cache))[:, : len(ids_V)].float()
        if not bool(torch.isfinite(logits_BV).all()):
            message = (
                f"{where}: the model's logits are not finite in row {len(prefix_RS) + len(beam[0].ids)}."
            )
            return [failed_result(prompt, message, layout)]
        length = len(beam[0].ids)
        if length < segment.min_new:
            logits_BV = logits_BV.masked_fill(is_end, float("-inf"))
        if length >= segment.max_new:
            logits_BV = logits_BV.masked_fill(~is_end, float("-inf"))
        step_BV = logits_BV.double().log_softmax(-1)
        sums_B = torch.tensor([sum(h.logprobs) for h in beam], dtype=torch.float64, device=step_BV.device)
        total = (sums_B[:, None] + step_BV).flatten()
        # Each hypothesis can end in one way, so twice as many candidates contain enough that continue.
        best = total.topk(min(2 * beam_size, int(torch.isfinite(total).sum())))
        live, parents = list[_Hypothesis](), list[int]()
        for place, index in enumerate(best.indices.tolist()):
            parent, column = divmod(index, len(ids_V))
            token, logprob = int(ids_V[column]), float(step_BV[parent, column])
            ends = token == layout.sos_eos_id
            before = beam[parent]
            new = _Hypothesis(
                before.ids if ends else (*before.ids, token), (*before.logprobs, logprob), ended=ends
            )
            if ends and place < beam_size:
                done.append(new)
            elif not ends and len(live) < beam_size:
                live.append(new)
                parents.append(parent)
        done = sorted(done, key=lambda h: -h.score(length_penalty))[:beam_size]
        if len(done) == beam_size and _cannot_win(live, done[-1], length_penalty, segment.max_new + 1):
            break
        beam = live
        if beam:
            cache.reorder(parents)
            row_BS = torch.full((len(beam), layout.num_streams), layout.pad_id, device=model.device)
            row_BS[:, 0] = torch.tensor([h.ids[-1] for h in beam], device=model.device)
    return [_decoded(prompt, prefix_RS, h, layout) for h in done[:num_best]]


def _cannot_win(live: list[_Hypothesis], worst: _Hypothesis, penalty: float, longest: int) -> bool:
    """Whether no hypothesis can still beat the worst ended one: log-probabilities only fall, so its bound adds nothing,
    at the length that favors it most."""
    bounds = [sum(h.logprobs) / (longest if penalty > 0 else len(h.logprobs) + 1) ** penalty for h in live]
    return max(bounds, default=float("-inf")) <= worst.score(penalty)


def _decoded(prompt: Prompt, prefix_RS: np.ndarray, found: _Hypothesis, layout: TokenLayout) -> Decoded:
    count, num_given = len(found.ids), prompt.num_given
    new_RS = pad_frames(count + found.ended, layout)
    new_RS[:, 0] = [*found.ids, *[layout.sos_eos_id] * found.ended]
    content_TS = np.concatenate([prompt.frames_PS[len(prompt.frames_PS) - num_given :], new_RS[:count]])
    logprob_TS = np.full(content_TS.shape, np.nan, dtype=np.float32)
    logprob_TS[num_given:, 0] = found.logprobs[:count]
    is_cut = count >= prompt.segments[0].max_new
    scored = found.logprobs[:count] if is_cut else found.logprobs
    return Decoded(
        content_TS=content_TS,
        rows_RS=np.concatenate([prefix_RS, new_RS]),
        finished="max_len" if is_cut else "eos",
        logprob=float(sum(scored)),
        num_scored=len(scored),
        logprob_TS=logprob_TS,
        end_logprob=found.logprobs[-1],
    )
