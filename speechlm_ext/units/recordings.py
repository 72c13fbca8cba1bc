"""From recordings to features or units, in this process or in several that have one thread each.

Recordings come from a manifest (``manifest.jsonl``, see the data room) or from a folder, where the path below the
folder without its ending is the id. Results come in the order of the recordings, whatever process made them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechlm_ext.audio.files import audio_seconds
from speechlm_ext.audio.waveform import add_conversions, take_conversions
from speechlm_ext.data.manifest import Rejected, Utterance, read_manifest
from speechlm_ext.data.tokenize.fit import read_wave
from speechlm_ext.errors import AudioError, ConfigError, SpeechLMError, TokenizerError
from speechlm_ext.kmeans.features.shards import content_key
from speechlm_ext.kmeans.words import counted
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.tokenizers.encoders.spec import SAMPLE_RATE, EncoderSpec
from speechlm_ext.utils.files.folders import find_files

logger = logging.getLogger("speechlm_ext")
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".g722")
_CHUNK = 4
#: Below this many recordings starting processes takes longer than the work.
_WORTH_PROCESSES = 32


def find_audio(path: str | Path) -> list[Utterance]:
    """The recordings of a manifest or of a folder, in the manifest's or the names' order.

    Of a folder all sub-folders are read, linked ones too, each file once; hidden files (such as macOS's ``._NAME``) and
    other files are left out and counted in the log.

    Raises:
        ManifestError: a manifest that is not good.
        AudioError: a folder without recordings, one that cannot be read, or two recordings of one id.
    """
    path = Path(path)
    if path.is_dir():
        listing = find_files(path, SUFFIXES, AudioError)
        files = listing.files
        others = f"; left out: {listing}" if listing.left_out else ""
        if not files:
            raise AudioError(
                f"folder {path} has no recordings ({', '.join(SUFFIXES)}){others}. Give another folder or a "
                "manifest.jsonl."
            )
        if others:
            logger.info("%s: %s%s", path, counted(len(files), "recording"), others)
        found = [
            Utterance(str(p.relative_to(path).with_suffix("")), audio=p.absolute(), manifest=str(path))
            for p in files
        ]
        seen: dict[str, Utterance] = {}
        for u in found:
            other = seen.setdefault(u.id, u)
            if other is not u:
                raise AudioError(
                    f"{other.audio} and {u.audio} would both be {u.id!r}; keep one of them, or write a manifest.jsonl."
                )
        return found
    spoken = [u for u in read_manifest(path) if u.audio is not None]
    if not spoken:
        raise AudioError(f"manifest {path} has no line with 'audio'; give recordings.")
    return spoken


def recording_rows(utterances: Sequence[Utterance]) -> list[list[Any]]:
    """What tells recordings apart, as JSON: ids, file names, sizes and some of their bytes, which part of the file."""
    keys = {path: _file_key(path) for path in {u.audio for u in utterances} if path is not None}
    return [[u.id, u.audio and [u.audio.name, *keys[u.audio]], u.start, u.duration] for u in utterances]


def _file_key(path: Path) -> list[Any]:
    """Begin, middle and end: few bytes, since there may be a million files, but other sound differs in its middle."""
    try:
        return content_key(path, pieces=3)
    except OSError:  # who reads it says so
        return [-1, ""]


def estimated_frames(utterances: Sequence[Utterance], frame_rate: float) -> int:
    """Frames that recordings will give, by their headers or the manifest's durations; rounded up by a frame each.

    Raises:
        AudioError: a recording that cannot be read.
    """
    total = 0
    for u in utterances:
        assert u.audio is not None
        if u.start is not None and u.duration is not None:
            seconds = u.duration
        else:
            try:
                seconds = audio_seconds(u.audio) - (u.start or 0.0)
            except AudioError as error:
                raise AudioError(f"{u.where}: {error}") from None
        total += int(max(seconds, 0.0) * frame_rate) + 1
    return total


@dataclass(frozen=True)
class AudioJob:
    """What is made of each recording."""

    encoder: EncoderSpec
    centroids_KF: np.ndarray | None = None
    """float ``[K, F]``: give units instead of features."""
    device: str = "cpu"
    resample: bool = True
    """Convert recordings of another sampling rate; otherwise they are bad items."""
    skip_bad: bool = False
    """Give a `Rejected` for a bad item instead of raising."""


class _Worker:
    def __init__(self, job: AudioJob) -> None:
        self._job = job
        self._encoder = build_encoder(job.encoder, device=job.device)
        self._index: CentroidIndex | None = None
        if job.centroids_KF is not None:
            self._index = CentroidIndex.build(torch.from_numpy(job.centroids_KF))

    def __call__(self, utterance: Utterance) -> np.ndarray | Rejected:
        try:
            wave, _ = read_wave(utterance, SAMPLE_RATE, self._job.resample)
            features_TF = self._encoder(wave)
            if self._index is None:
                return features_TF.numpy()
            labels = kmeans_assign(features_TF.to(self._index.centroids.dtype), self._index)
            return torch.as_tensor(labels).numpy()
        except SpeechLMError as error:
            message = f"{utterance.where}: {error}"
            if self._job.skip_bad:
                return Rejected(utterance.id, utterance.manifest, utterance.line, message)
            raise type(error)(message) from None


class AudioPool:
    """Encodes recordings in order; use it as a context manager.

    Args:
        job: what to make of them.
        num_workers: processes; None takes one per usable core on the CPU and none for a GPU, 0 or 1 works in this
            process.
        num_items: how many will come in all; few are encoded in this process.

    Raises:
        ConfigError: a negative number of processes.
        TokenizerError: the encoder's model cannot be used.
    """

    def __init__(self, job: AudioJob, *, num_workers: int | None, num_items: int) -> None:
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"--num_workers must be >= 0, got {num_workers}.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = cores if num_workers is None else num_workers
        if num_workers is None and (num_items < _WORTH_PROCESSES or job.device != "cpu"):
            count = 1
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # Spawned, because a forked child of a process with threads can hang.
            self._pool = ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(job,)
            )
        else:
            self._worker = _Worker(job)

    def __enter__(self) -> AudioPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, utterances: Sequence[Utterance]) -> Iterator[np.ndarray | Rejected]:
        """float32 features ``[T, F]``, or int32 units ``[T]``, of each recording.

        Raises:
            SpeechLMError: the first bad item, unless bad items are skipped.
        """
        if self._pool is None:
            yield from map(self._worker, utterances)
            return
        chunks = [utterances[i : i + _CHUNK] for i in range(0, len(utterances), _CHUNK)]
        try:
            for results, conversions in self._pool.map(_work, chunks):
                add_conversions(conversions)
                yield from results
        except BrokenProcessPool:
            raise TokenizerError(
                "an encoding process died, most likely for want of memory; finished parts are kept. Run the same "
                "command again with a smaller --num_workers."
            ) from None


_worker: _Worker | None = None


def _start(job: AudioJob) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = _Worker(job)


def _work(utterances: Sequence[Utterance]) -> tuple[list[np.ndarray | Rejected], Counter[tuple[int, int]]]:
    assert _worker is not None
    return [_worker(u) for u in utterances], take_conversions()
