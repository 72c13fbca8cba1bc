"""What is written and read: artefacts, pictures, and models of other programs."""

from __future__ import annotations

import json
import logging
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import speechlm_ext as sx
from speechlm_ext.errors import KMeansError
from speechlm_ext.importers import kmeans_centroids as convert
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.state import Checkpoint, State
from speechlm_ext.kmeans.usage import draw_usage, usage

joblib = pytest.importorskip("joblib", reason="models of scikit-learn need joblib: pip install scikit-learn")
sk = pytest.importorskip("sklearn.cluster", reason="models of scikit-learn need it: pip install scikit-learn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(x, dtype, tmp_path):
    rows = x.to(dtype)
    model = sx.KMeans(6, random_state=3, init=rows[:6], max_iter=4).fit(rows)
    model.save(tmp_path / "units", features={"encoder": "hubert", "layer": 9, "frame_rate": 50.0})
    assert sorted(p.name for p in (tmp_path / "units").iterdir()) == ["kmeans.json", "kmeans.safetensors"]
    loaded = sx.KMeans.load(tmp_path / "units")
    for name in ("cluster_centers_", "counts_"):
        assert torch.equal(getattr(loaded, name), getattr(model, name))
    for name in (
        "inertia_",
        "inertia_history_",
        "n_iter_",
        "n_steps_",
        "n_features_in_",
        "n_rows_",
        "fingerprint",
    ):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.features_ == {"encoder": "hubert", "layer": 9, "frame_rate": 50.0}
    assert torch.equal(loaded.predict(rows), model.labels_)
    loaded.save(tmp_path / "again")
    assert sx.KMeans.load(tmp_path / "again").features_ == model.features_
    record = json.loads((tmp_path / "units" / "kmeans.json").read_text())
    assert record["settings"]["init"].startswith("array ") and record["settings"]["random_state"] == 3
    with pytest.raises(KMeansError, match="features must be JSON values"):
        model.save(tmp_path / "bad", features={"encoder": torch.nn.Linear(1, 1)})


@pytest.mark.parametrize("name", ["cluster_centers_", "inertia_", "inertia_history_"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved_over_what_is(x, name, value, tmp_path):
    model = sx.KMeans(3).fit(x)
    model.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if name == "cluster_centers_":
        model.cluster_centers_[1, 0] = value
    else:
        setattr(model, name, value if name == "inertia_" else [1.0, value])
    with pytest.raises(KMeansError, match=rf"K-Means was not saved to .*first is {value}\) is not finite"):
        model.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_checkpoint_that_is_not_finite_is_never_saved_over_one_that_is(tmp_path):
    store = Checkpoint(tmp_path, Ranks(), {}, {})
    good = State(centers=torch.ones(2, 3), seen=torch.zeros(2, dtype=torch.float64), history=[2.5])
    store.save(good)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bad = torch.full((2, 3), torch.nan)
    for changes in ({"centers": bad}, {"history": [2.5, float("inf")]}, {"smoothed": float("nan")}):
        with pytest.raises(KMeansError, match="the fit was not saved .* is not finite"):
            store.save(replace(good, iteration=1, **changes))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    found = store.load(torch.device("cpu"))
    assert found is not None and torch.equal(found.centers, good.centers) and found.history == [2.5]


def test_the_fingerprint_is_of_centroids_and_features(x, tmp_path):
    model = sx.KMeans(3).fit(x)
    first = model.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first) and first == sx.KMeans(3).fit(x).fingerprint
    model.save(tmp_path, features={"layer": 9})
    assert model.fingerprint != first != sx.KMeans(3, random_state=1, init="random").fit(x).fingerprint


def test_damaged_artefacts_are_refused(x, tmp_path):
    sx.KMeans(3).fit(x).save(tmp_path, features={"layer": 9})
    arrays, text = (tmp_path / "kmeans.safetensors").read_bytes(), (tmp_path / "kmeans.json").read_text()
    record = json.loads(text)

    def refused(message: str) -> None:
        with pytest.raises(KMeansError, match=message):
            sx.KMeans.load(tmp_path)

    (tmp_path / "kmeans.safetensors").write_bytes(arrays[:-1] + bytes([arrays[-1] ^ 1]))
    refused("does not match its own sha256.*copy it again")
    (tmp_path / "kmeans.safetensors").write_bytes(arrays[:50])
    refused("kmeans.safetensors cannot be read")
    (tmp_path / "kmeans.safetensors").unlink()
    refused("kmeans.safetensors cannot be read")
    save_file({"centroids": torch.zeros(3, 6)}, tmp_path / "kmeans.safetensors")
    refused("kmeans.safetensors cannot be read .*cluster_centers")
    save_file(
        {"cluster_centers": torch.zeros(4, 6), "counts": torch.zeros(4)}, tmp_path / "kmeans.safetensors"
    )
    refused(r"expected centroids \[3, 6\] and counts \[3\] .* got \[4, 6\] and \[4\]")
    (tmp_path / "kmeans.safetensors").write_bytes(arrays)
    for change, message in (
        ({"version": 2}, "version 2 is not 1"),
        ({"format": "other"}, "not a K-Means description"),
        ({"features": {"layer": 8}}, "does not match its own sha256"),
        (
            {"settings": {"n_clusters": 3, "colour": 1, "init": "random"}},
            r"not a K-Means description \(.*colour",
        ),
        ({"settings": {}}, "not a K-Means description"),
    ):
        (tmp_path / "kmeans.json").write_text(json.dumps({**record, **change}))
        refused(message)
    for broken in ("{", "[]", "{}"):
        (tmp_path / "kmeans.json").write_text(broken)
        refused("not a K-Means description")
    (tmp_path / "kmeans.json").unlink()
    refused("no kmeans.json in .*is this the folder")


# ---- usage -----------------------------------------------------------------------------------------------------
def test_usage_by_hand():
    found = usage([2, 0, 1, 1])
    assert (found.num_clusters, found.num_rows, found.num_dead, found.dead_share) == (4, 4, 1, 0.25)
    assert found.entropy == 1.5 and found.perplexity == pytest.approx(2**1.5)  # 1/2 * 1 + 2 * 1/4 * 2 bits
    assert (found.smallest, found.largest) == (0, 2)
    assert usage(torch.full((8,), 7)).entropy == 3.0 and usage(np.array([5])).perplexity == 1.0
    for bad in ([], [0, 0], [-1, 2], [[1]]):
        with pytest.raises(KMeansError, match="expected counts"):
            usage(bad)


def test_pictures(x, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'speechlm_ext[eval]'")
    model = sx.KMeans(30).fit(x)
    found = draw_usage(model, tmp_path / "usage.svg")
    assert found.num_rows == 1500
    picture = (tmp_path / "usage.svg").read_bytes()
    assert picture.startswith(b"<?xml") and b"svg" in picture[:400]
    draw_usage(model, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == picture
    draw_usage(sx.KMeans(5, algorithm="minibatch", batch_size=100).fit(x), tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KMeansError, match=r"must end in .svg or .png"):
        draw_usage(model, tmp_path / "usage.jpg")
    with pytest.raises(KMeansError, match="needs centroids"):
        draw_usage(sx.KMeans(3), tmp_path / "usage.svg")


# ---- models of other programs ----------------------------------------------------------------------------------
class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["KMeans", "MiniBatchKMeans"])
def test_models_of_scikit_learn(x, kind, tmp_path, capsys):
    theirs = getattr(sk, kind)(7, n_init=1, random_state=0).fit(x.numpy())
    joblib.dump(theirs, tmp_path / "km.pkl")
    argv = [str(tmp_path / "km.pkl"), str(tmp_path / "units")]
    assert convert.main(argv) == 2 and not (tmp_path / "units").exists()
    assert "runs any code it holds" in capsys.readouterr().err
    assert convert.main([*argv, convert.CONSENT, "--features", '{"layer": 9}']) == 0
    assert "7 centroids of 6 features" in capsys.readouterr().out
    ours = sx.KMeans.load(tmp_path / "units")
    np.testing.assert_array_equal(ours.cluster_centers_.numpy(), theirs.cluster_centers_)
    np.testing.assert_array_equal(ours.predict(x.numpy()), theirs.predict(x.numpy()))
    assert ours.features_ == {"layer": 9} and ours.inertia_ is None and int(ours.counts_.sum()) > 0
    if kind == "KMeans":
        np.testing.assert_array_equal(ours.counts_.numpy(), np.bincount(theirs.labels_))


def test_nothing_is_unpickled_without_consent(tmp_path):
    made = tmp_path / "made"
    joblib.dump(Touch(made), tmp_path / "km.pkl")
    with pytest.raises(KMeansError, match=r"sha256 [0-9a-f]{64}\) is a pickle.*--run-code-in-this-file"):
        convert.from_joblib(tmp_path / "km.pkl", run_code_in_this_file=False)
    assert not made.exists()
    with pytest.raises(KMeansError, match="holds NoneType, not a fitted KMeans"):
        convert.from_joblib(tmp_path / "km.pkl", run_code_in_this_file=True)
    assert made.exists()  # which is why


def test_centroids_without_pickle(x, tmp_path, monkeypatch):
    np.save(tmp_path / "centroids.npy", x[:9].numpy())
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "centroids.npy"), str(tmp_path / "u")])
    monkeypatch.delitem(sys.modules, convert.__name__)
    with pytest.raises(SystemExit) as end:  # as `python -m` does
        runpy.run_module("speechlm_ext.importers.kmeans_centroids", run_name="__main__")
    assert end.value.code == 0
    model = sx.KMeans.load(tmp_path / "u")
    assert torch.equal(model.cluster_centers_, x[:9]) and model.predict(x[:9]).tolist() == list(range(9))


