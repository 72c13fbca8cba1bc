"""Modules and names that have moved: imports by the old name still work, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

#: Old module -> where its names are now.
MODULES = {
    "audio_length": ["audio.length"],
    "data.encode": ["data.tokenize.shards"],
    "data.fit": ["data.tokenize.fit", "data.tokenize.settings", "data.recordings"],
    "data.pack": ["data.batch"],
    "data.packing": ["data.plan.bin_packing"],
    "data.shards": ["data.tokens.format", "data.tokens.folder", "data.tokens.index"],
    "evaluation.judge": ["evaluation.asr.scorer"],
    "evaluation.run": ["evaluation.evaluate", "evaluation.config"],
    "generation.cli": ["generation.commands.generate"],
    "generation.prompt": ["generation.requests.prompt", "generation.requests.encode_fields"],
    "generation.records": ["generation.requests.results_folder"],
    "generation.request": ["generation.requests.request"],
    "generation.request_file": ["generation.requests.request_file"],
    "generation.run": ["generation.generate"],
    "generation.settings": ["generation.requests.settings"],
    "generation.stream": ["generation.live.stream"],
    "kmeans.audio": ["units.recordings", "data.recordings"],
    "kmeans.convert": ["importers.kmeans_centroids"],
    "kmeans.sources": ["kmeans.features.sources"],
    "model.speechlm": ["model.lm", "model.backbone.body", "speechlm"],
    "utils.io": ["utils.files.io"],
    "wav_stream": ["audio.wav_stream"],
}
#: Old name in a module -> its place now.
NAMES = {
    ("evaluation.judge", "load_judge"): ("evaluation.asr.scorer", "load_asr_scorer"),
    ("evaluation.judge", "JudgeUnavailable"): ("evaluation.asr.scorer", "AsrUnavailable"),
    ("model", "SpeechLM"): ("speechlm", "SpeechLM"),
}
_PACKAGE = "speechlm_ext."


def moved_name(module: str, name: str) -> Any:
    """A name that is no longer in ``module``; for a module's ``__getattr__``. Raises ``AttributeError``."""
    place = NAMES.get((module.removeprefix(_PACKAGE), name))
    if place is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", [".".join(place)])
    return getattr(importlib.import_module(_PACKAGE + place[0]), place[1])


def _warn(old: str, places: Sequence[str]) -> None:
    now = ", ".join(_PACKAGE + place for place in places)
    warnings.warn(f"{old} has moved to {now}; the old name will go.", DeprecationWarning, stacklevel=3)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes after all others, so it sees only names that no file has."""

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix(_PACKAGE) in MODULES and fullname.startswith(_PACKAGE):
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(_PACKAGE)
        _warn(module.__name__, MODULES[old])
        for place in MODULES[old]:
            found = vars(importlib.import_module(_PACKAGE + place))
            vars(module).update({k: v for k, v in found.items() if not k.startswith("__")})
        for (of, name), (room, now) in NAMES.items():
            if of == old:
                setattr(module, name, getattr(importlib.import_module(_PACKAGE + room), now))


def install() -> None:
    """Make old module names importable, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
