"""The one protocol behind every tokenizer, the registry of kinds, and how an artefact is stored and hashed.

An artefact is a folder with ``tokenizer.json`` (its kind, its settings) and at most one safetensors file
plus, for text, the vocabulary's own files. Nothing is pickled. The fingerprint is a sha256 over the settings
and every array or file in a fixed order, so it is the same before saving and after loading, and a layout can
name the tokenizer by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from speechlm_ext.errors import TokenizerError, file_errors, foreign_errors
from speechlm_ext.utils.files.io import atomic_write_bytes, atomic_write_json
from speechlm_ext.utils.files.json_shape import SHA256, read_shaped
from speechlm_ext.utils.finite import require_finite

FILE_NAME = "tokenizer.json"
ARRAYS_NAME = "arrays.safetensors"
VERSION = 1


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text or sound into ids and back."""

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
        """Write the artefact into ``folder``."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what ``save`` wrote."""
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
        TokenizerError: no artefact there, a damaged one, or a kind that is not registered.
    """
    folder = Path(folder)
    kind = read_config(folder)["kind"]
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


# ---- artefacts ---------------------------------------------------------------------------------------------
def fingerprint(kind: str, config: Mapping[str, Any], blobs: Mapping[str, bytes]) -> str:
    """sha256 over kind, settings and named bytes, in sorted order."""
    digest = hashlib.sha256()
    head = {"kind": kind, "version": VERSION, "config": config}
    digest.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(blobs):
        digest.update(f"\0{name}\0{len(blobs[name])}\0".encode())
        digest.update(blobs[name])
    return digest.hexdigest()


def array_bytes(arrays: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Each array's type, shape and content as bytes, for :func:`fingerprint`."""
    return {
        name: f"{array.dtype}{list(array.shape)}".encode() + array.contiguous().numpy().tobytes()
        for name, array in arrays.items()
    }


def write_artefact(
    folder: str | Path, kind: str, config: Mapping[str, Any], sha256: str, **files: bytes
) -> None:
    """Write ``tokenizer.json`` (last, so that a folder with it is complete) and ``files`` into ``folder``."""
    for name, data in files.items():
        atomic_write_bytes(Path(folder) / name, data)
    record = {"kind": kind, "version": VERSION, "config": dict(config), "sha256": sha256}
    atomic_write_json(Path(folder) / FILE_NAME, record)


def write_arrays(
    folder: str | Path, kind: str, config: Mapping[str, Any], sha256: str, arrays: Mapping[str, torch.Tensor]
) -> None:
    """Write an artefact of settings and arrays. Raises :class:`TokenizerError`: an array is not finite; nothing is
    written."""
    hint = "What it was fitted on has values that are too large; nothing was written."
    require_finite(arrays, TokenizerError, f"the {kind} tokenizer was not saved to {folder}", hint)
    data = save_tensors({name: array.contiguous() for name, array in arrays.items()})
    write_artefact(folder, kind, config, sha256, **{ARRAYS_NAME: data})


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check ``tokenizer.json``; returns ``kind, version, config, sha256``.

    Raises:
        TokenizerError: missing, not JSON, or of another version.
    """
    path = Path(folder) / FILE_NAME
    try:
        record = read_shaped(path, _SHAPE, TokenizerError, _WAY_OUT)
    except FileNotFoundError:
        raise TokenizerError(f"no {FILE_NAME} in {folder}; is this a tokenizer's folder?") from None
    if record["version"] != VERSION:
        raise TokenizerError(
            f"{path}: version {record['version']} is not {VERSION}; use the release that wrote it."
        )
    return record


def read_arrays(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read an artefact's arrays. Raises :class:`TokenizerError` when they are missing, damaged or not finite."""
    path = Path(folder) / ARRAYS_NAME
    with foreign_errors(TokenizerError, f"{path} cannot be read", "Copy the whole tokenizer folder again."):
        arrays = load_tensors(path.read_bytes())
    require_finite(arrays, TokenizerError, f"{path} cannot be used", "Fit the tokenizer again.")
    return arrays


@contextlib.contextmanager
def artefact_errors(folder: str | Path, what: str) -> Iterator[None]:
    """Name the folder in every error of a block that makes a tokenizer of an artefact's content.

    Args:
        what: what should be there, e.g. ``"a SentencePiece tokenizer"``.

    Raises:
        TokenizerError: whatever the block raised.
    """
    with file_errors(TokenizerError, folder, f"not {what}", "Copy the whole tokenizer folder again."):
        yield


_SHAPE = {"kind": str, "version": int, "config": dict, "sha256": SHA256}
_WAY_OUT = "so it is not a tokenizer's description; save the tokenizer again, or copy its folder again."


def require_fingerprint(folder: str | Path, stored: str, computed: str, what: str = "an artefact") -> None:
    """Refuse an artefact (``what``) whose content is not what was saved. Raises :class:`TokenizerError`."""
    if stored != computed:
        raise TokenizerError(
            f"{folder}: not {what} as it was saved: content does not match its own sha256 ({computed[:12]}… against "
            f"{stored[:12]}…); it was edited or damaged after saving, copy it again."
        )
