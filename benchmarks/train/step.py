"""A training step: positions per second and MFU, with each acceleration of the backbone by turns.

MFU is the arithmetic of the model divided by the time of a step and by the device's own measured speed of a large
matrix product in the same dtype (``gemm_tflop_per_s``):

    6 N (P_body + P_head) + 6 L H E Σ n_i²

N packed rows, P_body and P_head the weights of the backbone and of the output table, L layers of H heads of size E,
n_i rows of sequence i. The second term is causal attention, of which half the square is computed. The embedding is a
look-up, and what is recomputed does not count. Every output row counts once, though several streams share its product.

Models are Llama-shaped with nine streams (codec_ssl), with AdamW: on a GPU in bf16 on one packed row of 8,192
positions, on the CPU in float32 the demo's model on one of its packs. The losses of
all rows of a shape are compared.

``python -m benchmarks.train.step --device cpu``; ``--shapes 135m 360m 1p7b`` and ``--accelerations`` choose rows.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch

import speechlm_ext as sx
from benchmarks.common.emit import emit
from benchmarks.gpu_check.limits import best_seconds
from speechlm_ext import SpeechLM
from speechlm_ext.errors import ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import HostFacts
from speechlm_ext.model.attention.kernels import choose_attention
from speechlm_ext.model.backbone.acceleration import ACCELERATIONS, accelerate, choose_acceleration
from speechlm_ext.model.config import ModelConfig
from speechlm_ext.training.config import ModelSettings
from speechlm_ext.utils.console import make_output_safe

LONG = [700, 1200, 300, 2100, 900, 1500, 600, 820]
OPUS = {"ssl": 5000, "codec": [1024] * 8, "text": 49152}
DEMO = {"ssl": 200, "codec": [256] * 8, "text": 1000}


@dataclass(frozen=True)
class Shape:
    """A model and the sequences of its pack."""

    settings: ModelSettings
    lengths: list[int]
    vocabulary: dict[str, object]


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> ModelSettings:
    return ModelSettings(
        hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn,
        max_positions=8192,
    )  # fmt: skip


SHAPES = {
    "tiny": Shape(_llama(64, 2, 4, 4, 128), [40, 60], DEMO),
    "demo": Shape(_llama(128, 4, 4, 4, 384), [56, 80, 64, 72, 90, 48, 60, 84, 70, 66, 42], DEMO),
    "135m": Shape(_llama(576, 30, 9, 3, 1536), LONG, OPUS),
    "360m": Shape(_llama(960, 32, 15, 5, 2560), LONG, OPUS),
    "1p7b": Shape(_llama(2048, 24, 32, 32, 8192), LONG, OPUS),
}
DEFAULTS = {"cuda": ("1p7b", "360m", "135m"), "cpu": ("tiny", "demo")}
#: On the CPU compilation takes most of a minute: only where it is asked for.
RIVALS = {"cuda": ("auto", "eager", "compile"), "cpu": ("auto", "eager")}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}


def build(shape: Shape, device: str) -> tuple[SpeechLM, sx.ops.PackedBatch, HostFacts]:
    """The model, one packed row and its facts."""
    layout = TokenLayout.build(**shape.vocabulary)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.device(device):
        model = SpeechLM(ModelConfig(shape.settings.llama()), layout)
    rng = np.random.default_rng(0)
    segments = []
    for n in shape.lengths:
        spans = layout.content_ranges("codec_ssl")
        columns = [rng.integers(s[0], s[1], n) for s in spans if s is not None]
        segments.append(torch.from_numpy(np.stack(columns, 1)))
    weight = [torch.full(s.shape, 0.0625) for s in segments]
    pads = [layout.pad_id] * layout.num_streams
    batch = sx.ops.delay_pack(segments, delays=layout.delays, pad_ids=pads, loss_weight=weight)
    return model, batch.to(torch.device(device)), HostFacts.read(batch)


def flops_of_step(model: SpeechLM, shape: Shape, bounds: tuple[int, ...]) -> float:
    """The formula above."""
    products = sum(p.numel() for p in model.backbone.parameters()) + model.head.weight.numel()
    squares = sum((b - a) ** 2 for a, b in zip(bounds, bounds[1:], strict=False))
    return (
        6.0 * bounds[-1] * products + 6.0 * shape.settings.num_layers * shape.settings.hidden_size * squares
    )


def peak(device: str) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[device]) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device, 5, 3)


def measure(
    name: str, asked: str, device: str, steps: int, limit: float, eager: dict[str, list[float]]
) -> None:
    """Emit one row: best time of a step after two to warm up."""
    shape, dtype = SHAPES[name], DTYPES[device]
    try:
        choice, why = choose_acceleration(device, dtype, asked)
    except ConfigError as error:
        emit({"name": f"{name} {asked}", "skipped": str(error)})
        return
    model, batch, facts = build(shape, device)
    begun = time.perf_counter()
    runs_with = accelerate(model.backbone, choice)
    prepared = time.perf_counter() - begun
    model = model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    weight, times, losses = float(batch.loss_weight.sum()), [], []
    tensors = batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens
    for _ in range(steps + 2):
        start = time.perf_counter()
        out = model(*tensors, facts=facts)
        (out.loss_sum / weight).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(out.loss_sum.detach()) / weight)  # waits for the device
        times.append(time.perf_counter() - start)
    best, rows = min(times[2:]), facts.bounds[-1]
    flops = flops_of_step(model, shape, facts.bounds)
    row: dict[str, object] = {
        "name": f"{name} {asked}",
        "layers": runs_with,
        "why": why,
        "attention": choose_attention(device, dtype)[0],
        "positions": rows,
        "parameters": model.num_parameters(),
        "step_ms": round(best * 1e3, 2),
        "first_step_s": round(prepared + times[0], 1),
        "positions_per_s": round(rows / best, 1),
        "tflop_per_s": round(flops / best / 1e12, 4),
        "gemm_tflop_per_s": round(limit / 1e12, 3),
        "mfu": round(flops / best / limit, 4),
        "loss": round(losses[-1], 5),
    }
    if eager.setdefault(name, losses) is not losses:
        gap = max(abs(a / b - 1) for a, b in zip(losses, eager[name], strict=True))
        row["loss_difference"] = f"{gap:.1e}"
        if not gap <= TOLERANCE[dtype]:
            row["error"] = f"losses differ by {gap:.1e}"
    if device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
    emit(row)


def main() -> None:
    """Measure the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: those of the device")
    parser.add_argument(
        "--accelerations", nargs="+", choices=ACCELERATIONS, help="default: auto, eager, compile"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=38, help="after this time no row begins")
    arguments = parser.parse_args()
    device, begun = arguments.device, time.monotonic()
    limit = peak(device)
    eager: dict[str, list[float]] = {}
    for name in arguments.shapes or DEFAULTS[device]:
        # A compiled row of each shape, at the end: it takes longest to begin.
        for asked in arguments.accelerations or RIVALS[device]:
            if time.monotonic() - begun > arguments.seconds:
                emit({"name": f"{name} {asked}", "skipped": "no time left"})
                continue
            measure(name, asked, device, arguments.steps, limit, eager)
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    make_output_safe()
    main()
