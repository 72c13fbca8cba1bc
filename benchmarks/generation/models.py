"""The models that decoding is measured on: random weights, so a request ends at its longest length."""

from __future__ import annotations

import numpy as np
import torch

from speechlm_ext import SpeechLM
from speechlm_ext.generation.requests.encode_fields import content_frames
from speechlm_ext.generation.requests.prompt import Prompt, Segment, special_frame
from speechlm_ext.generation.requests.request import SamplingSettings
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.config import ModelConfig
from speechlm_ext.tasks import builtin_tasks
from speechlm_ext.training.config import ModelSettings

#: Name -> settings; the body of ``30m`` has 30 M parameters, ``1p7b`` is SmolLM2-1.7B's shape.
SHAPES = {
    "smoke": ModelSettings(hidden_size=32, num_layers=2, num_heads=4, ffn_size=64, max_positions=4096),
    "30m": ModelSettings(hidden_size=512, num_layers=9, num_heads=8, ffn_size=1536, max_positions=4096),
    "1p7b": ModelSettings(hidden_size=2048, num_layers=24, num_heads=32, ffn_size=8192, max_positions=8192),
}


def build(shape: str, device: str, delays: tuple[int, ...] | None = None) -> SpeechLM:
    """A model with OpusLM's vocabulary in nine streams (one SSL, eight of codes); a tenth of it for ``smoke``."""
    small = 10 if shape == "smoke" else 1
    layout = TokenLayout.build(
        ssl=5000 // small, codec=[1024 // small] * 8, text=49152 // small, delays=delays
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = SpeechLM(ModelConfig(SHAPES[shape].llama()), layout).to(dtype)
    return model.eval()


def tts_prompt(layout: TokenLayout, name: str, num_text: int, num_frames: int, seed: int) -> Prompt:
    """Text to speech with ``num_text`` tokens of text and exactly ``num_frames`` frames of speech."""
    template = builtin_tasks()["codec_ssl_plain_tts"]
    rng = np.random.default_rng(seed)
    start, end = layout.interval("text_bpe")
    text = content_frames(rng.integers(0, end - start, (num_text, 1)), "text_bpe", layout, name)
    parts = [special_frame(layout.sos_eos_id, layout), special_frame(layout.task_id(template.name), layout)]
    parts += [special_frame(layout.marker_id("text_bpe"), layout), text]
    parts.append(np.full((layout.max_delay, layout.num_streams), layout.pad_id, dtype=np.int64))
    parts.append(special_frame(layout.marker_id("codec_ssl"), layout))
    settings = SamplingSettings(seed=seed).resolved("codec_ssl")
    segment = Segment("codec_ssl", settings, num_frames, num_frames)
    return Prompt(name, template, np.concatenate(parts), 0, (segment,))
