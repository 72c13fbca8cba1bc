"""Fits on the shares of two processes: ``shared_fit.py FOLDER RANK`` is one of them.

``FOLDER/shares.json`` lists which rows of ``FOLDER/x.npy`` each rank holds, several times; results of share list N are
in ``FOLDER/found.N.RANK``, as safetensors.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans import KMeans

FAR = torch.cat([torch.zeros(1, 6), 1e4 + torch.arange(48.0).view(8, 6)])
FITS = {
    "lloyd": {"n_clusters": 11},
    "random": {"n_clusters": 11, "init": "random", "n_init": 2, "max_iter": 3},
    "parallel": {"n_clusters": 11, "init": "k-means||", "max_iter": 3},
    "minibatch": {"n_clusters": 11, "algorithm": "minibatch", "batch_size": 200, "max_iter": 3},
    "starved": {
        "n_clusters": 60,
        "init": "random",
        "algorithm": "minibatch",
        "batch_size": 150,
        "max_iter": 2,
    },
    "empty": {
        "n_clusters": 9,
        "init": FAR,
        "max_iter": 2,
    },
}


def found_by(model: KMeans) -> dict[str, torch.Tensor]:
    """All that a fit gives, as tensors."""
    return {
        "centers": model.cluster_centers_,
        "counts": model.counts_,
        "inertia": torch.tensor([model.inertia_, *model.inertia_history_], dtype=torch.float64),
        "iterations": torch.tensor([model.n_iter_, model.n_steps_]),
    }


def run(rows: np.ndarray, folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """All fits on this rank's rows, and two steps of ``partial_fit``."""
    found = {}
    for name, settings in FITS.items():
        model = KMeans(block_rows=50 + 13 * rank, progress=False, nonfinite="drop", **settings)
        model.fit(rows, checkpoint=folder / "state" / name)
        found |= {f"{name}.{key}": value for key, value in found_by(model).items()}
        found[f"{name}.labels"] = torch.from_numpy(model.labels_)
    model = KMeans(5, nonfinite="drop").partial_fit(rows).partial_fit(rows)
    found |= {f"partial.{key}": value for key, value in found_by(model).items()}
    found["score"] = torch.tensor([model.score(rows)], dtype=torch.float64)
    return found


def refusals(rows: np.ndarray, rank: int) -> None:
    """An error of one rank is an error of all, and none waits for ever."""
    for bad, message in (
        (np.where(rows == rows, np.nan, rows) if rank else rows, "rank 1: features: row"),
        ("nowhere.npy" if rank else rows, "rank 1: feature shard nowhere.npy"),
        (rows[:, :4] if rank else rows, "the ranks have different ones"),
        (rows.astype(np.float64) if rank else rows, "the ranks have different ones"),
    ):
        try:
            KMeans(3).fit(bad)
        except KMeansError as error:
            assert message in f"rank {rank}: {error}" or message in str(error), error
        else:
            raise AssertionError(f"no error: {message}")


def main(folder: Path, rank: int) -> None:
    """Run the fits of one rank of two."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        for number, shares in enumerate(json.loads((folder / "shares.json").read_text())):
            start, stop = shares[rank]
            rows = np.load(folder / "x.npy")[start:stop]
            found = run(rows, folder / str(number), rank)
            refusals(np.nan_to_num(rows), rank)
            save_file({k: v.contiguous() for k, v in found.items()}, folder / f"found.{number}.{rank}")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
