"""Recognition while the audio still arrives: partial results, chunk by chunk.

Each chunk lengthens the recording; its tokens are the prompt's condition, which grows at its end. What the prompts have
in common stays in the key/value cache, so a chunk costs the reading of its own frames and of the few before it that
changed, and the decoding of the text. A partial result may change in its last words; ``stable`` is what two partial
results in a row agree on (LocalAgreement, Liu et al. 2020, "Low-latency sequence-to-sequence speech recognition").
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import regex

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.generate import result_of
from speechlm_ext.generation.live.session import Session, check_one_row
from speechlm_ext.generation.requests.prompt import build_prompt, find_task
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.settings import SamplingSettings, number
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.utils.text import NO_SPACES

_UNIT = regex.compile(rf"(?={NO_SPACES})\X|(?:(?!{NO_SPACES})\S)+")


@dataclass(frozen=True)
class PartialText:
    """What was understood so far."""

    text: str
    """Of all the audio so far; its end may still change."""
    stable: str
    """The beginning that this and the partial result before agree on, in whole words, and in whole characters where a
    script has no spaces. It only grows: a word is never taken back, even if later audio speaks against it."""
    seconds: float
    """Seconds of audio so far."""


class Listener:
    """Transcribes audio as it comes.

        listener = model.listen("asr", chunk_seconds=1.0)
        for samples in microphone:              # float32 at listener.sample_rate
            for partial in listener.push(samples):
                print(partial.text)
        print(listener.finish().text)

    Args:
        model: with tokenizers, in eval mode.
        task: a trained task from one recording to text.
        chunk_seconds: audio between two partial results, above 0.
        settings: of the text; default greedy.

    Raises:
        GenerationError: no such task, or one that takes or gives something else.
    """

    def __init__(
        self,
        model: SpeechLMModel,
        task: str,
        chunk_seconds: float = 1.0,
        settings: SamplingSettings | None = None,
    ) -> None:
        if model.tokenizers is None:
            raise GenerationError(
                "listening needs a model with tokenizers; load a model folder that contains tokenizers/."
            )
        number(chunk_seconds, "chunk_seconds", "listening")
        if not chunk_seconds > 0:
            raise GenerationError(f"chunk_seconds must be above 0, got {chunk_seconds}.")
        self.settings = settings or SamplingSettings()
        check_one_row(self.settings, "listening")
        self.model, self.tokenizers = model, model.tokenizers
        self.template = find_task(GenerationRequest("audio", task), model.tasks)
        (*conditions,), (*targets,) = self.template.conditions, self.template.targets
        if [e.field for e in conditions] != ["audio"] or [t.modality for t in targets] != ["text_bpe"]:
            raise GenerationError(
                f"task {self.template.name} does not turn one recording into text; listening needs one that does."
            )
        name = "ssl" if conditions[0].modality == "ssl" else "codec"
        self.sample_rate = int(getattr(self.tokenizers, name).sample_rate)
        """Hz of the samples that :meth:`push` takes."""
        self._chunk = max(1, round(chunk_seconds * self.sample_rate))
        self._session = Session(model)
        self._wave = np.empty(0, dtype=np.float32)
        self._heard, self._last, self._stable = 0, "", ""

    def push(self, samples: np.ndarray) -> list[PartialText]:
        """Take in audio; returns a partial result for each chunk that became whole.

        Args:
            samples: ``[n]`` at ``sample_rate``, any number of them: floats in [-1, 1] or integer PCM.

        Raises:
            AudioError: not such samples. GenerationError: the context cannot hold more audio.
        """
        if np.size(samples) == 0:
            return []
        self._wave = np.concatenate([self._wave, check_wave(samples, "samples pushed to a listener")])
        out = []
        while len(self._wave) - self._heard >= self._chunk:
            self._heard += self._chunk
            out.append(self._partial(self._wave[: self._heard]))
        return out

    def finish(self) -> GenerationResult:
        """The result of the whole recording: that of the same request to ``generate``. The listener starts anew.

        Raises:
            GenerationError: nothing was pushed, or the context cannot hold it.
        """
        if len(self._wave) == 0:
            raise GenerationError("nothing was heard: push audio before finish.")
        wave = self._wave
        self._wave, self._heard, self._last, self._stable = wave[:0], 0, "", ""
        return self._understand(wave)

    def _partial(self, wave: np.ndarray) -> PartialText:
        text = self._understand(wave).text or ""
        agreed = _common_words(self._last, text)
        before = _units(self._stable)
        if _units(agreed)[: len(before)] == before:
            self._stable = agreed
        self._last = text
        return PartialText(text, self._stable, len(wave) / self.sample_rate)

    def _understand(self, wave: np.ndarray) -> GenerationResult:
        begun = time.perf_counter()
        request = GenerationRequest(
            "audio", self.template.name, audio=wave, audio_rate=self.sample_rate, settings=self.settings
        )
        prompt = build_prompt(
            request, self.template, self.model.layout, self.tokenizers, self.model.max_positions
        )
        decoded = self._session.decode(prompt)
        if decoded.error is not None:
            raise GenerationError(decoded.error)
        result = result_of(request, prompt, decoded, 0.0, self.model)
        return replace(result, seconds=time.perf_counter() - begun)


def _units(text: str) -> list[str]:
    """What is agreed on as a whole: words, and in scripts without spaces grapheme clusters (letter and marks)."""
    return _UNIT.findall(text)


def _common_words(first: str, second: str) -> str:
    """The whole units at the beginning that two texts share, as the second one has them."""
    end = 0
    for a, b in zip(_units(first), _UNIT.finditer(second), strict=False):
        if a != b.group():
            break
        end = b.end()
    return second[:end]
