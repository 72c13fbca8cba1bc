"""The part of the demo's page to see and hear for oneself: players, transcripts, continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from report_inputs import LANGUAGES, Inputs

from speechlm_ext.evaluation.records import Record
from speechlm_ext.evaluation.report import media
from speechlm_ext.evaluation.report import page as report

EXAMPLES = 8
TRANSCRIPTS = 24


def listen(d: Inputs) -> Markup:
    """Recording, codec resynthesis and generated speech side by side."""
    by_kind = {kind: {r.id: r for r in d.kind(kind)} for kind in ("recording", "codec", "tts")}
    chosen = _spread([r for r in d.kind("tts") if r.audio], EXAMPLES)
    if not chosen:
        return report.paragraph("No speech was generated.", "warn")
    parts: list[Any] = [
        report.paragraph(
            "The same sentence three times: the held-out recording; the codec's resynthesis of it, which is the "
            "best that generated speech can sound here; and the model's own speech from the text alone. Below each: "
            "what the judge heard, with errors coloured. The items are spread evenly over the set, not picked."
        )
    ]
    labels = {"recording": "recording", "codec": "codec resynthesis", "tts": "generated"}
    for record in chosen:
        trio = [
            by_kind[k][record.id] for k in labels if record.id in by_kind[k] and by_kind[k][record.id].audio
        ]
        longest = max((r.seconds or 0.0 for r in trio), default=0.0) or None
        players = [
            media.player(d.out / "eval" / str(r.audio), labels[r.kind], _heard(r), longest)
            for r in trio
            if (d.out / "eval" / str(r.audio)).is_file()
        ]
        title = f"“{record.reference}” · {_set_name(record)}"
        parts.append(
            Markup('<div class="example"><h3>{}</h3><div class="trio">{}</div></div>').format(
                title, Markup("").join(players)
            )
        )
    return report.join(*parts)


def transcripts(d: Inputs) -> Markup:
    """Reference and hypothesis of the recogniser, errors coloured."""
    chosen = _spread(d.kind("asr"), TRANSCRIPTS)
    if not chosen:
        return report.paragraph("Nothing was transcribed.", "warn")
    rows = [
        (_set_name(r), r.reference, report.marked_words(r.reference, r.hypothesis or "", r.lang))
        for r in chosen
    ]
    key = Markup(
        '<p class="soft words"><span class="substitute">wrong <s>right</s></span> '
        '<span class="delete">missing</span> <span class="insert">extra</span></p>'
    )
    return report.join(key, report.table(("set", "said", "recognised"), rows))


def continuations(d: Inputs) -> Markup:
    """What the model makes of the beginnings of texts and recordings."""
    texts, players = [], []
    for row in d.results:
        request, identity = row["request"], row["id"].partition(".")[2]
        known = d.test.get(identity)
        if row["id"].startswith("textlm.") and row["text"] is not None:
            given = request["text"] or ""
            made = row["text"][len(given) :] if row["text"].startswith(given) else row["text"]
            html = Markup('<span class="given">{}</span> <span class="made">{}</span>').format(given, made)
            texts.append(
                (LANGUAGES.get(request["lang"], request["lang"]), html, known.text if known else None)
            )
        if (
            row["id"].startswith("audiolm.")
            and row["audio"]
            and (d.out / "generated" / row["audio"]).is_file()
        ):
            pair = [media.player(d.out / "generated" / row["audio"], "given beginning and continuation")]
            if known is not None and known.audio is not None and known.audio.is_file():
                pair.append(media.player(known.audio, "whole recording"))
            title = f"“{known.text}”" if known else identity
            players.append(
                Markup('<div class="example"><h3>{}</h3><div class="trio two">{}</div></div>').format(
                    title, Markup("").join(pair)
                )
            )
    parts: list[Any] = [Markup("<h3>Text</h3>")]
    if texts:
        parts.append(report.table(("language", "given, then made", "the held-out text"), texts))
    else:
        parts.append(report.paragraph("None.", "soft"))
    parts += [Markup("<h3>Audio</h3>"), *(players or [report.paragraph("None.", "soft")])]
    return report.join(*parts)


def _heard(record: Record) -> Markup:
    if record.hypothesis is None:
        return report.paragraph(f"not judged: {record.skipped}", "soft")
    return report.marked_words(record.reference, record.hypothesis, record.lang)


def _set_name(record: Record) -> str:
    return f"{record.dataset} · {LANGUAGES.get(record.lang, record.lang)}" if record.dataset else record.lang


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """``count`` items, half from the largest set and half from the others, evenly spaced in their order."""
    sets: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        sets.setdefault((record.dataset, record.lang), []).append(record)
    if not sets:
        return []
    largest = max(sets.values(), key=len)
    others = [r for group in sets.values() if group is not largest for r in group]
    first = count if not others else (count + 1) // 2
    return _even(largest, first) + _even(others, count - first)


def _even(records: Sequence[Record], count: int) -> list[Record]:
    if len(records) <= count:
        return list(records)
    return [records[i * len(records) // count] for i in range(count)]
