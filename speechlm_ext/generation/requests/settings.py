"""Settings of a request: how tokens are chosen and how long a target may be.

Numbers are checked when settings are made, within the ranges that the sampler can hold, so that one request cannot stop
a batch. What needs the model (number of streams, context) is checked when the prompt is built. Lengths count content
frames: text tokens for text, codec frames for speech.

Axes: S streams.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from speechlm_ext.errors import GenerationError

#: Maximum length of a target when neither the request nor the model's context sets one.
DEFAULT_MAX_LEN = 2048
#: Maximum of a request's tries, results or beams: each takes a row of the batch.
MAX_ROWS = 1024
#: The sampler counts rows and ids in 32 bits.
MAX_COUNT = 2**31 - 1

_WHERE = "sampling settings"


class Bounds(NamedTuple):
    """Values that a setting may have, both ends included."""

    low: float
    high: float = math.inf
    is_integer: bool = False
    per_stream: bool = False
    """One value for all streams, or one for each."""
    is_open: bool = False
    """Without ``low`` itself."""
    or_zero: bool = False
    """0 is allowed besides."""

    def __str__(self) -> str:
        kind = ("0 or " if self.or_zero else "") + ("an integer" if self.is_integer else "a finite number")
        high = self.high if self.is_integer else f"{self.high:g}"
        if self.is_open:
            return f"{kind} greater than {self.low:g}" + (
                "" if self.high == math.inf else f" and at most {high}"
            )
        return (
            f"{kind} of at least {self.low:g}"
            if self.high == math.inf
            else f"{kind} from {self.low:g} to {high}"
        )

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is such a number."""
        kinds = (int, np.integer) if self.is_integer else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) < math.inf:
            return False
        if value == 0 and self.or_zero:
            return True
        return (self.low < value if self.is_open else self.low <= value) and value <= self.high


