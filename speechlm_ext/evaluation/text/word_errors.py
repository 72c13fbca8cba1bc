"""Word and character errors that do not depend on how an ASR model writes numbers.

ASR models write the same spoken number as "forty seven", "47", "4 7" or "4-7". So digits are turned into words before
scoring, in the reading that fits the reference best:

* a digit string may be read as one number ("250" -> "two hundred and fifty", with or without "and"), or as
  any succession of numbers below one hundred that its digits spell ("250" -> "two fifty", "twenty five zero",
  "two five zero"); separators inside it ("8.11", "2,50", "19-0") are spaces or thousands marks;
* a number of two digits may also be read as its tens and its unit ("21" -> "veinte uno");
* an English "oh" or "o" may be read as "o", "oh" or "zero".

The readings form a small graph per hypothesis; one edit-distance pass over that graph finds the path with
the fewest errors, so the choice is exact and cheap. No digit can become another digit by it. The reference's reading is
one of the graph's paths, so a text against itself has no errors. Counts come from jiwer. Turning words into digits
instead, as other normalizers do, joins "sixty thirteen" and "forty seven" into numbers that nobody said. How a text is
split into words: :mod:`.words`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from speechlm_ext.errors import ConfigError, SpeechLMError
from speechlm_ext.evaluation.text.numbers import LONGEST_NUMBER, number_words
from speechlm_ext.evaluation.text.words import characters, tokens
from speechlm_ext.utils.language import base_language, canonical_tag

logger = logging.getLogger("speechlm_ext")

#: Written into every score: scores of different rules are not comparable.
RULE = "nfkc-lower-nopunct-digits:best-reading-v2"

#: Groups of three, or of two and at last three as in India ("12,34,567").
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:[.,'\u066c][0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}")
#: Digits of a hypothesis times words of its reference up to which all readings are compared.
MAX_CELLS = 4_000_000
_SIGNS = ("º", "ª")
_CONJUNCTIONS = {"en": {"and"}, "fr": {"et"}, "es": {"y"}, "it": {"e"}}

Graph = list[list[tuple[int, tuple[str, ...]]]]
"""Per node the edges ``(next node, words)``; node 0 is the start and the last node the end."""


@dataclass(frozen=True)
class ErrorCounts:
    """Errors against references, as counts, so that sets can be added."""

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


def normalize(text: str, lang: str = "en") -> list[str]:
    """Words of a *reference*: as :func:`~speechlm_ext.evaluation.text.words.tokens`, with each digit string read as one
    number.

    Separators other than thousands marks split the string into several numbers. A number that begins with a zero or has
    more than :data:`LONGEST_NUMBER` digits is read digit by digit.
    """
    words: list[str] = []
    for token in tokens(text, lang):
        groups = _groups(token)
        if token[-1] in _SIGNS and groups:
            words += _ordinal("".join(groups), token[-1], lang)
        elif _THOUSANDS.fullmatch(token) and _is_number("".join(groups)):
            words += number_words("".join(groups), lang)
        elif groups:
            for group in groups:
                for digits in [group] if _is_number(group) else group:
                    words += number_words(digits, lang)
        else:
            words.append(token)
    return words


def reading_graph(text: str, lang: str = "en") -> Graph:
    """All readings of a hypothesis as a graph with words on its edges, by the rules of the module's docstring."""
    graph: Graph = [[]]
    language = base_language(lang)
    plain: list[str] = []

    def flush() -> None:
        if plain:
            graph[-1].append((len(graph), tuple(plain)))
            graph.append([])
            plain.clear()

    for token in tokens(text, lang):
        groups = _groups(token)
        is_oh = language == "en" and token in ("o", "oh")
        if not groups and not is_oh:
            plain.append(token)
            continue
        flush()
        start = len(graph) - 1
        if is_oh:
            graph[start] += [(start + 1, (word,)) for word in ("o", "oh", "zero")]
            graph.append([])
            continue
        if token[-1] in _SIGNS:
            graph[start].append((start + 1, _ordinal("".join(groups), token[-1], lang)))
            graph.append([])
            continue
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
    flush()
    return graph


