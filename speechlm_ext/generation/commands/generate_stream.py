"""``speechlm generate --stream``: one request whose sound or text is written while it is made."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from speechlm_ext.audio.wav_stream import RawStream, WavStream
from speechlm_ext.generation.live.stream import StreamChunk, stream
from speechlm_ext.generation.requests.request import GenerationRequest
from speechlm_ext.utils.files.io import atomic_write_text

if TYPE_CHECKING:
    from speechlm_ext.model.lm import SpeechLMModel

#: As ``output``: raw samples to standard output.
STDOUT = Path("-")


def run_stream(
    model: SpeechLMModel, request: GenerationRequest, output: Path | None, chunk_frames: int
) -> int:
    """Serve the request.

    Args:
        output: for speech a wav file, or ``-`` for raw 16-bit samples on standard output; text is printed as it comes
            and, if a file is given, written there at the end.

    Returns:
        0, or 1 if the reader of standard output went away.

    Raises:
        SpeechLMError: the request cannot be served, or failed on the way: what came before is written.
    """
    begun = time.perf_counter()
    chunks = stream(model, request, chunk_frames)
    try:
        with closing(chunks):  # type: ignore[type-var]
            first = next(chunks)
            finished = (
                _speak(first, chunks, output, begun)
                if first.audio is not None and first.sample_rate is not None
                else _print(first, chunks, output)
            )
    except BrokenPipeError:
        # Python would complain again when it flushes standard output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if finished == "max_len":
        print(
            "note: the model did not end by itself; the result was cut at the longest length.",
            file=sys.stderr,
        )
    return 0


def _speak(first: StreamChunk, rest: Iterator[StreamChunk], output: Path | None, begun: float) -> str | None:
    """Write the samples of all chunks; returns how the last one finished."""
    assert output is not None and first.sample_rate is not None
    finished, heard = None, False
    raw = output == STDOUT
    with RawStream(sys.stdout.buffer) if raw else WavStream(output, first.sample_rate) as sink:
        for chunk in _all(first, rest):
            if chunk.audio is not None and len(chunk.audio):
                sink.write(chunk.audio)
                if not heard:
                    seconds = time.perf_counter() - begun
                    print(f"first audio after {seconds:.3f} s", file=sys.stderr, flush=True)
                    heard = True
            finished = chunk.finished
    length, seconds = sink.num_samples / first.sample_rate, time.perf_counter() - begun
    what = f"{first.sample_rate} Hz, 16-bit mono to standard output" if raw else str(output)
    print(f"wrote {what}: {length:.2f} s of speech in {seconds:.2f} s.", file=sys.stderr)
    return finished


def _print(first: StreamChunk, rest: Iterator[StreamChunk], output: Path | None) -> str | None:
    """Print the text of all chunks, or ids where there is none; returns how the last one finished."""
    finished, said = None, ""
    for chunk in _all(first, rest):
        piece = chunk.text
        if piece is None:
            piece = "".join(
                f"{' ' if said or n else ''}{i}" for n, i in enumerate(chunk.ids.ravel().tolist())
            )
        print(piece, end="", flush=True)
        said, finished = said + piece, chunk.finished
    print(flush=True)
    if output is not None:
        atomic_write_text(output, said + "\n")
    return finished


def _all(first: StreamChunk, rest: Iterator[StreamChunk]) -> Iterator[StreamChunk]:
    yield first
    yield from rest
