"""The machine, the package versions and the commit that a result comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("speechlm_ext", "torch", "transformers", "deepspeed", "faster-whisper")


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, system and versions, each as text for people."""
    out = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        out["memory"] = f"{memory / 2**30:.1f} GiB"
    except (OSError, ValueError):
        pass
    return out | {name: found or "not installed" for name, found in package_versions(PACKAGES).items()}


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each package; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit_of(folder: Path) -> str:
    """Git commit of the checkout that ``folder`` is in, with ``-dirty`` if tracked files differ; else ``unknown``."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
