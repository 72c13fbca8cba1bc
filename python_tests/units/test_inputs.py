"""``speechlm kmeans``: what is said of inputs that have changed, and of options and files that cannot be used."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from python_tests.assets import MANIFEST
from python_tests.kmeans.conftest import kmeans, rows_of
from speechlm_ext.audio.files import write_wav
from speechlm_ext.errors import CheckpointError, KMeansError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.utils.text import counted


# ---- inputs that have changed ------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["finished", "sampled", "iterating"])
@pytest.mark.parametrize("same_size", [True, False])
def test_shards_that_were_replaced_are_noticed(features, tmp_path, capsys, monkeypatch, stage, same_size):
    (tmp_path / "f").mkdir()
    x = rows_of(features)
    np.save(tmp_path / "f" / "a.npy", x[:500])
    np.save(tmp_path / "f" / "b.npy", x[500:])
    words = ["fit", "--features", tmp_path / "f", "--n_clusters", 4, "--output_dir", tmp_path / "u"]
    words += ["--share", 0.5] if stage == "sampled" else []
    with monkeypatch.context() as patch:
        if stage != "finished":
            place = {"sampled": "estimator.fit_all_starts", "iterating": "fit.loop.assign_pass"}[stage]
            patch.setattr(
                f"speechlm_ext.kmeans.{place}",
                lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt),
            )
        assert kmeans(*words) == (0 if stage == "finished" else 130)
    assert (tmp_path / "u" / "features" / "sample.npy").exists() == (stage == "sampled")
    assert (tmp_path / "u" / "checkpoint").exists() == (stage == "iterating")
    before = (tmp_path / "f" / "b.npy").read_bytes()
    np.save(tmp_path / "f" / "b.npy", x[500:][::-1].copy() if same_size else x[500:900])
    assert ((tmp_path / "f" / "b.npy").stat().st_size == len(before)) == same_size
    capsys.readouterr()
    assert kmeans(*words) == 2
    message = capsys.readouterr().err
    assert "results for other shards: files of --features were added, removed or changed since" in message
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


def test_a_share_that_leaves_no_frame_is_told(tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    write_wav(tmp_path / "audio" / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    words = ["--audio", tmp_path / "audio", "--encoder", "mfcc", "--n_clusters", 1, "--share", 0.001]
    assert kmeans("fit", *words, "--output_dir", tmp_path / "u") == 2
    message = capsys.readouterr().err
    assert "no frame of 1 recording is left of a share of 0.001; give a larger --share" in message


def test_recordings_that_were_replaced_are_noticed(tmp_path, capsys):
    """By another sound of the same length under the same name."""
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        write_wav(tmp_path / "audio" / f"{name}.wav", 0.1 * rng.standard_normal(16000), 16000)
    words = ["--audio", tmp_path / "audio", "--device", "cpu", "--output_dir"]
    fitting = ["fit", "--encoder", "mfcc", "--n_clusters", 4, *words, tmp_path / "u"]
    assigning = ["assign", "--kmeans", tmp_path / "u", *words, tmp_path / "l"]
    assert kmeans(*fitting) == 0 and kmeans(*assigning) == 0
    size = (tmp_path / "audio" / "b.wav").stat().st_size
    write_wav(tmp_path / "audio" / "b.wav", 0.1 * rng.standard_normal(16000), 16000)
    assert (tmp_path / "audio" / "b.wav").stat().st_size == size
    capsys.readouterr()
    assert kmeans(*fitting) == 2
    assert "results for other recordings: files of --audio were added" in capsys.readouterr().err
    assert (
        kmeans(*assigning) == 2
        and "results for other inputs: files of --audio were added" in capsys.readouterr().err
    )


@pytest.mark.parametrize("stage", ["finished", "begun"])
def test_spellings_of_a_path_are_one_setting(features, tmp_path, capsys, monkeypatch, stage):
    (tmp_path / "feats").symlink_to(features)
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--n_clusters", 4, "--output_dir", "u"]
    with monkeypatch.context() as patch:
        if stage == "begun":
            patch.setattr(KMeans, "save", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        assert kmeans(*words, "--features", "feats/") == (0 if stage == "finished" else 130)
    for spelling in ("feats", "./feats", "feats//") if stage == "finished" else ("feats",):
        assert kmeans(*words, "--features", spelling) == 0
    assert kmeans(*words, "--features", features) == 2
    assert "results with features = 'feats', not " in capsys.readouterr().err
    for spelling in ("feats/a.npy", "./feats/a.npy", '["feats//a.npy"]'):
        assert kmeans(*words, "--output_dir", "v", "--features", spelling) == 0


# ---- options and files that cannot be used -----------------------------------------------------------------
@pytest.fixture
def says(capsys):
    """The one line of error that a command ends with."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert kmeans(*words) == 2
        printed = capsys.readouterr()
        message = printed.err.strip()
        assert message.startswith("speechlm: error: ") and "\n" not in message and printed.out == ""
        return message

    return run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--n_clusters", 0), "K-Means: --n_clusters must be an integer >= 1, got 0."),
        (("--tol", -1), "K-Means: --tol must be a number >= 0, got -1"),
        (("--n_clusters", 9, "--init_size", 3), "K-Means: --init_size = 3 rows are too few for 9 clusters"),
        (
            ("--init", "random", "--n_local_trials", 2),
            "K-Means: --n_local_trials = 2 only applies to the init methods",
        ),
        (("--share", 2), "--share must be in (0, 1], got 2"),
        (("--max_frames", -1), "--max_frames must be at least 1"),
        (
            ("--encoder", "mfcc", "--frames_per_token", 0),
            "mfcc: --frames_per_token must be at least 1, got 0",
        ),
        (("--resample", "false"), "--resample is for recordings; leave it out, or give --audio."),
        (("--skip_bad",), "--skip_bad is for recordings"),
        (("--frames_per_token", 2, "--skip_bad"), "--skip_bad, --frames_per_token are for recordings"),
    ],
)
def test_fit_on_shards_names_the_option(features, tmp_path, says, option, message):
    assert message in says("fit", "--features", features, "--output_dir", tmp_path / "u", *option)


