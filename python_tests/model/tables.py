"""Large random tables, so that logits of tiny models differ."""

from __future__ import annotations

from torch import nn

from speechlm_ext.model import SpeechLMModel


def init_tables(model: SpeechLMModel, std: float) -> None:
    """Draw embedding, head and stream vectors from N(0, std²); the pad's row is zero."""
    model.embedding.reset_parameters(std)
    if not model.config.tie_head:
        nn.init.normal_(model.head.weight, std=std)
    if model.head.stream_embed is not None:
        nn.init.normal_(model.head.stream_embed, std=std)
