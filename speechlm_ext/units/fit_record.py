"""``fit.json``: what the fit in a folder is made from, so that another command does not go on with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechlm_ext.data.manifest import Utterance
from speechlm_ext.errors import ConfigError
from speechlm_ext.kmeans.features.shards import content_key
from speechlm_ext.kmeans.features.sources import FeatureSource, ShardSource
from speechlm_ext.units.recordings import recording_rows
from speechlm_ext.utils.files.io import atomic_write_json
from speechlm_ext.utils.files.json_shape import read_shaped
from speechlm_ext.utils.hashing import sha256_json

RECORD = "fit.json"
FEATURES = "features"
CHECKPOINT = "checkpoint"
#: Settings that features do not depend on: free until the first iteration.
_OF_KMEANS = (
    "n_clusters", "algorithm", "init", "init_size", "n_local_trials", "n_init", "max_iter", "tol", "batch_size",
    "nonfinite")  # fmt: skip
#: Keys of what the files hold; all others are settings.
_CONTENTS = {"recordings": "--audio", "shards": "--features"}


def record_of(settings: dict[str, Any], inputs: Sequence[Utterance] | FeatureSource) -> dict[str, Any]:
    """Everything that decides the result, as JSON.

    Args:
        settings: of the command.
        inputs: the recordings or shards that the settings name; what tells their contents apart is recorded.
    """
    settings = dict(settings)
    for name in ("output_dir", "output", "device", "num_workers", "keep_features", "skip_bad"):
        del settings[name]
    if isinstance(inputs, ShardSource):
        settings["shards"] = sha256_json([[s.path.name, *content_key(s.path)] for s in inputs.shards])
    elif isinstance(inputs, Sequence):
        settings["recordings"] = sha256_json(recording_rows(inputs))
    return _plain_paths(settings)


def claim(out: Path, record: dict[str, Any]) -> None:
    """Take the folder for this fit, or find that it is this fit's already. Raises :class:`ConfigError`."""
    path = out / RECORD
    if path.is_file():
        way_out = f"choose another output_dir, or delete {out}."
        paths = str | list[str] | None
        shape = {"settings": {"audio?": paths, "features?": paths, "...": Any}}
        found = _plain_paths(read_shaped(path, shape, ConfigError, way_out)["settings"])
        names = sorted(set(found) | set(record))
        is_begun = (out / CHECKPOINT).exists() or (out / "kmeans.json").is_file()
        has_features = (out / FEATURES).exists()
        for name in names:
            is_free = not is_begun and (name in _OF_KMEANS or not has_features)
            if found.get(name) == record.get(name) or is_free:
                continue
            if name in _CONTENTS:  # the settings that name the files come before it and are equal
                raise ConfigError(
                    f"{out} holds a fit on other {name}: files of {_CONTENTS[name]} have come, gone or changed since. "
                    f"Choose another output_dir or delete {out} to fit what is there now, or put the files back."
                )
            raise ConfigError(
                f"{out} holds a fit with {name} {repr(found.get(name))[:80]}, not {record.get(name)!r}. Choose another "
                "output_dir, or give the same settings to go on with it."
            )
    else:
        # These are written into and removed at the end: they must not be someone else's.
        for name in ("kmeans.json", FEATURES, CHECKPOINT):
            if (out / name).exists():
                raise ConfigError(
                    f"{out} holds a {name} that another command wrote and this fit would write to; choose another "
                    "output_dir."
                )
    atomic_write_json(path, {"settings": record})


def _plain_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """``feats/``, ``./feats`` and a list of ``feats`` alone are one setting."""
    plain = dict(settings)
    for name in ("audio", "features"):
        value = plain.get(name)
        if value is not None:
            paths = [str(Path(p)) for p in ([value] if isinstance(value, str) else value)]
            plain[name] = paths[0] if len(paths) == 1 else paths
    return plain
