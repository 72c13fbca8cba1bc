"""Making records: results are matched with the manifest, and speech is heard by the judge."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from speechlm_ext.audio import read_audio, write_wav
from speechlm_ext.data.fit import read_wave
from speechlm_ext.data.manifest import Utterance, read_manifest
from speechlm_ext.errors import AudioError
from speechlm_ext.evaluation.judge import SAMPLE_RATE
from speechlm_ext.evaluation.records import Record, RecordError, read_jsonl
from speechlm_ext.tasks import builtin_tasks
from speechlm_ext.utils.names import file_name
from speechlm_ext.utils.options import as_list

if TYPE_CHECKING:
    from speechlm_ext.evaluation.judge import Judge
    from speechlm_ext.evaluation.run import EvaluateConfig

#: Clips given to the judge at a time.
JUDGE_BATCH = 8
WAITING = "not heard yet"


def collect(cfg: EvaluateConfig, judge: Judge | None, why_not: str | None) -> list[Record]:
    """Make the records of all results of ``cfg``.

    A result is ``asr`` where its target is text and its request had audio, ``tts`` where its target is speech
    and its request had text; others (continuations) are not scored. With ``cfg.originals`` every ``tts`` item
    whose utterance has a recording adds a ``recording`` record, and with ``cfg.model`` a ``codec`` record.

    Args:
        judge: hears speech; None skips it.
        why_not: reason for a missing judge.

    Raises:
        RecordError: a results file is malformed, or an ``asr`` result has no reference in the manifests.
        ManifestError: a manifest that cannot be used.
    """
    assert cfg.output_dir is not None
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    utterances = {u.id: u for path in as_list(cfg.manifest) for u in read_manifest(path)}
    records: list[Record] = []
    speech: list[Record] = []
    for path in as_list(cfg.results):
        for where, row in read_jsonl(Path(path), "results file"):
            record = _from_result(where, row, Path(path), out, utterances, cfg.lang)
            if record is not None:
                (speech if record.kind == "tts" else records).append(record)
    if cfg.originals:
        heard = {
            r.id: utterances[r.id]
            for r in speech
            if r.id in utterances and utterances[r.id].audio is not None
        }
        speech += [_original(u, out, cfg.lang) for u in heard.values()]
        if cfg.model is not None:
            speech += _resynthesis(list(heard.values()), Path(cfg.model), out, cfg.lang)
    return records + _listen(speech, judge, why_not, out)


def utterance_id(request_id: str, utterances: dict[str, Utterance]) -> str:
    """The utterance that a request is about: its own id, or what follows its first dot (``asr.u1`` -> ``u1``)."""
    rest = request_id.partition(".")[2]
    return rest if request_id not in utterances and rest in utterances else request_id


def _from_result(
    where: str, row: Any, results: Path, out: Path, utterances: dict[str, Utterance], lang: str
) -> Record | None:
    try:
        request, modality = row["request"], row["modality"]
        identity = utterance_id(row["id"], utterances)
        found = utterances.get(identity)
        common: dict[str, Any] = {
            "id": identity,
            "lang": request.get("lang") or (found.lang if found else None) or lang,
            "dataset": found.dataset if found else "",
            "task": row["task"],
            "ids": {"file": _relative(results, out), "id": row["id"]},
            "finished": row["finished"],
            "settings": row["settings"],
            "model": row["model"],
        }
        audio = None if row["audio"] is None else _relative(results.parent / row["audio"], out)
        failed = row["finished"] == "failed"
        text, source = request["text"], request["audio"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{where}: not a result of `speechlm generate` ({error!r}).") from None
    kind = _kind(row["task"], modality, text is not None, source is not None)
    if kind == "asr":
        if found is None or found.text is None:
            raise RecordError(
                f"{where}: no reference text for {row['id']!r} in the manifests; its id must be an utterance's "
                "id, or NAME.ID."
            )
        # A failed item stays in the score as an empty transcript: every word of it is an error.
        return Record(
            kind="asr", reference=found.text, hypothesis="" if failed else row["text"] or "", **common
        )
    if kind == "tts":
        if failed or audio is None:
            return Record(kind="tts", reference=text, hypothesis="", **common)
        return Record(kind="tts", reference=text, hypothesis=None, skipped=WAITING, audio=audio, **common)
    return None


def _kind(task: str, modality: str | None, has_text: bool, has_audio: bool) -> str | None:
    """``asr``, ``tts`` or None (not scored) by what a request had and its target is; a failed one by its task."""
    if modality is None:
        template = builtin_tasks().get(task)
        kind = template.kind if template else task
        return kind if kind in ("asr", "tts") else None
    if modality in ("text_bpe", "g2p"):
        return "asr" if has_audio else None
    return "tts" if has_text else None


def _original(utterance: Utterance, out: Path, lang: str) -> Record:
    """The recording itself as a record that waits for the judge; a part of a longer file is cut out first."""
    path = utterance.audio
    assert path is not None
    if utterance.start is not None:
        path = out / "recordings" / file_name(utterance.id, ".wav")
        write_wav(path, read_utterance(utterance, SAMPLE_RATE), SAMPLE_RATE)
    return Record(
        utterance.id,
        "recording",
        utterance.text or "",
        None,
        lang=utterance.lang or lang,
        dataset=utterance.dataset,
        audio=_relative(path, out),
        skipped=WAITING,
    )


def _resynthesis(utterances: Sequence[Utterance], model: Path, out: Path, lang: str) -> list[Record]:
    """Encode and decode recordings with the model's codec, into ``out/resynthesis/``."""
    from speechlm_ext.model.speechlm import TOKENIZERS_NAME
    from speechlm_ext.tokenizers import TokenizerSet

    codec = TokenizerSet.load(model / TOKENIZERS_NAME).codec
    if codec is None:
        return []
    records = []
    for utterance in tqdm(utterances, desc="codec resynthesis", unit="utt", disable=None):
        path = out / "resynthesis" / file_name(utterance.id, ".wav")
        wave = codec.decode(codec.encode(read_utterance(utterance, codec.sample_rate)))
        write_wav(path, wave, codec.sample_rate)
        records.append(replace(_original(utterance, out, lang), kind="codec", audio=_relative(path, out)))
    return records


