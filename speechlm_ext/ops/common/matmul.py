"""The three matrix products of multistream_loss, and their like, with the same bits for any number of CPU threads.

A library that splits a product over threads may order its sums by their number. So on the CPU each product is cut into
tiles, by its sizes alone, and every tile is the work of one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import native

#: Rows of the weight in a tile; fewer where that leaves less than _TILES tiles.
_MOST_WEIGHT_ROWS, _LEAST_WEIGHT_ROWS, _TILES = 2048, 256, 16
#: A tile of dH: sums over the whole vocabulary for so many rows and dimensions.
_HIDDEN_ROWS, _HIDDEN_WIDTH = 256, 192


#: Whether torch's addmm adds a product of 16-bit matrices to a float32 one in place.
_ADDS_IN_FLOAT32 = torch.torch_version.TorchVersion(torch.__version__) >= (2, 12)
#: Multiplications of a product that one thread does sooner than a second one wakes up.
_SMALL = 1 << 22


def run(tasks: Sequence[Callable[[], object]], work: int) -> None:
    """Runs each task on one thread, all on as many as torch uses; ``work``: their multiplications."""
    if torch.is_inference_mode_enabled():  # a thread's own setting, and these may run on others
        tasks = [torch.inference_mode()(task) for task in tasks]
    native.run_tasks(list(tasks), torch.get_num_threads(), work < _SMALL)


def weight_tiles(num_rows: int, most: int = _MOST_WEIGHT_ROWS) -> list[slice]:
    """Cuts rows of the weight into tiles, whose borders are multiples of 16."""
    size = min(most, max(_LEAST_WEIGHT_ROWS, -(-num_rows // _TILES)))
    size = -(-size // 16) * 16
    return [slice(start, min(num_rows, start + size)) for start in range(0, num_rows, size)]


def _multiply(out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """``out += a b``, or ``=`` unless ``keep``, on a GPU, where 16-bit factors may have a float32 ``out``."""
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b, beta=int(keep))
    elif a.dtype != b.dtype:  # sums in float32 with a 16-bit weight
        for start in range(0, b.shape[0], _MOST_WEIGHT_ROWS):
            t = slice(start, start + _MOST_WEIGHT_ROWS)
            out.addmm_(a[:, t], b[t].to(out.dtype), beta=int(keep or start > 0))
    elif not keep:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif _ADDS_IN_FLOAT32:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        for start in range(0, out.shape[0], 4 * _MOST_WEIGHT_ROWS):
            t = slice(start, start + 4 * _MOST_WEIGHT_ROWS)
            out[t] += torch.ops.aten.mm.dtype(a[t], b, out.dtype)


def matmul_into(out: Tensor, h: Tensor, weight: Tensor) -> None:
    """``out = h Wᵀ``: ``[n, C]`` from ``[n, D]`` and ``[C, D]``."""
    if out.device.type != "cpu":
        torch.mm(h, weight.T, out=out)
        return
    tasks = [partial(torch.mm, h, weight[t].T, out=out[:, t]) for t in weight_tiles(weight.shape[0])]
    run(tasks, out.numel() * h.shape[1])


def add_weight_gradient(out: Tensor, grad: Tensor, h: Tensor, keep: bool) -> None:
    """``out += Gᵀ h``, or ``=`` unless ``keep``: ``[C, D]`` from ``[n, C]`` and ``[n, D]``."""
    if out.device.type != "cpu":
        _multiply(out, grad.T, h, keep)
        return
    tasks = [partial(out[t].addmm_, grad[:, t].T, h, beta=int(keep)) for t in weight_tiles(out.shape[0])]
    run(tasks, out.numel() * h.shape[0])


def add_hidden_gradient(out: Tensor, grad: Tensor, weight: Tensor, keep: bool) -> None:
    """``out += G W``, or ``=`` unless ``keep``: ``[n, D]`` from ``[n, C]`` and ``[C, D]``."""
    if out.device.type != "cpu":
        _multiply(out, grad, weight, keep)
        return
    n, D = out.shape
    run(
        [
            partial(
                out[i : i + _HIDDEN_ROWS, j : j + _HIDDEN_WIDTH].addmm_,
                grad[i : i + _HIDDEN_ROWS],
                weight[:, j : j + _HIDDEN_WIDTH],
                beta=int(keep),
            )
            for i in range(0, n, _HIDDEN_ROWS)
            for j in range(0, D, _HIDDEN_WIDTH)
        ],
        grad.numel() * D,
    )
