"""Recordings of a folder: which are taken, under which ids, and what is said of the rest."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest

from speechlm_ext.audio.files import write_wav
from speechlm_ext.data.recordings import find_audio
from speechlm_ext.errors import AudioError, KMeansError
from speechlm_ext.kmeans.features.sources import open_source
from speechlm_ext.units.recordings import estimated_frames


def test_linked_folders_are_read_and_side_files_counted(tmp_path, caplog):
    write_wav(tmp_path / "set" / "s1" / "u1.wav", np.zeros(1600), 16000)
    write_wav(tmp_path / "far" / "u2.wav", np.zeros(800), 16000)
    (tmp_path / "set" / "s2").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "s1" / "back").symlink_to("..")
    (tmp_path / "set" / "s1" / "._u1.wav").write_bytes(b"\0\5\x16\7" + bytes(60))
    with caplog.at_level(logging.INFO, "speechlm_ext"):
        found = find_audio(tmp_path / "set")
    assert [u.id for u in found] == ["s1/u1", "s2/u2"]
    assert found[1].audio == tmp_path / "set" / "s2" / "u2.wav"
    assert "2 recordings; left out: 1 hidden files, 1 links to folders" in caplog.text
    assert estimated_frames(found, 50.0) == 6 + 3
    shutil.rmtree(tmp_path / "far")
    (tmp_path / "set" / "s1" / "u1.wav").unlink()
    with pytest.raises(AudioError, match=r"no recordings .* left out: 1 hidden files, .*links to nothing"):
        find_audio(tmp_path / "set")


def test_feature_shards_of_a_folder_are_counted_too(tmp_path, caplog):
    np.save(tmp_path / "a.npy", np.ones((3, 2), np.float32))
    np.save(tmp_path / "b.npy", np.ones((4, 2), np.float32))
    (tmp_path / "b.npy").rename(tmp_path / "b.NPY")
    (tmp_path / "._a.npy").write_bytes(b"\0\5\x16\7")
    (tmp_path / "more").mkdir()
    with caplog.at_level(logging.INFO, "speechlm_ext"):
        assert open_source(tmp_path).num_rows == 7
    assert "2 feature shards; left out: 1 hidden files, 1 sub-folders" in caplog.text
    with pytest.raises(KMeansError, match="no .npy and no .parquet files"):
        open_source(tmp_path / "more")
