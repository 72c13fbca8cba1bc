"""MultiStreamEmbedding: the table whose rows are summed over the streams, as a module.

It is a module of its own, called inside the model's forward, so that engines that partition parameters (ZeRO-3) gather
it in time. Functions that fill a table reach partitioned ones through :func:`gathered`.

Axes: N rows, S streams, V vocabulary, D hidden, M features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.ops import multistream_embed

#: Rows that are drawn at a time, so that a large table needs no second one.
_BLOCK = 4096


class MultiStreamEmbedding(nn.Module):
    """``out = Σ_s scale[s] · weight[ids[..., s] + offsets[s]]``, pads exactly zero, plus continuous features.

    Args:
        num_embeddings, embedding_dim: V, D.
        pad_id: the id that contributes nothing.
        offsets: row at which each stream's part of the table starts; None: all streams share the whole table.
        scale: factor of each stream; None is 1.
        sparse: give the weight a sparse gradient; see :func:`speechlm_ext.ops.multistream_embed`.
        std: standard deviation of the first draw.
        device, dtype: of the weight; float32, float64, bfloat16 or float16.

    Attributes:
        weight: ``[V, D]``, drawn from N(0, std²), with a zero row for the pad.

    Raises:
        ConfigError: V or D is below 1, or offsets and scale are of different lengths.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        pad_id: int = 0,
        offsets: Sequence[int] | None = None,
        scale: Sequence[float] | None = None,
        sparse: bool = False,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ConfigError(
                f"MultiStreamEmbedding: num_embeddings and embedding_dim must be >= 1, got {num_embeddings} and "
                f"{embedding_dim}."
            )
        if offsets is not None and scale is not None and len(offsets) != len(scale):
            raise ConfigError(
                f"MultiStreamEmbedding: offsets has {len(offsets)} values and scale has {len(scale)}; both have one "
                "per stream."
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.pad_id, self.sparse = pad_id, sparse
        self.offsets = None if offsets is None else [int(v) for v in offsets]
        self.scale = None if scale is None else [float(v) for v in scale]
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters(std)

    def forward(
        self, ids: Tensor, features: Tensor | None = None, feature_positions: Tensor | None = None
    ) -> Tensor:
        """Embed.

        Args:
            ids: int32 or int64 ``[..., S]``.
            features: float ``[M, D]``, added to rows of the result.
            feature_positions: int32 or int64 ``[M]``, distinct: the rows, counted over all leading axes of ``ids``.

        Returns:
            ``[..., D]`` in the weight's dtype.

        Raises:
            OpError, OpIndexError: as :func:`speechlm_ext.ops.multistream_embed` does.
        """
        out = multistream_embed(
            ids.reshape(-1, ids.shape[-1]),
            self.weight,
            pad_id=self.pad_id,
            offsets=self.offsets,
            scale=self.scale,
            features=features,
            feature_positions=feature_positions,
            sparse=self.sparse,
        )
        return out.view(*ids.shape[:-1], out.shape[-1])

    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Draw all rows from N(0, std²), with the generator of the weight's device; the pad's row becomes zero."""
        with gathered(self.weight), torch.no_grad():
            self.weight.normal_(std=std, generator=generator)
            self._zero_pad()

    def load_text_rows(
        self, pretrained: Tensor, start: int, end: int, *, generator: torch.Generator | None = None
    ) -> None:
        """Copy rows of a pretrained text table, and draw the others at that table's own scale.

        Row ``start + i`` becomes ``pretrained[i]``. The others are drawn around the mean of the pretrained rows, with
        the standard deviation of their entries. The pad's row becomes zero. Where ZeRO-3 has partitioned the weight it
        is gathered, and all ranks take the rows that rank 0 draws; all must call.

        Args:
            pretrained: float ``[V', D]``, V' at least ``end - start``; further rows count for the scale alone.
            start, end: rows of this table that are text.
            generator: of the CPU; the same state gives the same rows for every dtype, device and number of ranks.

        Raises:
            CheckpointError: the widths differ, or the rows do not fit.
        """
        with gathered(self.weight):
            load_rows(self.weight, pretrained, start, end, generator=generator)
            with torch.no_grad():
                self._zero_pad()

    def _zero_pad(self) -> None:
        # With offsets the pad is an id, and no row is its own.
        if self.offsets is None and 0 <= self.pad_id < self.num_embeddings:
            self.weight[self.pad_id].zero_()

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, pad_id={self.pad_id}"]
        parts += [f"{n}={getattr(self, n)}" for n in ("offsets", "scale") if getattr(self, n) is not None]
        return ", ".join(parts + (["sparse=True"] if self.sparse else []))


@torch.no_grad()
def load_rows(
    weight: Tensor, pretrained: Tensor, start: int, end: int, *, generator: torch.Generator | None = None
) -> None:
    """Fill ``weight`` ``[V, D]`` in place; see :meth:`MultiStreamEmbedding.load_text_rows`."""
    V, D = weight.shape
    if pretrained.dim() != 2 or pretrained.shape[1] != D or not pretrained.is_floating_point():
        raise CheckpointError(
            f"the pretrained table is {pretrained.dtype} {list(pretrained.shape)}; expected a float table of width {D}."
        )
    if not 0 <= start <= end <= V or end - start > pretrained.shape[0]:
        raise CheckpointError(
            f"rows {start} to {end} of a table of {V} rows cannot be filled from a pretrained table of "
            f"{pretrained.shape[0]} rows. Use the backbone's own tokenizer and configuration."
        )
    if pretrained.shape[0] < 2 and end - start < V:
        raise CheckpointError(
            f"the rows that are not text are drawn at the pretrained table's own scale, which {pretrained.shape[0]} "
            "rows do not define; give the whole pretrained table."
        )
    # A copy, because the pretrained rows may be rows of this very table.
    text = pretrained[: end - start].to(weight.device, weight.dtype, copy=True)
    # A standard deviation, of the deviations from the mean row, over all entries: with the mean row's own spread the
    # new entries spread as the pretrained ones do.
    variance, mean = torch.var_mean(pretrained.detach().float(), dim=0, correction=0)
    std, mean = float(variance.mean().sqrt()), mean.cpu()
    for first in range(0, V, _BLOCK):
        rows = weight[first : first + _BLOCK]
        drawn = torch.randn(rows.shape, generator=generator).mul_(std).add_(mean)
        rows.copy_(drawn)
    weight[start:end].copy_(text)


@contextlib.contextmanager
def gathered(*parameters: nn.Parameter) -> Iterator[None]:
    """Context in which parameters partitioned by ZeRO-3 are whole; rank 0's changes reach all ranks."""
    partitioned: list[Any] = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield
