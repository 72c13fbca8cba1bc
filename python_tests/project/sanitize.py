"""The CPU kernels under sanitizers: ``python -m python_tests.project.sanitize [address] [thread] [-- PYTEST ARGS]``.

For each sanitizer ``_C`` is built with it, three planted faults show that it looks, and the op tests run on the CPU.
``address`` is AddressSanitizer and UndefinedBehaviorSanitizer together, ``thread`` is ThreadSanitizer. Python itself is
not built with them, so their run-time library is preloaded; reports come from this project's code alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from python_tests import cuda_on_cpu
from python_tests.cuda_on_cpu import ROOT

FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
#: Planted fault -> text of the sanitizer's report.
PLANTED = {
    "address": {
        "planted_overrun(4)": "heap-buffer-overflow",
        "planted_overflow(1)": "signed integer overflow",
    },
    "thread": {"planted_race(2)": "data race"},
}


def build(name: str) -> Path:
    """The module with a sanitizer in it.

    Raises:
        BuildError: it does not compile.
    """
    folder = cuda_on_cpu.build(
        ROOT / "build" / f"sanitize-{name}",
        "_C",
        ROOT,
        SPEECHLM_CUDA="OFF",
        SPEECHLM_PLANT_FAULTS="ON",
        CMAKE_CXX_FLAGS=f"{FLAGS[name]} -g -fno-omit-frame-pointer",
    )
    return next((folder / "lib").glob("_C.*.so"))


def environment(name: str, module: Path) -> dict[str, str]:
    """Environment variables of a process that runs under the sanitizer."""
    compiler = os.environ.get("CXX", "c++")
    preload = []
    for library in LIBRARIES[name]:
        found = subprocess.run(
            [compiler, f"-print-file-name={library}"], capture_output=True, text=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            raise SystemExit(
                f"sanitize: {compiler} has no {library}; install the compiler's sanitizers (libsanitizer)"
            )
        preload.append(found)
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(preload),
        "SPEECHLM_TEST_NATIVE": str(module),
        # Python keeps memory until it exits, and the threads of other libraries are out of scope.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66",
        "OMP_NUM_THREADS": "4",
    }


def check_planted(name: str, env: dict[str, str]) -> list[str]:
    """The planted faults that the sanitizer did not report."""
    missed = []
    for call, says in PLANTED[name].items():
        code = f"import python_tests.conftest, speechlm_ext.ops.common.native as n; n.native.{call}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
        found = done.returncode != 0 and says in done.stderr
        print(f"  {call}: {'reported' if found else 'NOT reported'}", flush=True)
        if not found:
            missed.append(call)
            print(done.stderr[-2000:])
    return missed


def main(argv: list[str]) -> int:
    """Run the sanitizers named, or all; returns the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    names, extra = argv[:split] or list(FLAGS), argv[split + 1 :]
    if unknown := set(names) - set(FLAGS):
        print(
            f"sanitize: expected some of {', '.join(FLAGS)}; got {', '.join(sorted(unknown))}",
            file=sys.stderr,
        )
        return 2
    which = "not cuda and not compile"  # the CPU kernels; a -k of the caller narrows that
    if "-k" in extra:
        at = extra.index("-k")
        which = f"({which}) and ({' '.join(extra[at + 1 : at + 2]) or 'op'})"
        extra = extra[:at] + extra[at + 2 :]
    failed = []
    for name in names:
        print(f"{name}: building _C with {FLAGS[name]}", flush=True)
        env = environment(name, build(name))
        missed = check_planted(name, env)
        tests = [sys.executable, "-m", "pytest", "python_tests/ops", "-q", "-p", "no:cacheprovider"]
        tests += ["-k", which, *extra]
        if missed or subprocess.run(tests, env=env, cwd=ROOT).returncode != 0:
            failed.append(name)
    print(f"sanitize: {', '.join(failed)} failed" if failed else f"sanitize: {', '.join(names)} clean")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
