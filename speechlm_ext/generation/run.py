"""From requests to results: build prompts, decode them together, turn ids back into text and waveforms.

Requests join the decoder as slots get free; results come in the order of the requests. What is wrong with one request
is told in its own result and stops no other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from speechlm_ext.errors import GenerationError, SpeechLMError
from speechlm_ext.generation import best_of
from speechlm_ext.generation.beam import beam_search
from speechlm_ext.generation.engine import Engine, Work
from speechlm_ext.generation.prompt import Prompt, build_prompt, find_task, live_columns, raw_content
from speechlm_ext.generation.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.rows import Decoded, failed

if TYPE_CHECKING:
    from speechlm_ext.model.speechlm import SpeechLM


#: Requests are sorted by what they produce in windows of this many batches, so that results come early and what is
#: decoded side by side needs the same logits.
WINDOW = 8


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
        batch_size: most rows decoded at once; a request takes one, with guidance two.
        progress: show a bar (never where the output is not a terminal).
        on_result: called with (index in ``requests``, result) as soon as each is ready.

    Returns:
        One result per request, in order. Bad requests have ``finished == "failed"`` and ``error``.

    Raises:
        GenerationError: the model has no tokenizers or no tasks, or ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise GenerationError(f"batch_size must be at least 1, got {batch_size}.")
    require_tokenizers(model)
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

    started: dict[int, float] = {}

    def works() -> Iterator[Work]:
        for first in range(0, len(tries), WINDOW * batch_size):
            window = []
            for number in range(first, min(first + WINDOW * batch_size, len(tries))):
                prompt = prepare(tries[number][1], model)
                if isinstance(prompt, Prompt):
                    window.append(Work(number, prompt))
                else:
                    finish(number, prompt)
            for work in sorted(window, key=lambda w: [s.modality for s in w.prompt.segments]):
                started[work.key] = time.perf_counter()
                if work.prompt.segments[0].settings.beam_size > 1:
                    served(work, _searched(work.prompt, model))
                else:
                    yield work

    def served(work: Work, decoded: Decoded) -> None:
        seconds = time.perf_counter() - started.pop(work.key)
        finish(work.key, result_of(tries[work.key][1], work.prompt, decoded, seconds, model))

    was_training = model.training
    model.eval()
    try:
        # A request with guidance takes two rows.
        least = 2 if any(r.settings.guidance != 1.0 for r in requests) else 1
        engine = Engine(model, max(batch_size, least))
        for work, decoded in engine.run(works()):
            served(work, decoded)
    finally:
        model.train(was_training)
        bar.close()
    return [r for r in results if r is not None]


def _searched(prompt: Prompt, model: SpeechLM) -> Decoded:
    settings = prompt.segments[0].settings
    try:
        return beam_search(model, prompt, settings.beam_size, settings.length_penalty)[0]
    except SpeechLMError as error:
        return failed(prompt, str(error), model.layout)


def require_tokenizers(model: SpeechLM) -> None:
    """Raises :class:`GenerationError` for a model that cannot read requests."""
    if model.tokenizers is None:
        raise GenerationError("the model has no tokenizers; load a model folder that contains tokenizers/.")


def prepare(request: GenerationRequest, model: SpeechLM) -> Prompt | GenerationResult:
    """Build a request's prompt, or say in a result why it cannot be served."""
    assert model.tokenizers is not None
    try:
        template = find_task(request, model.tasks)
        if request.settings.best_of > 1:
            best_of.recognition_of(template, model.tasks, f"request {request.id!r}")
        return build_prompt(request, template, model.layout, model.tokenizers, model.max_positions)
    except SpeechLMError as error:
        return GenerationResult(request.id, request.task, "failed", error=str(error))


def result_of(
    request: GenerationRequest, prompt: Prompt, decoded: Decoded, seconds: float, model: SpeechLM
) -> GenerationResult:
    """The result of a decoded request; of several tries only the one that is kept becomes sound."""
    result = GenerationResult(
        request.id,
        prompt.template.name,
        decoded.finished,
        modality=prompt.modality,
        num_given=prompt.num_given if len(prompt.segments) == 1 else 0,
        seconds=seconds,
        settings=prompt.segments[-1].settings,
    )
    if decoded.error is not None:
        return replace(result, error=decoded.error)
    modalities = [segment.modality for segment in prompt.segments]
    frames = (*decoded.chain, decoded.content_TS)
    *chain, ids = (raw_content(f, m, model.layout) for f, m in zip(frames, modalities, strict=True))
    result = replace(
        result,
        ids=ids,
        chain=tuple(chain),
        logprob=decoded.logprob,
        num_scored=decoded.num_scored,
        logprobs=live_columns(decoded.logprob_TS, prompt.modality, model.layout),
        end_logprob=None if math.isnan(decoded.end_logprob) else decoded.end_logprob,
    )
    try:
        return result if request.settings.best_of > 1 else _decode_content(result, model)
    except SpeechLMError as error:
        return replace(result, finished="failed", error=f"request {result.id!r}: {error}")


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
