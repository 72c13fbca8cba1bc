"""Text tokenizers: SentencePiece trained on the user's own transcripts, or any fast Hugging Face tokenizer.

SentencePiece is trained without normalisation (``identity``: no case folding, no NFKC, spaces kept), so
``decode(encode(x)) == x`` for every string; clean the transcripts before, if they should be clean.
``byte_fallback`` is on: a character that was never seen becomes its UTF-8 bytes, and nothing is ever
"unknown". One exception is SentencePiece's own: the character U+2581 (▁) stands for the space and comes back
as one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from speechlm_ext.errors import ConfigError, TokenizerError, foreign_errors
from speechlm_ext.tokenizers import base
from speechlm_ext.utils.files.json_shape import build

_MODEL_NAME = "sentencepiece.model"
_HF_NAME = "huggingface.json"
_NUM_BYTES = 256


@dataclass(frozen=True)
class TextConfig:
    """Settings of a SentencePiece training."""

    vocab_size: int = 1000
    """Ids asked for, 256 byte ids among them; fewer come when the texts do not support so many."""
    model_type: str = "bpe"
    """``bpe`` or ``unigram``."""

    def __post_init__(self) -> None:
        if self.model_type not in ("bpe", "unigram"):
            raise ConfigError(
                f"text tokenizer: model_type must be 'bpe' or 'unigram', got {self.model_type!r}."
            )
        if self.vocab_size < _NUM_BYTES + 2:
            raise ConfigError(
                f"text tokenizer: vocab_size must be at least {_NUM_BYTES + 2} (256 bytes are always in "
                f"it), got {self.vocab_size}."
            )


class SentencePieceText:
    """A SentencePiece model; see the module's text.

    Args:
        model: the serialised model.
    """

    kind = "sentencepiece"
    modality = "text_bpe"
    frame_rate: float | None = None
    sample_rate: int | None = None

    def __init__(self, model: bytes, config: TextConfig | None = None) -> None:
        self.config = config or TextConfig()
        self._model = model
        with foreign_errors(TokenizerError, "not a SentencePiece model", "Train or copy it again."):
            if not model:
                raise ValueError("it is empty")  # which the library takes for a model that comes later
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_sizes: tuple[int, ...] = (self._processor.get_piece_size(),)

    @classmethod
    def fit(cls, texts: Iterable[str], config: TextConfig | None = None) -> SentencePieceText:
        """Train on ``texts``; the same texts in the same order give the same model.

        Raises:
            TokenizerError: no text, or a vocabulary size that cannot hold the texts' characters.
        """
        config = config or TextConfig()
        # SentencePiece takes lines. Other separators of Unicode (U+2028, U+0085, form feed) are characters of the text.
        lines = [line for text in texts for line in re.split("\r\n|[\r\n]", text) if line.strip()]
        if not lines:
            raise TokenizerError(
                "text tokenizer: no text to train on; the manifest's lines need a 'text' field that is not "
                "empty."
            )
        # One id for "unknown", the bytes, and every character that occurs (the space always).
        least = 1 + _NUM_BYTES + len({" "}.union(*lines))
        if config.vocab_size < least:
            raise TokenizerError(
                f"text tokenizer: the texts have {least - 1 - _NUM_BYTES} different characters, so "
                f"vocab_size must be at least {least}, got {config.vocab_size}."
            )
        return cls(_train(lines, config, config.vocab_size), config)

    def encode(self, x: str) -> np.ndarray:
        """Ids of a string, int32 ``[T, 1]``. Raises :class:`TokenizerError` for what is not text."""
        return np.asarray(self._processor.encode(check_text(x)), dtype=np.int32).reshape(-1, 1)

    def decode(self, ids: np.ndarray) -> str:
        """String of ids ``[T]`` or ``[T, 1]``. Raises :class:`TokenizerError`."""
        return self._processor.decode(base.check_ids(ids, self.vocab_sizes, "text ids")[:, 0].tolist())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over settings and model."""
        return base.fingerprint(self.kind, asdict(self.config), {_MODEL_NAME: self._model})

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and the model into ``folder``."""
        base.write_artefact(
            folder, self.kind, asdict(self.config), self.fingerprint, **{_MODEL_NAME: self._model}
        )

    @classmethod
    def load(cls, folder: str | Path) -> SentencePieceText:
        """Read what :meth:`save` wrote. Raises :class:`TokenizerError`."""
        record, model = base.read_config(folder), _read(Path(folder) / _MODEL_NAME)
        # Before the library sees it: what it makes of damaged bytes is not certain.
        found = base.fingerprint(cls.kind, record["config"], {_MODEL_NAME: model})
        base.require_fingerprint(folder, record["sha256"], found, "a SentencePiece model")
        with base.artefact_errors(folder, "a SentencePiece tokenizer"):
            return cls(model, build(TextConfig, record["config"], "config"))


class HuggingFaceText:
    """Any fast Hugging Face tokenizer, without its chat template and special-token insertion.

    Args:
        definition: the content of a ``tokenizer.json`` of the ``tokenizers`` library.
    """

    kind = "huggingface"
    modality = "text_bpe"
    frame_rate: float | None = None
    sample_rate: int | None = None

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer

        with foreign_errors(
            TokenizerError, "not a Hugging Face tokenizer", "Give the folder of a fast tokenizer."
        ):
            self._tokenizer = Tokenizer.from_str(definition)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._definition = self._tokenizer.to_str().encode()
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_sizes: tuple[int, ...] = (highest + 1,)

    @classmethod
    def from_folder(cls, folder: str | Path) -> HuggingFaceText:
        """Read a folder with a tokenizer (``tokenizer.json``, or anything that converts to a fast tokenizer).

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
        with base.artefact_errors(folder, "a Hugging Face tokenizer"):
            return cls(tokenizer.backend_tokenizer.to_str())

    def encode(self, x: str) -> np.ndarray:
        """Ids of a string without special tokens, int32 ``[T, 1]``. Raises :class:`TokenizerError`."""
        ids = self._tokenizer.encode(check_text(x), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int32).reshape(-1, 1)

    def decode(self, ids: np.ndarray) -> str:
        """String of ids ``[T]`` or ``[T, 1]``. Raises :class:`TokenizerError`."""
        checked = base.check_ids(ids, self.vocab_sizes, "text ids")[:, 0].tolist()
        return self._tokenizer.decode(checked, skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the definition."""
        return base.fingerprint(self.kind, {}, {_HF_NAME: self._definition})

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` (ours) and ``huggingface.json`` (the definition) into ``folder``."""
        base.write_artefact(folder, self.kind, {}, self.fingerprint, **{_HF_NAME: self._definition})

    @classmethod
    def load(cls, folder: str | Path) -> HuggingFaceText:
        """Read what :meth:`save` wrote. Raises :class:`TokenizerError`."""
        record, definition = base.read_config(folder), _read(Path(folder) / _HF_NAME)
        # Of the file's own bytes: another release of the library may write the same definition differently.
        found = base.fingerprint(cls.kind, record["config"], {_HF_NAME: definition})
        base.require_fingerprint(folder, record["sha256"], found, "a Hugging Face tokenizer")
        with base.artefact_errors(folder, "a Hugging Face tokenizer"):
            text = cls(definition.decode("utf-8"))
        text._definition = definition
        return text


def check_text(x: Any) -> str:
    """Return ``x`` if it is a string that UTF-8 can hold. Raises :class:`TokenizerError`."""
    if not isinstance(x, str):
        raise TokenizerError(f"text tokenizer: expected a string, got {type(x).__name__}.")
    try:
        x.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text tokenizer: character {error.start} is a lone surrogate and no valid text; read the file "
            f"as UTF-8."
        ) from None
    return x


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read ({error}); copy the whole tokenizer folder again."
        ) from None


def _train(lines: list[str], config: TextConfig, vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=config.model_type,
            # Room for the whole alphabet where possible; what does not fit falls back to bytes.
            character_coverage=1.0,
            byte_fallback=True,
            required_chars="\u2581",
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"text tokenizer: SentencePiece cannot train {config.model_type} with {vocab_size} ids on "
            f"{len(lines)} lines ({str(error).strip().splitlines()[-1]}); ask for another vocab_size."
        ) from None
    return model.getvalue()


base.register_tokenizer(SentencePieceText.kind, SentencePieceText)
base.register_tokenizer(HuggingFaceText.kind, HuggingFaceText)
