"""Import centroids of other programs: ``python -m speechlm_ext.importers.kmeans_centroids SOURCE OUT``.

SOURCE is a ``.npy`` file of centroids ``[K, F]``, which is plain data, or a scikit-learn model as fairseq and ESPnet
write it (``joblib.dump`` of a KMeans or MiniBatchKMeans). The latter is a pickle: reading it runs any code in it. So it
is refused without ``--run-code-in-this-file``, and no other module of the package unpickles anything; the output is
safetensors and JSON. The safe way is to ask the model's owner for
``numpy.save("centroids.npy", model.cluster_centers_)``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechlm_ext.errors import KMeansError, SpeechLMError
from speechlm_ext.kmeans.artifact import Fitted
from speechlm_ext.kmeans.estimator import KMeans
from speechlm_ext.kmeans.features.shards import open_npy
from speechlm_ext.utils.console import make_output_safe
from speechlm_ext.utils.files.io import sha256_file

CONSENT = "--run-code-in-this-file"


def from_centroids(
    centroids: np.ndarray | torch.Tensor,
    *,
    counts: np.ndarray | torch.Tensor | None = None,
    features: Mapping[str, Any] | None = None,
) -> KMeans:
    """A fitted :class:`KMeans` of given centroids.

    Args:
        centroids: float ``[K, F]``, finite; float64 stays, other types become float32.
        counts: int ``[K]`` rows of each cluster; default 0, unknown.
        features: description of the features, as JSON values.

    Raises:
        KMeansError: another type or shape, or a value that is not finite.
    """
    centers = torch.as_tensor(
        np.ascontiguousarray(centroids) if isinstance(centroids, np.ndarray) else centroids
    )
    if centers.ndim != 2 or 0 in centers.shape or not centers.is_floating_point():
        raise KMeansError(f"centroids: expected float [K, F], got {centers.dtype} {list(centers.shape)}.")
    if not bool(centers.isfinite().all()):
        bad = int((~centers.isfinite().all(dim=1)).nonzero()[0])
        raise KMeansError(f"centroids: row {bad} is not finite; the model is damaged.")
    num_clusters, width = centers.shape
    rows = torch.zeros(num_clusters, dtype=torch.int64)
    if counts is not None:
        rows = torch.as_tensor(np.asarray(counts)).round().to(torch.int64)
        if tuple(rows.shape) != (num_clusters,) or bool((rows < 0).any()):
            raise KMeansError(f"centroids: expected counts [{num_clusters}] >= 0, got {list(rows.shape)}.")
    model = KMeans(num_clusters)
    dtype = torch.float64 if centers.dtype == torch.float64 else torch.float32
    model._set_fitted(
        Fitted(centers.detach().cpu().to(dtype), rows, {}, dict(features or {}), n_rows=int(rows.sum()))
    )
    return model


def from_npy(path: str | Path, *, features: Mapping[str, Any] | None = None) -> KMeans:
    """Centroids from a ``.npy`` file ``[K, F]``; nothing is unpickled. Raises :class:`KMeansError`."""
    return from_centroids(np.array(open_npy(Path(path), "centroids", "[K, F]")), features=features)


def from_joblib(
    path: str | Path, *, run_code_in_this_file: bool, features: Mapping[str, Any] | None = None
) -> KMeans:
    """Centroids of a scikit-learn model in a joblib file. UNPICKLES the file: code in it runs with your rights.

    Args:
        path: written by ``joblib.dump(model, path)``.
        run_code_in_this_file: the caller's consent; without it nothing is opened.

    Raises:
        KMeansError: no consent, joblib or scikit-learn missing, or no K-Means model in it.
    """
    path = Path(path)
    if not path.is_file():
        raise KMeansError(f"model {path} does not exist.")
    if not run_code_in_this_file:
        raise KMeansError(
            f"model {path} (sha256 {sha256_file(path)}) is a pickle, and reading it runs any code it holds. If you "
            f"trust its author with this machine, give {CONSENT}; else ask for the centroids as "
            "numpy.save('centroids.npy', model.cluster_centers_) and convert that file."
        )
    try:
        import joblib
    except ImportError:
        raise KMeansError(
            "models of scikit-learn need joblib and scikit-learn; pip install scikit-learn."
        ) from None
    try:
        found = joblib.load(path)
    except Exception as error:  # a pickle can raise anything
        raise KMeansError(
            f"model {path} cannot be unpickled ({type(error).__name__}: {error}); it may need the scikit-learn version "
            "that wrote it."
        ) from None
    centers = getattr(found, "cluster_centers_", None)
    if not isinstance(centers, np.ndarray):
        raise KMeansError(
            f"model {path} holds {type(found).__name__}, not a fitted KMeans or MiniBatchKMeans of scikit-learn."
        )
    counts = getattr(found, "_counts", None)  # of MiniBatchKMeans: rows each centroid has learned from
    labels = getattr(found, "labels_", None)
    if counts is None and labels is not None:
        counts = np.bincount(np.asarray(labels), minlength=len(centers))
    return from_centroids(centers, counts=counts, features=features)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m speechlm_ext.importers.kmeans_centroids", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "source", type=Path, help="centroids.npy [K, F], or a joblib file of a scikit-learn model"
    )
    parser.add_argument("out", type=Path, help="folder for kmeans.safetensors and kmeans.json")
    parser.add_argument(
        CONSENT,
        action="store_true",
        help="unpickle SOURCE, which runs any code in it; only for files that you trust",
    )
    parser.add_argument(
        "--features",
        default="{}",
        help='JSON object: description of the features, e.g. \'{"encoder": "hubert", "layer": 9}\'',
    )
    a = parser.parse_args(argv)
    try:
        features = json.loads(a.features)
        if not isinstance(features, dict):
            raise ValueError("not an object")
    except ValueError as error:
        print(f"--features must be a JSON object ({error})", file=sys.stderr)
        return 2
    try:
        if a.source.suffix == ".npy":
            model = from_npy(a.source, features=features)
        else:
            model = from_joblib(a.source, run_code_in_this_file=a.run_code_in_this_file, features=features)
        model.save(a.out)
    except SpeechLMError as error:
        print(error, file=sys.stderr)
        return 2
    k, f = model.cluster_centers_.shape
    print(
        f"{a.source} (sha256 {sha256_file(a.source)})\n{a.out}: {k} centroids of {f} features, {model.fingerprint}"
    )
    return 0


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
