"""From requests to results: build prompts, decode them together, turn ids back into text and waveforms.

Requests join the decoder as slots become free; results have the order of the requests. A failing request is reported in
its own result; the others are unaffected.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.errors import GenerationError, SpeechLMError
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.rows import Decoded, failed_result
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.requests.encode_fields import content_values, raw_content
from speechlm_ext.generation.requests.prompt import Prompt, build_prompt, require_tokenizers
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.settings import check_integer
from speechlm_ext.generation.search import best_of
from speechlm_ext.generation.search.beam import beam_search
from speechlm_ext.model.lm import SpeechLMModel

#: Requests are sorted by their targets' modalities in windows of this many batches: results come early, and requests
#: that are decoded side by side need the same logits.
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
    """Generate text and speech for many requests together.

    Args:
        model: with tokenizers; in eval mode during the call.
        requests: any mix of tasks.
        batch_size: maximum number of rows decoded at once; a request takes one, with guidance two.
        progress: show a progress bar if standard error is a terminal.
        on_result: called with (index in ``requests``, result) as soon as each is ready.

    Returns:
        One result per request, in order. Failed requests have ``finished == "failed"`` and ``error``.

    Raises:
        GenerationError: the model has no tokenizers, ``batch_size`` is not positive, or an entry is no request.
    """
    check_integer(batch_size, "batch_size", "generate", 1)
    require_tokenizers(model)
    for index, request in enumerate(requests):
        if not isinstance(request, GenerationRequest):
            raise GenerationError(
                f"requests[{index}] must be a GenerationRequest, got {type(request).__name__}; "
                "GenerationRequest.from_dict makes one from plain data."
            )
    bar = tqdm(total=len(requests), unit="request", desc="generate", disable=None if progress else True)
    batch = _Batch(model, requests, batch_size, on_result, bar)
    was_training = model.training
    model.eval()
    try:
        for job, decoded in Engine(model, batch.num_slots).run(batch.iter_jobs()):
            batch.on_decoded(job, decoded)
    finally:
        model.train(was_training)
        bar.close()
    return [batch.results[index] for index in range(len(requests))]


class _Try(NamedTuple):
    """Key of a decode job: the request's index, and which of its tries."""

    request: int
    number: int


@dataclass(eq=False)
class _Batch:
    """The requests of one call on their way to results. With ``best_of`` or ``n_best`` a request has several tries."""

    model: SpeechLMModel
    requests: Sequence[GenerationRequest]
    batch_size: int
    on_result: Callable[[int, GenerationResult], None] | None
    bar: tqdm
    results: dict[int, GenerationResult] = field(default_factory=dict)
    tries: dict[int, dict[int, GenerationResult]] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        """Rows of the engine: no more than all requests together need, since each takes memory."""
        rows = [2 if r.settings.guidance != 1.0 else 1 for r in self.requests]
        needed = sum(n * r.settings.num_tries for n, r in zip(rows, self.requests, strict=True))
        return max(min(self.batch_size, needed), *rows, 1)

    def iter_jobs(self) -> Iterator[DecodeJob]:
        """Jobs for the engine, in windows sorted by modality; beam searches run here, when their turn comes."""
        window: list[DecodeJob] = []
        for index in range(len(self.requests)):
            window += self.admit(index)
            if len(window) < WINDOW * self.batch_size and index + 1 < len(self.requests):
                continue
            for job in sorted(window, key=lambda job: [s.modality for s in job.prompt.segments]):
                if job.prompt.segments[0].settings.beam_size > 1:
                    self.run_beam_search(job)
                else:
                    yield job
            window = []

    def admit(self, index: int) -> list[DecodeJob]:
        """The jobs of a request, one per try; none if it is rejected, which is then its result."""
        request = self.requests[index]
        try:
            prompt = build_prompt(request, self.model)
        except SpeechLMError as error:
            self._finish(index, GenerationResult(request.id, request.task, "failed", error=str(error)))
            return []
        return [
            DecodeJob(_Try(index, number), prompt.with_seed_offset(number), prompt.target_TS)
            for number in range(request.settings.num_tries)
        ]

    def run_beam_search(self, job: DecodeJob) -> None:
        """Search a request's target, outside the engine."""
        settings, start = job.prompt.segments[0].settings, time.perf_counter()
        try:
            found = beam_search(
                self.model, job.prompt, settings.beam_size, settings.length_penalty, settings.n_best
            )
        except SpeechLMError as error:
            found = [failed_result(job.prompt, str(error), self.model.layout)]
        seconds = time.perf_counter() - start
        beams = [make_result(job.prompt, decoded, seconds, self.model) for decoded in found]
        self._finish(job.key.request, self.merge_tries(job.key.request, beams))

    def on_decoded(self, job: DecodeJob, decoded: Decoded) -> None:
        """Take in a decoded try; the last one completes its request."""
        index, number = job.key
        seconds = time.perf_counter() - job.start_time
        tries = self.tries.setdefault(index, {})
        tries[number] = make_result(job.prompt, decoded, seconds, self.model)
        if len(tries) == self.requests[index].settings.num_tries:
            del self.tries[index]
            self._finish(index, self.merge_tries(index, [tries[n] for n in range(len(tries))]))

    def merge_tries(self, index: int, tries: list[GenerationResult]) -> GenerationResult:
        """One result of a request's tries: the best of them, or the first with the others as alternatives."""
        request = self.requests[index]
        if request.given_target is not None:  # scored, and neither text nor waveform is wanted
            return tries[0]
        if request.settings.best_of > 1:
            try:
                tries = [best_of.choose(self.model, request, tries)]
            except SpeechLMError as error:
                return replace(tries[0], finished="failed", error=f"request {request.id!r}: {error}")
        first, *others = (decode_content(result, self.model) for result in tries)
        return replace(first, alternatives=tuple(others))

    def _finish(self, index: int, result: GenerationResult) -> None:
        self.results[index] = result
        self.bar.update()
        if self.on_result is not None:
            self.on_result(index, result)


