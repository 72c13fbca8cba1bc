"""Token folders: what is written comes back, and every kind of damage is named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from python_tests.data.conftest import LAYOUT, MakeFolder, random_rows
from speechlm_ext.data.tokens.folder import TokenCorpus, TokenFolder
from speechlm_ext.data.tokens.format import write_index, write_shard
from speechlm_ext.data.tokens.index import INDEX, LENGTHS, shard_name
from speechlm_ext.errors import LayoutError, LayoutMismatchError, ShardError, StorageError
from speechlm_ext.layout import TokenLayout


def test_roundtrip(make_folder: MakeFolder) -> None:
    rows = random_rows(17)
    rows[3]["ssl"] = rows[3]["codec"] = rows[3]["duration"] = None
    rows[16]["text_bpe"] = rows[16]["text"] = rows[16]["speaker"] = None
    folder = make_folder(rows)
    assert len(folder) == 17 and folder.ids == [r["id"] for r in rows] and folder.layout == LAYOUT
    for i, row in enumerate(rows):
        got = folder.utterance(i)
        for name in ("text_bpe", "ssl", "codec"):
            if row[name] is None:
                assert got[name] is None and folder.lengths[name][i] == 0
            else:
                assert got[name].dtype == np.int32 and np.array_equal(got[name], row[name])
                assert folder.lengths[name][i] == len(row[name])
        assert {k: got[k] for k in ("id", "speaker", "lang", "text", "duration", "dataset")} == {
            k: row[k] for k in ("id", "speaker", "lang", "text", "duration", "dataset")
        }
        assert folder.names["lang"][folder.lang[i]] == row["lang"]
        assert (folder.speaker[i] == -1) == (row["speaker"] is None)
    with pytest.raises(IndexError, match="17 utterances, asked for number 17"):
        folder.utterance(17)


def test_large_ids_keep_their_value(tmp_path: Path) -> None:
    layout = TokenLayout.build(text=200_000)
    write_shard(
        tmp_path / shard_name(0),
        [{"id": "a", "dataset": "d", "text_bpe": np.array([[199_999], [0]])}],
        layout,
    )
    write_index(tmp_path, layout, 1)
    assert TokenFolder.open(tmp_path).utterance(0)["text_bpe"].tolist() == [[199_999], [0]]


def test_corpus_joins_folders_and_keeps_speakers_of_data_sets_apart(make_folder: MakeFolder) -> None:
    a, b = (
        make_folder(random_rows(5, dataset="a"), "a"),
        make_folder(random_rows(4, 1, dataset="b", speakers=2), "b"),
    )
    c = make_folder(random_rows(3, 2, dataset="a", speakers=0), "c")
    corpus = TokenCorpus([a, b, c])
    assert [corpus.utterance(i)["id"] for i in range(12)] == a.ids + b.ids + c.ids
    assert [corpus.datasets[i] for i in corpus.dataset] == ["a"] * 5 + ["b"] * 4 + ["a"] * 3
    assert corpus.speaker.tolist() == [0, 1, 2, 0, 1, 3, 4, 3, 4, -1, -1, -1]
    assert np.array_equal(corpus.lengths["ssl"], np.concatenate([f.lengths["ssl"] for f in (a, b, c)]))
    other = make_folder(random_rows(3), "o", TokenLayout.build(ssl=21, codec=[16] * 3, text=50))
    with pytest.raises(
        LayoutMismatchError,
        match="token folder .*/a .*ssl \\[256, 276\\) against ssl \\[256, 277\\)|vocabulary",
    ):
        TokenCorpus([a, other])
    with pytest.raises(ShardError, match="no token folder was given"):
        TokenCorpus([])


def test_truncated_missing_and_foreign_files_are_named(make_folder: MakeFolder) -> None:
    path = make_folder(random_rows(20)).path
    shard = path / shard_name(1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    sizes = f"has {len(whole) - 50} bytes, its index says {len(whole)}"
    with pytest.raises(ShardError, match=f"shard-00001.parquet {sizes}; "
                                         "it is truncated.*run `speechlm tokenize` again"):  # fmt: skip
        TokenFolder.open(path)
    shard.unlink()
    with pytest.raises(ShardError, match="shard-00001.parquet is missing"):
        TokenFolder.open(path)
    # The right size but other bytes: the footer is checked at opening, the rest when verify asks for it.
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(ShardError, match="shard-00001.parquet cannot be read"):
        TokenFolder.open(path)
    changed = bytearray(whole)
    changed[40] ^= 255
    shard.write_bytes(bytes(changed))
    with pytest.raises(ShardError, match="shard-00001.parquet: content does not match the sha256"):
        TokenFolder.open(path, verify=True)
    shard.write_bytes(whole)
    assert len(TokenFolder.open(path, verify=True)) == 20
    (path / LENGTHS).write_bytes(b"PK")
    with pytest.raises(ShardError, match="lengths.npz has 2 bytes"):
        TokenFolder.open(path)


def test_unfinished_and_foreign_folders(make_folder: MakeFolder, tmp_path: Path) -> None:
    path = make_folder(random_rows(8)).path
    index = (path / INDEX).read_text()
    (path / INDEX).unlink()
    with pytest.raises(ShardError, match="has no index.json: it was not finished; run the same"):
        TokenFolder.open(path)
    with pytest.raises(ShardError, match="is not a token folder"):
        TokenFolder.open(tmp_path / "nothing")
    for text in ("{", "[]", "{}"):
        (path / INDEX).write_text(text)
        with pytest.raises(ShardError, match="index.json is damaged"):
            TokenFolder.open(path)
    (path / INDEX).write_text(index.replace('"version": 1', '"version": 9'))
    with pytest.raises(ShardError, match="version 9; this release reads"):
        TokenFolder.open(path)


def test_layout_mismatch_is_refused(make_folder: MakeFolder) -> None:
    path = make_folder(random_rows(8)).path
    other = TokenLayout.build(ssl=21, codec=[16] * 3, text=50)
    other.save(path)
    with pytest.raises(ShardError, match="files of two folders were mixed"):
        TokenFolder.open(path)
    index = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps({**index, "layout_sha256": other.sha256}))
    with pytest.raises(ShardError, match="shard-00000.parquet was written with layout"):
        TokenFolder.open(path)
    with pytest.raises(ShardError, match="of another layout than"):
        write_index(path, other, 1)
    (path / "token_layout.json").write_text("{}")
    with pytest.raises(LayoutError, match="not a token layout"):
        TokenFolder.open(path)


def test_disk_full_names_the_shard_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="shard-00000.parquet: the disk is full .*free some space"):
        write_shard(tmp_path / shard_name(0), random_rows(3), LAYOUT)
    assert list(tmp_path.iterdir()) == []
