"""``speechlm kmeans fit``: from recordings or feature shards to an artifact of units, restartable.

The output folder holds ``kmeans.safetensors``, ``kmeans.json`` and ``usage.svg`` at the end, and ``fit.json``, the
settings and input of the fit, so that another command is refused; until then also ``features/`` (computed or sampled)
and ``checkpoint/``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.data.manifest import Rejected, Utterance
from speechlm_ext.data.recordings import RecordingPool, find_audio
from speechlm_ext.errors import ConfigError, KMeansError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.counter_rng import sampled_rows
from speechlm_ext.kmeans.features.sources import FeatureSource, ShardSource, open_source
from speechlm_ext.kmeans.fit.scan import default_block_rows
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.tokenizers.encoders.spec import EncoderSpec, FeatureEncoder
from speechlm_ext.units.inspect import PLOT, describe_units, write_plot
from speechlm_ext.units.output_folder import (
    check_owner,
    recording_keys,
    shard_keys,
    write_rejected,
)
from speechlm_ext.units.recordings import FrameEncoder, estimated_frames, num_processes
from speechlm_ext.utils.device import resolve_device
from speechlm_ext.utils.files.io import atomic_path, atomic_write_json, sha256_file, sha256_json
from speechlm_ext.utils.files.json_shape import SHA256, read_shaped
from speechlm_ext.utils.options import refuse_options, take_old_name
from speechlm_ext.utils.text import counted

RECORD, FEATURES, CHECKPOINT = "fit.json", "features", "checkpoint"
_RECORDINGS_PER_SHARD = 200
#: Settings that features do not depend on: free until the first iteration.
_OF_KMEANS = (
    "n_clusters", "algorithm", "init", "init_size", "n_local_trials", "n_init", "max_iter", "tol", "batch_size",
    "nonfinite")  # fmt: skip
#: Settings without effect on the result.
_WITHOUT_EFFECT = ("output_dir", "output", "device", "num_workers", "keep_features", "skip_bad")


@dataclass(frozen=True)
class FitConfig:
    """Fit K-Means units to recordings or to feature shards; if interrupted, rerun the same command to resume.

    ``speechlm kmeans fit --audio data/manifest.jsonl --encoder hf:facebook/hubert-base-ls960:9 --output_dir units/``,
    or with features on disk ``speechlm kmeans fit --features dump/ --n_clusters 500 --output_dir units/``.
    """

    output_dir: str = ""
    """Folder to write: kmeans.safetensors, kmeans.json, usage.svg; needed."""
    audio: str | None = None
    """Recordings: a folder (wav, flac, ogg, mp3, g722) or a manifest.jsonl."""
    features: list[str] | str | None = None
    """Feature shards instead of recordings: .npy or .parquet files, or their folder."""
    encoder: str | None = None
    """``mfcc``, ``log-mel`` or ``hf:FOLDER_OR_HUB_NAME:LAYER``; with --features only recorded, so that recordings can
    be labelled later."""
    frames_per_token: int = 1
    """Frames of the encoder averaged to one."""
    column: str = "features"
    """Column of Parquet shards."""
    n_clusters: int = 500
    """Units, K."""
    algorithm: Literal["lloyd", "minibatch"] = "lloyd"
    """Exact iterations over all frames, or steps over batches of them."""
    init: Literal["k-means++", "random"] = "k-means++"
    """Initial centroids; for large data k-means++ becomes k-means||."""
    init_size: int | None = None
    """Frames, drawn at random, that the start is chosen from; default all, or three batches (minibatch)."""
    n_local_trials: int | None = None
    """Seeding trials in k-means++: frames drawn for each centroid, of which the best is taken; default
    2 + floor(ln K), 1 is plain k-means++."""
    n_init: int = 1
    """Number of starts; the best fit is kept."""
    max_iter: int = 100
    """Maximum number of passes over the data."""
    tol: float = 1e-4
    """Stop when the centroids move less than this share of the features' variance."""
    batch_size: int = 10000
    """Frames of a batch (minibatch)."""
    share: float = 1.0
    """Share of the frames to fit on, drawn evenly over the recordings."""
    max_frames: int | None = None
    """Maximum number of frames to fit on, drawn in the same way."""
    seed: int = 0
    """Seed of the draws."""
    nonfinite: Literal["error", "drop"] = "error"
    """Rows with a NaN or an infinity are an error, or dropped."""
    resample: bool = True
    """Convert recordings of another sampling rate, with one message; ``false`` rejects them."""
    skip_bad: bool = False
    """Skip bad recordings; they are listed in rejected.jsonl and counted."""
    device: str = "auto"
    """Where encoder and K-Means run: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one."""
    num_workers: int | None = None
    """Processes that encode recordings on the CPU; default one per core."""
    keep_features: bool = False
    """Keep the features computed from recordings, in the folder features/."""
    output: str | None = None
    """Old name of ``output_dir``."""

    def __post_init__(self) -> None:
        take_old_name(self, "output", "output_dir", needed="the folder to write")


