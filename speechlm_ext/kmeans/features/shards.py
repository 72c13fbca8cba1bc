"""Feature shards on disk as arrays of rows: ``.npy`` files mapped into memory, Parquet files read by row groups.

Both are checked when they are opened (kind, shape, dtype, length against the header); only the block being read is in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechlm_ext.errors import KMeansError, foreign_errors

SUFFIXES = (".npy", ".parquet")
_HINT = "It is damaged or truncated: write it again."


def open_npy(path: Path, name: str = "feature shard", shape: str = "[n, F]") -> np.ndarray:
    """A ``.npy`` file of floats with two dimensions, mapped; ``name`` and ``shape`` are for messages.

    Raises :class:`KMeansError`: unreadable, of another type or shape, or with more bytes than its header describes.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header is evaluated as Python, and raises anything
        raise KMeansError(f"{name} {path} cannot be read {_npy_problem(path, error)}.") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or array.itemsize > 8:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "a .npz archive"
        raise KMeansError(
            f"{name} {path}: expected float16, float32 or float64 {shape}, got {got}; convert it first"
            f"{how_to_reshape(getattr(array, 'ndim', 2))}."
        )
    check_npy_size(path, array)
    return array


def check_npy_size(path: Path, array: np.ndarray) -> None:
    """Raises :class:`KMeansError`: a mapped ``.npy`` file has more bytes than its header describes."""
    expected, size = getattr(array, "offset", 0) + array.nbytes, path.stat().st_size
    if size != expected:
        raise KMeansError(
            f"{path} has {size} bytes but its header describes {expected} of them, {array.dtype} {list(array.shape)}: "
            "it was damaged or appended to. Write it again with one numpy.save."
        )


def _npy_problem(path: str | Path, error: Exception) -> str:
    """Why ``numpy.load`` refused a file, in parentheses, and how to fix it.

    NumPy's own message recommends to unpickle the file, which would run any code in it.
    """
    reason = str(error)
    if not isinstance(error, OSError) and ("object" in reason.lower() or "pickle" in reason):
        with open(path, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
        if is_npy:
            return (
                "(it holds Python objects); such arrays are refused, since reading one runs any code it holds. Save "
                "numbers instead: numpy.save of a float array [n, F]"
            )
        reason = "it has no .npy header"
    return f"({reason}); it is damaged, truncated, or not a plain .npy file: write it again with numpy.save"


def how_to_reshape(num_dims: int) -> str:
    """A hint for arrays without two dimensions; empty for two."""
    if num_dims == 2:
        return ""
    single = ", or reshape(-1, 1) for one number a frame" if num_dims == 1 else ""
    return f", as by reshape(-1, F) for F numbers a frame{single}"


class ParquetRows:
    """A Parquet file with a column of float lists, all of one length; sliced like an array ``[n, F]``.

    Raises :class:`KMeansError`: unreadable, no such column, another type, lists that are missing or differ in length.
    """

    def __init__(self, path: Path, column: str) -> None:
        with foreign_errors(KMeansError, f"feature shard {path} cannot be read", _HINT):
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
        if column not in schema.names:
            raise KMeansError(
                f"feature shard {path} has no column {column!r}, only {', '.join(schema.names)}; set column to the one "
                "with the features."
            )
        kind = schema.field(column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            raise KMeansError(
                f"feature shard {path}: column {column!r} should hold lists of float16, float32 or float64, one for "
                f"each row; it holds {kind}."
            )
        self.path, self.column = path, column
        self.dtype = np.dtype(kind.value_type.to_pandas_dtype())
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes]).tolist()
        width = -1
        if pa.types.is_fixed_size_list(kind):
            width = int(kind.list_size)
        elif file.metadata.num_rows:
            width = len(next(iter(self._lists(0, 1, 1)))[0])
        self.shape = (file.metadata.num_rows, width)

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[np.ndarray]:
        """Rows ``[start, stop)`` in order, in float arrays ``[<= max_rows, F]``."""
        width = self.shape[1]
        for lists in self._lists(start, stop, max_rows):
            # flatten() honors slices and skips nulls; a null would move everything after it.
            flat = lists.flatten()
            wrong = np.flatnonzero(np.asarray(lists.value_lengths().fill_null(-1)) != width)
            if lists.null_count or flat.null_count or len(wrong):
                row = start + (int(wrong[0]) if len(wrong) else 0)
                raise KMeansError(
                    f"feature shard {self.path}: column {self.column!r}, at row {row}: expected {width} numbers in "
                    "each row, as in the first; one is null, missing, or of another length. Fix the file."
                )
            yield flat.to_numpy(zero_copy_only=False).reshape(len(lists), width)
            start += len(lists)

    def _lists(self, start: int, stop: int, max_rows: int) -> Iterator[Any]:
        """Arrow list arrays of rows ``[start, stop)``, at most ``max_rows`` long."""
        # Opened for each pass: concurrent passes cannot share a reader.
        with foreign_errors(KMeansError, f"feature shard {self.path} cannot be read", _HINT):
            file = pq.ParquetFile(self.path)
            for group, first in enumerate(self._starts[:-1]):
                if first >= stop or self._starts[group + 1] <= start:
                    continue
                # One group at a time: iter_batches over several holds all of them in memory.
                for batch in file.iter_batches(max_rows, row_groups=[group], columns=[self.column]):
                    part = batch.column(0)[max(0, start - first) : max(0, stop - first)]
                    if len(part):
                        yield part
                    first += len(batch)
                    if first >= stop:
                        break
