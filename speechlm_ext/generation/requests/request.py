"""What is asked of a model and what it answers: requests and results.

Both are frozen data, and so are the settings of a request (``settings.py``). A request is checked in two steps: what
can be seen without a model (numbers, types) when it is made, and what needs the model (task, fields, lengths) when its
prompt is built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.requests.settings import SamplingSettings, integer
from speechlm_ext.tasks import TaskTemplate

#: Fields of a request that are a file or a waveform.
RECORDINGS = ("audio", "speaker_prompt", "target_audio")


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
    """A file, or a waveform ``[T]``: floats in [-1, 1] or integer PCM."""
    speaker_prompt: str | Path | np.ndarray | None = None
    """A recording of the voice to speak with, for tasks with a speaker condition."""
    lang: str | None = None
    """Kept in the record; tokens do not depend on it."""
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    audio_rate: int | None = None
    """Rate of waveforms given as arrays, in Hz; None: the tokenizers' own rate."""
    resample: bool = True
    """Convert audio of another sampling rate, which is said in the log; False makes it an error."""
    target_text: str | None = None
    """The target's text, for tasks that end in one: it is not generated but given, and the result has the
    log-probability of each of its tokens and of the end."""
    target_audio: str | Path | np.ndarray | None = None
    """The same for tasks that end in speech: a recording."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise GenerationError(f"a request needs an id that is a non-empty string, got {self.id!r}.")
        where = f"request {self.id!r}"
        if not isinstance(self.task, str) or not self.task:
            raise GenerationError(f"{where}: task must be a task's name, got {self.task!r}.")
        for name in ("text", "lang", "target_text"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise GenerationError(f"{where}: {name} must be a string, got {type(value).__name__}.")
        for name in ("id", "task", "text", "lang", "target_text"):
            _check_unicode(getattr(self, name), name, where)
        for name in RECORDINGS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, Path, np.ndarray)):
                raise GenerationError(
                    f"{where}: {name} must be a path or a numpy waveform, got {type(value).__name__}."
                )
            if isinstance(value, (str, Path)) and "\0" in str(value):
                raise GenerationError(f"{where}: {name} has a zero byte in its path: {str(value)!r}.")
            if isinstance(value, (str, Path)):
                _check_unicode(str(value), name, where)
        if not isinstance(self.resample, bool):
            raise GenerationError(f"{where}: resample must be true or false, got {self.resample!r}.")
        if self.audio_rate is not None:
            integer(self.audio_rate, "audio_rate", where, 1)
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
        nested = {} if data.get("settings") is None else data["settings"]
        if not isinstance(nested, dict):
            raise GenerationError(f"{where}: settings must be an object, got {type(nested).__name__}.")
        settings = {**nested, **{k: v for k, v in data.items() if k in names}}
        rest = {k: v for k, v in data.items() if k not in names and k != "settings"}
        known = {"id", "task", "text", "lang", "resample", "target_text", *RECORDINGS}
        unknown = sorted((set(rest) - known) | (set(settings) - names))
        if unknown:
            raise GenerationError(f"{where}: unknown keys {unknown}; known are {sorted(known | names)}.")
        missing = [k for k in ("id", "task") if k not in rest]
        if missing:
            raise GenerationError(
                f"{where}: {' and '.join(missing)} missing; every request needs an id and a task."
            )
        for key in RECORDINGS:
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
    """Sum of log-probabilities (modality mask, temperature 1) of the tokens chosen, in all targets; of a given target
    that of all its tokens and its end."""
    num_scored: int = 0
    """Tokens that ``logprob`` sums over: generated codes and ends that were not forced."""
    logprobs: np.ndarray | None = None
    """Log-probability of each of ``ids``, float32 ``[T, columns]``; NaN for a given beginning."""
    end_logprob: float | None = None
    """Of the last target's end: 0 where it was forced by the longest length."""
    seconds: float = 0.0
    """Time from joining the decoder to the end."""
    alternatives: tuple[GenerationResult, ...] = ()
    """With ``n_best``: the other results, in order."""
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


def _check_unicode(text: str | None, name: str, where: str) -> None:
    """JSON and file names can bring halves of characters, which can neither be tokenized nor written."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise GenerationError(
            f"{where}: {name} has a lone surrogate ({half}) at character {error.start}, which is no character."
        ) from None