@says_conversions()
def run_fit(cfg: FitConfig) -> int:
    """The exit code of a fit. Raises :class:`SpeechLMError`: an unusable setting, recording or shard."""
    _check_options(cfg)
    device = resolve_device(cfg.device, ConfigError)
    out = Path(cfg.output_dir)
    spec = None if cfg.encoder is None else EncoderSpec.parse(cfg.encoder, cfg.frames_per_token)
    utterances = find_audio(cfg.audio) if cfg.audio is not None else []
    shards = None if cfg.features is None else open_source(cfg.features, column=cfg.column)
    _claim(cfg, out, utterances, shards)
    if (out / "kmeans.json").is_file():
        KMeans.load(out)  # refuses a damaged one
        print(f"{out}: these units are fitted already; see `speechlm kmeans inspect --kmeans {out}`")
        return 0
    encoder = None if spec is None else build_encoder(spec, device=device)
    if shards is None:
        assert encoder is not None
        source = _encode_recordings(cfg, out, utterances, encoder, device)
    else:
        source = _sample_shards(cfg, out, shards)
        if encoder is not None and encoder.num_features != source.num_features:
            raise ConfigError(
                f"--features has {counted(source.num_features, 'feature')} a row but {spec} gives "
                f"{encoder.num_features}; name the encoder and layer that made them."
            )
    features = None if encoder is None else encoder.describe()
    kmeans = KMeans(random_state=cfg.seed, device=device, **{name: getattr(cfg, name) for name in _OF_KMEANS})
    kmeans.fit(source, checkpoint=out / CHECKPOINT)
    kmeans.save(out, features=features)
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
    if not cfg.keep_features:
        shutil.rmtree(out / FEATURES, ignore_errors=True)
    print("\n".join(describe_units(kmeans, out)))
    write_plot(kmeans, out / PLOT)
    return 0


def _check_options(cfg: FitConfig) -> None:
    """Raises :class:`ConfigError`: options that exclude each other, are missing, or would have no effect."""
    if (cfg.audio is None) == (cfg.features is None):
        raise ConfigError("give either --audio (recordings) or --features (shards), and not both.")
    if cfg.audio is not None and cfg.encoder is None:
        raise ConfigError(
            "--audio needs --encoder: mfcc, log-mel, or hf:FOLDER_OR_HUB_NAME:LAYER such as "
            "hf:facebook/hubert-base-ls960:9."
        )
    if cfg.audio is not None:
        refuse_options(cfg, ["column"], "for feature shards; leave it out, or give --features")
    else:
        of_recordings = ["resample", "skip_bad", *(["frames_per_token"] if cfg.encoder is None else [])]
        refuse_options(cfg, of_recordings, "for recordings; leave it out, or give --audio")
    if not 0 < cfg.share <= 1:
        raise ConfigError(
            f"share must be in (0, 1], got {cfg.share:g}; 0.1 keeps about every tenth frame.",
            argument="share",
        )
    if cfg.max_frames is not None and cfg.max_frames < 1:
        raise ConfigError(f"max_frames must be at least 1, got {cfg.max_frames}.", argument="max_frames")


def _claim(cfg: FitConfig, out: Path, utterances: Sequence[Utterance], shards: FeatureSource | None) -> None:
    """Record settings and input of the fit in its folder. Raises :class:`ConfigError`: it holds something else."""
    record = {name: value for name, value in asdict(cfg).items() if name not in _WITHOUT_EFFECT}
    record = _with_plain_paths(record)
    if shards is None:
        record["recordings"] = sha256_json(recording_keys(utterances))
    else:
        assert isinstance(shards, ShardSource)
        record["shards"] = sha256_json(shard_keys(shards.paths))
    path, found = out / RECORD, None
    free: Sequence[str] = ()
    if path.is_file():
        names = str | list[str] | None
        shape = {"settings": {"audio?": names, "features?": names, "...": Any}}
        content = read_shaped(path, shape, ConfigError, f"choose another output_dir, or delete {out}.")
        found = _with_plain_paths(content["settings"])
        if not (out / CHECKPOINT).exists() and not (out / "kmeans.json").is_file():
            free = _OF_KMEANS if (out / FEATURES).exists() else [*found, *record]
    contents = {"recordings": "--audio", "shards": "--features"}
    written = [out / name for name in ("kmeans.json", FEATURES, CHECKPOINT)]
    check_owner(out, found, record, contents=contents, written=written, free=free)
    atomic_write_json(path, {"settings": record})


