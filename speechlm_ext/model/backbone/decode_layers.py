"""A decode step of Llama-type backbones: the layers of transformers with their small operations fused.

    qkv = normed [Wq; Wk; Wv]ᵀ        query = rope(q), rows of k and v into the cache        a = attention(query, cache)
    normed, x = norm(x + a Woᵀ)       normed, x = norm(x + silu(gate)·up Wdᵀ)  with  gate, up = normed [Wg; Wu]ᵀ

Ten calls a layer. The products are :func:`decode_linear`'s and the attention :func:`decode_attention`'s, both of which
give a row the same bits whatever other rows there are (``ops/decode_layer``); nothing depends on values on the host, so
a CUDA graph of a step serves requests of every length.

A body is computed this way if its layers are exactly those of ``layer_families.py``, their weights can be joined
(``fused_weights.py``), and the hidden states of a few rows equal those of transformers' own code. Others decode through
transformers' layers; the log says why.

Axes: M rows of a step, D hidden, P positions, E head size.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.backbone.fused_weights import FusedLinear, fuse_linears
from speechlm_ext.model.backbone.layer_families import Family, LayerForm, family_of, layer_forms
from speechlm_ext.ops.decode_layer import (
    add_rms_norm,
    decode_attention,
    decode_linear,
    rope_and_store,
    silu_mul,
)

logger = logging.getLogger("speechlm_ext")

#: Largest difference from transformers' own layers, as a share of the largest value.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
#: Rows of the cache, and of a step, that are compared.
_PROOF_ROWS = (3, 2)
#: Smallest number of positions of the rotary tables.
_TABLE_ROWS = 256
#: A step of a body through transformers' layers, with the cache's bookkeeping.
PlainStep = Callable[[Any, Tensor, KVCache], Tensor]


@dataclass(frozen=True, eq=False)
class _Layer:
    form: LayerForm
    qkv: FusedLinear
    gate_up: FusedLinear


class DecodeLayers:
    """The fused layers of one body; :func:`decode_layers` makes and keeps them.

    Args:
        body: of ``family``.
        layers: its layers in order.
        max_rows: positions up to which the body's rotary embeddings do not depend on others'; None for no bound.
    """

    def __init__(self, body: Any, family: Family, layers: list[_Layer], max_rows: int | None) -> None:
        # Not the body itself: it is the key of the weak dictionary that holds this object.
        self._rotary, self._norm = body.rotary_emb, body.norm
        self._family, self._layers, self._max_rows = family, layers, max_rows
        # Captured graphs may hold the addresses of smaller tables: those are kept.
        self._tables: list[tuple[Tensor, Tensor]] = []

    @property
    def first_weight(self) -> Tensor:
        """The first product's weight, whose dtype, device and width are those of all."""
        return self._layers[0].qkv.weight

    def is_current(self) -> bool:
        """Whether the joint weights still are the memory of the body's own."""
        return all(layer.qkv.is_current() and layer.gate_up.is_current() for layer in self._layers)

    def has_modules_of(self, forms: list[LayerForm]) -> bool:
        """Whether these are the layers that were fused, with no module replaced."""
        mine = (layer.form for layer in self._layers)
        return len(forms) == len(self._layers) and all(a.is_same(b) for a, b in zip(mine, forms, strict=True))

    @torch.no_grad()
    def step(self, x_MD: Tensor, cache: KVCache) -> Tensor:
        """Last hidden states ``[M, D]`` of one more row of the cache's first M slots, in the cache's step."""
        place, num_rows = cache.step, cache.num_rows
        after = self._family.norms_after
        residual_MD = x_MD.contiguous()
        normed_MD = residual_MD
        if not after:
            first = self._layers[0].form.attention_norm
            normed_MD, residual_MD = self._normed(residual_MD, None, first)
        cos_PE, sin_PE = self._rope_tables(num_rows, x_MD)
        for index, layer in enumerate(self._layers):
            f = layer.form
            keys, values = cache.layer_memory(index, f.num_kv_heads, f.head_size, f.head_size)
            qkv = decode_linear(normed_MD, layer.qkv.weight, layer.qkv.bias)
            query = rope_and_store(
                qkv,
                cos_PE if f.has_rope else None,
                sin_PE if f.has_rope else None,
                place.position,
                place.block,
                keys,
                values,
                f.num_heads,
                q_norm=None if f.query_norm is None else f.query_norm.weight,
                k_norm=None if f.key_norm is None else f.key_norm.weight,
                norm_eps=0.0 if f.query_norm is None else f.query_norm.variance_epsilon,
                norm_over=self._family.norm_over,
            )
            attended = decode_attention(query, keys, values, place.lengths, place.block, f.scale, f.window)
            out_MD = decode_linear(attended, f.output.weight, f.output.bias)
            normed_MD, residual_MD = self._norm_step(
                out_MD, residual_MD, f.mlp_norm if not after else f.attention_norm
            )
            gate_up = decode_linear(normed_MD, layer.gate_up.weight, layer.gate_up.bias)
            out_MD = decode_linear(silu_mul(gate_up), f.down.weight, f.down.bias)
            following = (
                self._layers[index + 1].form.attention_norm if index + 1 < len(self._layers) else self._norm
            )
            normed_MD, residual_MD = self._norm_step(out_MD, residual_MD, f.mlp_norm if after else following)
        if after:
            normed_MD, _ = self._normed(residual_MD, None, self._norm)
        return normed_MD

    def _norm_step(self, out_MD: Tensor, residual_MD: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """The input of the next product, and the residual with ``out_MD`` added, normed first or not."""
        if not self._family.norms_after:
            return self._normed(out_MD, residual_MD, norm)
        residual_MD = residual_MD + self._normed(out_MD, None, norm)[0]
        return residual_MD, residual_MD

    def _normed(self, x_MD: Tensor, residual_MD: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            x_MD, residual_MD, norm.weight, norm.variance_epsilon, rounds_last=self._family.rounds_last
        )

    def _rope_tables(self, num_rows: int, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[P, E]`` of at least ``num_rows`` positions, from the body's own module."""
        num_rows = num_rows if self._max_rows is None else min(num_rows, self._max_rows)
        if not self._tables or len(self._tables[-1][0]) < num_rows:
            rows = max(num_rows, 2 * len(self._tables[-1][0]) if self._tables else _TABLE_ROWS)
            rows = rows if self._max_rows is None else min(rows, self._max_rows)
            with torch.inference_mode(False), torch.no_grad():
                position = torch.arange(rows, device=x_MD.device)[None]
                cos, sin = self._rotary(torch.empty(0, dtype=x_MD.dtype, device=x_MD.device), position)
                self._tables.append((cos[0].contiguous(), sin[0].contiguous()))
        return self._tables[-1]


_known: weakref.WeakKeyDictionary[nn.Module, DecodeLayers] = weakref.WeakKeyDictionary()
_logged: set[str] = set()


class _RefusedError(Exception):
    """Why a body has no fused layers."""


def decode_layers(body: Any, reference: PlainStep, max_rows: int | None) -> DecodeLayers | None:
    """The fused layers of a body; None if it decodes through transformers' code.

    The first call for a body, and for other weights or modules of it, joins weights and compares a few rows.

    Args:
        body: changed in place: weights that are read together become neighbours in memory.
        reference: a step through transformers' own layers.
        max_rows: positions up to which its rotary embeddings do not depend on others'; None for no bound.
    """
    try:
        return _make(body, reference, max_rows)
    except _RefusedError as error:
        message = f"decoding: {type(body).__name__} runs through transformers' layers: {error}"
        if message not in _logged:
            _logged.add(message)
            logger.info("%s", message)
        return None


def _make(body: Any, reference: PlainStep, max_rows: int | None) -> DecodeLayers:
    family = family_of(body)
    if family is None:
        raise _RefusedError("it is not of a class that has a fused step")
    forms = layer_forms(body, family)
    if forms is None:
        raise _RefusedError("a layer is not exactly that of its class (adapters, hooks, another activation)")
    known = _known.get(body)
    if known is not None and known.is_current() and known.has_modules_of(forms):
        return known
    if (dtype := forms[0].query.weight.dtype) not in _TOLERANCE:
        raise _RefusedError(f"{dtype} has no fused step")
    layers = []
    for form in forms:
        qkv, gate_up = fuse_linears([form.query, form.key, form.value]), fuse_linears([form.gate, form.up])
        if qkv is None or gate_up is None:
            raise _RefusedError("its weights are held by something else and cannot be joined")
        layers.append(_Layer(form, qkv, gate_up))
    made = DecodeLayers(body, family, layers, max_rows)
    if (difference := _difference(body, made, reference)) > _TOLERANCE[dtype]:
        raise _RefusedError(f"the fused step differs from them by {difference:.1g} of the largest value")
    _known[body] = made
    return made


@torch.no_grad()
def _difference(body: Any, layers: DecodeLayers, reference: PlainStep) -> float:
    """Largest difference of the hidden states of a few rows, as a share of the largest value."""
    weight = layers.first_weight
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    caches = [KVCache(_PROOF_ROWS[1], _PROOF_ROWS[0], weight.dtype, weight.device) for _ in range(2)]
    for _ in range(_PROOF_ROWS[0]):
        rows = torch.randn(_PROOF_ROWS[1], weight.shape[1], generator=generator)
        rows = rows.to(weight.device, weight.dtype)
        right = reference(body, rows, caches[0]).float()
        caches[1].begin_step(len(rows))
        found = layers.step(rows, caches[1]).float()
        caches[1].end_step()
        difference = (found - right).abs().max() / right.abs().max().clamp(min=1e-30)
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst
