"""``speechlm generate --stream``: writes the audio or text of one request while it is decoded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
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
CUT_NOTE = "note: the model did not end the result; it was cut at the maximum length."


def run_stream(
    model: SpeechLMModel, request: GenerationRequest, output: Path | None, chunk_frames: int
) -> int:
    """Generate one request and write it piece by piece; 1 if the reader of standard output closed it."""
    start = time.perf_counter()
    chunks = stream(model, request, chunk_frames)
    try:
        with closing(chunks):  # type: ignore[type-var]
            first = next(chunks)
            if first.sample_rate is None:
                finished = _print(chain([first], chunks), output)
            else:
                assert output is not None
                finished = _write_audio(chain([first], chunks), first.sample_rate, output, start)
    except BrokenPipeError:
        # Python would report it again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if finished == "max_len":
        print(CUT_NOTE, file=sys.stderr)
    return 0


def _write_audio(chunks: Iterator[StreamChunk], rate: int, output: Path, start: float) -> str | None:
    """Write the samples of all chunks; returns ``finished`` of the last one."""
    is_raw, finished = output == STDOUT, None
    with RawStream(sys.stdout.buffer) if is_raw else WavStream(output, rate) as sink:
        for chunk in chunks:
            if chunk.audio is not None and len(chunk.audio):
                is_first = sink.num_samples == 0
                sink.write(chunk.audio)
                if is_first:
                    seconds = time.perf_counter() - start
                    print(f"first audio after {seconds:.3f} s", file=sys.stderr, flush=True)
            finished = chunk.finished
    place = f"{rate} Hz, 16-bit mono to standard output" if is_raw else str(output)
    length, seconds = sink.num_samples / rate, time.perf_counter() - start
    print(f"wrote {place}: {length:.2f} s of speech in {seconds:.2f} s.", file=sys.stderr)
    return finished


def _print(chunks: Iterator[StreamChunk], output: Path | None) -> str | None:
    """Print the text of all chunks, or ids where there is none; returns ``finished`` of the last one."""
    finished, text = None, ""
    for chunk in chunks:
        piece = chunk.text
        if piece is None:
            piece = "".join(f" {i}" for i in chunk.ids.ravel().tolist())
            piece = piece if text else piece.removeprefix(" ")
        print(piece, end="", flush=True)
        text, finished = text + piece, chunk.finished
    print(flush=True)
    if output is not None:
        atomic_write_text(output, text + "\n")
    return finished
