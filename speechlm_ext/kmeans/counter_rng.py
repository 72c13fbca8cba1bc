"""Random numbers that are a function of (seed, purpose, index) alone: SplitMix64 as a counter-based generator.

A generator with a state gives a row other numbers when blocks, ranks or threads change; a hash of the row's number does
not. Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: the n-th output of SplitMix64
is ``mix(base + n * golden)``; here n is the row and base is derived from seed and purpose with sha256. For one base the
map is a bijection of the 64-bit integers, so keys of different rows never tie.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as torch's int64, whose products and sums wrap modulo 2^64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def row_keys(seed: int, purpose: str, rows: Tensor) -> Tensor:
    """Pseudo-random int64 keys ``[n]`` without ties for different ``rows`` (int64 ``[n]``) and ``purpose``."""
    base = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]
    z = rows * _GOLDEN + int.from_bytes(base, "little", signed=True)
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def uniforms(seed: int, purpose: str, rows: Tensor) -> Tensor:
    """A pseudo-random float64 in [0, 1) per index of ``rows`` (int64 ``[n]``), with 53 random bits."""
    return _shift(row_keys(seed, purpose, rows), 11).to(torch.float64) * 2.0**-53


def sampled_rows(
    num_rows: int,
    num_samples: int,
    seed: int,
    *,
    start: int = 0,
    end: int | None = None,
    purpose: str = "sample",
) -> np.ndarray:
    """Numbers in ``[start, end)`` of the ``num_samples`` rows chosen of ``num_rows``, ascending int64.

    Stratified sampling: one row from each of ``num_samples`` strata of consecutive rows, stratum j covering rows
    ``[j N // M, (j + 1) N // M)``. So the number is exact, every recording is represented by its length, and a range
    of rows can be sampled independently of the others.
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
