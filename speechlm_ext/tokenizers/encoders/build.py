"""The encoder of a name."""

from __future__ import annotations

import torch

from speechlm_ext.tokenizers.encoders.signal import SignalEncoder
from speechlm_ext.tokenizers.encoders.spec import EncoderSpec, FeatureEncoder


def build_encoder(
    spec: EncoderSpec | str, *, frames_per_token: int = 1, device: str | torch.device = "cpu"
) -> FeatureEncoder:
    """Make the encoder that ``spec`` names.

    Args:
        spec: as a string (see :mod:`.spec`) or parsed.
        frames_per_token: with a string, frames averaged to one.
        device: where a model runs; ``mfcc`` and ``log-mel`` always run on the CPU.

    Raises:
        ConfigError: an encoder that is not known.
        TokenizerError: the model is missing, damaged, of a family that is not supported, or has no such layer.
    """
    if isinstance(spec, str):
        spec = EncoderSpec.parse(spec, frames_per_token)
    if spec.kind != "hf":
        return SignalEncoder(spec)
    from speechlm_ext.tokenizers.encoders.huggingface import HFEncoder  # which loads transformers

    return HFEncoder(spec, device=device)
