"""The backbone: the body of a transformers causal LM, run over packed rows and through the decoder's cache.

Axes: N packed positions, B slots, D hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from speechlm_ext.errors import CheckpointError, ConfigError, foreign_errors
from speechlm_ext.model.attention.kernels import NAME as ATTENTION
from speechlm_ext.model.attention.kernels import Packing, attention_context, choose_attention
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.backbone.decode_layers import decode_layers

#: Parts of the names of settings that make training random.
_NOISE = ("dropout", "pdrop", "layerdrop", "jitter")


class BackboneError(ConfigError):
    """A backbone whose numbers would differ from those of the pretrained model's own code."""


def backbone_settings(folder: str | Path) -> dict[str, Any]:
    """The transformers configuration of a local backbone folder as plain data.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"backbone {folder}: no transformers configuration there; expected a folder with config.json."
        )
    with foreign_errors(
        CheckpointError, f"backbone {folder}: its config.json cannot be used", "Copy the folder again."
    ):
        return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()


def make_config(settings: dict[str, Any]) -> PretrainedConfig:
    """The transformers configuration of ``settings``, without dropout and router noise.

    Nothing is random in training, so a run resumes exactly from weights, moments and a count of packs.

    Raises:
        ConfigError: the settings are not those of a model that transformers knows.
    """
    try:
        kind = settings["model_type"]
        config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"})
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            _unset(config, name)
    except Exception as error:  # each class of transformers checks in its own way
        raise ConfigError(
            f"the backbone's configuration does not make a transformers causal LM "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Give model_type and its settings, e.g. "
            "model_type: llama."
        ) from None
    config.use_cache = False
    for name in stochastic_settings(vars(config)):
        setattr(config, name, 0.0)
    return config


def stochastic_settings(settings: Mapping[str, Any]) -> dict[str, float]:
    """Dropout and router noise of a configuration, which :func:`make_config` switches off."""
    return {
        name: value
        for name, value in settings.items()
        if any(word in name for word in _NOISE) and isinstance(value, float) and value > 0
    }


def _unset(config: PretrainedConfig, name: str) -> None:
    """Remove a special id from a configuration: the vocabulary will be another one."""
    try:
        setattr(config, name, None)
    except Exception:  # a class that insists on a number checks it with an error of its own
        setattr(config, name, 0)


def text_body(model: Any) -> Any:
    """The body of a causal LM: all below its output layer."""
    return model.get_decoder() if model.base_model is model else model.base_model


def build_body(config: PretrainedConfig, vocab_size: int) -> nn.Module:
    """A new body with the ``speechlm`` attention, whose input is embeddings ``[B, T, D]``.

    Args:
        config: changed in place: it gets the vocabulary and the attention.
        vocab_size: V of the model, for classes that look at it; the body itself has no table.

    Raises:
        BackboneError: the class cannot be made of these settings.
    """
    config.vocab_size = vocab_size
    try:
        body = AutoModel.from_config(config, attn_implementation=ATTENTION)
        # The table is ours: the body is always given summed embeddings.
        body.set_input_embeddings(nn.Identity())
    except Exception as error:
        raise BackboneError(
            f"model type {config.model_type!r} cannot be a backbone: its body cannot be made with packed attention "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})."
        ) from None
    return body


def max_positions(config: PretrainedConfig) -> int:
    """Longest sequence whose positions do not depend on the lengths of its neighbours in a pack.

    Rotary embeddings that change with the longest position of a batch (``dynamic``, ``longrope``) do not change below
    the length that the model was first trained for.

    Raises:
        BackboneError: the configuration names no length.
    """
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(length, int):
        raise BackboneError(
            f"model type {config.model_type!r} names no longest sequence (max_position_embeddings)."
        )
    return min(length, stable_rope_length(config) or length)


def stable_rope_length(config: PretrainedConfig) -> int | None:
    """Rows up to which rotary embeddings do not depend on the longest sequence of a batch; None where they never do."""
    limits = []
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        if part.get("rope_type") in ("dynamic", "longrope"):
            first = part.get("original_max_position_embeddings")
            first = first or getattr(config, "original_max_position_embeddings", None)
            limits.append(min(int(x) for x in (first, config.max_position_embeddings) if x))
    return min(limits, default=None)


# ---- forward --------------------------------------------------------------------------------------------------------
def _check_length(config: PretrainedConfig, longest: int) -> int | None:
    """:func:`stable_rope_length`; raises :class:`ConfigError` where a sequence of the call is longer: all would get
    other rotary embeddings."""
    limit = stable_rope_length(config)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a sequence has {longest} rows, but the rotary embeddings of backbone {config.model_type!r} change beyond "
            f"{limit} rows, for all sequences of a batch. Use sequences of at most {limit} rows."
        )
    return limit


def _run(body: nn.Module, embedded: Tensor, position: Tensor, **where: Any) -> Tensor:
    with attention_context(**where):
        out = body(inputs_embeds=embedded, position_ids=position, use_cache=False, **where)
    return out.last_hidden_state


def run_packed(
    body: nn.Module,
    embedded_ND: Tensor,
    position_N: Tensor,
    cu_seqlens: Tensor,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """Last hidden states ``[N, D]`` of a packed row; see :meth:`SpeechLMModel.hidden`.

    Args:
        bounds: ``cu_seqlens`` on the host; None reads them, which waits for a GPU.

    Raises:
        ConfigError: a sequence exceeds :func:`stable_rope_length`, as in :func:`run_prefill` and :func:`run_step`;
            ``bounds`` of another number of sequences or rows.
    """
    if bounds is not None and (len(bounds), bounds[-1]) != (len(cu_seqlens), len(embedded_ND)):
        raise ConfigError(
            f"a packed row has {len(embedded_ND)} positions and {len(cu_seqlens) - 1} sequences, but its facts on the "
            f"host are of {bounds[-1]} and {len(bounds) - 1}. Read them from the same batch: HostFacts.read(batch)."
        )
    kernel, _ = choose_attention(embedded_ND.device, embedded_ND.dtype)
    packing = Packing.build(cu_seqlens, kernel, bounds)
    _check_length(body.config, packing.max_seqlen)
    return _run(body, embedded_ND[None], position_N[None].long(), packing=packing)[0]


def run_prefill(
    body: nn.Module, embedded_ND: Tensor, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """Hidden states ``[N, D]`` of rows appended to ``slots``; see :meth:`SpeechLMModel.prefill`."""
    num_rows = (cache.held[slot] + length for slot, length in zip(slots, lengths, strict=True))
    _check_length(body.config, max(num_rows, default=0))
    bounds = list(itertools.accumulate(lengths, initial=0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=embedded_ND.device)
    kernel, _ = choose_attention(embedded_ND.device, embedded_ND.dtype)
    packing = Packing.build(cu_seqlens, kernel, bounds)
    position_N = cache.begin_prefill(slots, lengths, packing)
    out_ND = _run(body, embedded_ND[None], position_N[None], kv=cache)[0]
    cache.end_prefill()
    return out_ND


def run_step(body: nn.Module, embedded_BD: Tensor, cache: KVCache) -> Tensor:
    """Hidden states ``[B, D]`` of one more row of each slot; see :meth:`SpeechLMModel.step_hidden`.

    Fused layers compute it where the backbone has them (``decode_layers.py``), else transformers' own.
    """
    limit = _check_length(body.config, cache.longest(len(embedded_BD)) + 1)
    _prepare_layers(body, cache, limit)
    if cache.layers is None:
        return plain_step(body, embedded_BD, cache)
    cache.begin_step(len(embedded_BD), limit)
    out_BD = cache.layers.step(embedded_BD, cache)
    cache.end_step()
    return out_BD


def run_inner_step(body: nn.Module, embedded_BD: Tensor, cache: Any, inner: int) -> Tensor:
    """:func:`run_step` of a body whose rows are all at position ``inner`` of a :class:`FrameCache`."""
    _prepare_layers(body, cache, None)
    cache.begin_inner(len(embedded_BD), inner)
    if cache.layers is None:
        return _run(body, embedded_BD[:, None], cache.step.position[:, None], kv=cache)[:, 0]
    return cache.layers.step(embedded_BD, cache)


def _prepare_layers(body: nn.Module, cache: KVCache, max_rows: int | None) -> None:
    if not cache.has_layers or (cache.layers is not None and not cache.layers.is_current()):
        cache.layers, cache.has_layers = decode_layers(body, plain_step, max_rows), True


def plain_step(body: nn.Module, embedded_BD: Tensor, cache: KVCache) -> Tensor:
    """:func:`run_step` through transformers' own layers."""
    position_B = cache.begin_step(len(embedded_BD), stable_rope_length(body.config))
    out_BD = _run(body, embedded_BD[:, None], position_B[:, None], kv=cache)[:, 0]
    cache.end_step()
    return out_BD
