"""One result, bit for bit: for any blocks, threads, files and processes, and after any interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import speechlm_ext as sx
from python_tests.kmeans.conftest import clustered
from python_tests.kmeans.fit.shared_fit import FITS, found_by, run
from speechlm_ext.errors import CheckpointError
from speechlm_ext.kmeans.features.sources import ArraySource

HERE = Path(__file__).parent


def assert_same(a: sx.KMeans, b: sx.KMeans) -> None:
    first, second = found_by(a), found_by(b)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def to_parquet(path: Path, rows: np.ndarray, fixed: bool, row_group_size: int) -> None:
    flat = pa.array(rows.ravel())
    width = rows.shape[1]
    if fixed:
        column = pa.FixedSizeListArray.from_arrays(flat, width)
    else:
        column = pa.ListArray.from_arrays(pa.array(np.arange(0, rows.size + 1, width, dtype=np.int32)), flat)
    pq.write_table(
        pa.table({"id": np.arange(len(rows)), "features": column}), path, row_group_size=row_group_size
    )


@pytest.mark.parametrize("fit", FITS)
def test_blocks_threads_and_files(x, fit, tmp_path):
    settings = FITS[fit]
    whole = sx.KMeans(**settings).fit(x)
    for block_rows in (1499, 97):
        assert_same(whole, sx.KMeans(block_rows=block_rows, **settings).fit(x))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert_same(whole, sx.KMeans(**settings).fit(x.numpy()))
    finally:
        torch.set_num_threads(threads)
    rows = x.numpy()
    np.save(tmp_path / "a.npy", rows[:400])
    np.save(tmp_path / "b.npy", np.asfortranarray(rows[400:401]))
    to_parquet(tmp_path / "c.parquet", rows[401:1000], fixed=True, row_group_size=100)
    to_parquet(tmp_path / "d.parquet", rows[1000:], fixed=False, row_group_size=1000)
    for block_rows in (1000, 130):
        streamed = sx.KMeans(block_rows=block_rows, **settings).fit(tmp_path)
        assert_same(whole, streamed)
        assert streamed.labels_ is None
    files = sorted(tmp_path.iterdir())
    assert torch.equal(streamed.predict(files), whole.labels_)
    assert torch.equal(sx.KMeans(**settings).fit_predict([str(f) for f in files]), whole.labels_)


def test_large_enough_for_torch_to_use_threads():
    """Rows and clusters over which torch's own reductions are split."""
    x = clustered(3000, 40, 30)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            for init in ("k-means++", "k-means||"):
                found.append(sx.KMeans(60, init=init, max_iter=3).fit(x))
    finally:
        torch.set_num_threads(threads)
    for later in (2, 4):
        assert_same(found[0], found[later])
        assert_same(found[1], found[later + 1])


def test_two_processes_are_one(x, tmp_path):
    rows = x.numpy().copy()
    rows[[3, 1400]] = np.nan
    np.save(tmp_path / "x.npy", rows)
    shares = [[(0, 611), (611, 1500)], [(0, 0), (0, 1500)]]
    (tmp_path / "shares.json").write_text(json.dumps(shares))
    # Both in processes of their own: this one may be in a group of another test's.
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "python_tests.kmeans.fit.shared_fit", str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=HERE.parents[2],
        )
        for rank in (0, 1)
    ]
    want = run(rows, tmp_path / "alone", 0)
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    for number in range(len(shares)):
        found = [load_file(tmp_path / f"found.{number}.{rank}") for rank in (0, 1)]
        for name, tensor in want.items():
            if name.endswith("labels"):
                assert torch.equal(torch.cat([f[name] for f in found]), tensor), name
            else:
                assert all(torch.equal(f[name], tensor) for f in found), name
        # One process continues from the checkpoints of two.
        for name, settings in FITS.items():
            again = sx.KMeans(nonfinite="drop", **settings)
            again.fit(rows, checkpoint=tmp_path / str(number) / "state" / name)
            assert torch.equal(again.cluster_centers_, want[f"{name}.centers"])
            assert torch.equal(torch.from_numpy(again.labels_), want[f"{name}.labels"])


