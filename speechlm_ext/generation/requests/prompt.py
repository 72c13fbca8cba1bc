"""From a request to the token frames that the model is shown, and back from generated frames to content.

The frames are exactly the beginning of the sequence that training assembles for the same content:
``[sos][task]``, each condition as ``[marker] content`` and ``max_delay`` pad frames, then the target's
marker and, for a continuation, the given beginning of its content. Delays are not applied here: frames stay
undelayed, and the decoder places frame u of stream s in row ``u + delay[s]``. That one rule covers the
ramp-in after a marker, the lagging codes at the end of a given beginning, and any choice of delays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speechlm_ext.audio.files import read_audio
from speechlm_ext.audio.waveform import check_wave, resample_audio
from speechlm_ext.errors import AudioError, ConfigError, GenerationError, SpeechLMError
from speechlm_ext.generation.requests.request import GenerationRequest, check_fields
from speechlm_ext.generation.requests.settings import MAX_COUNT, SamplingSettings
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tasks import TaskTemplate, resolve_task

if TYPE_CHECKING:
    from speechlm_ext.tokenizers import TokenizerSet

#: A speaker prompt is cut to this many frames, the length that training crops at most.
SPEAKER_FRAMES = 500
#: More frames than any sequence has.
NO_LIMIT = MAX_COUNT


@dataclass(frozen=True)
class Segment:
    """A target that is to be generated."""

    modality: str
    settings: SamplingSettings
    """Resolved for the modality."""
    min_new: int
    """Fewest frames to generate before the end."""
    max_new: int
    """Most frames to generate; the end is forced after them."""
    row_limit: int = NO_LIMIT
    """The end is also forced at this frame of the whole sequence, so that what follows fits into the context."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Everything the decoder needs for one request; frames are in layout ids, undelayed."""

    id: str
    template: TaskTemplate
    frames_PS: np.ndarray
    """int64 ``[P, S]``, ends with the first target's marker or the given beginning of its content."""
    num_given: int
    """Frames of the target's content at the end of ``frames_PS``."""
    segments: tuple[Segment, ...]
    """The targets, one after the other; the decoder says the markers between them."""
    unconditional_PS: np.ndarray | None = None
    """The same without the conditions, for classifier-free guidance; None without guidance."""
    target_TS: np.ndarray | None = None
    """int64 ``[T, S]``: the target's content, where the request gives it instead of asking for it."""

    @property
    def modality(self) -> str:
        """Modality of the last target."""
        return self.segments[-1].modality


def special_frame(token_id: int, layout: TokenLayout) -> np.ndarray:
    """A frame ``[1, S]`` with a special id in stream 0 and pad in the others."""
    frame = np.full((1, layout.num_streams), layout.pad_id, dtype=np.int64)
    frame[0, 0] = token_id
    return frame


def content_frames(raw_TC: np.ndarray, modality: str, layout: TokenLayout, where: str) -> np.ndarray:
    """Raw tokenizer ids ``[T, C]`` as layout frames int64 ``[T, S]``; streams without content hold pad.

    Raises:
        GenerationError: another number of columns than the modality has, or an id outside its range.
    """
    raw_TC = np.asarray(raw_TC)
    raw_TC = raw_TC[:, None] if raw_TC.ndim == 1 else raw_TC
    ranges = layout.content_ranges(modality)
    live = [(s, r) for s, r in enumerate(ranges) if r is not None]
    if raw_TC.ndim != 2 or raw_TC.shape[1] != len(live):
        raise GenerationError(
            f"{where}: {modality} content must have {len(live)} columns in layout {layout}, got shape "
            f"{list(raw_TC.shape)}; the tokenizers do not belong to this model."
        )
    frames_TS = np.full((raw_TC.shape[0], layout.num_streams), layout.pad_id, dtype=np.int64)
    for column, (s, (start, end)) in enumerate(live):
        values = raw_TC[:, column].astype(np.int64)
        if values.size and (values.min() < 0 or values.max() >= end - start):
            raise GenerationError(
                f"{where}: {modality} ids in stream {s} must be in [0, {end - start}), got {values.min()} to "
                f"{values.max()}; the tokenizers do not belong to this model."
            )
        frames_TS[:, s] = values + start
    return frames_TS


def raw_content(frames_TS: np.ndarray, modality: str, layout: TokenLayout) -> np.ndarray:
    """Inverse of :func:`content_frames`: layout frames ``[T, S]`` to raw ids int32 ``[T, C]``."""
    live = [(s, r[0]) for s, r in enumerate(layout.content_ranges(modality)) if r is not None]
    return np.stack([frames_TS[:, s] - start for s, start in live], axis=1).astype(np.int32)


