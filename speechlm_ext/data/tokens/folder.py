"""Token folders: the output of ``speechlm tokenize`` and the input of everything later.

A folder holds ``token_layout.json``, ``tokenizers/``, ``shard-00000.parquet`` …, ``lengths.npz`` (frames, speaker,
data set, language, shard and row of every utterance) and ``index.json``, which is written last: a folder without
it is not finished. The index has every shard's rows, size and sha256, so a cut-off copy is found at opening.
Ids in shards are raw, from 0. A shard is read on first use and then stays in memory as two flat arrays per column, of
16 bits where the vocabulary allows it: about 1 MB for 10 minutes of 9 streams at 50 Hz.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechlm_ext.data.tokens.format import read_head
from speechlm_ext.data.tokens.index import (
    COLUMNS,
    HINT,
    INDEX,
    LENGTHS,
    WAY_OUT,
    check_file,
    check_lengths,
    index_sha256,
    read_index,
)
from speechlm_ext.errors import ShardError, foreign_errors
from speechlm_ext.layout import FILE_NAME, TokenLayout


class _Shard:
    """One shard in memory: per token column the concatenated ids of all rows, and each row's offset."""

    def __init__(self, path: Path, rows: int, sha256: str) -> None:
        with foreign_errors(ShardError, f"shard {path} cannot be read", HINT):
            data = path.read_bytes()
            # Before decoding: damaged bytes may decode to other ids without an error.
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ShardError(f"{path}: content does not match the sha256 in {INDEX}; {WAY_OUT}")
            self._read(pq.read_table(pa.BufferReader(data)), path, rows)

    def _read(self, table: pa.Table, path: Path, rows: int) -> None:
        if table.num_rows != rows:
            raise ShardError(f"shard {path} has {table.num_rows} rows, its index says {rows}; {WAY_OUT}")
        self.plain = {
            n: table[n].combine_chunks() for n in ("id", "dataset", "speaker", "lang", "text", "duration")
        }
        self.tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in COLUMNS:
            column = (
                pa.concat_arrays(table[name].chunks) if table[name].num_chunks != 1 else table[name].chunk(0)
            )
            flat = column.values.to_numpy(zero_copy_only=True)
            small = flat.size == 0 or (flat.min() >= 0 and flat.max() <= np.iinfo(np.uint16).max)
            self.tokens[name] = (
                flat.astype(np.uint16) if small else flat.copy(),
                column.offsets.to_numpy().copy(),
            )


