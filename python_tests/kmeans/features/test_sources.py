"""Where rows come from: files and arrays of every kind, and what is said about those that cannot be used."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import speechlm_ext as sx
from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans import FeatureSource, open_source
from speechlm_ext.kmeans.features.sources import ArraySource

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)


def read(source: FeatureSource, start: int = 0, stop: int | None = None, size: int = 3) -> np.ndarray:
    parts, at = [], start
    for first, block in source.blocks(start, source.num_rows if stop is None else stop, size):
        assert first == at and 0 < len(block) <= size
        at += len(block)
        parts.append(block.numpy())
    return np.concatenate(parts)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS[::-1],
        ROWS[:, ::2],
        np.asfortranarray(ROWS),
        ROWS.astype(">f4"),
        ROWS.astype(np.float16),
        ROWS.astype(np.float64),
        torch.from_numpy(ROWS),
        torch.from_numpy(ROWS).T,
        torch.from_numpy(ROWS).bfloat16(),
        torch.from_numpy(ROWS).requires_grad_(),
        np.broadcast_to(ROWS[0], (5, 4)),
    ],
)
def test_arrays_of_every_kind(rows):
    source = open_source(rows)
    want = rows.detach().double().numpy() if isinstance(rows, torch.Tensor) else rows.astype(np.float64)
    np.testing.assert_array_equal(read(source), want)
    assert isinstance(source, FeatureSource) and (source.num_rows, source.num_features) == want.shape
    assert source.dtype == (torch.float64 if rows.dtype in (np.float64, torch.float64) else torch.float32)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_parquet_of_every_kind(kind, dtype, tmp_path):
    flat = pa.array(ROWS.astype(dtype).ravel())
    if kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(flat, 4)
    else:
        made, ends = (pa.ListArray, np.int32) if kind == "list" else (pa.LargeListArray, np.int64)
        column = made.from_arrays(pa.array(np.arange(0, 41, 4, dtype=ends)), flat)
    pq.write_table(pa.table({"hidden": column}), tmp_path / "a.parquet", row_group_size=4)
    source = open_source(tmp_path / "a.parquet", column="hidden")
    for start, stop in ((0, 10), (0, 4), (5, 6), (3, 9), (9, 10)):
        np.testing.assert_array_equal(read(source, start, stop), ROWS[start:stop])
    assert source.dtype == (torch.float64 if dtype == np.float64 else torch.float32)


def test_folders_are_read_by_name(tmp_path):
    np.save(tmp_path / "b.npy", ROWS[3:])
    np.save(tmp_path / "a.npy", ROWS[:3].astype(np.float16))
    (tmp_path / "notes.txt").write_text("")
    np.save(tmp_path / ".hidden.npy", ROWS)
    source = open_source(str(tmp_path))
    np.testing.assert_array_equal(read(source), ROWS)
    np.testing.assert_array_equal(read(source, 2, 5, 100), ROWS[2:5])
    assert source.where(2).endswith("a.npy, row 2") and source.where(3).endswith("b.npy, row 0")


class Watched(ArraySource):
    """Rows that remember the longest block asked for."""

    longest = 0

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        self.longest = max(self.longest, min(stop - start, max_rows))
        return super().blocks(start, stop, max_rows)


@pytest.mark.parametrize("algorithm", ["lloyd", "minibatch"])
@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_no_walk_asks_for_more_than_a_block(x, init, algorithm):
    source = Watched(x)
    sx.KMeans(5, init=init, algorithm=algorithm, batch_size=100, max_iter=2, block_rows=64).fit(source)
    assert source.longest == 64


class Odd:
    """A source of one's own, with a block that is not float."""

    num_rows, num_features, dtype = 4, 2, torch.float32

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        yield start, torch.zeros(stop - start, 2, dtype=torch.int64)


def write(path: Path, value: object) -> Path:
    if path.suffix == ".npy":
        np.save(path, value)
    else:
        pq.write_table(value if isinstance(value, pa.Table) else pa.table(value), path)
    return path


