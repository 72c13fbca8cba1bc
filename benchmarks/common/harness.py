"""Comparison of an op with its rivals: same inputs, same run, results checked before anything is timed.

A :class:`Case` is an op on one shape and device. ``measure`` checks each result against the expected one, times ours,
the rivals and the limit in rounds by turns, and gives a row: op, shape, device, ``seconds`` (our best), ``ratios``
{rival: rival time / our time}, ``limit_fraction`` (the limit's time / our time), ``peak_bytes`` and
``rival_peak_bytes`` (memory beyond inputs and results), and the ``spread`` of ours over the rounds. ``compare`` puts
that row into pytest-benchmark's ``extra_info``; the check of a GPU (:mod:`benchmarks.gpu_check`) prints it.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
ROUNDS = 15
#: Rounds that are made however little time there is.
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """An op on one shape and device, beside its rivals."""

    op: str
    shape: str
    device: str
    ours: Run
    rivals: dict[str, Run]
    """Name -> another implementation."""
    check: Callable[[str, Any], None]
    """Called with a name and a result, of ours and of each rival; raises if the result is wrong."""
    limit: Run | None = None
    """A lower bound of the time, e.g. a copy of the bytes that must move."""
    limit_flop: int = 0
    """Operations of the limit, for its TFLOP/s on a GPU; 0: none."""
    rounds: int = ROUNDS
    needs_grad: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    """More entries of the row."""
    goals: dict[str, float] = field(default_factory=dict)
    """Entry of the row -> its maximum on a GPU."""


def devices() -> list[str]:
    """Devices of the benchmarks: the CPU, and CUDA if there is a device."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def rivals_wanted() -> str:
    """What ``SPEECHLM_BENCH_RIVALS`` asks for: ``all``, ``eager`` (none that torch compiles first), or ``none``."""
    wanted = os.environ.get("SPEECHLM_BENCH_RIVALS", "all")
    if wanted not in ("all", "eager", "none"):
        raise ValueError(f"SPEECHLM_BENCH_RIVALS must be all, eager or none; got {wanted!r}")
    return wanted


def compiled(
    shape: str, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Callable[..., Any] | None:
    """``function`` compiled by torch (with ``options``) and called once.

    None, with a note, if torch has no back end for it here; None if :func:`rivals_wanted` leaves it out, and for the
    ``smoke`` shape, which shows in seconds that a benchmark runs.
    """
    if shape == "smoke" or rivals_wanted() != "all":
        return None
    out = torch.compile(function, **options)
    try:
        out(*arguments)
    except Exception as error:  # noqa: BLE001 - no C++ or Triton back end here
        print(f"torch.compile fails for {function.__name__} here: {type(error).__name__}")
        return None
    return out


def seconds_of(run: Run, calls: int, device: str) -> float:
    """Mean time of ``calls`` calls in a row, the device's work included."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device != "cpu":
        torch.cuda.synchronize()
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


def measure(case: Case, seconds: float = float("inf"), is_strict: bool = True) -> dict[str, Any]:
    """Check, then time; the row of the case.

    Args:
        seconds: after this time no further round is begun; :data:`FEWEST_ROUNDS` are made in any case.
        is_strict: a rival that fails or gives a wrong result raises; otherwise it is left out, and the row has its
            error under ``rival_errors``.

    Raises:
        Exception: what ours or its check raises.
    """
    deadline = time.perf_counter() + seconds
    settle_allocator()
    with torch.set_grad_enabled(case.needs_grad):
        case.check("ours", case.ours())
        runs, errors = {"ours": case.ours}, dict[str, str]()
        for name, run in case.rivals.items() if rivals_wanted() != "none" else ():
            try:
                case.check(name, run())
                runs[name] = run
            except Exception as error:  # noqa: BLE001 - what an implementation of others raises
                if is_strict:
                    raise
                errors[name] = f"{type(error).__name__}: {error}"[:300]
        rivals = [name for name in runs if name != "ours"]
        if case.limit is not None:
            runs["limit"] = case.limit
            case.limit()
        calls = {
            name: max(1, min(20, int(0.02 / max(seconds_of(run, 1, case.device), 1e-7))))
            for name, run in runs.items()
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        # Each runs once per round, so that a machine that changes its speed does so for all.
        for number in range(case.rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() > deadline:
                break
            for name, run in runs.items():
                times[name].append(seconds_of(run, calls[name], case.device))
        peaks = {name: peak_bytes(runs[name], case.device) for name in ["ours", *rivals]}
    best = {name: min(values) for name, values in times.items()}
    row = {
        "op": case.op,
        "shape": case.shape,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": best["ours"],
        "rounds": len(times["ours"]),
        "calls": calls["ours"],
        "ratios": {name: round(best[name] / best["ours"], 4) for name in rivals},
        "limit_fraction": round(best["limit"] / best["ours"], 4) if "limit" in best else None,
        "peak_bytes": peaks.pop("ours"),
        "rival_peak_bytes": peaks,
        "spread": round(statistics.median(times["ours"]) / best["ours"] - 1, 4),
        **_speeds(case, best),
        **({"rival_errors": errors} if errors else {}),
        **case.extra,
    }
    return row | _goals(case, row)


def _goals(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """Each goal and whether it is met."""
    if not case.goals or case.device == "cpu":
        return {}
    return {
        "goals": {name: {"at_most": most, "is_met": row[name] <= most} for name, most in case.goals.items()}
    }


def _speeds(case: Case, best: dict[str, float]) -> dict[str, float]:
    """TFLOP/s of the limit, and of ours at the limit's operations."""
    if case.limit_flop == 0 or case.device == "cpu":
        return {}
    names = {"limit": "limit_tflop_per_s", "ours": "tflop_per_s"}
    return {entry: round(case.limit_flop / best[name] / 1e12, 1) for name, entry in names.items()}


def compare(benchmark: Any, case: Case) -> None:
    """:func:`measure` for pytest-benchmark, whose fixture is ``benchmark``: its table shows ours."""
    row = measure(case)
    benchmark.group = f"{case.op} {case.shape} {case.device}"

    def ours() -> None:
        case.ours()
        if case.device != "cpu":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(case.needs_grad):
        benchmark.pedantic(ours, rounds=row.pop("rounds"), iterations=row.pop("calls"), warmup_rounds=1)
    # pytest-benchmark has a time of its own.
    benchmark.extra_info.update({name: value for name, value in row.items() if name != "seconds"})