# ---- resume ----------------------------------------------------------------------------------------------------
class Failing(ArraySource):
    """Rows whose walk number ``fails_at`` is interrupted in its middle."""

    def __init__(self, x: torch.Tensor, fails_at: int) -> None:
        super().__init__(x)
        self.left = fails_at

    def blocks(self, start: int, stop: int, max_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        self.left -= 1
        for number, block in enumerate(super().blocks(start, stop, max_rows)):
            if self.left < 0 and number:
                raise KeyboardInterrupt
            yield block


RESUMED = {
    "lloyd": {"n_clusters": 10, "init": "random", "max_iter": 3, "n_init": 2},
    "parallel": {"n_clusters": 10, "init": "k-means||", "max_iter": 3},
    "minibatch": {"n_clusters": 10, "algorithm": "minibatch", "batch_size": 64, "max_iter": 3, "n_init": 2},
}


@pytest.mark.parametrize("fit", RESUMED)
def test_resume_is_exact(x, fit, tmp_path):
    x = x[:500]
    settings = {**RESUMED[fit], "block_rows": 250}
    whole = sx.KMeans(**settings).fit(x)
    every = 5 if fit == "minibatch" else 1
    fails_at = interrupted = 0
    while True:
        folder = tmp_path / str(fails_at)
        try:
            sx.KMeans(**settings).fit(Failing(x, fails_at), checkpoint=folder, checkpoint_every=every)
        except KeyboardInterrupt:
            interrupted += 1
            resumed = sx.KMeans(**settings).fit(x, checkpoint=folder, checkpoint_every=every)
            assert_same(whole, resumed)
            assert torch.equal(resumed.labels_, whole.labels_)
            fails_at += 1
            continue
        break
    assert interrupted >= 8
    # Interrupted again and again, it still arrives.
    for _ in range(60):
        try:
            chain = sx.KMeans(**settings).fit(
                Failing(x, 20 if fit == "parallel" else 9),
                checkpoint=tmp_path / "chain",
                checkpoint_every=every,
            )
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert_same(whole, chain)
    finished = sx.KMeans(**settings).fit(
        Failing(x, 3), checkpoint=folder
    )  # nothing is left but to look at the data
    assert_same(whole, finished)


def test_a_finished_checkpoint_gives_the_labels_too(x, tmp_path):
    first = sx.KMeans(5).fit(x, checkpoint=tmp_path)
    again = sx.KMeans(5).fit(x, checkpoint=tmp_path)
    assert torch.equal(first.labels_, again.labels_)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 2 and names[0].endswith("-done.safetensors") and names[1] == "kmeans_state.json"


def test_checkpoints_of_others_are_refused(x, tmp_path):
    sx.KMeans(5, max_iter=2).fit(x, checkpoint=tmp_path)
    moved = x.clone()
    moved[777, 3] += 1e-3
    for settings, rows, message in (
        ({"n_clusters": 6, "max_iter": 2}, x, "of a fit with settings n_clusters = 5, this one has 6"),
        ({"n_clusters": 5, "max_iter": 3}, x, "settings max_iter = 2, this one has 3"),
        ({"n_clusters": 5, "max_iter": 2, "random_state": 1}, x, "settings random_state = 0"),
        (
            {"n_clusters": 5, "max_iter": 2, "init": x[:5]},
            x,
            r"settings init = k-means\+\+, this one has array",
        ),
        ({"n_clusters": 5, "max_iter": 2}, x[:-1], "data num_rows = 1500, this one has 1499"),
        ({"n_clusters": 5, "max_iter": 2}, x[:, :-1], "data num_features = 6, this one has 5"),
        ({"n_clusters": 5, "max_iter": 2}, x.double(), "data dtype = float32, this one has float64"),
        ({"n_clusters": 5, "max_iter": 2}, moved, "data content = "),
        ({"n_clusters": 5, "max_iter": 2}, x.flip(0), "data content = "),
    ):
        with pytest.raises(CheckpointError, match=message):
            sx.KMeans(**settings).fit(rows, checkpoint=tmp_path)


def test_damaged_checkpoints_are_refused(x, tmp_path):
    sx.KMeans(5, max_iter=2).fit(x, checkpoint=tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    blob, head = tensors.read_bytes(), (tmp_path / "kmeans_state.json").read_text()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            sx.KMeans(5, max_iter=2).fit(x, checkpoint=tmp_path)

    tensors.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    refused("cannot be used .*sha256.*delete the folder to start from the beginning")
    tensors.write_bytes(blob[:40])
    refused("cannot be used")
    tensors.unlink()
    refused("cannot be used .*No such file")
    tensors.write_bytes(blob)
    record = json.loads(head)
    for change, message in (
        ({"version": 9}, "version 9 is not 1"),
        ({"state": {**record["state"], "iteration": 1}}, "does not match its sha256"),
    ):
        (tmp_path / "kmeans_state.json").write_text(json.dumps({**record, **change}))
        refused(message)
    for text in ("", "{", "[]", "{}"):
        (tmp_path / "kmeans_state.json").write_text(text)
        refused("cannot be used")
    (tmp_path / "kmeans_state.json").unlink()
    refused("has tensors but no kmeans_state.json")
    (tmp_path / "kmeans_state.json").write_text(head)
    sx.KMeans(5, max_iter=2).fit(x, checkpoint=tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        sx.KMeans(5).fit(x, checkpoint=file)
