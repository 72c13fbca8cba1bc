"""``speechlm kmeans assign``: the unit of every frame of recordings or feature shards, restartable.

Recordings give one file, ``units.txt`` (or ``.km``, ``.jsonl``, ``.parquet``); feature shards give one ``.npy`` of
int32 labels each. Unfinished results are in ``parts/``: each part is written atomically, and a restart makes those that
are missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.data.manifest import Rejected, Utterance
from speechlm_ext.data.recordings import RecordingPool, find_audio
from speechlm_ext.errors import ConfigError, KMeansError, foreign_errors
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.features.shards import check_npy_size
from speechlm_ext.kmeans.features.sources import ShardSource, open_source
from speechlm_ext.tokenizers.units import EncoderKMeans
from speechlm_ext.units.output_folder import check_owner, recording_keys, shard_keys, write_rejected
from speechlm_ext.units.recordings import FrameEncoder, num_processes
from speechlm_ext.units.unit_files import SUFFIXES, Format, deduplicated, read_part, unit_writer, write_part
from speechlm_ext.utils.device import resolve_device
from speechlm_ext.utils.files.io import atomic_path, atomic_write_json, sha256_file
from speechlm_ext.utils.files.json_shape import SHA256, read_shaped
from speechlm_ext.utils.options import refuse_options, take_old_name
from speechlm_ext.utils.text import counted

PARTS = "parts"
RECORD = "assign.json"
_RECORDINGS_PER_PART = 500


@dataclass(frozen=True)
class AssignConfig:
    """Label every frame with its unit, the exact nearest centroid; if interrupted, rerun the same command to resume.

    ``speechlm kmeans assign --kmeans units/ --audio data/manifest.jsonl --output_dir labels/train`` writes
    ``labels/train/units.txt``, a line ``id unit unit …`` for each recording.
    """

    kmeans: str
    """Folder that `speechlm kmeans fit` has written."""
    output_dir: str = ""
    """Folder to write; needed."""
    audio: str | None = None
    """Recordings: a folder (wav, flac, ogg, mp3, g722) or a manifest.jsonl."""
    encoder: str | None = None
    """With --audio: the encoder, if the units do not record it (imported ones), or the new place of its model; default
    as in the fit."""
    features: list[str] | str | None = None
    """Feature shards instead: .npy or .parquet files, or their folder; each gives STEM.npy with int32 labels, -1 for a
    row that is not finite, and STEM.km too if fairseq's STEM.len is next to it."""
    format: Format = "text"
    """Of recordings: ``id unit unit …`` as Kaldi and ESPnet read it, ``km`` lines without ids as fairseq does, JSON
    lines with id and units, or Parquet with both."""
    deduplicate: bool = False
    """Write runs of one unit once (recordings only)."""
    column: str = "features"
    """Column of Parquet shards."""
    resample: bool = True
    """Convert recordings of another sampling rate, with one message; ``false`` rejects them."""
    skip_bad: bool = False
    """Skip bad recordings; they are listed in rejected.jsonl and counted."""
    device: str = "auto"
    """Where encoder and assignment run: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one."""
    num_workers: int | None = None
    """Processes that encode recordings on the CPU; default one per core."""
    output: str | None = None
    """Old name of ``output_dir``."""

    def __post_init__(self) -> None:
        take_old_name(self, "output", "output_dir", needed="the folder to write")


@says_conversions()
def run_assign(cfg: AssignConfig) -> int:
    """The exit code of labelling. Raises :class:`SpeechLMError`: an unusable setting, input or artifact."""
    if (cfg.audio is None) == (cfg.features is None):
        raise ConfigError("give either --audio (recordings) or --features (shards), and not both.")
    device = resolve_device(cfg.device, ConfigError)
    out = Path(cfg.output_dir)
    if cfg.features is not None:
        return _assign_shards(cfg, out, device)
    return _assign_audio(cfg, out, device)


