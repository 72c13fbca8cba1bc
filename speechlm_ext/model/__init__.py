"""The speech language model: a causal LM of transformers as backbone, summed stream embeddings, one shared head."""

from typing import Any

from speechlm_ext.model.config import FrameTransformerConfig, LossSettings, ModelConfig
from speechlm_ext.model.embedding import MultiStreamEmbedding
from speechlm_ext.model.host_facts import HostFacts
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.utils.moved import moved_name

__all__ = [
    "FrameTransformerConfig",
    "HostFacts",
    "LossSettings",
    "ModelConfig",
    "MultiStreamEmbedding",
    "SpeechLMModel",
]


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
