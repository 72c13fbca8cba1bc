"""From requests to results: build prompts, decode them together, turn ids back into text and waveforms.

Requests join the decoder as slots get free; results come in the order of the requests. What is wrong with one request
is told in its own result and stops no other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.errors import GenerationError, SpeechLMError
from speechlm_ext.generation.engine.engine import Engine, Work
from speechlm_ext.generation.engine.rows import Decoded, failed
from speechlm_ext.generation.requests.prompt import Prompt, build_prompt, find_task, live_columns, raw_content
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.settings import SamplingSettings, integer
from speechlm_ext.generation.search import best_of
from speechlm_ext.generation.search.beam import beam_search
from speechlm_ext.model.lm import SpeechLMModel

#: Requests are sorted by what they produce in windows of this many batches, so that results come early and what is
#: decoded side by side needs the same logits.
WINDOW = 8


@says_conversions()
def generate(
    model: SpeechLMModel,
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
        GenerationError: the model has no tokenizers, ``batch_size`` is not positive, or an entry is no request.
    """
    integer(batch_size, "batch_size", "generate", 1)
    require_tokenizers(model)
    for index, request in enumerate(requests):
        if not isinstance(request, GenerationRequest):
            raise GenerationError(
                f"requests[{index}] must be a GenerationRequest, got {type(request).__name__}; "
                "GenerationRequest.from_dict makes one from plain data."
            )
    results: list[GenerationResult | None] = [None] * len(requests)
    # A request with best_of or n_best is served as so many tries; the last of them to end makes its result.
    ended: dict[int, dict[int, GenerationResult]] = {}
    bar = tqdm(total=len(requests), unit="request", desc="generate", disable=None if progress else True)

    def finish(index: int, result: GenerationResult) -> None:
        results[index] = result
        bar.update()
        if on_result is not None:
            on_result(index, result)

    def gather(key: _Try, result: GenerationResult) -> None:
        request = requests[key.request]
        count = num_tries(request.settings)
        mine = ended.setdefault(key.request, {})
        mine[key.number] = result
        if len(mine) == count:
            del ended[key.request]
            tries = [mine[number] for number in range(count)]
            if request.settings.best_of > 1:
                result = _best(request, tries, model)
            elif count > 1:
                result = replace(tries[0], alternatives=tuple(tries[1:]))
            finish(key.request, result)

    started: dict[_Try, float] = {}

    def begun(window: list[Work]) -> Iterator[Work]:
        for work in sorted(window, key=lambda w: [s.modality for s in w.prompt.segments]):
            started[work.key] = time.perf_counter()
            if work.prompt.segments[0].settings.beam_size > 1:
                searched(work)
            else:
                yield work

    def works() -> Iterator[Work]:
        window: list[Work] = []
        for index, request in enumerate(requests):
            prompt = prepare(request, model)
            if isinstance(prompt, Prompt):
                window += [
                    Work(_Try(index, number), with_seed(prompt, number), prompt.target_TS)
                    for number in range(num_tries(request.settings))
                ]
            else:
                finish(index, prompt)
            if len(window) >= WINDOW * batch_size:
                yield from begun(window)
                window = []
        yield from begun(window)

    def served(work: Work, decoded: Decoded) -> None:
        seconds = time.perf_counter() - started.pop(work.key)
        gather(work.key, result_of(requests[work.key.request], work.prompt, decoded, seconds, model))

    def searched(work: Work) -> None:
        found = _searched(work.prompt, model)
        seconds = time.perf_counter() - started.pop(work.key)
        first, *others = (
            result_of(requests[work.key.request], work.prompt, one, seconds, model) for one in found
        )
        gather(work.key, replace(first, alternatives=tuple(others)))

    was_training = model.training
    model.eval()
    try:
        # A request with guidance takes two rows. More rows than there is work for would only take memory.
        rows = [2 if r.settings.guidance != 1.0 else 1 for r in requests]
        useful = sum(n * num_tries(r.settings) for n, r in zip(rows, requests, strict=True))
        engine = Engine(model, max(min(batch_size, useful), *rows, 1))
        for work, decoded in engine.run(works()):
            served(work, decoded)
    finally:
        model.train(was_training)
        bar.close()
    return [r for r in results if r is not None]


