"""kmeans_assign against its rivals: ``make bench OP=kmeans_assign``.

Rivals: faiss's exact index, scikit-learn's predict, torch's cdist with argmin in chunks, and torch's product with
argmin in chunks, compiled too; on a GPU flash-kmeans where it is installed. All of them are float32 (flash-kmeans:
TF32), so a few labels differ from the float64 argmin; how many of the first rows do is noted as ``wrong``. The limit is
the op's own products alone.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import speechlm_ext as sx
from benchmarks.common.harness import ROUNDS, Case, compare, compiled, devices
from speechlm_ext.kmeans.features.sources import ArraySource
from speechlm_ext.kmeans.fit.lloyd import lloyd_step
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.scan import scan
from speechlm_ext.kmeans.fit.state import State
from speechlm_ext.ops.common.cublas import has_cublas, product
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.common.precision import multiply_float16
from speechlm_ext.ops.kmeans_assign import kmeans_assign as assign_module
from speechlm_ext.ops.kmeans_assign.kmeans_assign import _coarse
from speechlm_ext.ops.kmeans_assign.reference import kmeans_assign as direct


class Shape(NamedTuple):
    """Sizes of a benchmark."""

    N: int
    F: int
    K: int
    near: float = 1.0
    """Rows lie about a centroid, at this share of the distance of random ones; 1: anywhere."""


SHAPES = {
    "smoke": Shape(500, 64, 100),
    "mfcc": Shape(20_000, 39, 500),
    "whisper_base": Shape(20_000, 512, 2_000, 0.5),
    "ssl": Shape(20_000, 1_024, 5_000),
    "ssl_clusters": Shape(20_000, 1_024, 5_000, 0.5),
    "ssl_million": Shape(1_000_000, 1_024, 5_000, 0.5),
}
#: Rows whose labels are compared with float64.
_CHECKED = 128
#: Rows of a product of the limit on a GPU: 1.3 GB of results for 5,000 centroids.
LIMIT_ROWS = 65_536


def make_inputs(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[N, F]`` and centroids ``[K, F]``."""
    torch.manual_seed(0)
    centroids = torch.randn(shape.K, shape.F, device=device)
    x = torch.randn(shape.N, shape.F, device=device)
    if shape.near < 1:
        x = centroids[torch.randint(shape.K, (shape.N,), device=device)] + shape.near * x
    return x, centroids


