"""Files of units, one row for each recording: the formats of other programs, and the parts of an unfinished run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechlm_ext.data.manifest import Rejected
from speechlm_ext.errors import KMeansError, foreign_errors
from speechlm_ext.utils.files.io import atomic_path
from speechlm_ext.utils.files.json_shape import build
from speechlm_ext.utils.files.json_text import json_line, parse_json

Format = Literal["text", "km", "jsonl", "parquet"]
SUFFIXES = {"text": ".txt", "km": ".km", "jsonl": ".jsonl", "parquet": ".parquet"}
Write = Callable[[str, np.ndarray], None]

_SCHEMA = pa.schema([("id", pa.string()), ("units", pa.list_(pa.int32()))])
_PART_SCHEMA = _SCHEMA.append(pa.field("rejected", pa.string()))
_ROWS_PER_GROUP = 1000


@contextlib.contextmanager
def unit_writer(form: Format, path: Path) -> Iterator[Write]:
    """A function ``write(id, units [T])`` that appends to a file; formats: see ``AssignConfig.format``."""
    if form == "parquet":
        with pq.ParquetWriter(path, _SCHEMA) as table:
            rows: list[dict[str, Any]] = []

            def write_row(name: str, units: np.ndarray) -> None:
                rows.append({"id": name, "units": units})
                if len(rows) == _ROWS_PER_GROUP:
                    table.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                    rows.clear()

            yield write_row
            table.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
        return
    with open(path, "w", encoding="utf-8") as file:

        def write_line(name: str, units: np.ndarray) -> None:
            if form == "jsonl":
                line = json_line({"id": name, "units": units.tolist()})
            else:
                line = " ".join([*([name] if form == "text" else []), *map(str, units.tolist())]) + "\n"
            file.write(line)

        yield write_line


def deduplicated(units: np.ndarray) -> np.ndarray:
    """Units ``[T]`` with each run of one unit cut to its first."""
    return units[np.concatenate([[True], units[1:] != units[:-1]])] if len(units) else units


def write_part(path: Path, ids: Sequence[str], results: Sequence[np.ndarray | Rejected]) -> None:
    """Write the units of some recordings, or why they were rejected, into one file, atomically."""
    rows = []
    for name, result in zip(ids, results, strict=True):
        if isinstance(result, Rejected):
            rows.append({"id": name, "rejected": json.dumps(asdict(result))})
        else:
            rows.append({"id": name, "units": result})
    with atomic_path(path) as temporary:
        table = pa.Table.from_pylist(rows, schema=_PART_SCHEMA)
        pq.write_table(table, temporary, write_page_checksum=True)


def read_part(path: Path) -> list[tuple[str, np.ndarray | Rejected]]:
    """Id, and units int32 ``[T]`` or the reason of rejection, of each recording. Raises :class:`KMeansError`."""
    with foreign_errors(KMeansError, f"{path} is damaged", "Delete it and run the same command again."):
        table = pq.read_table(path, schema=_PART_SCHEMA, page_checksum_verification=True)
        results: list[tuple[str, np.ndarray | Rejected]] = []
        for row in table.to_pylist():
            name, units, rejected = row["id"], row["units"], row["rejected"]
            if rejected is not None:
                results.append((name, build(Rejected, parse_json(rejected))))
            elif units is None or None in units or name is None:
                raise ValueError(f"recording {name!r} has no units")
            else:
                results.append((name, np.asarray(units, np.int32)))
        return results
