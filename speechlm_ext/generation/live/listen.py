"""Recognition of audio as it arrives: partial results, chunk by chunk.

The prompt's condition grows by each chunk's tokens. The rows that prompts share stay in the key/value cache, so a chunk
costs the prefill of its own frames and of the few before it that changed, and the decoding of the text. The last words
of a partial result may change; ``stable`` is the beginning on which two consecutive partial results agree
(LocalAgreement, Liu et al. 2020, "Low-latency sequence-to-sequence speech recognition").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import regex

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.live.session import Session, check_one_row
from speechlm_ext.generation.requests.prompt import build_prompt, find_task, require_tokenizers
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.settings import Bounds, SamplingSettings
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.utils.text import NO_SPACES

#: The units of agreement: words, and in scripts without spaces grapheme clusters (letter and marks).
_UNIT = regex.compile(rf"(?={NO_SPACES})\X|(?:(?!{NO_SPACES})\S)+")


@dataclass(frozen=True)
class PartialText:
    """Transcript of the audio so far."""

    text: str
    """Of all the audio so far; its end may still change."""
    stable: str
    """The beginning on which this and the previous partial result agree, in whole words, and in whole characters in
    scripts without spaces. It only grows: a word is never retracted, even if later audio contradicts it."""
    seconds: float
    """Seconds of audio so far."""


class Listener:
    """Transcribes audio as it arrives.

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
        GenerationError: no such task, or one with other conditions or targets.
    """

    def __init__(
        self,
        model: SpeechLMModel,
        task: str,
        chunk_seconds: float = 1.0,
        settings: SamplingSettings | None = None,
    ) -> None:
        self.model, self.tokenizers = model, require_tokenizers(model)
        seconds = Bounds(0, is_open=True)
        if not seconds.holds(chunk_seconds):
            raise GenerationError(f"chunk_seconds must be {seconds}, got {chunk_seconds!r}.")
        self.settings = settings or SamplingSettings()
        check_one_row(self.settings, "listening")
        self.template = find_task(GenerationRequest("audio", task), model.tasks)
        conditions, targets = self.template.conditions, self.template.targets
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
        self._num_done, self._last, self._stable = 0, "", ""

    def push(self, samples: np.ndarray) -> list[PartialText]:
        """Take in audio; returns a partial result for each chunk that is complete now.

        Args:
            samples: ``[n]`` at ``sample_rate``, any number of them: floats in [-1, 1] or integer PCM.

        Raises:
            AudioError: not such samples. GenerationError: the context cannot hold more audio.
        """
        if np.size(samples) == 0:
            return []
        self._wave = np.concatenate([self._wave, check_wave(samples, "samples pushed to a listener")])
        out = []
        while len(self._wave) - self._num_done >= self._chunk:
            self._num_done += self._chunk
            out.append(self._partial(self._wave[: self._num_done]))
        return out

    def finish(self) -> GenerationResult:
        """The result of the whole recording, equal to that of ``generate``. The listener can be used again.

        Raises:
            GenerationError: nothing was pushed, or the context cannot hold it.
        """
        if len(self._wave) == 0:
            raise GenerationError("there is no audio: push some before finish.")
        wave = self._wave
        self._wave, self._num_done, self._last, self._stable = wave[:0], 0, "", ""
        return self._transcribe(wave)

    def _partial(self, wave: np.ndarray) -> PartialText:
        text = self._transcribe(wave).text or ""
        agreed = _common_words(self._last, text)
        before = _UNIT.findall(self._stable)
        if _UNIT.findall(agreed)[: len(before)] == before:
            self._stable = agreed
        self._last = text
        return PartialText(text, self._stable, len(wave) / self.sample_rate)

    def _transcribe(self, wave: np.ndarray) -> GenerationResult:
        request = GenerationRequest(
            "audio", self.template.name, audio=wave, audio_rate=self.sample_rate, settings=self.settings
        )
        result, _ = self._session.generate(build_prompt(request, self.model))
        if result.error is not None:
            raise GenerationError(result.error)
        return result


def _common_words(first: str, second: str) -> str:
    """The leading units that two texts share, with the second one's spacing."""
    end = 0
    for a, b in zip(_UNIT.findall(first), _UNIT.finditer(second), strict=False):
        if a != b.group():
            break
        end = b.end()
    return second[:end]
