"""Float16 products on a GPU with float32 sums, whatever torch's process-wide settings allow."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.ops.common.matmul import FIRST_TORCH, GIVES_FLOAT32
from speechlm_ext.ops.common.native import OpError

logger = logging.getLogger("speechlm_ext")

#: Settings of torch.backends.cuda.matmul that allow sums of float16 products in less than float32; a torch without
#: the first (before 2.7) always sums them in float32.
_SETTINGS = ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")

_lock = threading.Lock()
_inside = 0  # callers that are between entry and exit
_before: dict[str, Any] = {}  # the settings that the first of them found


def _get(name: str) -> Any:
    """The setting's value; where it has a second part (torch 2.10 and later), both."""
    matmul = torch.backends.cuda.matmul
    split_k = getattr(matmul, f"{name}_split_k", None)
    value = getattr(matmul, name)
    return value if split_k is None else (value, split_k)


def _off(value: Any) -> Any:
    return (False, *value[1:]) if isinstance(value, tuple) else False


@contextmanager
def float32_sums() -> Iterator[None]:
    """Float16 products that are started inside sum in float32; torch's settings are as before afterwards.

    The settings belong to the process: products of other threads sum in float32 too meanwhile. Callers may overlap, in
    any thread: the last one to leave restores the settings.

    Raises:
        OpError: at the end, if another thread changed a setting meanwhile; its value is kept.
    """
    global _inside
    matmul = torch.backends.cuda.matmul
    with _lock:
        if _inside == 0:
            _before.clear()
            _before.update({name: _get(name) for name in _SETTINGS if hasattr(matmul, name)})
            for name, value in _before.items():
                setattr(matmul, name, _off(value))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            changed = [name for name, value in _before.items() if _get(name) != _off(value)]
            if _inside == 0:
                for name, value in _before.items():
                    if name not in changed:
                        setattr(matmul, name, value)
    if changed:
        raise OpError(
            f"torch.backends.cuda.matmul.{changed[0]} was changed by another thread while products ran that must sum "
            f"in float32; change it before or after, and repeat the call"
        )


@functools.cache
def has_half_products() -> bool:
    """Whether torch multiplies float16 matrices with float32 sums on a GPU; where it does not, that is logged once."""
    if not GIVES_FLOAT32:
        logger.warning(
            "kmeans_assign: torch %s has no product of float16 matrices summed in float32 (aten::mm.dtype_out), so "
            "float32 matrices are multiplied: the same labels, several times slower. Install torch %s or later.",
            torch.__version__,
            FIRST_TORCH,
        )
    return GIVES_FLOAT32


def multiply_float16(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a bᵀ`` of float16 matrices with a float32 ``out``, inside `float32_sums`.

    Through float32 matrices where torch has no such product: TF32 would change nothing there, as its 11 bits hold a
    float16.
    """
    if out.is_cuda and has_half_products():
        torch.ops.aten.mm.dtype_out(a, b.T, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float().T, out=out)
