"""How much of a GPU's memory the keys and values of an engine take from its start on.

A cache that grows is copied, and every graph of its steps is captured anew. So an engine on a GPU allocates

    rows x slots x (sum over layers of key/value heads x (head size of keys + of values) x bytes of a number)

at once, where ``rows`` is the longest sequence of the model, at most ``MOST_ROWS``, and the whole at most ``SHARE`` of
the free memory. It grows later only for a request that needs more rows, when that request joins.
"""

from __future__ import annotations

import torch

#: Rows of a slot: 160 seconds at 50 frames a second.
MOST_ROWS = 8192
#: The number of rows is a multiple of this.
MULTIPLE = 256
#: Part of the free memory of the GPU.
SHARE = 0.25


def rows_at_start(row_bytes: int, num_slots: int, max_positions: int, free_bytes: int) -> int:
    """Rows to allocate for each slot, a multiple of ``MULTIPLE`` and at least that.

    Args:
        row_bytes: of one row of one slot in all layers.
        max_positions: longest sequence of the model.
        free_bytes: of the GPU's memory.
    """
    wanted = -(-min(max_positions, MOST_ROWS) // MULTIPLE)
    affordable = int(free_bytes * SHARE) // (num_slots * row_bytes * MULTIPLE)
    return max(1, min(wanted, affordable)) * MULTIPLE


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free, or kept by torch without use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
