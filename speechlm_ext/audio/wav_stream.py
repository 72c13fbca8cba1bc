"""Incremental audio output: a growing wav file that is always valid, or raw samples to a pipe.

Samples are 16-bit PCM, mono, rounded as :func:`speechlm_ext.audio.files.write_wav` rounds them.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import AudioError, StorageError
from speechlm_ext.utils.files.io import storage_error

_HEADER = 44
#: The header counts bytes with 32 bits.
_MAX_BYTES = 2**32 - 1 - _HEADER


def pcm16(wave: np.ndarray) -> bytes:
    """Little-endian 16-bit PCM of ``wave [n]``, n >= 0, floats or integer PCM; values outside [-1, 1] are clipped."""
    wave = check_wave(wave, "samples to be written") if np.size(wave) else np.zeros(0, np.float32)
    # As libsndfile: round to 32 bits, then keep the upper half.
    wide = np.rint(np.clip(wave, -1.0, 1.0).astype(np.float64) * 2.0**31).astype(np.int64) >> 16
    return np.minimum(wide, 2**15 - 1).astype("<i2").tobytes()


class WavStream(AbstractContextManager["WavStream"]):
    """A growing wav file. Use it as a context manager.

    The header is rewritten after every piece, so that the file is complete for a reader at any time and after a crash.

    Args:
        path: overwritten; missing folders are created.
        sample_rate: Hz.
    """

    def __init__(self, path: str | Path, sample_rate: int) -> None:
        self.path, self.sample_rate = Path(path), sample_rate
        self.num_samples = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.path, "wb", buffering=0)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.write(np.zeros(0, np.float32))

    def write(self, wave: np.ndarray) -> None:
        """Append samples ``[n]``: floats in [-1, 1] or integer PCM.

        Raises:
            AudioError: unusable samples, or more than a wav file can hold.
            StorageError: the file cannot be written.
        """
        total = 2 * (self.num_samples + len(wave))
        if total > _MAX_BYTES:
            raise AudioError(f"{self.path}: a wav file holds 4 GiB at most; write raw samples instead.")
        try:
            # Samples first: the header never counts bytes that are not written.
            self._put(_HEADER + 2 * self.num_samples, pcm16(wave))
            self._put(0, self._header(total))
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.num_samples += len(wave)

    def _put(self, place: int, data: bytes) -> None:
        self._file.seek(place)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _header(self, num_bytes: int) -> bytes:
        rate = self.sample_rate
        head = struct.pack("<4sI4s", b"RIFF", _HEADER - 8 + num_bytes, b"WAVE")
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
        return head + form + struct.pack("<4sI", b"data", num_bytes)

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class RawStream(AbstractContextManager["RawStream"]):
    """Samples without a header to a pipe, each piece flushed at once. Same interface as :class:`WavStream`.

    Args:
        file: binary, e.g. ``sys.stdout.buffer``; it is not closed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_samples = 0

    def write(self, wave: np.ndarray) -> None:
        """Send samples ``[n]``: floats in [-1, 1] or integer PCM.

        Raises ``BrokenPipeError`` if the reader has closed the pipe.
        """
        try:
            self._file.write(pcm16(wave))
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(f"the samples cannot be written: {error.strerror or error}.") from error
        self.num_samples += len(wave)

    def __exit__(self, *exception: object) -> None:
        return None
