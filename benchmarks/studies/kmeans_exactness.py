"""Number of labels that differ from the float64 argmin, on easy and on hostile data: ``make bench-exactness``.

kmeans_assign beside torch's cdist with argmin, torch's product with argmin, faiss and scikit-learn, all in float32. The
reference is torch's cdist in float64 by differences, without a product.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import speechlm_ext as sx  # noqa: E402
from benchmarks.studies.kmeans_features import nearest_float64  # noqa: E402
from speechlm_ext.utils.console import make_output_safe  # noqa: E402


def cases(num_rows: int, width: int, num_clusters: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> rows and centroids."""
    torch.manual_seed(0)
    c, x = torch.randn(num_clusters, width), torch.randn(num_rows, width)
    near = c[torch.randint(num_clusters, (num_rows,))]
    # Dimensions of very different size about a mean far from the origin, as encoders give them.
    scale, mean = torch.logspace(0.5, -2, width), 5 * torch.randn(width)
    pairs = c.clone()
    pairs[1::2] = pairs[::2] + 1e-7 * torch.randn(num_clusters // 2, width)
    other = c[torch.randint(num_clusters, (num_rows,))]
    norms = torch.logspace(-6, 6, num_clusters)[:, None]
    pick = torch.randint(num_clusters, (num_rows,))
    return {
        "random": (x, c),
        "clustered": (near + 0.3 * x, c),
        "anisotropic, far from the origin": (mean + scale * (near + 0.3 * x), mean + scale * c),
        "pairs of centroids 1e-7 apart": (pairs[pick] + 1e-7 * x, pairs),
        "half-way between two, ± 1e-7": ((near + other) / 2 + 1e-7 * x, c),
        "norms of 1e15": (1e15 * x, 1e15 * c),
        "norms of 1e-15": (1e-15 * x, 1e-15 * c),
        "norms from 1e-6 to 1e6": (norms[pick] * (c[pick] + 0.1 * x), norms * c),
        "each centroid ten times": (x, c[torch.arange(num_clusters) % (num_clusters // 10)]),
    }


def contestants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name -> function that labels rows."""

    def product(x: Tensor, c: Tensor) -> Tensor:
        return torch.addmm(c.square().sum(1) / 2, x, c.T, alpha=-1).argmin(1)

    def scikit_learn(x: Tensor, c: Tensor) -> Tensor:
        from sklearn.cluster import KMeans

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copies among the centroids, which are meant
            fitted = KMeans(len(c), init=c.numpy(), n_init=1, max_iter=1).fit(c.numpy())
        fitted.cluster_centers_ = c.numpy()
        return torch.from_numpy(fitted.predict(x.numpy()))

    def by_faiss(x: Tensor, c: Tensor) -> Tensor:
        import faiss

        index = faiss.IndexFlatL2(c.shape[1])
        index.add(c.numpy())
        return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])

    found = {
        "kmeans_assign": sx.ops.kmeans_assign,
        "torch cdist": lambda x, c: torch.cdist(x, c).argmin(1),
        "torch product": product,
        "scikit-learn": scikit_learn,
    }
    return found | ({"faiss": by_faiss} if importlib.util.find_spec("faiss") else {})


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a label of kmeans_assign differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--clusters", type=int, default=5000)
    args = parser.parse_args(argv)
    rivals = contestants()
    print(f"| {args.rows} rows | re-ranked | {' | '.join(rivals)} |\n|{'---|' * (len(rivals) + 2)}")
    failed = False
    for name, (x, c) in cases(args.rows, args.features, args.clusters).items():
        truth = torch.from_numpy(nearest_float64(x, c))
        wrong = {rival: int((label(x, c).long() != truth).sum()) for rival, label in rivals.items()}
        stats = sx.ops.kmeans_assign(x, c, return_stats=True)[1]
        share = int(stats.num_reranked) / args.rows
        print(f"| {name} | {share:.2%} | {' | '.join(map(str, wrong.values()))} |", flush=True)
        failed = failed or wrong["kmeans_assign"] > 0
    return int(failed)


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
