"""Normalising transcripts and counting word and character errors.

A recogniser writes numbers as it likes: "forty seven", "47", "4 7", "4-7", "1,000". What was *heard* is the
same, so digits are written as words before scoring, in the reading that fits the reference best:

* a digit string may be read as one number ("250" -> "two hundred and fifty", with or without "and"), or as
  any succession of numbers below one hundred that its digits spell ("250" -> "two fifty", "twenty five zero",
  "two five zero"); separators inside it ("8.11", "2,50", "19-0") are spaces or thousands marks;
* a number of two digits may also be read as its tens and its unit ("21" -> "veinte uno");
* an English "oh" or "o" may be read as "o", "oh" or "zero".

The readings form a small graph per hypothesis; one edit-distance pass over that graph finds the path with
the fewest errors, so the choice is exact and cheap. No digit can become another digit by it. Counts come
from jiwer. whisper-normalizer goes the other way (words to digits), which joins "sixty thirteen" and
"forty seven" into numbers that nobody said; therefore it is not used here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from speechlm_ext.errors import ConfigError, SpeechLMError

#: Stamped into every score: another rule means another number.
RULE = "nfkc-lower-nopunct-digits:best-reading-v1"

_DIGITS = re.compile(r"\d+(?:[.,:/'’\-‐‑–—]\d+)*")
_THOUSANDS = re.compile(r"\d{1,3}(?:[.,'’]\d{3})+")
_TOKEN = re.compile(rf"{_DIGITS.pattern}|[^\W\d_]+(?:['’][^\W\d_]+)*")
_INITIALS = re.compile(r"\b(?:[^\W\d_]\.){2,}")
_CONJUNCTIONS = {"en": {"and"}, "fr": {"et"}, "es": {"y"}, "it": {"e"}}
#: Numbers longer than this are read digit group by digit group only.
_LONGEST_NUMBER = 12

Graph = list[list[tuple[int, tuple[str, ...]]]]
"""Per node the edges ``(next node, words)``; node 0 is the start and the last node the end."""


@dataclass(frozen=True)
class ErrorCounts:
    """Errors against references: counts first, so that sets can be added and rates recomputed."""

    substitutions: int
    deletions: int
    insertions: int
    total: int
    """Words (or characters) in the references."""
    utterances: int
    unit: str
    """``word`` or ``char``."""
    rule: str = RULE

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """``errors / total``; it can exceed 1."""
        return self.errors / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the rate, for JSON."""
        return {"rate": self.rate, "errors": self.errors, **asdict(self)}


def tokens(text: str, lang: str = "en") -> list[str]:
    """Split text into lower-case words and digit strings; punctuation goes, digits keep their separators.

    Unicode is NFKC, apostrophes inside words are dropped ("don't" -> "dont"), "A.M." becomes "am", and
    Russian ё becomes е.
    """
    text = unicodedata.normalize("NFKC", text)
    text = _INITIALS.sub(lambda match: match.group().replace(".", ""), text).lower()
    if lang == "ru":
        text = text.replace("ё", "е")
    return [t if t[0].isdigit() else re.sub("['’]", "", t) for t in _TOKEN.findall(text)]


@lru_cache(maxsize=4096)
def number_words(digits: str, lang: str = "en") -> tuple[str, ...]:
    """The cardinal number of a digit string in words, hyphens split; the digits themselves if it is unknown.

    Raises:
        SpeechLMError: num2words is not installed.
    """
    try:
        from num2words import num2words
    except ImportError:
        raise SpeechLMError(
            "writing digits as words needs num2words; install it: pip install num2words"
        ) from None
    try:
        words = num2words(int(digits), lang=lang)
    except (NotImplementedError, OverflowError):
        return (digits,)
    return tuple(t for t in tokens(words.replace("-", " "), lang))


def normalize(text: str, lang: str = "en") -> list[str]:
    """Words of a *reference*: as :func:`tokens`, with each digit string read as one number.

    Separators that are not thousands marks part the string into several numbers.
    """
    words: list[str] = []
    for token in tokens(text, lang):
        if not token[0].isdigit():
            words.append(token)
        elif _THOUSANDS.fullmatch(token):
            words += number_words(re.sub(r"\D", "", token), lang)
        else:
            for group in re.split(r"\D+", token):
                words += number_words(group, lang)
    return words


def reading_graph(text: str, lang: str = "en") -> Graph:
    """All readings of a hypothesis as a graph whose edges carry words, by the rules of the module's text."""
    graph: Graph = [[]]
    for token in tokens(text, lang):
        start = len(graph) - 1
        if not token[0].isdigit():
            graph[start].append((start + 1, (token,)))
            if lang == "en" and token in ("o", "oh"):
                graph[start] += [(start + 1, (word,)) for word in ("o", "oh", "zero") if word != token]
            graph.append([])
            continue
        groups = re.split(r"\D+", token)
        end = start + sum(map(len, groups))
        graph.extend([] for _ in range(end - start))
        if _THOUSANDS.fullmatch(token):
            _add_readings(graph, start, end, "".join(groups), lang)
        at = start
        for group in groups:
            _add_readings(graph, at, at + len(group), group, lang)
            for i, digit in enumerate(group):
                graph[at + i].append((at + i + 1, number_words(digit, lang)))
                if i + 2 <= len(group) and digit != "0":
                    _add_readings(graph, at + i, at + i + 2, group[i : i + 2], lang)
            at += len(group)
    return graph


