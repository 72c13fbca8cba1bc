"""``speechlm kmeans inspect``: description of an artifact of units, and the usage of its units."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from speechlm_ext.errors import ConfigError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.usage import PICTURES, draw_usage, usage
from speechlm_ext.utils.text import counted

PLOT = "usage.svg"
_BLOCK = 1024


@dataclass(frozen=True)
class InspectConfig:
    """Show size, encoder, fit and usage of K-Means units, and the closest pairs of centroids."""

    kmeans: str
    """Folder that `speechlm kmeans fit` has written."""
    pairs: int = 5
    """Pairs of nearest centroids to list."""
    plot: str | None = None
    """File for the plot of usage and inertia (.svg or .png); default usage.svg in the folder."""


def run_inspect(cfg: InspectConfig) -> int:
    """Print and plot; the exit code. Raises :class:`KMeansError` (artifact), :class:`ConfigError`."""
    if cfg.pairs < 0:
        raise ConfigError(f"pairs must be >= 0, got {cfg.pairs}.", argument="pairs")
    folder = Path(cfg.kmeans)
    target = Path(cfg.plot) if cfg.plot is not None else folder / PLOT
    if target.suffix not in PICTURES:
        raise ConfigError(f"plot must end in {' or '.join(PICTURES)}, got {target}.", argument="plot")
    kmeans = KMeans.load(folder)
    lines = describe_units(kmeans, folder)
    pairs = nearest_pairs(kmeans.cluster_centers_, cfg.pairs)
    if pairs:
        lines.append("nearest       " + ", ".join(f"{i} and {j} ({d:.4g} apart)" for i, j, d in pairs))
    print("\n".join(lines))
    write_plot(kmeans, target)
    return 0


def describe_units(kmeans: KMeans, folder: Path) -> list[str]:
    """Lines that describe units; for imported ones usage and inertia may be unknown."""
    info = kmeans.features_ or {}
    lines = [
        f"units         {folder}",
        f"clusters      {len(kmeans.cluster_centers_)} of {counted(kmeans.n_features_in_, 'feature')}",
        f"encoder       {info.get('encoder', 'not recorded')}"
        + (f", {info['frame_rate']:g} frames/s" if "frame_rate" in info else ""),
    ]
    if "weights_sha256" in info:
        lines.append(f"weights       sha256 {info['weights_sha256']}")
    if not (kmeans.counts_ > 0).any():  # imported centroids
        return [*lines, "usage         not recorded"]
    used = usage(kmeans.counts_)
    inertia = "not recorded"
    if kmeans.inertia_ is not None:
        inertia = f"{kmeans.inertia_:.6g} ({kmeans.inertia_ / used.num_rows:.6g} a frame)"
    lines += [
        f"fit           {counted(used.num_rows, 'frame')}, {counted(kmeans.n_iter_, 'iteration')}, inertia {inertia}",
        f"usage         entropy {used.entropy:.3f} of {math.log2(used.num_clusters):.3f} bits, perplexity "
        f"{used.perplexity:.1f} of {used.num_clusters}, {used.smallest} to {used.largest} frames a cluster",
        f"dead          {counted(used.num_dead, 'cluster')} without a frame",
    ]
    return lines


def nearest_pairs(centroids_KF: torch.Tensor, count: int) -> list[tuple[int, int, float]]:
    """The ``count`` closest pairs of centroids: ``(i, j, Euclidean distance)`` with i < j, nearest first.

    Distances are differences in float64, block by block; K×K distances are never in memory.
    """
    if count == 0 or len(centroids_KF) < 2:
        return []
    x = centroids_KF.double().cpu()
    best: list[tuple[float, int, int]] = []
    for begin in range(0, len(x), _BLOCK):
        block = x[begin : begin + _BLOCK]
        distance = torch.cdist(block, x, compute_mode="donot_use_mm_for_euclid_dist")
        rows, columns = torch.arange(begin, begin + len(block))[:, None], torch.arange(len(x))[None]
        distance.masked_fill_(columns <= rows, torch.inf)
        values, places = distance.flatten().topk(min(count, distance.numel()), largest=False)
        best += [
            (float(v), begin + int(at) // len(x), int(at) % len(x))
            for v, at in zip(values, places, strict=True)
            if math.isfinite(float(v))
        ]
        best = sorted(best)[:count]
    return [(i, j, v) for v, i, j in best]


def write_plot(kmeans: KMeans, path: Path) -> None:
    """Draw usage and inertia and print the file, or why there is none."""
    if not (kmeans.counts_ > 0).any():
        print("plot          none: the usage of the units is not recorded")
    elif importlib.util.find_spec("matplotlib") is None:
        print("plot          none: it needs matplotlib, pip install 'speechlm_ext[eval]'")
    else:
        draw_usage(kmeans, path)
        print(f"plot          {path}")
