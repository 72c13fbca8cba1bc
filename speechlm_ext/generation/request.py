"""What is asked of a model and what it answers: requests, sampling settings, results.

All three are frozen data. A request is checked in two steps: what can be seen without a model (numbers,
types) when it is made, and what needs the model (task, fields, lengths) when its prompt is built. Lengths
count content frames: text tokens for text, codec frames for speech; specials and delay rows are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.tasks import TaskTemplate

#: Longest target when neither the request nor the model's context says less.
DEFAULT_MAX_LEN = 2048


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen and how long a target may be.

    Fields left at None take the default of the target's modality (:meth:`resolved`): greedy for text;
    temperature 0.8 and top-k 30 for speech, the usual choice for codec tokens.
    """

    greedy: bool | None = None
    """Take the most probable token (the lowest id among equals) and ignore the other choices."""
    temperature: float | None = None
    """Divides the logits before sampling; > 0."""
    codec_temperature: float | None = None
    """Temperature of the streams behind the first one; 0 takes their most probable code. The first stream decides what
    is said, the others how it sounds: sampling only the first varies the words' course and keeps the sound clean. None:
    ``temperature`` for all streams."""
    top_k: int | None = None
    """Sample among the k most probable tokens only; >= 1."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p; 0 < p <= 1."""
    min_p: float | None = None
    """Leave out tokens that are less probable than this times the most probable one; 0 <= p <= 1."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of ids that the stream had in the last ``repetition_window``
    rows; > 0, 1 is off."""
    repetition_window: int = 50
    """Rows that the repetition penalty looks back; 50 is a second at 50 frames a second."""
    guidance: float = 1.0
    """Classifier-free guidance: logits ``u + guidance (c - u)``, c with the task's conditions and u without them. 1 is
    off; more costs a second row of the batch. Made for models that were trained with conditions left out at times."""
    beam_size: int = 1
    """Beam search over so many beginnings, for text and units; 1 is off. Takes no other choice of tokens."""
    length_penalty: float = 1.0
    """Beam search compares ``log p / tokens^length_penalty``; 0 favours short targets."""
    seed: int = 0
    """Draws depend on (seed, row, stream) alone: equal requests give equal tokens in any batch."""
    best_of: int = 1
    """Tries at speaking a text, with seeds from ``seed`` on; the one in which the model itself recognises the text best
    is kept. Needs a model that was trained on recognition too."""
    min_len: int = 1
    """Fewest content frames before the end may come; counted without a continuation's given part."""
    max_len: int | None = None
    """Most content frames; the end is forced there. None: as many as the context holds, at most 2048."""
    max_len_ratio: float | None = None
    """Most content frames as a multiple of the prompt's content frames; instead of ``max_len``."""

    def __post_init__(self) -> None:
        where = "sampling settings"
        if self.temperature is not None:
            _number(self.temperature, "temperature", where)
            if not self.temperature > 0:
                raise GenerationError(
                    f"{where}: temperature must be greater than 0, got {self.temperature}; set greedy for "
                    "the most probable token."
                )
        if self.codec_temperature is not None:
            _number(self.codec_temperature, "codec_temperature", where)
            if self.codec_temperature < 0:
                raise GenerationError(
                    f"{where}: codec_temperature must be 0 (the most probable code) or more, got "
                    f"{self.codec_temperature}."
                )
        if self.top_k is not None:
            _integer(self.top_k, "top_k", where, 1)
        if self.top_p is not None:
            _number(self.top_p, "top_p", where)
            if not 0 < self.top_p <= 1:
                raise GenerationError(
                    f"{where}: top_p must be greater than 0 and at most 1, got {self.top_p}."
                )
        for name, least, most in (("min_p", 0, 1), ("repetition_penalty", 1e-3, 1e3), ("guidance", 0, 1e3)):
            value = getattr(self, name)
            if value is not None:
                _number(value, name, where)
                if not least <= value <= most:
                    raise GenerationError(f"{where}: {name} must be from {least} to {most}, got {value}.")
        _integer(self.repetition_window, "repetition_window", where, 1)
        _integer(self.beam_size, "beam_size", where, 1)
        _number(self.length_penalty, "length_penalty", where)
        if self.beam_size > 1:
            names = ("greedy", "temperature", "codec_temperature", "top_k", "top_p", "min_p")
            given = [n for n in names if getattr(self, n) is not None]
            given += [n for n in ("guidance", "repetition_penalty", "best_of") if getattr(self, n) != 1]
            if given:
                raise GenerationError(f"{where}: beam search takes no {', '.join(given)}; leave it out.")
        _integer(self.seed, "seed", where, 0)
        if self.seed >= 2**63:
            raise GenerationError(f"{where}: seed must be below 2**63, got {self.seed}.")
        _integer(self.best_of, "best_of", where, 1)
        if self.best_of > 1 and self.greedy:
            raise GenerationError(f"{where}: greedy gives one result; leave it out, or set best_of to 1.")
        _integer(self.min_len, "min_len", where, 0)
        if self.max_len is not None:
            _integer(self.max_len, "max_len", where, 1)
            if self.max_len_ratio is not None:
                raise GenerationError(f"{where}: max_len and max_len_ratio are both given; give one of them.")
            if self.max_len < self.min_len:
                raise GenerationError(
                    f"{where}: the target can never end: min_len {self.min_len} is more than max_len "
                    f"{self.max_len}."
                )
        if self.max_len_ratio is not None:
            _number(self.max_len_ratio, "max_len_ratio", where)
            if not self.max_len_ratio > 0:
                raise GenerationError(
                    f"{where}: max_len_ratio must be greater than 0, got {self.max_len_ratio}."
                )

    def resolved(self, modality: str) -> SamplingSettings:
        """Settings with every choice made, for a target of ``modality``."""
        if self.beam_size > 1:  # the search makes the choices
            return self
        chosen = (self.greedy, self.temperature, self.top_k, self.top_p, self.min_p)
        if modality in ("text_bpe", "g2p"):
            # Asking for a temperature or a cut is asking to sample.
            greedy = self.greedy if self.greedy is not None else all(c is None for c in chosen[1:])
            return dataclasses.replace(self, greedy=greedy, temperature=self.temperature or 1.0)
        top_k = 30 if self.top_k is None and self.top_p is None else self.top_k
        return dataclasses.replace(
            self, greedy=bool(self.greedy), temperature=self.temperature or 0.8, top_k=top_k, top_p=self.top_p
        )


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One thing to generate.

    ``text`` and ``audio`` are the task's conditions; for a task without conditions (text or audio
    continuation) the one that is its target is the given beginning, or is left out to start from nothing.
    """

    id: str
    """Names the request in results and errors."""
    task: str
    """A trained task's name (``codec_ssl_plain_tts``) or its kind (``tts``)."""
    text: str | None = None
    audio: str | Path | np.ndarray | None = None
    """A file, or a float waveform ``[T]`` in [-1, 1]."""
    speaker_prompt: str | Path | np.ndarray | None = None
    """A recording of the voice to speak with, for tasks with a speaker condition."""
    lang: str | None = None
    """Kept in the record; tokens do not depend on it."""
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    audio_rate: int | None = None
    """Rate of waveforms given as arrays, in Hz; None: the tokenizers' own rate."""
    resample: bool = False
    """Convert audio of another sampling rate; otherwise it is an error."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise GenerationError(f"a request needs an id that is a non-empty string, got {self.id!r}.")
        where = f"request {self.id!r}"
        if not isinstance(self.task, str) or not self.task:
            raise GenerationError(f"{where}: task must be a task's name, got {self.task!r}.")
        for name in ("text", "lang"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise GenerationError(f"{where}: {name} must be a string, got {type(value).__name__}.")
        for name in ("audio", "speaker_prompt"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, Path, np.ndarray)):
                raise GenerationError(
                    f"{where}: {name} must be a path or a numpy waveform, got {type(value).__name__}."
                )
        if not isinstance(self.settings, SamplingSettings):
            raise GenerationError(
                f"{where}: settings must be SamplingSettings, got {type(self.settings).__name__}."
            )

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str, folder: Path | None = None) -> GenerationRequest:
        """Read a request from a JSON object; settings stand beside the other keys or under ``settings``.

        Args:
            data: ``id``, ``task``, ``text``, ``audio``, ``speaker_prompt``, ``lang``, ``resample``, settings.
            where: the object's place, for messages.
            folder: what relative audio paths are relative to.

        Raises:
            GenerationError: an unknown key, a missing one, or a value that cannot be used.
        """
        if not isinstance(data, dict):
            raise GenerationError(f"{where}: expected a JSON object, got {type(data).__name__}.")
        names = {f.name for f in dataclasses.fields(SamplingSettings)}
        nested = data.get("settings") or {}
        if not isinstance(nested, dict):
            raise GenerationError(f"{where}: settings must be an object, got {type(nested).__name__}.")
        settings = {**nested, **{k: v for k, v in data.items() if k in names}}
        rest = {k: v for k, v in data.items() if k not in names and k != "settings"}
        known = {"id", "task", "text", "audio", "speaker_prompt", "lang", "resample"}
        unknown = sorted((set(rest) - known) | (set(settings) - names))
        if unknown:
            raise GenerationError(f"{where}: unknown keys {unknown}; known are {sorted(known | names)}.")
        missing = [k for k in ("id", "task") if k not in rest]
        if missing:
            raise GenerationError(
                f"{where}: {' and '.join(missing)} missing; every request needs an id and a task."
            )
        for key in ("audio", "speaker_prompt"):
            if folder is not None and isinstance(rest.get(key), str):
                rest[key] = str(folder / rest[key])
        try:
            return cls(**rest, settings=SamplingSettings(**settings))
        except GenerationError as error:
            raise GenerationError(f"{where}: {error}") from None


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """What came of a request. ``finished`` is ``eos`` (the model ended), ``max_len`` or ``failed``."""

    id: str
    task: str
    """The trained task's name; the asked one if it could not be resolved."""
    finished: str
    modality: str | None = None
    """Modality of the last target, whose content is in the fields below."""
    text: str | None = None
    """Decoded text of a text target, with a continuation's given part."""
    wav: np.ndarray | None = None
    """Decoded float32 waveform ``[T]`` of a speech target that has a codec."""
    sample_rate: int | None = None
    """Rate of ``wav`` in Hz."""
    ids: np.ndarray | None = None
    """Raw ids int32 ``[T, columns]`` (from 0, as the tokenizers count) of the whole target."""
    num_given: int = 0
    """How many of the first frames of ``ids`` a continuation request gave."""
    chain: tuple[np.ndarray, ...] = ()
    """Raw ids of earlier targets, for tasks that produce several."""
    logprob: float | None = None
    """Sum of log-probabilities (modality mask, temperature 1) of the tokens chosen, in all targets."""
    num_scored: int = 0
    """Tokens that ``logprob`` sums over: generated codes and ends that were not forced."""
    logprobs: np.ndarray | None = None
    """Log-probability of each of ``ids``, float32 ``[T, columns]``; NaN for a given beginning."""
    end_logprob: float | None = None
    """Of the last target's end: 0 where it was forced."""
    seconds: float = 0.0
    """Time from joining the decoder to the end."""
    settings: SamplingSettings | None = None
    """The settings used, with the defaults filled in; with ``best_of`` the seed of the try that was kept."""
    tries: tuple[float, ...] = ()
    """With ``best_of``: log p(text | speech) of each try that did not fail, by the model's own recognition."""
    error: str | None = None
    """Why it failed."""


