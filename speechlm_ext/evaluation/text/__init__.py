"""Word error rate: normalization of words and numbers, and alignment."""

from speechlm_ext.evaluation.text.word_errors import align, cer, normalize, wer
from speechlm_ext.evaluation.text.words import tokens

__all__ = ["align", "cer", "normalize", "tokens", "wer"]