def read_utterance(utterance: Utterance, sample_rate: int) -> np.ndarray:
    """The recording of an utterance, cut to its ``start`` and ``duration``: float32 ``[T]``.

    Raises:
        AudioError: it cannot be used, or is shorter than the manifest says.
    """
    try:
        return read_wave(utterance, sample_rate, resample=True)[0]
    except AudioError as error:
        raise AudioError(f"{utterance.where}: {error}") from None


def _listen(records: list[Record], judge: Judge | None, why_not: str | None, out: Path) -> list[Record]:
    """Let the judge hear every record that waits for it."""
    if judge is None:
        return [r if r.hypothesis is not None else replace(r, skipped=why_not) for r in records]
    done = list(records)
    todo = [i for i, r in enumerate(records) if r.hypothesis is None]
    todo.sort(key=lambda i: records[i].lang)
    about = judge.describe()
    with tqdm(total=len(todo), desc="judge", unit="clip", disable=None) as bar:
        for first in range(0, len(todo), JUDGE_BATCH):
            batch = todo[first : first + JUDGE_BATCH]
            waves = [read_audio(out / str(records[i].audio), SAMPLE_RATE)[0] for i in batch]
            texts = judge.transcribe(waves, [records[i].lang for i in batch], SAMPLE_RATE)
            for i, wave, text in zip(batch, waves, texts, strict=True):
                seconds = round(len(wave) / SAMPLE_RATE, 3)
                done[i] = replace(records[i], hypothesis=text, skipped=None, judge=about, seconds=seconds)
            bar.update(len(batch))
    return done


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder)
