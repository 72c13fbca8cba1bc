"""The device that a setting names."""

from __future__ import annotations

import re
from typing import Any

import torch

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.utils.text import counted


def resolve_device(device: Any, error: type[SpeechLMError]) -> torch.device:
    """The device of a setting: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU where there is one.

    Args:
        device: a string or a ``torch.device``.
        error: class of the error raised.

    Raises:
        SpeechLMError: of class ``error``: another device, or a GPU that this machine does not have.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", str(device)) is None:
        raise error(f"device must be cpu, cuda, cuda:N or auto, got {device!r}.", argument="device")
    if str(device) == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    # A device is returned itself: scikit-learn's clone compares arguments by identity.
    found = device if isinstance(device, torch.device) else torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= num_gpus:
        available = f"only {counted(num_gpus, 'GPU')}, counted from 0" if num_gpus else "no GPU"
        raise error(
            f"device {found} is not available: torch finds {available}. See `speechlm doctor`, or use cpu.",
            argument="device",
        )
    return found
