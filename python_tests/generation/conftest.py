"""A tiny random model with real tokenizers, fitted once on synthetic audio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from python_tests.generation.engine.recorded_graphs import recorded  # noqa: F401 - a fixture of these folders
from python_tests.model.tables import init_tables
from speechlm_ext import SpeechLM
from speechlm_ext.model import FrameTransformerConfig, ModelConfig
from speechlm_ext.tasks import builtin_tasks
from speechlm_ext.tokenizers import (
    MFCCKMeans,
    RVQConfig,
    RVQKMeansCodec,
    SentencePieceText,
    SSLConfig,
    TextConfig,
    TokenizerSet,
)

TASKS = (
    "codec_ssl_plain_tts",
    "codec_ssl_tts",
    "codec_ssl_asr",
    "textlm",
    "codec_ssl_audiolm",
    "ssl_audiolm",
)
RATE = 16000


def make_wave(seconds: float = 0.5, seed: int = 0) -> np.ndarray:
    """A gliding tone with noise: float32 ``[n]`` at 16 kHz."""
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * (150 + 40 * seed + 300 * t) * t)
    return (0.3 * tone + 0.05 * rng.standard_normal(len(t))).astype(np.float32)


FRAME = FrameTransformerConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)


def make_model(
    layout, tokenizers=None, tasks=TASKS, seed=0, positions=256, frame=None, num_layers=2
) -> SpeechLM:
    """A random Llama of width 32 in fp32, with rows drawn large enough that its choices are clear.

    ``frame``: settings of a frame transformer, whose part of the hidden states is as large as the backbone's.
    """
    backbone = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
    }
    torch.manual_seed(seed)
    config = ModelConfig(backbone, tuple(builtin_tasks()[t] for t in tasks), frame_transformer=frame)
    model = SpeechLM(config, layout, tokenizers)
    init_tables(model, 0.6)
    if frame is not None:
        torch.nn.init.normal_(model.frame.to_hidden.weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizers() -> TokenizerSet:
    waves = [make_wave(2.0, seed) for seed in range(4)]
    text = SentencePieceText.fit(["one two three", "four five six", "seven"], TextConfig(vocab_size=290))
    ssl = MFCCKMeans.fit(waves, SSLConfig(num_clusters=10, fit_iterations=2))
    config = RVQConfig(num_codebooks=3, codebook_size=8, fit_iterations=2, griffin_lim_iterations=2)
    return TokenizerSet(text, ssl, RVQKMeansCodec.fit(waves, config))


@pytest.fixture(scope="session")
def model(tokenizers: TokenizerSet) -> SpeechLM:
    return make_model(tokenizers.make_layout("tiny"), tokenizers)


@pytest.fixture(scope="session")
def model_folder(model: SpeechLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder
