"""Makes stubs of the C library, to link for an older glibc than this system's.

A linker gives each symbol its default version, the newest: ``pthread_create@GLIBC_2.34``. The system's own libraries
also have the older ones (``pthread_create@GLIBC_2.2.5``), for programs of before. A stub has every symbol of its
library once, by its newest version up to the wanted one. A symbol that is newer altogether keeps its version, so that
`auditwheel` sees it. A stub stands in for the whole library, as the linker reads no second one of the same name.

Prints the paths of the stubs, separated by semicolons; nothing when the system's glibc is old enough.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

LIBRARIES = ("libc.so.6", "libm.so.6")
Version = tuple[int, ...]


def version_key(name: str) -> Version:
    """``(2, 34)`` of ``GLIBC_2.34``."""
    return tuple(map(int, name.removeprefix("GLIBC_").split(".")))


def choose_versions(library: Path, wanted: Version) -> dict[str, tuple[str, str]]:
    """Symbol -> its kind (``function`` or ``object``), and its newest version up to ``wanted``, else its oldest."""
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    kinds: dict[str, str] = {}
    versions: defaultdict[str, list[str]] = defaultdict(list)
    for kind, name, version in re.findall(r" (\w) (\w+)@@?(GLIBC_[\d.]+)$", listed.stdout, re.MULTILINE):
        kinds[name] = "function" if kind in "TtWwi" else "object"
        versions[name].append(version)
    chosen = {}
    for name, found in versions.items():
        found.sort(key=version_key)
        chosen[name] = (kinds[name], ([v for v in found if version_key(v) <= wanted] or found[:1])[-1])
    return chosen


def make_stub(symbols: dict[str, tuple[str, str]], name: str, folder: Path, cc: str) -> Path:
    """A library of that name with these symbols by these versions, and nothing behind them."""
    by_version: defaultdict[str, list[str]] = defaultdict(list)
    for symbol, (_, version) in symbols.items():
        by_version[version].append(symbol)
    source, script, stub = folder / f"{name}.s", folder / f"{name}.map", folder / name
    source.write_text("".join(f".globl {s}\n.type {s}, %{kind}\n{s}:\n" for s, (kind, _) in symbols.items()))
    nodes = [f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in by_version.items()]
    script.write_text("".join(nodes))
    link = [f"-Wl,--version-script={script}", f"-Wl,-soname={name}", "-nostdlib", "-shared"]
    subprocess.run([cc, *link, "-o", stub, source], check=True)
    return stub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glibc", required=True, help="the wanted version, e.g. 2.28")
    parser.add_argument("--cc", required=True, help="the compiler")
    parser.add_argument("--out", required=True, type=Path, help="folder for the stubs")
    options = parser.parse_args()
    wanted = version_key(options.glibc)
    if version_key(os.confstr("CS_GNU_LIBC_VERSION").split()[-1]) <= wanted:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    stubs = []
    for name in LIBRARIES:
        found = subprocess.run(
            [options.cc, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        symbols = choose_versions(Path(found.stdout.strip()), wanted)
        stubs.append(make_stub(symbols, name, options.out, options.cc))
    print(";".join(map(str, stubs)))


if __name__ == "__main__":
    main()
