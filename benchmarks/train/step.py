"""A training step: tokens per second, and the share of the device's matrix speed that it reaches.

A Llama-shaped SpeechLM of 1.7 B parameters in bf16 with AdamW on one packed row of 8,192 positions (nine streams, a
codec_ssl layout); a tiny one in fp32 on the CPU. Attention is what the package chooses here.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import speechlm_ext as sx
from benchmarks.common.emit import emit
from speechlm_ext import SpeechLM
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.attention.kernels import choose_attention
from speechlm_ext.model.config import ModelConfig
from speechlm_ext.training.config import ModelSettings
from speechlm_ext.utils.console import make_output_safe

SIZES = {
    "cuda": (
        ModelSettings(
            hidden_size=2048, num_layers=28, num_heads=16, num_kv_heads=8, ffn_size=6144, max_positions=8192
        ),
        [700, 1200, 300, 2100, 900, 1500, 600, 820],
        torch.bfloat16,
    ),
    "cpu": (ModelSettings(hidden_size=64, num_layers=2, num_heads=4, ffn_size=128), [40, 60], torch.float32),
}


def build(device: str) -> tuple[SpeechLM, sx.ops.PackedBatch]:
    """The model and one packed row."""
    settings, lengths, dtype = SIZES[device]
    small = device == "cpu"
    layout = TokenLayout.build(
        ssl=50 if small else 5000, codec=[32 if small else 1024] * 8, text=100 if small else 49152
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = SpeechLM(ModelConfig(settings.llama()), layout).to(dtype)
    rng = np.random.default_rng(0)
    segments = []
    for n in lengths:
        spans = layout.content_ranges("codec_ssl")
        columns = [rng.integers(s[0], s[1], n) for s in spans if s is not None]
        segments.append(torch.from_numpy(np.stack(columns, 1)))
    weight = [torch.full(s.shape, 0.0625) for s in segments]
    pads = [layout.pad_id] * layout.num_streams
    batch = sx.ops.delay_pack(segments, delays=layout.delays, pad_ids=pads, loss_weight=weight)
    return model, batch.to(torch.device(device))


def measure(device: str, steps: int) -> dict[str, object]:
    """Best time of a step after two to warm up."""
    model, batch = build(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    best, loss = float("inf"), 0.0
    for step in range(steps + 2):
        begun = time.perf_counter()
        out = model(batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens)
        (out.loss_sum / batch.loss_weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(out.loss_sum) / float(batch.loss_weight.sum())  # waits for the device
        if step >= 2:
            best = min(best, time.perf_counter() - begun)
    rows = batch.ids.shape[0]
    body = sum(p.numel() for p in model.backbone.parameters())
    flops = 6 * rows * (body + model.head.weight.numel())
    out_row: dict[str, object] = {
        "positions": rows,
        "parameters": model.num_parameters(),
        "attention": choose_attention(torch.device(device), next(model.parameters()).dtype)[0],
        "step_ms": round(best * 1e3, 2),
        "positions_per_s": round(rows / best, 1),
        "tflop_per_s": round(flops / best / 1e12, 3),
        "loss": round(loss, 4),
    }
    if device == "cuda":
        out_row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return out_row


if __name__ == "__main__":
    make_output_safe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    emit(measure(arguments.device, 5 if arguments.device == "cuda" else 2))
