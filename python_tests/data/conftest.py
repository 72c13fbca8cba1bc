"""Token folders made of random ids: they need no audio and no tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.data.tokens.format import write_index, write_shard
from speechlm_ext.data.tokens.index import shard_name
from speechlm_ext.layout import TokenLayout

LAYOUT = TokenLayout.build(ssl=20, codec=[16] * 3, text=50)
MakeFolder = Callable[..., TokenFolder]


def random_rows(
    count: int, seed: int = 0, dataset: str = "d", speakers: int = 3, longest: int = 60
) -> list[dict]:
    """Rows of a shard: ids ``<dataset><i>``, speakers in turn, codes from 0 on."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        text, speech = int(rng.integers(1, 12)), int(rng.integers(3, longest))
        rows.append(
            {
                "id": f"{dataset}{i}",
                "dataset": dataset,
                "speaker": f"s{i % speakers}" if speakers else None,
                "lang": "en" if i % 2 else "de",
                "text": f"text {i}",
                "duration": speech / 50,
                "text_bpe": rng.integers(0, 50, (text, 1)),
                "ssl": rng.integers(0, 20, (speech, 1)),
                "codec": rng.integers(0, 16, (speech, 3)),
            }
        )
    return rows


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write rows into a token folder and open it."""

    def make(
        rows: list[dict], name: str = "tokens", layout: TokenLayout = LAYOUT, per_shard: int = 7
    ) -> TokenFolder:
        folder = tmp_path / name
        starts = range(0, len(rows), per_shard)
        for number, start in enumerate(starts):
            write_shard(folder / shard_name(number), rows[start : start + per_shard], layout)
        write_index(folder, layout, len(starts))
        return TokenFolder.open(folder)

    return make
