"""One utterance to a shard row: the tokens of its text and audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speechlm_ext.data.manifest import Utterance
from speechlm_ext.data.recordings import read_wave
from speechlm_ext.errors import AudioError, ConfigError, TokenizerError
from speechlm_ext.tokenizers import TokenizerSet

Row = dict[str, Any]


class Encoder:
    """Turns an utterance into a shard row; the worker of a :class:`~speechlm_ext.data.recordings.RecordingPool`."""

    def __init__(self, tokenizers: TokenizerSet, resample: bool = True) -> None:
        self.tokenizers, self.resample = tokenizers, resample
        rates = {t.sample_rate for t in (tokenizers.ssl, tokenizers.codec) if t is not None}
        if len(rates) > 1:
            raise ConfigError(f"ssl and codec tokenizers must share a sampling rate, got {sorted(rates)} Hz.")
        self.sample_rate: int | None = next(iter(rates), None)

    @classmethod
    def load(cls, folder: Path, resample: bool) -> Encoder:
        """Load the tokenizers of a folder and the models they need. Raises :class:`TokenizerError`."""
        tokenizers = TokenizerSet.load(folder)
        tokenizers.prepare()
        return cls(tokenizers, resample)

    def __call__(self, utterance: Utterance) -> Row:
        """All tokens that the tokenizers give for an utterance.

        Raises:
            SpeechLMError: audio or text that cannot be used.
        """
        names = ("id", "dataset", "speaker", "lang", "text")
        row: Row = {name: getattr(utterance, name) for name in names}
        if utterance.text is not None and self.tokenizers.text is not None:
            row["text_bpe"] = self.tokenizers.text.encode(utterance.text)
        if utterance.audio is not None:
            wave, rate = read_wave(utterance, self.sample_rate, self.resample)
            row["duration"] = len(wave) / rate
            ssl, codec = self.tokenizers.ssl, self.tokenizers.codec
            if ssl is not None and codec is not None:
                both = self.tokenizers.encode_codec_ssl(wave)
                row["ssl"], row["codec"] = both[:, :1], both[:, 1:]
            elif ssl is not None:
                row["ssl"] = ssl.encode(wave)
            elif codec is not None:
                row["codec"] = codec.encode(wave)
        for name in ("text_bpe", "ssl", "codec"):
            if name in row and len(row[name]) == 0:
                length = f" ({row['duration']:.3f} s)" if name != "text_bpe" else ""
                raise (TokenizerError if name == "text_bpe" else AudioError)(
                    f"gives no {name} tokens{length}; it is empty or too short. Leave it out, or give --skip-bad."
                )
        if not any(name in row for name in ("text_bpe", "ssl", "codec")):
            raise TokenizerError(
                "no tokenizer fits it: it has only text or only audio, which has no tokenizer here."
            )
        return row
