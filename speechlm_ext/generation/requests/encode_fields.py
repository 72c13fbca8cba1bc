"""A request's fields as token frames: tokenize text and recordings, and convert raw ids to layout ids and back.

Axes: T frames, C columns of a modality's raw ids, S streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from speechlm_ext.audio.files import read_audio
from speechlm_ext.audio.waveform import check_wave, resample_audio
from speechlm_ext.errors import AudioError, GenerationError, SpeechLMError
from speechlm_ext.generation.requests.request import FIELD_NAMES, GenerationRequest
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tasks import TaskTemplate

if TYPE_CHECKING:
    from speechlm_ext.tokenizers import TokenizerSet

#: A speaker prompt is cut to this many frames, the maximum that training crops.
SPEAKER_FRAMES = 500
#: The tokenizers that a modality needs; the last one's sampling rate is used.
_NEEDS = {"ssl": ("ssl",), "codec": ("codec",), "codec_ssl": ("ssl", "codec"), "spk": ("codec",)}


def encode_request(
    request: GenerationRequest, template: TaskTemplate, layout: TokenLayout, tokenizers: TokenizerSet
) -> tuple[list[np.ndarray], np.ndarray | None, np.ndarray | None]:
    """A request's conditions, continued beginning and target to score, in layout ids int64 ``[T, S]``."""

    def encode(name: str, modality: str) -> np.ndarray:
        raw_TC = encode_field(request, name, modality, tokenizers)
        raw_TC = raw_TC[:SPEAKER_FRAMES] if modality == "spk" else raw_TC
        return content_frames(raw_TC, modality, layout, f"request {request.id!r} (task {template.name})")

    conditions = [encode(FIELD_NAMES[e.field], e.modality) for e in template.conditions]
    first, last = template.targets[0], template.targets[-1]
    name = FIELD_NAMES[first.field]
    # An empty text continues nothing, as no text does.
    is_continued = not conditions and getattr(request, name) is not None and request.text != ""
    prefix_TS = encode(name, first.modality) if is_continued else None
    given = request.given_target
    return conditions, prefix_TS, None if given is None else encode(given, last.modality)


def encode_field(
    request: GenerationRequest, name: str, modality: str, tokenizers: TokenizerSet
) -> np.ndarray:
    """Tokenize field ``name`` of a request as ``modality``: raw ids int32 ``[T, C]``, at least one frame."""
    where, value = f"request {request.id!r}", getattr(request, name)
    try:
        if modality == "text_bpe" and tokenizers.text is not None:
            raw_TC = np.asarray(tokenizers.text.encode(value or ""))
        else:
            raw_TC = np.asarray(_encode_recording(request, name, modality, tokenizers))
    except SpeechLMError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from None
    if raw_TC.shape[0] == 0:
        raise GenerationError(f"{where}: {name} gives no {modality} tokens; it is empty or too short.")
    return raw_TC


def _encode_recording(
    request: GenerationRequest, name: str, modality: str, tokenizers: TokenizerSet
) -> np.ndarray:
    where, source = f"request {request.id!r}", getattr(request, name)
    needs = _NEEDS.get(modality, ())
    if not needs or any(getattr(tokenizers, n) is None for n in needs):
        raise GenerationError(
            f"{where}: the model folder has no tokenizer for {modality}; export it with tokenizers."
        )
    rate = getattr(tokenizers, needs[-1]).sample_rate
    where += f", {name}"
    if isinstance(source, np.ndarray):
        wave, found = check_wave(source, where), request.audio_rate or rate
    elif source is None:
        raise GenerationError(f"{where}: no recording was given.")
    else:
        try:
            wave, found = read_audio(source)
        except AudioError as error:
            raise AudioError(f"{where}: {error}") from None
    if found != rate and not request.resample:
        raise GenerationError(
            f"{where}: the recording has {found} Hz but the model's tokenizers take {rate} Hz, and resample is false; "
            "convert it, or leave resample out."
        )
    wave = resample_audio(wave, found, rate)
    if modality == "ssl":
        return tokenizers.ssl.encode(wave)
    if modality == "codec_ssl" or (modality == "spk" and tokenizers.ssl is not None):
        return tokenizers.encode_codec_ssl(wave)
    return tokenizers.codec.encode(wave)


def content_frames(raw_TC: np.ndarray, modality: str, layout: TokenLayout, where: str) -> np.ndarray:
    """Raw tokenizer ids ``[T, C]`` as layout frames int64 ``[T, S]``; streams without content hold pad."""
    raw_TC = np.asarray(raw_TC)
    raw_TC = raw_TC[:, None] if raw_TC.ndim == 1 else raw_TC
    streams = content_streams(modality, layout)
    if raw_TC.ndim != 2 or raw_TC.shape[1] != len(streams):
        raise GenerationError(
            f"{where}: {modality} content must have {len(streams)} columns in layout {layout}, got shape "
            f"{list(raw_TC.shape)}; the tokenizers do not belong to this model."
        )
    frames_TS = np.full((raw_TC.shape[0], layout.num_streams), layout.pad_id, dtype=np.int64)
    for column, (s, (start, end)) in enumerate(streams.items()):
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
    starts = [start for start, _ in content_streams(modality, layout).values()]
    return (content_values(frames_TS, modality, layout) - np.array(starts)).astype(np.int32)


def content_values(values_TS: np.ndarray, modality: str, layout: TokenLayout) -> np.ndarray:
    """The columns of ``[T, S]`` values in which ``modality`` has content: ``[T, C]``, as raw ids."""
    return values_TS[:, list(content_streams(modality, layout))]


def content_streams(modality: str, layout: TokenLayout) -> dict[int, tuple[int, int]]:
    """The streams in which ``modality`` has content, with their id ranges ``(start, end)``."""
    return {s: ids for s, ids in enumerate(layout.content_ranges(modality)) if ids is not None}
