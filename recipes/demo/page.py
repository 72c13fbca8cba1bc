"""The demo's page ``report.html``: its text is in the template of that name, its data in :mod:`report_data`."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from report_data import LANGUAGES, ReportData

from speechlm_ext.evaluation.text.word_errors import align
from speechlm_ext.utils.files.io import atomic_write_bytes

HERE = Path(__file__).resolve().parent
KINDS = {
    "asr": "speech recognition (ASR)",
    "tts": "generated speech (TTS), heard by the judge",
    "codec": "codec resynthesis, heard by the judge",
    "recording": "original recording, heard by the judge",
}
SECTIONS = {
    "done": "What was done",
    "scores": "Scores",
    "curves": "Learning curves",
    "listen": "Listen",
    "transcripts": "Transcripts",
    "continuations": "Continuations",
    "perplexity": "Perplexity",
    "time": "Time",
    "method": "How it is scored",
    "origin": "Model, layout, machine",
}


def environment() -> Environment:
    """Jinja's environment with the demo's templates, which escape all text."""
    env = Environment(
        loader=FileSystemLoader([HERE, HERE.parent / "report"]), autoescape=True, trim_blocks=True
    )
    env.filters["num"] = format_number
    env.filters["quoted"] = repr
    env.globals["align"] = align
    return env


def format_number(value: float | None, style: str, missing: str = "–") -> str:
    """A number in a format of Python's, or ``missing`` for None."""
    return missing if value is None else format(value, style)


def write_page(data: ReportData) -> None:
    """Write ``report.html``. Raises :class:`StorageError` if that fails."""
    source = (
        data.about.get("own", "your recordings") if data.own else "real telephone prompts in five languages"
    )
    page = (
        environment()
        .get_template("report.html")
        .render(
            title="From recordings to a judged speech language model",
            subtitle=f"One model for recognition, synthesis and continuation, trained from scratch on {source}.",
            sections=SECTIONS,
            kinds=KINDS,
            languages=LANGUAGES,
            d=data,
            m=data.metrics,
            about=data.about,
        )
    )
    # A record may hold half a surrogate pair, which UTF-8 cannot encode.
    atomic_write_bytes(data.out / "report.html", page.encode("utf-8", "backslashreplace"))
