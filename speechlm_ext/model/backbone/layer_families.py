"""Which decoder layers the fused decode step computes, and what it reads of each from transformers' own modules.

A family is named by the exact classes of transformers: a subclass, a wrapped projection (LoRA, a quantized linear) or a
module with a hook computes something else, and its body decodes through transformers' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Family:
    """Classes that share one form of the layer."""

    prefix: str
    """Of the names of its classes: ``<prefix>Model``, ``<prefix>DecoderLayer``, …"""
    module: str
    """Where they are, below ``transformers.models``."""
    norms_after: bool = False
    """RMSNorm of what attention and MLP return (OLMo-2), instead of what they take."""
    rounds_last: bool = False
    """Its RMSNorm multiplies by the weight before it rounds to the tensor's type."""
    norm_over: Literal["head", "all"] = "head"
    """What an RMSNorm of queries and keys, where there is one, is over: one ``head``, or ``all`` together."""
    window_in_config: bool = False
    """The sliding window is in the configuration, not in the layer's attention."""

    def is_class(self, module: nn.Module, suffix: str) -> bool:
        """Whether a module is exactly of the family's class with this suffix."""
        cls = type(module)
        where = f"transformers.models.{self.module}"
        return cls.__module__ == where and cls.__qualname__ == self.prefix + suffix


FAMILIES = (
    Family("Llama", "llama.modeling_llama"),
    Family("Mistral", "mistral.modeling_mistral", window_in_config=True),
    Family("Qwen2", "qwen2.modeling_qwen2"),
    Family("Qwen3", "qwen3.modeling_qwen3"),
    Family("SmolLM3", "smollm3.modeling_smollm3"),
    Family("Olmo2", "olmo2.modeling_olmo2", norms_after=True, rounds_last=True, norm_over="all"),
)


@dataclass(frozen=True, eq=False)
class LayerForm:
    """One layer: its modules, and the numbers that its code reads from elsewhere."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention_norm: Any
    mlp_norm: Any
    query_norm: Any
    """RMSNorm of the queries, or None; ``key_norm`` of the keys."""
    key_norm: Any
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None
    has_rope: bool

    def linears(self) -> list[nn.Linear]:
        """All products of the layer."""
        return [self.query, self.key, self.value, self.output, self.gate, self.up, self.down]

    def is_same(self, other: LayerForm) -> bool:
        """Whether both consist of the same modules and numbers."""
        mine, others = vars(self).values(), vars(other).values()
        return all(
            a is b or (not isinstance(a, nn.Module) and a == b) for a, b in zip(mine, others, strict=True)
        )


def family_of(body: nn.Module) -> Family | None:
    """The family of a body; None for others."""
    return next((family for family in FAMILIES if family.is_class(body, "Model")), None)


def layer_forms(body: Any, family: Family) -> list[LayerForm] | None:
    """The layers of a body, in order; None if one is not exactly the family's."""
    if not family.is_class(body.norm, "RMSNorm") or not family.is_class(body.rotary_emb, "RotaryEmbedding"):
        return None
    forms = [_layer_form(layer, family) for layer in body.layers]
    if any(module_has_hooks(module) for module in [body.norm, body.rotary_emb]):
        return None
    known = [form for form in forms if form is not None]
    return known if len(known) == len(forms) == body.config.num_hidden_layers else None


def _layer_form(layer: Any, family: Family) -> LayerForm | None:
    if not family.is_class(layer, "DecoderLayer") or not family.is_class(layer.self_attn, "Attention"):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if not family.is_class(mlp, "MLP") or type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    if family.norms_after:
        norms = layer.post_attention_layernorm, layer.post_feedforward_layernorm
    else:
        norms = layer.input_layernorm, layer.post_attention_layernorm
    inner = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    window = attention.config if family.window_in_config else attention
    form = LayerForm(
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
        *norms,
        *inner,
        num_heads=attention.q_proj.out_features // attention.head_dim,
        num_kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_size=attention.head_dim,
        scale=float(attention.scaling),
        window=getattr(window, "sliding_window", None),
        has_rope=bool(getattr(attention, "use_rope", True)),
    )
    is_exact = (
        all(type(linear) is nn.Linear for linear in form.linears())
        and all(family.is_class(norm, "RMSNorm") for norm in norms)
        and (inner == (None, None) or all(family.is_class(norm, "RMSNorm") for norm in inner))
        and not any(module_has_hooks(module) for module in layer.modules())
    )
    return form if is_exact else None


def module_has_hooks(module: nn.Module) -> bool:
    """Whether a module's call does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
