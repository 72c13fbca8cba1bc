"""Lloyd's algorithm and its starts: against scikit-learn, a float64 oracle, and by hand."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import speechlm_ext as sx
from python_tests.kmeans.conftest import clustered
from speechlm_ext.errors import KMeansError, SpeechLMError

sk = pytest.importorskip("sklearn.cluster", reason="the oracle needs scikit-learn: pip install scikit-learn")


def oracle(
    x: torch.Tensor, centers: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Lloyd in float64, row by row differences; no cluster may become empty."""
    x, centers = x.double(), centers.double()
    for _ in range(iterations):
        labels = (x[:, None] - centers).square().sum(2).argmin(1)
        centers = torch.stack([x[labels == k].mean(0) for k in range(len(centers))])
    squared = (x[:, None] - centers).square().sum(2)
    return centers, squared.argmin(1), float(squared.min(1).values.sum())


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_matches_float64_oracle(x, iterations):
    centers, labels, inertia = oracle(x, x[:12], iterations)
    model = sx.KMeans(12, init=x[:12], max_iter=iterations, tol=0.0).fit(x)
    torch.testing.assert_close(model.cluster_centers_, centers.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(model.labels_, labels.int()) and model.labels_.dtype == torch.int32
    assert model.inertia_ == pytest.approx(inertia, rel=1e-6) and model.n_iter_ == iterations
    assert torch.equal(model.counts_, torch.bincount(labels, minlength=12))
    assert len(model.inertia_history_) == iterations + 1 and model.inertia_history_[-1] == model.inertia_
    assert model.inertia_history_ == sorted(model.inertia_history_, reverse=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("max_iter", "tol"), [(1, 0.0), (3, 0.0), (300, 1e-4), (300, 0.0)])
def test_no_worse_than_scikit_learn(x, dtype, max_iter, tol):
    rows = x.numpy().astype(dtype)
    theirs = sk.KMeans(15, init=rows[:15], n_init=1, max_iter=max_iter, tol=tol, algorithm="lloyd").fit(rows)
    ours = sx.KMeans(15, init=rows[:15], max_iter=max_iter, tol=tol).fit(rows)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-6)
    assert ours.n_iter_ == theirs.n_iter_
    np.testing.assert_allclose(ours.cluster_centers_.numpy(), theirs.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert isinstance(ours.labels_, np.ndarray) and (ours.labels_ == theirs.labels_).all()
    assert ours.cluster_centers_.numpy().dtype == dtype
    assert ours.score(rows) == -ours.inertia_


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(x, dtype):
    rows = x.to(dtype)
    ours, wide = sx.KMeans(8).fit(rows), sx.KMeans(8).fit(rows.float())
    assert ours.cluster_centers_.dtype == torch.float32
    assert torch.equal(ours.cluster_centers_, wide.cluster_centers_) and ours.inertia_ == wide.inertia_
    assert torch.equal(ours.predict(rows), ours.labels_)


@pytest.mark.parametrize(
    ("offset", "dtype"), [(1e4, torch.float32), (1e9, torch.float64), (1e15, torch.float32)]
)
def test_far_from_the_origin(offset, dtype):
    """The same clusters, moved: no digits may be lost to the distance from the origin."""
    near = (16 * clustered(800, 3, 6, spread=0.3)).round()
    step = max(1.0, offset * 2.0 ** (-20 if dtype == torch.float32 else -50))
    far = (near * step).to(dtype) + offset
    moved = (far.double() - offset) / step
    a, b = sx.KMeans(6).fit(moved), sx.KMeans(6).fit(far)
    assert torch.equal(a.labels_, b.labels_) and b.inertia_ == pytest.approx(a.inertia_ * step**2, rel=1e-3)
    centers = (b.cluster_centers_.double() - offset) / step
    torch.testing.assert_close(
        centers, a.cluster_centers_, rtol=0, atol=0.6 if dtype == torch.float32 else 1e-3
    )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scales_whose_squares_float32_cannot_hold(x, scale):
    a, b = sx.KMeans(6).fit(x.double()), sx.KMeans(6).fit((x.double() * scale).float())
    assert torch.equal(a.labels_, b.labels_)
    assert b.inertia_ == pytest.approx(a.inertia_ * scale**2, rel=1e-5)


def test_features_of_different_scales():
    x = clustered(500, 4, 5).double() * torch.tensor([1e-6, 1.0, 1e6, 1e-9])
    centers, labels, _ = oracle(x, x[:5], 2)
    model = sx.KMeans(5, init=x[:5], max_iter=2, tol=0.0).fit(x)
    torch.testing.assert_close(model.cluster_centers_, centers, rtol=1e-9, atol=1e-20)
    assert torch.equal(model.labels_, labels.int())


# ---- empty clusters, duplicates, ends --------------------------------------------------------------------------
def test_an_empty_cluster_takes_the_farthest_row():
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0], [60.0]])
    model = sx.KMeans(3, init=torch.tensor([[1.0], [1000.0], [2000.0]]), max_iter=1).fit(x)
    # All rows go to cluster 0; 60 and 50 are the farthest and leave it: its mean is that of 0, 1 and 2.
    assert model.cluster_centers_[:, 0].tolist() == [1.0, 60.0, 50.0]
    assert model.labels_.tolist() == [0, 0, 0, 2, 1] and model.inertia_ == 2.0


