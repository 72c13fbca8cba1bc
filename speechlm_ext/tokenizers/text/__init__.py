"""Text tokenizers."""

from speechlm_ext.tokenizers.text.huggingface import HuggingFaceText
from speechlm_ext.tokenizers.text.sentencepiece import SentencePieceText, TextConfig

__all__ = ["HuggingFaceText", "SentencePieceText", "TextConfig"]
