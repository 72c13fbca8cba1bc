"""Audio containers by libsndfile: wav, flac, ogg and mp3, read whole and checked against their own counts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from speechlm_ext.audio.length import check_length, warn_once
from speechlm_ext.audio.pcm_size import data_size
from speechlm_ext.errors import AudioError

SUPPORTED = "wav, flac, ogg, mp3 and g722"
_BLOCK = 1 << 22


class _Stream(soundfile.SoundFile):
    """A file that is read from start to end.

    soundfile otherwise seeks after each block, which fails if the header has no length or too large a one.
    """

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def opened(path: Path) -> Iterator[soundfile.SoundFile]:
    """The open file; if its header has length 0, with the length of its samples."""
    try:
        size = data_size(path)
        source: Path | io.BytesIO = path
        if size is not None and size.is_open:
            source = io.BytesIO(size.repaired(path.read_bytes()))
            warn_once(
                f"audio file {path}: its header says that there are no samples, as that of a recorder that was stopped "
                f"does, but {size.available} bytes follow; they are read to the end of the file."
            )
        with _Stream(source) as file:
            yield file
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        if isinstance(error, AudioError):
            raise
        # A TypeError: soundfile needs a sampling rate for headerless ".raw" files.
        raise AudioError(
            f"audio file {path} cannot be read ({str(error).strip()}); it is damaged or of another format: {SUPPORTED} "
            "are supported, convert other formats first."
        ) from error


def read(path: Path) -> tuple[np.ndarray, int]:
    """Samples ``[T, C]`` and their rate."""
    with opened(path) as file:
        blocks = [file.read(_BLOCK, dtype="float32", always_2d=True)]
        while len(blocks[-1]) == _BLOCK:
            blocks.append(file.read(_BLOCK, dtype="float32", always_2d=True))
        wave_TC = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        check_length(path, file, len(wave_TC))
        return wave_TC, int(file.samplerate)
