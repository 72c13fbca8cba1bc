"""Reading, resampling and writing audio: one float32 mono waveform in [-1, 1] everywhere in the package.

Files are read by soundfile (wav, flac, ogg, mp3) and, for raw ``.g722``, by PyAV. Several channels become
one by their mean, rates are converted by soxr (``VHQ``), and files are written as 16-bit PCM wav,
atomically. Everything wrong with a recording is one :class:`AudioError` that names the file; a file that holds less
than it says is wrong, since its transcript says more than the sound (:mod:`speechlm_ext.audio.length`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from speechlm_ext.audio.length import data_size, mp3_frames, ogg_end
from speechlm_ext.errors import AudioError
from speechlm_ext.utils.files.io import atomic_write_bytes

logger = logging.getLogger("speechlm_ext")
SUPPORTED = "wav, flac, ogg, mp3 and g722"
#: Seconds that may be missing from a file: rounded headers. Said, but no error.
_TOLERANCE = 0.01
_BLOCK = 1 << 22
#: Samples of silence that mp3 encoders add at both ends together, and decoders take off again.
_MP3_SILENCE = 4608
#: What libsndfile says of a length that it does not know is near the largest 64-bit number.
_UNKNOWN_FRAMES = 1 << 62
#: Conversions since the last time that they were said, by (rate, new rate) in Hz.
_converted: Counter[tuple[int, int]] = Counter()
#: Notes about files, each said once in a process.
_said: set[str] = set()


def read_audio(
    path: str | Path, sample_rate: int | None = None, *, resample: bool = True
) -> tuple[np.ndarray, int]:
    """Read a recording as one channel.

    Args:
        path: wav, flac, ogg, mp3, or raw g722 (by the name's ending).
        sample_rate: the rate in Hz that the caller needs; None keeps the file's own.
        resample: convert to ``sample_rate``; False makes another rate an error instead.

    Returns:
        ``(wave, rate)``: float32 ``[T]`` (mean over the channels) and its rate in Hz.

    Raises:
        AudioError: the file is missing, unreadable, empty, was cut (its header promises at least 10 ms more than it
            holds), has samples that are not finite, or has another rate while ``resample`` is False.
    """
    path = _existing(path)
    wave_TC, rate = _read_g722(path) if path.suffix.lower() == ".g722" else _read_soundfile(path)
    if wave_TC.shape[0] == 0:
        raise AudioError(f"audio file {path} holds no samples; record or copy it again, or leave it out.")
    wave = wave_TC.mean(axis=1, dtype=np.float32) if wave_TC.shape[1] > 1 else wave_TC[:, 0]
    wave = check_wave(wave, f"audio file {path}")
    if sample_rate is not None and rate != sample_rate:
        if not resample:
            raise AudioError(
                f"audio file {path} has sampling rate {rate} Hz but {sample_rate} Hz was expected; convert "
                "it, or allow resampling."
            )
        wave, rate = resample_audio(wave, rate, sample_rate), sample_rate
    return np.ascontiguousarray(wave, dtype=np.float32), rate


def audio_seconds(path: str | Path) -> float:
    """How long a recording lasts by its header, in seconds, without decoding it; of an mp3 without a header a guess.

    Raises:
        AudioError: the file is missing, empty or unreadable.
    """
    path = _existing(path)
    if path.suffix.lower() == ".g722":
        return path.stat().st_size * 2 / 16000  # four bits a sample
    with _opened(path) as file:
        if file.frames < _UNKNOWN_FRAMES:
            return file.frames / file.samplerate
    wave, rate = read_audio(path)
    return len(wave) / rate


def _existing(path: str | Path) -> Path:
    path = Path(path)
    # Not Path.is_file: names that no file can have (too long, a zero byte) make it raise.
    if not os.path.isfile(path):
        what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise AudioError(f"audio file {path} {what}; check the path.")
    if path.stat().st_size == 0:
        raise AudioError(f"audio file {path} is empty (0 bytes); record or copy it again, or leave it out.")
    return path


def resample_audio(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Convert ``wave [T]`` from ``rate`` to ``new_rate`` Hz with soxr at its highest quality, as float32.

    Integer PCM is scaled as by :func:`check_wave`. Each conversion is counted for :func:`says_conversions`.

    Raises:
        AudioError: a rate that is not positive, or samples that are neither floats nor PCM.
    """
    if rate <= 0 or new_rate <= 0:
        raise AudioError(f"sampling rates must be positive, got {rate} Hz to {new_rate} Hz.")
    if wave.dtype.kind != "f":
        wave = check_wave(wave, "waveform to be converted")
    if rate == new_rate:
        return wave
    _converted[rate, new_rate] += 1
    return soxr.resample(wave, rate, new_rate, quality="VHQ").astype(np.float32, copy=False)


def take_conversions() -> Counter[tuple[int, int]]:
    """How many recordings were converted since the last call, by (rate, new rate) in Hz; worker processes return it."""
    taken = _converted.copy()
    _converted.clear()
    return taken


def add_conversions(counts: Counter[tuple[int, int]]) -> None:
    """Count the conversions of another process as this one's."""
    _converted.update(counts)


@contextlib.contextmanager
def says_conversions() -> Iterator[None]:
    """Log at the end of the block, or of the decorated function, which sampling rates were converted in it, one line
    for each pair of rates. A recording of a lower rate than a model's lacks the upper band: a warning."""
    try:
        yield
    finally:
        for (rate, new_rate), count in sorted(take_conversions().items()):
            recordings = f"{count} recording{'' if count == 1 else 's'}"
            text = f"{recordings} converted from {rate} Hz to {new_rate} Hz"
            if rate < new_rate:
                logger.warning("%s; above %g Hz there is nothing in them, unlike in others", text, rate / 2)
            else:
                logger.info("%s", text)


def check_wave(wave: np.ndarray, name: str = "waveform") -> np.ndarray:
    """Return ``wave`` as contiguous float32 ``[T]`` after checking that it can be used.

    Integers of 8, 16 and 32 bits are taken as PCM and scaled to [-1, 1) by their type's range, unsigned ones around its
    middle (128 of uint8 is silence). 64 bits are no PCM: such arrays come from lists of integers, and nothing tells
    which range these have.

    Args:
        wave: floats in [-1, 1] or integer PCM, of any byte order.
        name: what to call it in an error.

    Raises:
        AudioError: not one-dimensional, empty, or with samples that are no numbers, masked, not finite or absurdly
            large.
    """
    try:
        masked = np.ma.isMaskedArray(wave) and bool(np.ma.getmaskarray(wave).any())
        wave = np.asarray(wave)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"{name}: cannot be made an array ({error}); give numbers [T] in memory.") from None
    if masked:
        raise AudioError(f"{name}: some samples are masked; fill or cut them first.")
    if wave.ndim != 1:
        raise AudioError(
            f"{name}: expected one channel [T], got shape {list(wave.shape)}; average the channels first."
        )
    if wave.size == 0:
        raise AudioError(f"{name}: expected at least one sample, got none.")
    if wave.dtype.kind in "iu":
        bits = 8 * wave.dtype.itemsize
        if bits > 32:
            raise AudioError(
                f"{name}: {wave.dtype} is no PCM format, its range is not known; convert to the type that the samples "
                "had, e.g. astype(np.int16), or to floats in [-1, 1]."
            )
        half = float(1 << (bits - 1))
        # In float64: float32 does not hold every 32-bit integer.
        wave = (wave.astype(np.float64) - (half if wave.dtype.kind == "u" else 0.0)) / half
    elif wave.dtype.kind != "f":
        raise AudioError(f"{name}: samples must be floats in [-1, 1] or integer PCM, got {wave.dtype}.")
    with np.errstate(over="ignore"):  # infinity, which is an error below
        wave = np.ascontiguousarray(wave, dtype=np.float32)
    finite = np.isfinite(wave)
    if not finite.all():
        first = int(np.argmin(finite))
        raise AudioError(
            f"{name}: sample {first} of {wave.size} is {wave[first]}, not a finite number "
            f"({int((~finite).sum())} such samples); the recording is damaged, write it again or leave it "
            "out."
        )
    peak = float(np.abs(wave).max())
    if peak > 100:
        raise AudioError(
            f"{name}: the largest sample is {peak:g} but samples lie in [-1, 1]; divide 16-bit PCM by 32768 first."
        )
    return wave


