"""The parts of an HTML report: one file that opens from disk, with no server and no network.

A report is a list of :class:`Section`. Everything in it is text, or data inside the file: audio as FLAC,
pictures as PNG or SVG. All text is escaped; markup is made only by the functions here.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from speechlm_ext.evaluation.text.word_errors import align
from speechlm_ext.utils.files.io import atomic_write_bytes


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its table of contents."""

    id: str
    title: str
    html: Markup


@dataclass(frozen=True)
class Cell:
    """A table cell with a class: ``num``, ``good``, ``bad``, ``mono``, …"""

    content: Any
    css: str = ""


def render(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    summary: Markup | None = None,
) -> None:
    """Write the page, atomically.

    Args:
        path: the HTML file.
        title, subtitle: plain text.
        sections: in order.
        summary: shown above the first section.

    Raises:
        StorageError: it cannot be written.
    """
    source = resources.files(__package__).joinpath("templates/report.html").read_text("utf-8")
    template = Environment(autoescape=True).from_string(source)
    page = template.render(title=title, subtitle=subtitle, sections=sections, summary=summary or "")
    # A record may hold half a surrogate pair, which UTF-8 cannot.
    atomic_write_bytes(path, page.encode("utf-8", "backslashreplace"))


def join(*parts: Any) -> Markup:
    """Put pieces of markup (or text, which is escaped) together."""
    return Markup("\n").join(escape(part) for part in parts)


def paragraph(text: Any, css: str = "") -> Markup:
    """A paragraph of text or markup."""
    return Markup('<p class="{}">{}</p>').format(css, text)


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], strong: Sequence[int] = ()) -> Markup:
    """A table that scrolls sideways on narrow screens.

    Args:
        head: column titles; a :class:`Cell` carries a class.
        rows: cells; plain values are text, None is an en dash.
        strong: indices of rows to stress.
    """

    def cell(value: Any, tag: str) -> Markup:
        value = value if isinstance(value, Cell) else Cell(value)
        content = "–" if value.content is None else value.content
        return Markup('<{0} class="{1}">{2}</{0}>').format(Markup(tag), value.css, content)

    out = [Markup('<div class="scroll"><table><thead><tr>')]
    out += [cell(title, "th") for title in head] + [Markup("</tr></thead><tbody>")]
    for number, row in enumerate(rows):
        css = ' class="strong"' if number in strong else ""
        out += [Markup(f"<tr{css}>"), *(cell(value, "td") for value in row), Markup("</tr>")]
    return Markup("").join([*out, Markup("</tbody></table></div>")])


def num(value: float | None, style: str = ".1%", css: str = "") -> Cell:
    """A right-aligned number; None is shown as an en dash."""
    return Cell(None if value is None else format(value, style), f"num {css}".strip())


def card(label: str, value: str, verdict: str = "", css: str = "") -> Markup:
    """A figure that stands out: label, value, and a line under it."""
    return Markup(
        '<div class="card"><span class="label">{}</span><b>{}</b><span class="verdict {}">{}</span></div>'
    ).format(label, value, css, verdict)


def cards(items: Sequence[Markup]) -> Markup:
    """Cards side by side."""
    return Markup('<div class="cards">{}</div>').format(Markup("").join(items))


def data_uri(data: bytes, mime: str) -> str:
    """Bytes as a ``data:`` address."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def figure(data: bytes, mime: str, caption: str) -> Markup:
    """A picture with its caption, which is also its description."""
    return Markup('<figure><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>').format(
        data_uri(data, mime), caption, caption
    )


def marked_words(reference: str, hypothesis: str, lang: str = "en") -> Markup:
    """The hypothesis with its errors coloured: wrong words with the right one beside, missing and extra words."""
    out = []
    for operation, ref, hyp in align(reference, hypothesis, lang):
        if operation == "equal":
            out.append(escape(hyp))
        elif operation == "substitute":
            out.append(
                Markup('<span class="substitute" title="instead of {}">{} <s>{}</s></span>').format(
                    ref, hyp, ref
                )
            )
        else:
            out.append(Markup('<span class="{}">{}</span>').format(operation, ref or hyp))
    if not out:
        return Markup('<span class="soft">(nothing)</span>')
    return Markup('<span class="words">{}</span>').format(Markup(" ").join(out))
