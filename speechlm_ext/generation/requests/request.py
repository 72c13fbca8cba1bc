"""Requests to a model and their results, as frozen data.

A request is checked in two steps: numbers and types when it is made, and what needs the model (task, fields, lengths)
when its prompt is built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.requests.settings import SamplingSettings, check_integer
from speechlm_ext.tasks import TaskTemplate

#: Fields of a request that are a file or a waveform.
RECORDINGS = ("audio", "speaker_prompt", "target_audio")
#: The field of a request that holds each manifest field of a task.
FIELD_NAMES = {"text": "text", "audio": "audio", "speaker": "speaker_prompt"}


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One text or recording to generate.

    ``text`` and ``audio`` are the task's conditions. A task without conditions (text or audio continuation) continues
    the one that is its target, or starts from nothing if that is left out.
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
    """Convert audio of another sampling rate and log it; False makes it an error."""
    target_text: str | None = None
    """Target text to score instead of generating one, for tasks that end in text: the result has the log-probability
    of each of its tokens and of the end."""
    target_audio: str | Path | np.ndarray | None = None
    """Target recording to score, for tasks that end in speech."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise GenerationError(f"a request needs an id that is a non-empty string, got {self.id!r}.")
        where = f"request {self.id!r}"
        if not isinstance(self.task, str) or not self.task:
            raise GenerationError(f"{where}: task must be a task's name, got {self.task!r}.")
        for name in ("id", "task", "text", "lang", "target_text"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise GenerationError(f"{where}: {name} must be a string, got {type(value).__name__}.")
            _check_unicode(value, name, where)
        for name in RECORDINGS:
            value = getattr(self, name)
            if value is None or isinstance(value, np.ndarray):
                continue
            if not isinstance(value, (str, Path)):
                raise GenerationError(
                    f"{where}: {name} must be a path or a numpy waveform, got {type(value).__name__}."
                )
            if "\0" in str(value):
                raise GenerationError(f"{where}: {name} has a zero byte in its path: {str(value)!r}.")
            _check_unicode(str(value), name, where)
        if not isinstance(self.resample, bool):
            raise GenerationError(f"{where}: resample must be true or false, got {self.resample!r}.")
        if self.audio_rate is not None:
            check_integer(self.audio_rate, "audio_rate", where, 1)
        if not isinstance(self.settings, SamplingSettings):
            raise GenerationError(
                f"{where}: settings must be SamplingSettings, got {type(self.settings).__name__}."
            )

    @property
    def given_target(self) -> str | None:
        """Name of the target field to score, None for a request that generates."""
        return next((n for n in ("target_text", "target_audio") if getattr(self, n) is not None), None)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str, folder: Path | None = None) -> GenerationRequest:
        """Read a request from a JSON object, with its settings among the other keys or under ``settings``.

        Args:
            data: ``id``, ``task``, ``text``, ``audio``, ``speaker_prompt``, ``lang``, ``resample``, settings.
            where: the object's place, for messages.
            folder: base of relative audio paths.

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
    """Result of a request. ``finished`` is ``eos`` (the model ended the target), ``max_len`` or ``failed``."""

    id: str
    task: str
    """The trained task's name; the request's own if no trained task has it."""
    finished: str
    modality: str | None = None
    """Modality of the last target, whose content the fields below hold."""
    text: str | None = None
    """Decoded text of a text target; a continuation's includes the request's own text."""
    wav: np.ndarray | None = None
    """Decoded float32 waveform ``[T]`` of a speech target that has a codec."""
    sample_rate: int | None = None
    """Rate of ``wav`` in Hz."""
    ids: np.ndarray | None = None
    """Raw ids int32 ``[T, columns]`` (from 0, as the tokenizers count) of the whole target."""
    num_given: int = 0
    """Leading frames of ``ids`` that come from a continuation request itself."""
    chain: tuple[np.ndarray, ...] = ()
    """Raw ids of earlier targets, for tasks that produce several."""
    logprob: float | None = None
    """Sum of log-probabilities (modality mask, temperature 1) of the generated tokens of all targets; of all tokens and
    the end of a scored target."""
    num_scored: int = 0
    """Tokens that ``logprob`` sums over: generated codes, and ends that were not forced."""
    logprobs: np.ndarray | None = None
    """Log-probability of each of ``ids``, float32 ``[T, columns]``; NaN for the first ``num_given`` frames."""
    end_logprob: float | None = None
    """Log-probability of the last target's end; 0 if the maximum length forced it."""
    seconds: float = 0.0
    """Time in the decoder."""
    alternatives: tuple[GenerationResult, ...] = ()
    """With ``n_best``: the other results, in order."""
    settings: SamplingSettings | None = None
    """The settings used, defaults included; with ``best_of`` the seed of the selected try."""
    tries: tuple[float, ...] = ()
    """With ``best_of``: log p(text | speech) of each try that did not fail, by the model's own recognition."""
    error: str | None = None
    """Reason of a failure."""


def check_request(request: GenerationRequest, template: TaskTemplate) -> None:
    """Raise :class:`GenerationError` unless a request's fields and settings apply to its task."""
    where, settings = f"request {request.id!r} (task {template.name})", request.settings
    needed = [FIELD_NAMES[field] for field in sorted({e.field for e in template.conditions})]
    for name in needed:
        if getattr(request, name) is None:
            raise GenerationError(f"{where}: the condition {name} is missing; the task needs it.")
    if "text" in needed and not (request.text or "").strip():
        raise GenerationError(f"{where}: text is empty; give at least one word.")
    allowed = needed or [FIELD_NAMES[template.targets[0].field]]
    for name in FIELD_NAMES.values():
        if getattr(request, name) is not None and name not in allowed:
            raise GenerationError(
                f"{where}: {name} is given but the task takes only {', '.join(allowed)}; leave it out."
            )
    if settings.guidance != 1.0 and not template.conditions:
        raise GenerationError(
            f"{where}: guidance compares with and without conditions, and the task has none."
        )
    if settings.n_best > 1 and settings.resolved(template.targets[-1].modality).greedy:
        raise GenerationError(
            f"{where}: greedy gives one result; leave n_best out, or sample, or set beam_size."
        )
    if request.given_target is not None:
        _check_given_target(request, template, where)


def _check_given_target(request: GenerationRequest, template: TaskTemplate, where: str) -> None:
    given = [name for name in ("target_text", "target_audio") if getattr(request, name) is not None]
    target = template.targets[-1]
    wanted = "target_text" if target.field == "text" else "target_audio"
    if len(template.targets) > 1:
        raise GenerationError(f"{where}: {given[0]} is for tasks with one target; this one has several.")
    if given != [wanted]:
        raise GenerationError(f"{where}: the task ends in {target.modality}; give {wanted}, not {given[0]}.")
    choices = request.settings.changed("guidance", "beam_size", "n_best", "best_of")
    if choices:
        raise GenerationError(
            f"{where}: {wanted} is scored, so nothing is sampled; leave out {', '.join(choices)}."
        )


def _check_unicode(text: str | None, name: str, where: str) -> None:
    """Refuse lone surrogates, which JSON and file names can hold: they can neither be tokenized nor written."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise GenerationError(
            f"{where}: {name} has a lone surrogate ({half}) at character {error.start}; remove it."
        ) from None