_COUNT = Bounds(1, is_integer=True)
_RANGES = {
    "temperature": Bounds(1e-3, 1e3, per_stream=True),
    "codec_temperature": Bounds(1e-3, 1e3, or_zero=True),
    "top_k": _COUNT._replace(per_stream=True),
    "top_p": Bounds(0, 1, per_stream=True, is_open=True),
    "min_p": Bounds(0, 1, per_stream=True),
    "repetition_penalty": Bounds(1e-3, 1e3, per_stream=True),
    "repetition_window": _COUNT._replace(per_stream=True),
    "guidance": Bounds(0, 1e3),
    "beam_size": _COUNT._replace(high=MAX_ROWS),
    "length_penalty": Bounds(-10, 10),
    "seed": Bounds(0, 2**63 - 1, is_integer=True),
    "n_best": _COUNT._replace(high=MAX_ROWS),
    "best_of": _COUNT._replace(high=MAX_ROWS),
    "min_len": Bounds(0, is_integer=True),
    "min_len_ratio": Bounds(0, is_open=True),
    "max_len": _COUNT,
    "max_len_ratio": Bounds(0, is_open=True),
}
#: Settings that may be a list with a value for each stream.
PER_STREAM = tuple(name for name, values in _RANGES.items() if values.per_stream)


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen and how long a target may be.

    Fields left at None take the default of the target's modality (:meth:`resolved`): greedy for text;
    temperature 0.8 and top-k 30 for speech, the usual choice for codec tokens.

    ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and ``repetition_window`` are one value for
    all streams, or a list with one for each stream of the model's layout, of which a target uses those of its streams.
    """

    greedy: bool | None = None
    """Take the most probable token (the lowest id among equals) and ignore the other choices."""
    temperature: float | Sequence[float] | None = None
    """Divides the logits before sampling; from 0.001 to 1000. In a list, 0 takes the stream's most probable token."""
    codec_temperature: float | None = None
    """Temperature of all streams but the first; 0 takes their most probable code. The first stream carries the words,
    the others the sound: sampling only the first varies the wording's rhythm and keeps the sound clean. None:
    ``temperature`` for all streams."""
    top_k: int | Sequence[int] | None = None
    """Sample among the k most probable tokens only; >= 1."""
    top_p: float | Sequence[float] | None = None
    """Sample among the smallest set of tokens whose probabilities reach p; 0 < p <= 1."""
    min_p: float | Sequence[float] | None = None
    """Drop tokens that are less probable than this times the most probable one; 0 <= p <= 1."""
    repetition_penalty: float | Sequence[float] = 1.0
    """Divides positive and multiplies negative logits of ids that the stream had in the last ``repetition_window``
    rows; > 0, 1 is off."""
    repetition_window: int | Sequence[int] = 50
    """Rows that the repetition penalty covers; 50 is a second at 50 frames a second."""
    guidance: float = 1.0
    """Classifier-free guidance: logits ``u + guidance (c - u)``, c with the task's conditions and u without them. 1 is
    off; more costs a second row of the batch. For models trained with conditions dropped at random."""
    beam_size: int = 1
    """Number of beams, for text and units; 1 is off. Excludes the sampling settings."""
    length_penalty: float = 1.0
    """Beam search compares ``log p / tokens^length_penalty``; 0 favors short targets. From -10 to 10."""
    seed: int = 0
    """Draws depend on (seed, row, stream) alone: equal requests give equal tokens in any batch, and no two streams
    share a draw."""
    n_best: int = 1
    """Number of results: with beam search the best ones, best first; else samples with seeds from ``seed`` on. The
    prompt is prefilled once."""
    best_of: int = 1
    """Number of tries at speaking a text, with seeds from ``seed`` on; the result is the one in which the model itself
    recognizes the text best. Needs a model that is trained on recognition too."""
    min_len: int = 1
    """Minimum number of new content frames; a continuation's given frames do not count."""
    min_len_ratio: float | None = None
    """Minimum as a multiple of the prompt's content frames; instead of ``min_len``."""
    max_len: int | None = None
    """Maximum number of new content frames, where the end is forced. None: what the context holds, up to 2048."""
    max_len_ratio: float | None = None
    """Maximum as a multiple of the prompt's content frames; instead of ``max_len``."""

    def __post_init__(self) -> None:
        if not (self.greedy is None or isinstance(self.greedy, bool)):
            raise GenerationError(f"{_WHERE}: greedy must be true or false, got {self.greedy!r}.")
        # Lists become tuples, so that settings stay plain frozen data.
        for name in PER_STREAM:
            value = getattr(self, name)
            if isinstance(value, (list, tuple, np.ndarray)):
                object.__setattr__(self, name, tuple(np.asarray(value, dtype=object).tolist()))
        for name, values in _RANGES.items():
            self._check_range(name, values)
        if isinstance(self.temperature, tuple) and self.codec_temperature is not None:
            raise GenerationError(
                f"{_WHERE}: temperature already has a value for each stream; leave codec_temperature out."
            )
        self._check_search()
        self._check_lengths()

    def _check_range(self, name: str, values: Bounds) -> None:
        setting = getattr(self, name)
        if setting is None and getattr(type(self), name) is None:  # the default
            return
        is_list = values.per_stream and isinstance(setting, tuple)
        if is_list and name == "temperature":
            values = values._replace(or_zero=True)
        for value in setting if is_list else (setting,):
            if not values.holds(value):
                hint = (
                    "; set greedy for the most probable token" if name == "temperature" and value == 0 else ""
                )
                raise GenerationError(f"{_WHERE}: {name} must be {values}, got {value!r}{hint}.")

    def _check_search(self) -> None:
        if self.beam_size > 1:
            sampling = ("greedy", "temperature", "codec_temperature", "top_k", "top_p", "min_p")
            given = self.changed(*sampling, "guidance", "repetition_penalty", "best_of")
            if given:
                raise GenerationError(f"{_WHERE}: beam search takes no {', '.join(given)}; leave it out.")
            if self.n_best > self.beam_size:
                raise GenerationError(
                    f"{_WHERE}: n_best {self.n_best} needs a beam_size of at least as many, got {self.beam_size}."
                )
        for name in self.changed("n_best", "best_of") if self.greedy else ():
            raise GenerationError(f"{_WHERE}: greedy gives one result; leave it out, or set {name} to 1.")
        if self.n_best > 1 and self.best_of > 1:
            raise GenerationError(f"{_WHERE}: n_best and best_of are both given; give one of them.")

    def _check_lengths(self) -> None:
        for name in ("min_len", "max_len"):
            if self.changed(name) and getattr(self, f"{name}_ratio") is not None:
                raise GenerationError(f"{_WHERE}: {name} and {name}_ratio are both given; give one of them.")
        pairs = [("min_len_ratio", "max_len_ratio")]
        if self.min_len_ratio is None:
            pairs.append(("min_len", "max_len"))
        for name_low, name_high in pairs:
            low, high = getattr(self, name_low), getattr(self, name_high)
            if low is not None and high is not None and low > high:
                raise GenerationError(
                    f"{_WHERE}: the target can never end: {name_low} {low} is more than {name_high} {high}."
                )

    def changed(self, *names: str) -> list[str]:
        """Those of the settings ``names`` that differ from their defaults."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]

    @property
    def num_tries(self) -> int:
        """Sequences that are decoded for a request; a beam search is one."""
        return 1 if self.beam_size > 1 else max(self.best_of, self.n_best)

    def per_stream(self, name: str, num_streams: int, missing: float) -> list[float]:
        """A setting's value for each stream, at most what the sampler can hold; ``missing`` where it is None."""
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else [missing if value is None else value] * num_streams
        return [min(v, MAX_COUNT) for v in values]

    def check_streams(self, names: Sequence[str], where: str) -> None:
        """Raise :class:`GenerationError` unless lists have a value for each of the streams ``names``."""
        for name in PER_STREAM:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(names):
                raise GenerationError(
                    f"{where}: {name} has {len(value)} values, but the model has {len(names)} streams "
                    f"({', '.join(names)}); give one value for all, or one for each."
                )

    def lengths(self, num_content: int, where: str) -> tuple[int, int]:
        """Minimum and maximum frames of a target, for a prompt of ``num_content`` content frames."""
        low, low_text = self._length("min_len", num_content, where)
        high, high_text = self._length("max_len", num_content, where)
        if self.max_len is None and self.max_len_ratio is None:
            high = max(DEFAULT_MAX_LEN, low)
        if high < low:
            raise GenerationError(f"{where}: the target can never end: {low_text} is more than {high_text}.")
        return low, high

    def _length(self, name: str, num_content: int, where: str) -> tuple[int, str]:
        """``min_len`` or ``max_len`` in frames, and its description."""
        length, ratio = getattr(self, name), getattr(self, f"{name}_ratio")
        if ratio is None:
            return length or 0, f"{name} {length}"
        if num_content == 0:
            raise GenerationError(f"{where}: {name}_ratio needs a prompt with content; give {name} instead.")
        length = max(math.ceil(min(ratio * num_content, MAX_COUNT)), 1)
        return length, f"{name} {length} ({name}_ratio {ratio} times the prompt's {num_content} frames)"

    def resolved(self, modality: str) -> SamplingSettings:
        """Settings with the defaults of a target's ``modality`` filled in."""
        if self.beam_size > 1:  # nothing is sampled
            return self
        if modality in ("text_bpe", "g2p"):
            # A temperature, a cut or several results mean sampling.
            samples = bool(self.changed("temperature", "top_k", "top_p", "min_p", "n_best"))
            greedy = not samples if self.greedy is None else self.greedy
            temperature = 1.0 if self.temperature is None else self.temperature
            return dataclasses.replace(self, greedy=greedy, temperature=temperature)
        top_k = 30 if self.top_k is None and self.top_p is None else self.top_k
        temperature = 0.8 if self.temperature is None else self.temperature
        return dataclasses.replace(self, greedy=bool(self.greedy), temperature=temperature, top_k=top_k)


def check_integer(value: Any, name: str, where: str, low: int) -> None:
    """Raise :class:`GenerationError` unless ``value`` is an integer of at least ``low``."""
    values = Bounds(low, is_integer=True)
    if not values.holds(value):
        raise GenerationError(f"{where}: {name} must be {values}, got {value!r}.")
