"""Requests for the demo's model: transcripts, speech, and continuations of held-out items.

Request ids are ``kind.UTTERANCE``, so that ``speechlm evaluate`` finds the reference.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from speechlm_ext.audio.files import write_wav
from speechlm_ext.data.manifest import Utterance, read_manifest
from speechlm_ext.evaluation.collect import read_utterance
from speechlm_ext.utils.files.io import atomic_write_text
from speechlm_ext.utils.files.json_text import json_line
from speechlm_ext.utils.names import file_name

#: Held-out items per data set and language: (transcribed, spoken). The headline is English spoken numbers.
HEADLINE = (40, 40)
OTHER_LANGUAGES = (10, 3)
PROMPTS = {"en": (20, 4)}
OTHER_PROMPTS = (5, 0)
OWN = (40, 20)
#: Sixteen tries with different SSL units, each with the most probable codes; the model's own ASR selects one.
TTS_SETTINGS: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 30,
    "codec_temperature": 0.0,
    "best_of": 16,
    "seed": 1,
}
OWN_TTS_SETTINGS: dict[str, Any] = {"temperature": 0.7, "top_k": 20, "seed": 1}
CONTINUATION_SETTINGS: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "seed": 1}
SAMPLE_RATE = 16000


def choose(utterances: list[Utterance], own: bool) -> dict[str, list[Utterance]]:
    """The utterances to transcribe (``asr``) and to speak (``tts``), in the manifest's order."""
    chosen: dict[str, list[Utterance]] = {"asr": [], "tts": []}
    groups: dict[tuple[str, str], list[Utterance]] = {}
    for utterance in utterances:
        if utterance.audio is not None and utterance.text:
            groups.setdefault((utterance.dataset, utterance.lang or ""), []).append(utterance)
    # The headline comes first, so that a limited run has some of it.
    for (dataset, lang), group in sorted(groups.items(), key=lambda g: g[0] != ("numbers", "en")):
        if own:
            counts = OWN
        elif dataset == "numbers":
            counts = HEADLINE if lang == "en" else OTHER_LANGUAGES
        else:
            counts = PROMPTS.get(lang, OTHER_PROMPTS)
        chosen["asr"] += group[: counts[0]]
        chosen["tts"] += group[: counts[1]]
    return chosen


def make_requests(manifest: Path, path: Path, frame_rate: float, own: bool, limit: int | None = None) -> int:
    """Write the requests file and the beginnings of recordings that are continued; returns the count.

    Args:
        manifest: the held-out manifest.
        path: requests file to write; audio paths in it are relative to its folder.
        frame_rate: codec frames per second, which bounds the length of speech.
        own: the recordings are the user's own, without spoken numbers.
        limit: maximum number of items of each kind.
    """
    utterances = read_manifest(manifest)
    chosen = choose(utterances, own)
    rows: list[dict[str, Any]] = []
    for u in chosen["asr"][:limit]:
        audio = os.path.relpath(_whole(u, path.parent), path.parent)
        rows.append(
            {
                "id": f"asr.{u.id}",
                "task": "asr",
                "audio": audio,
                "lang": u.lang,
                "max_len": 300,
            }
        )
    for u in chosen["tts"][:limit]:
        seconds = 8.0 if u.dataset == "numbers" else 15.0
        frames = round(seconds * frame_rate)
        rows.append(
            {
                "id": f"tts.{u.id}",
                "task": "tts",
                "text": u.text,
                "lang": u.lang,
                "max_len": frames,
                **(OWN_TTS_SETTINGS if own else TTS_SETTINGS),
            }
        )
    rows += _text_beginnings(utterances)[:limit]
    rows += _audio_beginnings(chosen["tts"], path.parent, frame_rate)[:limit]
    lines = ({k: v for k, v in row.items() if v is not None} for row in rows)
    atomic_write_text(path, "".join(map(json_line, lines)))
    return len(rows)


def _whole(utterance: Utterance, folder: Path) -> Path:
    """The utterance's own file, or a cut of the longer recording that it is a part of."""
    assert utterance.audio is not None
    if utterance.start is None:
        return utterance.audio
    path = folder / "parts" / file_name(utterance.id, ".wav")
    write_wav(path, read_utterance(utterance, SAMPLE_RATE), SAMPLE_RATE)
    return path


def _text_beginnings(utterances: list[Utterance]) -> list[dict[str, Any]]:
    """The first words of a few held-out texts, of every language."""
    rows: list[dict[str, Any]] = []
    taken: dict[tuple[str, str], int] = {}
    for u in utterances:
        words = (u.text or "").split()
        key = (u.dataset, u.lang or "")
        limit = 3 if u.lang in ("en", None) and u.dataset != "numbers" else 1
        if len(words) >= 4 and taken.get(key, 0) < limit:
            taken[key] = taken.get(key, 0) + 1
            start = " ".join(words[: max(2, len(words) // 3)])
            rows.append(
                {"id": f"textlm.{u.id}", "task": "textlm", "text": start, "lang": u.lang, "max_len": 40}
                | CONTINUATION_SETTINGS
            )
    return rows


def _audio_beginnings(utterances: list[Utterance], folder: Path, frame_rate: float) -> list[dict[str, Any]]:
    """The first part of four held-out recordings, cut to wav files."""
    rows = []
    for u in utterances[:4]:
        wave = read_utterance(u, SAMPLE_RATE)
        wave = wave[: max(SAMPLE_RATE // 2, min(len(wave) * 2 // 5, 3 * SAMPLE_RATE))]
        name = Path("beginnings") / file_name(u.id, ".wav")
        write_wav(folder / name, wave, SAMPLE_RATE)
        rows.append(
            {"id": f"audiolm.{u.id}", "task": "audiolm", "audio": str(name), "lang": u.lang}
            | {"max_len": round(4 * frame_rate)}
            | CONTINUATION_SETTINGS
        )
    return rows
