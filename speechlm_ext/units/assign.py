"""``speechlm kmeans assign``: the unit of every frame of recordings or feature shards, restartable.

Recordings give one file, ``units.txt`` (or ``.km``, ``.jsonl``, ``.parquet``); feature shards give one ``.npy`` of
int32 labels each. What is under way lies in ``parts/``: each part is written whole, and a restart makes those that
are missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.data.manifest import Rejected, Utterance
from speechlm_ext.errors import ConfigError, KMeansError, foreign_errors
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.features.shards import check_npy_size, content_key
from speechlm_ext.kmeans.features.sources import FeatureSource, ShardSource, open_source
from speechlm_ext.kmeans.words import counted, speaks_options
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.tokenizers.units import EncoderKMeans
from speechlm_ext.units.fit import REJECTED, refuse_options, resolve_device
from speechlm_ext.units.recordings import AudioJob, AudioPool, find_audio, recording_rows
from speechlm_ext.units.unit_files import SUFFIXES, Format, deduplicated, unit_writer
from speechlm_ext.utils.files.io import atomic_path, atomic_write_json, atomic_write_text, sha256_file
from speechlm_ext.utils.files.json_shape import SHA256, check_shape, read_shaped
from speechlm_ext.utils.files.json_text import parse_json
from speechlm_ext.utils.options import take_old_name

PARTS = "parts"
RECORD = "assign.json"
_RECORDINGS_PER_PART = 500


@dataclass(frozen=True)
class AssignConfig:
    """Label every frame with its unit, the exact nearest centroid; stopped, the same command goes on where it was.

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
    """With --audio: the encoder where the units do not say it (imported ones), or where its model lies now; default as
    in the fit."""
    features: list[str] | str | None = None
    """Feature shards instead: .npy or .parquet files, or their folder; each gives STEM.npy with int32 labels, -1 for a
    row that is not finite, and where fairseq's STEM.len lies beside it STEM.km too."""
    format: Format = "text"
    """Of recordings: ``id unit unit …`` as Kaldi and ESPnet read it, ``km`` lines without ids as fairseq does, JSON
    lines with id and units, or Parquet with both."""
    deduplicate: bool = False
    """Write runs of one unit once (recordings only)."""
    column: str = "features"
    """Column of Parquet shards."""
    resample: bool = True
    """Convert recordings of another sampling rate, which is said once; ``false`` makes them bad items."""
    skip_bad: bool = False
    """Go on past bad recordings; they are listed in rejected.jsonl and counted."""
    device: str = "auto"
    """Where encoder and assignment run: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one."""
    num_workers: int | None = None
    """Processes that encode recordings on the CPU; default one per core."""
    output: str | None = None
    """Old name of ``output_dir``."""

    def __post_init__(self) -> None:
        take_old_name(self, "output", "output_dir", needed="the folder to write")


@speaks_options
@says_conversions()
def run_assign(cfg: AssignConfig) -> int:
    """Assign as ``cfg`` says; see :class:`AssignConfig`.

    Raises:
        SpeechLMError: a setting, a recording, a shard or an artefact that cannot be used; the message names it.
    """
    if (cfg.audio is None) == (cfg.features is None):
        raise ConfigError("give either --audio (recordings) or --features (shards), and not both.")
    device = resolve_device(cfg.device)
    out = Path(cfg.output_dir)
    if cfg.features is not None:
        return _assign_shards(cfg, out, device)
    return _assign_audio(cfg, out, device)


# ---- feature shards ----------------------------------------------------------------------------------------
def _assign_shards(cfg: AssignConfig, out: Path, device: str) -> int:
    of_recordings = ["format", "deduplicate", "encoder", "resample", "skip_bad"]
    why = "for recordings; the labels of feature shards are one .npy each. Leave it out, or give --audio"
    refuse_options(cfg, of_recordings, why)
    kmeans = KMeans.load(cfg.kmeans)
    source = open_source(cfg.features, column=cfg.column)
    assert isinstance(source, ShardSource)
    if source.num_features != kmeans.n_features_in_:
        raise KMeansError(
            f"--features has {counted(source.num_features, 'feature')} a row but the units of {cfg.kmeans} have "
            f"{kmeans.n_features_in_}; give features of the encoder and layer that they were fitted on."
        )
    paths = [shard.path for shard in source.shards]
    targets = {path: out / f"{path.stem}.npy" for path in paths}
    # Without case, which some file systems do not count.
    if len({str(t).lower() for t in targets.values()}) < len(targets) or any(
        os.path.realpath(p) == os.path.realpath(t) for p, t in targets.items()
    ):
        raise ConfigError(
            f"two shards have one name, or {out} is the folder of the features; labels would overwrite something. "
            "Choose another output_dir, or one folder of shards at a time."
        )
    lines = [t.with_suffix(".km") for path, t in targets.items() if path.with_suffix(".len").is_file()]
    _claim(cfg, out, [[path.name, *content_key(path)] for path in paths], [*targets.values(), *lines])
    todo = [path for path in paths if not targets[path].is_file()]
    index = CentroidIndex.build(kmeans.cluster_centers_.to(device))
    total = sum(shard.num_rows for shard in source.shards if shard.path in todo)
    with tqdm(total=total, unit="row", desc="assign", disable=None) as bar:
        for path in todo:
            shard = open_source(path, column=cfg.column)
            labels = np.concatenate(list(_labels(shard, index, device, bar)))
            with atomic_path(targets[path]) as temporary:
                np.save(temporary, labels)
    num_bad, num_rows = 0, 0
    num_rows_of = {shard.path: shard.num_rows for shard in source.shards}
    for path in paths:
        labels = _read_labels(targets[path], num_rows_of[path])
        num_bad, num_rows = num_bad + int((labels < 0).sum()), num_rows + len(labels)
        _write_lines(path.with_suffix(".len"), labels, targets[path].with_suffix(".km"))
    kept = len(paths) - len(todo)
    print(
        f"{out}: {counted(num_rows, 'row')} of {counted(len(paths), 'shard')} ({kept} kept); "
        f"{counted(num_bad, 'row')} not finite, labelled -1"
    )
    return 0


