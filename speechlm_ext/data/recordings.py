"""Recordings: finding them, reading their samples, and processing many of them in order.

Recordings come from a manifest or from a folder, where the path below the folder without its suffix is the id.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from speechlm_ext.audio.files import read_audio
from speechlm_ext.audio.waveform import add_conversions, take_conversions
from speechlm_ext.data.manifest import Rejected, Utterance, read_manifest
from speechlm_ext.errors import AudioError, ConfigError, SpeechLMError, TokenizerError
from speechlm_ext.utils.files.folders import find_files
from speechlm_ext.utils.text import counted

logger = logging.getLogger("speechlm_ext")
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".g722")
Result = TypeVar("Result")
#: A function of one utterance; raises :class:`SpeechLMError` for one that cannot be used.
Worker = Callable[[Utterance], Result]
_CHUNK = 4
#: Below this many recordings starting processes takes longer than the work.
_MIN_ITEMS_FOR_PROCESSES = 32


def find_audio(path: str | Path) -> list[Utterance]:
    """The recordings of a manifest or of a folder, in the order of the manifest or of their names.

    Sub-folders of a folder are read, linked ones too, each file once; hidden files (such as macOS's ``._NAME``) and
    other files are left out and counted in the log.

    Raises:
        ManifestError: an invalid manifest.
        AudioError: a folder without recordings or that cannot be read, or two recordings with one id.
    """
    path = Path(path)
    if not path.is_dir():
        spoken = [u for u in read_manifest(path) if u.audio is not None]
        if not spoken:
            raise AudioError(f"manifest {path} has no line with 'audio'; give recordings.")
        return spoken
    listing = find_files(path, SUFFIXES, AudioError)
    left_out = f"; left out: {listing}" if listing.left_out else ""
    if not listing.files:
        raise AudioError(
            f"folder {path} has no recordings ({', '.join(SUFFIXES)}){left_out}. Give another folder or a "
            "manifest.jsonl."
        )
    if left_out:
        logger.info("%s: %s%s", path, counted(len(listing.files), "recording"), left_out)
    found: dict[str, Utterance] = {}
    for file in listing.files:
        utterance = Utterance(
            str(file.relative_to(path).with_suffix("")), audio=file.absolute(), manifest=str(path)
        )
        other = found.setdefault(utterance.id, utterance)
        if other is not utterance:
            raise AudioError(
                f"{other.audio} and {utterance.audio} would both have the id {utterance.id!r}; keep one of them, or "
                "write a manifest.jsonl."
            )
    return list(found.values())


def read_wave(utterance: Utterance, sample_rate: int | None, resample: bool) -> tuple[np.ndarray, int]:
    """The utterance's part of its recording, float32 ``[T]``, and its sampling rate in Hz.

    Raises:
        AudioError: the recording cannot be used, or the part reaches beyond it.
    """
    if utterance.audio is None:
        raise AudioError("there is no audio.")
    wave, rate = read_audio(utterance.audio, sample_rate, resample=resample)
    if utterance.start is None:
        return wave, rate
    start = round(utterance.start * rate)
    end = len(wave) if utterance.duration is None else start + round(utterance.duration * rate)
    # A hundredth of a second past the end is how durations are rounded in manifests, not an error.
    if start >= len(wave) or end > len(wave) + rate // 100:
        length = "open" if utterance.duration is None else f"{utterance.duration:g} s"
        raise AudioError(
            f"start {utterance.start:g} s with duration {length} reaches past the end of {utterance.audio}, which "
            f"lasts {len(wave) / rate:.3f} s; fix them."
        )
    return wave[start:end], rate


class RecordingPool(Generic[Result]):
    """Applies a worker to recordings, in this process or in several of one thread each; a context manager.

    Results come in the order of the recordings, so they do not depend on timing.

    Args:
        make_worker: builds the worker, once in each process; picklable, such as a class or a ``functools.partial``.
            It is called in this process first, so that a missing model is one error and not one for each process.
        skip_bad: replace the result of an unusable recording by a :class:`Rejected` instead of raising.
        num_workers: processes; None: one per usable core, 0 or 1: this process.
        num_items: recordings to come in all; with ``num_workers=None`` few are processed in this process.

    Raises:
        ConfigError: a negative number of processes.
        SpeechLMError: from ``make_worker``.
    """

    def __init__(
        self,
        make_worker: Callable[[], Worker[Result]],
        *,
        skip_bad: bool,
        num_workers: int | None,
        num_items: int,
    ) -> None:
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"num_workers must be >= 0, got {num_workers}.", argument="num_workers")
        if num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = cores if num_items >= _MIN_ITEMS_FOR_PROCESSES else 1
        self._skip_bad = skip_bad
        self._worker: Worker[Result] | None = make_worker()
        self._pool: ProcessPoolExecutor | None = None
        if num_workers > 1:
            self._worker = None
            # Spawned, because a forked child of a process with threads can hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                num_workers, context, initializer=_start, initargs=(make_worker,)
            )

    def __enter__(self) -> RecordingPool[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, utterances: Sequence[Utterance]) -> Iterator[Result | Rejected]:
        """The worker's result for each recording.

        Raises:
            SpeechLMError: the first unusable recording, unless they are skipped; the message names it.
        """
        if self._pool is None:
            assert self._worker is not None
            for utterance in utterances:
                yield _apply(self._worker, utterance, self._skip_bad)
            return
        chunks = [utterances[i : i + _CHUNK] for i in range(0, len(utterances), _CHUNK)]
        try:
            for results, conversions in self._pool.map(_apply_chunk, chunks, [self._skip_bad] * len(chunks)):
                add_conversions(conversions)
                yield from results
        except BrokenProcessPool:
            raise TokenizerError(
                "a process that encodes recordings died, most likely for lack of memory; finished parts are kept. Run "
                "the same command again with a smaller num_workers."
            ) from None


def _apply(worker: Worker[Result], utterance: Utterance, skip_bad: bool) -> Result | Rejected:
    try:
        return worker(utterance)
    except SpeechLMError as error:
        message = f"{utterance.where}: {error}"
        if skip_bad:
            return Rejected(utterance.id, utterance.manifest, utterance.line, message)
        raise type(error)(message) from None


# ---- in the processes ------------------------------------------------------------------------------------------
_worker: Worker[Any]


def _start(make_worker: Callable[[], Worker[Any]]) -> None:
    global _worker
    import torch

    torch.set_num_threads(1)
    _worker = make_worker()


def _apply_chunk(
    utterances: Sequence[Utterance], skip_bad: bool
) -> tuple[list[Any], Counter[tuple[int, int]]]:
    return [_apply(_worker, u, skip_bad) for u in utterances], take_conversions()
