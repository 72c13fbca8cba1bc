"""Reading and writing audio files: float32 mono waveforms in [-1, 1].

soundfile reads wav, flac, ogg and mp3 (:mod:`.containers`), PyAV reads raw ``.g722``. Several channels become one by
their mean, rates are converted (:mod:`.waveform`), and files are written atomically as 16-bit PCM wav. Every defect of
a recording is an :class:`AudioError` that names the file. A file that holds less than it promises is one
(:mod:`.length`), since its transcript covers more than the sound.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import ModuleType

import numpy as np

from speechlm_ext.audio.length import UNKNOWN_FRAMES
from speechlm_ext.audio.waveform import check_wave, resample_audio
from speechlm_ext.errors import AudioError
from speechlm_ext.utils.files.io import atomic_write_bytes


def read_audio(
    path: str | Path, sample_rate: int | None = None, *, resample: bool = True
) -> tuple[np.ndarray, int]:
    """Read a recording as one channel.

    Args:
        path: wav, flac, ogg, mp3, or raw g722 (by the name's ending).
        sample_rate: Hz of the result; None keeps the file's own rate.
        resample: convert to ``sample_rate``; False makes another rate an error instead.

    Returns:
        ``(wave, rate)``: float32 ``[T]`` (mean over the channels) and its rate in Hz.

    Raises:
        AudioError: the file is missing, unreadable, empty, was cut (its header promises at least 10 ms more than it
            holds), has samples that are not finite, or has another rate while ``resample`` is False.
    """
    path = _existing(path)
    wave_TC, rate = _read_g722(path) if path.suffix.lower() == ".g722" else _containers(path).read(path)
    if wave_TC.shape[0] == 0:
        raise AudioError(f"audio file {path} holds no samples; record or copy it again, or leave it out.")
    wave = wave_TC.mean(axis=1, dtype=np.float32) if wave_TC.shape[1] > 1 else wave_TC[:, 0]
    wave = check_wave(wave, f"audio file {path}")
    if sample_rate is not None and rate != sample_rate:
        if not resample:
            raise AudioError(
                f"audio file {path} has sampling rate {rate} Hz but {sample_rate} Hz was expected; convert it, or "
                "allow resampling."
            )
        wave, rate = resample_audio(wave, rate, sample_rate), sample_rate
    return np.ascontiguousarray(wave, dtype=np.float32), rate


def audio_seconds(path: str | Path) -> float:
    """Length of a recording in seconds by its header, without decoding; of an mp3 without a header an estimate."""
    path = _existing(path)
    if path.suffix.lower() == ".g722":
        return path.stat().st_size * 2 / 16000  # four bits a sample
    with _containers(path).opened(path) as file:
        if file.frames < UNKNOWN_FRAMES:
            return file.frames / file.samplerate
    wave, rate = read_audio(path)
    return len(wave) / rate


def write_wav(path: str | Path, wave: np.ndarray, sample_rate: int) -> None:
    """Write ``wave [T]`` as a 16-bit PCM wav file, atomically; values outside [-1, 1] are clipped."""
    wave = check_wave(wave, f"waveform for {path}")
    # Through memory: on a full disk libsndfile raises "System error" only.
    buffer = io.BytesIO()
    _containers(path).soundfile.write(
        buffer, np.clip(wave, -1.0, 1.0), sample_rate, subtype="PCM_16", format="WAV"
    )
    atomic_write_bytes(path, buffer.getvalue())


def _containers(path: str | Path) -> ModuleType:
    """:mod:`.containers`, imported with the first file: machines that handle tokens alone may lack soundfile."""
    try:
        from speechlm_ext.audio import containers
    except (ImportError, OSError) as error:  # an OSError: soundfile without its library
        raise AudioError(
            f"audio file {path}: audio files need the package soundfile, which cannot be imported here ({error}); "
            "install it with `pip install soundfile`."
        ) from error
    return containers


def _existing(path: str | Path) -> Path:
    path = Path(path)
    # Not Path.is_file: it raises for impossible names (too long, a zero byte).
    if not os.path.isfile(path):
        problem = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise AudioError(f"audio file {path} {problem}; check the path.")
    if path.stat().st_size == 0:
        raise AudioError(f"audio file {path} is empty (0 bytes); record or copy it again, or leave it out.")
    return path


def _read_g722(path: Path) -> tuple[np.ndarray, int]:
    """Samples ``[T, 1]`` and their rate."""
    try:
        import av
    except ImportError as error:
        raise AudioError(
            f"audio file {path}: reading g722 needs PyAV; install it with `pip install av`."
        ) from error
    try:
        with av.open(str(path), format="g722") as container:
            frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
            rate = int(container.streams.audio[0].rate or 16000)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise AudioError(f"audio file {path} cannot be read as g722 ({error}).") from error
    samples = np.concatenate(frames) if frames else np.zeros(0, np.int16)
    return (samples.astype(np.float32) / 32768.0)[:, None], rate
