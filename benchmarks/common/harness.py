"""How every op is compared: the same inputs, the same run, right before fast.

``compare`` checks each rival's result against the expected one, times ours with pytest-benchmark and the rivals in
interleaved rounds beside ours, and notes in ``extra_info``: op, shape, device, ``ratios`` {rival: rival time / our
time}, ``limit_fraction`` (the limit's time / our time), ``peak_bytes`` and ``rival_peak_bytes`` (memory beyond inputs
and results), and how far ours spread over the rounds.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
ROUNDS = 15


def devices() -> list[str]:
    """Where benchmarks run: the CPU, and CUDA where there is a device."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def compiled(
    shape: str, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Callable[..., Any] | None:
    """``function`` compiled by torch (with ``options``) and called once.

    None where torch has no back end for it here, with a note, and for the ``smoke`` shape: that shows in seconds that a
    benchmark runs, and a compiler takes longer.
    """
    if shape == "smoke":
        return None
    out = torch.compile(function, **options)
    try:
        out(*arguments)
    except Exception as error:  # noqa: BLE001 - no C++ or Triton back end here: not our subject
        print(f"torch.compile does not manage {function.__name__} here: {type(error).__name__}")
        return None
    return out


def synchronised(run: Run, device: str) -> Run:
    """``run`` with a wait for the device behind it."""
    if device == "cpu":
        return run

    def waiting() -> Any:
        out = run()
        torch.cuda.synchronize()
        return out

    return waiting


def seconds_of(run: Run, calls: int) -> float:
    """Mean time of ``calls`` calls in a row."""
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begun) / calls


def peak_bytes(run: Run, device: str) -> int | None:
    """Most memory that a call holds beyond what was there and what it returns; None where the system does not tell.

    On the CPU it is counted in pages of this process, as Linux counts them, after freed memory was given back.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - _bytes_of(result)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak becomes what is held now
    before = _status_bytes(status, "VmRSS")
    result = run()
    return _status_bytes(status, "VmHWM") - before - _bytes_of(result)


def _status_bytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _bytes_of(result: Any) -> int:
    if isinstance(result, torch.Tensor):
        return result.numel() * result.element_size()
    return sum(map(_bytes_of, result)) if isinstance(result, (tuple, list)) else 0


def settle_allocator() -> None:
    """Free one block of 31 MiB, so that the C library keeps freed memory from here on, as it does in every process that
    has freed a larger tensor once. Before, each result of some megabytes comes in pages that the system has to zero
    first, which takes ten times as long as a copy and would be all that is measured, for every rival alike."""
    torch.ones(31 << 18, dtype=torch.float32)


def compare(
    benchmark: Any,
    *,
    op: str,
    shape: str,
    device: str,
    ours: Run,
    rivals: Mapping[str, Run],
    check: Callable[[str, Any], None],
    limit: Run | None = None,
    rounds: int | None = None,
    **extra: Any,
) -> None:
    """Check, then time.

    Args:
        benchmark: pytest-benchmark's fixture.
        rivals: name -> the same job done another way.
        check: called with a name and a result of ours and of each rival; raises where the result is wrong.
        limit: what no implementation can beat here, e.g. a copy of the bytes that must move.
        rounds: turns that each has, for what takes seconds; None: the usual number.
        extra: more for ``extra_info``.
    """
    settle_allocator()
    runs = {"ours": synchronised(ours, device)} | {n: synchronised(r, device) for n, r in rivals.items()}
    for name, run in runs.items():
        check(name, run())
    if limit is not None:
        runs["limit"] = synchronised(limit, device)
        runs["limit"]()
    calls = {name: max(1, min(20, int(0.02 / max(seconds_of(run, 1), 1e-7)))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    # A round has one turn of each, so that a machine that slows down or speeds up does so for all of them.
    rounds = rounds or ROUNDS
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, calls[name]))
    best = {name: min(values) for name, values in times.items()}
    info = {
        "op": op,
        "shape": shape,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "ratios": {name: round(best[name] / best["ours"], 4) for name in rivals},
        "limit_fraction": round(best["limit"] / best["ours"], 4) if limit is not None else None,
        "peak_bytes": peak_bytes(ours, device),
        "rival_peak_bytes": {name: peak_bytes(run, device) for name, run in rivals.items()},
        "spread": round(statistics.median(times["ours"]) / best["ours"] - 1, 4),
    }
    benchmark.group = f"{op} {shape} {device}"
    benchmark.pedantic(runs["ours"], rounds=rounds, iterations=calls["ours"], warmup_rounds=1)
    benchmark.extra_info.update(info, **extra)
