"""``speechlm kmeans inspect``: what an artefact of units is and how its units are used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speechlm_ext.errors import ConfigError
from speechlm_ext.kmeans import KMeans

_BLOCK = 1024


@dataclass(frozen=True)
class InspectConfig:
    """Show what K-Means units are: size, encoder, fit, usage, and the centroids that lie closest together."""

    kmeans: str
    """Folder that `speechlm kmeans fit` has written."""
    pairs: int = 5
    """Pairs of nearest centroids to list."""
    plot: str | None = None
    """Where to write the plot of usage and inertia as SVG; default usage.svg in the folder."""


def run_inspect(cfg: InspectConfig) -> int:
    """Print and plot as ``cfg`` says; see :class:`InspectConfig`.

    Raises:
        KMeansError: no such artefact, or a damaged one.
    """
    if cfg.pairs < 0:
        raise ConfigError(f"pairs must be >= 0, got {cfg.pairs}.")
    folder = Path(cfg.kmeans)
    kmeans = KMeans.load(folder)
    lines = describe_units(kmeans, folder)
    pairs = nearest_pairs(kmeans.cluster_centers_, cfg.pairs)
    if pairs:
        lines.append("nearest       " + ", ".join(f"{i} and {j} ({d:.4g} apart)" for i, j, d in pairs))
    print("\n".join(lines))
    target = Path(cfg.plot) if cfg.plot is not None else folder / "usage.svg"
    if write_plot(kmeans, target):
        print(f"plot          {target}")
    return 0


def describe_units(kmeans: Any, folder: Path) -> list[str]:
    """Lines that say what units are."""
    counts = kmeans.counts_.double().cpu()
    total = float(counts.sum())
    p = counts[counts > 0] / max(total, 1.0)
    bits = float(-(p * p.log2()).sum())
    num_dead = int((counts == 0).sum())
    info = kmeans.features_ or {}
    lines = [
        f"units         {folder}",
        f"clusters      {len(kmeans.cluster_centers_)} of {kmeans.n_features_in_} features",
        f"encoder       {info.get('encoder', 'not recorded')}"
        + (f", {info['frame_rate']:g} frames/s" if "frame_rate" in info else ""),
    ]
    if "weights_sha256" in info:
        lines.append(f"weights       sha256 {info['weights_sha256']}")
    rows, num_clusters = max(total, 1.0), len(kmeans.cluster_centers_)
    lines += [
        f"fit           {total:.0f} frames, {kmeans.n_iter_} iterations, inertia {kmeans.inertia_:.6g} "
        f"({kmeans.inertia_ / rows:.6g} a frame)",
        f"usage         entropy {bits:.3f} of {math.log2(num_clusters):.3f} bits, perplexity {2**bits:.1f} of "
        f"{num_clusters}",
        f"dead          {num_dead} clusters without a frame",
    ]
    return lines


def nearest_pairs(centroids_KF: torch.Tensor, count: int) -> list[tuple[int, int, float]]:
    """The ``count`` pairs of centroids that lie closest: ``(i, j, Euclidean distance)`` with i < j, nearest first.

    Distances are differences in float64, block by block; never K×K at once.
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


def write_plot(kmeans: Any, path: Path) -> bool:
    """Write the usage plot; says why where matplotlib is missing. Returns whether it was written."""
    from speechlm_ext.kmeans.usage import write_usage_plot

    return write_usage_plot(kmeans, path)
