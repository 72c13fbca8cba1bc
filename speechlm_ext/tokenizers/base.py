"""The protocol of every tokenizer, and the registry of their kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm_ext.errors import TokenizerError
from speechlm_ext.tokenizers.artifact import read_record


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text or sound to ids and back."""

    kind: str
    """Name in the registry: ``sentencepiece``, ``huggingface``, ``mfcc-kmeans``, ``encoder-kmeans``, ``rvq-kmeans``,
    or yours."""
    modality: str
    """``text_bpe``, ``ssl`` or ``codec``."""
    vocab_sizes: tuple[int, ...]
    """Ids per stream: ``(V,)`` for text and ssl, e.g. ``(256,) * 8`` for a codec."""
    frame_rate: float | None
    """Frames per second; None for text."""
    sample_rate: int | None
    """Hz of the waveforms that ``encode`` takes and ``decode`` gives; None for text."""

    @property
    def fingerprint(self) -> str:
        """sha256 over settings and arrays, 64 hex digits; equal exactly when ids mean the same."""
        ...

    def encode(self, x: Any) -> np.ndarray:
        """Text (str) or waveform (float32 ``[n]``) → int32 ``[T, len(vocab_sizes)]``, ids from 0."""
        ...

    def decode(self, ids: np.ndarray) -> Any:
        """``[T, len(vocab_sizes)]`` ids → str, or float32 waveform in [-1, 1]."""
        ...

    def save(self, folder: Path) -> None:
        """Write the artifact into ``folder``."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the artifact that ``save`` wrote."""
        ...


_REGISTRY: dict[str, Any] = {}


def register_tokenizer(kind: str, cls: type) -> None:
    """Make ``cls`` the tokenizer of ``kind``, so that :func:`load_tokenizer` finds it.

    Raises:
        TokenizerError: another class has that kind already.
    """
    known = _REGISTRY.get(kind)
    if known is not None and known is not cls:
        raise TokenizerError(
            f"tokenizer kind {kind!r} is already {known.__name__}; choose another name for {cls.__name__}."
        )
    _REGISTRY[kind] = cls


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load any registered tokenizer from its folder.

    Raises:
        TokenizerError: no artifact there, a damaged one, or a kind that is not registered.
    """
    folder = Path(folder)
    kind = read_record(folder)["kind"]
    if kind not in _REGISTRY:
        raise TokenizerError(
            f"{folder} holds a tokenizer of kind {kind[:80]!r}; known are {sorted(_REGISTRY)}. Import the module "
            f"that registers it."
        )
    return _REGISTRY[kind].load(folder)


def check_ids(ids: Any, vocab_sizes: tuple[int, ...], what: str) -> np.ndarray:
    """Return ``ids`` as int64 ``[T, len(vocab_sizes)]`` after checking shape, type and range.

    A one-dimensional array is accepted for one stream.

    Raises:
        TokenizerError: anything that is not such ids; names the first position.
    """
    ids = np.asarray(ids)
    if ids.ndim == 1 and len(vocab_sizes) == 1:
        ids = ids[:, None]
    if ids.ndim != 2 or ids.shape[1] != len(vocab_sizes) or not np.issubdtype(ids.dtype, np.integer):
        raise TokenizerError(
            f"{what}: expected integer ids [T, {len(vocab_sizes)}], got {ids.dtype} {list(ids.shape)}; ids "
            "are raw, without layout offsets or delays."
        )
    ids = ids.astype(np.int64)
    wrong = np.argwhere((ids < 0) | (ids >= np.asarray(vocab_sizes)))
    if len(wrong):
        t, s = (int(i) for i in wrong[0])
        raise TokenizerError(
            f"{what}: id {ids[t, s]} at frame {t}, stream {s} is outside [0, {vocab_sizes[s]}); remove "
            "layout offsets and special ids first."
        )
    return ids


def check_text(x: Any) -> str:
    """Return ``x`` if it is a string that UTF-8 can hold. Raises :class:`TokenizerError`."""
    if not isinstance(x, str):
        raise TokenizerError(f"text tokenizer: expected a string, got {type(x).__name__}.")
    try:
        x.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text tokenizer: character {error.start} is a lone surrogate and no valid text; read the file as UTF-8."
        ) from None
    return x