# ---- feature shards ----------------------------------------------------------------------------------------
def _assign_shards(cfg: AssignConfig, out: Path, device: torch.device) -> int:
    of_recordings = ["format", "deduplicate", "encoder", "resample", "skip_bad"]
    purpose = "for recordings; the labels of feature shards are one .npy each. Leave it out, or give --audio"
    refuse_options(cfg, of_recordings, purpose)
    kmeans = KMeans.load(cfg.kmeans)
    source = open_source(cfg.features, column=cfg.column)
    assert isinstance(source, ShardSource)
    if source.num_features != kmeans.n_features_in_:
        raise KMeansError(
            f"--features has {counted(source.num_features, 'feature')} a row but the units of {cfg.kmeans} have "
            f"{kmeans.n_features_in_}; give features of the encoder and layer that they were fitted on."
        )
    targets = _label_files(source.paths, out)
    lines = [t.with_suffix(".km") for path, t in targets.items() if path.with_suffix(".len").is_file()]
    _claim(cfg, out, shard_keys(source.paths), [*targets.values(), *lines])
    kmeans.column, kmeans.device, kmeans.nonfinite = cfg.column, device, "drop"
    num_rows_of = dict(zip(source.paths, source.sizes, strict=True))
    todo = [path for path in source.paths if not targets[path].is_file()]
    with tqdm(total=sum(num_rows_of[path] for path in todo), unit="row", desc="assign", disable=None) as bar:
        for path in todo:
            labels = kmeans.predict(path).cpu().numpy()
            with atomic_path(targets[path]) as temporary:
                np.save(temporary, labels)
            bar.update(len(labels))
    num_bad = 0
    for path in source.paths:
        labels = _read_labels(targets[path], num_rows_of[path])
        num_bad += int((labels < 0).sum())
        _write_lines(path.with_suffix(".len"), labels, targets[path].with_suffix(".km"))
    print(
        f"{out}: {counted(source.num_rows, 'row')} of {counted(len(targets), 'shard')} ({len(targets) - len(todo)} "
        f"kept); {counted(num_bad, 'row')} not finite, labelled -1"
    )
    return 0


