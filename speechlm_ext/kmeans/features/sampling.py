"""Choosing a share of the frames: exactly so many rows, evenly spread, by a hash of the seed.

M of N rows are chosen as one row from each of M strata of consecutive rows (stratified sampling), stratum j covering
rows ``[j N // M, (j + 1) N // M)``. So the number is exact, every recording is represented by its length, and a range
of rows can be sampled without knowing the others.
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
    num_rows: int, count: int, seed: int, *, begin: int = 0, end: int | None = None, purpose: str = "sample"
) -> np.ndarray:
    """Numbers of the chosen rows that lie in ``[begin, end)``, ascending int64.

    Args:
        num_rows: N.
        count: M <= N rows chosen in all.
        purpose: separates the draws of different places.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    end = num_rows if end is None else end
    first, last = begin * count // num_rows, min(count, -(-end * count // num_rows) + 1)
    strata = np.arange(first, max(first, last), dtype=np.int64)
    low, high = strata * num_rows // count, (strata + 1) * num_rows // count
    draws = uniforms(seed, purpose, torch.from_numpy(strata)).numpy()
    rows = low + np.minimum((draws * (high - low)).astype(np.int64), high - low - 1)
    return rows[(rows >= begin) & (rows < end)]


def sample_size(num_rows: int, share: float, max_frames: int | None) -> int:
    """Rows to keep of ``num_rows``: their share, at most ``max_frames``, at least one.

    Raises:
        ConfigError: a share outside (0, 1] or no frames.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--share must lie in (0, 1], got {share:g}; 0.1 keeps every tenth frame or so.")
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"--max_frames must be at least 1, got {max_frames}.")
    kept = max(1, round(share * num_rows))
    return kept if max_frames is None else min(kept, max_frames)


def write_sample(
    source: FeatureSource, count: int, seed: int, path: Path, advance: Callable[[int], object]
) -> None:
    """Write ``count`` rows of a source into one ``.npy`` file, atomically.

    Args:
        advance: called with the number of rows read since the last call.
    """
    dtype = np.float64 if source.dtype == torch.float64 else np.float32
    with atomic_path(path) as temporary:
        out_MF = np.lib.format.open_memmap(temporary, "w+", dtype, (count, source.num_features))
        at = 0
        for first, block in source.blocks(0, source.num_rows, max(1, (1 << 23) // source.num_features)):
            rows = sampled_rows(source.num_rows, count, seed, begin=first, end=first + len(block))
            out_MF[at : at + len(rows)] = block.numpy()[rows - first]
            at += len(rows)
            advance(len(block))
        assert at == count
        out_MF.flush()
        del out_MF