def live_columns(values_TS: np.ndarray, modality: str, layout: TokenLayout) -> np.ndarray:
    """The columns of ``[T, S]`` frames in which the modality has content, as in raw ids ``[T, C]``."""
    return values_TS[:, [s for s, r in enumerate(layout.content_ranges(modality)) if r is not None]]


def encode_field(
    request: GenerationRequest,
    entry_field: str,
    modality: str,
    tokenizers: TokenizerSet,
    name: str | None = None,
) -> np.ndarray:
    """Tokenize one field of a request as ``modality``: raw ids int32 ``[T, C]``.

    Args:
        name: what messages call the recording; default the field's own name.

    Raises:
        GenerationError: the model has no tokenizer for it. AudioError, TokenizerError: the content is bad.
    """
    where = f"request {request.id!r}"
    if modality == "text_bpe" and tokenizers.text is not None:
        return tokenizers.text.encode(request.text or "")
    needs = {"ssl": ("ssl",), "codec": ("codec",), "codec_ssl": ("ssl", "codec"), "spk": ("codec",)}.get(
        modality, ()
    )
    if not needs or any(getattr(tokenizers, n) is None for n in needs):
        raise GenerationError(
            f"{where}: the model folder has no tokenizer for {modality}; export it with tokenizers."
        )
    source = request.speaker_prompt if entry_field == "speaker" else request.audio
    name = name or ("speaker_prompt" if entry_field == "speaker" else "audio")
    rate = getattr(tokenizers, needs[-1]).sample_rate
    wave = load_wave(source, rate, f"{where}, {name}", request.audio_rate, request.resample)
    if modality == "ssl":
        return tokenizers.ssl.encode(wave)
    if modality == "codec_ssl" or (modality == "spk" and tokenizers.ssl is not None):
        return tokenizers.encode_codec_ssl(wave)
    return tokenizers.codec.encode(wave)


def load_wave(
    source: str | Path | np.ndarray | None, rate: int, where: str, array_rate: int | None, resample: bool
) -> np.ndarray:
    """Read a file or take an array as float32 ``[T]`` at ``rate`` Hz.

    Raises:
        GenerationError: audio of another rate while ``resample`` is False. AudioError: it cannot be used.
    """
    if isinstance(source, np.ndarray):
        wave, found = check_wave(source, where), array_rate or rate
    elif source is None:
        raise GenerationError(f"{where}: no recording was given.")
    else:
        try:
            wave, found = read_audio(source)
        except AudioError as error:
            raise AudioError(f"{where}: {error}") from None
    if found == rate:
        return wave
    if not resample:
        raise GenerationError(
            f"{where}: the recording has {found} Hz but the model's tokenizers take {rate} Hz, and resample is false; "
            "convert it, or leave resample out."
        )
    return resample_audio(wave, found, rate)


def find_task(request: GenerationRequest, tasks: tuple[TaskTemplate, ...]) -> TaskTemplate:
    """The trained task that a request means. Raises :class:`GenerationError` if none or several do."""
    try:
        return resolve_task(request.task, tasks)
    except ConfigError as error:
        raise GenerationError(f"request {request.id!r}: {error}") from None


def build_prompt(
    request: GenerationRequest,
    template: TaskTemplate,
    layout: TokenLayout,
    tokenizers: TokenizerSet,
    context: int | None = None,
) -> Prompt:
    """Tokenize a request's fields and lay out the frames up to the first target.

    Args:
        context: rows that the model can hold, None for no limit.

    Raises:
        GenerationError: fields that the task does not take, a prompt that the context cannot hold, or lengths
            with which the target can never end; other :class:`SpeechLMError` for content that cannot be used.
    """
    check_fields(request, template)
    where = f"request {request.id!r} (task {template.name})"
    if request.settings.guidance != 1.0 and not template.conditions:
        raise GenerationError(
            f"{where}: guidance compares with and without conditions, and the task has none."
        )
    parts = [special_frame(layout.sos_eos_id, layout), special_frame(layout.task_id(template.name), layout)]
    tail = np.full((layout.max_delay, layout.num_streams), layout.pad_id, dtype=np.int64)
    num_content = 0
    for entry in template.conditions:
        raw_TC = _encode(request, entry.field, entry.modality, tokenizers)
        if entry.modality == "spk":
            raw_TC = raw_TC[:SPEAKER_FRAMES]
        content_TS = content_frames(raw_TC, entry.modality, layout, where)
        parts += [special_frame(layout.marker_id(entry.modality), layout), content_TS, tail]
        num_content += len(content_TS)
    num_condition_parts = len(parts)
    first = template.targets[0]
    parts.append(special_frame(layout.marker_id(first.modality), layout))
    num_given = 0
    has_beginning = request.text if first.field == "text" else request.audio is not None
    if not template.conditions and has_beginning:
        given_TS = content_frames(
            _encode(request, first.field, first.modality, tokenizers), first.modality, layout, where
        )
        parts.append(given_TS)
        num_given = num_content = len(given_TS)
    bare = [*parts[:2], *parts[num_condition_parts:]]
    frames_PS, settings = np.concatenate(parts), request.settings
    target_TS = _given_target(request, template, layout, tokenizers, where)
    lengths = settings
    if target_TS is not None:
        # The end must be free to come or not in every frame, or its probability would be 0 or 1.
        most = len(target_TS) + 1
        lengths = replace(settings, min_len=most, max_len=most, min_len_ratio=None, max_len_ratio=None)
    segments = plan_segments(lengths, template, len(frames_PS), num_content, layout, context, where)
    if target_TS is not None:
        segments = (replace(segments[0], settings=settings.resolved(segments[0].modality), min_new=0),)
    return Prompt(
        request.id,
        template,
        frames_PS,
        num_given,
        segments,
        np.concatenate(bare) if settings.guidance != 1.0 else None,
        target_TS,
    )