def _with_plain_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy in which ``feats/``, ``./feats`` and a list of ``feats`` alone are one setting."""
    plain = dict(settings)
    for name in ("audio", "features"):
        value = plain.get(name)
        if value is not None:
            paths = [str(Path(p)) for p in ([value] if isinstance(value, str) else value)]
            plain[name] = paths[0] if len(paths) == 1 else paths
    return plain


# ---- features ----------------------------------------------------------------------------------------------
def _sample_shards(cfg: FitConfig, out: Path, source: FeatureSource) -> FeatureSource:
    """The shards as they are, or a sample of them, written once so that no iteration reads the rest."""
    num_rows, width = source.num_rows, source.num_features
    num_samples = min(max(1, round(cfg.share * num_rows)), cfg.max_frames or num_rows)
    if num_samples == num_rows:
        return source
    path = out / FEATURES / "sample.npy"
    if path.is_file():
        return open_source(path)
    dtype = np.float64 if source.dtype == torch.float64 else np.float32
    bar = tqdm(total=num_rows, unit="row", desc="sample", disable=None)
    with bar, atomic_path(path) as temporary:
        sample_MF = np.lib.format.open_memmap(temporary, "w+", dtype, (num_samples, width))
        num_written = 0
        for first, block in source.blocks(0, num_rows, default_block_rows(width)):
            rows = sampled_rows(num_rows, num_samples, cfg.seed, start=first, end=first + len(block))
            sample_MF[num_written : num_written + len(rows)] = block.numpy()[rows - first]
            num_written += len(rows)
            bar.update(len(block))
        assert num_written == num_samples
        sample_MF.flush()
    return open_source(path)


def _encode_recordings(
    cfg: FitConfig, out: Path, utterances: Sequence[Utterance], encoder: FeatureEncoder, device: torch.device
) -> FeatureSource:
    """Features of all recordings, one file for 200 of them; existing files are kept."""
    folder = out / FEATURES
    share = cfg.share
    if cfg.max_frames is not None:
        share = min(share, cfg.max_frames / estimated_frames(utterances, encoder.frame_rate))
    size = _RECORDINGS_PER_SHARD
    groups = [utterances[i : i + size] for i in range(0, len(utterances), size)]
    shards = [folder / f"shard-{number:05d}.npy" for number in range(len(groups))]
    todo = [(shard, group) for shard, group in zip(shards, groups, strict=True) if not _is_done(shard)]
    total = sum(len(group) for _, group in todo)
    pool = RecordingPool(
        partial(FrameEncoder, encoder.spec, None, device, cfg.resample),
        skip_bad=cfg.skip_bad,
        num_workers=num_processes(cfg.num_workers, device),
        num_items=total,
    )
    with pool, tqdm(total=total, unit="utt", desc="encode", disable=None) as bar:
        for shard, group in todo:
            parts, rejected, num_frames = [], [], 0
            for utterance, features in zip(group, pool(group), strict=True):
                bar.update()
                if isinstance(features, Rejected):
                    rejected.append(asdict(features))
                    continue
                # The fraction of a frame left over by a recording's share is added to the next one's.
                num_before, num_frames = num_frames, num_frames + len(features)
                num_samples = math.floor(share * num_frames) - math.floor(share * num_before)
                purpose = f"sample/{utterance.id}"
                parts.append(features[sampled_rows(len(features), num_samples, cfg.seed, purpose=purpose)])
            has_rows = any(len(part) for part in parts)
            if has_rows:
                with atomic_path(shard) as temporary:
                    np.save(temporary, np.concatenate(parts))
            record = {"rejected": rejected, "sha256": sha256_file(shard) if has_rows else None}
            atomic_write_json(_done(shard), record)  # last: the shard is complete
    records = [_read_done(_done(shard)) for shard in shards]
    all_rejected = [Rejected(**item) for record in records for item in record["rejected"]]
    write_rejected(out, all_rejected, len(utterances), cfg.skip_bad)
    if not any(folder.glob("shard-*.npy")):
        raise KMeansError(
            f"no frame of {counted(len(utterances) - len(all_rejected), 'recording')} is left of a share of {share:g}; "
            "give a larger --share or --max_frames, and another output_dir."
        )
    return open_source(folder)


def _done(shard: Path) -> Path:
    return shard.with_name(f"done-{shard.stem.removeprefix('shard-')}.json")


def _is_done(shard: Path) -> bool:
    """Whether a shard is complete. Raises :class:`KMeansError`: it was damaged since."""
    done = _done(shard)
    if not done.is_file():
        return False
    sha256 = _read_done(done).get("sha256")
    if sha256 is not None and (not shard.is_file() or sha256_file(shard) != sha256):
        raise KMeansError(
            f"{shard} is missing or damaged: it is not the file that {done.name} describes. Delete {done.name} and run "
            "the same command again, which makes both."
        )
    return True


def _read_done(path: Path) -> dict[str, Any]:
    """Record of a complete shard: its rejected recordings, and its sha256 unless it has no rows."""
    shape = {"rejected": list[Rejected], "sha256?": SHA256 | None}
    return read_shaped(path, shape, KMeansError, "delete it and run the same command again.")
