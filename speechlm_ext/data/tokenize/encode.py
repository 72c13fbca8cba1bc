"""Encoding utterances, in this process or in several that have one thread each.

Results come in the order of the utterances, whatever process made them, so shards do not depend on timing.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from speechlm_ext.audio.waveform import add_conversions, take_conversions
from speechlm_ext.data.manifest import Rejected, Utterance
from speechlm_ext.data.tokenize.fit import read_wave
from speechlm_ext.errors import AudioError, ConfigError, SpeechLMError, TokenizerError
from speechlm_ext.tokenizers import TokenizerSet

Row = dict[str, Any]
_CHUNK = 8
#: Below this many utterances starting processes takes longer than the work.
_WORTH_PROCESSES = 64


class Encoder:
    """Turns an utterance into a shard row."""

    def __init__(self, tokenizers: TokenizerSet, resample: bool = True) -> None:
        self.tokenizers, self.resample = tokenizers, resample
        rates = {t.sample_rate for t in (tokenizers.ssl, tokenizers.codec) if t is not None}
        if len(rates) > 1:
            raise ConfigError(f"ssl and codec tokenizers must share a sampling rate, got {sorted(rates)} Hz.")
        self.sample_rate: int | None = next(iter(rates), None)

    def encode(self, utterance: Utterance) -> Row:
        """All tokens that the tokenizers give for an utterance.

        Raises:
            SpeechLMError: audio or text that cannot be used; the message names the utterance.
        """
        try:
            return self._encode(utterance)
        except SpeechLMError as error:
            raise type(error)(f"{utterance.where}: {error}") from None

    def _encode(self, utterance: Utterance) -> Row:
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

    def encode_or_reject(self, utterance: Utterance, skip_bad: bool) -> Row | Rejected:
        """As :meth:`encode`; with ``skip_bad`` an item that cannot be used becomes a :class:`Rejected`."""
        try:
            return self.encode(utterance)
        except SpeechLMError as error:
            if not skip_bad:
                raise
            return Rejected(utterance.id, utterance.manifest, utterance.line, str(error))


class EncoderPool:
    """Encodes many utterances in order; use it as a context manager."""

    def __init__(
        self, folder: Path, *, resample: bool, skip_bad: bool, num_workers: int | None, num_utterances: int
    ) -> None:
        """Load the tokenizers, or start processes that do.

        Args:
            folder: of the tokenizers.
            num_workers: processes; None takes one per usable core, 0 or 1 works in this process.
            num_utterances: how many will come in all; few are encoded in this process.
        """
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"num_workers must be >= 0, got {num_workers}.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = cores if num_workers is None else num_workers
        if num_workers is None and num_utterances < _WORTH_PROCESSES:
            count = 1
        self._skip_bad = skip_bad
        tokenizers = TokenizerSet.load(folder)
        tokenizers.prepare()  # what is missing is one error here, not one for each item or process
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # Spawned, because a forked child of a process with threads can hang.
            self._pool = ProcessPoolExecutor(
                count,
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(folder, resample),
            )
        else:
            self._encoder = Encoder(tokenizers, resample)

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, utterances: Sequence[Utterance]) -> Iterator[Row | Rejected]:
        """Rows in the order of ``utterances``.

        Raises:
            SpeechLMError: the first bad item, unless bad items are to be skipped.
        """
        if self._pool is None:
            yield from (self._encoder.encode_or_reject(u, self._skip_bad) for u in utterances)
            return
        chunks = [utterances[i : i + _CHUNK] for i in range(0, len(utterances), _CHUNK)]
        try:
            for rows, conversions in self._pool.map(_work, chunks, [self._skip_bad] * len(chunks)):
                add_conversions(conversions)
                yield from rows
        except BrokenProcessPool:
            raise TokenizerError(
                "a tokenizing process died, most likely for want of memory; finished shards are kept. Run the same "
                "command again with a smaller num_workers."
            ) from None


_worker: Encoder | None = None


def _start_worker(folder: Path, resample: bool) -> None:
    global _worker
    import torch

    torch.set_num_threads(1)
    _worker = Encoder(TokenizerSet.load(folder), resample)


def _work(
    utterances: Sequence[Utterance], skip_bad: bool
) -> tuple[list[Row | Rejected], Counter[tuple[int, int]]]:
    assert _worker is not None
    return [_worker.encode_or_reject(u, skip_bad) for u in utterances], take_conversions()
