"""Sound and pictures for reports: players, spectrograms, learning curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from markupsafe import Markup

from speechlm_ext.audio.files import read_audio
from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.evaluation.report.page import data_uri

#: Grey that can be read on a light and on a dark page.
GREY = "#8a929a"
RANGE_DB = 70.0


def flac_bytes(wave: np.ndarray, sample_rate: int) -> bytes:
    """A waveform ``[T]`` as 16-bit FLAC, half the size of a wav and played by every browser.

    Raises:
        AudioError: samples that cannot be used.
    """
    wave = check_wave(wave)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1.0, 1.0), sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def spectrogram_png(wave: np.ndarray, sample_rate: int) -> bytes:
    """A spectrogram picture, 0 Hz at the bottom and half the rate at the top, 10 ms a column, 70 dB deep."""
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


def player(path: str | Path, label: str, below: Any = "", seconds: float | None = None) -> Markup:
    """A spectrogram, an audio player and a line of text.

    Args:
        path: the audio file.
        label: what is heard.
        below: text or markup under the player.
        seconds: length that fills the picture's width, so that several can be compared; default its own.
    """
    wave, rate = read_audio(path)
    share = min(1.0, len(wave) / rate / (seconds or len(wave) / rate))
    picture = Markup(
        '<div class="spectrogram"><img src="{}" alt="spectrogram: {}" style="width:{}%"></div>'
    ).format(data_uri(spectrogram_png(wave, rate), "image/png"), label, format(100 * share, ".1f"))
    return Markup(
        '<div><div class="soft">{} · {} s</div>{}<audio controls preload="metadata" src="{}"></audio>'
        '<div class="heard">{}</div></div>'
    ).format(
        label, format(len(wave) / rate, ".1f"), picture, data_uri(flac_bytes(wave, rate), "audio/flac"), below
    )


def curves_svg(
    log: Sequence[Mapping[str, Any]], key: str, label: str, names: Mapping[str, str] | None = None
) -> bytes:
    """One line per stream over the steps of a training log, minutes on the upper edge.

    Args:
        log: lines with ``step``, ``seconds`` and a dict of numbers under ``key``.
        key: e.g. ``stream_loss``.
        label: of the vertical axis.
        names: what to call streams in the legend; default their own names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt

    streams = list(dict.fromkeys(name for row in log for name in row.get(key, {})))
    codecs = [s for s in streams if s.startswith("codec")]
    with plt.rc_context({"svg.hashsalt": key, "font.family": "sans-serif"}):
        fig, axes = plt.subplots(figsize=(8.6, 3.9), layout="constrained")
        for name in streams:
            points = [(row["step"], row[key][name]) for row in log if name in row.get(key, {})]
            if name in codecs:
                shade = 0.3 + 0.55 * codecs.index(name) / max(1, len(codecs) - 1)
                style: dict[str, Any] = {"color": colormaps["viridis"](shade), "linewidth": 1.2}
            else:
                style = {"color": "#d9534f", "linewidth": 2.0}
            axes.plot(
                *zip(*points, strict=True),
                label=(names or {}).get(name, name),
                marker="." if len(points) < 12 else None,
                **style,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        steps = [row["step"] for row in log]
        minutes = [row["seconds"] / 60 for row in log]
        if len(log) > 1 and minutes[-1] > minutes[0]:
            upper = axes.secondary_xaxis(
                "top",
                functions=(lambda x: np.interp(x, steps, minutes), lambda x: np.interp(x, minutes, steps)),
            )
            upper.set_xlabel("minutes")
            upper.tick_params(colors=GREY)
            upper.xaxis.label.set_color(GREY)
            upper.spines["top"].set_visible(False)
        axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
        axes.tick_params(colors=GREY)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(GREY)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
        axes.legend(
            fontsize=8,
            labelcolor=GREY,
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            handlelength=1.4,
        )
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(fig)
    return buffer.getvalue()
