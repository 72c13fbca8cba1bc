"""``KMeans``: fit centroids to rows in memory, to shards larger than memory, or to the shares of many processes.

The vocabulary is scikit-learn's. What is promised beyond it: the result is a function of the rows in their order, the
settings and the seed alone, bit for bit; not of the blocks they are read in, of what holds them, of threads, or
of how many processes share them (on one kind of processor). ``docs/kmeans.md`` says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError, foreign_errors
from speechlm_ext.kmeans import artifact, checks
from speechlm_ext.kmeans.features.sources import open_source
from speechlm_ext.kmeans.fit.checkpoint import Checkpoint
from speechlm_ext.kmeans.fit.lloyd import walk
from speechlm_ext.kmeans.fit.loop import partial_step, run_fit
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.scan import Data, survey
from speechlm_ext.kmeans.fit.state import State
from speechlm_ext.kmeans.predict import nearest_of
from speechlm_ext.kmeans.settings import Settings

_DEFAULT_ITERATIONS = {"lloyd": 300, "minibatch": 100}
_DEFAULT_EVERY = {"lloyd": 1, "minibatch": 100}


class KMeans:
    """K-Means clustering by squared Euclidean distance.

    Every ``x`` below is a float ``[N, F]`` tensor or numpy array (float16, bfloat16, float32, float64; CPU or CUDA), a
    .npy or Parquet file, a list of such files, a folder of them, or a ``FeatureSource``.

    Args:
        n_clusters: K, at most the number of rows.
        init: ``"k-means++"`` (greedy, Arthur and Vassilvitskii 2007; k-means|| for large data), ``"k-means||"``
            (Bahmani et al. 2012), ``"random"`` (K distinct rows), or centroids ``[K, F]``.
        algorithm: ``"lloyd"``, or ``"minibatch"`` (Sculley 2010) for a good result after few looks at the data.
        max_iter: iterations over all rows at most; default 300, or 100 epochs of mini-batches.
        tol: stop when the squared shift of all centroids is at most this times the mean variance of the features.
        batch_size: rows of a mini-batch, over all ranks.
        n_init: fits from so many starts, of which the one with the smallest inertia is kept.
        random_state: seed.
        max_no_improvement: mini-batch steps without a lower smoothed inertia after which it stops; None: never.
        reassignment_ratio: mini-batch: a centroid that saw less than this share of the busiest one's rows is moved.
        init_size: rows, drawn at random, that the start is chosen from and that are held in memory for it; default all
            rows, or for mini-batches three batches, at least ``3 K``.
        n_local_trials: number of seeding trials in k-means++, also in the last stage of k-means||: so many rows are
            drawn for each centroid and the best is taken; None: ``2 + floor(ln K)``; 1: plain k-means++.
        nonfinite: a row with a NaN or an infinity is an ``"error"`` that names it, or is left out (``"drop"``), counted
            in ``n_dropped_`` and labelled -1.
        distributed: True: the rows given to each process of ``torch.distributed`` are its share, in rank order, and all
            get one result; False: this process alone; ``"auto"``: True where it is initialised.
        device: where to work; default where ``x`` is, the CPU for files.
        block_rows: rows held at a time; default about 32 MiB.
        column: of features in Parquet files.
        progress: True or False for progress bars; default only on a terminal.

    Attributes:
        cluster_centers_: ``[K, F]`` float32, float64 for float64 features.
        counts_: int64 ``[K]``, rows of each cluster (after ``partial_fit`` alone: rows each centroid learnt from).
        inertia_: sum of squared distances of the rows to their centroids, which are ``cluster_centers_``; None for
            imported centroids.
        inertia_history_: inertia before each iteration and at the end; mini-batch: its smoothed estimate at each step.
        labels_: int32 ``[N]`` of an ``x`` in memory, consistent with ``cluster_centers_``; None for files.
        n_iter_: iterations over all rows (mini-batch: epochs begun). n_steps_: mini-batch steps.
        n_features_in_: F. n_dropped_: rows left out, of all ranks. n_rows_: rows that were used.
        features_: what made the features, as given to :meth:`save` or found by :meth:`load`.

    Raises:
        KMeansError: (a ValueError) impossible settings, or a device that is not there.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        init: Any = "k-means++",
        algorithm: Literal["lloyd", "minibatch"] = "lloyd",
        max_iter: int | None = None,
        tol: float = 1e-4,
        batch_size: int = 10000,
        n_init: int = 1,
        random_state: int = 0,
        max_no_improvement: int | None = 10,
        reassignment_ratio: float = 0.01,
        init_size: int | None = None,
        n_local_trials: int | None = None,
        nonfinite: Literal["error", "drop"] = "error",
        distributed: bool | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        block_rows: int | None = None,
        column: str = "features",
        progress: bool | None = None,
    ) -> None:
        self.settings = Settings(
            n_clusters=n_clusters,
            init=init,
            algorithm=algorithm,
            max_iter=_DEFAULT_ITERATIONS.get(algorithm, 1) if max_iter is None else max_iter,
            tol=tol,
            n_init=n_init,
            random_state=random_state,
            nonfinite=nonfinite,
            batch_size=batch_size,
            max_no_improvement=max_no_improvement,
            reassignment_ratio=reassignment_ratio,
            init_size=init_size,
            n_local_trials=n_local_trials,
        )
        checks.require_whole("block_rows", block_rows)
        self.device = checks.checked_device(device)
        self.distributed, self.block_rows = distributed, block_rows
        self.column, self.progress = column, progress
        self.features_: dict[str, Any] = {}

    def __repr__(self) -> str:
        s = self.settings
        return f"KMeans(n_clusters={s.n_clusters}, algorithm={s.algorithm!r}, random_state={s.random_state})"

    def fit(
        self, x: Any, *, checkpoint: str | Path | None = None, checkpoint_every: int | None = None
    ) -> KMeans:
        """Fit the centroids.

        Args:
            x: rows; see the class.
            checkpoint: folder for the state of the fit. The same call goes on from there, after an interruption too,
                and ends with the same bits as one that was never interrupted.
            checkpoint_every: iterations (mini-batch: steps) between writes; default 1 (100).

        Raises:
            KMeansError: rows that cannot be used, or fewer finite ones than clusters.
            CheckpointError: the checkpoint is damaged, or of other settings or data.
            StorageError: the checkpoint cannot be written.
        """
        checks.require_whole("checkpoint_every", checkpoint_every)
        every = checkpoint_every if checkpoint_every is not None else _DEFAULT_EVERY[self.settings.algorithm]
        data = self._survey(x)
        checks.require_rows(data, self.settings.n_clusters)
        store = None
        if checkpoint is not None:
            store = Checkpoint(checkpoint, data.ranks, self.settings.record(), data.identity())
        in_memory = isinstance(x, (torch.Tensor, np.ndarray))
        fitted = run_fit(data, self.settings, checkpoint=store, checkpoint_every=every, want_labels=in_memory)
        best = fitted.best
        self.cluster_centers_, self.counts_ = best.centers, best.counts
        self.inertia_, self.inertia_history_ = best.inertia, best.history
        self.n_steps_ = best.iterations
        per_epoch = -(-data.num_rows // min(self.settings.batch_size, data.num_rows))
        is_lloyd = self.settings.algorithm == "lloyd"
        self.n_iter_ = best.iterations if is_lloyd else -(-best.iterations // per_epoch)
        self.labels_ = None if fitted.labels is None else _like(fitted.labels, x)
        self._learnt = State(centers=best.centers, seen=best.seen, iteration=best.iterations)
        self._know(data)
        checks.warn_of_duplicates(best.centers)
        return self

    def partial_fit(self, x: Any) -> KMeans:
        """Take one mini-batch step with the rows given; the first call also chooses the start among them.

        All the rows are held in memory; they may be the shares of several processes, as in :meth:`fit`. After
        :meth:`fit` or :meth:`load` it goes on from those centroids and what they have learnt from.

        Raises:
            KMeansError: rows that cannot be used, of another width than before, or at first fewer than clusters.
        """
        data = self._survey(x)
        state: State | None = getattr(self, "_learnt", None)
        if state is None:
            checks.require_rows(data, self.settings.n_clusters)
            self.inertia_history_ = []
        else:
            checks.require_width(data.source, self.n_features_in_)
        state, total = partial_step(data, self.settings, state)
        self._learnt = state
        self.cluster_centers_, self.counts_ = state.centers, state.seen.round().to(torch.int64)
        self.inertia_, self.n_iter_, self.n_steps_, self.labels_ = total, 1, state.iteration, None
        self.inertia_history_ = [*self.inertia_history_, total]
        self._know(data)
        return self

    def predict(self, x: Any) -> Any:
        """The nearest centroid of each row, exactly (float64 argmin, lowest index among equals).

        Returns:
            int32 ``[N]``: numpy for a numpy array, else a tensor (of this process's rows); with ``nonfinite="drop"`` -1
            for a row that is not finite.

        Raises:
            KMeansError: not fitted, rows of another width, or rows that are not finite.
        """
        centers = self._fitted("predict")
        source = open_source(x, column=self.column)
        checks.require_width(source, self.n_features_in_)
        labels = nearest_of(
            source,
            centers,
            device=self.device or getattr(source, "device", None) or centers.device,
            block_rows=self.block_rows,
            may_drop=self.settings.nonfinite == "drop",
        )
        return _like(labels, x)

    def fit_predict(self, x: Any, **kwargs: Any) -> Any:
        """:meth:`fit`, then the labels of the rows, as :meth:`predict` gives them."""
        self.fit(x, **kwargs)
        return self.labels_ if self.labels_ is not None else self.predict(x)

    def score(self, x: Any) -> float:
        """Minus the sum of squared distances of the rows (of all ranks) to their nearest centroids.

        Raises:
            KMeansError: not fitted, or rows that cannot be used.
        """
        centers = self._fitted("score")
        data = self._survey(x)
        checks.require_width(data.source, self.n_features_in_)
        return -walk(data, centers.to(data.device)).inertia

    def save(self, folder: str | Path, *, features: Mapping[str, Any] | None = None) -> None:
        """Write ``kmeans.safetensors`` and ``kmeans.json`` into ``folder``, atomically.

        Args:
            folder: made where it is not there.
            features: JSON values that say what made the features (encoder, layer, frame rate ...), kept with the
                centroids; default those known already.

        Raises:
            KMeansError: not fitted, or ``features`` are not JSON. StorageError: it cannot be written.
        """
        self._fitted("save")
        self.features_ = artifact.json_features(dict(self.features_ if features is None else features))
        artifact.write(folder, self._record())

    @classmethod
    def load(cls, folder: str | Path) -> KMeans:
        """Read what :meth:`save` wrote, on the CPU.

        Raises:
            KMeansError: missing, damaged, edited, or of another version.
        """
        fitted = artifact.read(folder)
        settings = dict(fitted.settings)
        try:
            if str(settings["init"]).startswith("array "):
                settings["init"] = fitted.centers  # the array itself is not kept; its hash is in the record
            with foreign_errors(KMeansError, "settings", "Expected are those of KMeans."):
                model = cls(**settings)
        except (KeyError, KMeansError) as error:
            raise KMeansError(
                f"{Path(folder) / artifact.JSON_NAME}: not a K-Means description ({str(error)[:300]}); save it again."
            ) from None
        model._adopt(fitted)
        return model

    @property
    def fingerprint(self) -> str:
        """sha256 over centroids, counts and the description of the features, 64 hex digits."""
        self._fitted("fingerprint")
        return self._record().fingerprint

    def _record(self) -> artifact.Fitted:
        numbers = {name: getattr(self, f"{name}_") for name in artifact.NUMBERS}
        return artifact.Fitted(
            self.cluster_centers_, self.counts_, self.settings.record(), self.features_, **numbers
        )

    def _adopt(self, fitted: artifact.Fitted) -> None:
        """Set the fitted attributes from a file."""
        self.cluster_centers_, self.counts_, self.labels_ = fitted.centers, fitted.counts, None
        self.n_features_in_ = int(fitted.centers.shape[1])
        self.features_ = fitted.features
        for name in artifact.NUMBERS:
            setattr(self, f"{name}_", getattr(fitted, name))
        self._learnt = State(fitted.centers, fitted.counts.double(), iteration=self.n_steps_)

    def _survey(self, x: Any) -> Data:
        ranks, source, error = Ranks.join(self.distributed), None, None
        try:
            source = open_source(x, column=self.column)
        except KMeansError as caught:
            error = caught
        ranks.agree(error)
        return survey(
            source,  # type: ignore[arg-type]
            ranks,
            nonfinite=self.settings.nonfinite,
            device=self.device,
            block_rows=self.block_rows,
            progress=self.progress,
        )

    def _fitted(self, what: str) -> Tensor:
        if not hasattr(self, "cluster_centers_"):
            raise KMeansError(
                f"K-Means: {what} needs centroids; call fit or partial_fit first, or KMeans.load(folder)."
            )
        return self.cluster_centers_

    def _know(self, data: Data) -> None:
        self.n_features_in_ = data.source.num_features
        self.n_dropped_, self.n_rows_ = data.num_dropped, data.num_usable


def _like(labels: Tensor, x: Any) -> Any:
    return labels.numpy() if isinstance(x, np.ndarray) and labels.device.type == "cpu" else labels
