"""``KMeans``: fit centroids to rows in memory, to shards larger than memory, or to the shares of many processes.

The vocabulary is scikit-learn's. The additional guarantee: the result is a function of the rows in their order, the
settings and the seed alone, bit for bit. It does not depend on block sizes, file formats, threads or the number of
processes (on one kind of processor). ``docs/kmeans.md`` explains how.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError, foreign_errors
from speechlm_ext.kmeans import artifact
from speechlm_ext.kmeans.features.sources import FeatureSource, nonfinite_row, open_source
from speechlm_ext.kmeans.fit.lloyd import assign_pass
from speechlm_ext.kmeans.fit.loop import fit_all_starts, partial_step
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.scan import Data, default_block_rows, scan
from speechlm_ext.kmeans.fit.state import Checkpoint, State
from speechlm_ext.kmeans.settings import Settings, check_positive_int
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.utils.device import resolve_device
from speechlm_ext.utils.text import counted

_LOG = logging.getLogger("speechlm_ext")
_DEFAULT_EVERY = {"lloyd": 1, "minibatch": 100}


class KMeans:
    """K-Means clustering by squared Euclidean distance.

    Every ``x`` below is a float ``[N, F]`` tensor or numpy array (float16, bfloat16, float32, float64; CPU or CUDA), a
    .npy or Parquet file, a list of such files, a folder of them, or a ``FeatureSource``.

    Args:
        n_clusters: K, at most the number of rows.
        init: ``"k-means++"`` (greedy, Arthur and Vassilvitskii 2007; k-means|| for large data), ``"k-means||"``
            (Bahmani et al. 2012), ``"random"`` (K distinct rows), or centroids ``[K, F]``.
        algorithm: ``"lloyd"``, or ``"minibatch"`` (Sculley 2010) for a good result after few passes over the data.
        max_iter: maximum number of passes over all rows; default 300, or 100 epochs of mini-batches.
        tol: stop when the squared shift of all centroids is at most ``tol`` times the mean variance of the features.
        batch_size: rows of a mini-batch, over all ranks.
        n_init: number of starts; the fit with the smallest inertia is kept.
        random_state: seed.
        max_no_improvement: stop after this many mini-batch steps without a lower smoothed inertia; None: never.
        reassignment_ratio: mini-batch: a centroid that saw less than this share of the busiest one's rows is moved.
        init_size: rows, drawn at random and held in memory, that the start is chosen from; default all rows, or for
            mini-batches three batches, at least ``3 K``.
        n_local_trials: seeding trials in k-means++, also in the last stage of k-means||: rows drawn for each centroid,
            of which the best is taken; None: ``2 + floor(ln K)``; 1: plain k-means++.
        nonfinite: a row with a NaN or an infinity is an ``"error"`` that names it, or is dropped (``"drop"``), counted
            in ``n_dropped_`` and labelled -1.
        distributed: True: the rows given to each process of ``torch.distributed`` are its share, in rank order, and all
            get one result; False: this process alone; ``"auto"``: True where it is initialized.
        device: where to compute: ``cpu``, ``cuda``, ``cuda:N``, ``auto``; default where ``x`` is, the CPU for files.
        block_rows: rows per block; default about 32 MiB.
        column: column of the features in Parquet files.
        progress: True or False for progress bars; default only on a terminal.

    Attributes:
        cluster_centers_: ``[K, F]`` float32, float64 for float64 features.
        counts_: int64 ``[K]``, rows of each cluster (after ``partial_fit`` alone: rows each centroid has seen).
        inertia_: sum of squared distances of the rows to ``cluster_centers_``; None for imported centroids.
        inertia_history_: inertia before each iteration and at the end; mini-batch: its smoothed estimate at each step.
        labels_: int32 ``[N]`` for an ``x`` in memory, consistent with ``cluster_centers_``; None for files.
        n_iter_: passes over all rows (mini-batch: epochs started). n_steps_: iterations, or mini-batch steps.
        n_features_in_: F. n_dropped_: dropped rows, of all ranks. n_rows_: rows used.
        features_: description of the features, as given to :meth:`save` or found by :meth:`load`.

    Every argument is also an attribute of its name; a new value takes effect at the next fit.

    Raises:
        KMeansError: (a ValueError) impossible settings, or a device that is not available.
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
        # scikit-learn's convention: each argument is an attribute of its name.
        vars(self).update({name: value for name, value in locals().items() if name != "self"})
        self.settings  # noqa: B018  checks the values
        check_positive_int("block_rows", block_rows, optional=True)
        self.device = None if device is None else resolve_device(device, KMeansError)
        self.distributed, self.block_rows = distributed, block_rows
        self.column, self.progress, self.nonfinite = column, progress, nonfinite
        self.features_: dict[str, Any] = {}

    @property
    def settings(self) -> Settings:
        """The arguments that determine the result, checked. Raises :class:`KMeansError`."""
        return Settings(**{f.name: getattr(self, f.name) for f in fields(Settings)})

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name, as scikit-learn's ``clone`` needs them; ``deep`` has no effect."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        s = self.settings
        return f"KMeans(n_clusters={s.n_clusters}, algorithm={s.algorithm!r}, random_state={s.random_state})"

    def fit(
        self,
        x: Any,
        y: None = None,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
    ) -> KMeans:
        """Fit the centroids.

        Args:
            x: rows; see the class.
            y: ignored; part of scikit-learn's convention.
            checkpoint: folder for the state of the fit. After an interruption the same call resumes from it and ends
                with the same bits as an uninterrupted fit.
            checkpoint_every: iterations (mini-batch: steps) between writes; default 1 (mini-batch: 100).

        Raises:
            KMeansError: unusable rows, or fewer finite rows than clusters.
            CheckpointError: the checkpoint is damaged, or of other settings or data.
            StorageError: the checkpoint cannot be written.
        """
        check_positive_int("checkpoint_every", checkpoint_every, optional=True)
        settings = self.settings
        data = self._scan(x)
        _check_num_rows(data, settings.n_clusters)
        store = None
        if checkpoint is not None:
            store = Checkpoint(checkpoint, data.ranks, settings.record(), data.identity())
        best, labels = fit_all_starts(
            data,
            settings,
            checkpoint=store,
            checkpoint_every=checkpoint_every or _DEFAULT_EVERY[settings.algorithm],
            with_labels=isinstance(x, (torch.Tensor, np.ndarray)),
        )
        self.cluster_centers_, self.counts_ = best.centers, best.counts
        self.inertia_, self.inertia_history_ = best.inertia, best.history
        self.n_steps_ = best.iterations
        steps_per_epoch = 1 if settings.algorithm == "lloyd" else data.num_batches(settings.batch_size)
        self.n_iter_ = -(-best.iterations // steps_per_epoch)
        self.labels_ = None if labels is None else _like(labels, x)
        self._state = State(centers=best.centers, seen=best.seen, iteration=best.iterations)
        self._set_data_counts(data)
        _warn_of_duplicates(best.centers)
        return self

    def partial_fit(self, x: Any, y: None = None) -> KMeans:
        """Take one mini-batch step with the given rows; the first call also chooses the start among them.

        All rows are held in memory; they may be the shares of several processes, as in :meth:`fit`. After
        :meth:`fit` or :meth:`load` it continues from those centroids and the rows they have seen.

        Raises:
            KMeansError: unusable rows, another number of features than before, or at first fewer rows than clusters.
        """
        data = self._scan(x)
        state: State | None = getattr(self, "_state", None)
        if state is None:
            _check_num_rows(data, self.settings.n_clusters)
            self.inertia_history_ = []
        else:
            self._check_width(data.source)
        state, inertia = partial_step(data, self.settings, state)
        self._state = state
        self.cluster_centers_, self.counts_ = state.centers, state.seen.round().to(torch.int64)
        self.inertia_, self.n_iter_, self.n_steps_, self.labels_ = inertia, 1, state.iteration, None
        self.inertia_history_ = [*self.inertia_history_, inertia]
        self._set_data_counts(data)
        return self

    def predict(self, x: Any) -> Any:
        """The nearest centroid of each row, exactly (float64 argmin, lowest index among ties).

        Returns:
            int32 ``[N]``: numpy for a numpy array, else a tensor (of this process's rows); -1 for a row that is not
            finite with ``nonfinite="drop"``.

        Raises:
            KMeansError: not fitted, rows with another number of features, or rows that are not finite.
        """
        centers = self._require_centers("predict")
        source = open_source(x, column=self.column)
        self._check_width(source)
        device = self.device or getattr(source, "device", None) or centers.device
        dtype = torch.promote_types(source.dtype, centers.dtype)
        index = CentroidIndex.build(centers.to(device=device, dtype=dtype))
        labels = torch.empty(source.num_rows, dtype=torch.int32, device=device)
        block_rows = self.block_rows or default_block_rows(source.num_features)
        for first, block in source.blocks(0, source.num_rows, block_rows):
            found = torch.as_tensor(kmeans_assign(block.to(device=device, dtype=dtype), index))
            if self.nonfinite == "error" and bool((found < 0).any()):
                raise nonfinite_row(source, first + int((found < 0).nonzero()[0]), "label them -1")
            labels[first : first + block.shape[0]] = found
        return _like(labels, x)

    def fit_predict(self, x: Any, y: None = None, **kwargs: Any) -> Any:
        """:meth:`fit`, then the labels of the rows, as :meth:`predict` gives them."""
        self.fit(x, **kwargs)
        return self.labels_ if self.labels_ is not None else self.predict(x)

    def score(self, x: Any, y: None = None) -> float:
        """Negative sum of squared distances of the rows (of all ranks) to their nearest centroids.

        Raises:
            KMeansError: not fitted, or unusable rows.
        """
        centers = self._require_centers("score")
        data = self._scan(x)
        self._check_width(data.source)
        return -assign_pass(data, centers.to(data.device)).inertia

    def save(self, folder: str | Path, *, features: Mapping[str, Any] | None = None) -> None:
        """Write ``kmeans.safetensors`` and ``kmeans.json`` into ``folder``, atomically.

        Args:
            folder: created if missing.
            features: JSON values that describe the features (encoder, layer, frame rate ...), stored with the
                centroids; default ``features_``.

        Raises:
            KMeansError: not fitted, or ``features`` are not JSON. StorageError: it cannot be written.
        """
        self._require_centers("save")
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
        model._set_fitted(fitted)
        return model

    @property
    def fingerprint(self) -> str:
        """sha256 over centroids, counts and the description of the features, 64 hex digits."""
        self._require_centers("fingerprint")
        return self._record().fingerprint

    def _record(self) -> artifact.Fitted:
        numbers = {name: getattr(self, f"{name}_") for name in artifact.NUMBERS}
        return artifact.Fitted(
            self.cluster_centers_, self.counts_, self.settings.record(), self.features_, **numbers
        )

    def _set_fitted(self, fitted: artifact.Fitted) -> None:
        """Set the fitted attributes from a loaded file."""
        self.cluster_centers_, self.counts_, self.labels_ = fitted.centers, fitted.counts, None
        self.n_features_in_ = int(fitted.centers.shape[1])
        self.features_ = fitted.features
        for name in artifact.NUMBERS:
            setattr(self, f"{name}_", getattr(fitted, name))
        self._state = State(fitted.centers, fitted.counts.double(), iteration=self.n_steps_)

    def _set_data_counts(self, data: Data) -> None:
        self.n_features_in_ = data.source.num_features
        self.n_dropped_, self.n_rows_ = data.num_dropped, data.num_usable

    def _scan(self, x: Any) -> Data:
        ranks, source, error = Ranks.join(self.distributed), None, None
        try:
            source = open_source(x, column=self.column)
        except KMeansError as caught:
            error = caught
        ranks.raise_any(error)
        return scan(
            source,  # type: ignore[arg-type]
            ranks,
            nonfinite=self.nonfinite,
            device=self.device,
            block_rows=self.block_rows,
            progress=self.progress,
        )

    def _require_centers(self, purpose: str) -> Tensor:
        if not hasattr(self, "cluster_centers_"):
            raise KMeansError(
                f"K-Means: {purpose} needs centroids; call fit or partial_fit first, or KMeans.load(folder)."
            )
        return self.cluster_centers_

    def _check_width(self, source: FeatureSource) -> None:
        if source.num_features != self.n_features_in_:
            raise KMeansError(
                f"features: expected {counted(self.n_features_in_, 'feature')} in each row, as in the fit, got "
                f"{source.num_features}; use the encoder and layer that the centroids were fitted on."
            )


def _check_num_rows(data: Data, num_clusters: int) -> None:
    if data.num_usable < num_clusters:
        dropped = f" ({data.num_dropped} more are not finite)" if data.num_dropped else ""
        raise KMeansError(
            f"K-Means: {num_clusters} clusters need at least as many rows, got {data.num_usable}{dropped}. Give more "
            f"features to fit on, or ask for at most {counted(data.num_usable, 'cluster')}."
        )


def _warn_of_duplicates(centers: Tensor) -> None:
    num_distinct = int(torch.unique(centers, dim=0).shape[0])
    if num_distinct < centers.shape[0]:
        _LOG.warning(
            "K-Means: %d of %d centroids are distinct: the features have too few different rows. The others are "
            "duplicates that no row is assigned to; ask for fewer clusters.",
            num_distinct,
            centers.shape[0],
        )


def _like(labels: Tensor, x: Any) -> Any:
    return labels.numpy() if isinstance(x, np.ndarray) and labels.device.type == "cpu" else labels