def test_refusals_of_the_converter(x, tmp_path, capsys):
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(4))
    np.save(tmp_path / "ints.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "nan.npy", np.array([[1.0], [np.nan]]))
    (tmp_path / "noise.pkl").write_bytes(b"no pickle")
    for name, message in (
        ("nowhere.npy", "cannot be read"),
        ("object.npy", r"cannot be read \(it holds Python objects\); such arrays are refused.* Save numbers"),
        ("no-object.npy", "cannot be read .*No such file"),
        ("flat.npy", r"centroids .*expected float16, float32 or float64 \[K, F\], got float64 \[4\]"),
        ("ints.npy", r"\[K, F\], got int64 \[2, 2\]"),
        ("nan.npy", "row 1 is not finite"),
    ):
        with pytest.raises(KMeansError, match=message):
            convert.from_npy(tmp_path / name)
    with pytest.raises(KMeansError, match="does not exist"):
        convert.from_joblib(tmp_path / "nowhere.pkl", run_code_in_this_file=True)
    with pytest.raises(KMeansError, match="cannot be unpickled"):
        convert.from_joblib(tmp_path / "noise.pkl", run_code_in_this_file=True)
    with pytest.raises(KMeansError, match=r"expected counts \[1500\] >= 0, got \[2\]"):
        convert.from_centroids(x, counts=np.array([1, 2]))
    assert convert.main([str(tmp_path / "flat.npy"), str(tmp_path / "u"), "--features", "[]"]) == 2
    assert "--features must be a JSON object" in capsys.readouterr().err


def test_fit_does_not_log_or_draw_bars_off_a_terminal(x, capsys, caplog):
    with caplog.at_level(logging.DEBUG, "speechlm_ext"):
        sx.KMeans(3).fit(x)
    assert capsys.readouterr().err == "" and not caplog.records
    sx.KMeans(3, progress=True).fit(x)
    assert re.search(
        r"k-means.*inertia .*shift .*empty 0", capsys.readouterr().err.replace("\r", " ").replace("\n", " ")
    )
