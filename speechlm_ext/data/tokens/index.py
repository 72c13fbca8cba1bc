"""``index.json`` of a token folder, and the comparison of the other files with it.

The index is written last and holds size and sha256 of every other file, and a sha256 of itself. Everything is checked
before it is used, so that an error about damage names file and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from speechlm_ext.errors import ShardError, foreign_errors
from speechlm_ext.utils.files.io import sha256_file, sha256_json
from speechlm_ext.utils.files.json_shape import SHA256, SIZE, Range, check_shape
from speechlm_ext.utils.files.json_text import read_json

INDEX = "index.json"
LENGTHS = "lengths.npz"
FORMAT = "speechlm-tokens"
VERSION = 1
#: Stored token columns; codec_ssl content is made of two of them.
COLUMNS = ("text_bpe", "ssl", "codec")

WAY_OUT = (
    "it is truncated, damaged or was replaced. Copy the folder again, or delete the shard and index.json and run "
    "`speechlm tokenize` again: it makes only what is missing."
)
HINT = "I" + WAY_OUT[1:]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.parquet"


_FILE = {"size": SIZE, "sha256": SHA256}
_COUNTS = Range(int, 0, np.iinfo(np.int64).max)
#: Shape of ``index.json``; ``speechlm tokenize`` adds the number of rejected items.
_INDEX_SHAPE = {
    "format": str,
    "version": int,
    "layout_sha256": SHA256,
    "num_utterances": SIZE,
    "frames": {c: _COUNTS for c in COLUMNS},
    "lengths": _FILE,
    "shards": [{"name": str, "rows": SIZE, **_FILE}],
    "names": {key: list[str] for key in ("dataset", "speaker", "lang")},
    "num_rejected?": SIZE,
    "sha256?": SHA256,
}


def read_index(path: Path) -> dict[str, Any]:
    """``index.json``, checked. Raises :class:`ShardError`."""
    index = read_json(path, ShardError, WAY_OUT)
    try:
        check_shape(index, {"format": str, "version": int, "...": Any})
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise ShardError(
                f"{path} is {index['format'][:40]} version {index['version']}; this release reads {FORMAT} version "
                f"{VERSION}. Use the release that wrote it, or tokenize again."
            )
        check_shape(index, _INDEX_SHAPE)
        for number, shard in enumerate(index["shards"]):
            check_shape(shard["name"], Literal[shard_name(number)], f"shards.{number}.name")
    except ShardError:
        raise
    except ValueError as problem:
        raise ShardError(f"{path} is damaged: {problem}; {WAY_OUT}") from None
    return index


def index_sha256(index: Mapping[str, Any]) -> str:
    """Hash of an index without its own hash."""
    return sha256_json({key: value for key, value in index.items() if key != "sha256"})


def check_lengths(arrays: Mapping[str, np.ndarray], index: Mapping[str, Any]) -> None:
    """Compare the arrays of ``lengths.npz`` with the index. Raises ``ValueError`` for the first difference."""
    rows = [shard["rows"] for shard in index["shards"]]
    num = index["num_utterances"]
    if num != sum(rows):
        raise ValueError(f"{INDEX} says {num} utterances but its shards have {sum(rows)}")
    highest = {key: len(names) - 1 for key, names in index["names"].items()}
    for key, array in arrays.items():
        if array.shape != (num,) or array.dtype != np.int32:
            raise ValueError(f"{key} should be int32 [{num}], got {array.dtype} {list(array.shape)}")
        low = -1 if key in highest else 0
        high = highest.get(key, np.iinfo(np.int32).max)
        if num and not (low <= int(array.min()) and int(array.max()) <= high):
            raise ValueError(f"{key} should be in [{low}, {high}], got {array.min()} to {array.max()}")
    if not np.array_equal(arrays["shard"], np.repeat(np.arange(len(rows)), rows)):
        raise ValueError(f"the shards' rows are not those of {INDEX}")
    if not np.array_equal(arrays["row"], np.concatenate([np.arange(n) for n in (0, *rows)])):
        raise ValueError(f"the row numbers are not those of {INDEX}")


def check_file(path: Path, entry: Mapping[str, Any], verify: bool) -> None:
    """Compare a file's size, and if asked its bytes, with what the index says. Raises :class:`ShardError`."""
    if not path.is_file():
        raise ShardError(f"{path} is missing, though {INDEX} names it; {WAY_OUT}")
    with foreign_errors(ShardError, f"{path} cannot be read", HINT):
        size = path.stat().st_size
        is_other = verify and size == entry["size"] and sha256_file(path) != entry["sha256"]
    if size != entry["size"]:
        raise ShardError(f"{path} has {size} bytes, its index says {entry['size']}; {WAY_OUT}")
    if is_other:
        raise ShardError(f"{path}: content does not match the sha256 in {INDEX}; {WAY_OUT}")
