"""Compares a backbone with the pretrained model's own code, and names the first difference.

The reference is the causal LM of transformers with its plain (``eager``) attention, in float32. The comparison covers
the text logits of two short segments: each alone, both in one pack, with another last token, and decoded step by step
through the cache. Before its weights are loaded, a backbone is probed as a small random model of its own configuration:
few layers, and windows shorter than the segments.

Axes: T rows of a segment, N packed rows, D hidden, V text ids.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModelForCausalLM, PretrainedConfig

from speechlm_ext.model.attention.kernels import recorded_rules
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.backbone.body import (
    BackboneError,
    build_body,
    make_config,
    max_positions,
    run_packed,
    run_prefill,
    run_step,
    text_body,
)
from speechlm_ext.model.backbone.transforms import TextTransforms, measure_transforms

#: Largest difference, as a share of the largest logit.
TOLERANCE = 1e-4
#: Rows of the two segments. The first is longer than the windows of a small model.
LENGTHS = (12, 9)
_HEAD_GAIN = 8.0
_MAX_VALUES = 2_000_000_000
_SMALL_WINDOW, _SMALL_WIDTH, _SMALL_EXPERTS, _SMALL_VOCAB, _SMALL_CAP = 5, 64, 8, 64, 1.0


@dataclass(frozen=True)
class BackboneFacts:
    """Properties of a configuration, known before its weights are loaded."""

    transforms: TextTransforms
    rules: tuple[str, ...] = ()
    """Parts of its attention beyond plain causal softmax, in words."""


@torch.no_grad()
def first_difference(
    pretrained: Any,
    body: nn.Module,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    num_text: int,
) -> str | None:
    """Compare with the pretrained model's own logits.

    Args:
        pretrained: the causal LM, float32, evaluation mode, ``eager`` attention.
        body: ours, with the same weights.
        embed: text ids int64 ``[N]`` to the body's input ``[N, D]``.
        logits: hidden states ``[N, D]`` to text logits ``[N, V]``.
        num_text: V; the pretrained model may have more ids.

    Returns:
        The first difference in words, or None.
    """
    device = next(body.parameters()).device
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, num_text, (n,), generator=generator).to(device) for n in LENGTHS)
    other = torch.cat((a[:-1], (a[-1:] + 1) % num_text))

    def right(ids_T: Tensor) -> Tensor:
        return pretrained(input_ids=ids_T[None], use_cache=False).logits[0, :, :num_text].float()

    def ours(*segments: Tensor) -> Tensor:
        position_N = torch.cat([torch.arange(len(s), device=device) for s in segments])
        bounds = torch.tensor([0, *map(len, segments)], device=device).cumsum(0).to(torch.int32)
        return logits(run_packed(body, embed(torch.cat(segments)), position_N, bounds)).float()

    right_a, right_b, right_other = right(a), right(b), right(other)
    if not torch.isfinite(right_a).all():
        return "its own logits are not finite"
    if mismatch := _mismatch(right_other[:-1], right_a[:-1]):
        return f"in its own code a token changes the logits before it ({mismatch})"
    found_a = ours(a)
    if mismatch := _mismatch(found_a, right_a) or _mismatch(ours(b), right_b):
        return f"the logits of one segment differ from its own code's ({mismatch})"
    if mismatch := _mismatch(ours(other)[:-1], found_a[:-1]):
        return f"a token changes the logits before it ({mismatch})"
    if mismatch := _mismatch(ours(b, a), torch.cat((right_b, right_a))):
        return f"in a pack the logits of a segment depend on its neighbour ({mismatch})"
    if mismatch := _mismatch(_decoded(body, embed, logits, a, b), torch.cat((right_a, right_b))):
        return f"the logits of rows decoded step by step differ from those of the whole ({mismatch})"
    return None


def _decoded(
    body: nn.Module, embed: Callable[..., Tensor], logits: Callable[..., Tensor], a: Tensor, b: Tensor
) -> Tensor:
    """Logits of both segments: the first rows as prompt, two more as a second prompt, the rest step by step."""
    weight = next(body.parameters())
    cache = KVCache(2, 4, weight.dtype, weight.device)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    starts = (4, 3)
    for first, last in ((0, starts[0]), (starts[0], starts[0] + 2)):
        pieces = (a[first:last], b[max(0, first - 1) : last - 1])
        out = run_prefill(body, embed(torch.cat(pieces)), cache, [0, 1], [len(p) for p in pieces])
        for part, rows in zip(parts, out.split([len(p) for p in pieces]), strict=True):
            part.append(rows)
    at = [starts[0] + 2, starts[1] + 2]
    while at[0] < len(a):
        ids = torch.stack((a[at[0]], b[min(at[1], len(b) - 1)]))
        out = run_step(body, embed(ids), cache)
        parts[0].append(out[:1])
        if at[1] < len(b):
            parts[1].append(out[1:])
        at = [at[0] + 1, at[1] + 1]
    return logits(torch.cat([*parts[0], *parts[1]])).float()


def _mismatch(found: Tensor, right: Tensor) -> str:
    """Largest difference between two logits, in words; empty within the tolerance."""
    difference = float((found - right).abs().max()) / max(float(right.abs().max()), 1e-30)
    return "" if difference <= TOLERANCE else f"by {difference:.1g} of the largest"


# ---- a small model of the same configuration ------------------------------------------------------------------------
def probe_backbone(settings: dict[str, Any], *, verify: bool = True) -> BackboneFacts:
    """Compare a small random model of a backbone's configuration with the class's own code.

    Args:
        settings: the transformers configuration as plain data.
        verify: False only measures the text transforms.

    Raises:
        BackboneError: the class cannot be carried exactly; the message names the model type and the difference.
        ConfigError: the settings are not those of a model that transformers knows.
    """
    found = _probe(json.dumps(settings, sort_keys=True, default=str), verify)
    if isinstance(found, BackboneFacts):
        return found
    raise BackboneError(
        f"{found} A SpeechLM on it would not be the model that it is named after. docs/training.md lists the model "
        "types that are carried exactly; model.verify_backbone: false skips the check."
    )


@functools.lru_cache(maxsize=256)
def _probe(text: str, verify: bool) -> BackboneFacts | str:
    settings = json.loads(text)
    kind = settings.get("model_type")
    config = make_config(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            small, pretrained = _small_model(config)
            num_text = pretrained.config.vocab_size
            transforms = measure_transforms(pretrained, torch.arange(3, 3 + LENGTHS[1]))
        except BackboneError as error:
            return str(error) if verify else BackboneFacts(TextTransforms())
        except Exception as error:  # classes of all kinds, each with its own ways to fail
            if not verify:
                return BackboneFacts(TextTransforms())
            return f"model type {kind!r} cannot be tried as a backbone ({_reason(error)})."
        if not verify:
            return BackboneFacts(transforms)
        try:
            with recorded_rules() as rules:
                body = build_body(small, num_text).eval()
                _copy_weights(pretrained, body)
                different = first_difference(
                    pretrained, body, *_text_functions(pretrained, transforms), num_text
                )
            if different is None:
                max_positions(config)
        except BackboneError as error:
            return str(error)
        except Exception as error:
            return f"model type {kind!r} does not run over packed rows ({_reason(error)})."
    if different is not None:
        return f"model type {kind!r}: {different}."
    return BackboneFacts(transforms, tuple(sorted(rules - {""})))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _text_functions(
    pretrained: Any, transforms: TextTransforms
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``embed`` and ``logits`` of :func:`first_difference`, from a causal LM's own tables."""
    table, head = pretrained.get_input_embeddings().weight, pretrained.get_output_embeddings()

    def embed(ids_N: Tensor) -> Tensor:
        return table[ids_N] * transforms.embed_scale

    def logits(hidden_ND: Tensor) -> Tensor:
        return transforms.to_logits(nn.functional.linear(hidden_ND, head.weight, getattr(head, "bias", None)))

    return embed, logits


