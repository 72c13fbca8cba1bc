"""From requests to results: build prompts, decode them in batches, turn ids back into text and waveforms.

Requests are sorted by task and prompt length, so that a batch holds little padding; results come in the order
of the requests. What is wrong with one request is told in its own result and stops no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from speechlm_ext.errors import GenerationError, SpeechLMError
from speechlm_ext.generation import best_of
from speechlm_ext.generation.engine import Decoded, decode
from speechlm_ext.generation.prompt import Prompt, build_prompt, find_task, next_prompt, raw_content
from speechlm_ext.generation.request import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from speechlm_ext.model.speechlm import SpeechLM


#: Prompts are built, sorted and decoded in windows of this many batches, so that results come early.
WINDOW = 8


@dataclass(eq=False)
class _Job:
    """A request on its way through its targets."""

    index: int
    request: GenerationRequest
    prompt: Prompt
    chain: tuple[np.ndarray, ...] = ()
    seconds: float = 0.0


def generate(
    model: SpeechLM,
    requests: Sequence[GenerationRequest],
    batch_size: int = 16,
    *,
    progress: bool = False,
    on_result: Callable[[int, GenerationResult], None] | None = None,
) -> list[GenerationResult]:
    """Serve requests.

    Args:
        model: with tokenizers; put into eval mode for the time of the call.
        requests: any tasks together.
        batch_size: most requests decoded at once.
        progress: show a bar (never where the output is not a terminal).
        on_result: called with (index in ``requests``, result) as soon as each is ready.

    Returns:
        One result per request, in order. Bad requests have ``finished == "failed"`` and ``error``.

    Raises:
        GenerationError: the model has no tokenizers or no tasks, or ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise GenerationError(f"batch_size must be at least 1, got {batch_size}.")
    if model.tokenizers is None:
        raise GenerationError("the model has no tokenizers; load a model folder that contains tokenizers/.")
    results: list[GenerationResult | None] = [None] * len(requests)
    # A request with best_of is served as so many requests; the last of them to end picks the best.
    tries = [(index, one) for index, request in enumerate(requests) for one in best_of.variants(request)]
    ended: dict[int, list[tuple[int, GenerationResult]]] = {}
    bar = tqdm(total=len(requests), unit="request", desc="generate", disable=None if progress else True)

    def finish(number: int, result: GenerationResult) -> None:
        index, request = tries[number][0], requests[tries[number][0]]
        if request.settings.best_of > 1:
            mine = ended.setdefault(index, [])
            mine.append((number, result))
            if len(mine) < request.settings.best_of:
                return
            result = _best(request, [r for _, r in sorted(ended.pop(index), key=lambda e: e[0])], model)
        results[index] = result
        bar.update()
        if on_result is not None:
            on_result(index, result)

    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(tries), WINDOW * batch_size):
            jobs = []
            for number in range(first, min(first + WINDOW * batch_size, len(tries))):
                job = _prepare(number, tries[number][1], model)
                if isinstance(job, _Job):
                    jobs.append(job)
                else:
                    finish(number, job)
            while jobs:
                jobs = _decode_jobs(jobs, model, batch_size, finish)
    finally:
        model.train(was_training)
        bar.close()
    return [r for r in results if r is not None]


def _prepare(index: int, request: GenerationRequest, model: SpeechLM) -> _Job | GenerationResult:
    """Build a request's prompt, or say in a result why it cannot be served."""
    assert model.tokenizers is not None
    try:
        template = find_task(request, model.tasks)
        if request.settings.best_of > 1:
            best_of.recognition_of(template, model.tasks, f"request {request.id!r}")
        prompt = build_prompt(request, template, model.layout, model.tokenizers, model.max_positions)
    except SpeechLMError as error:
        return GenerationResult(request.id, request.task, "failed", error=str(error))
    return _Job(index, request, prompt)


def _decode_jobs(
    jobs: list[_Job], model: SpeechLM, batch_size: int, finish: Callable[[int, GenerationResult], None]
) -> list[_Job]:
    """Decode one target of every job; returns the jobs that have another target to come."""
    jobs = sorted(jobs, key=lambda job: (job.prompt.template.name, -len(job.prompt.frames_PS)))
    following = []
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        start = time.perf_counter()
        decoded = decode(model, [job.prompt for job in batch])
        seconds = time.perf_counter() - start
        for job, one in zip(batch, decoded, strict=True):
            job.seconds += seconds
            after = _advance(job, one, model)
            if isinstance(after, _Job):
                following.append(after)
            else:
                finish(job.index, after)
    return following


def _advance(job: _Job, decoded: Decoded, model: SpeechLM) -> _Job | GenerationResult:
    """What follows a decoded target: the next one of the task's chain, or the result."""
    prompt = job.prompt
    result = GenerationResult(
        job.request.id,
        prompt.template.name,
        decoded.finished,
        modality=prompt.modality,
        num_given=prompt.num_given,
        chain=job.chain,
        logprob=decoded.logprob,
        num_scored=decoded.num_scored,
        seconds=job.seconds,
        settings=prompt.settings,
    )
    if decoded.error is not None:
        return replace(result, logprob=None, error=decoded.error)
    raw_TC = raw_content(decoded.content_TS, prompt.modality, model.layout)
    try:
        if prompt.target + 1 < len(prompt.template.targets):
            follow = next_prompt(
                prompt, decoded.content_TS, job.request.settings, model.layout, model.max_positions
            )
            return _Job(job.index, job.request, follow, (*job.chain, raw_TC), job.seconds)
        result = replace(result, ids=raw_TC)
        # Of several tries only the one that is kept becomes sound.
        return result if job.request.settings.best_of > 1 else _decode_content(result, model)
    except SpeechLMError as error:
        return replace(result, ids=raw_TC, finished="failed", error=f"request {result.id!r}: {error}")


def _best(request: GenerationRequest, tries: list[GenerationResult], model: SpeechLM) -> GenerationResult:
    """The try that is kept, made audible."""
    try:
        chosen = best_of.choose(model, request, tries)
        return chosen if chosen.finished == "failed" else _decode_content(chosen, model)
    except SpeechLMError as error:
        return replace(tries[0], finished="failed", error=f"request {request.id!r}: {error}")


def _decode_content(result: GenerationResult, model: SpeechLM) -> GenerationResult:
    """Fill in the text or the waveform of a result's ids; SSL units alone have neither."""
    tokenizers, ids = model.tokenizers, result.ids
    assert tokenizers is not None and ids is not None
    if result.modality == "text_bpe" and tokenizers.text is not None:
        return replace(result, text=str(tokenizers.text.decode(ids)))
    if result.modality in ("codec", "codec_ssl") and tokenizers.codec is not None:
        codes = ids[:, 1:] if result.modality == "codec_ssl" else ids
        rate = tokenizers.codec.sample_rate
        wav = tokenizers.decode_codec(codes) if len(codes) else np.zeros(0, np.float32)
        return replace(result, wav=np.asarray(wav, dtype=np.float32), sample_rate=rate)
    return result