def test_refusals(tmp_path):
    good = write(tmp_path / "good.npy", ROWS)
    whole = good.read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-8])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "noise.npy").write_bytes(b"no such thing")
    (tmp_path / "noise.parquet").write_bytes(b"PAR1 no such thing PAR1")
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "folder").mkdir()
    archive = io.BytesIO()
    np.savez(archive, a=ROWS)
    (tmp_path / "zip.npy").write_bytes(archive.getvalue())
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    lists = pa.array([[1.0, 2.0], [3.0, 4.0]])
    cases: list[tuple[object, str]] = [
        (tmp_path / "nowhere.npy", "nowhere.npy does not exist; give .npy or .parquet files"),
        (tmp_path / "x.txt", "x.txt: expected a .npy or .parquet file"),
        (tmp_path / "folder", "folder .*folder has no .npy and no .parquet files"),
        ([], "the list of files is empty"),
        (
            [good, tmp_path / "folder"],
            "folder is a folder, which cannot be part of a list of files: give it alone",
        ),
        (tmp_path / "cut.npy", "cut.npy cannot be read .*damaged, truncated"),
        (tmp_path / "empty.npy", "empty.npy cannot be read"),
        (tmp_path / "noise.npy", "noise.npy cannot be read"),
        (
            tmp_path / "pickled.npy",
            r"pickled.npy cannot be read \(it holds Python objects\).*refused.*Save numbers",
        ),
        (tmp_path / "noise.npy", r"noise.npy cannot be read \(it has no .npy header\); it is damaged"),
        (tmp_path / "zip.npy", r"expected float16, float32 or float64 \[n, F\], got a .npz archive"),
        (tmp_path / "noise.parquet", "noise.parquet cannot be read"),
        (write(tmp_path / "ints.npy", ROWS.astype(int)), r"expected float16.*got int64 \[10, 4\]"),
        (
            write(tmp_path / "flat.npy", ROWS.ravel()),
            r"got float32 \[40\]; convert .*reshape\(-1, F\) for F numbers",
        ),
        (write(tmp_path / "cube.npy", ROWS.reshape(5, 2, 4)), r"got float32 \[5, 2, 4\].*reshape\(-1, F\)"),
        (write(tmp_path / "none.npy", ROWS[:0]), "none.npy has no rows; leave it out"),
        ([good, write(tmp_path / "wide.npy", ROWS[:, :3])], "wide.npy has 3 features but .*good.npy has 4"),
        (
            write(tmp_path / "a.parquet", {"f": lists}),
            "has no column 'features', only f; set column to the one",
        ),
        (
            write(tmp_path / "b.parquet", {"features": [1.0, 2.0]}),
            "should hold lists of float16.*it holds double",
        ),
        (write(tmp_path / "c.parquet", {"features": [[1], [2]]}), "it holds list<"),
        (write(tmp_path / "d.parquet", {"features": lists[:0]}), "d.parquet has no rows"),
        (ROWS.astype(int), r"expected a float array.*got int64 \[10, 4\].*convert integers"),
        (ROWS.astype(np.complex64), "got complex64"),
        (
            ROWS[0],
            r"got float32 \[4\]. One row per frame, as by reshape\(-1, F\).*or reshape\(-1, 1\) for one number",
        ),
        (ROWS.reshape(5, 2, 4), r"got float32 \[5, 2, 4\]. One row per frame, as by reshape\(-1, F\)"),
        (ROWS[:, :0], r"got float32 \[10, 0\]"),
        (torch.zeros(2, 2, dtype=torch.bool), r"got torch.bool \[2, 2\]"),
        (ROWS.tolist(), "expected a float array or tensor .*got list"),
        (None, "got NoneType"),
        (Odd(), r"row 0: expected a float block \[n, 2\], got torch.int64 \[4, 2\]; fix the source"),
    ]
    for features, message in cases:
        with pytest.raises(KMeansError, match=message) as caught:
            sx.KMeans(1).fit(features)
        assert "allow_pickle" not in str(caught.value)
    for bad in ([[1.0, 2.0], [3.0]], [[1.0, 2.0], None], [[1.0, 2.0], [3.0, None]]):
        path = write(tmp_path / "ragged.parquet", {"features": pa.array(bad, pa.list_(pa.float32()))})
        with pytest.raises(KMeansError, match=r"ragged.parquet.*at row [01]: expected 2 numbers in each row"):
            sx.KMeans(1).fit(path)


def test_rows_that_are_not_finite_are_named_with_their_file(tmp_path):
    bad = ROWS.copy()
    bad[4, 1] = np.nan
    files = [write(tmp_path / "a.npy", ROWS), write(tmp_path / "b.npy", bad)]
    with pytest.raises(KMeansError, match="b.npy, row 4 has a value that is not a finite number"):
        sx.KMeans(2, block_rows=3).fit(files)
    model = sx.KMeans(2, block_rows=3, nonfinite="drop").fit(files)
    assert model.n_dropped_ == 1 and model.predict(files)[14] == -1
    with pytest.raises(KMeansError, match="b.npy, row 4"):
        sx.KMeans(2).fit(files[:1]).predict(files)