def _groups(token: str) -> list[str]:
    """The digit groups of a digit string; none for a word."""
    return re.findall("[0-9]+", token) if token[0] in "0123456789" else []


def _is_number(digits: str) -> bool:
    return len(digits) <= LONGEST_NUMBER and (len(digits) == 1 or digits[0] != "0")


def _ordinal(digits: str, sign: str, lang: str) -> tuple[str, ...]:
    """ "1º" in words ("primero"); without such words, and for the feminine, the cardinal followed by the sign."""
    words = number_words(digits, lang, "ordinal") if sign == "º" else (digits,)
    if words == (digits,):
        *rest, last = number_words(digits, lang)
        words = (*rest, last + sign)
    return words


def _add_readings(graph: Graph, start: int, end: int, digits: str, lang: str) -> None:
    """Add the readings of ``digits`` as one number: whole, without conjunctions, as tens and unit."""
    if not _is_number(digits):
        return
    whole = number_words(digits, lang)
    conjunctions = _CONJUNCTIONS.get(base_language(lang), ())
    readings = {whole, tuple(w for w in whole if w not in conjunctions)}
    if len(digits) == 2 and digits[0] >= "2" and digits[1] != "0":
        readings.add(number_words(digits[0] + "0", lang) + number_words(digits[1], lang))
    graph[start].extend((end, words) for words in sorted(readings) if (end, words) not in graph[start])


def best_reading(reference: Sequence[str], hypothesis: str, lang: str = "en") -> list[str]:
    """The words of a hypothesis in the reading with the fewest word errors against ``reference``.

    They are the best path through :func:`reading_graph`; of equal paths the one with fewer words. Beyond
    :data:`MAX_CELLS` (thousands of digits against thousands of words) the hypothesis is read like a reference.
    """
    graph = reading_graph(hypothesis, lang)
    if all(len(edges) <= 1 for edges in graph):
        return [word for edges in graph for _, words in edges for word in words]
    width = len(reference) + 1
    if len(graph) * width > MAX_CELLS:
        return normalize(hypothesis, lang)
    numbers = {word: i for i, word in enumerate(dict.fromkeys(reference))}
    reference_R = np.array([numbers[word] for word in reference], np.int64)
    # A path's cost is one integer: errors, then words, then its start in the row of the edge's first node.
    word_cost = width
    error_cost = word_cost * (2 + sum(max((len(w) for _, w in edges), default=0) for edges in graph))
    places = np.arange(width)
    worst = np.iinfo(np.int64).max // 2
    cost = np.full((len(graph), width), worst)
    came = np.zeros((len(graph), width), np.int32)
    back = np.zeros((len(graph), width), np.int32)
    steps: list[tuple[int, tuple[str, ...]]] = []
    cost[0] = places * error_cost
    for node, edges in enumerate(graph):
        for target, words in edges:
            row = cost[node] + places
            for word in words:
                extra = row + (error_cost + word_cost)
                wrong = (reference_R != numbers.get(word, -1)) * error_cost + word_cost
                extra[1:] = np.minimum(extra[1:], row[:-1] + wrong)
                # A missing word costs an error per place to the right.
                row = np.minimum.accumulate(extra - places * error_cost) + places * error_cost
            total, origin = row - row % width, row % width
            better = total < cost[target]
            cost[target][better], back[target][better] = total[better], origin[better]
            came[target][better] = len(steps)
            steps.append((node, words))
    path: list[tuple[str, ...]] = []
    node, place = len(graph) - 1, width - 1
    while node:
        before, words = steps[came[node, place]]
        node, place = before, int(back[node, place])
        path.append(words)
    return [word for words in reversed(path) for word in words]


