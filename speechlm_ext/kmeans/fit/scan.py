"""Scan the data: row count, feature ranges, non-finite rows, variance, content hash; and :class:`Data`, the result.

The scan takes two passes. The first finds the range of every feature (minima and maxima do not depend on the order) and
the rows that are not finite. The second sums values and squares on the grid that follows from the range: they give the
variance that the stopping rule is relative to and, being exact, a check of the whole content, together with a hash of
some rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.features.sources import FeatureSource, nonfinite_row, place_of
from speechlm_ext.kmeans.fit.fixed_point import Grid, grid_step, to_grid
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.utils.progress import stage_bar

_BLOCK_VALUES = 1 << 23  # 32 MiB of float32
_HASHED_ROWS = 64
#: Within this range squares and their sums over a row stay normal numbers.
_FLOAT32_RANGE, _FLOAT64_MAX = (1e-12, 1e12), 1e140


def default_block_rows(num_features: int) -> int:
    """Rows of a block of about 32 MiB."""
    return max(256, _BLOCK_VALUES // max(1, num_features))


@dataclass(frozen=True)
class Data:
    """The rows of a fit, on all ranks, and their statistics."""

    source: FeatureSource
    """This rank's rows."""
    ranks: Ranks
    device: torch.device
    block_rows: int
    first_row: int
    """Global number of this rank's first row: ranks hold consecutive rows, in rank order."""
    num_rows: int
    """Of all ranks."""
    num_dropped: int
    """Rows of all ranks that are not finite and dropped."""
    low: Tensor
    """float64 ``[F]``: minimum of each feature."""
    high: Tensor
    """float64 ``[F]``: maximum of each feature."""
    grid: Grid
    mean_variance: float = 0.0
    """Mean over the features of their variance."""
    content: str = ""
    """sha256 of ranges, sums, squares and some rows, as hex digits; does not depend on ranks or blocks."""
    progress: bool | None = None

    @property
    def num_usable(self) -> int:
        """Rows that are not dropped."""
        return self.num_rows - self.num_dropped

    @property
    def dtype(self) -> torch.dtype:
        """Of centroids: float64 for float64 features, else float32."""
        return self.source.dtype

    @property
    def work_dtype(self) -> torch.dtype:
        """Type for comparing rows: the features' own, or float64 where float32 squares would over- or underflow."""
        largest = float(torch.maximum(self.low.abs(), self.high.abs()).max())
        safe = largest == 0 or _FLOAT32_RANGE[0] <= largest <= _FLOAT32_RANGE[1]
        return self.dtype if safe else torch.float64

    def num_batches(self, batch_size: int) -> int:
        """Mini-batches of up to ``batch_size`` rows in an epoch."""
        return -(-self.num_rows // min(batch_size, self.num_rows))

    def no_rows(self) -> Tensor:
        """An empty tensor ``[0, F]`` in ``work_dtype``."""
        return torch.empty(0, self.source.num_features, dtype=self.work_dtype, device=self.device)

    def blocks(self, name: str | None = None) -> Iterator[tuple[int, Tensor]]:
        """One pass, with a progress bar ``name``: first local row and ``[n, F]`` in ``work_dtype`` of a block."""
        dtype, total = self.work_dtype, self.source.num_rows
        with stage_bar(name, total, progress=self.progress) as bar:
            for first, block in self.source.blocks(0, total, self.block_rows):
                yield first, block.to(device=self.device, dtype=dtype)
                bar.update(block.shape[0])

    def identity(self) -> dict[str, Any]:
        """Properties that two fits on the same data share."""
        return {
            "num_rows": self.num_rows,
            "num_features": self.source.num_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_dropped": self.num_dropped,
            "content": self.content,
        }


def scan(
    source: FeatureSource,
    ranks: Ranks,
    *,
    nonfinite: Literal["error", "drop"] = "error",
    device: torch.device | None = None,
    block_rows: int | None = None,
    progress: bool | None = None,
) -> Data:
    """Scan this rank's rows, which may be none; the options are those of ``KMeans``.

    Raises :class:`KMeansError`: no rows, rows that are not finite, values beyond 1e140, or ranks with different widths.
    """
    device = device or getattr(source, "device", None) or torch.device("cpu")
    block_rows = block_rows or default_block_rows(source.num_features)
    head = json.dumps([source.num_features, source.dtype == torch.float64])
    heads = [json.loads(text) for text in ranks.gather_bytes(head.encode())]
    if heads != heads[:1] * len(heads):
        raise KMeansError(
            f"features: the ranks have different ones (width, is float64): {heads}; all rows of a fit come from one "
            "encoder and layer."
        )
    shares = ranks.gather_int(source.num_rows)
    num_rows = sum(shares)
    low = torch.full((source.num_features,), torch.inf, dtype=torch.float64, device=device)
    high, dropped = -low, torch.zeros((), dtype=torch.int64, device=device)
    error: Exception | None = None
    try:
        with stage_bar("features, range", source.num_rows, progress=progress) as bar:
            for first, block in source.blocks(0, source.num_rows, block_rows):
                _check_block(source, first, block)
                bar.update(block.shape[0])
                block = block.to(device)
                block_low, block_high = torch.aminmax(block, dim=0)  # a NaN shows in both, an infinity in one
                if not bool((block_low.isfinite() & block_high.isfinite()).all()):
                    finite = block.isfinite().all(dim=1)
                    if nonfinite == "error":
                        raise nonfinite_row(source, first + int((~finite).nonzero()[0]), "drop such rows")
                    dropped += (~finite).sum()
                    if not bool(finite.any()):
                        continue
                    block_low, block_high = torch.aminmax(block[finite], dim=0)
                low, high = torch.minimum(low, block_low.double()), torch.maximum(high, block_high.double())
    except KMeansError as caught:
        error = caught
    ranks.raise_any(error)
    negated = -low
    ranks.max_(negated, high)
    ranks.sum_(dropped)
    low, num_dropped = -negated, int(dropped)
    if num_dropped == num_rows:
        raise KMeansError(
            "features: there are no rows to fit on"
            + (f"; none of the {num_rows} is finite" if num_rows else "")
            + ". Give features of at least as many frames as clusters."
        )
    if float(torch.maximum(high.abs(), low.abs()).max()) > _FLOAT64_MAX:
        raise KMeansError(
            "features: a value is larger than 1e140, so its square overflows; scale the features."
        )
    data = Data(
        source=source,
        ranks=ranks,
        device=device,
        block_rows=block_rows,
        first_row=sum(shares[: ranks.rank]),
        num_rows=num_rows,
        num_dropped=num_dropped,
        low=low,
        high=high,
        grid=Grid.build(low, high, num_rows),
        progress=progress,
    )
    variance, content = _moments(data)
    return replace(data, mean_variance=variance, content=content)


def _check_block(source: FeatureSource, first: int, block: Tensor) -> None:
    width = source.num_features
    if block.ndim != 2 or block.shape[1] != width or not block.is_floating_point():
        raise KMeansError(
            f"features: {place_of(source, first)}: expected a float block [n, {width}], got {block.dtype} "
            f"{list(block.shape)}; fix the source's blocks()."
        )


def _moments(data: Data) -> tuple[float, str]:
    """Mean variance of the features, and the hash of the content."""
    width, device = data.source.num_features, data.device
    sums = torch.zeros(width, dtype=torch.float64, device=device)
    squares = torch.zeros_like(sums)
    step = grid_step((data.high - data.low).square(), data.num_rows)
    hashed = torch.zeros(1, dtype=torch.int64)
    places = {i * data.num_rows // _HASHED_ROWS - data.first_row for i in range(_HASHED_ROWS)}
    for first, block in data.blocks("features, sums"):
        for place in [p for p in places if first <= p < first + block.shape[0]]:
            hashed += _row_hash(data.first_row + place, block[place - first])
        for part in block.split(max(1, (1 << 18) // width)):
            centered = part.double() - data.grid.offset
            if data.num_dropped:
                centered.masked_fill_(~part.isfinite().all(dim=1, keepdim=True), 0.0)
            sums += to_grid(centered, data.grid.step).sum(dim=0)
            squares += to_grid(centered.square(), step).sum(dim=0)
    data.ranks.sum_(sums, squares, hashed)
    mean = sums / data.num_usable
    variance = (squares / data.num_usable - mean.square()).clamp(min=0.0)
    digest = hashlib.sha256(json.dumps([data.num_rows, data.num_dropped, int(hashed)]).encode())
    for tensor in (data.low, data.high, sums, squares):
        digest.update(tensor.cpu().numpy().tobytes())
    # A Python sum has one order of addition, whatever the threads.
    return sum(variance.tolist()) / width, digest.hexdigest()


def _row_hash(number: int, row: Tensor) -> int:
    """A 64-bit hash of a row and its global number; their sum wraps, and does not depend on who adds them."""
    data = str(number).encode() + row.double().cpu().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)
