"""Tiny speech encoders with random weights, saved as their users have them: one folder each, safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

#: Small enough to build in milliseconds; the convolutions are the real ones, since they decide the frames.
_SMALL = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
_CONVOLUTIONS = dict(conv_dim=(16,) * 7)
WHISPER = dict(
    d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=1,
    decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=60, num_mel_bins=80, max_target_positions=16,
    pad_token_id=50, bos_token_id=50, eos_token_id=50, decoder_start_token_id=51,
)  # fmt: skip


def make(kind: str, folder: Path) -> tuple[Any, Any]:
    """Save a tiny random model of ``kind`` into ``folder``; returns the model (evaluation mode) and its extractor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, extractor = _BUILDERS[kind]()
    model.eval()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor


def _normed(model: Any, do_normalize: bool = True) -> tuple[Any, Any]:
    return model, hf.Wav2Vec2FeatureExtractor(do_normalize=do_normalize)


def _bert() -> tuple[Any, Any]:
    config = hf.Wav2Vec2BertConfig(**_SMALL, feature_projection_input_dim=160, conv_depthwise_kernel_size=7)
    return hf.Wav2Vec2BertModel(config), hf.SeamlessM4TFeatureExtractor()


_BUILDERS = {
    "hubert": lambda: _normed(hf.HubertModel(hf.HubertConfig(**_SMALL, **_CONVOLUTIONS)), False),
    "hubert-stable": lambda: _normed(
        hf.HubertModel(
            hf.HubertConfig(
                **_SMALL,
                **_CONVOLUTIONS,
                do_stable_layer_norm=True,
                feat_extract_norm="layer",
                conv_bias=True,
            )
        )
    ),
    "wav2vec2": lambda: _normed(hf.Wav2Vec2Model(hf.Wav2Vec2Config(**_SMALL, **_CONVOLUTIONS))),
    "wav2vec2-ctc": lambda: _normed(
        hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**_SMALL, **_CONVOLUTIONS, vocab_size=9))
    ),
    "wavlm": lambda: _normed(hf.WavLMModel(hf.WavLMConfig(**_SMALL, **_CONVOLUTIONS))),
    "wav2vec2-bert": _bert,
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        hf.WhisperFeatureExtractor(),
    ),
}
