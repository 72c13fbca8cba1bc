"""Sampling a share of the frames: an exact number of rows, evenly spread, chosen by a hash of the seed.

M of N rows are chosen as one row from each of M strata of consecutive rows (stratified sampling), stratum j covering
rows ``[j N // M, (j + 1) N // M)``. So the number is exact, every recording is represented by its length, and a range
of rows can be sampled independently of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from speechlm_ext.errors import ConfigError
from speechlm_ext.kmeans.counter_rng import uniforms
from speechlm_ext.kmeans.features.sources import FeatureSource
from speechlm_ext.utils.files.io import atomic_path


def sampled_rows(
    num_rows: int,
    num_samples: int,
    seed: int,
    *,
    start: int = 0,
    end: int | None = None,
    purpose: str = "sample",
) -> np.ndarray:
    """Numbers of the chosen rows in ``[start, end)``, ascending int64.

    Args:
        num_rows: N.
        num_samples: M <= N, rows chosen in total.
        purpose: makes the draws of different callers independent.
    """
    if num_samples == 0:
        return np.zeros(0, np.int64)
    end = num_rows if end is None else end
    first, last = start * num_samples // num_rows, min(num_samples, -(-end * num_samples // num_rows) + 1)
    strata = np.arange(first, max(first, last), dtype=np.int64)
    low, high = strata * num_rows // num_samples, (strata + 1) * num_rows // num_samples
    draws = uniforms(seed, purpose, torch.from_numpy(strata)).numpy()
    rows = low + np.minimum((draws * (high - low)).astype(np.int64), high - low - 1)
    return rows[(rows >= start) & (rows < end)]


def sample_size(num_rows: int, share: float, max_frames: int | None) -> int:
    """Rows to keep of ``num_rows``: their share, at most ``max_frames``, at least one.

    Raises:
        ConfigError: a share outside (0, 1] or no frames.
    """
    if not 0 < share <= 1:
        raise ConfigError(
            f"share must be in (0, 1], got {share:g}; 0.1 keeps about every tenth frame.", argument="share"
        )
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"max_frames must be at least 1, got {max_frames}.", argument="max_frames")
    size = max(1, round(share * num_rows))
    return size if max_frames is None else min(size, max_frames)


def write_sample(
    source: FeatureSource, num_samples: int, seed: int, path: Path, advance: Callable[[int], object]
) -> None:
    """Write ``num_samples`` rows of a source into one ``.npy`` file, atomically.

    Args:
        advance: called with the number of rows read since the last call.
    """
    dtype = np.float64 if source.dtype == torch.float64 else np.float32
    with atomic_path(path) as temporary:
        out_MF = np.lib.format.open_memmap(temporary, "w+", dtype, (num_samples, source.num_features))
        num_written = 0
        for first, block in source.blocks(0, source.num_rows, max(1, (1 << 23) // source.num_features)):
            rows = sampled_rows(source.num_rows, num_samples, seed, start=first, end=first + len(block))
            out_MF[num_written : num_written + len(rows)] = block.numpy()[rows - first]
            num_written += len(rows)
            advance(len(block))
        assert num_written == num_samples
        out_MF.flush()
        del out_MF
