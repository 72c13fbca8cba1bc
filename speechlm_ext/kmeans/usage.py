"""Usage of clusters: statistics, and a picture of rows per cluster and inertia per iteration."""

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

#: Suffixes of pictures.
PICTURES = (".svg", ".png")
#: Readable on a light and on a dark page.
_GREY, _BLUE, _RED = "#8a929a", "#2a6f97", "#b0553a"
_STYLE = {
    "svg.hashsalt": "kmeans",
    "font.family": "sans-serif",
    "axes.prop_cycle": f"cycler('color', ['{_BLUE}'])",
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "axes.grid": True,
    "grid.color": _GREY,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _GREY
    ),
}


@dataclass(frozen=True)
class Usage:
    """Statistics of the rows per cluster."""

    num_clusters: int
    """K."""
    num_rows: int
    num_dead: int
    """Clusters without rows."""
    entropy: float
    """Of a row's cluster, in bits; log2(K) for equal use."""
    perplexity: float
    """2 to the entropy: number of equally used clusters with that entropy."""
    smallest: int
    largest: int
    """Rows of the smallest and of the largest cluster."""

    @property
    def dead_share(self) -> float:
        """Share of clusters without rows."""
        return self.num_dead / self.num_clusters


def usage(counts: Tensor | np.ndarray | Sequence[int]) -> Usage:
    """Statistics of clusters with these counts.

    Args:
        counts: ``[K]`` rows of each cluster.

    Raises:
        KMeansError: no clusters, no rows, or negative counts.
    """
    values = np.asarray(counts.cpu() if isinstance(counts, Tensor) else counts, dtype=np.int64)
    if values.ndim != 1 or values.size == 0 or values.min() < 0 or values.sum() == 0:
        raise KMeansError(
            f"cluster usage: expected counts [K] >= 0 with at least one row, got {list(values.shape)} with a sum of "
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
    """Draw the rows per cluster and the course of the fit of a fitted model into an .svg or .png file, atomically.

    Left: rows of each cluster, the most used first, on a logarithmic scale, with equal use as a dashed line. Right:
    inertia per row over the iterations.

    Returns:
        The numbers in the picture.

    Raises:
        KMeansError: not fitted, another suffix, or matplotlib is missing. StorageError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in PICTURES:
        raise KMeansError(f"cluster usage: {path} must end in {' or '.join(PICTURES)}.")
    model._require_centers("a picture of the clusters' usage")
    try:
        import matplotlib
    except ImportError:
        raise KMeansError(
            "cluster usage: pictures need matplotlib; pip install 'speechlm_ext[eval]'."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    numbers = usage(model.counts_)
    is_svg = path.suffix == ".svg"
    buffer = io.BytesIO()
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.2, 3.5), layout="constrained", gridspec_kw={"width_ratios": (3, 2)}
        )
        _draw_counts(left, numbers, np.sort(model.counts_.cpu().numpy())[::-1])
        history = [value / max(1, model.n_rows_) for value in model.inertia_history_]
        right.plot(history, marker="o" if len(history) < 40 else None)
        right.set_xlabel("iteration" if model.settings.algorithm == "lloyd" else "step")
        right.set_ylabel("inertia per row")
        right.locator_params(axis="x", integer=True)
        metadata: dict[str, Any] = {"Date": None} if is_svg else {}
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, transparent=is_svg, metadata=metadata)
        plt.close(figure)
    atomic_write_bytes(path, buffer.getvalue())
    return numbers


def _draw_counts(axes: Any, numbers: Usage, counts: np.ndarray) -> None:
    """Draw the rows of each cluster, ``counts`` in descending order."""
    used = counts[counts > 0]
    mean = numbers.num_rows / numbers.num_clusters
    axes.plot(np.arange(1, len(used) + 1), used, marker="o" if len(used) < 60 else None)
    axes.axhline(mean, color=_GREY, linewidth=1, linestyle="--")
    axes.text(
        0.99, mean, f"equal use: {mean:,.4g}", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
        fontsize=8, color=_GREY)  # fmt: skip
    if numbers.num_dead:
        axes.axvspan(len(used) + 0.5, numbers.num_clusters + 0.5, color=_RED, alpha=0.18, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(min(used.min(), mean) / 2, max(used.max(), mean) * 2)
    axes.set_xlim(0.5, numbers.num_clusters + 0.5)
    axes.set_xlabel("cluster, most used first")
    axes.set_ylabel("rows")
    axes.set_title(
        f"perplexity {numbers.perplexity:,.4g} of {numbers.num_clusters:,}, entropy {numbers.entropy:.2f} of "
        f"{math.log2(numbers.num_clusters):.2f} bits, {numbers.dead_share:.1%} dead"
    )
