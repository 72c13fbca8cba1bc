"""Text transforms of a causal LM: scales, cap and bias on embeddings and logits, measured on the model itself.

Between ids, body and text logits a causal LM may have more than two plain tables: embeddings may be scaled (Gemma),
logits scaled (Granite, Cohere), capped (Gemma 2) or biased (Phi). :class:`TextTransforms` records them, so that the
text part of a SpeechLM computes the pretrained model's logits. ``proof.py`` compares the two.

Axes: T rows, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from speechlm_ext.model.backbone.body import BackboneError, text_body


@dataclass(frozen=True)
class TextTransforms:
    """The steps of a causal LM from ids to body, and from body to logits, besides its two tables."""

    embed_scale: float = 1.0
    """Factor on the rows of the input table."""
    logit_scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """Soft bound on the logits, ``softcap · tanh(logits / softcap)``."""
    has_bias: bool = False
    """Whether the output layer has a bias."""

    @property
    def is_plain(self) -> bool:
        """Whether there are only the two tables."""
        return self == TextTransforms()

    def to_logits(self, logits: Tensor) -> Tensor:
        """Logits from the output of the output layer, its bias included."""
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@torch.no_grad()
def measure_transforms(model: Any, ids_T: Tensor) -> TextTransforms:
    """Measure the text transforms of a causal LM.

    Args:
        model: a transformers causal LM in float32, in evaluation mode.
        ids_T: int64 ``[T]``, a few ids.

    Raises:
        BackboneError: :class:`TextTransforms` cannot express one of its steps.
    """
    body, kind = text_body(model), model.config.model_type
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(getattr(table, "weight", None), Tensor):
        raise BackboneError(f"model type {kind!r} has no input table of text ids.")
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise BackboneError(f"model type {kind!r} has no output table of text ids.")
    right_TD = body(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
    rows = table.weight[ids_T][None]

    def explains(scale: float) -> bool:
        return _close(body(inputs_embeds=rows * scale, use_cache=False).last_hidden_state[0], right_TD)

    embed_scale = next(filter(explains, _scales(model, ids_T)), None)
    if embed_scale is None:
        raise BackboneError(
            f"model type {kind!r} does more to ids than scale the rows of a table before its first layer."
        )
    logits = model(input_ids=ids_T[None], use_cache=False).logits[0]
    bias = getattr(head, "bias", None)
    if right_TD.shape[-1] != head.weight.shape[1]:
        raise BackboneError(
            f"model type {kind!r} has an output table of width {head.weight.shape[1]} behind states of width "
            f"{right_TD.shape[-1]}."
        )
    plain = right_TD @ head.weight.T + (0 if bias is None else bias)
    measured = float((logits * plain).sum() / (plain * plain).sum())
    scales = [1.0, _snap(measured, model.config)]
    scales += [f for n in _numbers(model.config, ("scal", "multiplier")) if n > 0 for f in (n, 1 / n)]
    best = (math.inf, TextTransforms())
    for softcap in [None, *(c for c in _numbers(model.config, ("cap",)) if c > 0)]:
        for scale in scales:
            transforms = TextTransforms(embed_scale, scale, softcap, bias is not None)
            off = float((transforms.to_logits(plain) - logits).abs().max())
            best = min(best, (off, transforms), key=lambda pair: pair[0])
    if best[0] <= 1e-4 * float(logits.abs().max()):
        return best[1]
    raise BackboneError(
        f"model type {kind!r} does more to its last states than a product with a table, a bias, a scale and a soft cap."
    )


def _scales(model: Any, ids_T: Tensor) -> Iterator[float]:
    """Candidate factors on the rows of the input table."""
    table = model.get_input_embeddings()
    rows = table.weight[ids_T]
    yield 1.0
    found = table(ids_T)
    if found.shape == rows.shape:
        yield _snap(float((found * rows).sum() / (rows * rows).sum()), model.config)
    yield from _numbers(model.config, ("embed", "scale", "multiplier"))
    yield math.sqrt(rows.shape[1])


def _numbers(config: PretrainedConfig, words: Sequence[str]) -> list[float]:
    """Numbers of a configuration whose names contain one of ``words``."""
    return [
        float(value)
        for name, value in vars(config).items()
        if any(word in name for word in words)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ]


def _snap(measured: float, config: PretrainedConfig) -> float:
    """The configuration's number, inverse or root closest to ``measured``; ``measured`` itself if none is close."""
    candidates = [1.0]
    for value in _numbers(config, ("",)):
        if value > 0:
            candidates += [value, 1 / value, math.sqrt(value)]
    best = min(candidates, key=lambda c: abs(c - measured))
    return best if abs(best - measured) <= 1e-4 * abs(measured) else measured


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())
