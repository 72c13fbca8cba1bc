"""From ids that arrive bit by bit to sound or text: the decoding half of a stream."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.tokenizers import TokenizerSet

#: What decoders put where bytes are not, or not yet, a character.
_REPLACEMENT = "\ufffd"


class Voice(Protocol):
    """Makes raw ids perceptible."""

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """Take in raw ids ``[t, columns]`` and tell what is ready, with ``end`` all that is left: fields of a chunk."""
        ...


def voice_of(modality: str, tokenizers: TokenizerSet) -> Voice:
    """What makes a target of ``modality`` perceptible; of SSL units alone the ids are all there is.

    Raises:
        TokenizerError: the codec cannot decode a stream.
    """
    if modality == "text_bpe" and tokenizers.text is not None:
        return TextPieces(tokenizers.text)
    if modality in ("codec", "codec_ssl") and tokenizers.codec is not None:
        return Sound(tokenizers, skip=1 if modality == "codec_ssl" else 0)
    return Silence()


class Silence:
    """Says nothing."""

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """See :class:`Voice`."""
        return {}


class Sound:
    """Codec codes → samples.

    Args:
        skip: columns before the codec's.
    """

    def __init__(self, tokenizers: TokenizerSet, skip: int) -> None:
        self._decoder, self._skip = tokenizers.stream_codec(), skip
        self._rate = tokenizers.codec.sample_rate

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """See :class:`Voice`."""
        audio = self._decoder.push(ids[:, self._skip :])
        if end:
            audio = np.concatenate([audio, self._decoder.flush()])
        return {"audio": audio, "sample_rate": self._rate}


class TextPieces:
    """Text ids → pieces of text, which joined are what the tokenizer makes of all ids.

    A character may take several ids, its bytes; until the last one is there a tokenizer shows replacement characters at
    the end, which are held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._said = ""

    def push(self, ids: np.ndarray, end: bool = False) -> dict[str, Any]:
        """See :class:`Voice`.

        Raises:
            GenerationError: at the end, the tokenizer has taken back something that was said.
        """
        self._ids += ids[:, 0].tolist()
        text = str(self._tokenizer.decode(np.asarray(self._ids, np.int32)[:, None])) if self._ids else ""
        ready = text if end else text.rstrip(_REPLACEMENT)
        if not ready.startswith(self._said):
            if end:
                raise GenerationError(
                    f"text tokenizer {self._tokenizer.kind!r} changes what it said when more ids come; ask for "
                    "the whole text with generate instead of a stream."
                )
            ready = self._said
        piece, self._said = ready[len(self._said) :], ready
        return {"text": piece}
