"""How clusters are used: numbers, and a picture of rows per cluster and inertia per iteration."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.utils.files.io import atomic_write_bytes

if TYPE_CHECKING:
    from speechlm_ext.kmeans.estimator import KMeans

#: Kinds of pictures, by the ending of their file.
PICTURES = (".svg", ".png")
#: Grey that can be read on a light and on a dark page.
_GREY, _BLUE, _RED = "#8a929a", "#2a6f97", "#b0553a"


@dataclass(frozen=True)
class Usage:
    """Numbers about the rows of each cluster."""

    num_clusters: int
    """K."""
    num_rows: int
    num_dead: int
    """Clusters without rows."""
    entropy: float
    """Of a row's cluster, in bits; log2(K) when all are used alike."""
    perplexity: float
    """2 to the entropy: as many clusters used alike would have that entropy."""
    smallest: int
    largest: int
    """Rows of the smallest and of the largest cluster."""

    @property
    def dead_share(self) -> float:
        """Share of clusters without rows."""
        return self.num_dead / self.num_clusters


def usage(counts: Tensor | np.ndarray | Sequence[int]) -> Usage:
    """Numbers of clusters' use.

    Args:
        counts: ``[K]`` rows of each cluster.

    Raises:
        KMeansError: no clusters, no rows, or negative counts.
    """
    values = np.asarray(counts.cpu() if isinstance(counts, Tensor) else counts, dtype=np.int64)
    if values.ndim != 1 or values.size == 0 or values.min() < 0 or values.sum() == 0:
        raise KMeansError(
            f"cluster usage: expected counts [K] >= 0 with a row at least, got {list(values.shape)} with a sum of "
            f"{values.sum()}; give the counts_ of a fit."
        )
    shares = values[values > 0] / values.sum()
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0.0
    return Usage(
        num_clusters=values.size,
        num_rows=int(values.sum()),
        num_dead=int((values == 0).sum()),
        entropy=entropy,
        perplexity=2.0**entropy,
        smallest=int(values.min()),
        largest=int(values.max()),
    )


def draw_usage(model: KMeans, path: str | Path) -> Usage:
    """Draw a fitted model's use of its clusters and the course of its fit into an .svg or .png file, atomically.

    Left: rows of each cluster, the most used first, on a logarithmic scale, beside what equal use would be. Right:
    inertia per row over the iterations.

    Returns:
        The numbers in the picture.

    Raises:
        KMeansError: not fitted, another suffix, or matplotlib is missing. StorageError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in PICTURES:
        raise KMeansError(f"cluster usage: {path} should end in {' or '.join(PICTURES)}; give one of these.")
    model._fitted("a picture of the clusters' usage")
    found = usage(model.counts_)
    history = [value / max(1, model.n_rows_) for value in model.inertia_history_]
    is_lloyd = model.settings.algorithm == "lloyd"
    picture = _draw(
        found, model.counts_.cpu().numpy(), history, "iteration" if is_lloyd else "step", path.suffix[1:]
    )
    atomic_write_bytes(path, picture)
    return found


def _draw(found: Usage, counts: np.ndarray, history: list[float], unit: str, kind: str) -> bytes:
    try:
        import matplotlib
    except ImportError:
        raise KMeansError(
            "cluster usage: pictures need matplotlib; pip install 'speechlm_ext[eval]'."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ordered = np.sort(counts)[::-1]
    alive = ordered[ordered > 0]
    mean = found.num_rows / found.num_clusters
    with plt.rc_context({"svg.hashsalt": "kmeans", "font.family": "sans-serif"}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.2, 3.5), layout="constrained", gridspec_kw={"width_ratios": (3, 2)}
        )
        ranks = np.arange(1, len(alive) + 1)
        marker = "o" if len(alive) < 60 else None
        left.plot(ranks, alive, color=_BLUE, linewidth=1.6, marker=marker, markersize=3)
        left.axhline(mean, color=_GREY, linewidth=1, linestyle="--")
        left.annotate(
            f"equal use: {mean:,.4g}",
            (0.99, mean),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_GREY,
        )
        if found.num_dead:
            left.axvspan(len(alive) + 0.5, found.num_clusters + 0.5, color=_RED, alpha=0.18, linewidth=0)
        left.set_yscale("log")
        left.set_ylim(min(alive.min(), mean) / 2, max(alive.max(), mean) * 2)
        left.set_xlim(0.5, found.num_clusters + 0.5)
        left.set_xlabel("cluster, most used first")
        left.set_ylabel("rows")
        left.set_title(
            f"perplexity {found.perplexity:,.4g} of {found.num_clusters:,}, entropy {found.entropy:.2f} of "
            f"{math.log2(found.num_clusters):.2f} bits, {found.dead_share:.1%} dead",
            loc="left",
            fontsize=9,
            color=_GREY,
        )
        right.plot(
            range(len(history)),
            history,
            color=_BLUE,
            linewidth=1.6,
            marker="o" if len(history) < 40 else None,
            markersize=3,
        )
        right.set_xlabel(unit)
        right.set_ylabel("inertia per row")
        right.locator_params(axis="x", integer=True)
        for axes in (left, right):
            _plain(axes)
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=150, transparent=kind == "svg", metadata=metadata)
        plt.close(figure)
    return buffer.getvalue()


def _plain(axes: Any) -> None:
    axes.grid(color=_GREY, alpha=0.2, linewidth=0.6)
    axes.tick_params(colors=_GREY, which="both")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(_GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)
