"""Waveforms in memory: float32 mono in [-1, 1], checked, and converted from one sampling rate to another."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np

from speechlm_ext.errors import AudioError

logger = logging.getLogger("speechlm_ext")
#: Conversions since they were last logged or taken, by (rate, new rate) in Hz.
_converted: Counter[tuple[int, int]] = Counter()


def check_wave(wave: np.ndarray, name: str = "waveform") -> np.ndarray:
    """Return ``wave`` as contiguous float32 ``[T]``, checked.

    Integers of 8, 16 and 32 bits are PCM and are scaled to [-1, 1) by their type's range, unsigned ones around its
    middle (128 of uint8 is silence). 64-bit integers are not PCM: they come from lists of integers of unknown range.

    Args:
        wave: floats in [-1, 1] or integer PCM, of any byte order.
        name: of the waveform, for errors.

    Raises:
        AudioError: not one-dimensional, empty, or with samples that are not numbers, masked, not finite or far too
            large.
    """
    try:
        is_masked = np.ma.isMaskedArray(wave) and bool(np.ma.getmaskarray(wave).any())
        wave = np.asarray(wave)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(
            f"{name}: cannot be converted to an array ({error}); give numbers [T] in memory."
        ) from None
    if is_masked:
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
                f"{name}: {wave.dtype} is no PCM format, its range is unknown; convert to the original type, e.g. "
                "astype(np.int16), or to floats in [-1, 1]."
            )
        half = float(1 << (bits - 1))
        # In float64: float32 does not hold every 32-bit integer.
        wave = (wave.astype(np.float64) - (half if wave.dtype.kind == "u" else 0.0)) / half
    elif wave.dtype.kind != "f":
        raise AudioError(f"{name}: samples must be floats in [-1, 1] or integer PCM, got {wave.dtype}.")
    with np.errstate(over="ignore"):  # gives infinity, which is an error below
        wave = np.ascontiguousarray(wave, dtype=np.float32)
    finite = np.isfinite(wave)
    if not finite.all():
        first = int(np.argmin(finite))
        raise AudioError(
            f"{name}: sample {first} of {wave.size} is {wave[first]}, not a finite number "
            f"({int((~finite).sum())} such samples); the recording is damaged, write it again or leave it out."
        )
    peak = float(np.abs(wave).max())
    if peak > 100:
        raise AudioError(
            f"{name}: samples must be in [-1, 1], but the largest sample is {peak:g}; divide 16-bit PCM by 32768 first."
        )
    return wave


def resample_audio(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Convert ``wave [T]`` from ``rate`` to ``new_rate`` Hz with soxr at its highest quality, as float32.

    Integer PCM is scaled as by :func:`check_wave`. Each conversion is counted for :func:`says_conversions`.
    """
    if rate <= 0 or new_rate <= 0:
        raise AudioError(f"sampling rates must be positive, got {rate} Hz to {new_rate} Hz.")
    if wave.dtype.kind != "f":
        wave = check_wave(wave, "waveform to be converted")
    if rate == new_rate:
        return wave
    try:
        import soxr
    except ImportError as error:
        raise AudioError(
            f"converting {rate} Hz to {new_rate} Hz needs the package soxr, which cannot be imported here ({error}); "
            "install it with `pip install soxr`, or give recordings of the expected rate."
        ) from error
    _converted[rate, new_rate] += 1
    return soxr.resample(wave, rate, new_rate, quality="VHQ").astype(np.float32, copy=False)


def take_conversions() -> Counter[tuple[int, int]]:
    """Number of conversions since the last call, by (rate, new rate) in Hz; worker processes return it."""
    counts = _converted.copy()
    _converted.clear()
    return counts


def add_conversions(counts: Counter[tuple[int, int]]) -> None:
    """Add the conversions of another process."""
    _converted.update(counts)


@contextlib.contextmanager
def says_conversions() -> Iterator[None]:
    """Log the conversions of the block or decorated function at its end, one line per pair of rates.

    A warning if the rate went up: such recordings lack the upper band.
    """
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
