"""``speechlm kmeans fit``: from recordings or feature shards to an artefact of units, restartable.

The output folder holds ``kmeans.safetensors``, ``kmeans.json`` and ``usage.svg`` at the end, and ``fit.json``, what the
fit is made from, so that another command is refused; until then also ``features/`` (what was computed or sampled) and
``checkpoint/``.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.data.manifest import Rejected, Utterance
from speechlm_ext.errors import ConfigError, KMeansError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.checks import missing_gpu
from speechlm_ext.kmeans.features.sampling import sample_size, sampled_rows, write_sample
from speechlm_ext.kmeans.features.sources import FeatureSource, open_source
from speechlm_ext.kmeans.words import counted, speaks_options
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.tokenizers.encoders.spec import EncoderSpec, FeatureEncoder
from speechlm_ext.units.fit_record import CHECKPOINT, FEATURES, claim, record_of
from speechlm_ext.units.recordings import AudioJob, AudioPool, estimated_frames, find_audio
from speechlm_ext.utils.files.io import atomic_path, atomic_write_json, atomic_write_text, sha256_file
from speechlm_ext.utils.files.json_shape import SHA256, read_shaped
from speechlm_ext.utils.files.json_text import json_line
from speechlm_ext.utils.options import take_old_name

REJECTED = "rejected.jsonl"
PLOT = "usage.svg"
_RECORDINGS_PER_SHARD = 200


@dataclass(frozen=True)
class FitConfig:
    """Fit K-Means units to recordings or to feature shards; stopped, the same command goes on where it was.

    ``speechlm kmeans fit --audio data/manifest.jsonl --encoder hf:facebook/hubert-base-ls960:9 --output_dir units/``,
    or with features that lie on disk already ``speechlm kmeans fit --features dump/ --n_clusters 500 --output_dir
    units/``.
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
    """How the centroids start; for large data k-means++ becomes k-means||."""
    init_size: int | None = None
    """Frames, drawn at random, that the start is chosen from; default all, or three batches (minibatch)."""
    n_local_trials: int | None = None
    """Number of seeding trials in k-means++: so many frames are drawn for each centroid and the best is taken; default
    2 + floor(ln K), 1 is plain k-means++."""
    n_init: int = 1
    """Starts, of which the best is kept."""
    max_iter: int = 100
    """Iterations over the data at most."""
    tol: float = 1e-4
    """Stop when the centroids move less than this share of the features' variance."""
    batch_size: int = 10000
    """Frames of a batch (minibatch)."""
    share: float = 1.0
    """Share of the frames to fit on, drawn evenly over the recordings."""
    max_frames: int | None = None
    """Frames to fit on at most, drawn in the same way."""
    seed: int = 0
    """Seed of the draws."""
    nonfinite: Literal["error", "drop"] = "error"
    """What to do with rows that hold a NaN or an infinity."""
    resample: bool = True
    """Convert recordings of another sampling rate, which is said once; ``false`` makes them bad items."""
    skip_bad: bool = False
    """Go on past bad recordings; they are listed in rejected.jsonl and counted."""
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


@speaks_options
@says_conversions()
def run_fit(cfg: FitConfig) -> int:
    """Fit as ``cfg`` says; see :class:`FitConfig`.

    Raises:
        SpeechLMError: a setting, a recording or a shard that cannot be used; the message names it.
    """
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
    sample_size(1, cfg.share, cfg.max_frames)
    device = resolve_device(cfg.device)
    out = Path(cfg.output_dir)
    spec = None if cfg.encoder is None else EncoderSpec.parse(cfg.encoder, cfg.frames_per_token)
    utterances = find_audio(cfg.audio) if cfg.audio is not None else []
    shards = None if cfg.features is None else open_source(cfg.features, column=cfg.column)
    claim(out, record_of(asdict(cfg), utterances if shards is None else shards))
    if (out / "kmeans.json").is_file():
        KMeans.load(out)  # says so where it is damaged
        print(f"{out}: these units are fitted already; see `speechlm kmeans inspect --kmeans {out}`")
        return 0
    encoder = None if spec is None else build_encoder(spec, device=device)
    info = None if encoder is None else encoder.describe()
    if cfg.audio is not None:
        assert encoder is not None
        source = _from_audio(cfg, out, utterances, encoder, device)
    else:
        assert shards is not None
        source = _from_features(cfg, out, shards)
        if encoder is not None and encoder.num_features != source.num_features:
            raise ConfigError(
                f"--features has {counted(source.num_features, 'feature')} a row but {spec} gives "
                f"{encoder.num_features}; name the encoder and layer that made them."
            )
    kmeans = KMeans(
        cfg.n_clusters,
        init=cfg.init,
        algorithm=cfg.algorithm,
        init_size=cfg.init_size,
        n_local_trials=cfg.n_local_trials,
        n_init=cfg.n_init,
        max_iter=cfg.max_iter,
        tol=cfg.tol,
        batch_size=cfg.batch_size,
        random_state=cfg.seed,
        nonfinite=cfg.nonfinite,
        device=device,
    )
    kmeans.fit(source, checkpoint=out / CHECKPOINT)
    kmeans.save(out, features=info)
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
    if not cfg.keep_features:
        shutil.rmtree(out / FEATURES, ignore_errors=True)
    _report(kmeans, out)
    return 0


