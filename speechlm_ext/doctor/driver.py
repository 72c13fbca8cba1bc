"""The NVIDIA driver of this machine, found without torch, which reports no GPU at all where the driver is too old."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: CUDA major version -> smallest Linux driver that runs programs built with any of its minor versions. Source: NVIDIA,
#: "CUDA Compatibility", table 1, https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {12: 525, 13: 580}

Version = tuple[int, int]
#: Opens a shared library by name, or raises OSError.
Load = Callable[[str], Any]


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver lists it."""

    name: str
    capability: Version


@dataclass(frozen=True)
class Driver:
    """What the driver says of itself."""

    number: str | None = None
    """As nvidia-smi shows it, e.g. ``550.54.14``."""
    cuda: Version | None = None
    """The newest CUDA that its ``libcuda`` supports; a forward-compatibility package raises it."""
    gpus: tuple[Gpu, ...] = ()
    """All of the machine, whatever CUDA_VISIBLE_DEVICES says."""

    def __str__(self) -> str:
        number = self.number or "of unknown number"
        return number if self.cuda is None else f"{number} (CUDA {version_text(self.cuda)})"


def version_text(version: Version) -> str:
    """``12.4`` for ``(12, 4)``."""
    return f"{version[0]}.{version[1]}"


def parse_version(text: str) -> Version:
    """``(12, 4)`` for ``12.4``."""
    major, minor = (int(part) for part in text.split(".")[:2])
    return major, minor


def find_driver(load: Load = ctypes.CDLL, proc: Path = Path("/proc/driver/nvidia/version")) -> Driver:
    """The driver; empty fields for what cannot be found.

    Args:
        load: opens ``libcuda.so.1`` and ``libnvidia-ml.so.1``.
        proc: the kernel module's own file, read where NVML is missing, as in a container without it.
    """
    cuda = _cuda_version(load)
    with contextlib.suppress(OSError):
        number, gpus = _ask_nvml(load("libnvidia-ml.so.1"))
        if number is not None:
            return Driver(number, cuda, gpus)
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", proc.read_text("utf-8", "replace"))
        return Driver(found and found[0], cuda)
    return Driver(None, cuda)


def _cuda_version(load: Load) -> Version | None:
    """The driver's CUDA version; None without a driver, or with the toolkit's stub in its place."""
    version = ctypes.c_int(0)
    try:
        status = load("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if status == 0 and version.value else None


def _ask_nvml(nvml: Any) -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's number and its GPUs, by NVML."""
    if nvml.nvmlInit_v2() != 0:
        return None, ()
    try:
        text = ctypes.create_string_buffer(96)
        status = nvml.nvmlSystemGetDriverVersion(text, 96)
        number = text.value.decode() if status == 0 else None
        count = ctypes.c_uint(0)
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        gpus = [_ask_gpu(nvml, index) for index in range(count.value)]
        return number, tuple(gpu for gpu in gpus if gpu is not None)
    finally:
        nvml.nvmlShutdown()


def _ask_gpu(nvml: Any, index: int) -> Gpu | None:
    """One GPU; None if it does not answer, e.g. because another container has it."""
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    statuses = [
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)),
        nvml.nvmlDeviceGetName(handle, name, 96),
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)),
    ]
    return None if any(statuses) else Gpu(name.value.decode(), (major.value, minor.value))