def test_fit_on_recordings_has_no_column(tmp_path, says):
    words = [
        "fit",
        "--audio",
        MANIFEST,
        "--encoder",
        "mfcc",
        "--output_dir",
        tmp_path / "u",
        "--device",
        "cpu",
    ]
    assert "--column is for feature shards; leave it out, or give --features." in says(
        *words, "--column", "x"
    )
    assert "--num_workers must be >= 0, got -1" in says(*words, "--num_workers", -1)


def test_assign_has_only_options_with_an_effect(shard_units, features, tmp_path, says):
    words = ["assign", "--kmeans", shard_units, "--output_dir", tmp_path / "l"]
    assert "--resample is for recordings" in says(*words, "--features", features, "--resample", "false")
    message = says(*words, "--audio", MANIFEST, "--encoder", "mfcc", "--column", "x")
    assert "--column is for feature shards" in message


def test_shards_that_cannot_be_used_name_the_option(features, tmp_path, says):
    rows = np.load(features / "a.npy")
    rows[3, 1] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    pq.write_table(pa.table({"hidden": [[1.0], [2.0]]}), tmp_path / "x.parquet")
    (tmp_path / "folder").mkdir()
    words = ["fit", "--n_clusters", 4, "--output_dir", tmp_path / "u", "--features"]
    assert "row 3 has a value that is not a finite number" in (message := says(*words, tmp_path / "nan.npy"))
    assert message.endswith("or set nonfinite to 'drop' to drop such rows.")
    assert kmeans(*words, tmp_path / "nan.npy", "--nonfinite", "drop") == 0
    message = says(*words, tmp_path / "x.parquet")
    assert message.endswith("only hidden; set column to the one with the features.")
    message = says(*words, json.dumps([str(features / "a.npy"), str(tmp_path / "folder")]))
    assert f"shard {tmp_path / 'folder'} is a folder" in message and message.endswith("or list these.")


def test_names_of_files_are_not_taken_for_options():
    error = KMeansError("shard /n_init/x.npy: n_init must be 1, got /n_init", argument="n_init")
    assert error.for_command_line() == "shard /n_init/x.npy: --n_init must be 1, got /n_init"


@pytest.mark.parametrize("name", ["x.pdf", "x", "x.svg.gz"])
def test_inspect_looks_at_the_picture_first(shard_units, features, tmp_path, says, name):
    message = says("inspect", "--kmeans", shard_units, "--plot", tmp_path / name)
    assert f"--plot must end in .svg or .png, got {tmp_path / name}" in message
    assert "--pairs must be >= 0" in says("inspect", "--kmeans", shard_units, "--pairs", -1)


def test_one_and_many(tmp_path, capsys, says):
    """Nouns agree with their numbers, on both sides of one."""
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    rows = np.array([[0.0], [0.1], [np.nan], [5.0]])
    np.save(tmp_path / "a.npy", rows[[0, 1, 3]])
    out = ["--output_dir", tmp_path / "u"]
    assert kmeans("fit", "--features", tmp_path / "a.npy", "--n_clusters", 1, "--max_iter", 1, *out) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 feature\n" in printed and "3 frames, 1 iteration, inertia" in printed
    np.save(tmp_path / "a.npy", rows)
    words = [
        "assign",
        "--kmeans",
        tmp_path / "u",
        "--features",
        tmp_path / "a.npy",
        "--output_dir",
        tmp_path / "l",
    ]
    assert kmeans(*words) == 0
    assert "4 rows of 1 shard (0 kept); 1 row not finite, labelled -1" in capsys.readouterr().out
    np.save(tmp_path / "b.npy", np.zeros((3, 2)))
    message = says(*words[:3], "--features", tmp_path / "b.npy", "--output_dir", tmp_path / "m")
    assert "--features has 2 features a row but the units" in message
