"""Speech and text while they are made: one request, chunk by chunk.

The tokens are those of :func:`generate` with the same settings, to the bit: the same engine decodes them, with one
request in it. A frame is given out when its slowest stream has it, which is ``max_delay + 1`` rows behind the target's
marker for the first one, and the codec adds its own lookahead for the samples. Work is done while the caller waits for
the next chunk and at no other time; who stops early (``close``, ``break``, an exception) frees the engine's row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine.engine import Engine, Work
from speechlm_ext.generation.engine.rows import Decoded, FrameReader
from speechlm_ext.generation.generate import prepare, require_tokenizers
from speechlm_ext.generation.live.incremental import Voice, voice_of
from speechlm_ext.generation.requests.prompt import Prompt, raw_content
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.settings import SamplingSettings
from speechlm_ext.model.lm import SpeechLMModel

_KEY = "stream"


@dataclass(frozen=True, eq=False)
class StreamChunk:
    """A part of a result; the parts one after the other are the whole of it."""

    first_frame: int
    """Number of the first frame of ``ids``; a continuation's given beginning counts and comes first."""
    ids: np.ndarray
    """Raw ids int32 ``[t, columns]`` of frames that are whole now, as in ``GenerationResult.ids``."""
    audio: np.ndarray | None = None
    """float32 samples ``[n]`` that are ready now; they lag behind ``ids`` by the codec's lookahead, so n may be 0. None
    where nothing is spoken."""
    sample_rate: int | None = None
    """Of ``audio``, in Hz."""
    text: str | None = None
    """What a text target says now, in whole characters; may be empty. None for other targets."""
    is_last: bool = False
    finished: str | None = None
    """Of the last chunk: ``eos`` or ``max_len``."""
    logprob: float | None = None
    """Of the last chunk: as in :class:`GenerationResult`."""
    num_scored: int = 0
    """Of the last chunk: as in :class:`GenerationResult`."""


def request_of(request: GenerationRequest | None, fields: dict[str, Any]) -> GenerationRequest:
    """A request from keywords: those of :class:`GenerationRequest`, whose id may be left out, and sampling settings.

    Raises:
        GenerationError: keywords beside a ready request, unknown ones, or values that cannot be used.
    """
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
    """Serve one request, chunk by chunk.

    Args:
        model: with tokenizers; in eval mode from the first chunk to the last.
        request: of several targets the last one is streamed.
        chunk_frames: fewest frames of a chunk but the last one. Fewer are heard sooner and cost more calls.

    Returns:
        A generator of at least one chunk, of which the last has ``is_last``.

    Raises:
        GenerationError: the request cannot be served, with the words of ``generate``, now; or, from the generator and
            behind a chunk with all that was said so far, the model's logits are not finite. TokenizerError: the codec
            cannot decode a stream.
    """
    if isinstance(chunk_frames, bool) or not isinstance(chunk_frames, (int, np.integer)) or chunk_frames < 1:
        raise GenerationError(f"chunk_frames must be an integer of at least 1, got {chunk_frames!r}.")
    require_tokenizers(model)
    for name in ("best_of", "n_best", "beam_size"):
        if getattr(request.settings, name) > 1:
            does = "gives several results" if name == "n_best" else "chooses among whole results"
            raise GenerationError(
                f"request {request.id!r}: {name} {does} and cannot be streamed; set it to 1."
            )
    if request.target_text is not None or request.target_audio is not None:
        raise GenerationError(
            f"request {request.id!r}: a given target is scored as a whole and cannot be streamed; use generate."
        )
    with says_conversions():
        prompt = prepare(request, model)
    if isinstance(prompt, GenerationResult):
        raise GenerationError(prompt.error or "the request cannot be served.")
    assert model.tokenizers is not None
    return _chunks(model, prompt, voice_of(prompt.modality, model.tokenizers), int(chunk_frames))


def _chunks(model: SpeechLMModel, prompt: Prompt, voice: Voice, chunk_frames: int) -> Iterator[StreamChunk]:
    was_training = model.training
    model.eval()
    engine = Engine(model, Engine.slots_of(prompt))
    reader = FrameReader(prompt, model.layout)
    first = 0
    try:
        engine.admit([Work(_KEY, prompt)])
        frames_TS = reader.push(np.zeros((0, model.layout.num_streams), np.int64))  # of a given beginning
        decoded = None
        while decoded is None:
            if len(frames_TS) >= chunk_frames:
                ids = raw_content(frames_TS, prompt.modality, model.layout)
                yield StreamChunk(first, ids, **voice.push(ids))
                first, frames_TS = first + len(ids), frames_TS[:0]
            # A look at the rows waits for a GPU: take the steps before it that are needed in any case.
            missing = reader.rows_until(chunk_frames - len(frames_TS))
            for _ in range(min(max(missing, 1), engine.poll)):
                engine.step()
            rows_RS, decoded = _look(engine, reader)
            frames_TS = np.concatenate([frames_TS, reader.push(rows_RS)])
        ids = raw_content(frames_TS, prompt.modality, model.layout)
        last = StreamChunk(first, ids, **voice.push(ids, end=True))
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


def _look(engine: Engine, reader: FrameReader) -> tuple[np.ndarray, Decoded | None]:
    """The rows that the reader has not seen, and the whole result if this was its end."""
    for _, decoded in engine.collect():
        # The row in which the logits were not finite says nothing.
        end = len(decoded.rows_RS) - (1 if decoded.error is not None else 0)
        return decoded.rows_RS[reader.num_rows : end], decoded
    return engine.rows(_KEY, reader.num_new_rows), None
