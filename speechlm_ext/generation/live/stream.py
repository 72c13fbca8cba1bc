"""Speech and text while they are decoded: one request, chunk by chunk.

The tokens equal those of :func:`generate` with the same settings bit for bit: the same engine decodes them, with one
request in it. A frame is emitted when its slowest stream has it, for the first frame ``max_delay + 1`` rows after the
target's marker, and the codec adds its own lookahead for the samples. Work is done only while the caller waits for the
next chunk; stopping early (``close``, ``break``, an exception) frees the engine's slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.errors import GenerationError, SpeechLMError
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.rows import Decoded, FrameReader
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.requests.encode_fields import raw_content
from speechlm_ext.generation.requests.prompt import Prompt, build_prompt, require_tokenizers
from speechlm_ext.generation.requests.request import GenerationRequest
from speechlm_ext.generation.requests.settings import SamplingSettings, check_integer
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.tokenizers import TokenizerSet

_KEY = "stream"
#: The character that decoders emit for bytes that are not, or not yet, a character.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, eq=False)
class StreamChunk:
    """A part of a result; all chunks in order join to the result."""

    first_frame: int
    """Index of the first frame of ``ids``; a continuation's own frames come first and count."""
    ids: np.ndarray
    """Raw ids int32 ``[t, columns]`` of the frames that are complete now, as in ``GenerationResult.ids``."""
    audio: np.ndarray | None = None
    """float32 samples ``[n]`` that are ready now; they lag behind ``ids`` by the codec's lookahead, so n may be 0. None
    for targets without sound."""
    sample_rate: int | None = None
    """Of ``audio``, in Hz."""
    text: str | None = None
    """New text in whole characters; may be empty. None for targets other than text."""
    is_last: bool = False
    finished: str | None = None
    """In the last chunk: ``eos`` or ``max_len``."""
    logprob: float | None = None
    """In the last chunk: as in :class:`GenerationResult`."""
    num_scored: int = 0
    """In the last chunk: as in :class:`GenerationResult`."""


def request_of(request: GenerationRequest | None, fields: dict[str, Any]) -> GenerationRequest:
    """A request from keywords: those of :class:`GenerationRequest`, with ``id`` optional, and sampling settings."""
    if request is not None:
        if fields:
            raise GenerationError(
                f"stream: give a request or its fields, not both; got also {sorted(fields)}."
            )
        return request
    data = {"id": "stream", **fields}
    rate = data.pop("audio_rate", None)
    if isinstance(data.get("settings"), SamplingSettings):
        data["settings"] = dataclasses.asdict(data["settings"])
    return dataclasses.replace(GenerationRequest.from_dict(data, "stream"), audio_rate=rate)


def stream(model: SpeechLMModel, request: GenerationRequest, chunk_frames: int = 1) -> Iterator[StreamChunk]:
    """Generate one request chunk by chunk.

    Args:
        model: with tokenizers; in eval mode from the first chunk to the last.
        request: of several targets the last one is streamed.
        chunk_frames: minimum frames of each chunk but the last. Fewer arrive sooner and cost more calls.

    Returns:
        A generator of at least one chunk, of which the last has ``is_last``.

    Raises:
        GenerationError: now, with the message of ``generate``, if the request is rejected; from the generator, after a
            chunk with everything before the failure, if the model's logits are not finite.
        TokenizerError: the codec cannot decode a stream.
    """
    check_integer(chunk_frames, "chunk_frames", "stream", 1)
    for name in request.settings.changed("best_of", "n_best", "beam_size"):
        does = "gives several results" if name == "n_best" else "selects among whole results"
        raise GenerationError(f"request {request.id!r}: {name} {does} and cannot be streamed; set it to 1.")
    if request.given_target is not None:
        raise GenerationError(
            f"request {request.id!r}: {request.given_target} is scored as a whole and cannot be streamed; use generate."
        )
    tokenizers = require_tokenizers(model)
    try:
        with says_conversions():
            prompt = build_prompt(request, model)
    except SpeechLMError as error:
        raise GenerationError(str(error)) from error
    return _chunks(model, prompt, make_chunk_decoder(prompt.modality, tokenizers), int(chunk_frames))