def _given_target(
    request: GenerationRequest,
    template: TaskTemplate,
    layout: TokenLayout,
    tokenizers: TokenizerSet,
    where: str,
) -> np.ndarray | None:
    """The target's content int64 ``[T, S]`` if the request gives it. Raises as :func:`build_prompt`."""
    given = [n for n in ("target_text", "target_audio") if getattr(request, n) is not None]
    if not given:
        return None
    target = template.targets[-1]
    name = "target_text" if target.field == "text" else "target_audio"
    if len(template.targets) > 1:
        raise GenerationError(f"{where}: {given[0]} is for tasks with one target; this one has several.")
    if given != [name]:
        raise GenerationError(f"{where}: the task ends in {target.modality}; give {name}, not {given[0]}.")
    choices = [n for n in ("guidance", "beam_size", "n_best", "best_of") if getattr(request.settings, n) != 1]
    if choices:
        raise GenerationError(
            f"{where}: {name} is given, so nothing is chosen; leave out {', '.join(choices)}."
        )
    alike = replace(request, text=request.target_text, audio=request.target_audio)
    raw_TC = _encode(alike, target.field, target.modality, tokenizers, name)
    return content_frames(raw_TC, target.modality, layout, where)


def plan_segments(
    settings: SamplingSettings,
    template: TaskTemplate,
    num_rows: int,
    num_content: int,
    layout: TokenLayout,
    context: int | None,
    where: str,
) -> tuple[Segment, ...]:
    """How long each target may be: as asked, and so that all of them fit into the context.

    Args:
        num_rows: of the prompt.
        num_content: its content frames, which ``max_len_ratio`` counts.
        context: rows that the model can hold, None for no limit.
        where: for messages.

    Raises:
        GenerationError: the context cannot hold the prompt and the shortest targets, or a target can never end.
    """
    settings.check_streams([stream.name for stream in layout.streams], where)
    shortest, wanted = settings.lengths(num_content, where)
    least = max(shortest, 1)
    segments: list[Segment] = []
    extra = 0  # rows that must still fit behind the last frame of a target
    for target in reversed(template.targets):
        live = [
            d
            for d, r in zip(layout.delays, layout.content_ranges(target.modality), strict=True)
            if r is not None
        ]
        # Frame T - 1 of the slowest stream stands in row T - 1 + delay; the row before is the last one fed.
        extra = max(max(live) - 1, layout.delays[0], extra)
        limit = NO_LIMIT if context is None else context - extra
        segments.append(
            Segment(target.modality, settings.resolved(target.modality), shortest, min(wanted, limit), limit)
        )
        extra += least + layout.max_delay + 2  # this one's content, and end, fill and marker before it
    segments.reverse()
    room = segments[0].row_limit - num_rows
    if room < least:
        raise GenerationError(
            f"{where}: the prompt has {num_rows} rows and at least {least} more must fit"
            f"{' for each target' if len(segments) > 1 else ''}, but the model's context is {context}; shorten the "
            "text or audio, or min_len."
        )
    return (replace(segments[0], max_new=min(wanted, room)), *segments[1:])


def _encode(
    request: GenerationRequest,
    entry_field: str,
    modality: str,
    tokenizers: TokenizerSet,
    name: str | None = None,
) -> np.ndarray:
    try:
        raw_TC = np.asarray(encode_field(request, entry_field, modality, tokenizers, name))
    except SpeechLMError as error:
        if f"request {request.id!r}" in str(error):
            raise
        raise type(error)(f"request {request.id!r}: {error}") from None
    if raw_TC.shape[0] == 0:
        raise GenerationError(
            f"request {request.id!r}: {name or entry_field} gives no {modality} tokens; it is empty or too short."
        )
    return raw_TC
