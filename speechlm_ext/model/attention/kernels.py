"""Attention over packed rows, and the choice of its kernel.

Order of choice on a GPU: flash-attn varlen, torch's ``varlen_attn``, SDPA. On the CPU: this package's
``packed_attention`` for float32, SDPA. All but SDPA read the packed row as it is; SDPA gathers the sequences into
padded groups of similar length, so that its cost follows the sequences and not the square of the pack. All are
registered with transformers as one attention implementation, ``speechlm``. Layers whose rule (``scores.py``) a kernel
cannot compute run on SDPA; the log says so.

Axes: N packed positions, H heads, G key/value heads, E head size, B sequences of a group, T its longest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from speechlm_ext.errors import ConfigError
from speechlm_ext.model.attention.packing import Gather, Packing, Ungather
from speechlm_ext.model.attention.scores import ScoreRule, causal_mask, dense_attention
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.packed_layer import ATTENTION_LANES
from speechlm_ext.ops.packed_layer import packed_attention as causal_rows

NAME = "speechlm"
logger = logging.getLogger("speechlm_ext")


class AttentionCache(Protocol):
    """Keys and values of earlier rows, such as a :class:`KVCache`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
        """Store one layer's new keys and values and attend to all; shapes as in :func:`speechlm_attention`."""
        ...


