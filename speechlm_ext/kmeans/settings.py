"""Settings of a K-Means fit and their checks."""

from __future__ import annotations

import hashlib
import numbers
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError

INIT_METHODS = ("k-means++", "k-means||", "random")
_DEFAULT_MAX_ITER = {"lloyd": 300, "minibatch": 100}


@dataclass(frozen=True)
class Settings:
    """The arguments of :class:`~speechlm_ext.kmeans.KMeans` that determine the result, checked."""

    n_clusters: int
    algorithm: Literal["lloyd", "minibatch"]
    max_iter: int
    tol: float
    n_init: int
    random_state: int
    nonfinite: Literal["error", "drop"]
    batch_size: int
    max_no_improvement: int | None
    reassignment_ratio: float
    init_size: int | None
    n_local_trials: int | None
    init: Any

    def __post_init__(self) -> None:
        self._check("algorithm", self.algorithm in tuple(_DEFAULT_MAX_ITER), "'lloyd' or 'minibatch'")
        if self.max_iter is None:
            object.__setattr__(self, "max_iter", _DEFAULT_MAX_ITER[self.algorithm])
        for name in ("n_clusters", "max_iter", "n_init", "batch_size"):
            check_positive_int(name, getattr(self, name))
        for name in ("max_no_improvement", "init_size", "n_local_trials"):
            check_positive_int(name, getattr(self, name), optional=True)
        self._check("random_state", _is_int(self.random_state), "an integer")
        self._check("tol", _is_number(self.tol) and 0 <= self.tol < float("inf"), "a number >= 0")
        ratio = self.reassignment_ratio
        self._check("reassignment_ratio", _is_number(ratio) and 0 <= ratio < 1, "a number in [0, 1)")
        self._check("nonfinite", self.nonfinite in ("error", "drop"), "'error' or 'drop'")
        is_array = not isinstance(self.init, str)
        if is_array:
            init_array(self.init)
        else:
            self._check(
                "init",
                self.init in INIT_METHODS,
                f"one of {', '.join(INIT_METHODS)} or an array [n_clusters, F]",
            )
        if is_array and self.n_init != 1:
            raise KMeansError(
                f"K-Means: n_init = {self.n_init} with an array as init would repeat the same fit; set n_init to 1.",
                argument="n_init",
            )
        if self.n_local_trials is not None and (is_array or self.init == "random"):
            raise KMeansError(
                f"K-Means: n_local_trials = {self.n_local_trials} only applies to the init methods k-means++ and "
                "k-means||; leave it out with another init.",
                argument="n_local_trials",
            )
        if self.init_size is not None and self.init_size < self.n_clusters:
            raise KMeansError(
                f"K-Means: init_size = {self.init_size} rows are too few for {self.n_clusters} clusters; give at "
                "least as many rows as clusters.",
                argument="init_size",
            )

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise KMeansError(
                f"K-Means: {name} must be {expected}, got {getattr(self, name)!r}.", argument=name
            )

    def record(self) -> dict[str, Any]:
        """As JSON values; an array as init becomes its sha256."""
        values = {f.name: _to_python(getattr(self, f.name)) for f in fields(self)}
        if not isinstance(self.init, str):
            array = init_array(self.init).detach().cpu().double().contiguous()
            values["init"] = "array " + hashlib.sha256(array.numpy().tobytes()).hexdigest()
        return values


def init_array(init: Any) -> Tensor:
    """Centroids given as ``init``, as a tensor. Raises :class:`KMeansError`: no array of numbers."""
    try:
        return torch.as_tensor(init)
    except (RuntimeError, TypeError, ValueError) as error:
        raise KMeansError(
            f"K-Means: init must be one of {', '.join(INIT_METHODS)} or a float array [n_clusters, F] with rows of one "
            f"length, got a {type(init).__name__} that is no such array ({error}). Give a tensor or a numpy array.",
            argument="init",
        ) from None


def check_positive_int(name: str, value: Any, *, optional: bool = False) -> None:
    """Raises :class:`KMeansError`: the argument ``name`` is neither an integer >= 1 nor, if ``optional``, None."""
    if not (_is_int(value) and value >= 1 or optional and value is None):
        expected = "None or an integer >= 1" if optional else "an integer >= 1"
        raise KMeansError(f"K-Means: {name} must be {expected}, got {value!r}.", argument=name)


def _is_int(value: Any) -> bool:
    """Whether it is an integer of Python or NumPy; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _to_python(value: Any) -> Any:
    """NumPy scalars as Python numbers."""
    if _is_int(value):
        return int(value)
    return float(value) if _is_number(value) else value
