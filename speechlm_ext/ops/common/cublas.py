"""Products of 16-bit matrices that are summed in float32, and added to float32 where wanted, by torch's own cuBLAS.

torch's operators for them differ from version to version (none before 2.8, no sum in place before 2.12), and settings
of the process decide how some of them sum. A direct call of the library has neither: it asks for sums in float32.

cuBLAS is used only after it has multiplied a few small matrices right on the device: this is the sole wait for the GPU,
at the first product of each device. Where it is not found or not right, the log says so once and callers take torch's
operators.
"""

from __future__ import annotations

import logging
import os
import threading

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import call_kernel, native, stream_handle

logger = logging.getLogger("speechlm_ext")

_lock = threading.Lock()
_is_right: dict[tuple[str, str], bool] = {}  # library and device -> what the check found


def _find_library() -> str:
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    return str(native.use_cublas_of(os.path.join(folder, "libtorch_cuda.so")))


_find_library()


def blas_handle(tensor: Tensor) -> int:
    """torch's cuBLAS handle for this thread and the tensor's device, on its current stream; 0 on the CPU."""
    if not tensor.is_cuda:
        return 0
    if tensor.device.index == torch.cuda.current_device():
        return int(torch.cuda.current_blas_handle())
    with torch.cuda.device(tensor.device):
        return int(torch.cuda.current_blas_handle())


def has_cublas(tensor: Tensor) -> bool:
    """Whether `product` works on the device of ``tensor``; the first call there multiplies, and waits for the GPU."""
    library = str(native.cublas_library())
    key = (library, str(tensor.device))
    if key not in _is_right:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # a captured graph must not wait; the next call checks
        with _lock:
            if key not in _is_right:
                fault = _fault(library, tensor)
                if fault:
                    logger.warning("%s: its products on %s are torch's operators", fault, tensor.device)
                _is_right[key] = not fault
    return _is_right[key]


def _fault(library: str, tensor: Tensor) -> str:
    """What is wrong with cuBLAS on the device of ``tensor``; "" for nothing."""
    if not library:
        return "speechlm_ext found no cuBLAS among torch's libraries"
    try:
        if all(_multiplies(tensor, dtype) for dtype in (torch.float16, torch.bfloat16)):
            return ""
        return f"{library} does not multiply as expected"
    except (ValueError, RuntimeError) as error:
        return f"{library} cannot be called ({error})"


def _multiplies(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of small integers are right, in all layouts; sums above 2,048 are odd, which needs float32."""
    device = tensor.device
    a = (torch.arange(5 * 3001, device=device) % 7 - 2).view(5, 3001).to(dtype)
    b = (torch.arange(3001 * 3, device=device) % 5 - 1).view(3001, 3).to(dtype)
    want = a.double() @ b.double()
    right = torch.ones((), dtype=torch.bool, device=device)
    for left in (a, a.T.contiguous().T):
        for other in (b, b.T.contiguous().T):
            out = torch.full((5, 3), float("nan"), device=device)
            product(out, left, other, accumulate=False)
            product(out, left, other, accumulate=True)
            right &= (out == 2 * want).all()
    return bool(right)


def product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out += a b``, or ``=`` unless ``accumulate``, with all sums in float32; the caller has asked `has_cublas`.

    Args:
        out: float32 ``[m, n]``, rows contiguous.
        a: ``[m, k]``, float16, bfloat16 or float32, contiguous in either dimension; float32 is multiplied in TF32 if
            torch allows it.
        b: ``[k, n]``, likewise, of the same dtype.
        accumulate: whether ``out`` is added to; if not, it is not read.

    Raises:
        OpError: (a ValueError) shapes, dtypes or strides that do not fit.
    """
    if a.shape[-1] == 0:
        if not accumulate:
            out.zero_()
        return
    if a.is_cuda and a.device.index != torch.cuda.current_device():
        with torch.cuda.device(a.device):
            return product(out, a, b, accumulate=accumulate)
    call_kernel(
        native.cublas_product, a, b, out, 1.0, float(accumulate), blas_handle(out), stream_handle(out)
    )
