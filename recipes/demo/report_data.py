"""Data of the demo's page: the outputs of all stages, read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from media import Clip, curves_svg, data_uri, read_clip

from speechlm_ext.data.manifest import Utterance, read_manifest
from speechlm_ext.evaluation.records import Record, read_records
from speechlm_ext.layout import TokenLayout
from speechlm_ext.training.log import read_log
from speechlm_ext.utils.files.json_text import json_lines, parse_json
from speechlm_ext.utils.files.yaml_text import parse_yaml

LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
EXAMPLES = 8


class ReportData:
    """Outputs of the stages; missing ones are empty, so that a report can be made at any time."""

    def __init__(
        self, out: Path, own: bool, metrics: dict[str, Any], scores: dict[str, Any], state: dict[str, Any]
    ):
        self.out, self.own, self.metrics = out, own, metrics
        self.errors: dict[str, Any] = scores.get("errors", {})
        self.perplexity: dict[str, Any] = scores.get("perplexity", {})
        self.num_commits = len({e["commit"] for e in state.values() if e.get("commit")})
        self.group = "all" if own else "numbers/en"
        records_file = out / "eval" / "records.jsonl"
        self.records: list[Record] = read_records(records_file) if records_file.is_file() else []
        self.results = _json_lines(out / "generated" / "results.jsonl")
        self.weights = next((r["model"]["sha256"] for r in self.results if r.get("model")), None)
        self.log = read_log(out / "model")
        self.about = read_json(out / "data" / "about.json") or {}
        test = out / "data" / "test.jsonl"
        self.test: dict[str, Utterance] = (
            {u.id: u for u in read_manifest(test, check_audio=False)} if test.is_file() else {}
        )
        layout = out / "tokens" / "train"
        self.layout = TokenLayout.load(layout) if (layout / "token_layout.json").is_file() else None
        config = out / "model" / "config.yaml"
        self.config = parse_yaml(config.read_text("utf-8")) if config.is_file() else {}

    # ---- tables -----------------------------------------------------------------------------------------------------
    def rates(self, kind: str, group: str) -> dict[str, Any]:
        """Error counts ``{"wer", "cer"}`` of a kind of records in a group; empty if it was not measured."""
        return self.errors.get(kind, {}).get("groups", {}).get(group, {})

    def groups(self) -> list[str]:
        """All pairs ``dataset/language``; numbers come first, and English."""
        pairs = {g for kind in self.errors.values() for g in kind["groups"] if "/" in g}
        found = [g for g in pairs if not g.startswith("all/")]
        return sorted(found, key=lambda g: (g.split("/")[0] != "numbers", g.split("/")[1] != "en", g))

    def counts(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Utterances and minutes per data set and language: ``{(dataset, lang): {split: row}}``."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self.about.get("counts", []):
            found.setdefault((row["dataset"], row["lang"]), {})[row["split"]] = row
        return found

    def perplexities(self) -> list[tuple[str, str, dict[str, float]]]:
        """``(task, modality, {"ppl", "nll", "count"})`` of each measured perplexity."""
        tasks = self.perplexity.items()
        return [(task, name, p) for task, parts in tasks for name, p in parts.items() if isinstance(p, dict)]

    def model_sizes(self) -> str:
        """The model's plain settings on one line."""
        shape = self.config["model"].items()
        return ", ".join(f"{k} {v}" for k, v in shape if not isinstance(v, dict) and v is not None)

    # ---- items ------------------------------------------------------------------------------------------------------
    def set_name(self, record: Record) -> str:
        """Data set and language of a record, for people."""
        language = LANGUAGES.get(record.lang, record.lang)
        return f"{record.dataset} · {language}" if record.dataset else record.lang

    def spread(self, kind: str, count: int) -> list[Record]:
        """``count`` records, half from the largest set and half from the others, evenly spaced in their order."""
        return _spread([r for r in self.records if r.kind == kind], count)

    def examples(self) -> Iterator[tuple[Record, list[tuple[Record, Clip]]]]:
        """A generated item with its recording, resynthesis and generated speech."""
        labels = {"recording": "recording", "codec": "codec resynthesis", "tts": "generated"}
        by_key = {(r.kind, r.id): r for r in self.records if r.audio}
        spoken = [r for r in self.records if r.kind == "tts" and r.audio]
        for record in _spread(spoken, EXAMPLES):
            trio = [by_key[kind, record.id] for kind in labels if (kind, record.id) in by_key]
            longest = max(r.seconds or 0.0 for r in trio) or None
            paths = [self.out / "eval" / str(r.audio) for r in trio]
            clips = [
                (r, read_clip(path, labels[r.kind], longest))
                for r, path in zip(trio, paths, strict=True)
                if path.is_file()
            ]
            yield record, clips

    def text_continuations(self) -> Iterator[tuple[str, str, str, str | None]]:
        """``(language, prompt, continuation, held-out text)`` of each."""
        for row in self.results:
            if row["id"].startswith("textlm.") and row["text"] is not None:
                prompt = row["request"]["text"] or ""
                known = self.test.get(_utterance_id(row))
                continuation = row["text"].removeprefix(prompt)
                yield row["request"]["lang"], prompt, continuation, known.text if known else None

    def audio_continuations(self) -> Iterator[tuple[str, list[Clip]]]:
        """A title, and the clips of the continuation and of the whole recording."""
        for row in self.results:
            if not (row["id"].startswith("audiolm.") and row["audio"]):
                continue
            path = self.out / "generated" / row["audio"]
            if not path.is_file():
                continue
            known = self.test.get(_utterance_id(row))
            clips = [read_clip(path, "given beginning and continuation")]
            if known is not None and known.audio is not None and known.audio.is_file():
                clips.append(read_clip(known.audio, "whole recording"))
            yield f"“{known.text}”" if known else _utterance_id(row), clips

    def curves(self, key: str, label: str) -> str:
        """A picture of the training log's numbers under ``key``, as a ``data:`` address."""
        names = {}
        if self.layout is not None and {"ssl", "text_bpe"} <= set(self.layout.streams[0].carries):
            names[self.layout.streams[0].name] = "text and ssl"
        return data_uri(curves_svg(self.log, key, label, names), "image/svg+xml")


def _utterance_id(row: dict[str, Any]) -> str:
    return row["id"].partition(".")[2]


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    sets: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        sets.setdefault((record.dataset, record.lang), []).append(record)
    if not sets:
        return []
    largest = max(sets.values(), key=len)
    others = [r for group in sets.values() if group is not largest for r in group]
    num_largest = count if not others else (count + 1) // 2
    return _even(largest, num_largest) + _even(others, count - num_largest)


def _even(records: Sequence[Record], count: int) -> list[Record]:
    if len(records) <= count:
        return list(records)
    return [records[i * len(records) // count] for i in range(count)]


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if there is none."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [line.object() for line in json_lines(path, path.read_bytes())]