def _labels(source: FeatureSource, index: CentroidIndex, device: str, bar: Any) -> Iterator[np.ndarray]:
    rows = max(1, (1 << 22) // source.num_features)
    for _, block in source.blocks(0, source.num_rows, rows):
        labels = kmeans_assign(block.to(device, index.centroids.dtype), index)
        bar.update(len(block))
        yield torch.as_tensor(labels).cpu().numpy().astype(np.int32)


def _read_labels(path: Path, num_rows: int) -> np.ndarray:
    """The labels of a shard, int32 ``[num_rows]``, of this run or an earlier one. Raises :class:`KMeansError`."""
    with foreign_errors(KMeansError, f"{path} is damaged", "Delete it and run the same command again."):
        labels = np.load(path, mmap_mode="r", allow_pickle=False)  # a damaged header asks for no memory then
        if labels.shape != (num_rows,) or labels.dtype != np.int32:
            raise ValueError(f"expected int32 labels [{num_rows}], got {labels.dtype} {list(labels.shape)}")
        check_npy_size(path, labels)
        return np.array(labels)


def _write_lines(lengths: Path, labels: np.ndarray, target: Path) -> None:
    """Beside ``STEM.npy`` fairseq keeps ``STEM.len``, the frames of each recording: then write its ``.km`` too.

    Raises:
        KMeansError: lengths that do not add up to the shard's rows.
    """
    if not lengths.is_file():
        return
    try:
        counts = [int(line) for line in lengths.read_text("utf-8").split()]
    except (OSError, ValueError) as error:
        raise KMeansError(
            f"{lengths} should hold a number of frames in each line ({error}); write it again."
        ) from None
    if sum(counts) != len(labels) or min(counts, default=0) < 0:
        raise KMeansError(
            f"{lengths} adds up to {counted(sum(counts), 'frame')} but its shard has {counted(len(labels), 'row')}; "
            "write both again."
        )
    with atomic_path(target) as temporary, unit_writer("km", temporary) as write:
        for part in np.split(labels, np.cumsum(counts)[:-1]) if counts else []:
            write("", part)


# ---- recordings --------------------------------------------------------------------------------------------
def _assign_audio(cfg: AssignConfig, out: Path, device: str) -> int:
    assert cfg.audio is not None
    refuse_options(cfg, ["column"], "for feature shards; leave it out, or give --features")
    units = EncoderKMeans.from_kmeans(cfg.kmeans, encoder=cfg.encoder)
    units.prepare()
    utterances = find_audio(cfg.audio)
    _check_ids(utterances, cfg.format)
    target = out / f"units{SUFFIXES[cfg.format]}"
    _claim(cfg, out, recording_rows(utterances), [target, out / PARTS])
    if target.is_file():
        print(f"{target}: these recordings are labelled already")
        return 0
    size = _RECORDINGS_PER_PART
    groups = [utterances[i : i + size] for i in range(0, len(utterances), size)]
    parts = [out / PARTS / f"part-{n:05d}.parquet" for n in range(len(groups))]
    todo = [n for n, part in enumerate(parts) if not part.is_file()]
    total = sum(len(groups[n]) for n in todo)
    job = AudioJob(units.spec, units.centroids_KF.numpy(), device, cfg.resample, cfg.skip_bad)
    with (
        AudioPool(job, num_workers=cfg.num_workers, num_items=total) as pool,
        tqdm(total=total, unit="utt", desc="assign", disable=None) as bar,
    ):
        for number in todo:
            found = []
            for utterance, labels in zip(groups[number], pool(groups[number]), strict=True):
                bar.update()
                found.append((utterance, labels))
            _write_part(parts[number], found)
    return _join(cfg, out, target, parts)


def _check_ids(utterances: Sequence[Utterance], form: str) -> None:
    """An id with a space would become part of the units. Raises :class:`ConfigError`."""
    for u in utterances:
        if form == "text" and (len(u.id.split()) != 1 or u.id.strip() != u.id):
            raise ConfigError(
                f"{u.where}: an id with a space cannot stand in a text file of units; take --format jsonl or rename it."
            )


_SCHEMA = pa.schema([("id", pa.string()), ("units", pa.list_(pa.int32())), ("rejected", pa.string())])


def _write_part(path: Path, found: Sequence[tuple[Utterance, np.ndarray | Rejected]]) -> None:
    columns: dict[str, list[Any]] = {"id": [], "units": [], "rejected": []}
    for utterance, labels in found:
        is_bad = isinstance(labels, Rejected)
        columns["id"].append(utterance.id)
        columns["units"].append(None if is_bad else labels)
        columns["rejected"].append(json.dumps(asdict(labels)) if isinstance(labels, Rejected) else None)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA), temporary, write_page_checksum=True)