def refuse_options(cfg: Any, names: Sequence[str], what_for: str) -> None:
    """Raises :class:`ConfigError`: one of these settings is not at its default, and would be without effect."""
    usual = {field.name: field.default for field in fields(cfg)}
    given = [f"--{name}" for name in names if getattr(cfg, name) != usual[name]]
    if given:
        raise ConfigError(f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} {what_for}.")


def resolve_device(name: str) -> str:
    """``cpu`` or ``cuda[:n]`` for the setting ``device``. Raises :class:`ConfigError`."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"--device must be cpu, cuda or auto, or cuda:N for one of several; got {name!r}.")
    missing = missing_gpu(torch.device(name))
    if missing:
        raise ConfigError(
            f"--device {name} was asked for, but {missing}; see `speechlm doctor`, or take --device cpu."
        )
    return name


# ---- features ----------------------------------------------------------------------------------------------
def _from_features(cfg: FitConfig, out: Path, source: FeatureSource) -> Any:
    """The shards as they are, or a sample of them, written once so that no iteration reads the rest."""
    count = sample_size(source.num_rows, cfg.share, cfg.max_frames)
    if count == source.num_rows:
        return source
    path = out / FEATURES / "sample.npy"
    if not path.is_file():
        with tqdm(total=source.num_rows, unit="row", desc="sample", disable=None) as bar:
            write_sample(source, count, cfg.seed, path, bar.update)
    return open_source(path)


def _from_audio(
    cfg: FitConfig, out: Path, utterances: Sequence[Utterance], encoder: FeatureEncoder, device: str
) -> Any:
    """Features of all recordings, a file for each 200 of them; those that are there already are kept."""
    folder = out / FEATURES
    share = cfg.share
    if cfg.max_frames is not None:
        share = min(share, cfg.max_frames / estimated_frames(utterances, encoder.frame_rate))
    size = _RECORDINGS_PER_SHARD
    groups = [utterances[i : i + size] for i in range(0, len(utterances), size)]
    todo = []
    for n in range(len(groups)):
        done, shard = folder / f"done-{n:05d}.json", folder / f"shard-{n:05d}.npy"
        if not done.is_file():
            todo.append(n)
        elif (sha256 := _read_done(done).get("sha256")) is not None and (
            not shard.is_file() or sha256_file(shard) != sha256
        ):
            raise KMeansError(
                f"{shard} is missing or damaged: it is not what {done.name} was written for. Delete {done.name} and "
                "run the same command again, which makes both."
            )
    total = sum(len(groups[n]) for n in todo)
    job = AudioJob(encoder.spec, device=device, resample=cfg.resample, skip_bad=cfg.skip_bad)
    with (
        AudioPool(job, num_workers=cfg.num_workers, num_items=total) as pool,
        tqdm(total=total, unit="utt", desc="encode", disable=None) as bar,
    ):
        for number in todo:
            parts, rejected, num_seen = [], [], 0
            for utterance, found in zip(groups[number], pool(groups[number]), strict=True):
                bar.update()
                if isinstance(found, Rejected):
                    rejected.append(asdict(found))
                    continue
                # What a recording's share leaves over goes to the next, so that short ones count by their length.
                before, num_seen = num_seen, num_seen + len(found)
                count = math.floor(share * num_seen) - math.floor(share * before)
                rows = sampled_rows(len(found), count, cfg.seed, purpose=f"sample/{utterance.id}")
                parts.append(found[rows])
            sha256 = None
            if any(len(part) for part in parts):
                shard = folder / f"shard-{number:05d}.npy"
                with atomic_path(shard) as temporary:
                    np.save(temporary, np.concatenate(parts))
                sha256 = sha256_file(shard)
            # Written last: the shard before it is whole.
            record = {"rejected": rejected, "sha256": sha256}
            atomic_write_json(folder / f"done-{number:05d}.json", record)
    bad = [row for n in range(len(groups)) for row in _read_done(folder / f"done-{n:05d}.json")["rejected"]]
    if bad and not cfg.skip_bad:
        raise KMeansError(
            f"{counted(len(bad), 'recording')} left out under --skip_bad before, the first: {bad[0]['reason']} Give "
            "--skip_bad again, or choose another output_dir."
        )
    if bad:
        atomic_write_text(out / REJECTED, "".join(map(json_line, bad)))
        print(f"{counted(len(bad), 'bad recording')} left out, see {out / REJECTED}")
    if len(bad) == len(utterances):
        raise KMeansError(f"no good one in {counted(len(bad), 'recording')}, the first: {bad[0]['reason']}")
    if not any(folder.glob("shard-*.npy")):
        raise KMeansError(
            f"no frame of {counted(len(utterances) - len(bad), 'recording')} is left of a share of {share:g}; give a "
            "larger --share or --max_frames, and another output_dir."
        )
    return open_source(folder)


def _read_done(path: Path) -> dict[str, Any]:
    """What is kept of a shard that is done: its bad recordings, and its sha256 unless it has no rows."""
    shape = {"rejected": list[Rejected], "sha256?": SHA256 | None}
    return read_shaped(path, shape, KMeansError, "delete it and run the same command again.")


def _report(kmeans: KMeans, out: Path) -> None:
    from speechlm_ext.units.inspect import describe_units, write_plot

    print("\n".join(describe_units(kmeans, out)))
    if write_plot(kmeans, out / PLOT):
        print(f"plot          {out / PLOT}")
