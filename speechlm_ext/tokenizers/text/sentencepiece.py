"""``sentencepiece``: a SentencePiece model trained on the user's own transcripts.

Training does not normalize (``identity``: no case folding, no NFKC, spaces kept), so ``decode(encode(x)) == x`` for
every string; clean the transcripts first if they need it. ``byte_fallback`` is on: a character outside the training
texts becomes its UTF-8 bytes, so no id means "unknown". SentencePiece itself makes one exception: the character U+2581
(▁) stands for the space and comes back as one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from speechlm_ext.errors import ConfigError, TokenizerError, file_errors, foreign_errors
from speechlm_ext.tokenizers import artifact
from speechlm_ext.tokenizers.base import check_ids, check_text, register_tokenizer
from speechlm_ext.utils.files.json_shape import build

_MODEL_NAME = "sentencepiece.model"
_NUM_BYTES = 256


@dataclass(frozen=True)
class TextConfig:
    """Settings of a SentencePiece training."""

    vocab_size: int = 1000
    """Ids, 256 byte ids included; a smaller vocabulary results where the texts do not support this size."""
    model_type: str = "bpe"
    """``bpe`` or ``unigram``."""

    def __post_init__(self) -> None:
        if self.model_type not in ("bpe", "unigram"):
            raise ConfigError(
                f"text tokenizer: model_type must be 'bpe' or 'unigram', got {self.model_type!r}."
            )
        if self.vocab_size < _NUM_BYTES + 2:
            raise ConfigError(
                f"text tokenizer: vocab_size must be at least {_NUM_BYTES + 2} (256 of them are the bytes), got "
                f"{self.vocab_size}."
            )


class SentencePieceText:
    """A SentencePiece model; see the module's text.

    Args:
        model: the serialised model.
        config: settings of its training, part of the fingerprint.

    Raises:
        TokenizerError: not a SentencePiece model.
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
                raise ValueError("it is empty")  # the library would wait for a later load
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
                "text tokenizer: no text to train on; the manifest's lines need a 'text' field that is not empty."
            )
        num_characters = len({" "}.union(*lines))
        min_size = 1 + _NUM_BYTES + num_characters  # 1 for "unknown"
        if config.vocab_size < min_size:
            raise TokenizerError(
                f"text tokenizer: the texts have {num_characters} different characters, so vocab_size must be at least "
                f"{min_size}, got {config.vocab_size}."
            )
        return cls(_train(lines, config), config)

    def encode(self, x: str) -> np.ndarray:
        """Ids of a string, int32 ``[T, 1]``. Raises :class:`TokenizerError`: not valid text."""
        return np.asarray(self._processor.encode(check_text(x)), dtype=np.int32).reshape(-1, 1)

    def decode(self, ids: np.ndarray) -> str:
        """String of ids ``[T]`` or ``[T, 1]``. Raises :class:`TokenizerError`."""
        return self._processor.decode(check_ids(ids, self.vocab_sizes, "text ids")[:, 0].tolist())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over settings and model."""
        return artifact.content_sha256(self.kind, asdict(self.config), {_MODEL_NAME: self._model})

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``sentencepiece.model`` into ``folder``."""
        files = {_MODEL_NAME: self._model}
        artifact.write_artifact(folder, self.kind, asdict(self.config), self.fingerprint, files)

    @classmethod
    def load(cls, folder: str | Path) -> SentencePieceText:
        """Read the artifact that :meth:`save` wrote. Raises :class:`TokenizerError`."""
        record, model = artifact.read_record(folder), artifact.read_file(folder, _MODEL_NAME)
        # Before the library parses it: its behaviour on damaged bytes is undefined.
        computed = artifact.content_sha256(cls.kind, record["config"], {_MODEL_NAME: model})
        artifact.require_fingerprint(folder, record["sha256"], computed, "a SentencePiece model")
        with file_errors(TokenizerError, folder, "not a SentencePiece tokenizer", artifact.COPY_AGAIN):
            return cls(model, build(TextConfig, record["config"], "config"))


def _train(lines: list[str], config: TextConfig) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            # The whole alphabet where the vocabulary has room; other characters fall back to bytes.
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
            f"text tokenizer: SentencePiece cannot train {config.model_type} with {config.vocab_size} ids on "
            f"{len(lines)} lines ({str(error).strip().splitlines()[-1]}); choose another vocab_size."
        ) from None
    return model.getvalue()


register_tokenizer(SentencePieceText.kind, SentencePieceText)
