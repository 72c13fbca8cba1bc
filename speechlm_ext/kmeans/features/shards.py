"""Feature shards on disk, read block by block: ``.npy`` files and Parquet files.

Both are checked when they are opened (kind, shape, dtype, length against the header) and hold nothing in memory but
the block being read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechlm_ext.errors import KMeansError, foreign_errors

SUFFIXES = (".npy", ".parquet")
_WAY_OUT = "It is damaged or truncated: write it again."
_PIECES, _PIECE_BYTES = 64, 4096


def content_key(path: Path, pieces: int = _PIECES) -> list[Any]:
    """Size of a file and a sha256 over so many pieces of it (from 2), as JSON: tells files of one name and size apart,
    such as the same recordings' features of another layer, without reading all of them. Raises ``OSError``."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(pieces):
            file.seek(max(0, size - _PIECE_BYTES) * i // (pieces - 1))
            digest.update(file.read(_PIECE_BYTES))
    return [size, digest.hexdigest()]


def how_to_reshape(num_dims: int) -> str:
    """Words for rows that do not have two dimensions; none for those that have."""
    if num_dims == 2:
        return ""
    if num_dims == 1:
        return ", as by reshape(-1, F) for F numbers a frame, or reshape(-1, 1) for one number a frame"
    return ", as by reshape(-1, F) for F numbers a frame"


def why_no_npy(path: str | Path, error: Exception) -> str:
    """What is the matter with a file that ``numpy.load`` refused, in parentheses, and what to do about it.

    NumPy's own words recommend to unpickle what it does not know, which would run any code in the file.
    """
    words = str(error)
    if not isinstance(error, OSError) and ("object" in words.lower() or "pickle" in words):
        with open(path, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
        if is_npy:
            return (
                "(it holds Python objects); such arrays are refused, since reading one runs whatever code it holds. "
                "Save numbers instead: numpy.save of a float array [n, F]"
            )
        words = "it does not begin as one"
    return f"({words}); it is damaged, truncated, or not a plain .npy file: write it again with numpy.save"


def check_npy_size(path: Path, array: np.ndarray) -> None:
    """Refuse a mapped ``.npy`` file with more in it than its header says. Raises :class:`KMeansError`."""
    expected, size = getattr(array, "offset", 0) + array.nbytes, path.stat().st_size
    if size != expected:
        raise KMeansError(
            f"{path} has {size} bytes but its header describes {expected} of them, {array.dtype} {list(array.shape)}: "
            "it was damaged or appended to. Write it again with one numpy.save."
        )


class Shard(Protocol):
    """One file of rows."""

    path: Path
    num_rows: int
    num_features: int
    is_double: bool

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[np.ndarray]:
        """Rows ``[start, stop)`` in order, in float arrays ``[<= max_rows, F]``."""
        ...


def open_shard(path: Path, column: str) -> Shard:
    """Open one file by its suffix.

    Args:
        path: ``*.npy`` or ``*.parquet``.
        column: the Parquet column of features.

    Raises:
        KMeansError: no such file, another kind of file, damaged, empty, or not float ``[n, F]``.
    """
    if path.is_dir():
        raise KMeansError(
            f"feature shard {path} is a folder, which cannot stand in a list of files: give it alone for all its "
            ".npy and .parquet files, or list these."
        )
    if not path.is_file():
        raise KMeansError(
            f"feature shard {path} does not exist; give .npy or .parquet files, or their folder."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise KMeansError(
            f"feature shard {path}: expected a .npy or .parquet file; write features as float [n, F] with numpy.save."
        )
    shard: Shard = NpyShard(path) if path.suffix.lower() == ".npy" else ParquetShard(path, column)
    if shard.num_rows == 0:
        raise KMeansError(f"feature shard {path} has no rows; leave it out, or make it again.")
    return shard


class NpyShard:
    """A ``.npy`` file of float ``[n, F]``, mapped into memory. Raises :class:`KMeansError`."""

    def __init__(self, path: Path) -> None:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header is evaluated as Python, and raises anything
            raise KMeansError(f"feature shard {path} cannot be read {why_no_npy(path, error)}.") from None
        if (
            not isinstance(array, np.ndarray)
            or array.ndim != 2
            or array.dtype.kind != "f"
            or array.itemsize > 8
        ):
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "a .npz archive"
            raise KMeansError(
                f"feature shard {path}: expected float16, float32 or float64 [n, F], got {got}; convert it before"
                f"{how_to_reshape(getattr(array, 'ndim', 2))}."
            )
        check_npy_size(path, array)
        self.path = path
        self.num_rows, self.num_features = (int(n) for n in array.shape)
        self.is_double = array.itemsize == 8
        self._array = array

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[np.ndarray]:
        """See :class:`Shard`."""
        for first in range(start, stop, max_rows):
            yield self._array[first : min(stop, first + max_rows)]


class ParquetShard:
    """A Parquet file with a column of float lists, all of one length, read by row groups.

    Args:
        path: the file.
        column: its name; lists or fixed-size lists of float16, float32 or float64.

    Raises:
        KMeansError: unreadable, no such column, another type, lists that are missing or differ in length.
    """

    def __init__(self, path: Path, column: str) -> None:
        with foreign_errors(KMeansError, f"feature shard {path} cannot be read", _WAY_OUT):
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
        if column not in schema.names:
            raise KMeansError(
                f"feature shard {path} has no column {column!r}, only {', '.join(schema.names)}; say which holds the "
                "features with column=."
            )
        kind = schema.field(column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            raise KMeansError(
                f"feature shard {path}: column {column!r} should hold lists of float16, float32 or float64, one for "
                f"each row; it holds {kind}."
            )
        self.path, self.column = path, column
        self.is_double = pa.types.is_float64(kind.value_type)
        self.num_rows = file.metadata.num_rows
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
        self._starts = np.concatenate([[0], ends]).astype(int).tolist()
        self.num_features = -1
        if pa.types.is_fixed_size_list(kind):
            self.num_features = int(kind.list_size)
        elif self.num_rows:
            self.num_features = len(next(iter(self._lists(0, 1, 1)))[0])

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[np.ndarray]:
        """See :class:`Shard`."""
        at = start
        for lists in self._lists(start, stop, max_rows):
            # flatten() honours slices and skips nulls; a null would move everything after it.
            flat = lists.flatten()
            lengths = lists.value_lengths()
            wrong = np.flatnonzero(np.asarray(lengths.fill_null(-1)) != self.num_features)
            if lists.null_count or flat.null_count or len(wrong):
                row = at + (int(wrong[0]) if len(wrong) else 0)
                raise KMeansError(
                    f"feature shard {self.path}: column {self.column!r}, at row {row}: expected {self.num_features} "
                    "numbers in each row, as in the first; one is null, missing, or of another length. Mend the file."
                )
            yield flat.to_numpy(zero_copy_only=False).reshape(len(lists), self.num_features)
            at += len(lists)

    def _lists(self, start: int, stop: int, max_rows: int) -> Iterator[Any]:
        """Arrow list arrays of rows ``[start, stop)``, at most ``max_rows`` long."""
        # A file of its own for each walk: readers are not shared between walks that are under way.
        with foreign_errors(KMeansError, f"feature shard {self.path} cannot be read", _WAY_OUT):
            file = pq.ParquetFile(self.path)
            for group in range(len(self._starts) - 1):
                begin, end = self._starts[group], self._starts[group + 1]
                if end <= start or begin >= stop:
                    continue
                at = begin
                for batch in file.iter_batches(max_rows, row_groups=[group], columns=[self.column]):
                    first, last = max(start, at), min(stop, at + len(batch))
                    if first < last:
                        yield batch.column(0).slice(first - at, last - first)
                    at += len(batch)
                    if at >= stop:
                        break
