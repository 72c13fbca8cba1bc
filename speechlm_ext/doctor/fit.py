"""Whether compiled kernels and the machine go together: CUDA and driver, architectures and GPUs.

Compiled code has CMake's names: ``80-real`` is machine code of sm_80, ``100-virtual`` PTX of compute_100, which the
driver compiles on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from speechlm_ext.doctor.driver import OLDEST_DRIVER, Driver, Version, parse_version

#: How to build for this machine.
BUILD = "SPEECHLM_CUDA=ON pip install --force-reinstall --no-deps ."
#: Integrated GPUs: machine code of other GPUs does not run on them (NVIDIA, CUDA C++ Programming Guide, "Binary
#: Compatibility": supported for the desktop only).
_INTEGRATED = {(7, 2), (8, 7), (10, 1), (11, 0)}


@dataclass(frozen=True)
class Code:
    """Compiled code for one architecture."""

    capability: Version
    suffix: str
    """``a``: for this architecture alone; ``f``: for its family; else empty."""
    is_ptx: bool

    @property
    def name(self) -> str:
        """``sm_90a`` or ``compute_100``."""
        return f"{'compute' if self.is_ptx else 'sm'}_{self.capability[0]}{self.capability[1]}{self.suffix}"

    def runs_on(self, gpu: Version) -> bool:
        """Whether a GPU of this compute capability can run it."""
        if self.suffix == "a" or (not self.is_ptx and gpu != self.capability and gpu in _INTEGRATED):
            return gpu == self.capability
        if self.is_ptx and not self.suffix:
            return gpu >= self.capability
        return gpu[0] == self.capability[0] and gpu[1] >= self.capability[1]


def parse_codes(archs: Sequence[str]) -> list[Code]:
    """Compiled code from CMake's words (``90a-real``) or torch's (``sm_90a``, ``compute_90``)."""
    codes = []
    for arch in archs:
        found = re.fullmatch(r"(?:(sm|compute)_)?(\d+)(\d)([af]?)(?:-(real|virtual))?", arch)
        if found is None:
            raise ValueError(
                f"unknown CUDA architecture {arch!r}; expected e.g. 90a-real, sm_90a or compute_90"
            )
        kind, major, minor, suffix, form = found.groups()
        codes.append(Code((int(major), int(minor)), suffix, kind == "compute" or form == "virtual"))
    return codes


def code_for(gpu: Version, codes: Sequence[Code]) -> Code | None:
    """The code that a GPU runs: the newest machine code, else the newest PTX; None if there is none for it."""
    usable = [code for code in codes if code.runs_on(gpu)]
    return max(usable, key=lambda code: (not code.is_ptx, code.capability, code.suffix), default=None)


def driver_problem(subject: str, cuda: str, driver: Driver, remedy: str) -> str | None:
    """Why ``subject``, built with CUDA version ``cuda``, cannot run on the driver; None if it can, or without a driver.

    Any driver of the same CUDA major version will do, whatever the minor ones are, and any newer one.
    """
    built = parse_version(cuda)
    if driver.cuda is None or driver.cuda[0] >= built[0]:
        return None
    oldest = OLDEST_DRIVER.get(built[0])
    needs = f"of {oldest} or later" if oldest else f"for CUDA {built[0]}"
    return f"{subject} has CUDA {cuda} and needs a driver {needs}; here is {driver}. Update the driver, or {remedy}"


def gpu_problem(
    subject: str, name: str, gpu: Version, codes: Sequence[Code], cuda: str, driver: Driver, remedy: str
) -> str | None:
    """Why ``subject`` cannot run on a GPU whose driver is new enough; None if it can."""
    code, sm = code_for(gpu, codes), f"sm_{gpu[0]}{gpu[1]}"
    if code is None:
        compiled = ", ".join(code.name for code in codes)
        return f"{subject} has no code for {name} ({sm}), but for {compiled}: {remedy}"
    if code.is_ptx and driver.cuda is not None and driver.cuda < parse_version(cuda):
        return (
            f"{subject} has PTX alone for {name} ({sm}), made with CUDA {cuda}; the driver, {driver}, cannot compile "
            f"PTX of a CUDA newer than its own: update the driver to CUDA {cuda}, or {remedy}"
        )
    return None


def build_for(gpu: Version) -> str:
    """The command that builds for a GPU."""
    return f"build for it in the source folder: `SPEECHLM_CUDA_ARCHS={gpu[0]}{gpu[1]} {BUILD}`"