# Word errors, character errors and the demo's report need the same pairs.
@lru_cache(maxsize=4096)
def _pair(reference: str, hypothesis: str, lang: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The scored words of reference and hypothesis."""
    words = normalize(reference, lang)
    return tuple(words), tuple(best_reading(words, hypothesis, lang))


@lru_cache(maxsize=1024)  # once for each language
def _warn_unknown(lang: str) -> None:
    if canonical_tag(lang) is None:
        logger.warning(
            "scoring: %r is not the tag of a language (such as 'en', 'pt-BR' or 'deu'); its texts are compared without "
            "number words: '20' and 'twenty' differ. Correct 'lang' in the manifest or requests",
            lang,
        )


def _count(refs: Sequence[str], hyps: Sequence[str], lang: str | Sequence[str], unit: str) -> ErrorCounts:
    try:
        import jiwer
    except ImportError:
        raise SpeechLMError("scoring needs jiwer; install it: pip install 'speechlm_ext[eval]'") from None
    languages = [lang] * len(refs) if isinstance(lang, str) else list(lang)
    if not refs or len(refs) != len(hyps) or len(refs) != len(languages):
        raise ConfigError(
            f"{unit} errors: expected as many hypotheses and languages as references and at least one, got "
            f"{len(refs)} references, {len(hyps)} hypotheses and {len(languages)} languages."
        )
    for language in dict.fromkeys(languages):
        _warn_unknown(language)
    pairs = [_pair(*item) for item in zip(refs, hyps, languages, strict=True)]
    empty = [i for i, (words, _) in enumerate(pairs) if not words]
    if empty:
        raise ConfigError(
            f"{unit} errors: reference {empty[0]} ({refs[empty[0]]!r}) has no words left after normalization; "
            "leave such items out of the scored set."
        )
    if unit == "word":
        out: Any = jiwer.process_words([" ".join(r) for r, _ in pairs], [" ".join(h) for _, h in pairs])
    else:
        out = jiwer.process_characters([characters(r) for r, _ in pairs], [characters(h) for _, h in pairs])
    total = out.hits + out.substitutions + out.deletions
    return ErrorCounts(out.substitutions, out.deletions, out.insertions, total, len(pairs), unit)


def sum_counts(counts: Sequence[ErrorCounts]) -> ErrorCounts:
    """The counts of several sets of one unit as those of one set; at least one."""
    return ErrorCounts(
        substitutions=sum(c.substitutions for c in counts),
        deletions=sum(c.deletions for c in counts),
        insertions=sum(c.insertions for c in counts),
        total=sum(c.total for c in counts),
        utterances=sum(c.utterances for c in counts),
        unit=counts[0].unit,
    )


def wer(refs: Sequence[str], hyps: Sequence[str], lang: str | Sequence[str] = "en") -> ErrorCounts:
    """Word errors over a set (errors and words are summed, then divided).

    Args:
        refs, hyps: raw texts in the same order.
        lang: one language tag for all, or one per item.

    Raises:
        ConfigError: an empty set, lists of different lengths, or a reference without words.

    A tag of no known language is logged once; its numbers are not read as words.
    """
    return _count(refs, hyps, lang, "word")


def cer(refs: Sequence[str], hyps: Sequence[str], lang: str | Sequence[str] = "en") -> ErrorCounts:
    """Character errors over a set, on the words of :func:`wer`, joined as
    :func:`~speechlm_ext.evaluation.text.words.characters` says; raises as it does."""
    return _count(refs, hyps, lang, "char")


def align(reference: str, hypothesis: str, lang: str = "en") -> list[tuple[str, str, str]]:
    """Word alignment for display: ``(operation, reference word, hypothesis word)``.

    The operation is ``equal``, ``substitute``, ``delete`` or ``insert``; the missing side is empty.
    """
    import jiwer

    ref, hyp = _pair(reference, hypothesis, lang)
    if not ref:
        return [("insert", "", word) for word in hyp]
    out: list[tuple[str, str, str]] = []
    for chunk in jiwer.process_words(" ".join(ref), " ".join(hyp)).alignments[0]:
        rs, hs = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for i in range(max(len(rs), len(hs))):
            out.append((chunk.type, rs[i] if i < len(rs) else "", hs[i] if i < len(hs) else ""))
    return out