def check_fields(request: GenerationRequest, template: TaskTemplate) -> None:
    """Compare the given fields with those that a task takes.

    Raises:
        GenerationError: a condition is missing or a field is given that the task does not take.
    """
    where = f"request {request.id!r} (task {template.name})"
    given = {
        "text": request.text is not None,
        "audio": request.audio is not None,
        "speaker": request.speaker_prompt is not None,
    }
    option = {"text": "text", "audio": "audio", "speaker": "speaker_prompt"}
    needed = {e.field for e in template.conditions}
    for name in sorted(needed):
        if not given[name]:
            raise GenerationError(f"{where}: the condition {option[name]} is missing; the task needs it.")
    if "text" in needed and not (request.text or "").strip():
        raise GenerationError(f"{where}: text is empty; give at least one word.")
    allowed = needed or {template.targets[0].field}
    for name, is_given in given.items():
        if is_given and name not in allowed:
            takes = ", ".join(option[n] for n in sorted(allowed))
            raise GenerationError(
                f"{where}: {option[name]} is given but the task takes only {takes}; leave it out."
            )


def _integer(value: Any, name: str, where: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise GenerationError(f"{where}: {name} must be an integer of at least {least}, got {value!r}.")


def _number(value: Any, name: str, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise GenerationError(f"{where}: {name} must be a finite number, got {value!r}.")
