"""Mini-batches: the update by hand, the order of rows, quality beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import speechlm_ext as sx
from python_tests.kmeans.conftest import clustered
from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.features.sources import ArraySource
from speechlm_ext.kmeans.fit import minibatch
from speechlm_ext.kmeans.fit.minibatch import Batches
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.scan import scan


def test_partial_fit_by_hand():
    """A centroid is the mean of all rows that it was ever given."""
    init = torch.tensor([[0.0], [10.0]])
    model = sx.KMeans(2, init=init, reassignment_ratio=0.0)
    model.partial_fit(torch.tensor([[1.0], [3.0], [12.0]]))
    assert model.cluster_centers_[:, 0].tolist() == [2.0, 12.0] and model.counts_.tolist() == [2, 1]
    assert model.inertia_ == 1.0 + 9.0 + 4.0
    model.partial_fit(torch.tensor([[5.0], [14.0], [16.0]]))
    torch.testing.assert_close(model.cluster_centers_[:, 0], torch.tensor([3.0, 14.0]))
    assert model.counts_.tolist() == [3, 3] and model.n_steps_ == 2
    assert model.predict(torch.tensor([[8.0], [9.0]])).tolist() == [0, 1]


def test_partial_fit_as_in_scikit_learn(x):
    sk = pytest.importorskip(
        "sklearn.cluster", reason="the oracle needs scikit-learn: pip install scikit-learn"
    )
    rows = x.numpy().astype(np.float64)
    theirs = sk.MiniBatchKMeans(8, init=rows[:8], n_init=1, reassignment_ratio=0.0)
    ours = sx.KMeans(8, init=rows[:8], reassignment_ratio=0.0)
    for start in range(0, 1500, 300):
        theirs.partial_fit(rows[start : start + 300])
        ours.partial_fit(rows[start : start + 300])
    np.testing.assert_allclose(ours.cluster_centers_.numpy(), theirs.cluster_centers_, rtol=1e-9)
    np.testing.assert_array_equal(ours.counts_.numpy(), theirs._counts)


def test_partial_fit_goes_on_from_a_fit_and_from_a_file(x, tmp_path):
    fitted = sx.KMeans(4).fit(x)
    fitted.save(tmp_path)
    loaded = sx.KMeans.load(tmp_path)
    more = clustered(200, seed=9)
    before = fitted.counts_
    fitted.partial_fit(more)
    loaded.partial_fit(more)
    assert torch.equal(fitted.cluster_centers_, loaded.cluster_centers_)
    assert int(fitted.counts_.sum()) == int(before.sum()) + 200


def test_starved_centroids_move_to_rows():
    x = torch.cat([torch.zeros(50, 1), torch.full((50, 1), 4.0)]) + 0.01 * torch.randn(100, 1)
    init = torch.tensor([[2.0], [1000.0], [2000.0]])
    model = sx.KMeans(3, init=init).partial_fit(x)
    assert float(model.cluster_centers_[1:].abs().max()) < 5  # both are rows now
    assert model.counts_.tolist() == [100, 100, 100]  # so that they do not starve again at once
    stays = sx.KMeans(3, init=init, reassignment_ratio=0.0).partial_fit(x)
    assert stays.cluster_centers_[1:, 0].tolist() == [1000.0, 2000.0]


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed(monkeypatch):
    monkeypatch.setattr(minibatch, "SEGMENT", 16)
    monkeypatch.setattr(minibatch, "_MIN_SEGMENTS", 3)
    x = torch.arange(1000.0)[:, None]
    data = scan(ArraySource(x), Ranks())
    batches = Batches(data, 60, seed=0)
    assert batches.per_epoch == 17
    orders = []
    for epoch in range(2):
        found = [batches.get(epoch * 17 + step) for step in range(17)]
        assert [len(rows) for rows, _ in found] == [60] * 16 + [40]
        numbers = torch.cat([n for _, n in found])
        assert torch.equal(torch.cat([rows for rows, _ in found])[:, 0], numbers.float())
        assert numbers.sort().values.tolist() == list(range(1000))
        orders.append(numbers)
    assert not torch.equal(orders[0], orders[1])
    # Any batch by itself, and with blocks of another size.
    other = Batches(scan(ArraySource(x), Ranks(), block_rows=7), 60, seed=0)
    assert torch.equal(other.get(20)[1], orders[1][180:240])
    assert not torch.equal(Batches(data, 60, seed=1).get(0)[1], orders[0][:60])
    # Rows of a batch come from all over the data.
    assert float(orders[0][:60].float().std()) > 150


def test_quality_is_near_lloyds(x):
    big = clustered(8000, 10, 25, seed=2)
    lloyd = sx.KMeans(25, random_state=1).fit(big)
    mini = sx.KMeans(25, random_state=1, algorithm="minibatch", batch_size=500).fit(big)
    assert mini.inertia_ < 1.25 * lloyd.inertia_
    assert mini.inertia_ == pytest.approx(-mini.score(big), rel=1e-12)
    assert torch.equal(mini.labels_, mini.predict(big)) and int(mini.counts_.sum()) == 8000
    assert mini.n_steps_ == len(mini.inertia_history_) and mini.n_iter_ == -(-mini.n_steps_ // 16)
    assert mini.inertia_history_[-1] == pytest.approx(mini.inertia_, rel=0.1)
    sk = pytest.importorskip("sklearn.cluster", reason="the rival is scikit-learn: pip install scikit-learn")
    theirs = min(
        sk.MiniBatchKMeans(25, batch_size=500, n_init=1, random_state=s).fit(big.numpy()).inertia_
        for s in range(3)
    )
    assert mini.inertia_ < 1.15 * theirs


def test_it_stops(x):
    settings = {"algorithm": "minibatch", "batch_size": 100, "tol": 0.0}
    assert sx.KMeans(5, max_iter=2, max_no_improvement=None, **settings).fit(x).n_steps_ == 30
    assert sx.KMeans(5, max_iter=50, max_no_improvement=3, **settings).fit(x).n_steps_ < 300
    loose = sx.KMeans(5, max_iter=50, max_no_improvement=None, **{**settings, "tol": 0.1}).fit(x)
    assert 2 <= loose.n_steps_ < 300


def test_partial_fit_needs_rows_to_start_from(x):
    with pytest.raises(KMeansError, match="20 clusters need at least as many rows, got 10"):
        sx.KMeans(20).partial_fit(x[:10])
