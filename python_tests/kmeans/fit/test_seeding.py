"""Starts: their quality beside scikit-learn's, k-means++ against the book, several of them, from some of the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import speechlm_ext as sx
from python_tests.kmeans.conftest import clustered, plus_plus
from speechlm_ext.errors import CheckpointError
from speechlm_ext.kmeans.features.sources import ArraySource
from speechlm_ext.kmeans.fit.greedy_seeding import greedy_plus_plus
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.scan import scan
from speechlm_ext.kmeans.fit.seeding import initial_centers
from speechlm_ext.utils import progress

sk = pytest.importorskip("sklearn.cluster", reason="the oracle needs scikit-learn: pip install scikit-learn")


def start_inertia(x: torch.Tensor, num_clusters: int, init: str, seed: int) -> float:
    settings = sx.KMeans(num_clusters, init=init, random_state=seed).settings
    centers = initial_centers(scan(ArraySource(x), Ranks()), settings)
    assert centers.shape == (num_clusters, x.shape[1])
    squared = (x[:, None] - centers).square().sum(2)
    assert (squared == 0).any(0).all()  # all are rows
    return float(squared.min(1).values.sum())


def test_quality_of_starts():
    """On clusters of very different sizes careful starts are several times better than random rows."""
    x = clustered(6000, 8, 40, seed=3)
    mean = {
        init: np.mean([start_inertia(x, 40, init, seed) for seed in range(3)])
        for init in ("random", "k-means++", "k-means||")
    }
    assert mean["k-means++"] < 0.5 * mean["random"] and mean["k-means||"] < 0.5 * mean["random"]
    assert mean["k-means||"] < 1.3 * mean["k-means++"]
    theirs = np.mean(
        [
            (
                torch.cdist(x, torch.from_numpy(sk.kmeans_plusplus(x.numpy(), 40, random_state=s)[0]))
                .min(1)
                .values
                ** 2
            )
            .sum()
            .item()
            for s in range(3)
        ]
    )
    assert mean["k-means++"] < 1.3 * theirs


def test_weights_are_rows():
    """A point of weight w is drawn as w equal points are; a point of weight 0 never."""
    points = torch.tensor([[0.0], [10.0], [11.0], [-7.0]]).double()
    weights = torch.tensor([5.0, 3.0, 0.0, 0.0]).double()
    for seed in range(10):
        chosen = greedy_plus_plus(points, 2, seed=seed, purpose="t", weights=weights)
        assert sorted(chosen.tolist()) == [0, 1]


def test_both_ways_of_distances_choose_alike(monkeypatch):
    points = torch.randn(300, 5, dtype=torch.float64)
    table = greedy_plus_plus(points, 30, seed=1, purpose="t")
    monkeypatch.setattr("speechlm_ext.kmeans.fit.greedy_seeding._MAX_TABLE_POINTS", 0)
    # The table is rounded to float32, which may in principle turn a draw; here it does not.
    assert torch.equal(table, greedy_plus_plus(points, 30, seed=1, purpose="t"))
    assert table.unique().numel() == 30


@pytest.mark.parametrize("all_pairs", [0, 1 << 14])
@pytest.mark.parametrize("trials", [1, 3, None])
def test_trials_of_the_start(x, trials, all_pairs, monkeypatch):
    """One trial is plain k-means++ and no other number differs from the book's either; None is 2 + floor(ln K)."""
    monkeypatch.setattr("speechlm_ext.kmeans.fit.greedy_seeding._MAX_TABLE_POINTS", all_pairs)
    for seed in range(5):
        want = plus_plus(x, 12, seed=seed, purpose="k-means++/0", trials=trials or 4)
        settings = sx.KMeans(12, random_state=seed, n_local_trials=trials).settings
        found = initial_centers(scan(ArraySource(x), Ranks()), settings)
        assert torch.equal(found, x[want])


