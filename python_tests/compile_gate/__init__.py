"""Registers, stack, spills and shared memory of each CUDA kernel, per architecture.

``python -m python_tests.compile_gate`` reads ptxas' report of every ``csrc/*/*_cuda.cu`` from the last build
(``cmake/keep_ptxas.sh`` keeps it beside the object), compiles the files without a current report, and compares with the
committed table ``kernels.json``; ``--update`` writes the table. It needs nvcc and no GPU. A kernel may use more
registers up to the next multiple of 8, the granularity in which a GPU allocates them; a spill always fails, unless the
table has a ``why`` for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).resolve().with_name("kernels.json")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
PTX = "compute_100"
FIELDS = ("registers", "stack", "spill_stores", "spill_loads", "shared")


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture: registers of a thread, bytes of a thread (stack, spills), bytes of a block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


class GateError(Exception):
    """A kernel does not compile, or nvcc's output cannot be parsed."""


Report = dict[str, dict[str, Usage]]  # kernel -> architecture -> usage


def find_nvcc() -> str | None:
    """nvcc as the build finds it, or None."""
    if named := os.environ.get("CUDACXX"):
        return named
    folders = [
        str(Path(os.environ[name]) / "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ["PATH"], "/usr/local/cuda/bin"]))


def nvcc_release(nvcc: str) -> str:
    """E.g. ``13.0``."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def parse_ptxas(text: str) -> dict[str, dict[str, Usage]]:
    """Read the kernels' usage from the output of ``ptxas -v``: by architecture, then by mangled name.

    Raises:
        GateError: a kernel without its usage.
    """
    found: dict[str, dict[str, Usage]] = {}
    name, arch, stack, stores, loads = None, "", 0, 0, 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            if name is not None:
                raise GateError(f"ptxas printed no usage of {name}")
            name, arch = match.groups()
            stack, stores, loads = 0, 0, 0
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            stack, stores, loads = map(int, match.groups())
        elif (match := re.search(r"Used (\d+) registers", line)) and name is not None:
            shared = re.search(r"(\d+) bytes smem", line)
            found.setdefault(arch, {})[name] = Usage(
                int(match.group(1)), stack, stores, loads, int(shared.group(1)) if shared else 0
            )
            name = None
    if name is not None:
        raise GateError(f"ptxas printed no usage of {name}")
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Kernel names without mangling, arguments, and the namespaces that all of them share."""
    tool = shutil.which("c++filt")
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True) if tool else None
    plain = done.stdout.splitlines() if done and done.returncode == 0 else names
    out = {}
    for mangled, full in zip(names, plain, strict=True):
        short = full.replace("speechlm::", "").replace("(anonymous namespace)::", "")
        match = re.match(r"(?:void )?([\w:]+(?:<[^()]*>)?)", short)
        out[mangled] = match.group(1).strip() if match else short
    return out


def compile_all(
    nvcc: str, sources: list[Path], jobs: int = 2, targets: tuple[str, ...] = (*ARCHITECTURES, PTX)
) -> Report:
    """Compile ``sources`` for ``targets``: every architecture, and to PTX.

    Raises:
        GateError: a compiler error; its text is in the message.
    """
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc"), "-Xptxas", "-v", "-c"]

    def one(source: Path, arch: str) -> str:
        code = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch if arch != PTX else PTX}"
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, *flags, code, str(source), "-o", str(Path(folder) / "out.o")]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise GateError(f"{source.relative_to(ROOT)} does not compile for {arch}:\n{done.stderr[-4000:]}")
        return done.stderr

    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(one, s, a) for s in sources for a in targets]
        return report_of([task.result() for task in work])


def report_of(printed: list[str]) -> Report:
    """One report, with readable names, of several outputs of ptxas."""
    report: Report = {}
    for text in printed:
        for arch, kernels in parse_ptxas(text).items():
            names = readable(list(kernels))
            for mangled, usage in kernels.items():
                report.setdefault(names[mangled], {})[arch] = usage
    return report


def kept(source: Path, build: Path | None = None) -> str | None:
    """ptxas' output for ``source`` in the last build; None if that is older than the source or a header."""
    tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    build = build or ROOT / "build" / f"cmake-{tag}"
    inside = source.relative_to(ROOT)
    log = build / "CMakeFiles" / "speechlm_core.dir" / inside.with_name(inside.name + ".o.ptxas")
    if not log.is_file():
        return None
    if any(f.stat().st_mtime > log.stat().st_mtime for f in (source, *(ROOT / "csrc").rglob("*.*h"))):
        return None
    text = log.read_text("utf-8", "replace")
    return text if set(parse_ptxas(text)) == set(ARCHITECTURES) else None


