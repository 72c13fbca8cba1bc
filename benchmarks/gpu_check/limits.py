"""The device: what it is, and its measured copy and matrix speed.

Copy: bytes read and written per second by a device copy of 1 GiB. GEMM: a square product of random numbers (zeros are
faster, by power). Best of several runs, each timed until the device is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.emit import emit
from benchmarks.common.harness import seconds_of
from speechlm_ext.utils.console import make_output_safe


def describe(device: str) -> dict[str, Any]:
    """The device's name and size, and what torch can do with it."""
    out = {"torch": torch.__version__, "cuda": torch.version.cuda}
    # Without it kmeans_assign multiplies in float32, and the loss in bfloat16 cannot run on a GPU.
    out["mm_dtype_out"] = hasattr(torch.ops.aten.mm, "dtype_out")
    if device == "cpu":
        return out
    if not torch.cuda.is_available():
        return out | {"missing": "no CUDA device, or a torch without CUDA"}
    found = torch.cuda.get_device_properties(0)
    out |= {"gpu": found.name, "capability": f"{found.major}.{found.minor}"}
    return out | {
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
    }


def best_seconds(run: Callable[[], object], device: str, rounds: int, calls: int) -> float:
    """Minimum time of one call over ``rounds`` rounds of ``calls`` calls."""
    run()
    return min(seconds_of(run, calls, device) for _ in range(rounds))


def measure(device: str, size: int, matrix: int) -> None:
    """Hand over GB/s of a copy of ``size`` bytes and TFLOP/s of products of ``matrix`` x ``matrix`` matrices."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, 10, 5)
    emit({"name": "copy", "gb_per_s": round(2 * size / seconds / 1e9, 2)})
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(matrix, matrix, device=device).to(dtype) for _ in range(2))
        seconds = best_seconds(lambda a=a, b=b: a @ b, device, 6, 5)
        name = str(dtype).removeprefix("torch.")
        emit({"name": f"gemm_{name}", "tflop_per_s": round(2 * matrix**3 / seconds / 1e12, 4)})


def main() -> None:
    """Describe the device, or measure it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--describe", action="store_true", help="what the device is, without measuring")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.describe:
        emit(describe(arguments.device))
    else:
        measure(arguments.device, *((1 << 30, 8192) if arguments.device == "cuda" else (1 << 24, 256)))


if __name__ == "__main__":
    make_output_safe()
    main()
