"""Keys and values of the requests being decoded, in memory allocated once.

Each request has a slot and fills it from the front. Requests come and go at any time: a packed prefill fills a slot,
each step adds a row, and slots are moved to keep those in use adjacent, so that a step always works on slots ``0`` to
``n - 1``. A slot's rows are a block of memory, which a table on the device names: a slot that moves takes its block
along, and no keys are copied. A step reads lengths and blocks on the device, so that the same captured CUDA graph
serves requests of any length. The cache reaches a backbone's layers through transformers' attention interface
(``kernels.py``), or gives its memory to the fused ones (``backbone/decode_layers.py``).

Axes: B slots, K rows of a slot, N packed rows, G key/value heads, H heads, E head size of keys, F of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.model.attention.kernels import packed_attention
from speechlm_ext.model.attention.packing import Packing
from speechlm_ext.model.attention.scores import ScoreRule, causal_mask, dense_attention
from speechlm_ext.ops.common.memory import lazy_zeros
from speechlm_ext.ops.decode_layer import decode_attention


@dataclass
class Prefill:
    """A prefill under way: places of its packed rows."""

    block_N: Tensor
    position_N: Tensor
    packing: Packing
    """Segments of the packed rows, one for each request."""
    slots: list[int]
    starts: list[int]
    """Rows that each slot held before."""
    lengths: list[int]


@dataclass
class Step:
    """A step under way: one more row for each of the first n slots."""

    block: Tensor
    """int64 ``[n]``: block of each slot."""
    position: Tensor
    """int64 ``[n]``: row of each slot that is written."""
    lengths: Tensor
    """int64 ``[n]``: rows that it attends to, the new one included."""


class KVCache:
    """Keys and values of ``num_slots`` requests, ``num_rows`` rows each; grows where more are needed.

    A layer's memory is allocated with its first rows, whose shape gives the number and size of its heads.

    Args:
        num_slots, num_rows: B, K.
        dtype, device: of keys and values.
    """

    def __init__(self, num_slots: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots, self.num_rows, self.device, self.dtype = num_slots, num_rows, device, dtype
        self.keys: dict[int, Tensor] = {}
        """``[B, K, G, E]`` of each layer."""
        self.values: dict[int, Tensor] = {}
        """``[B, K, G, F]`` of each layer."""
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """int64 ``[B]`` on the device: number of rows in each slot."""
        self.held = [0] * num_slots
        """The same on the host."""
        self.blocks = list(range(num_slots))
        """The block of each slot."""
        self.block_table = torch.arange(num_slots, device=device)
        """The same on the device, int64 ``[B]``."""
        self._in_use = [1] * num_slots
        self._rows_per_step = torch.ones(num_slots, dtype=torch.int64, device=device)
        # int64 [B]: 1, and 0 for a slot without a request, which takes part in padded steps and stays empty.
        self.layers: Any = None
        """The fused layers of the backbone that uses the cache; ``has_layers``: whether it has looked for them."""
        self.has_layers = False
        self._prefill: Prefill | None = None
        self._step: Step | None = None

    def _zeros(self, heads: int, size: int, num_rows: int) -> Tensor:
        # Zeros: a masked row still has a weight of 0, and 0 times NaN is NaN. On the CPU, pages never written take no
        # memory.
        if self.device.type == "cpu":
            flat = lazy_zeros(self.num_slots * num_rows, heads * size, self.dtype)
            return flat.view(self.num_slots, num_rows, heads, size)
        return torch.zeros(self.num_slots, num_rows, heads, size, dtype=self.dtype, device=self.device)

    def layer_memory(
        self, layer: int, num_heads: int, key_size: int, value_size: int
    ) -> tuple[Tensor, Tensor]:
        """Keys ``[B, K, G, E]`` and values ``[B, K, G, F]`` of a layer, one block after the other."""
        if layer not in self.keys:
            self.keys[layer] = self._zeros(num_heads, key_size, self.num_rows)
            self.values[layer] = self._zeros(num_heads, value_size, self.num_rows)
        return self.keys[layer], self.values[layer]

    def stores(self) -> list[Tensor]:
        return [*self.keys.values(), *self.values.values()]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of one slot in all layers that have memory."""
        return sum(store[0, 0].numel() * store.element_size() for store in self.stores())

    # ---- slots --------------------------------------------------------------------------------------------------
    def reserve(self, num_rows: int) -> None:
        """Grow every slot to at least ``num_rows`` rows, at least doubling; existing rows are kept."""
        if num_rows <= self.num_rows:
            return
        num_rows = max(num_rows, 2 * self.num_rows)  # doubling bounds the copies per row
        # A slot without a request counts rows too, also past its end.
        num_used = min(max(self.held), self.num_rows)
        for store in (self.keys, self.values):
            for layer, old in store.items():
                new = self._zeros(old.shape[2], old.shape[3], num_rows)
                new[:, :num_used] = old[:, :num_used]
                store[layer] = new
        self.num_rows = num_rows

    def copy(self, source: int, slots: Sequence[int], length: int | None = None) -> None:
        """Copy the rows of ``source``, all or the first ``length``, to other slots."""
        held = self.held[source] if length is None else length
        for slot in slots:
            for store in self.stores():
                store[self.blocks[slot], :held] = store[self.blocks[source], :held]
            self.restore(slot, held)

    def reorder(self, parents: Sequence[int]) -> None:
        """Give slot i the rows of slot ``parents[i]``, for all slots at once."""
        index = torch.tensor([self.blocks[p] for p in parents], device=self.device)
        into = torch.tensor(self.blocks[: len(parents)], device=self.device)
        num_used = max(self.held[p] for p in parents)
        for store in self.stores():
            store[into, :num_used] = store[index, :num_used]
        for slot, held in enumerate([self.held[p] for p in parents]):
            self.restore(slot, held)

    def move(self, source: int, slot: int) -> None:
        """Let ``slot`` take the rows of ``source``, which becomes free: their blocks change places."""
        length = self.held[source]
        self.blocks[slot], self.blocks[source] = self.blocks[source], self.blocks[slot]
        for number in (slot, source):
            self.block_table[number] = self.blocks[number]
        self.release(source)
        self.restore(slot, length)

    def release(self, slot: int) -> None:
        """Empty a slot that no request has; steps of more rows than there are requests leave it empty."""
        self._set(slot, 0, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first ``length`` rows of a slot."""
        self.restore(slot, min(length, self.held[slot]))

    def restore(self, slot: int, length: int) -> None:
        """Count ``length`` rows in a slot, such as those before :meth:`truncate` if nothing has overwritten them."""
        self._set(slot, length, 1)

    def _set(self, slot: int, length: int, in_use: int) -> None:
        self.held[slot], self._in_use[slot] = length, in_use
        self.lengths[slot], self._rows_per_step[slot] = length, in_use

    # ---- rows ---------------------------------------------------------------------------------------------------
    def begin_prefill(self, slots: Sequence[int], lengths: Sequence[int], packing: Packing) -> Tensor:
        """Assign the next forward's packed rows to slots; returns their positions int64 ``[N]``."""
        starts = [self.held[slot] for slot in slots]
        blocks = torch.tensor([self.blocks[slot] for slot in slots])
        block_N = torch.repeat_interleave(blocks, torch.tensor(lengths))
        position_N = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        self.reserve(int(position_N.max()) + 1)
        self._prefill = Prefill(
            block_N.to(self.device),
            position_N.to(self.device),
            packing,
            list(slots),
            starts,
            list(lengths),
        )
        return self._prefill.position_N

    def end_prefill(self) -> None:
        """Count the rows of the finished forward."""
        assert self._prefill is not None
        for slot, start, length in zip(
            self._prefill.slots, self._prefill.starts, self._prefill.lengths, strict=True
        ):
            self.restore(slot, start + length)
        self._prefill = None

    def begin_step(self, num_rows: int, max_rows: int | None = None) -> Tensor:
        """Prepare a forward that adds one row to each of the first slots; returns their positions int64 ``[n]``.

        Args:
            num_rows: n; slots without a request may be among them.
            max_rows: bound on positions, where a larger one would change the embeddings of all slots.
        """
        self.reserve(self.longest(num_rows) + 1)
        max_rows = self.num_rows if max_rows is None else min(self.num_rows, max_rows)
        position = self.lengths[:num_rows].clamp(max=max_rows - 1)
        self._step = Step(self.block_table[:num_rows], position, position + 1)
        return position

    @property
    def step(self) -> Step:
        """The step under way."""
        assert self._step is not None
        return self._step

    def end_step(self) -> None:
        """Count the new row of every slot in use after the forward."""
        num_rows = len(self.step.position)
        self.lengths[:num_rows] += self._rows_per_step[:num_rows]
        self._step = None
        self.count_step(num_rows)

    def count_step(self, num_rows: int) -> None:
        """Count a step's rows on the host; :meth:`end_step` does it, but a replayed graph cannot."""
        for slot in range(num_rows):
            self.held[slot] += self._in_use[slot]

    def longest(self, num_active: int) -> int:
        """Rows of the longest of the first slots."""
        return max(self.held[:num_active])

    # ---- attention ----------------------------------------------------------------------------------------------
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
        """Store the rows of one layer and attend; called by the ``speechlm`` attention.

        Args:
            query, key, value: ``[1, H, N, E]`` in a prefill, ``[n, H, 1, E]`` in a step; G heads for key and value.
            rule: the layer's scores.

        Returns:
            ``[1, N, H, F]`` or ``[n, 1, H, F]``.
        """
        keys, values = self.layer_memory(layer, key.shape[1], key.shape[-1], value.shape[-1])
        if self._prefill is not None:
            p = self._prefill
            q_NHE, k_NGE, v_NGF = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
            keys[p.block_N, p.position_N], values[p.block_N, p.position_N] = k_NGE, v_NGF
            if not any(p.starts):
                return packed_attention(q_NHE, k_NGE, v_NGF, p.packing, rule).unsqueeze(0)
            return self._attend_to_prefix(layer, q_NHE, rule)[None]
        s = self.step
        keys[s.block, s.position], values[s.block, s.position] = key[:, :, 0], value[:, :, 0]
        out = decode_attention(
            query[:, :, 0],
            keys,
            values,
            s.lengths,
            s.block,
            rule.scale,
            rule.window,
            rule.softcap,
            rule.sinks_H,
        )
        return out.view(len(query), 1, query.shape[1], -1)

    def _attend_to_prefix(self, layer: int, q_NHE: Tensor, rule: ScoreRule) -> Tensor:
        """Attention of rows appended to slots: each reads its slot's earlier rows and the new ones up to itself."""
        assert self._prefill is not None
        p, outputs, first = self._prefill, [], 0
        for slot, start, length in zip(p.slots, p.starts, p.lengths, strict=True):
            end = start + length
            k_KGE, v_KGF = (
                self.keys[layer][self.blocks[slot], :end],
                self.values[layer][self.blocks[slot], :end],
            )
            mask = causal_mask(torch.arange(start, end, device=self.device), end, rule.window)
            q, k, v = (x.transpose(0, 1)[None] for x in (q_NHE[first : first + length], k_KGE, v_KGF))
            outputs.append(dense_attention(q, k, v, rule, mask)[0].transpose(0, 1))
            first += length
        return torch.cat(outputs)
