"""Beam search for targets of one stream: text, or units.

Of all ways to go on from ``beam_size`` beginnings the ``beam_size`` most probable are kept (Graves, "Sequence
transduction with recurrent neural networks", 2012). A beginning that says the end leaves the beam; the search stops
when no beginning that is left can beat the worst of ``beam_size`` ended ones, or at the longest length. Ended ones are
compared by ``log p / n^length_penalty`` with n tokens, the end included (Wu et al. 2016 with the plain power).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine.rows import Decoded, delayed_rows, failed
from speechlm_ext.generation.engine.sampler_state import Columns
from speechlm_ext.generation.requests.prompt import Prompt
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
    """The best ways to say a target that lies in stream 0 alone.

    Args:
        model: in eval mode.
        prompt: of a task with one target; its lengths hold, its sampling settings do not matter.
        beam_size: beginnings that are kept, from 1.
        length_penalty: 0 compares sums of log-probabilities, which favours short targets; 1 their mean.
        num_best: results, at most ``beam_size``.

    Returns:
        The best first. A request whose logits are not finite gives one ``failed`` result.

    Raises:
        GenerationError: a target of several streams, several targets, or numbers out of range.
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
            return [failed(prompt, message, layout)]
        length = len(beam[0].ids)
        if length < segment.min_new:
            logits_BV = logits_BV.masked_fill(is_end, float("-inf"))
        if length >= segment.max_new:
            logits_BV = logits_BV.masked_fill(~is_end, float("-inf"))
        step_BV = logits_BV.double().log_softmax(-1)
        sums_B = torch.tensor([sum(h.logprobs) for h in beam], dtype=torch.float64, device=step_BV.device)
        total = (sums_B[:, None] + step_BV).flatten()
        # Each beginning can end in one way, so twice as many hold enough that go on.
        best = total.topk(min(2 * beam_size, int(torch.isfinite(total).sum())))
        going, parents = list[_Hypothesis](), list[int]()
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
            elif not ends and len(going) < beam_size:
                going.append(new)
                parents.append(parent)
        done = sorted(done, key=lambda h: -h.score(length_penalty))[:beam_size]
        if len(done) == beam_size and _cannot_win(going, done[-1], length_penalty, segment.max_new + 1):
            break
        beam = going
        if beam:
            cache.reorder(parents)
            row_BS = torch.full((len(beam), layout.num_streams), layout.pad_id, device=model.device)
            row_BS[:, 0] = torch.tensor([h.ids[-1] for h in beam], device=model.device)
    return [_decoded(prompt, prefix_RS, h, layout) for h in done[:num_best]]


def _cannot_win(going: list[_Hypothesis], worst: _Hypothesis, penalty: float, longest: int) -> bool:
    """No beginning can still come before the worst ended one: log-probabilities only fall, so at best nothing is
    added, at the length that suits the score best."""
    bounds = [sum(h.logprobs) / (longest if penalty > 0 else len(h.logprobs) + 1) ** penalty for h in going]
    return max(bounds, default=float("-inf")) <= worst.score(penalty)


def _decoded(prompt: Prompt, prefix_RS: np.ndarray, found: _Hypothesis, layout: TokenLayout) -> Decoded:
    segment, S = prompt.segments[0], layout.num_streams
    said = [*found.ids, *([layout.sos_eos_id] if found.ended else [])]
    new_RS = np.full((len(said), S), layout.pad_id, dtype=np.int64)
    new_RS[:, 0] = said
    rows_RS = np.concatenate([prefix_RS, new_RS])
    given = prompt.num_given
    content_TS = np.full((given + len(found.ids), S), layout.pad_id, dtype=np.int64)
    content_TS[:given] = prompt.frames_PS[len(prompt.frames_PS) - given :]
    content_TS[given:, 0] = found.ids
    logprob_TS = np.full((len(content_TS), S), np.nan, dtype=np.float32)
    logprob_TS[given:, 0] = found.logprobs[: len(found.ids)]
    is_cut = len(found.ids) >= segment.max_new
    scored = found.logprobs[: len(found.ids)] if is_cut else found.logprobs
    return Decoded(
        content_TS,
        rows_RS,
        "max_len" if is_cut else "eos",
        float(sum(scored)),
        len(scored),
        logprob_TS,
        found.logprobs[-1],
    )