def _chunks(
    model: SpeechLMModel, prompt: Prompt, decoder: ChunkDecoder, chunk_frames: int
) -> Iterator[StreamChunk]:
    was_training = model.training
    model.eval()
    engine = Engine(model, prompt.num_slots)
    reader = FrameReader(prompt, model.layout)
    first = 0
    try:
        engine.admit([DecodeJob(_KEY, prompt)])
        frames_TS = reader.push(np.zeros((0, model.layout.num_streams), np.int64))  # of a continued beginning
        decoded = None
        while decoded is None:
            if len(frames_TS) >= chunk_frames:
                ids = raw_content(frames_TS, prompt.modality, model.layout)
                yield StreamChunk(first, ids, **decoder.push(ids))
                first, frames_TS = first + len(ids), frames_TS[:0]
            # Reading rows synchronizes with a GPU: first take the steps that the next chunk needs in any case.
            missing = reader.rows_until(chunk_frames - len(frames_TS))
            for _ in range(min(max(missing, 1), engine.poll_interval)):
                engine.step()
            rows_RS, decoded = _poll(engine, reader)
            frames_TS = np.concatenate([frames_TS, reader.push(rows_RS)])
        ids = raw_content(frames_TS, prompt.modality, model.layout)
        last = StreamChunk(first, ids, **decoder.push(ids, end=True))
        if decoded.error is not None:
            yield last
            raise GenerationError(decoded.error)
        yield dataclasses.replace(
            last,
            is_last=True,
            finished=decoded.finished,
            logprob=decoded.logprob,
            num_scored=decoded.num_scored,
        )
    finally:
        engine.cancel(_KEY)
        model.train(was_training)


def _poll(engine: Engine, reader: FrameReader) -> tuple[np.ndarray, Decoded | None]:
    """The rows that the reader lacks, and the whole result if the request is done."""
    for _, decoded in engine.collect():
        # The row whose logits are not finite holds no tokens.
        end = len(decoded.rows_RS) - (1 if decoded.error is not None else 0)
        return decoded.rows_RS[reader.num_rows : end], decoded
    return engine.rows(_KEY, reader.num_new_rows), None


class ChunkDecoder:
    """Decodes raw ids incrementally. This class itself adds nothing to the ids, as for SSL units."""

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """The fields of a chunk that raw ids ``[t, columns]`` complete; with ``end`` all that is left."""
        return {}


def make_chunk_decoder(modality: str, tokenizers: TokenizerSet) -> ChunkDecoder:
    """The decoder of a target of ``modality``."""
    if modality == "text_bpe" and tokenizers.text is not None:
        return TextDecoder(tokenizers.text)
    if modality in ("codec", "codec_ssl") and tokenizers.codec is not None:
        return AudioDecoder(tokenizers, skip=1 if modality == "codec_ssl" else 0)
    return ChunkDecoder()


class AudioDecoder(ChunkDecoder):
    """Codec codes to samples; ``skip`` columns precede the codec's."""

    def __init__(self, tokenizers: TokenizerSet, skip: int) -> None:
        self._decoder, self._skip = tokenizers.stream_codec(), skip
        self._rate = tokenizers.codec.sample_rate

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """See :class:`ChunkDecoder`."""
        audio = self._decoder.push(ids[:, self._skip :])
        if end:
            audio = np.concatenate([audio, self._decoder.flush()])
        return {"audio": audio, "sample_rate": self._rate}


class TextDecoder(ChunkDecoder):
    """Text ids to pieces of text that join to the tokenizer's text of all ids.

    A character may take several ids, its bytes. Until the last one arrives, tokenizers decode replacement characters at
    the end, which are held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """See :class:`ChunkDecoder`."""
        self._ids += ids[:, 0].tolist()
        text = str(self._tokenizer.decode(np.asarray(self._ids, np.int32)[:, None])) if self._ids else ""
        ready = text if end else text.rstrip(_REPLACEMENT)
        if not ready.startswith(self._emitted):
            if end:
                raise GenerationError(
                    f"text tokenizer {self._tokenizer.kind!r} changes emitted text when more ids arrive; get the whole "
                    "text with generate instead of a stream."
                )
            ready = self._emitted
        piece, self._emitted = ready[len(self._emitted) :], ready
        return {"text": piece}
