"""The compiled module ``speechlm_ext._C``, and errors, messages and conversions that all ops share.

torch is imported first, so that ``_C`` finds torch's own OpenMP runtime and uses its threads; ``_C`` itself links
none. There is no silent fallback: without the compiled module, or with one of another version, importing the ops fails
and says how to build it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from speechlm_ext import __version__
from speechlm_ext.errors import SpeechLMError

try:
    from speechlm_ext import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "speechlm_ext's compiled module (speechlm_ext._C) cannot be loaded: "
        f"{error}. Build it with `pip install .` (or `pip install -e .`) in the source folder; it needs a C++17 "
        "compiler and nothing else."
    ) from error

native: Any = _C


def check_version(built: str | None) -> None:
    """Raise ImportError unless the compiled module was built from this version, whose functions its callers expect."""
    if built != __version__:
        raise ImportError(
            f"speechlm_ext is {__version__}, but its compiled module {native.__file__} was built from "
            f"{built or 'an earlier version'}. Rebuild it: `pip install --no-build-isolation -e .` in the source "
            "folder (`make build`), or install one wheel: `pip install --force-reinstall --no-deps speechlm_ext`."
        )


check_version(native.build_info().get("version"))


def _find_openmp() -> str:
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return str(native.use_openmp_of(path))
    return ""


#: The OpenMP runtime shared with torch; "" if the CPU kernels run on one thread.
OPENMP_RUNTIME = _find_openmp()

#: The torch.library namespace of all ops.
LIBRARY = torch.library.Library("speechlm_ext", "DEF")


FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)


class OpError(SpeechLMError):
    """Tensors or settings that an op does not accept."""


class OpIndexError(OpError, IndexError):
    """An id or a position out of range."""


def describe(value: object) -> str:
    """``int32 [812, 9] on cuda:0`` for a tensor, the type's name for anything else."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def partition_hint(parameter: Tensor) -> str:
    """A hint that a one-dimensional weight may be partitioned; "" for any other."""
    if parameter.dim() != 1:
        return ""
    return " (a parameter that ZeRO-3 has partitioned? Call this inside its module's forward)"


def int_list(values: Sequence[int] | Tensor, name: str, length: int | None = None) -> list[int]:
    """``values`` as a list of ints, ``length`` of them unless None; ``name`` is for messages."""
    try:
        out = [operator.index(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
    except TypeError:
        raise OpError(f"{name} must be a list of integers; got {values}") from None
    if length is not None and len(out) != length:
        raise OpError(f"{name} must have {length} values, one per stream; got {len(out)}")
    return out


def float_list(values: Sequence[float], name: str, length: int) -> list[float]:
    """``values`` as a list of floats, ``length`` of them."""
    out = [float(v) for v in values]
    if len(out) != length:
        raise OpError(f"{name} must have {length} values, one per stream; got {len(out)}")
    return out


def call_kernel(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """What a kernel returns; an argument that it refuses, or a GPU or driver that cannot run it, is an `OpError`."""
    try:
        return kernel(*arguments)
    except ValueError as error:
        raise OpError(str(error)) from None


def stream_handle(tensor: Tensor) -> int:
    """The current CUDA stream of the tensor's device as an integer; 0 on the CPU."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0