def test_trials_reach_every_start(x, monkeypatch):
    """The fit's own start, that of ``partial_fit``, and the last stage of k-means||."""
    want = x[plus_plus(x, 9, seed=2, purpose="k-means++/0")]
    settings = {"n_local_trials": 1, "random_state": 2, "max_iter": 1}
    plain = sx.KMeans(9, **settings).fit(x)
    assert torch.equal(plain.cluster_centers_, sx.KMeans(9, init=want, max_iter=1).fit(x).cluster_centers_)
    assert not torch.equal(
        plain.cluster_centers_, sx.KMeans(9, random_state=2, max_iter=1).fit(x).cluster_centers_
    )
    step = sx.KMeans(9, **settings).partial_fit(x)
    assert torch.equal(step.cluster_centers_, sx.KMeans(9, init=want).partial_fit(x).cluster_centers_)
    seen = []

    def watched(points, num_clusters, **options):
        seen.append((points, options, greedy_plus_plus(points, num_clusters, **options)))
        return seen[-1][2]

    monkeypatch.setattr("speechlm_ext.kmeans.fit.seeding.greedy_plus_plus", watched)
    sx.KMeans(9, init="k-means||", **settings).fit(x)
    ((points, options, chosen),) = seen
    weights = options["weights"]
    assert weights.sum() == len(x) and len(points) > 9
    expected = plus_plus(points, 9, seed=2, purpose=options["purpose"], weights=weights)
    assert torch.equal(chosen, expected)


def test_trials_are_a_setting_of_the_fit(x, tmp_path):
    sx.KMeans(5, n_local_trials=np.int64(1)).fit(x, checkpoint=tmp_path / "c").save(tmp_path / "u")
    assert sx.KMeans.load(tmp_path / "u").settings.n_local_trials == 1
    with pytest.raises(CheckpointError, match="settings n_local_trials = 1, this one has None"):
        sx.KMeans(5).fit(x, checkpoint=tmp_path / "c")


def test_seeds_and_several_starts(x):
    first, again, other = (sx.KMeans(9, init="random", random_state=seed).fit(x) for seed in (0, 0, 1))
    assert torch.equal(first.cluster_centers_, again.cluster_centers_)
    assert not torch.equal(first.cluster_centers_, other.cluster_centers_)
    single = [sx.KMeans(9, init="random", random_state=0, n_init=n).fit(x) for n in (1, 4)]
    assert single[1].inertia_ <= single[0].inertia_
    assert torch.equal(single[1].labels_, single[1].predict(x))


def test_a_start_from_some_of_the_rows(x):
    """A draw without replacement: all rows give the same as no draw, in another order; some give rows too."""
    some = sx.KMeans(9, init_size=60, max_iter=1).fit(x)
    assert not torch.equal(some.cluster_centers_, sx.KMeans(9, max_iter=1).fit(x).cluster_centers_)
    assert torch.equal(
        some.cluster_centers_, sx.KMeans(9, init_size=60, max_iter=1, block_rows=99).fit(x).cluster_centers_
    )
    every = sx.KMeans(9, init_size=1500, max_iter=1).fit(x)
    assert torch.equal(every.cluster_centers_, sx.KMeans(9, max_iter=1).fit(x).cluster_centers_)


def test_random_start_is_rows_in_proportion():
    """Each of 20 rows is chosen about equally often: 4 of 20 in each of 200 draws."""
    x = torch.arange(20.0)[:, None]
    data = scan(ArraySource(x), Ranks())
    settings = [sx.KMeans(4, init="random", random_state=seed).settings for seed in range(200)]
    drawn = torch.cat([initial_centers(data, s)[:, 0] for s in settings])
    counts = torch.bincount(drawn.long(), minlength=20)
    assert counts.sum() == 800 and 15 < int(counts.min()) and int(counts.max()) < 70


@pytest.mark.parametrize("settings", [{}, {"init": "k-means||"}, {"init_size": 200}])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_long_starts_show_bars(x, settings, wanted, monkeypatch, capsys):
    """The first look at the rows, the distances and the draws of k-means++; none when not wanted, or off a terminal."""
    monkeypatch.setattr("speechlm_ext.utils.progress._DELAY", 0.0)
    sx.KMeans(80, max_iter=1, progress=wanted, **settings).fit(x)
    shown = capsys.readouterr().err
    for what in ("features, range", "features, sums", "k-means++, distances", "k-means++:"):
        assert (what in shown) == bool(wanted), what
    assert ("centroid/s]" in shown) == bool(wanted)


def test_a_bar_counts_all_there_is(x, monkeypatch):
    found = {}

    class Watched(progress.tqdm):
        def close(self) -> None:
            if not self.disable:
                found[self.desc] = [*found.get(self.desc, []), (self.n, self.total)]
            super().close()

    monkeypatch.setattr(progress, "tqdm", Watched)
    sx.KMeans(80, max_iter=1, progress=True, block_rows=400).fit(x)
    assert found["features, range"][0] == (1500, 1500) and found["k-means++"][0] == (80, 80)
    assert found["k-means++, distances"][0] == (1500, 1500)
