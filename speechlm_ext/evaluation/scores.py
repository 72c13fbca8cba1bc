"""Scores from records: word and character errors per kind, data set and language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from speechlm_ext.errors import foreign_errors
from speechlm_ext.evaluation.records import KINDS, Record, RecordError
from speechlm_ext.evaluation.text.word_errors import RULE, ErrorCounts, cer, normalize, sum_counts, wer
from speechlm_ext.utils.language import canonical_tag

ALL = "all"


def groups_of(record: Record) -> list[str]:
    """Groups that a record counts in: all, its data set, its language, and both together.

    Tags of one language are one group: ``EN``, ``eng`` and ``en`` are ``en``; ``en-US`` is its own.
    """
    dataset = record.dataset or "unnamed"
    lang = canonical_tag(record.lang) or record.lang
    return [ALL, dataset, f"{ALL}/{lang}", f"{dataset}/{lang}"]


def score_records(records: Sequence[Record]) -> dict[str, Any]:
    """Word and character errors of records.

    Items whose reference has no words are counted and left out. An item that cannot be scored is skipped with the
    reason. A kind whose items were all skipped has no rates, only the reasons.

    Returns:
        Per kind: ``groups`` ``{group: {"wer": counts, "cer": counts}}``, ``num_items``, ``num_skipped``,
        ``skipped`` ``{reason: count}``, ``no_words``, ``finished`` ``{ending of generation: count}``, and the ``rule``.

    Raises:
        SpeechLMError: a library that scoring needs is not installed.
    """
    scores: dict[str, Any] = {}
    for kind in KINDS:
        mine = [r for r in records if r.kind == kind]
        if not mine:
            continue
        skipped: Counter[str | None] = Counter()
        no_words = 0
        groups: dict[str, list[tuple[ErrorCounts, ErrorCounts]]] = {}
        for record in mine:
            if record.hypothesis is None:
                skipped[record.skipped] += 1
                continue
            try:
                with foreign_errors(RecordError, f"item {record.id!r}", "It is left out of the scores."):
                    counts = _counts(record)
            except RecordError as error:
                skipped[f"cannot be scored: {error}"] += 1
                continue
            if counts is None:
                no_words += 1
                continue
            for name in groups_of(record):
                groups.setdefault(name, []).append(counts)
        scores[kind] = {
            "groups": {
                name: {
                    "wer": sum_counts([words for words, _ in group]).to_dict(),
                    "cer": sum_counts([chars for _, chars in group]).to_dict(),
                }
                for name, group in sorted(groups.items())
            },
            "num_items": len(mine),
            "num_skipped": sum(skipped.values()),
            "skipped": dict(skipped),
            "no_words": no_words,
            "finished": dict(Counter(r.finished for r in mine if r.finished is not None)),
            "rule": RULE,
        }
    return scores


def _counts(record: Record) -> tuple[ErrorCounts, ErrorCounts] | None:
    """Word and character errors of one item; None if its reference has no words."""
    if not normalize(record.reference, record.lang):
        return None
    item = ([record.reference], [record.hypothesis or ""], record.lang)
    return wer(*item), cer(*item)


def rate(scores: dict[str, Any], kind: str, group: str = ALL, unit: str = "wer") -> float | None:
    """One rate of :func:`score_records`, or None if it was not measured."""
    found = scores.get(kind, {}).get("groups", {}).get(group)
    return None if found is None else float(found[unit]["rate"])
