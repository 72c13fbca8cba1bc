"""Tokenizers: text and sound to ids and back, behind one small protocol.

:class:`TokenizerSet` holds up to one tokenizer per modality and is what token folders, checkpoints and
servers carry (``tokenizers/{text,ssl,codec}/``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.errors import TokenizerError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tokenizers.base import Tokenizer, load_tokenizer, register_tokenizer
from speechlm_ext.tokenizers.codecs.rvq import RVQConfig, RVQKMeansCodec
from speechlm_ext.tokenizers.mfcc_units import MFCCKMeans, SSLConfig
from speechlm_ext.tokenizers.streaming import OverlapDecoder, StreamDecoder, stream_decoder
from speechlm_ext.tokenizers.text.text import HuggingFaceText, SentencePieceText, TextConfig
from speechlm_ext.tokenizers.units import EncoderKMeans, EncoderKMeansConfig

__all__ = [
    "EncoderKMeans",
    "EncoderKMeansConfig",
    "HuggingFaceText",
    "MFCCKMeans",
    "OverlapDecoder",
    "RVQConfig",
    "RVQKMeansCodec",
    "SSLConfig",
    "SentencePieceText",
    "StreamDecoder",
    "TextConfig",
    "Tokenizer",
    "TokenizerSet",
    "load_tokenizer",
    "register_tokenizer",
]

_MODALITIES = {"text": "text_bpe", "ssl": "ssl", "codec": "codec"}


def require_equal_rates(ssl: tuple[int | None, float | None], codec: tuple[int | None, float | None]) -> None:
    """Units and codes of one recording stand frame by frame beside each other.

    Args:
        ssl, codec: sampling rate in Hz and frames per second.

    Raises:
        TokenizerError: they differ.
    """
    if ssl != codec:
        raise TokenizerError(
            f"codec_ssl needs equal rates, got ssl {ssl[0]} Hz at {ssl[1]:g} frames/s and codec {codec[0]} Hz at "
            f"{codec[1]:g}; fit both with the same sample_rate and frames_per_token."
        )


@dataclass
class TokenizerSet:
    """The tokenizers of one family of models; each may be None."""

    text: Any = None
    """Tokenizer of ``text_bpe``."""
    ssl: Any = None
    """Tokenizer of ``ssl``."""
    codec: Any = None
    """Tokenizer of ``codec``."""

    def __post_init__(self) -> None:
        for slot, modality in _MODALITIES.items():
            tokenizer = getattr(self, slot)
            if tokenizer is not None and tokenizer.modality != modality:
                raise TokenizerError(
                    f"the {slot} slot needs a tokenizer of modality {modality!r}, got {tokenizer.kind!r} of "
                    f"{tokenizer.modality!r}."
                )

    def save(self, folder: str | Path) -> None:
        """Write each tokenizer into ``folder/{text,ssl,codec}``."""
        for slot in _MODALITIES:
            tokenizer = getattr(self, slot)
            if tokenizer is not None:
                tokenizer.save(Path(folder) / slot)

    @classmethod
    def load(cls, folder: str | Path) -> TokenizerSet:
        """Read the tokenizers that lie in ``folder``.

        Raises:
            TokenizerError: none is there, or one is damaged.
        """
        folder = Path(folder)
        slots = {slot: load_tokenizer(folder / slot) for slot in _MODALITIES if (folder / slot).is_dir()}
        if not slots:
            raise TokenizerError(
                f"no tokenizer in {folder}; expected folders named {', '.join(_MODALITIES)}."
            )
        return cls(**slots)

    def prepare(self) -> None:
        """Load what encoding needs besides the artefacts (the model under ``encoder-kmeans`` units) now rather than at
        the first recording.

        Raises:
            TokenizerError: it is missing or another one.
        """
        for slot in _MODALITIES:
            prepare = getattr(getattr(self, slot), "prepare", None)
            if prepare is not None:
                prepare()

    def fingerprints(self) -> dict[str, str]:
        """``{modality: sha256}`` of the tokenizers that are present."""
        return {
            m: getattr(self, slot).fingerprint
            for slot, m in _MODALITIES.items()
            if getattr(self, slot) is not None
        }

    def make_layout(self, name: str | None = None, delays: Sequence[int] | None = None) -> TokenLayout:
        """Lay out the ids of these tokenizers; see :meth:`TokenLayout.build`."""
        return TokenLayout.build(
            ssl=self.ssl.vocab_sizes[0] if self.ssl is not None else None,
            codec=self.codec.vocab_sizes if self.codec is not None else (),
            text=self.text.vocab_sizes[0] if self.text is not None else None,
            delays=delays,
            name=name,
            tokenizers=self.fingerprints(),
        )

    def encode_codec_ssl(self, wave: np.ndarray) -> np.ndarray:
        """SSL unit and codec codes of a waveform, frame by frame: int32 ``[T, 1 + num_codebooks]``, SSL in
        column 0.

        Raises:
            TokenizerError: a tokenizer is missing, rates differ, or the two lengths differ by more than one
                frame.
        """
        ssl, codec = self._require("ssl"), self._require("codec")
        require_equal_rates((ssl.sample_rate, ssl.frame_rate), (codec.sample_rate, codec.frame_rate))
        units, codes = ssl.encode(wave), codec.encode(wave)
        if abs(len(units) - len(codes)) > 1:
            raise TokenizerError(
                f"codec_ssl: {len(units)} ssl frames but {len(codes)} codec frames for {len(wave)} samples; "
                "the tokenizers count frames differently, use a matching pair."
            )
        length = min(len(units), len(codes))
        return np.concatenate([units[:length], codes[:length]], axis=1).astype(np.int32)

    def decode_codec(self, codes: np.ndarray) -> np.ndarray:
        """Waveform of codec codes ``[T, num_codebooks]``. Raises :class:`TokenizerError`."""
        return self._require("codec").decode(codes)

    def stream_codec(self) -> StreamDecoder:
        """A decoder for codec codes that arrive bit by bit. Raises :class:`TokenizerError`: the codec has none."""
        return stream_decoder(self._require("codec"))

    def _require(self, slot: str) -> Any:
        if getattr(self, slot) is None:
            raise TokenizerError(
                f"this needs a {slot} tokenizer, but the set has only {sorted(self.fingerprints())}."
            )
        return getattr(self, slot)
