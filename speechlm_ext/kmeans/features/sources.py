"""Where rows come from: an array in memory, shards on disk, or anything with the protocol of :class:`FeatureSource`.

A source knows its size and gives any range of its rows in blocks, in order. All walks of a fit go through
that, so a fit sees the same rows with the same numbers whatever holds them.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.features.shards import SUFFIXES, Shard, how_to_reshape, open_shard
from speechlm_ext.kmeans.words import counted
from speechlm_ext.utils.files.folders import find_files

logger = logging.getLogger("speechlm_ext")
_EXPECTED = (
    "expected a float array or tensor [N, F], a .npy or .parquet file, a list of such files, their folder, or a "
    "FeatureSource"
)


@runtime_checkable
class FeatureSource(Protocol):
    """Rows ``[num_rows, num_features]`` that can be walked any number of times, each time the same."""

    num_rows: int
    num_features: int
    dtype: torch.dtype
    """torch.float64 for features in double precision, else torch.float32 (narrower ones are widened)."""

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Rows ``[start, stop)`` in order: pairs of the first row's number and a float ``[<= max_rows, F]`` tensor."""
        ...


def where(source: FeatureSource, row: int) -> str:
    """Words for the place of a row: its file where the source has files."""
    name = getattr(source, "where", None)
    return name(row) if name is not None else f"row {row}"


def open_source(x: Any, *, column: str = "features") -> FeatureSource:
    """Make a source of what a user has.

    Args:
        x: float ``[N, F]`` tensor or numpy array (float16, bfloat16, float32, float64; CPU or CUDA), a path, a list of
            paths, a folder (its own .npy and .parquet files by name, hidden ones left out), or a
            :class:`FeatureSource`, which is returned as it is.
        column: the column of features in Parquet files.

    Raises:
        KMeansError: none of these, no files, damaged or empty files, or shards of different widths.
    """
    if isinstance(x, (torch.Tensor, np.ndarray)):
        return ArraySource(x)
    if isinstance(x, (str, PathLike)):
        path = Path(x)
        if not path.is_dir():
            return ShardSource([path], column)
        listing = find_files(path, SUFFIXES, KMeansError, recursive=False)
        files = listing.files
        others = f"; left out: {listing}" if listing.left_out else ""
        if not files:
            raise KMeansError(
                f"features: folder {path} has no .npy and no .parquet files{others}; give the folder of shards."
            )
        if others:
            logger.info("%s: %s%s", path, counted(len(files), "feature shard"), others)
        return ShardSource(files, column)
    if (
        isinstance(x, Sequence)
        and not isinstance(x, bytes)
        and all(isinstance(p, (str, PathLike)) for p in x)
    ):
        if not x:
            raise KMeansError(
                "features: the list of files is empty; give at least one .npy or .parquet file."
            )
        return ShardSource([Path(p) for p in x], column)
    if isinstance(x, FeatureSource):
        return x
    raise KMeansError(f"features: {_EXPECTED}; got {type(x).__name__}.")


class ArraySource:
    """Rows in memory. Raises :class:`KMeansError` for anything but float ``[N, F]`` with F >= 1."""

    def __init__(self, x: Tensor | np.ndarray) -> None:
        if isinstance(x, torch.Tensor):
            is_float = x.is_floating_point() and not x.is_sparse and x.itemsize >= 2
            self.device: torch.device | None = x.device
        else:
            is_float = x.dtype.kind == "f" and x.dtype.itemsize <= 8
            self.device = None
        if not is_float or x.ndim != 2 or x.shape[1] == 0:
            raise KMeansError(
                f"features: {_EXPECTED}; got {x.dtype} {list(x.shape)}. One row per frame"
                f"{how_to_reshape(x.ndim)}; convert integers to float."
            )
        self.num_rows, self.num_features = (int(n) for n in x.shape)
        self.dtype = torch.float64 if x.dtype in (torch.float64, np.float64) else torch.float32
        self._x = x.detach() if isinstance(x, torch.Tensor) else x

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, Tensor]]:
        """See :class:`FeatureSource`."""
        for first in range(start, stop, max_rows):
            yield first, _tensor(self._x[first : min(stop, first + max_rows)]).to(self.dtype)


class ShardSource:
    """Rows of files, one after the other in the order given.

    Args:
        paths: .npy and .parquet files.
        column: of the Parquet files.

    Raises:
        KMeansError: a file that cannot be used (see ``shards.py``), or widths that differ.
    """

    def __init__(self, paths: Sequence[Path], column: str = "features") -> None:
        self.shards: list[Shard] = [open_shard(path, column) for path in paths]
        first = self.shards[0]
        for shard in self.shards:
            if shard.num_features != first.num_features or shard.num_features == 0:
                raise KMeansError(
                    f"feature shard {shard.path} has {counted(shard.num_features, 'feature')} but {first.path} has "
                    f"{first.num_features}; all shards of a fit come from one encoder and layer."
                )
        self.num_features = first.num_features
        self.dtype = torch.float64 if any(s.is_double for s in self.shards) else torch.float32
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + shard.num_rows)
        self.num_rows = self._starts[-1]

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, Tensor]]:
        """See :class:`FeatureSource`."""
        at = start
        for shard, begin in zip(self.shards, self._starts[:-1], strict=True):
            first, last = max(start, begin), min(stop, begin + shard.num_rows)
            if first >= last:
                continue
            for block in shard.blocks(first - begin, last - begin, max_rows):
                yield at, _tensor(block).to(self.dtype)
                at += len(block)

    def where(self, row: int) -> str:
        """The row's file and its number there."""
        index = bisect_right(self._starts, row) - 1
        return f"{self.shards[index].path}, row {row - self._starts[index]}"


def _tensor(block: Tensor | np.ndarray) -> Tensor:
    if isinstance(block, torch.Tensor):
        return block
    # torch takes neither foreign byte orders, nor negative strides, nor memory that may not be written to.
    native = np.ascontiguousarray(block, dtype=block.dtype.newbyteorder("="))
    usable = native.flags.writeable and min(native.strides) >= 0
    return torch.from_numpy(native if usable else native.copy())