def in_chunks(label: Any, x: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """Labels of all rows, ``chunk`` at a time."""
    return torch.cat([label(x[i : i + chunk]) for i in range(0, len(x), chunk)])


def rivals_of(shape: str, x: torch.Tensor, centroids: torch.Tensor, device: str) -> dict[str, Any]:
    """Name -> call that gives int labels; each has prepared its centroids beforehand, as ours has."""
    half_norms = centroids.square().sum(1) / 2

    def by_product(rows: torch.Tensor) -> torch.Tensor:
        return torch.addmm(half_norms, rows, centroids.T, alpha=-1).argmin(1)

    rivals = {
        "torch_cdist": lambda: in_chunks(lambda rows: torch.cdist(rows, centroids).argmin(1), x),
        "torch_product": lambda: in_chunks(by_product, x),
    }
    if (run := compiled(shape, by_product, x[:1024], dynamic=False)) is not None:
        rivals["torch_product_compiled"] = lambda: in_chunks(run, x)
    if device == "cuda":
        if importlib.util.find_spec("flash_kmeans"):
            from flash_kmeans.assign_euclid_triton import euclid_assign_triton

            squares = x.square().sum(1)[None]
            rivals["flash_kmeans"] = lambda: euclid_assign_triton(x[None], centroids[None], squares)[0]
        return rivals
    x_numpy, centroids_numpy = x.numpy(), centroids.numpy()
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(centroids_numpy)
        rivals["faiss"] = lambda: torch.from_numpy(index.search(x_numpy, 1)[1][:, 0])
    if importlib.util.find_spec("sklearn"):
        from sklearn.cluster import KMeans

        fitted = KMeans(len(centroids), init=centroids_numpy, n_init=1, max_iter=1).fit(centroids_numpy)
        fitted.cluster_centers_ = centroids_numpy
        rivals["scikit_learn"] = lambda: torch.from_numpy(fitted.predict(x_numpy))
    return rivals


def own_products(x: torch.Tensor, index: sx.ops.CentroidIndex, device: str) -> Any:
    """The op's products by themselves, into memory that is there already; on a GPU large ones, at its full speed."""
    if device == "cuda":
        most = min(len(x), LIMIT_ROWS)
        codes = torch.randn(most, index.codes.shape[1], device=device).half()
        out = torch.empty(most, index.codes.shape[0], device=device)

        def run() -> None:
            for start in range(0, len(x), most):
                n = min(most, len(x) - start)
                if has_cublas(out):
                    product(out[:n], codes[:n], index.codes.T, accumulate=False)
                else:
                    multiply_float16(out[:n], codes[:n], index.codes)

        return run
    labels, counts = torch.empty(len(x), dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    prepared = (index.wide, index.codes, index.terms, index.centre, index.unit)
    prepared += _coarse(index.coarse_codes, index.coarse_terms)
    return lambda: native.kmeans_assign(
        x, *prepared, True, labels, None, counts, torch.get_num_threads(), products_only=True
    )


def make_case(shape: str, device: str) -> Case:
    sizes = SHAPES[shape]
    x, centroids = make_inputs(sizes, device)
    index = sx.ops.CentroidIndex.build(centroids)
    want = direct(x[:_CHECKED], centroids)[0]
    wrong = {}

    def check(name: str, labels: torch.Tensor) -> None:
        wrong[name] = int((labels[:_CHECKED].to(want.dtype) != want).sum())
        assert wrong[name] <= (0 if name == "ours" else _CHECKED // 16), f"{name} computes something else"

    stats = sx.ops.kmeans_assign(x, index, return_stats=True)[1]
    return Case(
        op="kmeans_assign",
        shape=shape,
        device=device,
        ours=lambda: sx.ops.kmeans_assign(x, index),
        rivals=rivals_of(shape, x, centroids, device),
        check=check,
        limit=own_products(x, index, device),
        rounds=5 if sizes.N * sizes.F * sizes.K > 10**10 else ROUNDS,
        extra=dict(
            reranked_share=float(stats.num_reranked) / sizes.N,
            wrong=wrong,
            flops=2 * sizes.N * sizes.F * sizes.K,
        ),
    )


def make_chunks_case(shape: str, device: str) -> Case:
    """On a GPU: other sizes of a chunk's products, and torch's products on one stream, in the rivals' places."""
    sizes = SHAPES[shape]
    x, centroids = make_inputs(sizes, device)
    index = sx.ops.CentroidIndex.build(centroids)
    want = sx.ops.kmeans_assign(x, index)

    def with_setting(name: str, value: Any) -> Any:
        def run() -> torch.Tensor:
            with mock.patch.object(assign_module, name, value):
                return sx.ops.kmeans_assign(x, index)

        return run

    rivals = {f"products_of_{mib}_mib": with_setting("_PRODUCT_BYTES", mib << 20) for mib in (8, 32, 64, 256)}
    rivals["products_by_torch"] = with_setting("has_cublas", lambda tensor: False)

    def check(name: str, labels: torch.Tensor) -> None:
        assert torch.equal(labels, want), f"{name} gives other labels"

    return Case(
        op="kmeans_assign",
        shape=f"{shape}_chunks",
        device=device,
        ours=lambda: sx.ops.kmeans_assign(x, index),
        rivals=rivals,
        check=check,
        limit=own_products(x, index, device),
        rounds=5,
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, device):
    if SHAPES[shape].N >= 1_000_000 and device == "cpu":
        pytest.skip("a shape for GPUs")
    compare(benchmark, make_case(shape, device))


def iteration_rivals(x: torch.Tensor, centroids: torch.Tensor, device: str) -> dict[str, Any]:
    """Name -> one iteration of Lloyd's algorithm, which gives the new centroids."""
    if device == "cuda":
        if not importlib.util.find_spec("flash_kmeans"):
            return {}
        from flash_kmeans import batch_kmeans_Euclid

        return {
            "flash_kmeans": lambda: batch_kmeans_Euclid(
                x[None], len(centroids), max_iters=1, init_centroids=centroids[None]
            )[1][0]
        }
    import numpy as np
    from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense
    from threadpoolctl import threadpool_limits

    rows, start, threads = x.numpy(), centroids.numpy(), torch.get_num_threads()
    weights = np.ones(len(rows), np.float32)

    def scikit_learn() -> torch.Tensor:
        new, counts = np.zeros_like(start), np.zeros(len(start), np.float32)
        labels, shift = np.full(len(rows), -1, np.int32), np.zeros(len(start), np.float32)
        with threadpool_limits(limits=1, user_api="blas"):  # as its fit does it: threads over rows
            lloyd_iter_chunked_dense(rows, weights, start, new, counts, labels, shift, threads)
        return torch.from_numpy(new)

    rivals = {"scikit_learn": scikit_learn}
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)

        def by_faiss() -> torch.Tensor:
            fit = faiss.Kmeans(
                x.shape[1], len(start), niter=1, max_points_per_centroid=len(rows), min_points_per_centroid=1
            )
            fit.train(rows, init_centroids=start)
            return torch.from_numpy(fit.centroids)

        rivals["faiss"] = by_faiss
    return rivals


def make_lloyd_case(shape: str, device: str) -> Case:
    """Assignment with distances, the sums of the clusters and the new centroids."""
    sizes = SHAPES[shape]
    x, _ = make_inputs(sizes, device)
    centroids = x[torch.randperm(sizes.N, device=device)[: sizes.K]].clone()  # none is empty
    data = scan(ArraySource(x), Ranks(), progress=False)

    def ours() -> torch.Tensor:
        state = State(centroids, torch.zeros(sizes.K, dtype=torch.float64, device=device))
        lloyd_step(data, state, max_iter=10, tolerance=0.0)
        return state.centers

    want = ours()

    def check(name: str, new: torch.Tensor) -> None:
        different = (new.to(want.device) - want).norm(dim=1) > 1e-3 * want.norm(dim=1)
        assert int(different.sum()) <= sizes.K // 20, f"{name} computes something else"

    return Case(
        op="kmeans_assign",
        shape=f"{shape}_lloyd",
        device=device,
        ours=ours,
        rivals=iteration_rivals(x, centroids, device),
        check=check,
        limit=lambda: sx.ops.kmeans_assign(x, centroids),
        rounds=5,
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", ["whisper_base", "ssl_clusters", "ssl_million"])
def test_bench_lloyd_iteration(benchmark, shape, device):
    if SHAPES[shape].N >= 1_000_000 and device == "cpu":
        pytest.skip("a shape for GPUs")
    compare(benchmark, make_lloyd_case(shape, device))