def write_wav(path: str | Path, wave: np.ndarray, sample_rate: int) -> None:
    """Write ``wave [T]`` as a 16-bit PCM wav file, atomically; values outside [-1, 1] are clipped.

    Raises:
        AudioError: a waveform that is not usable.
        StorageError: the file cannot be written.
    """
    wave = check_wave(wave, f"waveform for {path}")
    # Through memory: libsndfile says "System error" where the disk is full.
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1.0, 1.0), sample_rate, subtype="PCM_16", format="WAV")
    atomic_write_bytes(path, buffer.getvalue())


class _Stream(soundfile.SoundFile):
    """A file that is read from its beginning to its end: soundfile seeks behind each block otherwise, which fails
    where the header does not know or overstates the length."""

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[soundfile.SoundFile]:
    """The file, with the length that it holds where its header has 0. Raises :class:`AudioError` for what libsndfile
    refuses, then or while it is read."""
    try:
        size = data_size(path)
        source: Path | io.BytesIO = path
        if size is not None and size.is_open:
            source = io.BytesIO(size.mended(path.read_bytes()))
            _note(
                f"audio file {path}: its header says that there are no samples, as that of a recorder that was "
                f"stopped does, but {size.held} bytes follow; they are read to the end of the file."
            )
        with _Stream(source) as file:
            yield file
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        if isinstance(error, AudioError):
            raise
        # soundfile wants a sampling rate for headerless ".raw" files and says so with a TypeError.
        raise AudioError(
            f"audio file {path} cannot be read ({str(error).strip()}); it is damaged or of another format: {SUPPORTED} "
            "are supported, convert other formats first."
        ) from error


