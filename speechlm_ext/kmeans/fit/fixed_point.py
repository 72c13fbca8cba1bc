"""Sums whose bits do not depend on the order of addition: summands are rounded to a common fixed-point grid first.

Floating-point addition is not associative, so a sum over blocks, threads or ranks has other bits for every division of
the rows. Demmel and Nguyen, "Fast reproducible floating-point summation", ARITH 2013: round every summand to a multiple
of one power of two, the grid's step g, chosen so that all partial sums are representable. Then every addition is exact,
and exact additions commute.

Proof. Let ``|v| < 2^a`` for all summands, let there be fewer than ``2^b`` of them (``1 <= b <= 52``), and
``g = 2^(a + b - 52)``. 2^a is a multiple of g, so a rounded summand is at most 2^a in size; any partial sum is a
multiple of g of at most ``2^b * 2^a = 2^52 g``, which float64 holds exactly. The rounding itself is
``(v + M) - M`` with ``M = 1.5 * 2^52 g``: since ``|v| <= 2^(52 - b) g <= 2^51 g``, the first sum is in
``[2^52 g, 2^53 g)`` where float64 values are g apart, so it rounds v to the grid (to even at ties), and the second sum
is exact.

Cost. A summand is rounded by at most g/2 = 2^(a + b - 53): of 53 bits below the largest summand about
``53 - log2(rows)`` remain, e.g. 33 for a million rows, 23 for a billion. A mean is off by at most g/2, not by g/2
times the rows. To spend those bits well each feature has its own grid, around the middle of its own range: features of
different scales, or far from the origin, do not reduce each other's precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speechlm_ext.ops.kmeans_assign.sums import kmeans_sums


def grid_step(bound: Tensor, count: int) -> Tensor:
    """The step g for ``count`` < 2^52 summands of magnitude ``bound`` (float64, any shape) at most."""
    exponent = torch.frexp(bound).exponent.to(torch.int64)  # bound < 2^exponent, or both are 0
    exponent = exponent + (max(1, count.bit_length()) - 52)
    # 2^e from its bits: pow() need not be exact. The clamp keeps it a normal number.
    return ((exponent.clamp(-1022, 970) + 1023) << 52).view(torch.float64)


def to_grid(values: Tensor, step: Tensor) -> Tensor:
    """``values`` (float64) rounded to multiples of ``step`` (float64, broadcast)."""
    magic = step * (1.5 * 2.0**52)
    return (values + magic) - magic


def exact_sum(values: Tensor) -> Tensor:
    """Sum of a float64 tensor, 0-dimensional, with the same bits for any number of threads."""
    if values.numel() == 0:
        return values.new_zeros(())
    return to_grid(values, grid_step(values.abs().max(), values.numel())).sum()


@dataclass(frozen=True)
class Grid:
    """The fixed-point grid of each feature."""

    offset: Tensor
    """float64 ``[F]``: subtracted from each row, the middle of the feature's range."""
    step: Tensor
    """float64 ``[F]``: powers of two."""

    @classmethod
    def build(cls, low: Tensor, high: Tensor, num_rows: int) -> Grid:
        """The grid for at most ``num_rows`` rows between ``low`` and ``high`` (float64 ``[F]``)."""
        offset = low / 2 + high / 2
        # The offset is rounded, so a row may be one last bit beyond half the range.
        bound = (high / 2 - low / 2) * (1 + 2.0**-40) + offset.abs() * 2.0**-52
        return cls(offset, grid_step(bound, num_rows))

    def round(self, x: Tensor) -> Tensor:
        """Rows ``[n, F]`` of any float dtype minus the offset, rounded to the grid: float64 ``[n, F]``."""
        return to_grid(x.to(torch.float64) - self.offset, self.step)

    def add_sums(self, x: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Add rows in the grid's range to the sums of their clusters, in place; see :func:`kmeans_sums`.

        After all blocks ``offset + sums[k] / counts[k]`` is the mean of cluster k, for any order of blocks and threads.
        """
        kmeans_sums(x, labels, self.offset, self.step, sums=sums, counts=counts)
