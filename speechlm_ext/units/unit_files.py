"""Files of units, one row for each recording: Kaldi's text, fairseq's ``.km``, JSON lines, Parquet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechlm_ext.utils.files.json_text import json_line

Format = Literal["text", "km", "jsonl", "parquet"]
SUFFIXES = {"text": ".txt", "km": ".km", "jsonl": ".jsonl", "parquet": ".parquet"}
Write = Callable[[str, np.ndarray], None]

_SCHEMA = pa.schema([("id", pa.string()), ("units", pa.list_(pa.int32()))])
_ROWS_PER_GROUP = 1000


@contextlib.contextmanager
def unit_writer(form: Format, path: Path) -> Iterator[Write]:
    """A function ``write(id, units [T])`` that appends to the file ``path``.

    Args:
        form: ``text``: ``id unit unit …``, as Kaldi and ESPnet read it; ``km``: the same without ids, as fairseq reads
            it; ``jsonl``: ``{"id": …, "units": […]}``; ``parquet``: columns ``id`` and ``units`` (list of int32).
    """
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