def own(report: Report) -> Report:
    """The kernels of this project, without those that the ops instantiate from CUB."""
    return {kernel: usage for kernel, usage in report.items() if not kernel.startswith(("cub::", "thrust::"))}


def budget_of(registers: int) -> int:
    """The next multiple of 8, at most 255: as many registers cost no more."""
    return min(255, (registers + 7) // 8 * 8)


def compare(report: Report, table: dict, release: str) -> list[str]:
    """The faults of ``report``; empty if everything is within the table's budget."""
    wrong = []
    same_compiler = table.get("nvcc") == release
    known = table.get("kernels", {})
    for kernel, by_arch in sorted(report.items()):
        for arch, usage in sorted(by_arch.items()):
            allowed = known.get(kernel, {}).get(arch)
            if allowed is None:
                wrong.append(
                    f"{kernel} on {arch} is not in the table; run make compile-gate ARGS=--update and commit it"
                )
                continue
            for field in ("spill_stores", "spill_loads"):
                most = allowed[field] if known[kernel].get("why") else 0
                if getattr(usage, field) > most:
                    wrong.append(f"{kernel} on {arch} spills: {getattr(usage, field)} bytes of {field}")
            if not same_compiler:
                continue  # another compiler allocates otherwise; only spills are judged
            if usage.registers > budget_of(allowed["registers"]):
                wrong.append(
                    f"{kernel} on {arch} takes {usage.registers} registers; its budget is "
                    f"{budget_of(allowed['registers'])} ({allowed['registers']} in the table)"
                )
            for field in ("stack", "shared"):
                if getattr(usage, field) > allowed[field]:
                    value = getattr(usage, field)
                    wrong.append(
                        f"{kernel} on {arch} takes {value} bytes of {field}; its budget is {allowed[field]}"
                    )
    for kernel in sorted(set(known) - set(report)):
        wrong.append(f"{kernel} is in the table but no longer compiled; run make compile-gate ARGS=--update")
    return wrong


def as_table(report: Report, release: str, old: dict) -> dict:
    """The table of ``report``; reasons that were written for spills are kept."""
    kernels: dict = {}
    for kernel, by_arch in sorted(report.items()):
        kernels[kernel] = {arch: asdict(usage) for arch, usage in sorted(by_arch.items())}
        if why := old.get("kernels", {}).get(kernel, {}).get("why"):
            kernels[kernel]["why"] = why
    return {"nvcc": release, "kernels": kernels}


def as_text(table: dict) -> str:
    """The table as JSON with one line for each kernel and architecture, so that a diff shows what changed."""
    kernels = []
    for kernel, entries in table["kernels"].items():
        lines = [f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()]
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
    return f'{{\n "nvcc": {json.dumps(table["nvcc"])},\n "kernels": {{\n' + ",\n".join(kernels) + "\n }\n}\n"


def sources() -> list[Path]:
    """The .cu files of the ops."""
    return sorted((ROOT / "csrc").glob("*/*_cuda.cu"))


def main(argv: list[str] | None = None) -> int:
    """Compile, compare or update, and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compile_gate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile gate: skipped, no nvcc here (CUDA toolkit 12.4 or later)")
        return 0
    release = nvcc_release(nvcc)
    old = json.loads(TABLE.read_text("utf-8")) if TABLE.is_file() else {}
    try:
        logs = {source: kept(source) for source in sources()}
        anew = [source for source, text in logs.items() if text is None]
        built = report_of([text for text in logs.values() if text is not None])
        report = own({**built, **compile_all(nvcc, anew, os.cpu_count() or 2)})
    except GateError as error:
        print(f"compile gate: {error}", file=sys.stderr)
        return 1
    print(f"{'kernel':50} {'arch':8} {'registers':>9} {'stack':>6} {'spills':>7} {'shared':>7}")
    for kernel, by_arch in sorted(report.items()):
        for arch, u in sorted(by_arch.items()):
            print(
                f"{kernel[:50]:50} {arch:8} {u.registers:9} {u.stack:6} {u.spill_stores + u.spill_loads:7} {u.shared:7}"
            )
    if arguments.update:
        TABLE.write_text(as_text(as_table(report, release, old)), "utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)}")
        return 0
    wrong = compare(report, old, release)
    for line in wrong:
        print(f"compile gate: {line}", file=sys.stderr)
    print(
        f"{len(report)} kernels, {len(logs) - len(anew)} files as built, {len(anew)} compiled for this, "
        f"{len(wrong)} faults (nvcc {release}, table of {old.get('nvcc', 'no nvcc')})"
    )
    return 1 if wrong else 0
