"""What the demo's stages left behind, read once for its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speechlm_ext.data.manifest import Utterance, read_manifest
from speechlm_ext.evaluation.records import Record, read_records
from speechlm_ext.layout import TokenLayout
from speechlm_ext.training.log import read_log
from speechlm_ext.utils.files.json_lines import json_lines
from speechlm_ext.utils.files.json_text import parse_json
from speechlm_ext.utils.files.yaml_text import parse_yaml

LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}


class Inputs:
    """What the stages left, read once; missing parts are empty, so that a report can be made at any time."""

    def __init__(
        self, out: Path, own: bool, metrics: dict[str, Any], scores: dict[str, Any], state: dict[str, Any]
    ):
        self.out, self.own, self.metrics, self.scores, self.state = out, own, metrics, scores, state
        records_file = out / "eval" / "records.jsonl"
        self.records: list[Record] = read_records(records_file) if records_file.is_file() else []
        self.results = _json_lines(out / "generated" / "results.jsonl")
        self.log = read_log(out / "model")
        self.about = _json(out / "data" / "about.json")
        test = out / "data" / "test.jsonl"
        self.test: dict[str, Utterance] = (
            {u.id: u for u in read_manifest(test, check_audio=False)} if test.is_file() else {}
        )
        layout = out / "tokens" / "train"
        self.layout = TokenLayout.load(layout) if (layout / "token_layout.json").is_file() else None
        config = out / "model" / "config.yaml"
        self.config = parse_yaml(config.read_text("utf-8")) if config.is_file() else {}

    def kind(self, kind: str) -> list[Record]:
        """Records of one kind."""
        return [r for r in self.records if r.kind == kind]


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [line.object() for line in json_lines(path, path.read_bytes())]
