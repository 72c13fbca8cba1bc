"""Scores from records: word and character errors per kind, data set and language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from speechlm_ext.evaluation.records import KINDS, Record
from speechlm_ext.evaluation.text import RULE, cer, normalize, wer

ALL = "all"


def groups_of(record: Record) -> list[str]:
    """The sets that a record counts in: everything, its data set, its language, and both together."""
    dataset = record.dataset or "unnamed"
    return [ALL, dataset, f"{ALL}/{record.lang}", f"{dataset}/{record.lang}"]


def score_records(records: Sequence[Record]) -> dict[str, Any]:
    """Score records.

    Items whose reference has no words are left out and counted. A kind of which every item was skipped has
    no rates, but its reasons.

    Returns:
        Per kind: ``groups`` ``{group: {"wer": counts, "cer": counts}}``, ``num_items``, ``num_skipped``,
        ``skipped`` (reason and how often), ``no_words``, ``finished`` (how generation ended), and the ``rule``.
    """
    scores: dict[str, Any] = {}
    for kind in KINDS:
        mine = [r for r in records if r.kind == kind]
        if not mine:
            continue
        live = [r for r in mine if r.hypothesis is not None]
        spoken = [r for r in live if normalize(r.reference, r.lang)]
        groups: dict[str, list[Record]] = {}
        for record in spoken:
            for name in groups_of(record):
                groups.setdefault(name, []).append(record)
        scores[kind] = {
            "groups": {name: _rates(group) for name, group in sorted(groups.items())},
            "num_items": len(mine),
            "num_skipped": len(mine) - len(live),
            "skipped": dict(Counter(r.skipped for r in mine if r.hypothesis is None)),
            "no_words": len(live) - len(spoken),
            "finished": dict(Counter(r.finished for r in mine if r.finished is not None)),
            "rule": RULE,
        }
    return scores


def _rates(group: Sequence[Record]) -> dict[str, Any]:
    refs = [r.reference for r in group]
    hyps = [r.hypothesis or "" for r in group]
    langs = [r.lang for r in group]
    return {"wer": wer(refs, hyps, langs).to_dict(), "cer": cer(refs, hyps, langs).to_dict()}


def rate(scores: dict[str, Any], kind: str, group: str = ALL, unit: str = "wer") -> float | None:
    """One rate out of :func:`score_records`, or None where it was not measured."""
    found = scores.get(kind, {}).get("groups", {}).get(group)
    return None if found is None else float(found[unit]["rate"])
