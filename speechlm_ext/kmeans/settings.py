"""Settings of a K-Means fit and their checks."""

from __future__ import annotations

import hashlib
import numbers
from dataclasses import dataclass, fields
from typing import Any, Literal

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.fit.seeding import METHODS, given_centers


@dataclass(frozen=True)
class Settings:
    """What decides a fit, besides the data. Raises :class:`KMeansError` for impossible values."""

    n_clusters: int
    init: Any = "k-means++"
    algorithm: Literal["lloyd", "minibatch"] = "lloyd"
    max_iter: int = 300
    tol: float = 1e-4
    n_init: int = 1
    random_state: int = 0
    nonfinite: Literal["error", "drop"] = "error"
    batch_size: int = 10000
    max_no_improvement: int | None = 10
    reassignment_ratio: float = 0.01
    init_size: int | None = None
    n_local_trials: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_clusters", "max_iter", "n_init", "batch_size"):
            self._check(
                name, is_whole(getattr(self, name)) and getattr(self, name) >= 1, "a whole number from 1"
            )
        for name in ("max_no_improvement", "init_size", "n_local_trials"):
            value = getattr(self, name)
            self._check(
                name, value is None or (is_whole(value) and value >= 1), "None or a whole number from 1"
            )
        self._check("random_state", is_whole(self.random_state), "a whole number")
        self._check("tol", _is_number(self.tol) and 0 <= self.tol < float("inf"), "a number from 0")
        ratio = self.reassignment_ratio
        self._check("reassignment_ratio", _is_number(ratio) and 0 <= ratio < 1, "a number in [0, 1)")
        self._check("algorithm", self.algorithm in ("lloyd", "minibatch"), "'lloyd' or 'minibatch'")
        self._check("nonfinite", self.nonfinite in ("error", "drop"), "'error' or 'drop'")
        if isinstance(self.init, str):
            self._check(
                "init", self.init in METHODS, f"one of {', '.join(METHODS)} or an array [n_clusters, F]"
            )
        else:
            given_centers(self.init)
            if self.n_init != 1:
                raise KMeansError(
                    f"K-Means: n_init={self.n_init} with an array as init would fit the same thing again; set n_init=1."
                )
        draws_one_by_one = isinstance(self.init, str) and self.init != "random"
        if self.n_local_trials is not None and not draws_one_by_one:
            raise KMeansError(
                f"K-Means: n_local_trials={self.n_local_trials} is for the starts k-means++ and k-means||, which "
                "draw their centroids one by one; leave it out with another init."
            )
        if self.init_size is not None and self.init_size < self.n_clusters:
            raise KMeansError(
                f"K-Means: init_size={self.init_size} rows cannot start {self.n_clusters} clusters; give as many."
            )

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise KMeansError(f"K-Means: {name} should be {expected}; got {getattr(self, name)!r}.")

    def record(self) -> dict[str, Any]:
        """As JSON values; an array as init becomes its sha256."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "init"}
        if isinstance(self.init, str):
            return {**values, "init": self.init}
        array = given_centers(self.init).detach().cpu().double().contiguous()
        return {**values, "init": "array " + hashlib.sha256(array.numpy().tobytes()).hexdigest()}


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if is_whole(value):
        return int(value)
    return float(value) if _is_number(value) else value


def is_whole(value: Any) -> bool:
    """Whether it is a whole number of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
