"""The demo's metrics and report: ``metrics.json`` and ``report.html`` from the outputs of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from page import write_page
from report_data import ReportData, read_json

from speechlm_ext.evaluation.scores import ALL, rate
from speechlm_ext.utils.files.io import atomic_write_json
from speechlm_ext.utils.machine import commit_of, describe_machine

HERE = Path(__file__).resolve().parent
GOALS = {"asr_wer": 0.05, "tts_wer": 0.20}
#: Metric name -> kind of record.
RATES = {"asr_wer": "asr", "tts_wer": "tts", "codec_wer": "codec", "recording_wer": "recording"}
HEADLINE = "numbers/en"


def write(out: Path, own: bool, state: dict[str, Any], page: bool = True) -> dict[str, Any]:
    """Write ``metrics.json`` and, if asked, ``report.html`` into ``out``; returns the metrics."""
    scores = read_json(out / "eval" / "scores.json") or {"errors": {}, "perplexity": {}, "judge": None}
    metrics = make_metrics(scores, own, state)
    atomic_write_json(out / "metrics.json", metrics)
    if page:
        write_page(ReportData(out, own, metrics, scores, state))
        shown = {
            k: metrics[k]
            for k in ("asr_wer", "tts_wer", "codec_wer", "recording_wer", "textlm_ppl", "audiolm_ppl")
        }
        print(
            "  " + "  ".join(f"{k} {'skipped' if v is None else format(v, '.4g')}" for k, v in shown.items())
        )
    return metrics


def make_metrics(scores: dict[str, Any], own: bool, state: dict[str, Any]) -> dict[str, Any]:
    """The demo's metrics; a score that was not measured is None and has its reason in ``skipped``."""
    group = ALL if own else HEADLINE
    errors = scores.get("errors", {})
    metrics: dict[str, Any] = {name: rate(errors, kind, group) for name, kind in RATES.items()}
    by_language: dict[str, dict[str, float]] = {}
    for name, kind in RATES.items():
        for key, rates in errors.get(kind, {}).get("groups", {}).items():
            if "/" in key and not key.startswith(f"{ALL}/"):
                by_language.setdefault(key, {})[name] = rates["wer"]["rate"]
    metrics["asr_cer"] = rate(errors, "asr", group, "cer")
    perplexity = scores.get("perplexity", {})
    audio = next((p for t, p in perplexity.items() if "audiolm" in t), {})
    metrics["textlm_ppl"] = perplexity.get("textlm", {}).get("text", {}).get("ppl")
    metrics["textlm_ppl_per_word"] = perplexity.get("textlm", {}).get("text_per_word", {}).get("ppl")
    metrics["audiolm_ppl"] = audio.get("audio", {}).get("ppl")
    for part in ("ssl", "codec"):
        metrics[f"audiolm_ppl_{part}"] = audio.get(part, {}).get("ppl")
    skipped = {}
    judge = scores.get("judge") or {}
    for name, value in metrics.items():
        if value is None:
            kind = RATES.get(name)
            reasons = list(errors.get(kind, {}).get("skipped", {})) if kind else []
            skipped[name] = "; ".join(reasons) or judge.get("skipped") or "not measured in this run"
    metrics["skipped"] = skipped
    metrics["by_language"] = by_language
    metrics["goals"] = {} if own else GOALS
    metrics["scored_set"] = "held-out utterances" if own else "held-out English spoken numbers"
    metrics["judge"] = scores.get("judge")
    seconds = {name: entry["seconds"] for name, entry in state.items() if entry.get("seconds") is not None}
    metrics["seconds"] = seconds
    metrics["seconds_total"] = round(sum(seconds.values()), 1)
    metrics["commit"] = state.get("train", {}).get("commit") or commit_of(HERE)
    metrics["machine"] = describe_machine()
    return metrics