def _label_files(paths: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The file of labels of each shard. Raises :class:`ConfigError`: one would overwrite another or the features."""
    targets = {path: out / f"{path.stem}.npy" for path in paths}
    # Without case, which some file systems ignore.
    names = {str(target).lower() for target in targets.values()}
    if len(names) < len(paths) or any(
        os.path.realpath(path) == os.path.realpath(target) for path, target in targets.items()
    ):
        raise ConfigError(
            f"two shards have one name, or {out} is the folder of the features; labels would overwrite something. "
            "Choose another output_dir, or one folder of shards at a time."
        )
    return targets


def _read_labels(path: Path, num_rows: int) -> np.ndarray:
    """The labels of a shard, int32 ``[num_rows]``, of this run or an earlier one. Raises :class:`KMeansError`."""
    with foreign_errors(KMeansError, f"{path} is damaged", "Delete it and run the same command again."):
        labels = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # mapped: a damaged header allocates nothing
        if labels.shape != (num_rows,) or labels.dtype != np.int32:
            raise ValueError(f"expected int32 labels [{num_rows}], got {labels.dtype} {list(labels.shape)}")
        check_npy_size(path, labels)
        return np.array(labels)


def _write_lines(lengths: Path, labels: np.ndarray, target: Path) -> None:
    """Write a ``.km`` file, if the shard has fairseq's file of lengths, ``STEM.len``: the frames of each recording.

    Raises :class:`KMeansError`: lengths that do not add up to the shard's rows.
    """
    if not lengths.is_file():
        return
    try:
        sizes = [int(line) for line in lengths.read_text("utf-8").split()]
    except (OSError, ValueError) as error:
        raise KMeansError(
            f"{lengths} should hold a number of frames in each line ({error}); write it again."
        ) from None
    if sum(sizes) != len(labels) or min(sizes, default=0) < 0:
        raise KMeansError(
            f"{lengths} adds up to {counted(sum(sizes), 'frame')} but its shard has {counted(len(labels), 'row')}; "
            "write both again."
        )
    with atomic_path(target) as temporary, unit_writer("km", temporary) as write:
        for part in np.split(labels, np.cumsum(sizes)[:-1]) if sizes else []:
            write("", part)


# ---- recordings --------------------------------------------------------------------------------------------
def _assign_audio(cfg: AssignConfig, out: Path, device: torch.device) -> int:
    assert cfg.audio is not None
    refuse_options(cfg, ["column"], "for feature shards; leave it out, or give --features")
    units = EncoderKMeans.from_kmeans(cfg.kmeans, encoder=cfg.encoder)
    units.prepare()
    utterances = find_audio(cfg.audio)
    _check_ids(utterances, cfg.format)
    target = out / f"units{SUFFIXES[cfg.format]}"
    _claim(cfg, out, recording_keys(utterances), [target, out / PARTS])
    if target.is_file():
        print(f"{target}: these recordings are labelled already")
        return 0
    size = _RECORDINGS_PER_PART
    groups = [utterances[i : i + size] for i in range(0, len(utterances), size)]
    parts = [out / PARTS / f"part-{number:05d}.parquet" for number in range(len(groups))]
    todo = [(group, part) for group, part in zip(groups, parts, strict=True) if not part.is_file()]
    total = sum(len(group) for group, _ in todo)
    pool = RecordingPool(
        partial(FrameEncoder, units.spec, units.centroids_KF.numpy(), device, cfg.resample),
        skip_bad=cfg.skip_bad,
        num_workers=num_processes(cfg.num_workers, device),
        num_items=total,
    )
    with pool, tqdm(total=total, unit="utt", desc="assign", disable=None) as bar:
        for group, part in todo:
            results = []
            for result in pool(group):
                results.append(result)
                bar.update()
            write_part(part, [utterance.id for utterance in group], results)
    return _join(cfg, out, target, parts)


def _check_ids(utterances: Sequence[Utterance], form: str) -> None:
    """Raises :class:`ConfigError`: an id with a space, which would become part of the units in a text file."""
    for u in utterances:
        if form == "text" and (len(u.id.split()) != 1 or u.id.strip() != u.id):
            raise ConfigError(
                f"{u.where}: a text file of units cannot hold an id with a space; take --format jsonl or rename it."
            )


def _join(cfg: AssignConfig, out: Path, target: Path, parts: Sequence[Path]) -> int:
    """Join the parts in the requested format, and remove them."""
    rejected: list[Rejected] = []
    num_frames = num_bad = num_utterances = 0
    with atomic_path(target) as temporary:
        with unit_writer(cfg.format, temporary) as write:
            for part in parts:
                for name, units in read_part(part):
                    if isinstance(units, Rejected):
                        rejected.append(units)
                        continue
                    num_utterances, num_frames = num_utterances + 1, num_frames + len(units)
                    num_bad += int((units < 0).sum())
                    write(name, deduplicated(units) if cfg.deduplicate else units)
        write_rejected(out, rejected, len(rejected) + num_utterances, cfg.skip_bad)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    found = f"{counted(num_utterances, 'recording')}, {counted(num_frames, 'frame')}"
    print(f"{target}: {found}; {num_bad} not finite, labelled -1")
    return 0


def _claim(cfg: AssignConfig, out: Path, inputs: list[Any], written: Sequence[Path]) -> None:
    """Record settings and input of the labels in their folder. Raises :class:`ConfigError`: it holds others."""
    record = {
        "kmeans": sha256_file(Path(cfg.kmeans) / "kmeans.safetensors"),
        "format": cfg.format if cfg.audio is not None else "npy",
        "deduplicate": cfg.deduplicate,
        "inputs": inputs,
    }
    path, found = out / RECORD, None
    if path.is_file():
        shape = {"kmeans": SHA256, "format": str, "deduplicate": bool, "inputs": list}
        found = read_shaped(path, shape, ConfigError, f"choose another output_dir, or delete {out}.")
    contents = {"inputs": "--audio" if cfg.audio is not None else "--features", "kmeans": "--kmeans"}
    check_owner(out, found, record, contents=contents, written=written)
    atomic_write_json(path, record)
