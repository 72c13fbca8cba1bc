"""Text and audio from ids that arrive piece by piece: the decoding half of a stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.tokenizers import TokenizerSet

#: The character that decoders emit for bytes that are not, or not yet, a character.
_REPLACEMENT = "\ufffd"


class ChunkDecoder:
    """Decodes raw ids incrementally. This class itself adds nothing to the ids, as for SSL units."""

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """The fields of a chunk that raw ids ``[t, columns]`` complete; with ``end`` all that is left."""
        return {}


def make_chunk_decoder(modality: str, tokenizers: TokenizerSet) -> ChunkDecoder:
    """The decoder of a target of ``modality``.

    Raises:
        TokenizerError: the codec cannot decode a stream.
    """
    if modality == "text_bpe" and tokenizers.text is not None:
        return TextDecoder(tokenizers.text)
    if modality in ("codec", "codec_ssl") and tokenizers.codec is not None:
        return AudioDecoder(tokenizers, skip=1 if modality == "codec_ssl" else 0)
    return ChunkDecoder()


class AudioDecoder(ChunkDecoder):
    """Codec codes to samples.

    Args:
        skip: columns before the codec's.
    """

    def __init__(self, tokenizers: TokenizerSet, skip: int) -> None:
        self._decoder, self._skip = tokenizers.stream_codec(), skip
        self._rate = tokenizers.codec.sample_rate

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """See :class:`ChunkDecoder`."""
        audio = self._decoder.push(ids[:, self._skip :])
        if end:
            audio = np.concatenate([audio, self._decoder.flush()])
        return {"audio": audio, "sample_rate": self._rate}


class TextDecoder(ChunkDecoder):
    """Text ids to pieces of text that join to the tokenizer's text of all ids.

    A character may take several ids, its bytes. Until the last one arrives, tokenizers decode replacement characters at
    the end, which are held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """See :class:`ChunkDecoder`.

        Raises:
            GenerationError: at the end, the tokenizer has changed text that is already emitted.
        """
        self._ids += ids[:, 0].tolist()
        text = str(self._tokenizer.decode(np.asarray(self._ids, np.int32)[:, None])) if self._ids else ""
        ready = text if end else text.rstrip(_REPLACEMENT)
        if not ready.startswith(self._emitted):
            if end:
                raise GenerationError(
                    f"text tokenizer {self._tokenizer.kind!r} changes emitted text when more ids arrive; get the whole "
                    "text with generate instead of a stream."
                )
            ready = self._emitted
        piece, self._emitted = ready[len(self._emitted) :], ready
        return {"text": piece}
