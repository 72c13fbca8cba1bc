"""Which model folder a path means: a run's newest complete checkpoint, said in the log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from speechlm_ext.errors import CheckpointError
from speechlm_ext.utils.files.run_folders import WEIGHTS_NAME, find_model_folder

FILES = ("config.json", "token_layout.json", WEIGHTS_NAME)


def checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files or FILES:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which step 1000 is the newest, although its name sorts first, and a newer one is incomplete."""
    root = tmp_path / "runs" / "a"
    for step in ("900", "00000020", "1000"):
        checkpoint(root / "checkpoints" / f"step-{step}")
    checkpoint(root / "checkpoints" / "step-2000", "config.json", "token_layout.json")
    checkpoint(root / "checkpoints" / ".incomplete-step-3000")
    (root / "checkpoints" / "step-note").write_text("")
    (root / "config.yaml").write_text("")
    return root


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/latest"])
def test_a_run_means_its_newest_checkpoint(run: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    newest = run / "checkpoints" / "step-1000"
    with caplog.at_level(logging.INFO, "speechlm_ext"):
        assert find_model_folder(str(run / name)) == newest
    assert f"{run / name}: taking the newest checkpoint, {newest}" in caplog.text
    assert "step-2000 is incomplete (no model.safetensors)" in caplog.text


def test_a_broken_or_written_latest_is_found_too(run: Path) -> None:
    latest = run / "checkpoints" / "latest"
    latest.symlink_to("step-00000001")
    assert find_model_folder(latest) == run / "checkpoints" / "step-1000"
    latest.unlink()
    latest.write_text("step-900\n")
    assert find_model_folder(latest) == run / "checkpoints" / "step-900"
    latest.write_bytes(b"\xff")
    assert find_model_folder(latest) == run / "checkpoints" / "step-1000"
    latest.unlink()
    latest.symlink_to("step-900")
    assert find_model_folder(latest) == latest


def test_other_paths_stay_as_they_are(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export = checkpoint(tmp_path / "export")
    checkpoint(export / "checkpoints" / "step-1")
    with caplog.at_level(logging.INFO, "speechlm_ext"):
        for path in (export, run / "checkpoints" / "step-2000", tmp_path / "nothing", tmp_path):
            assert find_model_folder(path) == path
    assert not caplog.records


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    for name in ("b", "b/checkpoints"):
        with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
            find_model_folder(tmp_path / name)
    checkpoint(tmp_path / "b" / "checkpoints" / "step-1", "config.json")
    with pytest.raises(CheckpointError, match="none of the run's 1 checkpoints is complete"):
        find_model_folder(tmp_path / "b")
