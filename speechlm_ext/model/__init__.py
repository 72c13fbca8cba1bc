"""The speech language model: a causal LM of transformers as backbone, summed stream embeddings, one shared head."""

from speechlm_ext.model.config import FrameTransformerConfig, LossSettings, ModelConfig
from speechlm_ext.model.embedding import MultiStreamEmbedding
from speechlm_ext.model.lm import SpeechLMModel

__all__ = ["FrameTransformerConfig", "LossSettings", "ModelConfig", "MultiStreamEmbedding", "SpeechLMModel"]
