"""Records from generated results: each result is matched with its utterance in the manifests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from speechlm_ext.audio.files import write_wav
from speechlm_ext.data.manifest import Utterance, read_manifest
from speechlm_ext.data.recordings import read_wave
from speechlm_ext.errors import AudioError, ManifestError, StorageError
from speechlm_ext.evaluation.asr.scorer import SAMPLE_RATE
from speechlm_ext.evaluation.records import Record, RecordError, read_jsonl
from speechlm_ext.evaluation.transcribe import WAITING, skip_reason, transcribe_records
from speechlm_ext.tasks import builtin_tasks
from speechlm_ext.utils.files.io import make_folder, storage_error
from speechlm_ext.utils.names import file_name
from speechlm_ext.utils.options import as_list

if TYPE_CHECKING:
    from speechlm_ext.evaluation.asr.scorer import AsrScorer
    from speechlm_ext.evaluation.config import EvaluateConfig


def collect(cfg: EvaluateConfig, scorer: AsrScorer | None, no_scorer: str | None) -> list[Record]:
    """Records of all results of ``cfg``.

    A result is ``asr`` where its target is text and its request had audio, ``tts`` where its target is speech
    and its request had text; others (continuations) are not scored. With ``cfg.originals`` every ``tts`` item
    whose utterance has a recording adds a ``recording`` record, and with ``cfg.model`` a ``codec`` record.

    All inputs are checked before the first transcription. An item that fails later (an unreadable recording, a language
    that the scorer does not know, an error of its ASR model) has the reason in ``skipped``; the others are unaffected.

    Raises :class:`RecordError`: a results file is malformed, or an ``asr`` result has no reference in the manifests;
    :class:`ManifestError`: a manifest cannot be used, or two use one id; :class:`StorageError`: no folder.
    """
    assert cfg.output_dir is not None
    out = Path(cfg.output_dir)
    try:
        make_folder(out)
    except OSError as error:
        raise storage_error(error, out) from error
    utterances = _utterances(as_list(cfg.manifest))
    records: list[Record] = []
    speech: list[Record] = []
    for path in as_list(cfg.results):
        for where, row in read_jsonl(Path(path), "results file"):
            record = _from_result(where, row, Path(path), out, utterances, cfg.lang)
            if record is not None:
                (speech if record.kind == "tts" else records).append(record)
    if cfg.originals:
        ids = dict.fromkeys(r.id for r in speech)
        recorded = [utterances[i] for i in ids if i in utterances and utterances[i].audio is not None]
        speech += [_original(u, out, cfg.lang) for u in recorded]
        if cfg.model is not None:
            speech += _resynthesis(recorded, Path(cfg.model), out, cfg.lang)
    return records + transcribe_records(speech, scorer, no_scorer, out)


def _utterances(manifests: Sequence[Path]) -> dict[str, Utterance]:
    utterances: dict[str, Utterance] = {}
    for path in manifests:
        for utterance in read_manifest(path):
            other = utterances.setdefault(utterance.id, utterance)
            if (other.text, other.audio, other.start) != (utterance.text, utterance.audio, utterance.start):
                raise ManifestError(
                    f"{utterance.where}: the id is that of another utterance in {other.manifest}:{other.line}. Results "
                    "could belong to either; evaluate one manifest at a time, or give ids that are unique."
                )
    return utterances


def utterance_id(request_id: str, utterances: dict[str, Utterance]) -> str:
    """Id of a request's utterance: the request's own id, or the part after its first dot (``asr.u1`` -> ``u1``)."""
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
            "ids": {"file": os.path.relpath(results, out), "id": row["id"]},
            "finished": row["finished"],
            "settings": row["settings"],
            "model": row["model"],
        }
        audio = None if row["audio"] is None else os.path.relpath(results.parent / row["audio"], out)
        failed = row["finished"] == "failed"
        text, source = request["text"], request["audio"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{where}: not a result of `speechlm generate` ({error!r}).") from None
    for name, value in (
        ("request.text", text),
        ("request.lang", request.get("lang")),
        ("text", row.get("text")),
    ):
        if value is not None and not isinstance(value, str):
            raise RecordError(f"{where}: {name!r} must be a string or null, got {value!r}.")
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
    """Record of the recording itself, without its transcript; a part of a longer file is cut out first."""
    if utterance.start is None:
        assert utterance.audio is not None
        return _waiting("recording", utterance, utterance.audio, WAITING, out, lang)
    path = out / "recordings" / file_name(utterance.id, ".wav")
    status = _written(path, SAMPLE_RATE, lambda: read_utterance(utterance, SAMPLE_RATE))
    return _waiting("recording", utterance, path, status, out, lang)


def _resynthesis(utterances: Sequence[Utterance], model: Path, out: Path, lang: str) -> list[Record]:
    """Encode and decode recordings with the model's codec, into ``out/resynthesis/``."""
    from speechlm_ext.tokenizers import TokenizerSet
    from speechlm_ext.utils.files.run_folders import TOKENIZERS_NAME

    codec = TokenizerSet.load(model / TOKENIZERS_NAME).codec
    if codec is None:
        return []

    def resynthesise(utterance: Utterance) -> np.ndarray:
        return codec.decode(codec.encode(read_utterance(utterance, codec.sample_rate)))

    records = []
    for utterance in tqdm(utterances, desc="codec resynthesis", unit="utt", disable=None):
        path = out / "resynthesis" / file_name(utterance.id, ".wav")
        status = _written(path, codec.sample_rate, partial(resynthesise, utterance))
        records.append(_waiting("codec", utterance, path, status, out, lang))
    return records


def _written(path: Path, sample_rate: int, make: Callable[[], np.ndarray]) -> str:
    """Write the waveform of ``make()``; returns :data:`WAITING`, or why there is none. Raises :class:`StorageError`."""
    try:
        write_wav(path, make(), sample_rate)
    except StorageError:
        raise
    except Exception as error:
        return skip_reason(error)
    return WAITING


def _waiting(kind: str, utterance: Utterance, path: Path, status: str, out: Path, lang: str) -> Record:
    """Record of the audio at ``path``, yet without a transcript; a ``status`` other than WAITING: there is no audio."""
    return Record(
        utterance.id,
        kind,
        utterance.text or "",
        None,
        lang=utterance.lang or lang,
        dataset=utterance.dataset,
        audio=os.path.relpath(path, out) if status == WAITING else None,
        skipped=status,
    )


def read_utterance(utterance: Utterance, sample_rate: int) -> np.ndarray:
    """The recording of an utterance, cut to its ``start`` and ``duration``: float32 ``[T]``.

    Raises:
        AudioError: it cannot be used, or is shorter than the manifest says.
    """
    try:
        return read_wave(utterance, sample_rate, resample=True)[0]
    except AudioError as error:
        raise AudioError(f"{utterance.where}: {error}") from None
