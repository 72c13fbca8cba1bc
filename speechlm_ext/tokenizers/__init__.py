"""Tokenizers: text and sound to ids and back, behind one small protocol."""

from speechlm_ext.tokenizers.base import Tokenizer, load_tokenizer, register_tokenizer
from speechlm_ext.tokenizers.codecs.rvq import RVQConfig, RVQKMeansCodec
from speechlm_ext.tokenizers.mfcc_units import MFCCKMeans, SSLConfig
from speechlm_ext.tokenizers.set import TokenizerSet, require_equal_rates
from speechlm_ext.tokenizers.streaming import OverlapDecoder, StreamDecoder
from speechlm_ext.tokenizers.text.huggingface import HuggingFaceText
from speechlm_ext.tokenizers.text.sentencepiece import SentencePieceText, TextConfig
from speechlm_ext.tokenizers.units import EncoderKMeans, EncoderKMeansConfig

__all__ = [
    "EncoderKMeans",
    "EncoderKMeansConfig",
    "HuggingFaceText",
    "MFCCKMeans",
    "OverlapDecoder",
    "RVQConfig",
    "RVQKMeansCodec",
    "SSLConfig",
    "SentencePieceText",
    "StreamDecoder",
    "TextConfig",
    "Tokenizer",
    "TokenizerSet",
    "load_tokenizer",
    "register_tokenizer",
    "require_equal_rates",
]
