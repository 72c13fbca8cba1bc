"""The demo's page: what was done, how well it came out, and items to see and hear for oneself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from report_inputs import LANGUAGES, Inputs
from report_items import continuations, listen, transcripts

from speechlm_ext.evaluation.report import media
from speechlm_ext.evaluation.report import page as report
from speechlm_ext.evaluation.report.page import Cell, Section, num

KINDS = {
    "asr": "speech recognition (ASR)",
    "tts": "generated speech (TTS), heard by the judge",
    "codec": "codec resynthesis, heard by the judge",
    "recording": "original recording, heard by the judge",
}
RATES = {"asr": "asr_wer", "tts": "tts_wer", "codec": "codec_wer", "recording": "recording_wer"}


def write_page(
    out: Path, own: bool, metrics: dict[str, Any], scores: dict[str, Any], state: dict[str, Any]
) -> None:
    """Write ``report.html``. Raises :class:`StorageError` if that fails."""
    data = Inputs(out, own, metrics, scores, state)
    sections = [
        Section("done", "What was done", what_was_done(data)),
        Section("scores", "Scores", score_tables(data)),
        Section("curves", "Learning curves", learning_curves(data)),
        Section("listen", "Listen", listen(data)),
        Section("transcripts", "Transcripts", transcripts(data)),
        Section("continuations", "Continuations", continuations(data)),
        Section("perplexity", "Perplexity", perplexity_table(data)),
        Section("time", "Time", time_table(data)),
        Section("method", "How it is scored", method(data)),
        Section("origin", "Model, layout, machine", origin(data)),
    ]
    source = data.about.get("own", "your recordings") if own else "real telephone prompts in five languages"
    report.render(
        out / "report.html",
        "From recordings to a judged speech language model",
        sections,
        subtitle=f"One model for recognition, synthesis and continuation, trained from scratch on {source}.",
        summary=headline(data),
    )


# ---- the parts ------------------------------------------------------------------------------------------------------
def headline(d: Inputs) -> Markup:
    """The figures that count, with goal and verdict."""
    m, goals = d.metrics, d.metrics["goals"]
    items = []
    for name, label in (("asr_wer", "ASR word errors"), ("tts_wer", "TTS word errors, by the judge")):
        items.append(_goal_card(label, m[name], goals.get(name), m["skipped"].get(name)))
    for name, label in (
        ("codec_wer", "codec alone, by the judge"),
        ("recording_wer", "the judge on recordings"),
    ):
        value = m[name]
        note = "ceiling of TTS" if name == "codec_wer" else "its own errors"
        items.append(report.card(label, "skipped" if value is None else f"{value:.1%}", note))
    for name, label in (("textlm_ppl", "text perplexity"), ("audiolm_ppl", "audio perplexity")):
        value = m[name]
        items.append(
            report.card(label, "skipped" if value is None else f"{value:.1f}", "per token, held out")
        )
    minutes = m["seconds_total"] / 60
    items.append(report.card("all stages", f"{minutes:.1f} min", f"{m['machine']['cores']} CPU cores"))
    return report.join(report.paragraph(f"Scored on {m['scored_set']}.", "soft"), report.cards(items))


def _goal_card(label: str, value: float | None, goal: float | None, why: str | None) -> Markup:
    if value is None:
        return report.card(label, "skipped", why or "", "warn")
    if goal is None:
        return report.card(label, f"{value:.1%}")
    reached = value <= goal
    verdict = f"{'goal reached' if reached else 'goal missed'}: ≤ {goal:.0%}"
    return report.card(label, f"{value:.1%}", verdict, "good" if reached else "bad")


def what_was_done(d: Inputs) -> Markup:
    """The data, said plainly, and the way through the pipeline."""
    about = d.about
    parts: list[Any] = []
    if d.own:
        parts.append(
            report.paragraph(
                f"Recordings: your folder {about.get('own', '')!r}; {about.get('how', 'see the manifests')}. "
                "No composed data was added."
            )
        )
    else:
        parts.append(
            report.paragraph(
                "The recordings are studio prompts of a telephone system: one voice for each of five languages, 16 kHz "
                f"({about.get('source', 'Debian packages')})."
            )
        )
        composed = Markup("<strong>What is composed.</strong> {}").format(about.get("composed", ""))
        parts.append(report.paragraph(composed))
    parts.append(
        report.paragraph(
            "Text became SentencePiece tokens; sound became one MFCC K-Means unit and eight residual K-Means codes per "
            "frame, all fitted on these recordings, with nothing downloaded. One Llama-style decoder, from random "
            "weights, then learnt four tasks at once: recognition, synthesis, text and audio continuation. It was "
            "asked about held-out items only."
        )
    )
    rows = _count_rows(about.get("counts", []))
    if rows:
        numbers = ("train", "minutes", "held out", "minutes")
        parts.append(report.table(("data set", "language", *(Cell(n, "num") for n in numbers)), rows))
    if about.get("licences"):
        licences = ", ".join(f"{LANGUAGES.get(k, k)} {v}" for k, v in about["licences"].items())
        parts.append(
            report.paragraph(
                f"Licences of the recordings, and of the clips in this page, which are derived from them: {licences}.",
                "soft",
            )
        )
    if about.get("notes"):
        notes = Markup("").join(Markup("<li>{}</li>").format(note) for note in about["notes"])
        parts.append(
            Markup(
                '<details class="soft"><summary>What was left out, and why</summary><ul>{}</ul></details>'
            ).format(notes)
        )
    return report.join(*parts)


def score_tables(d: Inputs) -> Markup:
    """The headline as a table, then every data set and language."""
    errors, m = d.scores.get("errors", {}), d.metrics
    group = "all" if d.own else "numbers/en"
    rows = []
    for kind, label in KINDS.items():
        found = errors.get(kind, {}).get("groups", {}).get(group)
        name = RATES[kind]
        goal = m["goals"].get(name)
        if found is None:
            rows.append((label, Cell("skipped", "num warn"), None, None, None, m["skipped"].get(name, "")))
            continue
        word, char = found["wer"], found["cer"]
        verdict: Any = ""
        if goal is not None:
            reached = word["rate"] <= goal
            verdict = Cell(
                f"{'reached' if reached else 'missed'} (≤ {goal:.0%})", "good" if reached else "bad"
            )
        count = Cell(f"{word['errors']} / {word['total']}", "num")
        rows.append(
            (label, num(word["rate"]), num(char["rate"]), count, Cell(word["utterances"], "num"), verdict)
        )
    heads: tuple[Any, ...] = (
        "",
        *(Cell(h, "num") for h in ("WER", "CER", "errors / words", "utterances")),
        "goal",
    )
    parts: list[Any] = [
        report.paragraph(
            f"On {m['scored_set']}. The judge errs too: read its figures beside its own WER on recordings."
        ),
        report.table(heads, rows),
        Markup("<h3>By data set and language</h3>"),
    ]
    groups = sorted(
        {g for kind in errors.values() for g in kind["groups"] if "/" in g and not g.startswith("all/")}
    )
    groups.sort(key=lambda g: (g.split("/")[0] != "numbers", g.split("/")[1] != "en", g))
    rows = []
    for name in groups:
        dataset, _, lang = name.partition("/")
        row: list[Any] = [dataset, LANGUAGES.get(lang, lang)]
        for kind in KINDS:
            found = errors.get(kind, {}).get("groups", {}).get(name)
            row.append(num(None if found is None else found["wer"]["rate"]))
        asr, tts = (errors.get(k, {}).get("groups", {}).get(name) for k in ("asr", "tts"))
        row.append(Cell(" / ".join(str(x["wer"]["utterances"] if x else 0) for x in (asr, tts)), "num"))
        rows.append(row)
    heads = (
        "data set",
        "language",
        *(Cell(h, "num") for h in ("ASR", "TTS", "codec", "recording", "items ASR / TTS")),
    )
    parts.append(report.table(heads, rows))
    parts.append(report.paragraph("Word error rates. An en dash: not measured.", "soft"))
    for kind in ("asr", "tts"):
        finished = errors.get(kind, {}).get("finished", {})
        if finished:
            how = {
                "eos": "ended by themselves",
                "max_len": "were cut at the longest length",
                "failed": "failed",
            }
            text = ", ".join(f"{n} {how.get(k, k)}" for k, n in finished.items())
            parts.append(report.paragraph(f"{kind.upper()} outputs: {text}.", "soft"))
    return report.join(*parts)


def learning_curves(d: Inputs) -> Markup:
    """Loss and accuracy per stream."""
    if not d.log:
        return report.paragraph("There is no training log.", "warn")
    names = {}
    if d.layout is not None:
        first = d.layout.streams[0]
        names[first.name] = (
            "text and ssl" if "ssl" in first.carries and "text_bpe" in first.carries else first.name
        )
    last = d.log[-1]
    loss = media.curves_svg(d.log, "stream_loss", "loss (nats per token)", names)
    accuracy = media.curves_svg(d.log, "stream_accuracy", "share of tokens predicted", names)
    return report.join(
        report.figure(loss, "image/svg+xml", "Training loss per stream, averaged between log lines."),
        report.figure(
            accuracy,
            "image/svg+xml",
            "Share of training tokens whose most likely guess is right, per stream.",
        ),
        report.paragraph(
            f"{last['step']:,} steps in {last['seconds'] / 60:.1f} min, {last['packs_consumed']:,} packs; at the end "
            f"{last['positions_per_second']:,.0f} positions/s and a loss of {last['loss']:.3f}.",
            "soft",
        ),
    )


def perplexity_table(d: Inputs) -> Markup:
    """Perplexity per task and modality."""
    rows = []
    for task, parts in d.scores.get("perplexity", {}).items():
        for name, part in parts.items():
            if isinstance(part, dict):
                label = {"text_per_word": "text, per word", "text_per_char": "text, per character"}.get(
                    name, name
                )
                rows.append((task, label, num(part["ppl"], ",.2f"), num(int(part["count"]), ",d")))
    if not rows:
        return report.paragraph("Perplexity was not measured.", "warn")
    heads = ("task", "target tokens", Cell("perplexity", "num"), Cell("tokens", "num"))
    note = (
        "On the held-out split, targets only. “audio” is SSL units and codec codes together; “special” is the end of "
        "speech. A text's end counts as text."
    )
    return report.join(report.table(heads, rows), report.paragraph(note, "soft"))


def time_table(d: Inputs) -> Markup:
    """Seconds per stage."""
    seconds = d.metrics["seconds"]
    total = d.metrics["seconds_total"]
    rows: list[Any] = [
        (name, num(s, ",.1f"), num(s / total if total else None, ".0%")) for name, s in seconds.items()
    ]
    rows.append(("all", num(total, ",.1f"), num(1.0, ".0%")))
    heads = ("stage", Cell("seconds", "num"), Cell("share", "num"))
    note = "Each stage starts its command afresh. Downloads of recordings are part of “data”; this page is not timed."
    return report.join(report.table(heads, rows, strong=[len(rows) - 1]), report.paragraph(note, "soft"))


def method(d: Inputs) -> Markup:
    """The rules of scoring."""
    judge = d.metrics.get("judge") or {}
    if judge.get("skipped") or not judge:
        who = f"There was no judge: {judge.get('skipped', 'nothing was evaluated')}."
    else:
        who = (
            f"The judge is {judge['model']} ({judge['version']}, weights from: {judge['source']}), "
            f"{judge['compute_type']} on the CPU, greedy, language given, clips padded to {judge['window_s']:g} s. "
            "It had no part in training."
        )
    texts = (
        who,
        "Texts are compared in lower case, without punctuation. Recognisers write digits as they like (“47”, “4 7”, "
        "“1,000”), so a string of digits is read as one number or as any succession of numbers below one hundred that "
        "it spells, whichever has the fewest errors. No digit can become another by that.",
        "WER is the number of wrong, missing and extra words over all items, divided by the number of reference words. "
        "Items that failed count with every word as an error.",
        "The raw texts, token ids, audio and settings of every item stand in eval/records.jsonl and "
        "generated/results.jsonl; `speechlm evaluate --records` scores them again.",
    )
    return report.join(*(report.paragraph(text) for text in texts))


def origin(d: Inputs) -> Markup:
    """Everything needed to say which model this was."""
    rows: list[Any] = [("commit", Cell(d.metrics["commit"], "mono"))]
    commits = {e.get("commit") for e in d.state.values() if e.get("commit")}
    if len(commits) > 1:
        rows.append(("note", Cell(f"stages were run at {len(commits)} different commits", "warn")))
    if d.layout is not None:
        rows += [("token layout", d.layout.name), ("layout sha256", Cell(d.layout.sha256, "mono"))]
        rows += [(f"{m} tokenizer sha256", Cell(h, "mono")) for m, h in d.layout.tokenizers]
        rows.append(("streams × vocabulary", f"{d.layout.num_streams} × {d.layout.vocab_size:,} ids"))
    model = next((r["model"] for r in d.results if r.get("model")), None)
    if model:
        rows.append(("weights sha256", Cell(model["sha256"], "mono")))
    shape = d.config.get("model", {})
    if shape:
        rows.append(
            (
                "model",
                ", ".join(f"{k} {v}" for k, v in shape.items() if not isinstance(v, dict) and v is not None),
            )
        )
        optimizer = d.config.get("optimizer", {})
        rows.append(("optimizer", ", ".join(f"{k} {v}" for k, v in optimizer.items())))
        tasks = d.config.get("data", {}).get("tasks", [])
        rows.append(("tasks", ", ".join(f"{t['task']} × {t['factor']:g}" for t in tasks)))
    rows += list(d.metrics["machine"].items())
    return report.table(("", ""), rows)


def _count_rows(counts: Sequence[dict[str, Any]]) -> list[Any]:
    """Utterances and minutes per data set and language, both splits in one row."""
    found = {(c["dataset"], c["lang"], c["split"]): c for c in counts}
    rows = []
    for dataset, lang in dict.fromkeys((c["dataset"], c["lang"]) for c in counts):
        row: list[Any] = [dataset, LANGUAGES.get(lang, lang)]
        for split in ("train", "test"):
            count = found.get((dataset, lang, split), {})
            row += [num(count.get("count"), ",d"), num(count.get("minutes"), ".1f")]
        rows.append(row)
    return rows