def _copy_weights(pretrained: Any, body: nn.Module) -> None:
    source = text_body(pretrained)
    if type(source) is not type(body):
        raise BackboneError(
            f"model type {pretrained.config.model_type!r}: its causal LM has a body of class {type(source).__name__}, "
            f"not {type(body).__name__}; it is not a text decoder alone."
        )
    state = {k: v for k, v in source.state_dict().items() if k in body.state_dict()}
    body.load_state_dict(state, strict=True)


def _small_model(config: PretrainedConfig) -> tuple[PretrainedConfig, Any]:
    """A causal LM of the same kind, with few layers and random weights large enough that every part shows."""
    others = [
        name for name in getattr(config, "sub_configs", {}) if re.search(r"vision|audio|image|encoder", name)
    ]
    if others:
        raise BackboneError(
            f"model type {config.model_type!r} holds other models beside its text decoder ({', '.join(others)}); where "
            "there is one, take the model type of its text part."
        )
    if type(config) not in MODEL_MAPPING:
        raise BackboneError(
            f"model type {config.model_type!r} has no body that transformers could make alone."
        )
    problem: Exception | None = None
    for shrink_all in (True, False):
        small = _shrunk(config, shrink_all)
        try:
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(copy.deepcopy(small), attn_implementation="eager")
            size = sum(p.numel() for p in empty.parameters())
            if size > _MAX_VALUES:
                raise MemoryError(f"two layers of it have {size / 1e9:.1f} billion values")
            # A copy: the attention that a class is to use is written into its configuration.
            own = copy.deepcopy(small)
            model = AutoModelForCausalLM.from_config(own, attn_implementation="eager").float().eval()
        except Exception as error:
            problem = problem or error
            continue
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.15
                parameter.add_(torch.randn_like(parameter) * spread)
            if (head := model.get_output_embeddings()) is not None:
                head.weight.mul_(_HEAD_GAIN)  # so that a soft cap on the logits shows
        return small, model
    assert problem is not None
    raise problem


def _shrunk(config: PretrainedConfig, all_sizes: bool) -> PretrainedConfig:
    small = copy.deepcopy(config)
    small.vocab_size = min(_SMALL_VOCAB, int(getattr(config, "vocab_size", _SMALL_VOCAB)))
    num_layers = getattr(config, "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > 2:
        kinds = getattr(config, "layer_types", None) or ["any"] * num_layers
        kept = next(n for n in range(2, num_layers + 1) if set(kinds[:n]) == set(kinds))
        for name, value in list(vars(small).items()):
            if isinstance(value, (list, tuple)) and len(value) == num_layers:
                setattr(small, name, value[:kept])
        small.num_hidden_layers = kept
    for name, value in list(vars(small).items()):
        if "attn" in name and "cap" in name and isinstance(value, float):
            setattr(small, name, min(value, _SMALL_CAP))
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"):
            setattr(small, name, min(value, _SMALL_WINDOW))
        elif all_sizes and re.search(r"intermediate_size|ffn_dim|ffn_hidden_size|n_inner", name):
            setattr(small, name, min(value, _SMALL_WIDTH))
        elif all_sizes and re.fullmatch(r"num_(local_)?experts|n_routed_experts|moe_num_experts", name):
            setattr(small, name, min(value, _SMALL_EXPERTS))
    return small
