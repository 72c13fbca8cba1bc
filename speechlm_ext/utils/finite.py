"""Finite weights: checked before a save replaces good files, and after reading."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from speechlm_ext.errors import SpeechLMError


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number.

    By minimum and maximum, which propagate NaN: one pass at memory speed without extra memory, on the CPU a hundred
    times as fast as ``isfinite().all()``.
    """
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    low, high = tensor.detach().aminmax()
    return math.isfinite(float(low)) and math.isfinite(float(high))


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with values that are not finite, e.g. ``'head.weight' (3 of 640 values, the first is nan)``;
    None if all are finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            bad = ~tensor.detach().isfinite()
            first = tensor.detach()[bad][0].item()
            return f"{name!r} ({int(bad.sum())} of {tensor.numel()} values, the first is {first})"
    return None


def require_finite(tensors: Mapping[str, Tensor], error: type[SpeechLMError], what: str, hint: str) -> None:
    """Refuse tensors with values that are not finite numbers.

    Args:
        tensors: by name.
        error: class of the error.
        what: owner of the tensors; the start of the message.
        hint: consequence and remedy; the end of the message.

    Raises:
        SpeechLMError: of class ``error``.
    """
    found = first_not_finite(tensors)
    if found is not None:
        raise error(f"{what}: {found} is not finite. {hint}")
