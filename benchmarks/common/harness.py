"""Comparison of an op with its rivals: same inputs, same run, results checked before anything is timed.

``compare`` checks each rival's result against the expected one, times ours with pytest-benchmark and the rivals in
rounds interleaved with ours, and writes into ``extra_info``: op, shape, device, ``ratios`` {rival: rival time / our
time}, ``limit_fraction`` (the limit's time / our time), ``peak_bytes`` and ``rival_peak_bytes`` (memory beyond inputs
and results), and the spread of ours over the rounds.
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
    """Devices of the benchmarks: the CPU, and CUDA if there is a device."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def compiled(
    shape: str, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Callable[..., Any] | None:
    """``function`` compiled by torch (with ``options``) and called once.

    None, with a note, if torch has no back end for it here; None for the ``smoke`` shape, which shows in seconds that a
    benchmark runs.
    """
    if shape == "smoke":
        return None
    out = torch.compile(function, **options)
    try:
        out(*arguments)
    except Exception as error:  # noqa: BLE001 - no C++ or Triton back end here
        print(f"torch.compile fails for {function.__name__} here: {type(error).__name__}")
        return None
    return out


def synchronised(run: Run, device: str) -> Run:
    """``run``, followed by a wait for the device."""
    if device == "cpu":
        return run

    def waiting() -> Any:
        out = run()
        torch.cuda.synchronize()
        return out

    return waiting


def seconds_of(run: Run, calls: int) -> float:
    """Mean time of ``calls`` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def peak_bytes(run: Run, device: str) -> int | None:
    """Peak memory of a call beyond its inputs and its result; None if the system does not report it.

    On the CPU it is the process's resident memory as Linux counts it, after freed memory is returned to the system.
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
    reset.write_text("5")  # resets the peak to the present size
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
    """Make the C library keep freed memory, as it does once a process has freed a large tensor: free one of 31 MiB.

    Until then each result of some megabytes is in new pages that the system zeroes first, which takes ten times as long
    as a copy and would dominate every measurement."""
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
        rivals: name -> another implementation.
        check: called with a name and a result, for ours and each rival; raises if the result is wrong.
        limit: a lower bound of the time, e.g. a copy of the bytes that must move.
        rounds: number of rounds, for runs that take seconds; default :data:`ROUNDS`.
        extra: more entries of ``extra_info``.
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
    # Each runs once per round, so that a machine that changes its speed does so for all.
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
