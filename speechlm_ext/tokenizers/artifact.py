"""The artifact of a tokenizer: how its folder is written, read and hashed.

An artifact is a folder with ``tokenizer.json`` (kind and settings) and at most one safetensors file or, for text, the
vocabulary's own file. Nothing is pickled. The fingerprint is a sha256 over kind, settings and every array or file in a
fixed order; it is the same before saving and after loading, so a layout can name the tokenizer by it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

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

_SHAPE = {"kind": str, "version": int, "config": dict, "sha256": SHA256}
COPY_AGAIN = "Copy the whole tokenizer folder again."
_Self = TypeVar("_Self", bound="ArrayTokenizer")


class ArrayTokenizer(ABC):
    """Base of tokenizers that consist of JSON settings and named arrays: fingerprint, ``save`` and ``load``."""

    kind: str
    """Name in the registry."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings that the artifact records, as JSON."""

    @abstractmethod
    def arrays(self) -> dict[str, torch.Tensor]:
        """Arrays that the artifact records, on the CPU."""

    @classmethod
    @abstractmethod
    def from_artifact(cls: type[_Self], settings: dict[str, Any], arrays: dict[str, torch.Tensor]) -> _Self:
        """The tokenizer of recorded settings and arrays; :meth:`load` names the folder in its errors."""

    def identity(self) -> dict[str, Any]:
        """Settings that count for the fingerprint."""
        return self.settings()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over kind, settings and arrays, 64 hex digits."""
        blobs = {
            name: f"{array.dtype}{list(array.shape)}".encode() + array.contiguous().numpy().tobytes()
            for name, array in self.arrays().items()
        }
        return content_sha256(self.kind, self.identity(), blobs)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``arrays.safetensors`` into ``folder``.

        Raises:
            TokenizerError: an array is not finite; nothing is written.
            StorageError: the folder cannot be written.
        """
        where = f"the {self.kind} tokenizer was not saved to {folder}"
        hint = "The data of its fit has values that are too large; nothing was written."
        require_finite(self.arrays(), TokenizerError, where, hint)
        data = save_tensors({name: array.contiguous() for name, array in self.arrays().items()})
        write_artifact(folder, self.kind, self.settings(), self.fingerprint, {ARRAYS_NAME: data})

    @classmethod
    def load(cls: type[_Self], folder: str | Path) -> _Self:
        """Read the artifact that :meth:`save` wrote.

        Raises:
            TokenizerError: a file is missing, damaged, of another shape, or not finite.
        """
        record, path = read_record(folder), Path(folder) / ARRAYS_NAME
        with foreign_errors(TokenizerError, f"{path} cannot be read", COPY_AGAIN):
            arrays = load_tensors(path.read_bytes())
        require_finite(arrays, TokenizerError, f"{path} cannot be used", "Fit the tokenizer again.")
        with file_errors(TokenizerError, folder, f"not a tokenizer of kind {cls.kind}", COPY_AGAIN):
            tokenizer = cls.from_artifact(record["config"], arrays)
        require_fingerprint(folder, record["sha256"], tokenizer.fingerprint, "an artifact")
        return tokenizer


def content_sha256(kind: str, config: Mapping[str, Any], blobs: Mapping[str, bytes]) -> str:
    """sha256 over kind, settings and named bytes, in sorted order."""
    digest = hashlib.sha256()
    head = {"kind": kind, "version": VERSION, "config": config}
    digest.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(blobs):
        digest.update(f"\0{name}\0{len(blobs[name])}\0".encode())
        digest.update(blobs[name])
    return digest.hexdigest()


def write_artifact(
    folder: str | Path, kind: str, config: Mapping[str, Any], sha256: str, files: Mapping[str, bytes]
) -> None:
    """Write ``files`` and then ``tokenizer.json`` into ``folder``: a folder that has it is complete."""
    for name, data in files.items():
        atomic_write_bytes(Path(folder) / name, data)
    record = {"kind": kind, "version": VERSION, "config": dict(config), "sha256": sha256}
    atomic_write_json(Path(folder) / FILE_NAME, record)


def read_record(folder: str | Path) -> dict[str, Any]:
    """Content of ``tokenizer.json``, checked. Raises :class:`TokenizerError`."""
    path = Path(folder) / FILE_NAME
    hint = "so it is not a tokenizer's description; save the tokenizer again, or copy its folder again."
    try:
        record = read_shaped(path, _SHAPE, TokenizerError, hint)
    except FileNotFoundError:
        raise TokenizerError(f"no {FILE_NAME} in {folder}; is this a tokenizer's folder?") from None
    if record["version"] != VERSION:
        raise TokenizerError(
            f"{path}: version {record['version']} is not {VERSION}; use the release that wrote it."
        )
    return record


def read_file(folder: str | Path, name: str) -> bytes:
    """Content of a file of the artifact. Raises :class:`TokenizerError`: it is missing or unreadable."""
    path = Path(folder) / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read ({error}). {COPY_AGAIN}") from None


def require_fingerprint(folder: str | Path, stored: str, computed: str, expected: str) -> None:
    """Refuse an artifact that changed after it was saved. Raises :class:`TokenizerError`."""
    if stored != computed:
        raise TokenizerError(
            f"{folder}: not {expected} as it was saved: content does not match its own sha256 ({computed[:12]}…, "
            f"expected {stored[:12]}…); it was edited or damaged after saving, copy it again."
        )
