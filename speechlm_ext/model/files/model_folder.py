"""Saves a model to a folder and loads it strictly: exactly the model's weights, all finite."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

from speechlm_ext.errors import CheckpointError, file_errors
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.config import ModelConfig
from speechlm_ext.model.files.digests import verify_digests, write_digests
from speechlm_ext.model.files.weights import check_sizes, read_tensors
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.utils.files.io import atomic_path, atomic_write_json
from speechlm_ext.utils.files.run_folders import CONFIG_NAME, MODEL_FILES, TOKENIZERS_NAME, WEIGHTS_NAME
from speechlm_ext.utils.finite import require_finite

Model = TypeVar("Model", bound=SpeechLMModel)


def save_model(model: SpeechLMModel, folder: str | Path) -> None:
    """Write a model folder: ``config.json``, ``model.safetensors``, ``token_layout.json``, ``tokenizers/``,
    ``digests.json``.

    Raises:
        CheckpointError: a weight is not finite; the folder is unchanged.
        StorageError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    require_finite(state, CheckpointError, f"the model was not saved to {folder}", "Nothing was written.")
    if model.config.tie_head:
        state.pop("head.weight")
    write_model_files(model, state, folder)
    write_digests(folder, MODEL_FILES, () if model.tokenizers is None else (TOKENIZERS_NAME,))


def write_model_files(model: SpeechLMModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the files of a model folder without their digests. Raises :class:`StorageError`."""
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        # One entry: safetensors writes several in any order, and files of equal weights would differ.
        save_file(weights, temporary, metadata={"format": "pt"})
    model.layout.save(folder)
    if model.tokenizers is not None:
        model.tokenizers.save(folder / TOKENIZERS_NAME)
    atomic_write_json(folder / CONFIG_NAME, model.config.to_dict())


def load_model(
    folder: str | Path, kind: type[Model], device: torch.device | str = "cpu", *, verify: bool = True
) -> Model:
    """Load a model folder, in eval mode.

    Args:
        folder: a checkpoint or an export.
        kind: class of the model.
        device: where the model goes.
        verify: compare its files with their digests, and see that every weight is finite.

    Raises:
        CheckpointError: not a model folder, or one of its files is missing or damaged, or its weights are of
            another shape or not finite.
        LayoutError, LayoutMismatchError: its layout is damaged or is not the one of its tokenizers.
    """
    from speechlm_ext.tokenizers import TokenizerSet

    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"model folder {folder} {problem}. Give a checkpoint (runs/NAME/checkpoints/step-…) or an export."
        )
    if verify:
        verify_digests(folder, MODEL_FILES, (TOKENIZERS_NAME,))
    config, layout = ModelConfig.load(folder), TokenLayout.load(folder)
    tokenizers = None
    if (folder / TOKENIZERS_NAME).is_dir():
        tokenizers = TokenizerSet.load(folder / TOKENIZERS_NAME)
        fingerprints = dict(layout.tokenizers)
        for modality, found in tokenizers.fingerprints().items():
            if fingerprints.get(modality) != found:
                raise CheckpointError(
                    f"{folder}: its {modality} tokenizer has fingerprint {found[:16]}, its token layout names "
                    f"{str(fingerprints.get(modality))[:16]}. The folder was put together from two models."
                )
    weights = folder / WEIGHTS_NAME
    check_sizes(weights, config.backbone)
    with file_errors(
        CheckpointError, folder / CONFIG_NAME, "does not make a model", "Copy the folder again."
    ):
        model = kind(config, layout, tokenizers)
    check_revision(model, folder)
    state = read_tensors(weights, "copy it again.")
    if verify:
        hint = "Its training had diverged when it was saved: use an older checkpoint."
        require_finite(state, CheckpointError, f"{weights} cannot be used", hint)
    if config.tie_head and "embedding.weight" in state:
        state["head.weight"] = state["embedding.weight"]
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        words = " ".join(str(error).split())[:600]
        raise CheckpointError(f"{weights} does not fit {folder / CONFIG_NAME}: {words}") from None
    return model.to(device).eval()


def check_revision(model: SpeechLMModel, folder: str | Path) -> None:
    """Raise :class:`CheckpointError` for weights of a release before revision 2 whose backbone has a part that was
    left out then: they were trained on another computation."""
    config, transforms = model.config, model.transforms
    if config.revision >= 2 or (transforms.is_plain and not model.attention_rules):
        return
    found = ", ".join([*model.attention_rules, *([] if transforms.is_plain else [str(transforms)])])
    raise CheckpointError(
        f"{folder} was trained by a release that left out parts of backbone {config.backbone['model_type']!r} "
        f"({found}), so its weights belong to another model. Start again from the pretrained backbone."
    )
