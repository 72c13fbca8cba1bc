"""The tokenizers of one model: up to one per modality, in ``tokenizers/{text,ssl,codec}/``.

Token folders, checkpoints and servers carry this folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.errors import TokenizerError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tokenizers.base import load_tokenizer
from speechlm_ext.tokenizers.streaming import StreamDecoder, stream_decoder

_MODALITIES = {"text": "text_bpe", "ssl": "ssl", "codec": "codec"}


def require_equal_rates(ssl: tuple[int | None, float | None], codec: tuple[int | None, float | None]) -> None:
    """Require that units and codes of one recording pair up frame by frame.

    Args:
        ssl, codec: sampling rate in Hz and frames per second.

    Raises:
        TokenizerError: the rates differ.
    """
    if ssl != codec:
        raise TokenizerError(
            f"codec_ssl needs equal rates, got ssl {ssl[0]} Hz at {ssl[1]:g} frames/s and codec {codec[0]} Hz at "
            f"{codec[1]:g}; fit both with the same sample_rate and frames_per_token."
        )


@dataclass
class TokenizerSet:
    """The tokenizers of one model; each may be None."""

    text: Any = None
    """Tokenizer of ``text_bpe``."""
    ssl: Any = None
    """Tokenizer of ``ssl``."""
    codec: Any = None
    """Tokenizer of ``codec``."""

    def __post_init__(self) -> None:
        for slot, tokenizer in self._present().items():
            if tokenizer.modality != _MODALITIES[slot]:
                raise TokenizerError(
                    f"the {slot} slot needs a tokenizer of modality {_MODALITIES[slot]!r}, got {tokenizer.kind!r} of "
                    f"{tokenizer.modality!r}."
                )

    def save(self, folder: str | Path) -> None:
        """Write each tokenizer into ``folder/{text,ssl,codec}``."""
        for slot, tokenizer in self._present().items():
            tokenizer.save(Path(folder) / slot)

    @classmethod
    def load(cls, folder: str | Path) -> TokenizerSet:
        """Read the tokenizers in ``folder``.

        Raises:
            TokenizerError: there is none, or one is damaged.
        """
        folder = Path(folder)
        slots = {slot: load_tokenizer(folder / slot) for slot in _MODALITIES if (folder / slot).is_dir()}
        if not slots:
            raise TokenizerError(
                f"no tokenizer in {folder}; expected folders named {', '.join(_MODALITIES)}."
            )
        return cls(**slots)

    def prepare(self) -> None:
        """Load models outside the artifacts (the encoder of ``encoder-kmeans`` units) before the first recording.

        Raises:
            TokenizerError: a model is missing or another one.
        """
        for tokenizer in self._present().values():
            if hasattr(tokenizer, "prepare"):
                tokenizer.prepare()

    def fingerprints(self) -> dict[str, str]:
        """``{modality: sha256}`` of the tokenizers that are present."""
        return {_MODALITIES[slot]: tokenizer.fingerprint for slot, tokenizer in self._present().items()}

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
        """SSL unit and codec codes of each frame of a waveform: int32 ``[T, 1 + num_codebooks]``, SSL in column 0.

        Raises:
            TokenizerError: a tokenizer is missing, rates differ, or the two lengths differ by more than one frame.
        """
        ssl, codec = self._require("ssl"), self._require("codec")
        require_equal_rates((ssl.sample_rate, ssl.frame_rate), (codec.sample_rate, codec.frame_rate))
        units, codes = ssl.encode(wave), codec.encode(wave)
        if abs(len(units) - len(codes)) > 1:
            raise TokenizerError(
                f"codec_ssl: {len(units)} ssl frames but {len(codes)} codec frames for {len(wave)} samples; the "
                "tokenizers count frames differently, use a matching pair."
            )
        length = min(len(units), len(codes))
        return np.concatenate([units[:length], codes[:length]], axis=1).astype(np.int32)

    def decode_codec(self, codes: np.ndarray) -> np.ndarray:
        """Waveform of codec codes ``[T, num_codebooks]``. Raises :class:`TokenizerError`."""
        return self._require("codec").decode(codes)

    def stream_codec(self) -> StreamDecoder:
        """A decoder for codes that arrive piece by piece. Raises :class:`TokenizerError`: the codec has none."""
        return stream_decoder(self._require("codec"))

    def _present(self) -> dict[str, Any]:
        """Tokenizers that are not None, by slot."""
        slots = {slot: getattr(self, slot) for slot in _MODALITIES}
        return {slot: tokenizer for slot, tokenizer in slots.items() if tokenizer is not None}

    def _require(self, slot: str) -> Any:
        tokenizer = getattr(self, slot)
        if tokenizer is None:
            raise TokenizerError(
                f"this needs a {slot} tokenizer, but the set has only {sorted(self._present())}; fit or load one."
            )
        return tokenizer