def _add_readings(graph: Graph, start: int, end: int, digits: str, lang: str) -> None:
    """Add the readings of ``digits`` as one number: whole, without conjunctions, as tens and unit."""
    if len(digits) > _LONGEST_NUMBER or (len(digits) > 1 and digits[0] == "0"):
        return
    whole = number_words(digits, lang)
    readings = {whole, tuple(w for w in whole if w not in _CONJUNCTIONS.get(lang, ()))}
    if len(digits) == 2 and digits[0] >= "2" and digits[1] != "0":
        readings.add(number_words(digits[0] + "0", lang) + number_words(digits[1], lang))
    graph[start].extend((end, words) for words in sorted(readings) if (end, words) not in graph[start])


def best_reading(reference: Sequence[str], hypothesis: str, lang: str = "en") -> list[str]:
    """The words of ``hypothesis`` in the reading that has the fewest word errors against ``reference``.

    Args:
        reference: normalised words, see :func:`normalize`.
        hypothesis: raw text of a recogniser or model.
        lang: language code of number words.

    Returns:
        The words of the best path through :func:`reading_graph`; ties go to the path with fewer words.
    """
    graph = reading_graph(hypothesis, lang)
    width = len(reference) + 1
    # cost[node][r]: (errors, words so far) of the best path to node that accounts for reference[:r].
    worst = (10**9, 0)
    cost: list[list[tuple[int, int]]] = [[worst] * width for _ in graph]
    came: list[list[tuple[int, int, tuple[str, ...]] | None]] = [[None] * width for _ in graph]
    cost[0] = [(r, 0) for r in range(width)]
    for node, edges in enumerate(graph):
        for target, words in edges:
            # Rows of a plain edit distance, begun from this node's row; back[r] is where in it a path began.
            row, back = list(cost[node]), list(range(width))
            for word in words:
                new, new_back = [(row[0][0] + 1, row[0][1] + 1)], [back[0]]
                for r in range(1, width):
                    options = (
                        ((row[r - 1][0] + (reference[r - 1] != word), row[r - 1][1] + 1), back[r - 1]),
                        ((row[r][0] + 1, row[r][1] + 1), back[r]),
                        ((new[r - 1][0] + 1, new[r - 1][1]), new_back[r - 1]),
                    )
                    best = min(options, key=lambda option: option[0])
                    new.append(best[0])
                    new_back.append(best[1])
                row, back = new, new_back
            for r in range(width):
                if row[r] < cost[target][r]:
                    cost[target][r], came[target][r] = row[r], (node, back[r], words)
    path: list[tuple[str, ...]] = []
    node, r = len(graph) - 1, width - 1
    while node:
        step = came[node][r]
        assert step is not None  # every node has an incoming edge
        node, r, words = step
        path.append(words)
    return [word for words in reversed(path) for word in words]


def normalize_pair(reference: str, hypothesis: str, lang: str = "en") -> tuple[list[str], list[str]]:
    """Reference and hypothesis as the words that are scored."""
    words = normalize(reference, lang)
    return words, best_reading(words, hypothesis, lang)


def _languages(lang: str | Sequence[str], count: int) -> list[str]:
    return [lang] * count if isinstance(lang, str) else list(lang)


def _count(refs: Sequence[str], hyps: Sequence[str], lang: str | Sequence[str], unit: str) -> ErrorCounts:
    try:
        import jiwer
    except ImportError:
        raise SpeechLMError("scoring needs jiwer; install it: pip install 'speechlm_ext[eval]'") from None
    languages = _languages(lang, len(refs))
    if not refs or len(refs) != len(hyps) or len(refs) != len(languages):
        raise ConfigError(
            f"{unit} errors: expected as many hypotheses and languages as references and at least one, got "
            f"{len(refs)} references, {len(hyps)} hypotheses and {len(languages)} languages."
        )
    pairs = [normalize_pair(*item) for item in zip(refs, hyps, languages, strict=True)]
    empty = [i for i, (words, _) in enumerate(pairs) if not words]
    if empty:
        raise ConfigError(
            f"{unit} errors: reference {empty[0]} ({refs[empty[0]]!r}) has no words left after normalisation; "
            "leave such items out of the scored set."
        )
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    out = process([" ".join(r) for r, _ in pairs], [" ".join(h) for _, h in pairs])
    total = out.hits + out.substitutions + out.deletions
    return ErrorCounts(out.substitutions, out.deletions, out.insertions, total, len(pairs), unit)


def wer(refs: Sequence[str], hyps: Sequence[str], lang: str | Sequence[str] = "en") -> ErrorCounts:
    """Word errors over a set (errors and words are summed, then divided).

    Args:
        refs, hyps: raw texts in the same order.
        lang: one language code for all, or one per item.

    Raises:
        ConfigError: an empty set, lists of different lengths, or a reference without words.
    """
    return _count(refs, hyps, lang, "word")


def cer(refs: Sequence[str], hyps: Sequence[str], lang: str | Sequence[str] = "en") -> ErrorCounts:
    """Character errors over a set, on the words of :func:`wer` joined by single spaces; raises as it does."""
    return _count(refs, hyps, lang, "char")


def align(reference: str, hypothesis: str, lang: str = "en") -> list[tuple[str, str, str]]:
    """Word alignment for display: ``(operation, reference word, hypothesis word)``.

    The operation is ``equal``, ``substitute``, ``delete`` or ``insert``; the missing side is empty.
    """
    import jiwer

    ref, hyp = normalize_pair(reference, hypothesis, lang)
    if not ref:
        return [("insert", "", word) for word in hyp]
    out: list[tuple[str, str, str]] = []
    for chunk in jiwer.process_words(" ".join(ref), " ".join(hyp)).alignments[0]:
        rs, hs = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for i in range(max(len(rs), len(hs))):
            out.append((chunk.type, rs[i] if i < len(rs) else "", hs[i] if i < len(hs) else ""))
    return out
