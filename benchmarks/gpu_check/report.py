"""The report of a check: a JSON file with all data, and a short Markdown file."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.result import Result
from speechlm_ext.utils.files.io import atomic_write_json, atomic_write_text
from speechlm_ext.utils.machine import commit_of, describe_machine

ROOT = Path(__file__).resolve().parents[2]


def write_report(out: Path, device: str, started: str, results: dict[str, Result]) -> tuple[Path, Path]:
    """Write ``<device>-<date>.json`` and ``.md`` into ``out``; returns both paths.

    Raises:
        StorageError: a file cannot be written.
    """
    machine = describe_machine()
    name = machine["processor"]
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
        machine["gpu"] = name
        machine["cuda"] = str(torch.version.cuda)
    data = {
        "device": name,
        "dry_run": device == "cpu",
        "started": started,
        "commit": commit_of(ROOT),
        "machine": machine,
        "parts": {part: asdict(result) for part, result in results.items()},
    }
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = f"{slug}-{started[:16].replace(':', '').replace('T', '-')}"
    paths = out / f"{stem}.json", out / f"{stem}.md"
    atomic_write_json(paths[0], data)
    atomic_write_text(paths[1], as_markdown(data))
    return paths


def as_markdown(data: dict[str, Any]) -> str:
    """Parts with their status, then the card's limits, the ops beside their rivals, training and decoding."""
    lines = [f"# {data['device']}{' (dry run)' if data['dry_run'] else ''}", ""]
    lines += [f"{data['started']}, commit {data['commit'][:12]}, torch {data['machine']['torch']}", ""]
    lines += ["| part | result | seconds | |", "|---|---|---|---|"]
    for part, result in data["parts"].items():
        lines.append(f"| {part} | {result['status']} | {result['seconds']:g} | {result['note']} |")
    for part in ("limits", "train", "decode"):
        numbers = data["parts"].get(part, {}).get("data", {})
        shown = {k: v for k, v in numbers.items() if isinstance(v, (int, float, str)) and k != "skipped"}
        if shown:
            lines += ["", f"**{part}**: " + ", ".join(f"{k} {v}" for k, v in shown.items())]
    lines += decode_table(data["parts"].get("decode", {}).get("data", {}))
    rows = data["parts"].get("bench", {}).get("data", {}).get("rows", [])
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += ["", *_bench_table(op, [row for row in rows if row["op"] == op])]
    return "\n".join(lines) + "\n"


def decode_table(found: dict[str, Any]) -> list[str]:
    """Table of decoding over batch sizes, from ``benchmarks.generation.decode``; empty if it did not run."""
    if "batches" not in found:
        return []
    lines = [
        "",
        "| batch | prefill ms | step ms | frames/s | of the reference loop | outside backbone and head |",
        "|---|---|---|---|---|---|",
    ]
    for r in found["batches"]:
        cells = r["batch"], r["prefill_ms"], r["step_ms"], r["frames_per_s"], f"{r['ratio']}x"
        lines.append(f"| {' | '.join(map(str, cells))} | {r['outside']:.1%} |")
    return lines


def _bench_table(op: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"**{op}**", "", "| shape | us | of the limit | rival time ÷ ours |", "|---|---|---|---|"]
    for row in rows:
        ratios = ", ".join(f"{rival} {ratio:.3g}" for rival, ratio in sorted(row.get("ratios", {}).items()))
        fraction = row.get("limit_fraction")
        share = "" if fraction is None else f"{fraction:.0%}"
        lines.append(f"| {row['shape']} | {row['seconds'] * 1e6:,.1f} | {share} | {ratios} |")
    return lines
