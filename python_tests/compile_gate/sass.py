"""The machine code (SASS) of the CUDA kernels, as instructions that a test can count and follow.

``disassemble(source)`` compiles a ``csrc/*/*_cuda.cu`` and returns the instructions of each kernel by its readable name
(those of ``kernels.json``). ``bursts`` says how many loads are under way before the first use of a loaded value, which
is what a kernel that is bound by memory lives on; ``calls`` names the routines that are called, such as a 64-bit
division. It needs nvcc and nvdisasm and no GPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from python_tests import compile_gate as gate

ARCHITECTURE = "sm_90a"
CACHE = gate.ROOT / "build" / "compile-gate" / "sass"

#: Where pip's nvidia-cuda-nvdisasm, and Triton, have it.
_IN_SITE_PACKAGES = ("nvidia/cu*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm")
_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L_x_\d+|\$\S+):$")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\d+\s+)?([A-Z0-9_.]+)\s*([^;]*);")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)")
_TARGET = re.compile(r"`\(([^)]+)\)")
#: Instructions whose first operand is read like the others.
_NO_RESULT = (
    "ST",
    "RED",
    "BRA",
    "BRX",
    "JMP",
    "CALL",
    "RET",
    "EXIT",
    "BAR",
    "BSSY",
    "BSYNC",
    "WARPSYNC",
    "MEMBAR",
)
#: Instructions that may have a predicate before their result.
_PREDICATE_FIRST = ("SHFL", "ATOM", "LDG", "LDS", "MATCH", "VOTE")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    opcode: str
    """With its modifiers, e.g. ``LDG.E.128``."""
    operands: tuple[str, ...]
    guard: str
    """The predicate under which it takes effect, e.g. ``@!P0``; else ""."""
    labels: tuple[str, ...]
    """Names of this place, which branches and calls use."""

    @property
    def target(self) -> str | None:
        """The place that a branch or a call goes to."""
        found = _TARGET.search(", ".join(self.operands))
        return found.group(1) if found else None

    @property
    def written(self) -> set[int]:
        """Numbers of the registers that it writes; of a wide result, all."""
        place = self._result()
        found = None if place is None else re.match(r"R(\d+)\b", self.operands[place])
        if found is None:
            return set()
        first = int(found.group(1))
        return set(range(first, first + self._width()))

    @property
    def read(self) -> set[int]:
        """Numbers of the registers that its operands name; of a wide operand, the first."""
        result = self._result()
        others = (operand for place, operand in enumerate(self.operands) if place != result)
        return {int(number) for operand in others for number in _REGISTER.findall(operand)}

    def _result(self) -> int | None:
        if not self.operands or self.opcode.startswith(_NO_RESULT):
            return None
        has_predicate = re.match(r"!?U?PT?\d*$", self.operands[0]) is not None
        if has_predicate:
            return 1 if self.opcode.startswith(_PREDICATE_FIRST) and len(self.operands) > 1 else 0
        return 0

    def _width(self) -> int:
        parts = self.opcode.split(".")
        if "128" in parts:
            return 4
        return 2 if "64" in parts or "WIDE" in parts else 1


Code = list[Instruction]


class SassError(Exception):
    """A kernel is not there, or the listing cannot be parsed."""


@cache
def find_nvdisasm() -> str | None:
    """nvdisasm of the environment variable NVDISASM, beside nvcc, on PATH or of a Python package; else None."""
    if named := os.environ.get("NVDISASM"):
        return named
    nvcc = gate.find_nvcc()
    folders = [] if nvcc is None else [str(Path(nvcc).resolve().parent)]
    found = shutil.which("nvdisasm", path=os.pathsep.join([*folders, os.environ["PATH"]]))
    packages = (
        p for folder in sys.path for form in _IN_SITE_PACKAGES for p in sorted(Path(folder).glob(form))
    )
    return found or next((str(p) for p in packages), None)


def missing_tool() -> str | None:
    """What disassembling needs and this machine lacks; None: nothing."""
    if gate.find_nvcc() is None:
        return "no nvcc here (CUDA toolkit 12.4 or later)"
    if find_nvdisasm() is None:
        return "no nvdisasm here (CUDA toolkit, or pip install nvidia-cuda-nvdisasm)"
    return None


@cache
def disassemble(source: Path, arch: str = ARCHITECTURE) -> dict[str, Code]:
    """The instructions of each kernel of ``source``, by readable name. Compiled code is kept in ``CACHE``.

    Raises:
        GateError: ``source`` does not compile.
        SassError: the listing cannot be parsed.
    """
    nvcc, nvdisasm = gate.find_nvcc(), find_nvdisasm()
    assert nvcc is not None and nvdisasm is not None, missing_tool()
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-I", str(gate.ROOT / "csrc"), f"-arch={arch}"]
    key = hashlib.sha256(" ".join([gate.nvcc_release(nvcc), *flags]).encode())
    for file in (source, *sorted((gate.ROOT / "csrc").rglob("*.*h"))):
        key.update(file.read_bytes())
    cubin = CACHE / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.cubin"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{source.stem}-{arch}.lock"):
        if not cubin.is_file():
            for old in CACHE.glob(f"{source.stem}-{arch}-*.cubin"):
                old.unlink()
            fresh = cubin.with_suffix(".new")
            done = subprocess.run(
                [nvcc, *flags, "-cubin", str(source), "-o", str(fresh)], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise gate.GateError(f"{source.name} does not compile for {arch}:\n{done.stderr[-4000:]}")
            fresh.rename(cubin)
        listing = subprocess.run(
            [nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    return parse(listing)


def parse(listing: str) -> dict[str, Code]:
    """The instructions of each kernel in the output of ``nvdisasm -c``, by readable name.

    Raises:
        SassError: there is no instruction in it.
    """
    kernels: dict[str, Code] = {}
    code: Code | None = None
    labels: list[str] = []
    for line in listing.splitlines():
        if found := _SECTION.match(line):
            code, labels = kernels.setdefault(found.group(1), []), []
        elif found := _LABEL.match(line):
            labels.append(found.group(1))
        elif code is not None and (found := _INSTRUCTION.match(line)):
            address, guard, opcode, operands = found.groups()
            parts = tuple(o.strip().removesuffix(".reuse") for o in operands.split(",") if o.strip())
            code.append(Instruction(int(address, 16), opcode, parts, (guard or "").strip(), tuple(labels)))
            labels = []
    if not any(kernels.values()):
        raise SassError(f"no instruction in the listing, which begins: {listing[:200]!r}")
    names = gate.readable(list(kernels))
    return {names[mangled]: found for mangled, found in kernels.items()}


def kernel(kernels: dict[str, Code], name: str) -> Code:
    """The instructions of the kernel of that readable name.

    Raises:
        SassError: there is none.
    """
    if name not in kernels:
        raise SassError(f"no kernel {name}; there are {', '.join(sorted(kernels))}")
    return kernels[name]


def calls(code: Code) -> list[str]:
    """The routines that a kernel calls, such as ``__cuda_sm20_div_s64``."""
    targets = (i.target or "an address" for i in code if i.opcode.startswith("CALL"))
    return [re.sub(r"^\$__internal_\d+_\$", "", target) for target in targets]


def matching(code: Iterable[Instruction], *parts: str) -> Code:
    """The instructions whose opcode begins with the first of ``parts`` and has the others as modifiers."""
    name, *modifiers = parts
    return [
        i
        for i in code
        if (i.opcode == name or i.opcode.startswith(f"{name}."))
        and all(m in i.opcode.split(".") for m in modifiers)
    ]


def bursts(code: Code, *parts: str) -> list[int]:
    """Numbers of loads that are issued one after another before any of their results is read.

    In the order of the listing: a run of loads ends where an instruction reads a result of it, at the head of a loop,
    and where control does not go on to the next instruction. Each number is of one run, a predicated load counts.

    Args:
        code: of one kernel.
        parts: which loads, as for `matching`, e.g. ``"LDG", "128"``.
    """
    loads = {i.address for i in matching(code, *parts)}
    place = {label: i.address for i in code for label in i.labels}
    heads = {
        place[i.target]
        for i in code
        if i.opcode.startswith("BRA") and i.target in place and place[i.target] <= i.address
    }
    found: list[int] = []
    waiting: list[set[int]] = []

    def end() -> None:
        if waiting:
            found.append(len(waiting))
            waiting.clear()

    for i in code:
        if i.address in heads or any(i.read & registers for registers in waiting):
            end()
        if i.written:  # on another path: the result of a load that nothing has read here
            waiting[:] = [registers for registers in waiting if not registers & i.written]
        if i.address in loads:
            waiting.append(i.written)
        if i.opcode.startswith(("BRA", "EXIT", "RET", "BRX")) and not i.guard:
            end()
    end()
    return found


def text(code: Sequence[Instruction]) -> str:
    """A listing, for the message of a failed test."""
    return "\n".join(f"{i.address:5x} {i.guard:5} {i.opcode:28} {', '.join(i.operands)}" for i in code)
