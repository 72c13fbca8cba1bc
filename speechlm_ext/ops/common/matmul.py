"""Matrix products whose bits do not depend on the number of CPU threads.

A library that splits a product over threads may order its sums by their number. So on the CPU each product is cut into
tiles by its sizes alone, and each tile is computed by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from speechlm_ext.ops.common.cublas import has_cublas, product
from speechlm_ext.ops.common.native import OpError, native

#: Rows of the weight per tile: the maximum, and the minimum that is used to get _TILES tiles.
_MAX_WEIGHT_ROWS, _MIN_WEIGHT_ROWS, _TILES = 2048, 256, 16
#: Rows and dimensions of a tile of dH, whose sums run over the whole vocabulary.
_HIDDEN_ROWS, _HIDDEN_WIDTH = 256, 192
#: Where torch's cuBLAS cannot be called directly: whether torch can give a product of 16-bit matrices in float32 on a
#: GPU, and the first version that can.
GIVES_FLOAT32, FIRST_TORCH = hasattr(torch.ops.aten.mm, "dtype_out"), "2.8"
#: Whether torch's addmm adds a product of 16-bit matrices to a float32 one in place.
ADDS_IN_FLOAT32 = torch.torch_version.TorchVersion(torch.__version__) >= (2, 12)
#: Multiplications below which one thread is faster than waking a second one.
_SMALL = 1 << 22


def run(tasks: Sequence[Callable[[], object]], work: int) -> None:
    """Run tasks on torch's number of threads, each task on one; ``work``: multiplications of all."""
    if torch.is_inference_mode_enabled():  # it is thread-local, and the tasks may run on other threads
        tasks = [torch.inference_mode()(task) for task in tasks]
    native.run_tasks(list(tasks), torch.get_num_threads(), work < _SMALL)


def weight_tiles(num_rows: int, max_rows: int = _MAX_WEIGHT_ROWS) -> list[slice]:
    """Tiles of the weight's rows, with boundaries at multiples of 16."""
    size = min(max_rows, max(_MIN_WEIGHT_ROWS, -(-num_rows // _TILES)))
    size = -(-size // 16) * 16
    return [slice(start, min(num_rows, start + size)) for start in range(0, num_rows, size)]


def _multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """``out += a b``, or ``=`` unless ``accumulate``, on a GPU; 16-bit factors may have a float32 ``out``."""
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b, beta=int(accumulate))
    elif a.dtype != b.dtype:  # sums in float32 with a 16-bit weight
        for start in range(0, b.shape[0], _MAX_WEIGHT_ROWS):
            t = slice(start, start + _MAX_WEIGHT_ROWS)
            out.addmm_(a[:, t], b[t].to(out.dtype), beta=int(accumulate or start > 0))
    elif has_cublas(out):
        product(out, a, b, accumulate=accumulate)
    elif not GIVES_FLOAT32:
        raise OpError(
            f"products of {a.dtype} with sums in {out.dtype} on a GPU need torch {FIRST_TORCH} or later; torch "
            f"{torch.__version__} is installed. Update it, or use float32."
        )
    elif not accumulate:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif ADDS_IN_FLOAT32:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        for start in range(0, out.shape[0], 4 * _MAX_WEIGHT_ROWS):
            t = slice(start, start + 4 * _MAX_WEIGHT_ROWS)
            out[t] += torch.ops.aten.mm.dtype(a[t], b, out.dtype)


def split_bfloat16(values: Tensor, parts: int) -> list[Tensor]:
    """``values`` as a sum of ``parts`` bfloat16 tensors, each of 8 bits: three of them hold a float32."""
    out = [values.to(torch.bfloat16)]
    for _ in range(parts - 1):
        values = values - out[-1]
        out.append(values.to(torch.bfloat16))
    return out


def matmul_into(out: Tensor, h: Tensor, weight: Tensor) -> None:
    """``out = h Wᵀ``: ``[n, C]`` from ``[n, D]`` and ``[C, D]``."""
    if out.device.type != "cpu":
        torch.mm(h, weight.T, out=out)
        return
    tasks = [partial(torch.mm, h, weight[t].T, out=out[:, t]) for t in weight_tiles(weight.shape[0])]
    run(tasks, out.numel() * h.shape[1])


def add_weight_gradient(out: Tensor, grad: Tensor, h: Tensor, accumulate: bool) -> None:
    """``out += Gᵀ h``, or ``=`` unless ``accumulate``: ``[C, D]`` from ``[n, C]`` and ``[n, D]``."""
    if out.device.type != "cpu":
        _multiply(out, grad.T, h, accumulate)
        return
    tasks = [
        partial(out[t].addmm_, grad[:, t].T, h, beta=int(accumulate)) for t in weight_tiles(out.shape[0])
    ]
    run(tasks, out.numel() * h.shape[0])


def add_hidden_gradient(out: Tensor, grad: Tensor, weight: Tensor, accumulate: bool) -> None:
    """``out += G W``, or ``=`` unless ``accumulate``: ``[n, D]`` from ``[n, C]`` and ``[C, D]``."""
    if out.device.type != "cpu":
        _multiply(out, grad, weight, accumulate)
        return
    n, D = out.shape
    run(
        [
            partial(
                out[i : i + _HIDDEN_ROWS, j : j + _HIDDEN_WIDTH].addmm_,
                grad[i : i + _HIDDEN_ROWS],
                weight[:, j : j + _HIDDEN_WIDTH],
                beta=int(accumulate),
            )
            for i in range(0, n, _HIDDEN_ROWS)
            for j in range(0, D, _HIDDEN_WIDTH)
        ],
        grad.numel() * D,
    )
