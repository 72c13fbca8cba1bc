"""Keys and values of the requests being decoded, in memory allocated once.

Each request has a slot and fills it from the front. Requests come and go at any time: a packed prefill fills a slot,
each step adds a row, and slots are moved to keep those in use adjacent, so that a step always works on slots ``0`` to
``n - 1``. The cache reaches a backbone's layers through transformers' attention interface (``kernels.py``).

Axes: B slots, K rows of a slot, N packed rows, G key/value heads, H heads, E head size of keys, F of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from speechlm_ext.model.attention.kernels import packed_attention
from speechlm_ext.model.attention.packing import Packing
from speechlm_ext.model.attention.scores import ScoreRule, causal_mask, dense_attention
from speechlm_ext.ops.common.memory import lazy_zeros


@dataclass
class Prefill:
    """A prefill under way: places of its packed rows."""

    slot_N: Tensor
    position_N: Tensor
    packing: Packing
    """Segments of the packed rows, one for each request."""
    slots: list[int]
    starts: list[int]
    """Rows that each slot held before."""
    lengths: list[int]


@dataclass
class Step:
    """A step under way: one more row for each of the first slots."""

    num_active: int
    num_keys: int
    position: Tensor
    """int64 ``[n]``: row of each slot that is written."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Mask ``[n, 1, 1, K]`` that SDPA adds to the scores, made once for all layers of a window."""
        if window not in self.masks:
            seen = causal_mask(self.position[:, None], self.num_keys, window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            self.masks[window] = mask[:, None]
        return self.masks[window]


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
        self._prefill: Prefill | None = None
        self._step: Step | None = None

    def _zeros(self, heads: int, size: int, num_rows: int) -> Tensor:
        # Zeros: a masked row still has a weight of 0, and 0 times NaN is NaN. On the CPU, pages never written take no
        # memory.
        if self.device.type == "cpu":
            flat = lazy_zeros(self.num_slots * num_rows, heads * size, self.dtype)
            return flat.view(self.num_slots, num_rows, heads, size)
        return torch.zeros(self.num_slots, num_rows, heads, size, dtype=self.dtype, device=self.device)

    def _layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Memory of a layer, for ``[..., G, rows, E]`` keys and ``[..., G, rows, F]`` values."""
        if layer not in self.keys:
            self.keys[layer] = self._zeros(key.shape[1], key.shape[-1], self.num_rows)
            self.values[layer] = self._zeros(value.shape[1], value.shape[-1], self.num_rows)
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
                store[slot, :held] = store[source, :held]
            self.restore(slot, held)

    def reorder(self, parents: Sequence[int]) -> None:
        """Copy the rows of slot ``parents[i]`` to slot i, for all slots at once."""
        index = torch.tensor(list(parents), device=self.device)
        num_used = max(self.held[p] for p in parents)
        for store in self.stores():
            store[: len(index), :num_used] = store[index, :num_used]
        for slot, held in enumerate([self.held[p] for p in parents]):
            self.restore(slot, held)

    def clear(self, slot: int) -> None:
        """Zero a slot's rows: values that are not finite would reach other rows through a weight of 0."""
        for store in self.stores():
            store[slot, : self.held[slot]] = 0
        self.restore(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first ``length`` rows of a slot."""
        self.restore(slot, min(length, self.held[slot]))

    def restore(self, slot: int, length: int) -> None:
        """Count ``length`` rows in a slot, such as those before :meth:`truncate` if nothing has overwritten them."""
        self.held[slot] = length
        self.lengths[slot] = length

    # ---- rows ---------------------------------------------------------------------------------------------------
    def begin_prefill(self, slots: Sequence[int], lengths: Sequence[int], packing: Packing) -> Tensor:
        """Assign the next forward's packed rows to slots; returns their positions int64 ``[N]``."""
        starts = [self.held[slot] for slot in slots]
        slot_N = torch.repeat_interleave(torch.tensor(slots), torch.tensor(lengths))
        position_N = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        self.reserve(int(position_N.max()) + 1)
        self._prefill = Prefill(
            slot_N.to(self.device),
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

    def begin_step(self, num_active: int, num_keys: int | None = None, max_rows: int | None = None) -> Tensor:
        """Prepare a forward that adds one row to each of the first slots; returns their positions int64 ``[n]``.

        Args:
            num_active: n; slots without a request may be among them, and write inside their own rows.
            num_keys: number of keys that attention reads, at least the longest slot's; a captured graph fixes it.
            max_rows: bound on positions, where a larger one would change the embeddings of all slots.
        """
        num_keys = self.longest(num_active) + 1 if num_keys is None else num_keys
        self.reserve(num_keys)
        max_rows = num_keys if max_rows is None else min(num_keys, max_rows)
        position = self.lengths[:num_active].clamp(max=max_rows - 1)
        self._step = Step(num_active, num_keys, position)
        return position

    def end_step(self) -> None:
        """Count the new row of every active slot after the forward."""
        assert self._step is not None
        num_active = self._step.num_active
        self.lengths[:num_active] += 1
        self._step = None
        self.count_step(num_active)

    def count_step(self, num_active: int) -> None:
        """Count a step's rows on the host; :meth:`end_step` does it, but a replayed graph cannot."""
        for slot in range(num_active):
            self.held[slot] += 1

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
        keys, values = self._layer(layer, key, value)
        if self._prefill is not None:
            p = self._prefill
            q_NHE, k_NGE, v_NGF = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
            keys[p.slot_N, p.position_N], values[p.slot_N, p.position_N] = k_NGE, v_NGF
            if not any(p.starts):
                return packed_attention(q_NHE, k_NGE, v_NGF, p.packing, rule).unsqueeze(0)
            return self._attend_to_prefix(layer, q_NHE, rule)[None]
        assert self._step is not None
        n, K, position = self._step.num_active, self._step.num_keys, self._step.position
        H, G = query.shape[1], key.shape[1]
        index = torch.arange(n, device=self.device)
        keys[index, position], values[index, position] = key[:, :, 0], value[:, :, 0]
        k_BGKE, v_BGKF = keys[:n, :K].transpose(1, 2), values[:n, :K].transpose(1, 2)
        if not rule.is_plain:
            mask = causal_mask(position[:, None, None], K, rule.window)
            return dense_attention(query, k_BGKE, v_BGKF, rule, mask).transpose(1, 2)
        # Query heads that share keys are rows of one product: no copies of the keys.
        out = F.scaled_dot_product_attention(
            query.reshape(n, G, H // G, -1),
            k_BGKE,
            v_BGKF,
            attn_mask=self._step.mask(rule.window, self.dtype),
            scale=rule.scale,
        )
        return out.reshape(n, 1, H, -1)

    def _attend_to_prefix(self, layer: int, q_NHE: Tensor, rule: ScoreRule) -> Tensor:
        """Attention of rows appended to slots: each reads its slot's earlier rows and the new ones up to itself."""
        assert self._prefill is not None
        p, outputs, first = self._prefill, [], 0
        for slot, start, length in zip(p.slots, p.starts, p.lengths, strict=True):
            end = start + length
            k_KGE, v_KGF = self.keys[layer][slot, :end], self.values[layer][slot, :end]
            mask = causal_mask(torch.arange(start, end, device=self.device), end, rule.window)
            q, k, v = (x.transpose(0, 1)[None] for x in (q_NHE[first : first + length], k_KGE, v_KGF))
            outputs.append(dense_attention(q, k, v, rule, mask)[0].transpose(0, 1))
            first += length
        return torch.cat(outputs)
