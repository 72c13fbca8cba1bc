"""How much a device's sums of float16 products lose, as a share of what kmeans_assign's proof allows.

The proof takes from the hardware that it adds exact products in float32 and loses at most 2^-22 of the sum of their
magnitudes a term, whatever the order and however the sum is split. Only a device can confirm that: here are products
whose sums lose much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: ``out = a bᵀ`` of float16 matrices with a float32 ``out``.
Multiply = Callable[[Tensor, Tensor, Tensor], None]
WIDTHS = (64, 100, 256, 512, 1024, 2048, 4096)
#: Few, for which a library may split the sums, and many.
ROWS = (16, 1536)
COLUMNS = 1000


def hostile_factors(rows: int, width: int, columns: int, device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, ``a [rows, width]`` and ``b [columns, width]``, float16."""
    generator = torch.Generator(device).manual_seed(width)
    options = dict(generator=generator, dtype=torch.float64, device=device)
    for kind in ("random", "same sign", "cancelling", "large first", "large last", "large everywhere"):
        a = torch.randn(rows, width, **options)
        b = torch.randn(columns, width, **options)
        if kind != "random":
            a, b = a.abs() + 1, b.abs() + 1
        if kind == "cancelling":  # all that is left are the roundings
            a[:, 1::2] = -a[:, : width - width % 2 : 2]
            b[:, 1::2] = b[:, : width - width % 2 : 2]
        if kind in ("large first", "large last"):  # the others are cut off where they are aligned to it
            a[:, 0 if kind == "large first" else width - 1] *= 2**11
        if kind == "large everywhere":  # one in each block of any size from 16
            a[:, ::16] *= 2**11
        yield kind, a.half(), b.half()


def worst_ratio(multiply: Multiply, rows: int, width: int, device: str, columns: int = COLUMNS) -> float:
    """The largest ``|Q − exact|`` by the proof's bound, over all kinds of factors; at most 1 if the proof holds."""
    worst = 0.0
    for _, a, b in hostile_factors(rows, width, columns, device):
        out = torch.full((rows, columns), float("nan"), device=device)
        multiply(out, a, b)
        wide, other = a.double(), b.double()
        bound = 2.0**-22 * (width + 8) * (wide.norm(dim=1)[:, None] * other.norm(dim=1))
        ratio = ((out.double() - wide @ other.T).abs() / bound).max()
        worst = max(worst, float("inf") if bool(ratio.isnan()) else float(ratio))
    return worst