class _Try(NamedTuple):
    """Which request, and which of its tries."""

    request: int
    number: int


def num_tries(settings: SamplingSettings) -> int:
    """Samples that are drawn for a request; a beam search is one piece of work."""
    return 1 if settings.beam_size > 1 else max(settings.best_of, settings.n_best)


def with_seed(prompt: Prompt, number: int) -> Prompt:
    """The prompt of try ``number``: equal but for the seed, which counts up from the request's own."""
    if number == 0:
        return prompt
    segments = tuple(
        replace(s, settings=replace(s.settings, seed=(s.settings.seed + number) % 2**63))
        for s in prompt.segments
    )
    return replace(prompt, segments=segments)


def _searched(prompt: Prompt, model: SpeechLMModel) -> list[Decoded]:
    settings = prompt.segments[0].settings
    try:
        return beam_search(model, prompt, settings.beam_size, settings.length_penalty, settings.n_best)
    except SpeechLMError as error:
        return [failed(prompt, str(error), model.layout)]


def require_tokenizers(model: SpeechLMModel) -> None:
    """Raises :class:`GenerationError` for a model that cannot read requests."""
    if model.tokenizers is None:
        raise GenerationError("the model has no tokenizers; load a model folder that contains tokenizers/.")


def prepare(request: GenerationRequest, model: SpeechLMModel) -> Prompt | GenerationResult:
    """Build a request's prompt, or say in a result why it cannot be served."""
    assert model.tokenizers is not None
    try:
        template = find_task(request, model.tasks)
        if request.settings.best_of > 1:
            best_of.recognition_of(template, model.tasks, f"request {request.id!r}")
        prompt = build_prompt(request, template, model.layout, model.tokenizers, model.max_positions)
        if request.settings.n_best > 1 and prompt.segments[-1].settings.greedy:
            raise GenerationError(
                f"request {request.id!r}: greedy gives one result; leave n_best out, or sample, or set beam_size."
            )
        return prompt
    except SpeechLMError as error:
        return GenerationResult(request.id, request.task, "failed", error=str(error))


def result_of(
    request: GenerationRequest, prompt: Prompt, decoded: Decoded, seconds: float, model: SpeechLMModel
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
    logprobs = live_columns(decoded.logprob_TS, prompt.modality, model.layout)
    logprob, num_scored = decoded.logprob, decoded.num_scored
    if prompt.target_TS is not None:  # nothing was chosen, and all of it is scored
        new = logprobs[prompt.num_given :]
        logprob, num_scored = float(new.sum(dtype=np.float64)) + decoded.end_logprob, new.size + 1
        if not math.isfinite(logprob):
            return replace(
                result, finished="failed", error=f"request {result.id!r}: the model's logits are not finite."
            )
    result = replace(
        result,
        ids=ids,
        chain=tuple(chain),
        logprob=logprob,
        num_scored=num_scored,
        logprobs=logprobs,
        end_logprob=None if math.isnan(decoded.end_logprob) else decoded.end_logprob,
    )
    if prompt.target_TS is not None:  # what was given needs no sound
        return replace(result, text=request.target_text)
    try:
        return result if request.settings.best_of > 1 else _decode_content(result, model)
    except SpeechLMError as error:
        return replace(result, finished="failed", error=f"request {result.id!r}: {error}")


def _best(
    request: GenerationRequest, tries: list[GenerationResult], model: SpeechLMModel
) -> GenerationResult:
    """The try that is kept, made audible."""
    try:
        chosen = best_of.choose(model, request, tries)
        return chosen if chosen.finished == "failed" else _decode_content(chosen, model)
    except SpeechLMError as error:
        return replace(tries[0], finished="failed", error=f"request {request.id!r}: {error}")


def _decode_content(result: GenerationResult, model: SpeechLMModel) -> GenerationResult:
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