def test_empty_clusters_as_in_scikit_learn(x):
    init = torch.cat([x[:6], 1e4 + torch.arange(4.0)[:, None].expand(4, 6)])
    theirs = sk.KMeans(10, init=init.numpy(), n_init=1, max_iter=1).fit(x.numpy())
    ours = sx.KMeans(10, init=init, max_iter=1).fit(x)
    np.testing.assert_allclose(
        sorted(ours.cluster_centers_.tolist()), sorted(theirs.cluster_centers_.tolist()), rtol=1e-5, atol=1e-5
    )
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-6) and int((ours.counts_ > 0).sum()) == 10


def test_equal_far_rows_are_taken_once():
    x = torch.cat([torch.zeros(5, 1), torch.full((3, 1), 9.0), torch.full((1, 1), 4.0)])
    init = torch.tensor([[0.0], [1e3], [2e3]])
    model = sx.KMeans(3, init=init, max_iter=1).fit(x)
    # Nine and four leave cluster 0, whose rest is five zeros and two nines.
    torch.testing.assert_close(model.cluster_centers_[:, 0], torch.tensor([18 / 7, 9.0, 4.0]))
    assert sx.KMeans(3, init=init).fit(x).inertia_ < 1e-9


@pytest.mark.parametrize("init", ["random", "k-means++", "k-means||"])
def test_fewer_distinct_rows_than_clusters(init, caplog):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(10, 1)
    with caplog.at_level(logging.WARNING, "speechlm_ext"):
        model = sx.KMeans(5, init=init).fit(x)
    assert model.inertia_ == 0.0 and model.cluster_centers_.unique(dim=0).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert [r.message for r in caplog.records if "2 of 5 centroids are distinct" in r.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("init", ["random", "k-means++", "k-means||"])
def test_one_cluster_and_as_many_as_rows(x, init):
    one = sx.KMeans(1, init=init).fit(x)
    torch.testing.assert_close(one.cluster_centers_[0], x.double().mean(0).float(), rtol=1e-6, atol=1e-6)
    rows = x[:40]
    every = sx.KMeans(40, init=init).fit(rows)
    assert every.inertia_ < 1e-9 and sorted(every.labels_.tolist()) == list(range(40))
    torch.testing.assert_close(every.cluster_centers_[every.labels_.long()], rows, rtol=1e-6, atol=1e-6)


def test_one_feature():
    x = torch.tensor([0.0, 0.5, 10.0, 10.5, 20.0])[:, None]
    model = sx.KMeans(3).fit(x)
    assert sorted(model.cluster_centers_[:, 0].tolist()) == [0.25, 10.25, 20.0]


def test_separate_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = torch.cat([c + 0.1 * torch.randn(50, 2, generator=generator) for c in centers])
    distance = torch.cdist(centers, sx.KMeans(4).fit(x).cluster_centers_)
    assert distance.min(1).values.max() < 0.1 and sorted(distance.argmin(1).tolist()) == [0, 1, 2, 3]


# ---- use -------------------------------------------------------------------------------------------------------
def test_predict_and_score(x):
    model = sx.KMeans(7).fit(x)
    other = clustered(300, seed=5)
    squared = (other.double()[:, None] - model.cluster_centers_.double()).square().sum(2)
    assert torch.equal(model.predict(other), squared.argmin(1).int())
    assert model.score(other) == pytest.approx(-float(squared.min(1).values.sum()), rel=1e-6)
    found = model.predict(other.numpy())
    assert isinstance(found, np.ndarray) and found.dtype == np.int32
    assert torch.equal(sx.KMeans(7).fit_predict(x), model.labels_)
    assert torch.equal(model.predict(other.double()), squared.argmin(1).int())


def test_rows_that_are_not_finite(x):
    bad = x.clone()
    bad[5, 2], bad[700, 0], bad[1499, 5] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(
        KMeansError,
        match=r"row 5 has a value that is not a finite number.*set nonfinite to 'drop' to drop such rows",
    ):
        sx.KMeans(4).fit(bad)
    keep = torch.ones(1500, dtype=torch.bool)
    keep[[5, 700, 1499]] = False
    for init in ("k-means++", "random", "k-means||"):
        model = sx.KMeans(4, init=init, nonfinite="drop").fit(bad)
        assert model.n_dropped_ == 3 and model.n_rows_ == 1497 and int(model.counts_.sum()) == 1497
        assert model.labels_[[5, 700, 1499]].tolist() == [-1, -1, -1]
        assert torch.equal(model.predict(bad), model.labels_) and bool((model.labels_[keep] >= 0).all())
        assert all(a >= b for a, b in zip(model.inertia_history_, model.inertia_history_[1:], strict=False))
    init = x[:4]
    with_holes = sx.KMeans(4, init=init, nonfinite="drop").fit(bad)
    without = sx.KMeans(4, init=init).fit(bad[keep])
    torch.testing.assert_close(with_holes.cluster_centers_, without.cluster_centers_)
    with pytest.raises(KMeansError, match="row 5 has a value"):
        without.predict(bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_clusters": 0}, "n_clusters must be an integer >= 1, got 0"),
        ({"n_clusters": 2.0}, "n_clusters must be an integer >= 1, got 2.0"),
        ({"n_clusters": 2, "init": "kmeans"}, r"init must be one of k-means\+\+, .*got 'kmeans'"),
        ({"n_clusters": 2, "init": np.zeros((2, 3)), "n_init": 2}, "n_init = 2 with an array as init"),
        ({"n_clusters": 2, "algorithm": "elkan"}, "algorithm must be 'lloyd' or 'minibatch', got 'elkan'"),
        ({"n_clusters": 2, "max_iter": 0}, "max_iter must be"),
        ({"n_clusters": 2, "tol": -1}, "tol must be a number >= 0, got -1"),
        ({"n_clusters": 2, "batch_size": 0}, "batch_size must be"),
        ({"n_clusters": 2, "random_state": None}, "random_state must be an integer, got None"),
        ({"n_clusters": 2, "reassignment_ratio": 1.5}, r"reassignment_ratio must be a number in \[0, 1\)"),
        ({"n_clusters": 2, "max_no_improvement": 0}, "max_no_improvement must be None or"),
        ({"n_clusters": 20, "init_size": 10}, "init_size = 10 rows are too few for 20 clusters"),
        (
            {"n_clusters": 2, "n_local_trials": 0},
            "n_local_trials must be None or an integer >= 1, got 0",
        ),
        ({"n_clusters": 2, "n_local_trials": 1.0}, "n_local_trials must be None or an integer >= 1"),
        (
            {"n_clusters": 2, "n_local_trials": 1, "init": "random"},
            r"n_local_trials = 1 only applies to the init methods k-means\+\+",
        ),
        ({"n_clusters": 2, "n_local_trials": 1, "init": np.zeros((2, 3))}, "leave it out with another init"),
        ({"n_clusters": 2, "nonfinite": "skip"}, "nonfinite must be 'error' or 'drop'"),
        ({"n_clusters": 2, "block_rows": 0}, "block_rows must be"),
        (
            {"n_clusters": 2, "block_rows": "all"},
            "block_rows must be None or an integer >= 1, got 'all'",
        ),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(KMeansError, match=message) as caught:
        sx.KMeans(**settings)
    assert isinstance(caught.value, SpeechLMError) and isinstance(caught.value, ValueError)
    assert (
        caught.value.argument in settings
        and f" --{caught.value.argument} " in caught.value.for_command_line()
    )


def test_refusals(x):
    with pytest.raises(
        KMeansError, match="2000 clusters need at least as many rows, got 1500.*at most 1500 clusters"
    ):
        sx.KMeans(2000).fit(x)
    with pytest.raises(KMeansError, match="there are no rows to fit on. Give"):
        sx.KMeans(2).fit(x[:0])
    with pytest.raises(KMeansError, match="none of the 2 is finite"):
        sx.KMeans(2, nonfinite="drop").fit(torch.full((2, 3), torch.nan))
    with pytest.raises(KMeansError, match=r"need at least as many rows, got 1 \(1 more are not finite\)"):
        sx.KMeans(2, nonfinite="drop").fit(torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(KMeansError, match=r"init must be float \[4, 6\] .*got torch.float32 \[3, 6\]"):
        sx.KMeans(4, init=x[:3]).fit(x)
    with pytest.raises(KMeansError, match="init has a value that is not a finite number"):
        sx.KMeans(1, init=torch.full((1, 6), torch.nan)).fit(x)
    with pytest.raises(KMeansError, match="larger than 1e140"):
        sx.KMeans(1).fit(x.double() * 1e150)
    model = sx.KMeans(3)
    for use in (model.predict, model.score, model.save):
        with pytest.raises(KMeansError, match="needs centroids; call fit or partial_fit first"):
            use(x)
    model.fit(x)
    for use in (model.predict, model.score, model.partial_fit):
        with pytest.raises(KMeansError, match="expected 6 features in each row, as in the fit, got 5"):
            use(x[:, :5])
    with pytest.raises(KMeansError, match="distributed=True needs torch.distributed"):
        sx.KMeans(3, distributed=True).fit(x)
    with pytest.raises(KMeansError, match="checkpoint_every must be"):
        model.fit(x, checkpoint_every=0)


@pytest.mark.parametrize(
    "init", [[[1.0, 2.0], [3.0]], None, [["a"]], np.array([{}]), [torch.zeros(6), torch.zeros(6)]]
)
def test_an_init_that_is_no_array(init, x):
    with pytest.raises(
        KMeansError, match=r"K-Means: init must be one of k-means\+\+, .*rows of one length, got"
    ):
        sx.KMeans(2, init=init)


def test_an_init_may_be_a_list_or_part_of_a_graph(x, tmp_path):
    """And is then recorded in a checkpoint as an array is."""
    want = sx.KMeans(3, init=x[:3], max_iter=1).fit(x, checkpoint=tmp_path)
    for init in (x[:3].tolist(), x[:3].clone().requires_grad_() * 1):
        found = sx.KMeans(3, init=init, max_iter=1).fit(x, checkpoint=tmp_path)
        assert torch.equal(found.cluster_centers_, want.cluster_centers_)


@pytest.mark.parametrize("device", ["foo", "mps", "meta", 3.5, "cuda:x"])
def test_a_device_that_is_none(device):
    with pytest.raises(KMeansError, match=r"device must be cpu, cuda, cuda:N or auto, got "):
        sx.KMeans(2, device=device)


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (0, "cuda", "device cuda is not available: torch finds no GPU. See `speechlm doctor`, or use cpu"),
        (2, "cuda:2", "device cuda:2 is not available: torch finds only 2 GPUs, counted from 0"),
    ],
)
def test_a_gpu_that_is_not_there(count, device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(KMeansError, match=message):
        sx.KMeans(2, device=device)
    assert sx.KMeans(2, device="cpu").device == torch.device("cpu")


def test_scikit_learn_can_clone_it(x):
    from sklearn.base import clone

    given = {"n_clusters": 4, "init": "random", "random_state": 3, "device": "cpu", "init_size": 50}
    model = sx.KMeans(**given)
    assert {**model.get_params(), "device": "cpu"}.items() >= given.items() and model.max_iter is None
    copy = clone(model)
    want = model.fit(x).labels_
    assert not hasattr(copy, "labels_") and torch.equal(copy.fit_predict(x), want)
    model.n_clusters = 5
    assert len(model.fit(x).cluster_centers_) == 5


def test_takes_numbers_of_numpy(x, tmp_path):
    model = sx.KMeans(np.int64(4), tol=np.float32(0.01), random_state=np.int32(3), progress=False).fit(x)
    want = sx.KMeans(4, tol=float(np.float32(0.01)), random_state=3, progress=False).fit(x)
    assert torch.equal(model.cluster_centers_, want.cluster_centers_)
    model.save(tmp_path)
    assert sx.KMeans.load(tmp_path).fingerprint == want.fingerprint
    with pytest.raises(KMeansError, match="n_clusters must be an integer >= 1, got 2.5"):
        sx.KMeans(2.5)


def test_tells_its_progress_where_there_is_no_terminal(x, caplog, monkeypatch):
    monkeypatch.setattr("speechlm_ext.kmeans.fit.loop._LOG_SECONDS", -1.0)
    with caplog.at_level(logging.INFO, logger="speechlm_ext.kmeans.fit.loop"):
        model = sx.KMeans(4, max_iter=3, tol=0.0).fit(x)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == model.n_iter_
    assert lines[0].startswith(f"k-means: iteration 1, inertia {model.inertia_history_[0]:.6g}, shift ")
