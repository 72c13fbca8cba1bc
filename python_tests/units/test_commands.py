"""``speechlm kmeans fit | assign | inspect``: values, restarts, formats, refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from python_tests.assets import MANIFEST, SPEECH, recordings, waves
from python_tests.kmeans.conftest import kmeans, rows_of
from python_tests.tokenizers.encoders import models as hf_models
from speechlm_ext.importers.kmeans_centroids import from_centroids
from speechlm_ext.kmeans import KMeans
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.tokenizers.units import EncoderKMeans
from speechlm_ext.units import fit as cli_fit
from speechlm_ext.units.inspect import nearest_pairs
from speechlm_ext.units.unit_files import deduplicated, unit_writer


@pytest.fixture(scope="module")
def units(tmp_path_factory) -> Path:
    """Units of the committed recordings over MFCCs, fitted by the command line."""
    folder = tmp_path_factory.mktemp("units")
    code = kmeans(
        "fit", "--audio", MANIFEST, "--encoder", "mfcc", "--frames_per_token", 2, "--n_clusters", 20,
        "--output_dir", folder, "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    return folder


# ---- fit ---------------------------------------------------------------------------------------------------
def test_fit_on_shards_is_the_estimators_fit(pictures, features, tmp_path, capsys):
    assert (
        kmeans("fit", "--features", features, "--n_clusters", 8, "--output_dir", tmp_path / "u", "--seed", 3)
        == 0
    )
    expected = KMeans(8, random_state=3, max_iter=100, progress=False).fit(features)
    loaded = KMeans.load(tmp_path / "u")
    torch.testing.assert_close(loaded.cluster_centers_, expected.cluster_centers_, rtol=0, atol=0)
    assert loaded.inertia_ == expected.inertia_ and loaded.counts_.sum() == 1000
    assert sorted(p.name for p in (tmp_path / "u").iterdir()) == [
        "fit.json", "kmeans.json", "kmeans.safetensors", "usage.svg"]  # fmt: skip
    printed = capsys.readouterr().out
    assert "8 of 6 features" in printed and "encoder       not recorded" in printed
    # The same command again finds it done; another is told which setting differs.
    before = (tmp_path / "u" / "kmeans.safetensors").stat().st_mtime_ns
    assert (
        kmeans("fit", "--features", features, "--n_clusters", 8, "--output_dir", tmp_path / "u", "--seed", 3)
        == 0
    )
    assert "fitted already" in capsys.readouterr().out
    assert (tmp_path / "u" / "kmeans.safetensors").stat().st_mtime_ns == before
    assert (
        kmeans("fit", "--features", features, "--n_clusters", 9, "--output_dir", tmp_path / "u", "--seed", 3)
        == 2
    )
    assert "results with n_clusters = 8, not 9" in capsys.readouterr().err


def test_trials_of_the_start(features, tmp_path, capsys):
    words = [
        "fit",
        "--features",
        features,
        "--n_clusters",
        8,
        "--output_dir",
        tmp_path / "u",
        "--max_iter",
        1,
    ]
    assert kmeans(*words, "--n_local_trials", 1) == 0
    expected = KMeans(8, n_local_trials=1, max_iter=1).fit(features)
    assert torch.equal(KMeans.load(tmp_path / "u").cluster_centers_, expected.cluster_centers_)
    assert not torch.equal(expected.cluster_centers_, KMeans(8, max_iter=1).fit(features).cluster_centers_)
    assert kmeans(*words) == 2 and "results with n_local_trials = 1, not None" in capsys.readouterr().err


def test_fit_on_a_sample_of_shards(features, tmp_path):
    words = ["--features", features, "--n_clusters", 8, "--share", 0.5, "--max_frames", 300]
    assert kmeans("fit", *words, "--output_dir", tmp_path / "u", "--keep-features") == 0
    sample, x = np.load(tmp_path / "u" / "features" / "sample.npy"), rows_of(features)
    assert sample.shape == (300, 6) and KMeans.load(tmp_path / "u").counts_.sum() == 300
    places = [int(np.flatnonzero((x == row).all(1))[0]) for row in sample]
    # One row from each of 300 strata, in order.
    assert all(j * 1000 // 300 <= row < (j + 1) * 1000 // 300 for j, row in enumerate(places))
    expected = KMeans(8, max_iter=100, progress=False).fit(sample)
    torch.testing.assert_close(
        KMeans.load(tmp_path / "u").cluster_centers_, expected.cluster_centers_, rtol=0, atol=0
    )


def test_fit_on_recordings(units):
    encoder = build_encoder("mfcc", frames_per_token=2)
    x = torch.cat([encoder(wave) for wave in waves()])
    expected = KMeans(20, max_iter=100, progress=False).fit(x)
    loaded = KMeans.load(units)
    torch.testing.assert_close(loaded.cluster_centers_, expected.cluster_centers_, rtol=0, atol=0)
    assert loaded.features_ == encoder.describe() and not (units / "features").exists()


def test_fit_on_a_share_of_recordings(tmp_path):
    """A folder instead of a manifest; the kept frames add up to the share to within a frame."""
    code = kmeans(
        "fit", "--audio", SPEECH, "--encoder", "log-mel", "--n_clusters", 4, "--share", 0.1, "--keep-features",
        "--output_dir", tmp_path / "u", "--device", "cpu",
    )  # fmt: skip
    total = sum(-(-len(wave) // 160) for wave in waves())
    kept = rows_of(tmp_path / "u" / "features")
    assert code == 0 and len(kept) == int(0.1 * total)
    everything = torch.cat([build_encoder("log-mel")(wave) for wave in waves()]).numpy()
    assert {row.tobytes() for row in kept} <= {row.tobytes() for row in everything}


def test_max_frames_of_recordings(tmp_path):
    code = kmeans(
        "fit", "--audio", MANIFEST, "--encoder", "mfcc", "--n_clusters", 4, "--max_frames", 500, "--output_dir",
        tmp_path / "u", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and 495 <= int(KMeans.load(tmp_path / "u").counts_.sum()) <= 500


FIT_WORDS = [
    "fit",
    "--audio",
    MANIFEST,
    "--encoder",
    "mfcc",
    "--n_clusters",
    8,
    "--device",
    "cpu",
    "--tol",
    0,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> KMeans:
    """An uninterrupted fit, all recordings in one shard."""
    folder = tmp_path_factory.mktemp("whole")
    assert kmeans(*FIT_WORDS, "--output_dir", folder) == 0
    return KMeans.load(folder)


@pytest.mark.parametrize("stage", ["features", "iterations"])
def test_fit_goes_on_after_an_interruption(whole, tmp_path, monkeypatch, stage, capsys):
    monkeypatch.setattr(cli_fit, "_RECORDINGS_PER_SHARD", 5)
    module, name = (cli_fit.np, "concatenate") if stage == "features" else (KMeans, "save")
    original = getattr(module, name)
    calls = {"left": 1 if stage == "features" else 0}

    def stop(*args, **kwargs):
        if calls["left"] == 0:
            raise KeyboardInterrupt
        calls["left"] -= 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        assert kmeans(*FIT_WORDS, "--output_dir", tmp_path) == 130
    assert "rerun the same command to resume" in capsys.readouterr().err
    assert (tmp_path / "features" / "shard-00000.npy").is_file()
    assert (tmp_path / "features" / "shard-00002.npy").is_file() == (stage == "iterations")
    first = (tmp_path / "features" / "shard-00000.npy").stat().st_mtime_ns
    assert kmeans(*FIT_WORDS, "--output_dir", tmp_path, "--keep-features") == 0
    assert (tmp_path / "features" / "shard-00000.npy").stat().st_mtime_ns == first
    cut = KMeans.load(tmp_path)
    assert whole.fingerprint == cut.fingerprint and whole.inertia_history_ == cut.inertia_history_


def test_bad_recordings(tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    for recording in recordings()[:3]:
        (tmp_path / "audio" / recording.path.name).write_bytes(recording.path.read_bytes())
    (tmp_path / "audio" / "broken.wav").write_bytes(b"no sound")
    words = ["fit", "--audio", tmp_path / "audio", "--encoder", "mfcc", "--n_clusters", 4, "--device", "cpu"]
    assert kmeans(*words, "--output_dir", tmp_path / "a") == 2
    message = capsys.readouterr().err
    assert "'broken'" in message and "cannot be read" in message
    # The same folder goes on where bad recordings are allowed.
    assert kmeans(*words, "--output_dir", tmp_path / "a", "--skip-bad", "--keep-features") == 0
    rejected = [json.loads(line) for line in (tmp_path / "a" / "rejected.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rejected] == [
        "broken"
    ] and "1 bad recording left out, see" in capsys.readouterr().out
    (tmp_path / "a" / "kmeans.json").unlink()
    assert kmeans(*words, "--output_dir", tmp_path / "a") == 2
    assert "left out under --skip_bad before, the first:" in capsys.readouterr().err


def test_settings_are_free_until_the_first_iteration(features, tmp_path, capsys):
    """Too many clusters, or a slip: the next try may use the same folder."""
    out = ["--output_dir", tmp_path / "u"]
    assert kmeans("fit", "--features", features, "--n_clusters", 5000, *out, "--max_frames", 400) == 2
    assert "at most 400 clusters" in capsys.readouterr().err
    assert kmeans("fit", "--features", features, "--n_clusters", 5000, *out, "--max_frames", 300) == 2
    assert "results with max_frames = 400, not 300" in capsys.readouterr().err  # the sample is there
    assert kmeans("fit", "--features", features, "--n_clusters", 8, *out, "--max_frames", 400) == 0
    assert KMeans.load(tmp_path / "u").counts_.sum() == 400
    assert kmeans("fit", "--features", features, "--n_clusters", 9, *out, "--max_frames", 400) == 2
    assert "results with n_clusters = 8, not 9" in capsys.readouterr().err


def test_fit_refusals(features, tmp_path, capsys, monkeypatch):
    def says(*words: object) -> str:
        assert kmeans("fit", *words, "--output_dir", tmp_path / "x") == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("speechlm: error: ") and "\n" not in message
        return message

    assert "either --audio" in says("--n_clusters", 4)
    assert "either --audio" in says("--audio", MANIFEST, "--features", features)
    assert "--audio needs --encoder" in says("--audio", MANIFEST)
    assert "share must be in (0, 1], got 0" in says("--features", features, "--share", 0)
    assert "max_frames must be at least 1" in says("--features", features, "--max_frames", 0)
    assert "--device must be cpu, cuda, cuda:N or auto, got 'tpu'" in says(
        "--features", features, "--device", "tpu"
    )
    assert "or auto, got 'cudas'" in says("--features", features, "--device", "cudas")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        message = says("--features", features, "--device", name)
        assert f"--device {name} is not available: torch finds no GPU" in message and "or use cpu" in message
    assert "has 6 features a row but mfcc gives 39" in says("--features", features, "--encoder", "mfcc")


# ---- assign ------------------------------------------------------------------------------------------------
def nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((x[:, None].astype(np.float64) - centroids.astype(np.float64)) ** 2).sum(2).argmin(1)


def test_assign_shards(shard_units, features, tmp_path, capsys):
    (tmp_path / "f").mkdir()
    for path in features.iterdir():
        x = np.load(path)
        if path.stem == "b":
            x[7, 2], x[9, 0] = np.nan, np.inf
        np.save(tmp_path / "f" / path.name, x)
    words = [
        "assign",
        "--kmeans",
        shard_units,
        "--features",
        tmp_path / "f",
        "--output_dir",
        tmp_path / "l",
    ]
    assert kmeans(*words) == 0
    assert "1000 rows of 3 shards (0 kept); 2 rows not finite" in capsys.readouterr().out
    centroids = KMeans.load(shard_units).cluster_centers_.numpy()
    for path in sorted((tmp_path / "f").iterdir()):
        labels, x = np.load(tmp_path / "l" / path.name), np.load(path)
        expected = np.where(np.isfinite(x).all(1), nearest(np.nan_to_num(x), centroids), -1)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, expected)
    assert not list((tmp_path / "l").glob("*.km"))
    # A restart makes what is missing and nothing else.
    (tmp_path / "l" / "b.npy").unlink()
    before = (tmp_path / "l" / "a.npy").stat().st_mtime_ns
    assert kmeans(*words) == 0 and "(2 kept); 2 rows not finite" in capsys.readouterr().out
    assert (tmp_path / "l" / "a.npy").stat().st_mtime_ns == before and (tmp_path / "l" / "b.npy").is_file()


def test_labels_of_shards_that_have_changed_are_refused(shard_units, features, tmp_path, capsys):
    x = np.load(features / "a.npy")
    np.save(tmp_path / "a.npy", x)
    words = [
        "assign",
        "--kmeans",
        shard_units,
        "--features",
        tmp_path / "a.npy",
        "--output_dir",
        tmp_path / "l",
    ]
    assert kmeans(*words) == 0
    np.save(tmp_path / "a.npy", x[::-1].copy())  # the same name and size
    assert (
        kmeans(*words) == 2
        and "results for other inputs: files of --features were added" in capsys.readouterr().err
    )


def test_fairseqs_lengths_give_its_labels(shard_units, features, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.load(features / "a.npy"))
    (tmp_path / "x.len").write_text("200\n0\n300\n")
    words = [
        "assign",
        "--kmeans",
        shard_units,
        "--features",
        tmp_path / "x.npy",
        "--output_dir",
        tmp_path / "l",
    ]
    assert kmeans(*words) == 0
    labels = np.load(tmp_path / "l" / "x.npy").tolist()
    lines = (tmp_path / "l" / "x.km").read_text().split("\n")
    assert [list(map(int, line.split())) for line in lines] == [labels[:200], [], labels[200:], []]
    (tmp_path / "x.len").write_text("200\n299\n")
    assert (
        kmeans(*words) == 2 and "adds up to 499 frames but its shard has 500 rows" in capsys.readouterr().err
    )


@pytest.mark.parametrize("form", ["text", "km", "jsonl", "parquet"])
def test_assign_recordings(units, tmp_path, form):
    words = ["assign", "--kmeans", units, "--audio", MANIFEST, "--device", "cpu", "--format", form]
    assert kmeans(*words, "--output_dir", tmp_path) == 0
    encoder, centroids = (
        build_encoder("mfcc", frames_per_token=2),
        KMeans.load(units).cluster_centers_.numpy(),
    )
    expected = {
        r.id: nearest(encoder(wave).numpy(), centroids).tolist()
        for r, wave in zip(recordings(), waves(), strict=True)
    }
    suffix = {"text": "txt"}.get(form, form)
    path = tmp_path / f"units.{suffix}"
    if form == "parquet":
        found = {row["id"]: row["units"] for row in pq.read_table(path).to_pylist()}
    elif form == "jsonl":
        found = {row["id"]: row["units"] for row in map(json.loads, path.read_text().splitlines())}
    else:
        lines = [line.split() for line in path.read_text().splitlines()]
        ids = list(expected) if form == "km" else [line[0] for line in lines]
        found = {i: [int(w) for w in line[form == "text" :]] for i, line in zip(ids, lines, strict=True)}
    assert found == expected and not (tmp_path / "parts").exists()


class PickledHere:
    """A process pool within this process: all that crosses its border is pickled. Processes: see the tests of data."""

    def __init__(self, num_workers, context, *, initializer, initargs) -> None:
        initializer(*pickle.loads(pickle.dumps(initargs)))

    def map(self, function, *lists):
        for items in zip(*lists, strict=True):
            yield pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(items)))))

    def shutdown(self, **_: object) -> None:
        pass


def test_assign_in_processes_gives_the_same(units, tmp_path, monkeypatch):
    monkeypatch.setattr("speechlm_ext.data.recordings.ProcessPoolExecutor", PickledHere)
    words = ["assign", "--kmeans", units, "--audio", MANIFEST, "--device", "cpu", "--deduplicate"]
    assert kmeans(*words, "--output_dir", tmp_path / "one", "--num_workers", 1) == 0
    assert kmeans(*words, "--output_dir", tmp_path / "two", "--num_workers", 2) == 0
    one = (tmp_path / "one" / "units.txt").read_text()
    assert one == (tmp_path / "two" / "units.txt").read_text()
    assert all(
        a != b for line in one.splitlines() for a, b in zip(line.split()[1:-1], line.split()[2:], strict=True)
    )


def test_assign_refusals(units, shard_units, features, tmp_path, capsys):
    def says(*words: object) -> str:
        assert kmeans("assign", *words) == 2
        return capsys.readouterr().err

    out = ["--output_dir", tmp_path / "x"]
    assert "either --audio" in says("--kmeans", units, *out)
    assert "no kmeans.json in" in says("--kmeans", tmp_path, "--features", features, *out)
    message = says("--kmeans", units, "--features", features, *out)
    assert "6 features a row but the units" in message and "have 39" in message
    assert "does not say which encoder" in says("--kmeans", shard_units, "--audio", MANIFEST, *out)
    wrong = says("--kmeans", shard_units, "--audio", MANIFEST, "--encoder", "mfcc", *out)
    assert "expected centroids [K, 39] for mfcc, got [8, 6]" in wrong
    other = says("--kmeans", units, "--audio", MANIFEST, "--encoder", "log-mel", *out)
    assert "encoder of the encoder log-mel is 'log-mel', but the centroids were fitted on 'mfcc'" in other
    same = says("--kmeans", shard_units, "--features", features, "--output_dir", features)
    assert "is the folder of the features" in same
    for name in ("a.npy", "A.npy"):
        (tmp_path / "case").mkdir(exist_ok=True)
        (tmp_path / "case" / name).write_bytes((features / "a.npy").read_bytes())
    if (
        len(list((tmp_path / "case").iterdir())) == 2
    ):  # their labels would be one file where case does not count
        message = says("--kmeans", shard_units, "--features", tmp_path / "case", *out)
        assert "two shards have one name" in message
    assert kmeans("assign", "--kmeans", shard_units, "--features", features, *out) == 0
    one = says("--kmeans", shard_units, "--features", features / "a.npy", *out)
    assert "results for other inputs" in one


def test_units_files(tmp_path):
    for form, expected in (("text", "a 1 1 2\nb\n"), ("km", "1 1 2\n\n")):
        with unit_writer(form, tmp_path / form) as write:
            write("a", np.array([1, 1, 2], np.int32))
            write("b", np.zeros(0, np.int32))
        assert (tmp_path / form).read_text() == expected
    assert deduplicated(np.array([3, 3, 1, 3, 3, 3])).tolist() == [3, 1, 3]
    assert deduplicated(np.zeros(0, int)).tolist() == []


@pytest.mark.parametrize("name", ["features", "checkpoint", "kmeans.json"])
def test_fit_leaves_alone_what_is_not_its_own(features, tmp_path, name, capsys):
    (tmp_path / name).mkdir()
    np.save(tmp_path / name / "a.npy", np.load(features / "a.npy"))
    words = ["fit", "--features", tmp_path / name, "--n_clusters", 4, "--output_dir", tmp_path]
    assert (
        kmeans(*words) == 2
        and f"{tmp_path / name} exists already and was written by another command" in capsys.readouterr().err
    )
    assert (tmp_path / name / "a.npy").is_file() and not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize("option", [("--format", "km"), ("--deduplicate",), ("--skip_bad",)])
def test_assign_says_which_options_shards_do_not_have(shard_units, features, tmp_path, capsys, option):
    words = ["--kmeans", shard_units, "--features", features, "--output_dir", tmp_path / "l", *option]
    assert kmeans("assign", *words) == 2
    assert f"{option[0]} is for recordings" in capsys.readouterr().err


def test_assign_leaves_alone_what_is_not_its_own(units, shard_units, features, tmp_path, capsys):
    def is_refused(path: Path, *words: object) -> bool:
        return kmeans("assign", *words) == 2 and f"{path} exists already" in capsys.readouterr().err

    words = ["--kmeans", units, "--audio", MANIFEST, "--output_dir", tmp_path]
    (tmp_path / "units.txt").write_text("mine")
    assert is_refused(tmp_path / "units.txt", *words)
    assert (tmp_path / "units.txt").read_text() == "mine"
    (tmp_path / "units.txt").unlink()
    (tmp_path / "parts").mkdir()
    assert is_refused(tmp_path / "parts", *words)
    np.save(tmp_path / "b.npy", np.zeros((3, 2)))
    words = ["--kmeans", shard_units, "--features", features, "--output_dir", tmp_path]
    assert is_refused(tmp_path / "b.npy", *words)


# ---- inspect -----------------------------------------------------------------------------------------------
def test_inspect(pictures, units, tmp_path, capsys):
    assert kmeans("inspect", "--kmeans", units, "--plot", tmp_path / "p.svg") == 0
    printed = capsys.readouterr().out
    fitted = KMeans.load(units)
    p = fitted.counts_.double() / fitted.counts_.sum()
    bits = float(-(p * p.log2()).sum())
    assert f"entropy {bits:.3f} of 4.322 bits" in printed and f"perplexity {2**bits:.1f} of 20" in printed
    assert "20 of 39 features" in printed and "encoder       mfcc, 50 frames/s" in printed
    assert f"{int((fitted.counts_ == 0).sum())} clusters without a frame" in printed
    distance = torch.cdist(fitted.cluster_centers_, fitted.cluster_centers_).fill_diagonal_(torch.inf)
    i, j = sorted(divmod(int(distance.argmin()), 20))
    assert f"nearest       {i} and {j} " in printed
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()


@pytest.mark.parametrize("counts", [None, [3, 0, 5]])
def test_inspect_of_imported_units(pictures, tmp_path, counts, capsys):
    from_centroids(np.eye(3, 4), counts=None if counts is None else np.array(counts)).save(tmp_path)
    assert kmeans("inspect", "--kmeans", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "3 of 4 features" in printed and "0 and 1 (1.414 apart)" in printed
    if counts is None:
        assert "usage         not recorded" in printed and not (tmp_path / "usage.svg").exists()
    else:
        assert (
            "8 frames, 0 iterations, inertia not recorded" in printed
            and "1 cluster without a frame" in printed
        )
        assert (tmp_path / "usage.svg").is_file()


def test_nearest_pairs():
    x = torch.tensor([[0.0], [10.0], [10.5], [0.25], [-7.0]])
    assert nearest_pairs(x, 2) == [(0, 3, 0.25), (1, 2, 0.5)]
    assert len(nearest_pairs(x, 99)) == 10 and nearest_pairs(x[:1], 3) == []
    many = torch.randn(2100, 3, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(many.double(), many.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance[torch.tril_indices(2100, 2100).unbind()] = torch.inf
    at = distance.flatten().topk(4, largest=False)
    expected = [(int(k) // 2100, int(k) % 2100) for k in at.indices]
    assert [(i, j) for i, j, _ in nearest_pairs(many, 4)] == expected


# ---- a model as encoder, and the tokenizer ------------------------------------------------------------------
def test_units_of_a_model_from_fit_to_tokenizer(tmp_path):
    hf_models.make("hubert", tmp_path / "model")
    encoder = f"hf:{tmp_path / 'model'}:2"
    words = ["--audio", MANIFEST, "--encoder", encoder, "--n_clusters", 10, "--device", "cpu"]
    assert kmeans("fit", *words, "--output_dir", tmp_path / "u") == 0
    assert (
        kmeans("assign", "--kmeans", tmp_path / "u", "--audio", MANIFEST, "--output_dir", tmp_path / "l") == 0
    )
    # A model that has moved is named again; units that do not say their encoder are told it.
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = f"hf:{tmp_path / 'moved'}:2"
    assigned = ["assign", "--kmeans", tmp_path / "u", "--audio", MANIFEST, "--encoder", moved, "--output_dir"]
    assert kmeans(*assigned, tmp_path / "l2") == 0
    KMeans.load(tmp_path / "u").save(tmp_path / "plain", features={"encoder": "hubert"})
    assert kmeans(*assigned, tmp_path / "l3", "--kmeans", tmp_path / "plain") == 0
    texts = [(tmp_path / name / "units.txt").read_text() for name in ("l", "l2", "l3")]
    assert texts[0] == texts[1] == texts[2]
    (tmp_path / "moved").rename(tmp_path / "model")
    tokenizer = EncoderKMeans.from_kmeans(tmp_path / "u")
    assert tokenizer.vocab_sizes == (10,) and tokenizer.frame_rate == 50
    for line, wave in zip((tmp_path / "l" / "units.txt").read_text().splitlines(), waves(), strict=True):
        assert [int(w) for w in line.split()[1:]] == tokenizer.encode(wave)[:, 0].tolist()
