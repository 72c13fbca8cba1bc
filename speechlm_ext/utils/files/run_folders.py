"""File names of a model folder, and resolving a path to a model folder or to a run's newest checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

from speechlm_ext.errors import CheckpointError
from speechlm_ext.utils.files.checkpoint_folders import LATEST, resolve_latest, step_folders

logger = logging.getLogger("speechlm_ext")
CHECKPOINTS = "checkpoints"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
LAYOUT_NAME = "token_layout.json"
TOKENIZERS_NAME = "tokenizers"
#: The files of a model folder, besides the tokenizers' and the digests.
MODEL_FILES = (CONFIG_NAME, WEIGHTS_NAME, LAYOUT_NAME)


def find_model_folder(path: str | Path) -> Path:
    """Resolve ``path`` to a model folder.

    A model folder (checkpoint, export) is returned unchanged. A run folder (``runs/NAME``), its ``checkpoints/`` and a
    broken link ``checkpoints/latest`` resolve to the run's newest complete checkpoint, which is logged. A text file
    ``latest``, on file systems without links, resolves to the folder that it names. Any other path is returned,
    for the reader's own errors.

    Raises:
        CheckpointError: a run without a complete checkpoint.
    """
    path = Path(path)
    if (path / CONFIG_NAME).is_file():
        return path
    if path.name == LATEST and not path.is_dir():
        root = path.parent
        named = resolve_latest(path)
        if (named / CONFIG_NAME).is_file():
            return named
    elif (path / CHECKPOINTS).is_dir():
        root = path / CHECKPOINTS
    else:
        root = path
    steps = step_folders(root)
    if not steps:
        if (root / LATEST / CONFIG_NAME).is_file():  # a copy that followed links, of that alone
            return root / LATEST
        if root.name != CHECKPOINTS or not root.is_dir():
            return path
        raise CheckpointError(
            f"{path}: the run has no checkpoint yet; train it first, or name a model folder."
        )
    for folder in reversed(steps):
        missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
        if not missing:
            logger.info("%s: taking the newest checkpoint, %s", path, folder)
            return folder
        logger.warning("%s is incomplete (no %s) and passed over", folder, ", ".join(missing))
    raise CheckpointError(f"{path}: none of the run's {len(steps)} checkpoints is complete; train it again.")
