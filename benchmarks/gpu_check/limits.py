"""The device: what it is, its measured copy and matrix speed, and the accuracy of its float16 products.

Copy: bytes read and written per second by a device copy of 1 GiB. GEMM: a square product of random numbers (zeros are
faster, by power). Best of several runs, each timed until the device is done. Accumulation: the largest error of sums of
float16 products as a share of the bound that makes kmeans_assign exact, for each width; more than 1 is a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.accumulation import ROWS, WIDTHS, worst_ratio
from benchmarks.common.emit import emit
from benchmarks.common.harness import seconds_of
from speechlm_ext.ops.common.cublas import has_cublas, product
from speechlm_ext.ops.common.precision import float32_sums, multiply_float16
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


def _by_cublas(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    product(out, a, b.T, accumulate=False)


def _by_torch(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    with float32_sums():
        multiply_float16(out, a, b)


def accumulation(device: str, is_tiny: bool) -> bool:
    """Hand over the largest error of each width, by both sources of products; whether all are within the bound."""
    sources = {"torch": _by_torch}
    if has_cublas(torch.empty(0, device=device)):
        sources["cublas"] = _by_cublas
    worst = 0.0
    for name, multiply in sources.items():
        for width in WIDTHS[:2] if is_tiny else WIDTHS:
            for rows in ROWS[:1] if is_tiny else ROWS:
                ratio = worst_ratio(multiply, rows, width, device, columns=50 if is_tiny else 1000)
                worst = max(worst, ratio)
                emit({"name": f"accumulation_{name}_{rows}x{width}", "error_by_bound": float(f"{ratio:.4g}")})
    return worst <= 1


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
        is_tiny = arguments.device == "cpu"
        measure(arguments.device, *((1 << 24, 256) if is_tiny else (1 << 30, 8192)))
        if not accumulation(arguments.device, is_tiny):
            sys.exit("sums of float16 products lose more than kmeans_assign's proof allows")


if __name__ == "__main__":
    make_output_safe()
    main()
