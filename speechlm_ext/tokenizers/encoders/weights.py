"""Files of a Hugging Face speech encoder: safetensors only, and every weight must be there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from speechlm_ext.errors import TokenizerError, foreign_errors
from speechlm_ext.utils.files.io import sha256_file
from speechlm_ext.utils.files.json_shape import check_shape, read_shaped
from speechlm_ext.utils.files.json_text import read_json
from speechlm_ext.utils.transformers_config import check_num_layers

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PATTERNS = ["config.json", "preprocessor_config.json", "*.safetensors", INDEX]
#: Used in training only, and missing in many published checkpoints.
_OPTIONAL = {"masked_spec_embed"}


def model_folder(name: str) -> Path:
    """The folder ``name``, else a snapshot of the model of that name from the Hub.

    Raises :class:`TokenizerError`: there is neither, or the folder is incomplete.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        # A name that looks like a path is one; a typo in it must not query the Hub.
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise TokenizerError(
                f"feature encoder: folder {name} does not exist; give a model's folder (config.json, "
                f"preprocessor_config.json, {WEIGHTS}), or a name on the Hub such as facebook/hubert-base-ls960."
            )
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=_PATTERNS))
        except Exception as error:  # the Hub's client raises errors of a dozen libraries
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TokenizerError(
                f"feature encoder: {name} is not a folder and cannot be downloaded from the Hub ({reason}). "
                "Check the name, or copy the model's folder to this machine and give its path."
            ) from None
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise TokenizerError(
                f"feature encoder: {folder} has no {file}; a speech model's folder needs config.json, "
                f"preprocessor_config.json and {WEIGHTS}."
            )
    weight_files(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, in order. Raises :class:`TokenizerError` when there is none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        shape = {"weight_map": dict[str, str], "...": Any}
        index = read_shaped(folder / INDEX, shape, TokenizerError, "copy the model again.")
        names = sorted(set(index["weight_map"].values()))
    except FileNotFoundError:
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        raise TokenizerError(
            f"feature encoder: {folder} has no {WEIGHTS}{f', only {others[0]}' if others else ''}; pickled weights are "
            "not read. Convert them once if you trust them: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW)."
        ) from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise TokenizerError(
            f"feature encoder: {folder} lacks {missing[0] if missing else WEIGHTS}, one of {len(names)} files of "
            "weights; copy the model again."
        )
    return [folder / name for name in names]


def weights_sha256(folder: Path) -> str:
    """sha256 of the weights file; of several files, the sha256 over the lines ``name sha256``."""
    files = weight_files(folder)
    if len(files) == 1:
        return sha256_file(files[0])
    return hashlib.sha256("".join(f"{f.name} {sha256_file(f)}\n" for f in files).encode()).hexdigest()


def load_parts(folder: Path, what: Any) -> tuple[Any, Any, Any]:
    """Config, feature extractor and float32 encoder in evaluation mode, on the CPU.

    Raises :class:`TokenizerError`: a file is damaged, the architecture is unknown, or the file lacks a weight.
    """
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Unused weights are expected where a model with heads is loaded as a base encoder.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = f"feature encoder {what}: the model in {folder} cannot be loaded"
    try:
        with foreign_errors(TokenizerError, where, "Copy its folder again."):
            config, extractor, model, info = _load(folder, what)
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()
    if config.model_type == "whisper":
        model = model.get_encoder()
    if not isinstance(getattr(getattr(model, "encoder", model), "layers", None), torch.nn.ModuleList):
        raise TokenizerError(
            f"feature encoder {what}: models of type {config.model_type!r} are not supported."
        )
    prefix = "encoder." if config.model_type == "whisper" else ""
    missing = sorted(
        key
        for key in info["missing_keys"]
        if key.startswith(prefix) and key.rsplit(".", 1)[-1] not in _OPTIONAL
    )
    if missing or info.get("mismatched_keys"):
        first = missing[0] if missing else sorted(info["mismatched_keys"])[0]
        raise TokenizerError(
            f"feature encoder {what}: the weights in {folder} do not fit its config.json: {first} is missing or of "
            f"another shape ({len(missing)} missing); copy its folder again."
        )
    return config, extractor, model.float().eval().requires_grad_(False)


def _load(folder: Path, what: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    settings = read_json(folder / "config.json", TokenizerError, "copy the model again.", allow_nan=True)
    check_shape(settings, dict, "config.json")
    check_num_layers(settings)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    is_known = config.model_type in ("whisper", "wav2vec2-bert") or hasattr(config, "conv_stride")
    if not is_known:
        raise TokenizerError(
            f"feature encoder {what}: a model of type {config.model_type!r} is not a speech encoder known here; "
            "expected Whisper, wav2vec2-bert, or one with convolutions over the waveform (HuBERT, wav2vec "
            "2.0, WavLM, data2vec-audio, …)."
        )
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
    model, info = AutoModel.from_pretrained(
        folder,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    return config, extractor, model, info
