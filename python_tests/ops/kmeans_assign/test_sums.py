"""kmeans_sums: the sums of each cluster's rows are those of exact arithmetic on rounded values, in whatever order."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from speechlm_ext.ops.kmeans_assign.sums import kmeans_sums

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(num_rows, width, num_clusters, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows + width)
    x = (torch.randn(num_rows, width, generator=generator) + 3).to(dtype)
    labels = torch.randint(-1, num_clusters + 1, (num_rows,), generator=generator, dtype=torch.int32)
    offset = torch.randn(width, generator=generator, dtype=torch.float64).round(decimals=2)
    step = torch.exp2(torch.randint(-30, -4, (width,), generator=generator).double())
    return x, labels, offset, step


def rounded(value, offset, step):
    """``value - offset`` in float64, to the nearest multiple of ``step``, to even at ties, in exact arithmetic."""
    return round(Fraction(value - offset) / Fraction(step)) * Fraction(step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (40, 5, 3), (300, 3, 7), (150, 130, 2), (9, 2, 50), (40, 90, 400)]
)
def test_sums_are_exact(device, shape, dtype):
    num_rows, width, num_clusters = shape
    x, labels, offset, step = make(*shape, dtype)
    sums = torch.full((num_clusters, width), 2.0, dtype=torch.float64)
    counts = torch.full((num_clusters,), 5)
    on_device = [t.to(device) for t in (x, labels, offset, step, sums, counts)]
    kmeans_sums(*on_device)
    want = [[Fraction(2)] * width for _ in range(num_clusters)]
    want_counts = [5] * num_clusters
    for n, label in enumerate(labels.tolist()):
        if 0 <= label < num_clusters:
            want_counts[label] += 1
            for f in range(width):
                want[label][f] += rounded(float(x[n, f]), float(offset[f]), float(step[f]))
    assert on_device[5].tolist() == want_counts
    assert on_device[4].tolist() == [[float(v) for v in row] for row in want]


@pytest.mark.parametrize("num_clusters", [11, 700])
def test_order_blocks_and_threads_change_no_bit(num_clusters):
    """Few clusters and many, whose sums leave the cache."""
    x, labels, offset, step = make(3000, 70, num_clusters)
    results, before = [], torch.get_num_threads()
    for threads, pieces, order in ((1, 1, None), (2, 1, None), (3, 7, None), (2, 4, torch.randperm(3000))):
        torch.set_num_threads(threads)
        sums = torch.zeros(num_clusters, 70, dtype=torch.float64)
        counts = torch.zeros(num_clusters, dtype=torch.int64)
        rows = torch.arange(3000) if order is None else order
        for part in rows.chunk(pieces):
            kmeans_sums(x[part], labels[part], offset, step, sums, counts)
        results.append((sums, counts))
    torch.set_num_threads(before)
    for sums, counts in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(counts, results[0][1])


def test_no_rows_and_views(device):
    x, labels, offset, step = make(20, 6, 4)
    sums, counts = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    kmeans_sums(x[:0], labels[:0], offset, step, sums, counts)
    assert not sums.any() and not counts.any()
    kmeans_sums(x, labels, offset, step, sums, counts)
    strided, strided_counts = torch.zeros_like(sums), torch.zeros_like(counts)
    kmeans_sums(x.T.contiguous().T, labels.repeat_interleave(2)[::2], offset, step, strided, strided_counts)
    assert torch.equal(sums, strided) and torch.equal(counts, strided_counts)


def test_refuses_what_does_not_fit():
    x, labels, offset, step = make(20, 6, 4)
    sums, counts = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="kmeans_sums: labels must be int32"):
        kmeans_sums(x, labels.long(), offset, step, sums, counts)
    with pytest.raises(ValueError, match="kmeans_sums: sums must have size 6 in dimension 1"):
        kmeans_sums(x, labels, offset, step, torch.zeros(4, 5, dtype=torch.float64), counts)
    with pytest.raises(ValueError, match="kmeans_sums: sums must be contiguous"):
        kmeans_sums(x, labels, offset, step, torch.zeros(6, 4, dtype=torch.float64).T, counts)


def test_opcheck():
    x, labels, offset, step = make(20, 6, 4)
    sums, counts = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    torch.library.opcheck(torch.ops.speechlm_ext.kmeans_sums.default, (x, labels, offset, step, sums, counts))