def make_result(prompt: Prompt, decoded: Decoded, seconds: float, model: SpeechLMModel) -> GenerationResult:
    """The ids and log-probabilities of a decoded request; :func:`decode_content` adds text and waveform."""
    result = GenerationResult(
        prompt.id,
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
    frames = (*decoded.intermediate, decoded.content_TS)
    *intermediate, ids = (raw_content(f, m, model.layout) for f, m in zip(frames, modalities, strict=True))
    logprobs = content_values(decoded.logprob_TS, prompt.modality, model.layout)
    logprob, num_scored = decoded.logprob, decoded.num_scored
    if prompt.target_TS is not None:  # nothing was sampled, and everything is scored
        new = logprobs[prompt.num_given :]
        logprob, num_scored = float(new.sum(dtype=np.float64)) + decoded.end_logprob, new.size + 1
        if not math.isfinite(logprob):
            message = f"request {result.id!r}: the model's logits are not finite."
            return replace(result, finished="failed", error=message)
    return replace(
        result,
        ids=ids,
        chain=tuple(intermediate),
        logprob=logprob,
        num_scored=num_scored,
        logprobs=logprobs,
        end_logprob=None if math.isnan(decoded.end_logprob) else decoded.end_logprob,
        text=prompt.target_text,
    )


def decode_content(result: GenerationResult, model: SpeechLMModel) -> GenerationResult:
    """The result with the text or waveform of its ids; SSL units alone have neither. A failure is in the result."""
    tokenizers, ids = model.tokenizers, result.ids
    assert tokenizers is not None
    if result.finished == "failed" or ids is None:
        return result
    try:
        if result.modality == "text_bpe" and tokenizers.text is not None:
            return replace(result, text=str(tokenizers.text.decode(ids)))
        if result.modality in ("codec", "codec_ssl") and tokenizers.codec is not None:
            codes = ids[:, 1:] if result.modality == "codec_ssl" else ids
            wav = tokenizers.decode_codec(codes) if len(codes) else np.zeros(0, np.float32)
            return replace(
                result, wav=np.asarray(wav, dtype=np.float32), sample_rate=tokenizers.codec.sample_rate
            )
        return result
    except SpeechLMError as error:
        return replace(result, finished="failed", error=f"request {result.id!r}: {error}")
