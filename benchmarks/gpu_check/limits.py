"""Measured limits of the device itself: its copy and matrix speed.

Copy: bytes read and written per second by a device copy of 1 GiB. GEMM: a square product of random numbers (zeros are
faster, by power). Best of several runs; each run is timed with the device's own events.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch


def best_seconds(run: Callable[[], object], device: str, rounds: int, calls: int) -> float:
    """Minimum time of one call over ``rounds`` rounds of ``calls`` calls."""
    run()
    best = float("inf")
    for _ in range(rounds):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        else:
            started = time.perf_counter()
            for _ in range(calls):
                run()
            seconds = time.perf_counter() - started
        best = min(best, seconds / calls)
    return best


def measure(device: str, size: int, matrix: int) -> dict[str, float]:
    """GB/s of a copy of ``size`` bytes and TFLOP/s of a product of ``matrix`` x ``matrix`` matrices."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, 10, 5)
    out = {"copy_gb_per_s": 2 * size / seconds / 1e9}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if device == "cpu" and dtype != torch.float32:
            continue
        a, b = (torch.randn(matrix, matrix, device=device, dtype=dtype) for _ in range(2))
        seconds = best_seconds(lambda a=a, b=b: a @ b, device, 6, 5)
        out[f"{str(dtype).removeprefix('torch.')}_tflop_per_s"] = 2 * matrix**3 / seconds / 1e12
    return {k: round(v, 3) for k, v in out.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    print(json.dumps(measure(device, *((1 << 30, 8192) if device == "cuda" else (1 << 24, 256)))))
