"""The shards of a token folder that is being made: which of them exist, encoding the others, and the index.

A shard appears under its name when it is whole and carries a hash of its inputs, so a restart makes only those that are
missing or whose inputs changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechlm_ext.data.manifest import Rejected, Utterance
from speechlm_ext.data.recordings import RecordingPool, read_wave
from speechlm_ext.data.tokenize.fit import FOLDER
from speechlm_ext.data.tokens.format import read_head, write_index, write_shard
from speechlm_ext.data.tokens.index import INDEX, shard_name
from speechlm_ext.errors import AudioError, ConfigError, ManifestError, ShardError, TokenizerError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tokenizers import TokenizerSet
from speechlm_ext.utils.files.io import atomic_write_text, sha256_json
from speechlm_ext.utils.files.json_text import json_line

REJECTED = "rejected.jsonl"
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


@dataclass(frozen=True)
class TokenizeResult:
    """Outcome of a run."""

    out: Path
    layout: TokenLayout
    complete: bool
    """Whether the folder is finished and has its index."""
    num_utterances: int
    num_rejected: int
    shards_made: int
    shards_kept: int
    """Shards of an earlier run."""


@dataclass(frozen=True)
class ShardWriter:
    """Encodes utterances into the shards of a folder."""

    folder: Path
    layout: TokenLayout
    utterances: Sequence[Utterance]
    rows_per_shard: int
    resample: bool
    skip_bad: bool

    @cached_property
    def groups(self) -> list[Sequence[Utterance]]:
        """The utterances of each shard."""
        size = self.rows_per_shard
        return [self.utterances[i : i + size] for i in range(0, len(self.utterances), size)]

    @cached_property
    def hashes(self) -> list[str]:
        """For each shard a hash of its inputs: rows, layout (with the tokenizers), and whether to resample."""
        names = ("id", "dataset", "speaker", "lang", "text", "start", "duration")
        return [
            sha256_json(
                [
                    self.layout.sha256,
                    self.resample,
                    [[*(getattr(u, name) for name in names), _audio_key(u.audio)] for u in group],
                ]
            )
            for group in self.groups
        ]

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / shard_name(number)

    def is_done(self, number: int) -> bool:
        """Whether the shard exists, made from the same inputs; the items it lacks must be allowed to be bad."""
        head = read_head(self.path(number))
        return (
            head is not None
            and head.inputs_sha256 == self.hashes[number]
            and head.layout_sha256 == self.layout.sha256
            and (self.skip_bad or not head.rejected)
        )

    def encode(self, numbers: Sequence[int], num_workers: int | None) -> None:
        """Write shards; the index, which no longer fits, is removed first.

        Raises:
            SpeechLMError: the first bad item, unless bad items are skipped.
        """
        if not numbers:
            return
        (self.folder / INDEX).unlink(missing_ok=True)
        total = sum(len(self.groups[n]) for n in numbers)
        pool = RecordingPool(
            partial(Encoder.load, self.folder / FOLDER, self.resample),
            skip_bad=self.skip_bad,
            num_workers=num_workers,
            num_items=total,
        )
        with pool, tqdm(total=total, unit="utt", desc="tokenize", disable=None) as bar:
            for number in numbers:
                rows: list[Row] = []
                rejected: list[dict[str, Any]] = []
                for item in pool(self.groups[number]):
                    if isinstance(item, Rejected):
                        rejected.append(asdict(item))
                    else:
                        rows.append(item)
                    bar.update()
                write_shard(self.path(number), rows, self.layout, self.hashes[number], rejected)

    def finish(
        self, rejected: Sequence[Rejected], *, num_made: int, num_kept: int, merge: bool
    ) -> TokenizeResult:
        """Write ``rejected.jsonl`` and the index once all shards exist; ``merge`` writes the index again.

        Raises:
            ShardError: with ``merge``, a shard is missing. ManifestError: every item is bad.
        """
        heads = [read_head(self.path(n)) for n in range(len(self.hashes))]
        bad = [asdict(r) for r in rejected] + [r for head in heads if head is not None for r in head.rejected]
        found = {
            n: head
            for n, head in enumerate(heads)
            if head is not None and head.inputs_sha256 == self.hashes[n]
        }
        num_utterances = sum(head.rows for head in found.values())
        result = TokenizeResult(
            self.folder, self.layout, len(found) == len(heads), num_utterances, len(bad), num_made, num_kept
        )
        if not result.complete:
            if merge:
                first = min(set(range(len(heads))) - set(found))
                raise ShardError(
                    f"{self.folder}: {len(heads) - len(found)} of {len(heads)} shards are not there yet or were made "
                    f"from other rows, the first is {shard_name(first)}. Run the parts that make them, then merge "
                    "again."
                )
            return result
        if not num_utterances:
            raise ManifestError(f"every one of {len(bad)} items is bad, the first: {bad[0]['reason']}")
        if bad or (self.folder / REJECTED).exists():
            atomic_write_text(self.folder / REJECTED, "".join(map(json_line, bad)))
        surplus = self._surplus_shards()
        if merge or surplus or not (self.folder / INDEX).is_file():
            (self.folder / INDEX).unlink(missing_ok=True)
            for path in surplus:
                path.unlink()
            write_index(self.folder, self.layout, len(heads), {"num_rejected": len(bad)})
        return result

    def _surplus_shards(self) -> list[Path]:
        """The shards of an earlier, longer manifest."""
        numbers = {path: path.stem.removeprefix("shard-") for path in self.folder.glob("shard-*.parquet")}
        return [path for path, n in numbers.items() if n.isdecimal() and int(n) >= len(self.hashes)]


def _audio_key(path: Path | None) -> list[str | int] | None:
    """Name and size of a recording; a size of -1 for one that cannot be read."""
    if path is None:
        return None
    try:
        return [path.name, path.stat().st_size]
    except OSError:
        return [path.name, -1]
