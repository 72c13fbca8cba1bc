"""``speechlm kmeans``: what is said of inputs that have changed, and of options and files that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from speechlm_ext.audio import write_wav
from speechlm_ext.errors import CheckpointError
from speechlm_ext.kmeans import KMeans

from .conftest import kmeans, rows_of


# ---- inputs that have changed ------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["finished", "sampled", "iterating"])
@pytest.mark.parametrize("same_size", [True, False])
def test_shards_that_were_replaced_are_noticed(features, tmp_path, capsys, monkeypatch, stage, same_size):
    (tmp_path / "f").mkdir()
    x = rows_of(features)
    np.save(tmp_path / "f" / "a.npy", x[:500])
    np.save(tmp_path / "f" / "b.npy", x[500:])
    words = ["fit", "--features", tmp_path / "f", "--n_clusters", 4, "--output", tmp_path / "u"]
    words += ["--share", 0.5] if stage == "sampled" else []
    with monkeypatch.context() as patch:
        if stage != "finished":
            place = "speechlm_ext.kmeans.fitting." + ("run_fit" if stage == "sampled" else "walk")
            place = place.replace("fitting.run_fit", "estimator.run_fit")
            patch.setattr(place, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        assert kmeans(*words) == (0 if stage == "finished" else 1)
    assert (tmp_path / "u" / "features" / "sample.npy").exists() == (stage == "sampled")
    assert (tmp_path / "u" / "checkpoint").exists() == (stage == "iterating")
    before = (tmp_path / "f" / "b.npy").read_bytes()
    np.save(tmp_path / "f" / "b.npy", x[500:][::-1].copy() if same_size else x[500:900])
    assert ((tmp_path / "f" / "b.npy").stat().st_size == len(before)) == same_size
    capsys.readouterr()
    assert kmeans(*words) == 2
    message = capsys.readouterr().err
    assert "a fit on other shards: files of --features have come, gone or changed since" in message
    # With the file of before it goes on.
    (tmp_path / "f" / "b.npy").write_bytes(before)
    assert kmeans(*words) == 0
    assert KMeans.load(tmp_path / "u").counts_.sum() == (500 if stage == "sampled" else 1000)


def test_a_checkpoint_over_shards_that_were_replaced_is_refused(features, tmp_path):
    """Without the command line: by what the rows add up to and some of them."""
    np.save(tmp_path / "a.npy", np.load(features / "a.npy"))
    KMeans(4, max_iter=2).fit(tmp_path / "a.npy", checkpoint=tmp_path / "c")
    np.save(tmp_path / "a.npy", np.load(features / "a.npy")[::-1].copy())
    with pytest.raises(CheckpointError, match="of a fit with data content = "):
        KMeans(4, max_iter=2).fit(tmp_path / "a.npy", checkpoint=tmp_path / "c")


def test_recordings_that_were_replaced_are_noticed(tmp_path, capsys):
    """By another sound of the same length under the same name."""
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        write_wav(tmp_path / "audio" / f"{name}.wav", 0.1 * rng.standard_normal(16000), 16000)
    words = ["--audio", tmp_path / "audio", "--device", "cpu", "--output"]
    fitting = ["fit", "--encoder", "mfcc", "--n_clusters", 4, *words, tmp_path / "u"]
    assigning = ["assign", "--kmeans", tmp_path / "u", *words, tmp_path / "l"]
    assert kmeans(*fitting) == 0 and kmeans(*assigning) == 0
    size = (tmp_path / "audio" / "b.wav").stat().st_size
    write_wav(tmp_path / "audio" / "b.wav", 0.1 * rng.standard_normal(16000), 16000)
    assert (tmp_path / "audio" / "b.wav").stat().st_size == size
    capsys.readouterr()
    assert kmeans(*fitting) == 2
    assert "a fit on other recordings: files of --audio have come" in capsys.readouterr().err
    assert kmeans(*assigning) == 2 and "its inputs differs" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["finished", "begun"])
def test_spellings_of_a_path_are_one_setting(features, tmp_path, capsys, monkeypatch, stage):
    (tmp_path / "feats").symlink_to(features)
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--n_clusters", 4, "--output", "u"]
    with monkeypatch.context() as patch:
        if stage == "begun":
            patch.setattr(KMeans, "save", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        assert kmeans(*words, "--features", "feats/") == (0 if stage == "finished" else 1)
    for spelling in ("feats", "./feats", "feats//") if stage == "finished" else ("feats",):
        assert kmeans(*words, "--features", spelling) == 0
    assert kmeans(*words, "--features", features) == 2
    assert "a fit with features 'feats', not " in capsys.readouterr().err
    for spelling in ("feats/a.npy", "./feats/a.npy", '["feats//a.npy"]'):
        assert kmeans(*words, "--output", "v", "--features", spelling) == 0
