"""Audio and pictures of the demo's page: clips, spectrograms, learning curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from speechlm_ext.audio.files import read_audio
from speechlm_ext.audio.waveform import check_wave

RANGE_DB = 70.0
#: Gray that is readable on a light and on a dark page.
GRAY = "#8a929a"
STYLE = {
    "font.family": "sans-serif",
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.2,
    "grid.color": GRAY,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.labelcolor": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}


def flac_bytes(wave: np.ndarray, sample_rate: int) -> bytes:
    """A waveform ``[T]`` as 16-bit FLAC: half the size of a wav, and every browser plays it.

    Raises:
        AudioError: samples that cannot be used.
    """
    wave = check_wave(wave)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1.0, 1.0), sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def spectrogram_png(wave: np.ndarray, sample_rate: int) -> bytes:
    """A spectrogram from 0 Hz (bottom) to half the rate (top), 10 ms per column, over a range of 70 dB."""
    from matplotlib.image import imsave

    size, hop = round(0.032 * sample_rate), round(0.010 * sample_rate)
    padded = np.pad(wave, (size // 2, size))
    frames_TN = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    power_TF = np.abs(np.fft.rfft(frames_TN * np.hanning(size), axis=1)) ** 2
    level_TF = 10.0 * np.log10(power_TF + 1e-10)
    top = level_TF.max()
    buffer = io.BytesIO()
    picture_FT = np.clip(level_TF.T[::-1], top - RANGE_DB, top)
    imsave(buffer, picture_FT, cmap="magma", format="png", vmin=top - RANGE_DB, vmax=top)
    return buffer.getvalue()


@dataclass(frozen=True)
class Clip:
    """An audio file for the page's player."""

    label: str
    seconds: float
    width: float
    """Width of the picture in percent, by which the lengths of several clips compare."""
    picture: str
    audio: str
    """Spectrogram and sound as ``data:`` addresses."""


def read_clip(path: str | Path, label: str, longest: float | None = None) -> Clip:
    """A clip of an audio file.

    Args:
        path: the audio file.
        label: its name on the page.
        longest: seconds that fill the picture's width; default its own length.

    Raises:
        AudioError: the file cannot be read.
    """
    wave, rate = read_audio(path)
    seconds = len(wave) / rate
    width = 100 * min(1.0, seconds / (longest or seconds))
    picture, audio = spectrogram_png(wave, rate), flac_bytes(wave, rate)
    return Clip(label, seconds, width, data_uri(picture, "image/png"), data_uri(audio, "audio/flac"))


def data_uri(data: bytes, mime: str) -> str:
    """Bytes as a ``data:`` address."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def curves_svg(
    log: Sequence[Mapping[str, Any]], key: str, label: str, names: Mapping[str, str] | None = None
) -> bytes:
    """One line per stream over the steps of a training log, with minutes on the upper edge.

    Args:
        log: lines with ``step``, ``seconds`` and a dict of numbers under ``key``.
        key: e.g. ``stream_loss``.
        label: of the vertical axis.
        names: labels of streams in the legend; default their own names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt

    streams = list(dict.fromkeys(name for row in log for name in row.get(key, {})))
    codecs = [s for s in streams if s.startswith("codec")]
    with plt.rc_context({**STYLE, "svg.hashsalt": key}):
        fig, axes = plt.subplots(figsize=(8.6, 3.9), layout="constrained")
        for name in streams:
            points = [(row["step"], row[key][name]) for row in log if name in row.get(key, {})]
            if name in codecs:
                shade = 0.3 + 0.55 * codecs.index(name) / max(1, len(codecs) - 1)
                style: dict[str, Any] = {"color": colormaps["viridis"](shade), "linewidth": 1.2}
            else:
                style = {"color": "#d9534f", "linewidth": 2.0}
            marker = "." if len(points) < 12 else None
            axes.plot(*zip(*points, strict=True), label=(names or {}).get(name, name), marker=marker, **style)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        steps = [row["step"] for row in log]
        minutes = [row["seconds"] / 60 for row in log]
        if len(log) > 1 and minutes[-1] > minutes[0]:
            to_minutes, to_steps = (
                partial(np.interp, xp=steps, fp=minutes),
                partial(np.interp, xp=minutes, fp=steps),
            )
            upper = axes.secondary_xaxis("top", functions=(to_minutes, to_steps))
            upper.set_xlabel("minutes")
            upper.spines["top"].set_visible(False)
        axes.grid()
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(fig)
    return buffer.getvalue()
