"""``huggingface``: any fast Hugging Face tokenizer, e.g. that of a pretrained backbone."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.errors import TokenizerError, file_errors, foreign_errors
from speechlm_ext.tokenizers import artifact
from speechlm_ext.tokenizers.base import check_ids, check_text, register_tokenizer

_FILE_NAME = "huggingface.json"


class HuggingFaceText:
    """A fast Hugging Face tokenizer without its chat template and special-token insertion.

    Args:
        definition: content of a ``tokenizer.json`` of the ``tokenizers`` library.

    Raises:
        TokenizerError: not such a definition.
    """

    kind = "huggingface"
    modality = "text_bpe"
    frame_rate: float | None = None
    sample_rate: int | None = None

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer

        hint = "Give the folder of a fast tokenizer."
        with foreign_errors(TokenizerError, "not a Hugging Face tokenizer", hint):
            self._tokenizer = Tokenizer.from_str(definition)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._definition = self._tokenizer.to_str().encode()
        max_id = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_sizes: tuple[int, ...] = (max_id + 1,)

    @classmethod
    def from_folder(cls, folder: str | Path) -> HuggingFaceText:
        """Read a folder with ``tokenizer.json``, or with a tokenizer that converts to a fast one.

        Raises:
            TokenizerError: no such folder, or no fast tokenizer in it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is not a folder; give the folder of a Hugging Face tokenizer.")
        from transformers import AutoTokenizer

        where = f"{folder} holds no tokenizer that transformers can read"
        with foreign_errors(TokenizerError, where, "Copy the folder again, or give another one."):
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise TokenizerError(
                f"{folder} holds a slow tokenizer only; convert it to a fast one (tokenizer.json) first."
            )
        with file_errors(TokenizerError, folder, "not a Hugging Face tokenizer", artifact.COPY_AGAIN):
            return cls(tokenizer.backend_tokenizer.to_str())

    def encode(self, x: str) -> np.ndarray:
        """Ids of a string without special tokens, int32 ``[T, 1]``. Raises :class:`TokenizerError`."""
        ids = self._tokenizer.encode(check_text(x), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int32).reshape(-1, 1)

    def decode(self, ids: np.ndarray) -> str:
        """String of ids ``[T]`` or ``[T, 1]``. Raises :class:`TokenizerError`."""
        checked = check_ids(ids, self.vocab_sizes, "text ids")[:, 0].tolist()
        return self._tokenizer.decode(checked, skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the definition."""
        return artifact.content_sha256(self.kind, {}, {_FILE_NAME: self._definition})

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` (ours) and ``huggingface.json`` (the definition) into ``folder``."""
        artifact.write_artifact(folder, self.kind, {}, self.fingerprint, {_FILE_NAME: self._definition})

    @classmethod
    def load(cls, folder: str | Path) -> HuggingFaceText:
        """Read the artifact that :meth:`save` wrote. Raises :class:`TokenizerError`."""
        record, definition = artifact.read_record(folder), artifact.read_file(folder, _FILE_NAME)
        # Over the file's own bytes: another release of the library may serialise the same definition differently.
        computed = artifact.content_sha256(cls.kind, record["config"], {_FILE_NAME: definition})
        artifact.require_fingerprint(folder, record["sha256"], computed, "a Hugging Face tokenizer")
        with file_errors(TokenizerError, folder, "not a Hugging Face tokenizer", artifact.COPY_AGAIN):
            text = cls(definition.decode("utf-8"))
        text._definition = definition
        return text


register_tokenizer(HuggingFaceText.kind, HuggingFaceText)
