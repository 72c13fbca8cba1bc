"""How tokens are chosen and how long a target may be: the settings of a request.

Numbers are checked when settings are made, with the ranges that the sampler can hold, so that one request's values can
never stop a batch. What needs the model (how many streams there are, what the context holds) is checked when the prompt
is built. Lengths count content frames: text tokens for text, codec frames for speech.

Axes: S streams.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm_ext.errors import GenerationError

#: Longest target when neither the request nor the model's context says less.
DEFAULT_MAX_LEN = 2048
#: Most tries, results or beginnings of one request: each takes a row of the batch.
MAX_ROWS = 1024
#: The sampler counts rows and ids in 32 bits.
MAX_COUNT = 2**31 - 1
#: Settings that may be a list with a value for each stream.
PER_STREAM = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window")

_WHERE = "sampling settings"


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
    """Divides the logits before sampling; from 0.001 to 1000. In a list 0 stands for the most probable token."""
    codec_temperature: float | None = None
    """Temperature of the streams behind the first one; 0 takes their most probable code. The first stream decides what
    is said, the others how it sounds: sampling only the first varies the words' course and keeps the sound clean. None:
    ``temperature`` for all streams."""
    top_k: int | Sequence[int] | None = None
    """Sample among the k most probable tokens only; >= 1."""
    top_p: float | Sequence[float] | None = None
    """Sample among the fewest tokens whose probabilities reach p; 0 < p <= 1."""
    min_p: float | Sequence[float] | None = None
    """Leave out tokens that are less probable than this times the most probable one; 0 <= p <= 1."""
    repetition_penalty: float | Sequence[float] = 1.0
    """Divides positive and multiplies negative logits of ids that the stream had in the last ``repetition_window``
    rows; > 0, 1 is off."""
    repetition_window: int | Sequence[int] = 50
    """Rows that the repetition penalty looks back; 50 is a second at 50 frames a second."""
    guidance: float = 1.0
    """Classifier-free guidance: logits ``u + guidance (c - u)``, c with the task's conditions and u without them. 1 is
    off; more costs a second row of the batch. Made for models that were trained with conditions left out at times."""
    beam_size: int = 1
    """Beam search over so many beginnings, for text and units; 1 is off. Takes no other choice of tokens."""
    length_penalty: float = 1.0
    """Beam search compares ``log p / tokens^length_penalty``; 0 favours short targets. From -10 to 10."""
    seed: int = 0
    """Draws depend on (seed, row, stream) alone: equal requests give equal tokens in any batch, and no two streams
    share a draw."""
    n_best: int = 1
    """Results that are given back: with beam search the best ones, the best first; else samples with seeds from
    ``seed`` on. The prompt is read once."""
    best_of: int = 1
    """Tries at speaking a text, with seeds from ``seed`` on; the one in which the model itself recognises the text best
    is kept. Needs a model that was trained on recognition too."""
    min_len: int = 1
    """Fewest content frames before the end may come; counted without a continuation's given part."""
    min_len_ratio: float | None = None
    """Fewest content frames as a multiple of the prompt's content frames; instead of ``min_len``."""
    max_len: int | None = None
    """Most content frames; the end is forced there. None: as many as the context holds, at most 2048."""
    max_len_ratio: float | None = None
    """Most content frames as a multiple of the prompt's content frames; instead of ``max_len``."""

    def __post_init__(self) -> None:
        if not (self.greedy is None or isinstance(self.greedy, bool)):
            raise GenerationError(f"{_WHERE}: greedy must be true or false, got {self.greedy!r}.")
        # Lists become tuples, so that settings stay plain frozen data.
        for name in PER_STREAM:
            value = getattr(self, name)
            if isinstance(value, (list, tuple, np.ndarray)):
                object.__setattr__(self, name, tuple(np.asarray(value, dtype=object).tolist()))
        self._check_choices()
        self._check_search()
        self._check_lengths()

    def _check_choices(self) -> None:
        for value in self.values("temperature"):
            number(value, "temperature", _WHERE)
            if not value > 0 and not (isinstance(self.temperature, tuple) and value == 0):
                raise GenerationError(
                    f"{_WHERE}: temperature must be greater than 0, got {value}; set greedy for "
                    "the most probable token."
                )
            if value != 0:
                _within(value, "temperature", 1e-3, 1e3)
        if isinstance(self.temperature, tuple) and self.codec_temperature is not None:
            raise GenerationError(
                f"{_WHERE}: temperature already has a value for each stream; leave codec_temperature out."
            )
        if self.codec_temperature is not None:
            number(self.codec_temperature, "codec_temperature", _WHERE)
            if self.codec_temperature < 0:
                raise GenerationError(
                    f"{_WHERE}: codec_temperature must be 0 (the most probable code) or more, got "
                    f"{self.codec_temperature}."
                )
            if self.codec_temperature != 0:
                _within(self.codec_temperature, "codec_temperature", 1e-3, 1e3)
        for value in self.values("top_k"):
            integer(value, "top_k", _WHERE, 1)
        for value in self.values("top_p"):
            number(value, "top_p", _WHERE)
            if not 0 < value <= 1:
                raise GenerationError(f"{_WHERE}: top_p must be greater than 0 and at most 1, got {value}.")
        for name, least, most in (("min_p", 0, 1), ("repetition_penalty", 1e-3, 1e3), ("guidance", 0, 1e3)):
            for value in self.values(name):
                number(value, name, _WHERE)
                _within(value, name, least, most)
        for value in self.values("repetition_window"):
            integer(value, "repetition_window", _WHERE, 1)

    def _check_search(self) -> None:
        for name in ("beam_size", "n_best", "best_of"):
            integer(getattr(self, name), name, _WHERE, 1, MAX_ROWS)
        number(self.length_penalty, "length_penalty", _WHERE)
        _within(self.length_penalty, "length_penalty", -10, 10)
        integer(self.seed, "seed", _WHERE, 0)
        if self.seed >= 2**63:
            raise GenerationError(f"{_WHERE}: seed must be below 2**63, got {self.seed}.")
        if self.beam_size > 1:
            names = ("greedy", "temperature", "codec_temperature", "top_k", "top_p", "min_p")
            given = [n for n in names if getattr(self, n) is not None]
            given += [n for n in ("guidance", "repetition_penalty", "best_of") if getattr(self, n) != 1]
            if given:
                raise GenerationError(f"{_WHERE}: beam search takes no {', '.join(given)}; leave it out.")
            if self.n_best > self.beam_size:
                raise GenerationError(
                    f"{_WHERE}: n_best {self.n_best} needs a beam_size of at least as many, got {self.beam_size}."
                )
        for name in ("n_best", "best_of"):
            if getattr(self, name) > 1 and self.greedy:
                raise GenerationError(f"{_WHERE}: greedy gives one result; leave it out, or set {name} to 1.")
        if self.n_best > 1 and self.best_of > 1:
            raise GenerationError(f"{_WHERE}: n_best and best_of are both given; give one of them.")

    def _check_lengths(self) -> None:
        integer(self.min_len, "min_len", _WHERE, 0)
        for name in ("min_len_ratio", "max_len_ratio"):
            ratio = getattr(self, name)
            if ratio is not None:
                number(ratio, name, _WHERE)
                if not ratio > 0:
                    raise GenerationError(f"{_WHERE}: {name} must be greater than 0, got {ratio}.")
        if self.min_len_ratio is not None and self.min_len != 1:
            raise GenerationError(f"{_WHERE}: min_len and min_len_ratio are both given; give one of them.")
        if self.max_len is not None:
            integer(self.max_len, "max_len", _WHERE, 1)
            if self.max_len_ratio is not None:
                raise GenerationError(
                    f"{_WHERE}: max_len and max_len_ratio are both given; give one of them."
                )
            if self.max_len < self.min_len:
                raise GenerationError(
                    f"{_WHERE}: the target can never end: min_len {self.min_len} is more than max_len "
                    f"{self.max_len}."
                )
        if self.max_len_ratio is not None and (self.min_len_ratio or 0) > self.max_len_ratio:
            raise GenerationError(
                f"{_WHERE}: the target can never end: min_len_ratio {self.min_len_ratio} is more than max_len_ratio "
                f"{self.max_len_ratio}."
            )

    def values(self, name: str) -> tuple[Any, ...]:
        """What a setting says: its one value, those of all streams, or nothing."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else () if value is None else (value,)

    def per_stream(self, name: str, num_streams: int, missing: float) -> list[float]:
        """A setting's value for each stream, at most what the sampler can hold; ``missing`` where it is None."""
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else [missing if value is None else value] * num_streams
        return [min(v, MAX_COUNT) for v in values]

    def check_streams(self, names: Sequence[str], where: str) -> None:
        """Compare lists with the streams of a layout. Raises :class:`GenerationError` for another number of values."""
        for name in PER_STREAM:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(names):
                raise GenerationError(
                    f"{where}: {name} has {len(value)} values, but the model has {len(names)} streams "
                    f"({', '.join(names)}); give one value for all, or one for each."
                )

    def lengths(self, num_content: int, where: str) -> tuple[int, int]:
        """Fewest and most frames of a target, for a prompt of ``num_content`` content frames.

        Raises:
            GenerationError: a ratio of nothing, or fewest is more than most.
        """
        for name in ("min_len_ratio", "max_len_ratio"):
            if getattr(self, name) is not None and num_content == 0:
                instead = name.removesuffix("_ratio")
                raise GenerationError(f"{where}: {name} needs a prompt with content; give {instead} instead.")
        least = self.min_len
        if self.min_len_ratio is not None:
            least = max(math.ceil(min(self.min_len_ratio * num_content, MAX_COUNT)), 1)
        if self.max_len is not None:
            most = self.max_len
        elif self.max_len_ratio is not None:
            most = max(math.ceil(min(self.max_len_ratio * num_content, MAX_COUNT)), 1)
        else:
            most = max(DEFAULT_MAX_LEN, least)
        if most < least:
            frames = f"the prompt's {num_content} frames"
            low = f"min_len {least}" + (
                ""
                if self.min_len_ratio is None
                else f", which is min_len_ratio {self.min_len_ratio} times {frames},"
            )
            high = (
                f"max_len {most}"
                if self.max_len is not None
                else f"{most}, which is max_len_ratio {self.max_len_ratio} times {frames}"
            )
            raise GenerationError(f"{where}: the target can never end: {low} is more than {high}.")
        return least, most

    def resolved(self, modality: str) -> SamplingSettings:
        """Settings with every choice made, for a target of ``modality``."""
        if self.beam_size > 1:  # the search makes the choices
            return self
        if modality in ("text_bpe", "g2p"):
            # Asking for a temperature or a cut, or for several samples, is asking to sample.
            asks = any(c is not None for c in (self.temperature, self.top_k, self.top_p, self.min_p))
            greedy = self.greedy if self.greedy is not None else not asks and self.n_best == 1
            temperature = 1.0 if self.temperature is None else self.temperature
            return dataclasses.replace(self, greedy=greedy, temperature=temperature)
        top_k = 30 if self.top_k is None and self.top_p is None else self.top_k
        temperature = 0.8 if self.temperature is None else self.temperature
        return dataclasses.replace(self, greedy=bool(self.greedy), temperature=temperature, top_k=top_k)


def integer(value: Any, name: str, where: str, least: int, most: int | None = None) -> None:
    """Raise :class:`GenerationError` for what is not an integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise GenerationError(f"{where}: {name} must be an integer of at least {least}, got {value!r}.")
    if most is not None and value > most:
        raise GenerationError(f"{where}: {name} must be at most {most}, got {value!r}.")


def number(value: Any, name: str, where: str) -> None:
    """Raise :class:`GenerationError` for what is not a finite number."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    try:
        is_finite = is_number and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        is_finite = False
    if not is_finite:
        raise GenerationError(f"{where}: {name} must be a finite number, got {value!r}.")


def _within(value: float, name: str, least: float, most: float) -> None:
    if not least <= value <= most:
        raise GenerationError(f"{_WHERE}: {name} must be from {least:g} to {most:g}, got {value}.")