def choose_attention(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The attention kernel for packed rows, ``flash-attn``, ``varlen_attn``, ``packed`` or ``sdpa``, and the reason."""
    return _choose(torch.device(device).type, dtype)


@functools.cache
def _choose(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    if device_type == "cpu" and dtype == torch.float32:
        if native.simd_available() == ["generic"]:
            return "sdpa", "this processor has no AVX2; SDPA over padded groups of sequences"
        return "packed", "no CUDA device in use (cpu); the package's own kernel"
    if device_type != "cuda":
        return "sdpa", f"no CUDA device in use ({device_type}, {dtype}); SDPA over padded groups of sequences"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"variable-length kernels take fp16 or bf16, not {dtype}; train in bf16 to use them"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash-attn", "flash_attn is installed"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "varlen_attn", "flash_attn is not installed; torch has varlen_attn"
    return (
        "sdpa",
        "neither flash_attn nor torch's varlen_attn is installed; pip install 'speechlm_ext[flash]' for speed",
    )


def _grouped_sdpa(q_NHE: Tensor, k_NGE: Tensor, v_NGF: Tensor, packing: Packing, rule: ScoreRule) -> Tensor:
    """Causal attention inside each sequence; returns ``[N, H, F]``."""
    unpad = packing.pad()
    heads = (q_NHE.shape[1], k_NGE.shape[1], v_NGF.shape[1])
    rows = torch.cat([rows for rows, _ in packing.groups])
    if q_NHE.shape[-1] == v_NGF.shape[-1]:
        padded = Gather.apply(torch.cat((q_NHE, k_NGE, v_NGF), dim=1), rows, unpad).split(heads, dim=1)
    else:
        padded = tuple(Gather.apply(x, rows, unpad) for x in (q_NHE, k_NGE, v_NGF))
    outputs, base = [], 0
    for group, T in packing.groups:
        q, k, v = (x[base : base + group.numel()].unflatten(0, (-1, T)).transpose(1, 2) for x in padded)
        mask = None
        if rule.window is not None and rule.window < T:
            mask = causal_mask(torch.arange(T, device=q.device), T, rule.window)
        outputs.append(dense_attention(q, k, v, rule, mask).transpose(1, 2).flatten(0, 1))
        base += group.numel()
    return Ungather.apply(torch.cat(outputs), unpad)


def packed_attention(
    q_NHE: Tensor, k_NGE: Tensor, v_NGF: Tensor, packing: Packing, rule: ScoreRule
) -> Tensor:
    """Causal attention inside each sequence of a packed row.

    Args:
        q_NHE, k_NGE, v_NGF: float ``[N, H, E]``, ``[N, G, E]``, ``[N, G, F]``; H a multiple of G.
        packing: the sequences of the row.
        rule: the layer's scores.

    Returns:
        float ``[N, H, F]``.
    """
    kernel, _ = choose_attention(q_NHE.device, q_NHE.dtype)
    if kernel != "sdpa" and (unsupported := _unsupported(kernel, rule, q_NHE.shape[-1], v_NGF.shape[-1])):
        _log_once(
            f"attention: {kernel} cannot do {unsupported}; these layers run on SDPA over padded sequences"
        )
        kernel = "sdpa"
    if kernel == "sdpa":
        if not rule.is_plain:
            _log_once(
                f"attention: SDPA cannot do {replace(rule, window=None).describe()}; these layers compute their scores "
                "by explicit products and softmax, with those of a group of sequences in memory"
            )
        return _grouped_sdpa(q_NHE, k_NGE, v_NGF, packing, rule)
    if kernel == "packed":
        return causal_rows(q_NHE, k_NGE, v_NGF, packing.cu_seqlens, rule.scale, rule.window)
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    if kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        window = (-1, -1) if rule.window is None else (rule.window - 1, 0)
        return flash_attn_varlen_func(
            q_NHE, k_NGE, v_NGF, cu, cu, longest, longest, softmax_scale=rule.scale, causal=True,
            window_size=window, softcap=rule.softcap or 0.0,
        )  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, object] = {}
    if (repeat := q_NHE.shape[1] // k_NGE.shape[1]) > 1:
        if _varlen_takes("enable_gqa"):
            options["enable_gqa"] = True
        else:
            k_NGE, v_NGF = k_NGE.repeat_interleave(repeat, 1), v_NGF.repeat_interleave(repeat, 1)
    # The first releases of varlen_attn had is_causal; later ones have window_size instead.
    if _varlen_takes("window_size"):
        options |= {"scale": rule.scale, "window_size": (-1 if rule.window is None else rule.window - 1, 0)}
    else:
        q_NHE = q_NHE * (rule.scale * q_NHE.shape[-1] ** 0.5)
        options["is_causal"] = True
    return varlen_attn(q_NHE, k_NGE, v_NGF, cu, cu, longest, longest, **options)


@functools.cache
def _varlen_takes(name: str) -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return name in inspect.signature(varlen_attn).parameters


def _unsupported(kernel: str, rule: ScoreRule, key_size: int, value_size: int) -> str:
    """Parts of ``rule`` that a kernel of packed rows cannot compute; empty if it can compute all."""
    unsupported = []
    if key_size != value_size:
        unsupported.append(f"heads of {key_size} for keys and {value_size} for values")
    if rule.sinks_H is not None:
        unsupported.append("attention sinks")
    if kernel != "flash-attn" and rule.softcap is not None:
        unsupported.append("capped scores")
    if kernel == "varlen_attn" and rule.window is not None and not _varlen_takes("window_size"):
        unsupported.append("a sliding window")
    if kernel == "packed" and key_size % ATTENTION_LANES:
        unsupported.append(f"heads of {key_size}, no multiple of {ATTENTION_LANES}")
    return " and ".join(unsupported)


def _log_once(message: str) -> None:
    if _current.rules is None and message not in _logged:  # not for the small model of a probe
        _logged.add(message)
        logger.info("%s", message)


_logged: set[str] = set()


# ---- the backbone's attention ---------------------------------------------------------------------------------------
class _Current(threading.local):
    """Pack or cache that the attention of this thread reads."""

    packing: Packing | None = None
    kv: AttentionCache | None = None
    rules: set[str] | None = None


_current = _Current()


@contextlib.contextmanager
def attention_context(packing: Packing | None = None, kv: AttentionCache | None = None) -> Iterator[None]:
    """Context in which a backbone's attention reads this pack or cache, also in classes that do not pass keywords on.

    The forward call has the same values as keywords, for classes that do: they also reach a layer that activation
    checkpointing recomputes in the backward pass, after this block has ended.
    """
    before = _current.packing, _current.kv
    _current.packing, _current.kv = packing, kv
    try:
        yield
    finally:
        _current.packing, _current.kv = before


@contextlib.contextmanager
def recorded_rules() -> Iterator[set[str]]:
    """Set of the attention rules beyond plain causal attention that layers use while the block runs."""
    found: set[str] = set()
    _current.rules = found
    try:
        yield found
    finally:
        _current.rules = None


def speechlm_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    kv: AttentionCache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The ``speechlm`` implementation for transformers: over a pack, or through the decoder's cache.

    Args:
        query, key, value: ``[B, H, T, E]``, ``[B, G, T, E]``, ``[B, G, T, F]``; B is 1 for a packed row, and T is 1
            in a step of the cache.
        attention_mask: None; the pack or cache defines the visible keys.
        scaling, sliding_window, softcap, s_aux: as in :class:`ScoreRule`, under the names of transformers.

    Returns:
        ``([B, T, H, F], None)``.

    Raises:
        ConfigError: there is neither a pack nor a cache: activation checkpointing of a class that does not pass the
            forward's keywords to its attention.
    """
    if packing is None and kv is None:
        packing, kv = _current.packing, _current.kv
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    if _current.rules is not None:
        _current.rules.add(rule.describe())
    if kv is not None:
        return kv.attend(module.layer_idx, query, key, value, rule), None  # type: ignore[arg-type]
    if packing is None:
        raise ConfigError(
            f"{type(module).__name__} was called outside a SpeechLM's forward: its class does not pass the pack on. "
            "With such a backbone leave activation_checkpointing out."
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # A compiled layer breaks here, into a graph before the attention and one behind it: its Python depends on the pack.
    attend = _uncompiled if torch.compiler.is_compiling() else packed_attention
    return attend(q, k, v, packing, rule).unsqueeze(0), None


_uncompiled = torch.compiler.disable(packed_attention)


AttentionInterface.register(NAME, speechlm_attention)
