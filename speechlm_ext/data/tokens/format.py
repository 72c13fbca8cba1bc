"""Writing a token folder: Parquet shards of raw ids, ``lengths.npz``, and ``index.json`` last.

A shard appears under its name when it is whole, and its metadata holds the layout's hash, a hash of its inputs, and the
items that were left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechlm_ext.data.tokens.index import COLUMNS, FORMAT, INDEX, LENGTHS, VERSION, index_sha256, shard_name
from speechlm_ext.errors import ShardError, foreign_errors
from speechlm_ext.layout import TokenLayout
from speechlm_ext.utils.files.io import atomic_path, atomic_write_json, sha256_file
from speechlm_ext.utils.files.json_shape import check_shape
from speechlm_ext.utils.files.json_text import parse_json

_META_LAYOUT = b"speechlm.layout_sha256"
_META_INPUTS = b"speechlm.inputs_sha256"
_META_REJECTED = b"speechlm.rejected"

_SCHEMA = pa.schema(
    [("id", pa.string()), ("dataset", pa.string()), ("speaker", pa.string()), ("lang", pa.string())]
    + [("text", pa.string()), ("duration", pa.float64())]
    + [(c, pa.list_(pa.int32())) for c in COLUMNS]
    + [(f"{c}_len", pa.int32()) for c in COLUMNS]
)


def write_shard(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    layout: TokenLayout,
    inputs_sha256: str = "",
    rejected: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write one shard atomically.

    Args:
        path: its final name.
        rows: per utterance ``id``, ``dataset``, ``speaker``, ``lang``, ``text``, ``duration`` and int arrays
            ``[T, C]`` (or None) under ``text_bpe``, ``ssl``, ``codec``.
        inputs_sha256: hash of the shard's inputs; a restart compares it.
        rejected: items of this shard that were left out.

    Raises:
        StorageError: it cannot be written.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for row in rows:
        for name in ("id", "dataset", "speaker", "lang", "text", "duration"):
            columns[name].append(row.get(name))
        for name in COLUMNS:
            ids = row.get(name)
            columns[name].append(None if ids is None else np.ascontiguousarray(ids, np.int32).reshape(-1))
            columns[f"{name}_len"].append(0 if ids is None else len(ids))
    schema = _SCHEMA.with_metadata(
        {
            _META_LAYOUT: layout.sha256.encode(),
            _META_INPUTS: inputs_sha256.encode(),
            _META_REJECTED: json.dumps(list(rejected)).encode(),
        }
    )
    table = pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


@dataclass(frozen=True)
class ShardHead:
    """Number of rows and metadata of a shard."""

    rows: int
    layout_sha256: str
    inputs_sha256: str
    rejected: list[dict[str, Any]]


def read_head(path: Path) -> ShardHead | None:
    """A shard's head, or None if there is no readable shard at ``path``."""
    try:
        meta = pq.read_metadata(path)
        keys = meta.metadata or {}
        rejected = parse_json(keys[_META_REJECTED])
        check_shape(rejected, list[dict[str, Any]])
        return ShardHead(meta.num_rows, keys[_META_LAYOUT].decode(), keys[_META_INPUTS].decode(), rejected)
    except (OSError, LookupError, ValueError, pa.ArrowException):
        return None


def write_index(
    folder: Path, layout: TokenLayout, num_shards: int, extra: Mapping[str, Any] | None = None
) -> int:
    """Write ``lengths.npz`` and then ``index.json`` over the first ``num_shards`` shards of ``folder``.

    Returns:
        Number of utterances.

    Raises:
        ShardError: a shard is missing, unreadable or of another layout. StorageError: the disk is full.
    """
    names: dict[str, dict[str, int]] = {"dataset": {}, "speaker": {}, "lang": {}}
    parts: dict[str, list[np.ndarray]] = {}
    shards = []
    for number in range(num_shards):
        path = folder / shard_name(number)
        head = read_head(path)
        if head is None or head.layout_sha256 != layout.sha256:
            raise ShardError(
                f"{path} is missing, damaged, or of another layout than {layout}; run `speechlm tokenize` again, it "
                "writes the shards that are not there."
            )
        with foreign_errors(ShardError, f"{path} is damaged", "Delete it and run `speechlm tokenize` again."):
            # All columns, for the pages' checksums: otherwise the index would hold hashes of damaged pages.
            table = pq.read_table(path, page_checksum_verification=True)
            for key, known in names.items():
                values = table[key].to_pylist()
                ids = [-1 if v is None else known.setdefault(v, len(known)) for v in values]
                parts.setdefault(key, []).append(np.array(ids, np.int32))
            for column in COLUMNS:
                parts.setdefault(column, []).append(table[f"{column}_len"].to_numpy().astype(np.int32))
        parts.setdefault("shard", []).append(np.full(head.rows, number, np.int32))
        parts.setdefault("row", []).append(np.arange(head.rows, dtype=np.int32))
        shards.append(
            {"name": path.name, "rows": head.rows, "size": path.stat().st_size, "sha256": sha256_file(path)}
        )
    arrays = {key: np.concatenate(value) for key, value in parts.items()}
    with atomic_path(folder / LENGTHS) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    layout.save(folder)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "layout_sha256": layout.sha256,
        "num_utterances": len(arrays["row"]),
        "frames": {c: int(arrays[c].sum()) for c in COLUMNS},
        "lengths": {"size": (folder / LENGTHS).stat().st_size, "sha256": sha256_file(folder / LENGTHS)},
        "shards": shards,
        "names": {key: list(known) for key, known in names.items()},
        **(extra or {}),
    }
    atomic_write_json(folder / INDEX, {**index, "sha256": index_sha256(index)})
    return len(arrays["row"])
