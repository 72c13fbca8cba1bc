"""Files that an earlier commit wrote are read, continued and give what they gave then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import speechlm_ext as sx
from speechlm_ext.cli import main
from speechlm_ext.generation import GenerationRequest, SamplingSettings

EARLIER = Path(__file__).parents[1] / "assets" / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text("utf-8"))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; the recorded paths are relative to it."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


def rows() -> np.ndarray:
    """float32 ``[200, 3]`` that the K-Means was fitted on."""
    rng = np.random.default_rng(0)
    centers = rng.normal(0, 5, (5, 3))
    return (centers[rng.integers(0, 5, 200)] + rng.normal(0, 1, (200, 3))).astype(np.float32)


def test_a_model_generates_what_it_did():
    model = sx.SpeechLM.from_pretrained(EARLIER / "run")
    first, second = EXPECTED["texts"]
    task = "codec_ssl_plain_tts"
    results = model.generate(
        [
            GenerationRequest("a", task, text=first, settings=SamplingSettings(greedy=True, max_len=6)),
            GenerationRequest("b", task, text=second, settings=SamplingSettings(seed=3, max_len=6)),
        ]
    )
    assert str(model.layout.sha256) == EXPECTED["layout"]
    for result, expected in zip(results, EXPECTED["generated"], strict=True):
        np.testing.assert_array_equal(result.ids, expected["ids"])
        # Sixty steps of Griffin-Lim make 2e-4 of a last bit, which differs between kinds of processors.
        np.testing.assert_allclose(result.wav[::500], expected["wav"], rtol=0, atol=2e-3)


def test_a_run_is_resumed_with_the_same_losses(folder: Path):
    assert main(["train", "--config", "run/config.yaml", "--steps", "4"]) == 0
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    losses = {row["step"]: row["loss"] for row in log}
    for expected in EXPECTED["losses"]:
        assert losses[expected["step"]] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_token_folder_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        main(
            [
                "plan",
                "--data.tokens",
                "tokens",
                "--data.budget",
                "512",
                "--data.tasks",
                "[{task: codec_ssl_asr}]",
            ]
        )
        == 0
    )
    assert "codec_ssl_asr" in capsys.readouterr().out


def test_kmeans_artifact_and_interrupted_fit(folder: Path):
    model = sx.KMeans.load("kmeans")
    assert model.fingerprint == EXPECTED["fingerprint"] and model.features_ == {"encoder": "mfcc"}
    np.testing.assert_array_equal(model.predict(rows()), EXPECTED["labels"])
    continued = sx.KMeans(5, max_iter=20).fit(rows(), checkpoint="kmeans_checkpoint")
    np.testing.assert_array_equal(continued.cluster_centers_.numpy(), model.cluster_centers_.numpy())
    np.testing.assert_array_equal(continued.labels_, EXPECTED["labels"])


def test_encoder_units_are_the_same(folder: Path):
    from python_tests.assets import SPEECH
    from speechlm_ext.audio.files import read_audio
    from speechlm_ext.tokenizers import load_tokenizer

    wave, _ = read_audio(SPEECH / "digits-3.flac", 16000)
    units = load_tokenizer("encoder_kmeans").encode(wave)
    np.testing.assert_array_equal(units[:, 0], EXPECTED["encoder_units"])


def test_finished_requests_are_not_decoded_again(folder: Path):
    before = (folder / "results" / "results.jsonl").read_bytes()
    (folder / "results" / "wav" / "digits-3.wav").touch()
    command = ["generate", "--model", "run", "--requests", "requests.jsonl", "--output-dir", "results"]
    assert main(command) == 0
    assert (folder / "results" / "results.jsonl").read_bytes() == before


def test_records_are_scored_again(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = json.loads((folder / "evaluation" / "scores.json").read_text("utf-8"))
    assert main(["evaluate", "--records", "evaluation", "--output_dir", "evaluation"]) == 0
    after = json.loads((folder / "evaluation" / "scores.json").read_text("utf-8"))
    # The rule's name tells that words are split in another way since then, of which these items have none.
    assert after["errors"]["tts"] | {"rule": None} == before["errors"]["tts"] | {"rule": None}
