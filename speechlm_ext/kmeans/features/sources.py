"""Sources of rows: arrays in memory, shards on disk, or any object with the protocol of :class:`FeatureSource`.

A source knows its size and returns any range of its rows in blocks, in order. A fit reads rows in no other way, so it
sees the same rows with the same numbers whatever holds them.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.features.shards import SUFFIXES, ParquetRows, how_to_reshape, open_npy
from speechlm_ext.utils.files.folders import find_files
from speechlm_ext.utils.text import counted

logger = logging.getLogger("speechlm_ext")
_EXPECTED = (
    "expected a float array or tensor [N, F], a .npy or .parquet file, a list of such files, their folder, or a "
    "FeatureSource"
)


@runtime_checkable
class FeatureSource(Protocol):
    """Rows ``[num_rows, num_features]`` that can be read any number of times, each time the same."""

    num_rows: int
    num_features: int
    dtype: torch.dtype
    """torch.float64 for features in double precision, else torch.float32 (narrower ones are widened)."""

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Rows ``[start, stop)`` in order: pairs of the first row's number and a float ``[<= max_rows, F]`` tensor."""
        ...


def place_of(source: FeatureSource, row: int) -> str:
    """The place of a row, for messages; with its file if the source has files."""
    name = getattr(source, "where", None)
    return name(row) if name is not None else f"row {row}"


def nonfinite_row(source: FeatureSource, row: int, effect: str) -> KMeansError:
    """The error for a row that is not finite; ``effect``: of ``nonfinite="drop"``."""
    return KMeansError(
        f"features: {place_of(source, row)} has a value that is not a finite number; fix the features, or set "
        f"nonfinite to 'drop' to {effect}."
    )


def open_source(x: Any, *, column: str = "features") -> FeatureSource:
    """A source for an array, files, or a folder.

    Args:
        x: float ``[N, F]`` tensor or numpy array (float16, bfloat16, float32, float64; CPU or CUDA), a path, a list of
            paths, a folder (its own .npy and .parquet files by name, without hidden ones), or a
            :class:`FeatureSource`, which is returned as it is.
        column: the column of features in Parquet files.

    Raises:
        KMeansError: none of these, no files, damaged or empty files, or shards of different widths.
    """
    if isinstance(x, (torch.Tensor, np.ndarray)):
        return ArraySource(x)
    if isinstance(x, (str, PathLike)):
        return ShardSource(_list_shards(Path(x)), column)
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


def _list_shards(path: Path) -> list[Path]:
    """The shards of a folder; of a file itself."""
    if not path.is_dir():
        return [path]
    listing = find_files(path, SUFFIXES, KMeansError, recursive=False)
    left_out = f"; left out: {listing}" if listing.left_out else ""
    if not listing.files:
        raise KMeansError(
            f"features: folder {path} has no .npy and no .parquet files{left_out}; give the folder of shards."
        )
    if left_out:
        logger.info("%s: %s%s", path, counted(len(listing.files), "feature shard"), left_out)
    return listing.files


class ArraySource:
    """Rows of an array. Raises :class:`KMeansError`: anything but float ``[N, F]`` with F >= 1."""

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
            yield first, _to_tensor(self._x[first : min(stop, first + max_rows)]).to(self.dtype)


class ShardSource:
    """Rows of ``.npy`` and ``.parquet`` files, one after the other in the order given.

    Raises :class:`KMeansError`: a file that cannot be used (see ``shards.py``), or widths that differ.
    """

    def __init__(self, paths: Sequence[Path], column: str = "features") -> None:
        self.paths = list(paths)
        self._shards = [_open_shard(path, column) for path in paths]
        self.num_features = self._shards[0].shape[1]
        for path, shard in zip(paths, self._shards, strict=True):
            if shard.shape[1] != self.num_features or shard.shape[1] == 0:
                raise KMeansError(
                    f"feature shard {path} has {counted(shard.shape[1], 'feature')} but {paths[0]} has "
                    f"{self.num_features}; all shards of a fit come from one encoder and layer."
                )
        is_double = any(shard.dtype.itemsize == 8 for shard in self._shards)
        self.dtype = torch.float64 if is_double else torch.float32
        self.sizes = [shard.shape[0] for shard in self._shards]
        """Rows of each file."""
        self._starts = [0, *accumulate(self.sizes)]
        self.num_rows = self._starts[-1]

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, Tensor]]:
        """See :class:`FeatureSource`."""
        for shard, offset in zip(self._shards, self._starts[:-1], strict=True):
            first, last = max(start - offset, 0), min(stop - offset, shard.shape[0])
            if first >= last:
                continue
            for block in _blocks(shard, first, last, max_rows):
                yield offset + first, _to_tensor(block).to(self.dtype)
                first += len(block)

    def where(self, row: int) -> str:
        """The row's file and its number there."""
        index = bisect_right(self._starts, row) - 1
        return f"{self.paths[index]}, row {row - self._starts[index]}"


def _open_shard(path: Path, column: str) -> np.ndarray | ParquetRows:
    """Rows of one file, by its suffix; raises :class:`KMeansError` if it cannot be used or has no rows."""
    if path.is_dir():
        raise KMeansError(
            f"feature shard {path} is a folder, which cannot be part of a list of files: give it alone for all its "
            ".npy and .parquet files, or list these."
        )
    if not path.is_file():
        raise KMeansError(
            f"feature shard {path} does not exist; give .npy or .parquet files, or their folder."
        )
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise KMeansError(
            f"feature shard {path}: expected a .npy or .parquet file; write features as float [n, F] with numpy.save."
        )
    shard = open_npy(path) if suffix == ".npy" else ParquetRows(path, column)
    if shard.shape[0] == 0:
        raise KMeansError(f"feature shard {path} has no rows; leave it out, or make it again.")
    return shard


def _blocks(shard: np.ndarray | ParquetRows, start: int, stop: int, max_rows: int) -> Iterator[np.ndarray]:
    if isinstance(shard, ParquetRows):
        yield from shard.blocks(start, stop, max_rows)
    else:
        for first in range(start, stop, max_rows):
            yield shard[first : min(stop, first + max_rows)]


def _to_tensor(block: Tensor | np.ndarray) -> Tensor:
    if isinstance(block, torch.Tensor):
        return block
    # torch takes neither foreign byte orders, nor negative strides, nor memory that is read-only.
    native = np.ascontiguousarray(block, dtype=block.dtype.newbyteorder("="))
    usable = native.flags.writeable and min(native.strides) >= 0
    return torch.from_numpy(native if usable else native.copy())