class TokenFolder:
    """A finished token folder, opened for reading; see the module's text.

    Attributes:
        path: the folder.
        layout: its token layout.
        lengths: int32 ``[n]`` frames per utterance under ``text_bpe``, ``ssl`` and ``codec``; 0 where it has none.
        speaker, dataset, lang: int32 ``[n]`` index into ``names["speaker"]`` …, -1 where there is none.
        names: the names behind those indices.
        index: the content of ``index.json``.
    """

    def __init__(
        self, path: Path, layout: TokenLayout, index: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> None:
        self.path = path
        self.layout = layout
        self.index = index
        self.names: dict[str, list[str]] = index["names"]
        self.lengths = {c: arrays[c] for c in COLUMNS}
        self.speaker, self.dataset, self.lang = arrays["speaker"], arrays["dataset"], arrays["lang"]
        self._shard, self._row = arrays["shard"], arrays["row"]
        self._loaded: dict[int, _Shard] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> TokenFolder:
        """Open and check a folder: index, layout, each shard's size and layout hash.

        Args:
            verify: also read every shard and compare its sha256 now instead of on first use.

        Raises:
            ShardError: not a finished token folder, or a file in it is missing, truncated or of another layout.
            LayoutError: the layout file is damaged.
        """
        path = Path(path)
        if not (path / INDEX).is_file():
            problem = (
                "was not finished; run the same `speechlm tokenize` again, it continues where it stopped"
            )
            if not any(path.glob("shard-*.parquet")):
                problem = "is not a token folder; give the output_dir of `speechlm tokenize`"
            raise ShardError(f"{path} has no {INDEX}: it {problem}.")
        index = read_index(path / INDEX)
        shards, names = index["shards"], index["names"]
        layout = TokenLayout.load(path)
        if layout.sha256 != index["layout_sha256"]:
            raise ShardError(
                f"{path}: the index was made for layout {index['layout_sha256'][:8]} but {FILE_NAME} holds {layout}; "
                "files of two folders were mixed. Tokenize again into an empty folder."
            )
        check_file(path / LENGTHS, index["lengths"], verify=True)
        for shard in shards:
            check_file(path / shard["name"], shard, verify)
            head = read_head(path / shard["name"])
            if head is None:
                raise ShardError(f"shard {path / shard['name']} cannot be read; {WAY_OUT}")
            if head.layout_sha256 != layout.sha256:
                raise ShardError(
                    f"shard {path / shard['name']} was written with layout {head.layout_sha256[:8]} but the folder has "
                    f"{layout}; their ids mean different things. Tokenize again into an empty folder."
                )
        with foreign_errors(ShardError, f"{path / LENGTHS} is damaged", HINT):
            with np.load(path / LENGTHS, allow_pickle=False) as file:
                arrays = {key: file[key] for key in (*COLUMNS, *names, "shard", "row")}
            check_lengths(arrays, index)
        if index.get("sha256", index_sha256(index)) != index_sha256(index):  # older folders have none
            raise ShardError(f"{path / INDEX}: content does not match its own sha256; {WAY_OUT}")
        return cls(path, layout, index, arrays)

    def __len__(self) -> int:
        return len(self._row)

    @cached_property
    def ids(self) -> list[str]:
        """Id of every utterance, in order."""
        out: list[str] = []
        for number in range(len(self.index["shards"])):
            out += self._get(number).plain["id"].to_pylist()
        return out

    def utterance(self, i: int) -> dict[str, Any]:
        """The stored data of utterance ``i``.

        Returns:
            ``id``, ``dataset``, ``speaker``, ``lang``, ``text``, ``duration`` (seconds), and raw ids int32
            ``text_bpe [T, 1]``, ``ssl [T, 1]``, ``codec [T, K]``; None for missing ones.

        Raises:
            ShardError: its shard cannot be read.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} utterances, asked for number {i}.")
        shard, row = self._get(int(self._shard[i])), int(self._row[i])
        out: dict[str, Any] = {name: column[row].as_py() for name, column in shard.plain.items()}
        for name in COLUMNS:
            width = self.layout.num_codebooks if name == "codec" else 1
            length = int(self.lengths[name][i])
            flat, offsets = shard.tokens[name]
            ids = flat[offsets[row] : offsets[row + 1]]
            if ids.size != length * width:
                raise ShardError(
                    f"{self.path}: utterance {out['id']!r} has {ids.size} {name} ids, expected {length * width}; "
                    f"{WAY_OUT}"
                )
            out[name] = ids.astype(np.int32).reshape(length, width) if length else None
        return out

    def _get(self, number: int) -> _Shard:
        shard = self._loaded.get(number)
        if shard is None:
            entry = self.index["shards"][number]
            shard = self._loaded[number] = _Shard(self.path / entry["name"], entry["rows"], entry["sha256"])
        return shard


class TokenCorpus:
    """Several token folders of one layout as one list of utterances, folder after folder.

    Attributes as in :class:`TokenFolder`; a speaker is the same person only within one data set.
    """

    def __init__(self, folders: Sequence[TokenFolder]) -> None:
        if not folders:
            raise ShardError(
                "no token folder was given; give at least one output_dir of `speechlm tokenize`."
            )
        self.folders = list(folders)
        self.layout = folders[0].layout
        for other in folders[1:]:
            self.layout.require_same(
                other.layout, f"token folder {folders[0].path}", f"token folder {other.path}"
            )
        self._start = np.cumsum([0] + [len(f) for f in folders])
        self.lengths = {c: np.concatenate([f.lengths[c] for f in folders]) for c in COLUMNS}
        self.datasets: list[str] = []
        self.langs: list[str] = []
        self.dataset = np.concatenate([_merge(f.dataset, f.names["dataset"], self.datasets) for f in folders])
        self.lang = np.concatenate([_merge(f.lang, f.names["lang"], self.langs) for f in folders])
        # Numbers of (data set, speaker) pairs; -1 is no speaker.
        names: list[str] = []
        local = np.concatenate([_merge(f.speaker, f.names["speaker"], names) for f in folders]).astype(
            np.int64
        )
        pair = np.where(local < 0, -1, self.dataset.astype(np.int64) * max(len(names), 1) + local)
        self.speaker = np.where(pair < 0, -1, np.unique(pair, return_inverse=True)[1] - int((pair < 0).any()))

    def __len__(self) -> int:
        return int(self._start[-1])

    def utterance(self, i: int) -> dict[str, Any]:
        """As :meth:`TokenFolder.utterance`, counted over all folders."""
        folder = int(np.searchsorted(self._start, i, side="right")) - 1
        return self.folders[folder].utterance(int(i - self._start[folder]))


def _merge(indices: np.ndarray, names: Sequence[str], known: list[str]) -> np.ndarray:
    """Renumber one folder's name indices into the list ``known``, which grows."""
    position = {name: k for k, name in enumerate(known)}
    table = []
    for name in names:
        if name not in position:
            position[name] = len(known)
            known.append(name)
        table.append(position[name])
    return np.array([*table, -1], np.int32)[indices]


#: Token folders in any form.
Tokens = str | Path | TokenFolder | TokenCorpus | Sequence[str | Path | TokenFolder]


def open_tokens(tokens: Tokens, delays: Sequence[int] | None = None) -> TokenCorpus:
    """Open token folders given in any form.

    Args:
        delays: of each stream, instead of those in the folders' layout. Stored ids are not delayed, so the same
            folders serve every stream layout.

    Raises:
        ShardError, LayoutMismatchError: the folders cannot be used. LayoutError: another number of delays than streams.
    """
    if not isinstance(tokens, TokenCorpus):
        if isinstance(tokens, (str, Path, TokenFolder)):
            tokens = [tokens]
        tokens = TokenCorpus([t if isinstance(t, TokenFolder) else TokenFolder.open(t) for t in tokens])
    if delays is not None and tuple(delays) != tokens.layout.delays:
        tokens = copy.copy(tokens)
        tokens.layout = tokens.layout.with_delays(delays)
    return tokens
