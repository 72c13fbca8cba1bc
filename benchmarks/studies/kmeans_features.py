"""K-Means on features of real speech, its units compared with phones: ``make bench-features FEATURES=folder``.

The folder holds pairs ``NAME.npy`` (float [N, F], from ``speechlm kmeans fit --keep_features`` or any encoder) and
``NAME_phones.npy`` (integers [N], -1 where a frame has no phone). For each pair and each number of clusters both sides
fit from the same start for the same number of iterations: ours, and scikit-learn's KMeans (lloyd). Printed as a table
in Markdown, and written as JSON:

- PNMI and purities of our labels against the phones (benchmarks/studies/unit_quality.py),
  and PNMI of scikit-learn's
- agreement with kmeans_assign, on our centroids: share of rows with the same label by scikit-learn's predict, and by
  the float64 argmin; the latter must be 1, or the script fails
- re-ranked: share of rows that kmeans_assign rescores in float64
- inertia: ours / scikit-learn's, both summed in float64; of fits to the features as they are, where scikit-learn's
  labels are those of float32 and the two fits diverge, and of fits to the features in float64
- times: of fit and of labeling all rows, the better of two runs, on --threads threads
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import speechlm_ext as sx  # noqa: E402
from benchmarks.studies.unit_quality import unit_quality  # noqa: E402
from speechlm_ext.kmeans import KMeans  # noqa: E402
from speechlm_ext.ops import CentroidIndex  # noqa: E402
from speechlm_ext.utils.console import make_output_safe  # noqa: E402
from speechlm_ext.utils.files.io import atomic_write_json  # noqa: E402

#: Heading -> cell.
COLUMNS = {
    "features": "{features}",
    "rows": "{rows:,}",
    "F": "{F}",
    "K": "{K}",
    "PNMI": "{pnmi:.4f}",
    "phone purity": "{phone_purity:.4f}",
    "cluster purity": "{cluster_purity:.4f}",
    "PNMI scikit-learn": "{sklearn_pnmi:.4f}",
    "= predict": "{sklearn_agreement:.6f}",
    "= float64": "{float64_agreement:.6f}",
    "re-ranked": "{reranked_share:.2%}",
    "inertia ratio": "{inertia_ratio:.9f}",
    "of float64 fits": "{float64_inertia_ratio:.9f}",
    "fit": "{fit_seconds:.2f} s",
    "scikit-learn": "{sklearn_fit_seconds:.2f} s",
    "assign": "{assign_seconds:.3f} s",
    "predict": "{predict_seconds:.3f} s",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=Path, required=True, help="folder of NAME.npy and NAME_phones.npy")
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 500], help="numbers of clusters")
    parser.add_argument("--iterations", type=int, default=20, help="Lloyd iterations of both sides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--only", nargs="+", help="names of the feature sets to take")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/out/kmeans_features.json"), help="where results go"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pairs = [
        p for p in sorted(args.features.glob("*.npy")) if not p.stem.endswith("_phones") and p.name[0] != "."
    ]
    pairs = [p for p in pairs if p.with_name(f"{p.stem}_phones.npy").is_file()]
    if args.only:
        pairs = [p for p in pairs if p.stem in args.only]
    if not pairs:
        parser.error(f"{args.features} holds no NAME.npy with a NAME_phones.npy beside it")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    results = []
    for path in pairs:
        x = np.ascontiguousarray(np.load(path, allow_pickle=False), dtype=np.float32)
        phones = np.load(path.with_name(f"{path.stem}_phones.npy"), allow_pickle=False)
        for num_clusters in args.clusters:
            found = {"features": path.stem, **measure(x, phones, num_clusters, args.iterations, args.threads)}
            results.append(found)
            print(f"| {' | '.join(COLUMNS.values())} |".format(**found), flush=True)
            machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
            atomic_write_json(
                args.json,
                {**machine, "threads": args.threads, "iterations": args.iterations, "results": results},
            )
    wrong = [f for f in results if f["float64_agreement"] != 1]
    for f in wrong:
        print(f"{f['features']}, K = {f['K']}: labels differ from the float64 argmin", file=sys.stderr)
    return 1 if wrong else 0


def measure(
    x: np.ndarray, phones: np.ndarray, num_clusters: int, iterations: int, threads: int
) -> dict[str, Any]:
    """One line of the table, as JSON values; times in seconds."""
    from sklearn.cluster import KMeans as Rival
    from sklearn.cluster import kmeans_plusplus
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    some = np.sort(rng.permutation(len(x))[: max(20000, 4 * num_clusters)])
    start, _ = kmeans_plusplus(x[some], num_clusters, random_state=0)
    tensor = torch.from_numpy(x)
    with threadpool_limits(threads):
        ours, our_seconds = best_of_two(
            lambda: KMeans(num_clusters, init=start, max_iter=iterations, tol=0.0, progress=False).fit(tensor)
        )
        rival, rival_seconds = best_of_two(
            lambda: Rival(num_clusters, init=start, n_init=1, max_iter=iterations, tol=0.0).fit(x)
        )
        wide = KMeans(num_clusters, init=start, max_iter=iterations, tol=0.0, progress=False).fit(
            tensor.double()
        )
        rival_wide = Rival(
            num_clusters, init=start.astype(np.float64), n_init=1, max_iter=iterations, tol=0.0
        )
        rival_wide.fit(x.astype(np.float64))
        centroids = ours.cluster_centers_
        index = CentroidIndex.build(centroids)
        (labels, stats), assign_seconds = best_of_two(
            lambda: sx.ops.kmeans_assign(tensor, index, return_stats=True)
        )
        # Its predict on our centroids, as scripts do that load centroids into scikit-learn.
        rival_labels = rival.labels_
        rival_centroids = rival.cluster_centers_
        rival.cluster_centers_ = centroids.numpy()
        predicted, predict_seconds = best_of_two(lambda: rival.predict(x))
    labels = labels.numpy()
    quality = unit_quality(labels, phones)
    return {
        "rows": len(x),
        "F": x.shape[1],
        "K": num_clusters,
        "pnmi": quality.pnmi,
        "phone_purity": quality.phone_purity,
        "cluster_purity": quality.cluster_purity,
        "sklearn_pnmi": unit_quality(rival_labels, phones).pnmi,
        "sklearn_agreement": float((predicted == labels).mean()),
        "float64_agreement": float((nearest_float64(tensor, centroids) == labels).mean()),
        "reranked_share": int(stats.num_reranked) / len(x),
        "inertia_ratio": inertia(tensor, centroids, labels) / inertia(tensor, rival_centroids, rival_labels),
        "float64_inertia_ratio": float(wide.inertia_) / float(rival_wide.inertia_),
        "iterations": int(ours.n_iter_),
        "sklearn_iterations": int(rival.n_iter_),
        "fit_seconds": our_seconds,
        "sklearn_fit_seconds": rival_seconds,
        "assign_seconds": assign_seconds,
        "predict_seconds": predict_seconds,
    }


def best_of_two(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the shorter time of two runs."""
    seconds = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        result = run()
        seconds = min(seconds, time.perf_counter() - start)
    return result, seconds


def nearest_float64(x: torch.Tensor, centroids: torch.Tensor) -> np.ndarray:
    """Nearest centroid of each row ``[N]``, by differences in float64, without a product."""
    wide = centroids.double()
    parts = [
        torch.cdist(part.double(), wide, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        for part in x.split(4096)
    ]
    return torch.cat(parts).numpy()


def inertia(x: torch.Tensor, centroids: Any, labels: np.ndarray) -> float:
    """Sum of squared distances of the rows to the centroids of their labels, in float64."""
    wide = torch.as_tensor(centroids).double()
    total = 0.0
    for part, of in zip(x.split(65536), torch.from_numpy(labels).long().split(65536), strict=True):
        total += float((part.double() - wide[of]).square().sum())
    return total


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
