"""kmeans_assign against the float64 argmin of direct distances, ties and hostile inputs included."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx


def direct(x, centroids):
    """Float64 argmin, lowest index among equals, and the squared distances."""
    squared = (x.double()[:, None] - centroids.double()[None]).square().sum(dim=-1)
    return squared.argmin(dim=1).to(torch.int32), squared.amin(dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (200, 39, 50), (333, 7, 1), (47, 31, 123), (500, 2, 256)])
def test_matches_float64(shape, dtype):
    num_rows, width, num_clusters = shape
    x, centroids = torch.randn(num_rows, width).to(dtype), torch.randn(num_clusters, width).to(dtype)
    labels, distance = sx.ops.kmeans_assign(x, centroids, return_distance=True)
    want, want_distance = direct(x, centroids)
    assert labels.dtype == torch.int32
    assert torch.equal(labels, want)
    torch.testing.assert_close(distance.double(), want_distance, rtol=1e-5, atol=1e-6)


def test_features_far_from_the_origin():
    """A common offset costs float32 scores all their digits; centring and re-ranking keep the labels right."""
    x = torch.randn(300, 16) + 1000
    centroids = torch.randn(64, 16) + 1000
    assert torch.equal(sx.ops.kmeans_assign(x, centroids), direct(x, centroids)[0])


def test_near_and_exact_ties_go_to_the_float64_winner():
    centroids = torch.randn(20, 8)
    centroids[13] = centroids[4]  # equal: the lower index wins
    centroids[7] = torch.nextafter(centroids[2], centroids[2] + 1)  # one ulp away
    x = torch.cat([centroids, centroids + 1e-7, (centroids[:10] + centroids[10:]) / 2])
    labels = sx.ops.kmeans_assign(x, centroids)
    assert torch.equal(labels, direct(x, centroids)[0])
    assert 13 not in labels.tolist()
    assert labels[7] == 7 and labels[2] == 2


def test_integer_grid_is_full_of_exact_ties():
    x = torch.randint(-3, 4, (400, 3)).float()
    centroids = torch.randint(-3, 4, (60, 3)).float()
    assert torch.equal(sx.ops.kmeans_assign(x, centroids), direct(x, centroids)[0])


def test_overflowing_scores_are_settled_in_float64():
    centroids = torch.tensor([[1e25, 0.0], [-1e25, 0.0], [0.0, 1e25]])
    x = torch.tensor([[2e25, 1.0], [-3e25, 1.0], [1.0, 5e24]])
    assert torch.equal(sx.ops.kmeans_assign(x, centroids), direct(x, centroids)[0])


def test_rows_that_are_not_finite_are_flagged():
    x = torch.randn(4, 3)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    labels, distance = sx.ops.kmeans_assign(x, torch.randn(5, 3), return_distance=True)
    assert labels[1] == -1 and labels[3] == -1 and labels[0] >= 0 and labels[2] >= 0
    assert distance.isnan().tolist() == [False, True, False, True]


def test_index_chunks_and_fast_mode(monkeypatch):
    from speechlm_ext.ops.reference import kmeans_assign as internals

    x, centroids = torch.randn(300, 12), torch.randn(40, 12)
    index = sx.ops.CentroidIndex.build(centroids)
    want = direct(x, centroids)[0]
    monkeypatch.setattr(internals, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(internals, "_PAIR_BYTES", 1)
    assert torch.equal(sx.ops.kmeans_assign(x, index), want)
    assert torch.equal(sx.ops.kmeans_assign(x, index, mode="fast"), want)
    assert sx.ops.kmeans_assign(x[:0], index).shape == (0,)


@pytest.mark.parametrize(
    ("x", "centroids", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 4), {}, r"x must be float \[N, F\]"),
        (torch.zeros(3, 4).long(), torch.zeros(2, 4), {}, "x must be float"),
        (torch.zeros(3, 4), torch.zeros(2, 5), {}, r"centroids must be float \[K, 4\]"),
        (torch.zeros(3, 4), torch.zeros(0, 4), {}, "K >= 1"),
        (torch.zeros(3, 1), torch.tensor([[0.0], [float("nan")]]), {}, r"centroids\[1\] is not finite"),
        (torch.zeros(3, 4), torch.zeros(2, 4), dict(mode="slow"), 'mode must be "exact" or "fast"'),
    ],
)
def test_rejects_bad_input(x, centroids, options, message):
    with pytest.raises(ValueError, match=message):
        sx.ops.kmeans_assign(x, centroids, **options)
