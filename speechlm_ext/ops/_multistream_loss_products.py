"""The three matrix products of multistream_loss, and their like, with the same bits for any number of CPU threads.

A library that splits a product over threads may order its sums by their number. So on the CPU each product is cut into
tiles, by its sizes alone, and every tile is the work of one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from speechlm_ext.ops._native import native

#: Rows of the weight in a tile; fewer where that leaves less than _TILES tiles.
_MOST_WEIGHT_ROWS, _LEAST_WEIGHT_ROWS, _TILES = 2048, 256, 16
#: A tile of dH: sums over the whole vocabulary for so many rows and dimensions.
_HIDDEN_ROWS, _HIDDEN_WIDTH = 256, 192


#: Multiplications of a product that one thread does sooner than a second one wakes up.
_SMALL = 1 << 22


def run(tasks: Sequence[Callable[[], object]], work: int) -> None:
    """Runs each task on one thread, all on as many as torch uses; ``work``: their multiplications."""
    native.run_tasks(list(tasks), torch.get_num_threads(), work < _SMALL)


def weight_tiles(num_rows: int) -> list[slice]:
    """Cuts rows of the weight into tiles, whose borders are multiples of 16."""
    size = min(_MOST_WEIGHT_ROWS, max(_LEAST_WEIGHT_ROWS, -(-num_rows // _TILES)))
    size = -(-size // 16) * 16
    return [slice(start, min(num_rows, start + size)) for start in range(0, num_rows, size)]


def put_logits(out: Tensor, h: Tensor, weight: Tensor) -> None:
    """``out = h Wᵀ``: ``[n, C]`` from ``[n, D]`` and ``[C, D]``."""
    if out.device.type != "cpu":
        torch.mm(h, weight.T, out=out)
        return
    tasks = [partial(torch.mm, h, weight[t].T, out=out[:, t]) for t in weight_tiles(weight.shape[0])]
    run(tasks, out.numel() * h.shape[1])


def add_weight_gradient(out: Tensor, grad: Tensor, h: Tensor, keep: bool) -> None:
    """``out += Gᵀ h``, or ``=`` unless ``keep``: ``[C, D]`` from ``[n, C]`` and ``[n, D]``."""
    if out.device.type != "cpu":
        out.addmm_(grad.T, h, beta=int(keep))
        return
    tasks = [partial(out[t].addmm_, grad[:, t].T, h, beta=int(keep)) for t in weight_tiles(out.shape[0])]
    run(tasks, out.numel() * h.shape[0])


def add_hidden_gradient(out: Tensor, grad: Tensor, weight: Tensor, keep: bool) -> None:
    """``out += G W``, or ``=`` unless ``keep``: ``[n, D]`` from ``[n, C]`` and ``[C, D]``."""
    if out.device.type != "cpu":
        out.addmm_(grad, weight, beta=int(keep))
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
