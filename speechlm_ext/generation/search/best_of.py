"""Selects among several tries at a sentence the one that the model itself recognizes best.

Sampled speech sometimes drops or repeats a word. A model that is also trained to recognize speech detects that: each
try becomes a sample of the recognition task, and one forward pass gives its score, log p(text | speech). This works on
tokens, before any waveform is made, and needs no other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from speechlm_ext.data.batch import Sample, SequencePacker
from speechlm_ext.data.sequence import LossWeights, sequence_length
from speechlm_ext.generation.requests.prompt import recognition_task
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.tasks import TaskTemplate

_EQUAL = LossWeights(text=1.0, ssl=1.0, codec=1.0, special=1.0)


@torch.no_grad()
def scores(model: SpeechLMModel, task: TaskTemplate, text: str, tries: Sequence[np.ndarray]) -> list[float]:
    """Scores of how well the model recognizes ``text`` in each try.

    Args:
        task: the recognition task.
        tries: raw ids int ``[T, C]`` of the task's condition.

    Returns:
        log p(text, end | try) of each in nats; minus infinity if a try is empty or longer than the context.
    """
    assert model.tokenizers is not None and model.tokenizers.text is not None
    ids = model.tokenizers.text.encode(text)
    modality = task.conditions[0].modality
    out = [float("-inf")] * len(tries)
    samples, places = [], []
    for place, raw_TC in enumerate(tries):
        if len(raw_TC) == 0:
            continue
        speech = (
            {"ssl": raw_TC[:, :1], "codec": raw_TC[:, 1:]} if modality == "codec_ssl" else {modality: raw_TC}
        )
        utterance = {"id": "try", "text_bpe": ids, **speech}
        lengths = {name: len(column) for name, column in utterance.items() if name != "id"}
        if sequence_length(task, lengths, model.layout) <= model.max_positions:
            samples.append(Sample(task, utterance))
            places.append(place)
    if not samples:
        return out
    batch = SequencePacker(model.layout, _EQUAL).pack(samples).to(model.device)
    logprobs_NS, _ = model.logprobs(
        batch.ids, batch.labels, batch.loss_weight > 0, batch.position, batch.cu_seqlens
    )
    score_N = logprobs_NS.double().sum(1)
    borders = batch.cu_seqlens.tolist()
    for place, start, end in zip(places, borders[:-1], borders[1:], strict=True):
        out[place] = float(score_N[start:end].sum())
    return out


def choose(
    model: SpeechLMModel, request: GenerationRequest, tries: Sequence[GenerationResult]
) -> GenerationResult:
    """The best of the tries, with all scores: the first among equals, a failed one only if all failed.

    Tries that the model ended rank above those that the maximum length cut.
    """
    usable = [t for t in tries if t.finished != "failed" and t.ids is not None]
    if not usable:
        return tries[0]
    template = next(t for t in model.tasks if t.name == usable[0].task)
    task = recognition_task(template, model.tasks, f"request {request.id!r}")
    found = scores(model, task, request.text or "", [t.ids for t in usable if t.ids is not None])
    best = max(range(len(usable)), key=lambda i: (usable[i].finished == "eos", found[i], -i))
    return replace(usable[best], tries=tuple(found), seconds=max(t.seconds for t in usable))