def _read_part(path: Path) -> list[tuple[str, list[int] | None, str | None]]:
    """``(id, units, rejected as JSON)`` of each recording of a part. Raises :class:`KMeansError`."""
    with foreign_errors(KMeansError, f"{path} is damaged", "Delete it and run the same command again."):
        table = pq.read_table(path, schema=_SCHEMA, page_checksum_verification=True)
        rows = list(zip(*(table[name].to_pylist() for name in _SCHEMA.names), strict=True))
        for name, units, rejected in rows:
            if rejected is not None:
                check_shape(parse_json(rejected), Rejected)
            elif units is None or None in units or name is None:
                raise ValueError(f"recording {name!r} has no units")
        return rows


def _join(cfg: AssignConfig, out: Path, target: Path, parts: Sequence[Path]) -> int:
    """Put the parts together in the format asked for, and remove them."""
    rejected: list[str] = []
    num_units = num_bad = num_utterances = 0
    with atomic_path(target) as temporary:
        with unit_writer(cfg.format, temporary) as write:
            for part in parts:
                for name, units, bad in _read_part(part):
                    if bad is not None:
                        rejected.append(bad)
                        continue
                    labels = np.asarray(units, np.int32)
                    num_utterances, num_units = num_utterances + 1, num_units + len(labels)
                    num_bad += int((labels < 0).sum())
                    write(name, deduplicated(labels) if cfg.deduplicate else labels)
        if not num_utterances:
            raise KMeansError(
                f"no good one in {counted(len(rejected), 'recording')}, the first: {json.loads(rejected[0])['reason']}"
            )
        if rejected and not cfg.skip_bad:
            raise KMeansError(
                f"{counted(len(rejected), 'recording')} left out under --skip_bad before, the first: "
                f"{json.loads(rejected[0])['reason']} Give --skip_bad again, or choose another output_dir."
            )
    if rejected:
        atomic_write_text(out / REJECTED, "\n".join(rejected) + "\n")
        print(f"{counted(len(rejected), 'bad recording')} left out, see {out / REJECTED}")
    shutil.rmtree(out / PARTS, ignore_errors=True)
    found = f"{counted(num_utterances, 'recording')}, {counted(num_units, 'frame')}"
    print(f"{target}: {found}; {num_bad} not finite, labelled -1")
    return 0


def _claim(cfg: AssignConfig, out: Path, inputs: list[Any], written: Sequence[Path]) -> None:
    """Take the folder for these labels, or find that it is theirs already.

    Args:
        inputs: what tells the inputs apart, as JSON.
        written: what this command will write; none of it may be there before.

    Raises:
        ConfigError: the folder holds something else.
    """
    record = {
        "kmeans": sha256_file(Path(cfg.kmeans) / "kmeans.safetensors"),
        "format": cfg.format if cfg.audio is not None else "npy",
        "deduplicate": cfg.deduplicate,
        "inputs": inputs,
    }
    path = out / RECORD
    if path.is_file():
        shape = {"kmeans": SHA256, "format": str, "deduplicate": bool, "inputs": list}
        found = read_shaped(path, shape, ConfigError, f"choose another output_dir, or delete {out}.")
        different = [name for name in record if found[name] != record[name]]
        if different:
            raise ConfigError(
                f"{out} holds labels of another command: its {different[0]} differs. Choose another output_dir, or "
                "give the same settings to go on with it."
            )
        return
    foreign = next((p for p in written if p.exists()), None)
    if foreign is not None:
        raise ConfigError(
            f"{foreign} is there already and no labels of `speechlm kmeans assign`; choose another output_dir."
        )
    atomic_write_json(path, record)
