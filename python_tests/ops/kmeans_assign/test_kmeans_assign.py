"""kmeans_assign against the argmin of direct float64 distances, hostile inputs included."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speechlm_ext as sx
from python_tests.conftest import CUDA, CUDA_ON_CPU, on_device
from python_tests.ops.common.instruction_sets import simd
from speechlm_ext.ops.common import precision
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.kmeans_assign.reference import kmeans_assign as direct

#: The CPU's codes: integers of 16 bits alone, or bfloat16 tiles before them, in plain C++ where there is no tile unit.
CODES = {
    "fine": [name for name in native.simd_available() if name != "amx"][-1],
    "coarse": "amx" if "amx" in native.simd_available() else "emulated-amx",
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*CODES, CUDA_ON_CPU, CUDA])
def device(request):
    """The CPU with both kinds of codes, and the CUDA kernels."""
    if request.param not in CODES:
        with on_device(request.param, request.node) as found:
            yield found
        return
    with simd(CODES[request.param]):
        yield torch.device("cpu")


@pytest.fixture(params=CODES)
def codes(request):
    """Every test that asks for it runs with both kinds of codes."""
    with simd(CODES[request.param]):
        yield request.param


def test_reference_is_right_to_the_last_digits():
    """Its least distance is the true one but for the rounding of float64, which long double does not have."""
    x, centroids = randn(40, 37, seed=1, dtype=torch.float64), randn(30, 37, seed=2, dtype=torch.float64)
    labels, distance = direct(x, centroids)
    true = ((x.numpy().astype(np.longdouble)[:, None] - centroids.numpy()[None]) ** 2).sum(-1)
    np.testing.assert_allclose(distance.numpy(), true.min(1).astype(float), rtol=1e-14)
    assert (labels.numpy() == true.argmin(1)).all()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_exact(x, centroids, device="cpu"):
    """Labels and distances are the float64 ones; returns the statistics."""
    want, want_distance = direct(x, centroids)
    labels, distance, stats = sx.ops.kmeans_assign(
        x.to(device), centroids.to(device), return_distance=True, return_stats=True
    )
    assert labels.dtype == torch.int32
    assert torch.equal(labels.cpu(), want)
    assert torch.equal(distance.cpu().nan_to_num(-1), want_distance.to(distance.dtype).nan_to_num(-1))
    assert int(stats.num_nonfinite) == int((want < 0).sum())
    return stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (50, 39, 50), (83, 7, 1), (47, 31, 123), (60, 2, 256), (19, 64, 600)]
)
def test_matches_float64(device, shape, dtype):
    num_rows, width, num_clusters = shape
    x = randn(num_rows, width, seed=1).to(dtype)
    stats = assert_exact(x, randn(num_clusters, width, seed=2).to(dtype), device)
    assert int(stats.num_compared) >= 2 * int(stats.num_reranked)


@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 17, 255, 1024, 4096])
def test_every_width(codes, width):
    assert_exact(randn(70, width, seed=1), randn(45, width, seed=2))


def test_mixed_dtypes(device):
    x, centroids = randn(30, 20, seed=1), randn(40, 20, seed=2)
    for row_dtype in DTYPES:
        for centroid_dtype in DTYPES:
            assert_exact(x.to(row_dtype), centroids.to(centroid_dtype), device)


def anisotropic(num, width, seed):
    """Features as encoders give them: a large mean, a few dimensions that outweigh the rest."""
    scale = torch.logspace(0, -2, width)
    scale[3] = 30
    return randn(num, width, seed=seed) * scale + randn(width, seed=9) * 5


def constant_rows(num):
    return torch.linspace(-3, 3, num)[:, None].expand(num, 24)


def hostile_cases():
    c = randn(90, 24, seed=3)
    near = torch.cat([c, c + 1e-7 * randn(90, 24, seed=4)])
    tight = randn(1, 24, seed=5) + 1e-7 * c
    midpoints = (c[:45] + c[45:]) / 2
    copies = c[torch.arange(180) % 7]
    one_far = c.clone()
    one_far[17] = 1e12
    mixed = c * torch.logspace(-15, 15, 90)[:, None]
    grid_x = torch.randint(-3, 4, (120, 3), generator=torch.Generator().manual_seed(0)).float()
    grid_c = torch.randint(-3, 4, (60, 3), generator=torch.Generator().manual_seed(1)).float()
    wide = randn(80, 24, seed=6, dtype=torch.float64)
    return {
        "near ties": (torch.cat([near, (near[:90] + near[90:]) / 2]), near),
        "all within 1e-7": (tight[:40] + 1e-7 * randn(40, 24, seed=7), tight),
        "midpoints": (torch.cat([midpoints, midpoints + 1e-7 * randn(45, 24, seed=8)]), c),
        "copies": (randn(60, 24, seed=9), copies),
        "all equal": (randn(20, 24, seed=9), c[:1].expand(70, 24)),
        "huge norms": (randn(50, 24, seed=10) * 1e18, c * 1e18),
        "tiny norms": (randn(50, 24, seed=10) * 1e-22, c * 1e-22),
        "subnormal": (randn(50, 24, seed=10) * 1e-41, c * 1e-41),
        "norms of thirty magnitudes": (torch.cat([mixed, mixed * 1.01]), mixed),
        "one centroid far away": (randn(50, 24, seed=11), one_far),
        "rows far from all centroids": (randn(50, 24, seed=12) * 1e6, c),
        "rows out of sight": (randn(20, 24, seed=12) * 1e17, c),
        "far from the origin": (randn(60, 24, seed=13) + 1000, c + 1000),
        "integer grid": (grid_x, grid_c),
        "zero rows": (torch.zeros(5, 24), torch.cat([c, torch.zeros(1, 24), torch.zeros(1, 24)])),
        "centroids that are zero": (c[:9], torch.zeros(33, 24)),
        "constant vectors": (constant_rows(41), constant_rows(64)),
        "one dimension": (randn(50, 1, seed=14), randn(40, 1, seed=15)),
        "largest floats": (randn(30, 24, seed=16).sign() * 3e38, randn(40, 24, seed=17).sign() * 3e38),
        "float64 beyond squares": (wide[:20] * 1e200, wide * 1e200),
        "float64 below squares": (wide[:20] * 1e-200, wide * 1e-200),
        "float64 of many magnitudes": (wide[:20] * torch.logspace(-290, 290, 20, dtype=torch.float64)[:, None], wide),
        "float64 near ties": (wide[:40], torch.cat([wide, wide * (1 + 1e-13)])),
        "anisotropic": (anisotropic(60, 120, 18), anisotropic(90, 120, 19)),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile_cases())
def test_hostile(device, name):
    x, centroids = hostile_cases()[name]
    assert_exact(x, centroids, device)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 70),
    st.integers(0, 10**6), st.floats(-12, 12), st.floats(-12, 12), st.sampled_from(DTYPES[:2]),
)  # fmt: skip
def test_any_sizes_and_magnitudes(num_rows, width, num_clusters, seed, row_exponent, exponent, dtype):
    """Rows and centroids with magnitudes of their own, each vector with its own too, and some of the rows near ties."""
    spread = torch.exp2(randn(num_clusters, 1, seed=seed + 2, dtype=dtype) * 3)
    centroids = randn(num_clusters, width, seed=seed, dtype=dtype) * 10.0**exponent * spread
    x = randn(num_rows, width, seed=seed + 1, dtype=dtype) * 10.0**row_exponent
    pick = torch.randint(num_clusters, (2, num_rows), generator=torch.Generator().manual_seed(seed))
    between = (centroids[pick[0]] + centroids[pick[1]]) / 2
    for name in CODES.values():
        with simd(name):
            assert_exact(torch.cat([x, between]), centroids)


def test_ties_go_to_the_lowest_index(device):
    centroids = randn(20, 8, seed=1)
    centroids[13] = centroids[4]
    centroids[7] = torch.nextafter(centroids[2], centroids[2] + 1)  # one unit in the last place away
    x = torch.cat([centroids, (centroids[:10] + centroids[10:]) / 2]).to(device)
    labels = sx.ops.kmeans_assign(x, centroids.to(device)).tolist()
    assert 13 not in labels and labels[4] == 4 and labels[7] == 7 and labels[2] == 2
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=device)
    assert sx.ops.kmeans_assign(torch.zeros(2, 2, device=device), square).tolist() == [0, 0]


def test_bounds_leave_few_rows_to_compare_again(codes):
    """Of well separated features hardly any: else the bounds are wider than they need to be."""
    centroids = anisotropic(200, 128, 1)
    x = centroids[torch.arange(1000) % 200] + 0.5 * randn(1000, 128, seed=2) * torch.logspace(0, -2, 128)
    assert int(assert_exact(x, centroids).num_reranked) <= {"fine": 10, "coarse": 300}[codes]


def test_copies_of_a_centroid_are_not_compared(device):
    centroids = randn(5, 12, seed=1)[torch.arange(300) % 5]
    stats = assert_exact(randn(50, 12, seed=2), centroids, device)
    assert int(stats.num_compared) <= 10


def test_a_row_near_many_centroids(device):
    """More candidates than the lists of the kernels hold at first."""
    stats = assert_exact(1e16 * randn(5, 6, seed=3), randn(700, 6, seed=2), device)
    assert int(stats.num_reranked) == 5 and int(stats.num_compared) > 1500


@pytest.mark.parametrize("other", [3, 4, 1023, 1024, 1027, 2048, 2060])
def test_two_near_centroids_anywhere(device, other):
    """In one load of a thread, in two loads of it, in two threads: the nearer one by a rounding is the label."""
    centroids = randn(2061, 6, seed=1) + 50
    centroids[0], centroids[other] = torch.zeros(6), torch.full((6,), 2.0**-20)
    x = torch.full((5, 6), 2.0**-21) + torch.tensor([-1, -(2.0**-20), 0, 2.0**-20, 1])[:, None] * 2.0**-22
    stats = assert_exact(x, centroids, device)
    assert sx.ops.kmeans_assign(x.to(device), centroids.to(device)).tolist() == [0, 0, 0, other, other]
    assert int(stats.num_compared) == 2 * int(stats.num_reranked) > 0


def test_a_row_near_more_centroids_than_a_turn_takes(device):
    stats = assert_exact(1e16 * randn(2, 6, seed=3), randn(2100, 6, seed=2), device)
    assert int(stats.num_reranked) == 2 and int(stats.num_compared) > 2100


def test_rows_that_are_not_finite(device):
    x = randn(9, 3, seed=1)
    x[1, 2], x[3, 0], x[4, 1], x[5] = float("nan"), float("inf"), -float("inf"), float("nan")
    assert_exact(x, randn(5, 3, seed=2), device)
    with pytest.raises(ValueError, match=r"4 of 9 rows of x are not finite, the first is x\[1\]"):
        sx.ops.kmeans_assign(x.to(device), randn(5, 3, seed=2).to(device), nonfinite="error")
    sx.ops.kmeans_assign(x[6:].to(device), randn(5, 3, seed=2).to(device), nonfinite="error")


def test_empty_and_strided(device):
    centroids = randn(12, 20, seed=1)
    index = sx.ops.CentroidIndex.build(centroids.to(device))
    labels, distance = sx.ops.kmeans_assign(torch.zeros(0, 20, device=device), index, return_distance=True)
    assert labels.shape == distance.shape == (0,)
    x = randn(40, 30, seed=2)
    want = direct(x.T[:20].T[::2], centroids)[0]
    assert torch.equal(sx.ops.kmeans_assign(x.to(device).T[:20].T[::2], index).cpu(), want)
    strided = randn(20, 24, seed=1).T[::2]
    assert torch.equal(
        sx.ops.kmeans_assign(x[:, :20].to(device), strided.to(device)).cpu(), direct(x[:, :20], strided)[0]
    )


def test_an_index_serves_many_calls_and_dtypes(device):
    centroids = randn(40, 12, seed=1)
    index = sx.ops.CentroidIndex.build(centroids.to(device))
    for dtype in DTYPES:
        x = randn(30, 12, seed=2).to(dtype)
        assert torch.equal(sx.ops.kmeans_assign(x.to(device), index).cpu(), direct(x, centroids)[0])


def test_fast_mode_is_near(device):
    """Its centroid is at most what the rounding of both can hide farther away than the nearest."""
    x, centroids = anisotropic(80, 64, 1), anisotropic(90, 64, 2)
    labels, distance = sx.ops.kmeans_assign(
        x.to(device), centroids.to(device), mode="fast", return_distance=True
    )
    want, least = direct(x, centroids)
    assert (labels.cpu() == want).float().mean() > 0.9
    assert (distance.cpu() <= least + 1e-2 * centroids.norm(dim=1).max() ** 2).all()


def test_fast_mode_out_of_sight(device):
    """Scores that lie closer together than the smallest float, and copies, which are never the label."""
    step = torch.tensor([0, 1e-16, 2e-16, 3e-16, 4e-16], dtype=torch.float64)[:, None]
    centroids = torch.tensor([[1.121143069995707, -0.9847661377282759]], dtype=torch.float64) * (1 + step)
    x = torch.tensor([[3.6e24, 9.3e24], [-1e30, 1e29]], dtype=torch.float64)
    for c in (centroids, centroids[:1].expand(40, 2)):
        labels = sx.ops.kmeans_assign(x.to(device), c.to(device), mode="fast").tolist()
        copies = [k for k in range(len(c)) if (c[:k] == c[k]).all(dim=1).any()]
        assert all(0 <= label < len(c) and label not in copies for label in labels)


def test_fast_mode_beyond_squares(device):
    """A centroid whose square is no number does not draw all rows to itself."""
    centroids = randn(60, 4, seed=1, dtype=torch.float64) * 1e149
    centroids[7] = 9e150
    labels = sx.ops.kmeans_assign(centroids[20:30].to(device), centroids.to(device), mode="fast")
    assert labels.tolist() == list(range(20, 30))


def test_same_result_for_every_instruction_set_and_number_of_threads():
    x, centroids = anisotropic(300, 75, 1), anisotropic(130, 75, 2)
    x[5, 3] = float("nan")
    before, results = torch.get_num_threads(), []
    try:
        for name in [*native.simd_available(), "emulated-amx"]:
            native.use_simd(name)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for mode in ("exact", "fast"):
                    out = sx.ops.kmeans_assign(
                        x, centroids, mode=mode, return_distance=True, return_stats=True
                    )
                    kind = mode, name if name.endswith("amx") else "fine"
                    results.append((kind, out[0], out[1].nan_to_num(-1), torch.stack(out[2])))
    finally:
        native.use_simd("")
        torch.set_num_threads(before)
    for kind, *got in results:
        want = next(r for k, *r in results if k == kind)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    exact = [got[0] for (mode, _), *got in results if mode == "exact"]
    assert all(torch.equal(labels, exact[0]) for labels in exact)


def test_an_index_serves_every_instruction_set():
    """Coarse codes are left alone where there are no tiles, and are not missed where an index has none."""
    x, centroids = randn(60, 40, seed=1), randn(70, 40, seed=2)
    want = direct(x, centroids)[0]
    indices = []
    for name in CODES.values():
        with simd(name):
            indices.append(sx.ops.CentroidIndex.build(centroids))
    assert [index.coarse_codes.numel() > 0 for index in indices] == [False, True]
    for index in indices:
        for name in CODES.values():
            with simd(name):
                assert torch.equal(sx.ops.kmeans_assign(x, index), want)


def test_rows_with_many_coarse_candidates_get_finer_codes():
    """Centroids that bfloat16 cannot tell apart from here: 16 bits can."""
    centroids = randn(1, 200, seed=1) + 1e-3 * randn(300, 200, seed=2)
    x = torch.cat([centroids[:50] + 1e-4 * randn(50, 200, seed=3), randn(50, 200, seed=4)])
    stats = {}
    for name, chosen in CODES.items():
        with simd(chosen):
            stats[name] = assert_exact(x, centroids)
    assert int(stats["coarse"].num_compared) <= int(stats["fine"].num_compared) + 50 * 32


def test_opcheck(codes):
    x, centroids = randn(20, 7, seed=1), randn(9, 7, seed=2)
    torch.library.opcheck(torch.ops.speechlm_ext.kmeans_index.default, (centroids,))
    made = torch.ops.speechlm_ext.kmeans_index(centroids)
    for dtype in DTYPES:
        torch.library.opcheck(
            torch.ops.speechlm_ext.kmeans_assign.default, (x.to(dtype), centroids, *made, True, True)
        )


@pytest.mark.parametrize("with_index", [False, True])
def test_compiles_without_a_graph_break(codes, with_index):
    x, centroids = randn(50, 7, seed=1), randn(9, 7, seed=2)
    given = sx.ops.CentroidIndex.build(centroids) if with_index else centroids

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(rows):
        labels, distance = sx.ops.kmeans_assign(rows, given, return_distance=True)
        return labels + 0, distance.sum()

    labels, total = run(x)
    want, distance = direct(x, centroids)
    assert torch.equal(labels, want)
    torch.testing.assert_close(total.double(), distance.sum(), rtol=1e-5, atol=0)


def test_a_torch_without_half_products_is_named_once(monkeypatch, caplog):
    """On such a torch a GPU multiplies float32 matrices, which is slow: never without a word."""
    precision.has_half_products.cache_clear()
    monkeypatch.setattr(precision, "GIVES_FLOAT32", False)
    try:
        with caplog.at_level(logging.WARNING, "speechlm_ext"):
            assert not precision.has_half_products() and not precision.has_half_products()
    finally:
        precision.has_half_products.cache_clear()
    (record,) = caplog.records
    assert "no product of float16 matrices" in record.getMessage()
    monkeypatch.undo()
    assert precision.has_half_products() == precision.GIVES_FLOAT32


def test_gives_no_gradient():
    x = randn(5, 3, seed=1).requires_grad_()
    labels, distance = sx.ops.kmeans_assign(x, randn(4, 3, seed=2).requires_grad_(), return_distance=True)
    assert not labels.requires_grad and not distance.requires_grad


@pytest.mark.parametrize(
    ("x", "centroids", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 4), {}, r"x must be float \[N, F\]; got float32 \[3\]"),
        (torch.zeros(3, 4).long(), torch.zeros(2, 4), {}, "x must be float"),
        ([[1.0]], torch.zeros(2, 4), {}, "x must be float .* got a list"),
        (torch.zeros(3, 4), torch.zeros(2, 5), {}, r"centroids must be float \[K, 4\]"),
        (torch.zeros(3, 4), torch.zeros(0, 4), {}, "K >= 1"),
        (torch.zeros(3, 0), torch.zeros(2, 0), {}, "F >= 1"),
        (torch.zeros(3, 4), torch.zeros(2, 4).int(), {}, "centroids must be float"),
        (torch.zeros(3, 1), torch.tensor([[0.0], [float("nan")]]), {}, r"centroids\[1\] is not finite"),
        (torch.zeros(3, 1), torch.tensor([[float("inf")], [0.0]]), {}, r"centroids\[0\] is not finite"),
        (torch.zeros(3, 4), torch.zeros(2, 4), dict(mode="slow"), 'mode must be "exact" or "fast"'),
        (torch.zeros(3, 4), torch.zeros(2, 4), dict(nonfinite="drop"), 'nonfinite must be "label" or "error"'),
        (torch.zeros(3, 4), torch.zeros(2, 4, device="meta"), {}, "Cannot|meta|device"),
    ],
)  # fmt: skip
def test_rejects_bad_input(x, centroids, options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        sx.ops.kmeans_assign(x, centroids, **options)