def _read_soundfile(path: Path) -> tuple[np.ndarray, int]:
    blocks = []
    with _opened(path) as file:
        while True:
            blocks.append(file.read(_BLOCK, dtype="float32", always_2d=True))
            if len(blocks[-1]) < _BLOCK:
                break
        rate = int(file.samplerate)
        wave_TC = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        _check_length(path, file, len(wave_TC))
    return wave_TC, rate


def _check_length(path: Path, file: soundfile.SoundFile, num_read: int) -> None:
    """Compare what was read with what the file says that it holds.

    Raises:
        AudioError: more than 10 ms are missing; less is a note in the log.
    """
    rate, promised, why = file.samplerate, num_read, "its header counts more"
    again = "copy it again; or, if this is all there is, write it anew, e.g. by ffmpeg -i OLD NEW.wav"
    if file.format == "MP3":
        frames = mp3_frames(path)
        if frames is None:
            return
        held = frames.num_frames * frames.num_samples
        lost = 0 if frames.promised is None else frames.promised - frames.num_frames
        if lost == 1 and not frames.is_cut:  # some encoders count the header's own frame
            _note(
                f"audio file {path}: its header counts one mp3 frame more than it holds; it is read to its end."
            )
        elif lost > 0:
            promised = num_read + lost * frames.num_samples
            why = f"its header counts {frames.promised} mp3 frames and {frames.num_frames} are whole"
        elif frames.is_cut and frames.promised is None:
            raise AudioError(f"audio file {path} ends in the middle of an mp3 frame, so it was cut; {again}.")
        elif num_read < held - _MP3_SILENCE:
            raise AudioError(
                f"audio file {path} holds about {held} samples, but its header or first frames make the reader stop "
                f"after {num_read}; write it anew, e.g. by ffmpeg -i OLD NEW.wav."
            )
    elif file.format == "OGG":
        end = ogg_end(path)
        if end == "cut":
            raise AudioError(f"audio file {path} ends in the middle of an Ogg page, so it was cut; {again}.")
        if end == "open":
            _note(f"audio file {path}: its last page is not marked as the end; it may have been cut.")
    else:
        size = data_size(path)
        if size is not None and size.declared is not None and size.declared > size.held:
            if num_read == 0:
                raise AudioError(
                    f"audio file {path} counts {size.declared} bytes of samples in its header but ends before them, so "
                    "it was cut; copy or record it again, or leave it out."
                )
            promised = max(num_read + 1, round(num_read * size.declared / size.held))
            why = f"its header counts {size.declared} bytes of samples and {size.held} follow"
        elif num_read < file.frames < _UNKNOWN_FRAMES:
            promised = file.frames
        elif size is not None and size.declared and size.tail > _TOLERANCE * rate * size.declared / num_read:
            _note(
                f"audio file {path}: {size.tail} bytes behind the samples that its header counts are neither samples "
                "nor other data and are not read."
            )
    missing = promised - num_read
    if missing <= 0:
        return
    what = f"audio file {path} promises {promised} samples but holds {num_read} ({why})"
    if missing > _TOLERANCE * rate:
        raise AudioError(f"{what}: it was cut, or its header is wrong; {again}.")
    _note(f"{what}; it is read to its end.")


def _note(text: str) -> None:
    """Say something about a file once in a process."""
    if text not in _said:
        _said.add(text)
        logger.warning("%s", text)


def _read_g722(path: Path) -> tuple[np.ndarray, int]:
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
