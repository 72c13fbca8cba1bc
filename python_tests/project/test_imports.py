"""The shape of the code: imports that run one way, and folders that can be read at a glance."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("speechlm_ext", "benchmarks", "python_tests")
#: Files and folders that a folder may hold, besides ``__init__.py``; the top of a package has a room for each subject.
MOST_ENTRIES, MOST_ENTRIES_AT_TOP = 12, 20
#: What a room may import of the package, besides ``errors`` and ``utils``: the rooms below it.
BELOW = {
    "utils": set(),
    "ops": set(),
    "tasks": set(),
    "audio": set(),
    "config": set(),
    "layout": {"tasks"},
    "kmeans": {"ops"},
    "importers": {"kmeans"},
    "tokenizers": {"audio", "kmeans", "layout", "ops"},
    "model": {"layout", "ops", "tasks", "tokenizers"},
    "data": {"audio", "kmeans", "layout", "ops", "tasks", "tokenizers"},
    "units": {"audio", "data", "kmeans", "ops", "tokenizers"},
    "training": {"data", "layout", "model"},
    "generation": {"audio", "data", "layout", "model", "ops", "tasks", "tokenizers"},
    "evaluation": {"audio", "data", "layout", "model", "tasks", "tokenizers"},
    "speechlm": {"generation", "model"},
    "doctor": {"model", "ops"},
    "cli": {"config"},
}

Graph = dict[str, set[str]]


def modules_of(package: str) -> dict[str, Path]:
    """Name and file of every module, folders under their own name."""
    files = (ROOT / package).rglob("*.py")
    parts = {p: p.relative_to(ROOT).with_suffix("").parts for p in files}
    return {".".join(q[:-1] if q[-1] == "__init__" else q): p for p, q in parts.items()}


def imports_of(package: str) -> Graph:
    """For each module the others of the package that it imports anywhere: inside functions and for types, too."""
    modules = modules_of(package)

    def nearest(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph: Graph = {}
    for module, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {nearest(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
                found |= {nearest(f"{node.module}.{alias.name}") for alias in node.names}
        graph[module] = found - {"", module, package}
    return graph


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circles(package: str):
    try:
        TopologicalSorter(imports_of(package)).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " -> ".join(error.args[1]))


def test_rooms_import_the_rooms_below():
    found = {}
    for module, others in imports_of("speechlm_ext").items():
        room = (module.split(".") + [""])[1]
        if room in ("", "errors"):
            continue
        rooms = {other.split(".")[1] for other in others} - {room, "errors", "utils"}
        if upwards := rooms - BELOW[room]:
            found[module] = sorted(upwards)
    assert found == {}, "a room may import those below it; see BELOW and docs/design.md"


def test_the_reference_of_an_op_is_imported_by_no_production_code():
    for module, others in imports_of("speechlm_ext").items():
        assert not [o for o in others if o.endswith(".reference")], module


def test_folders_are_small():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    entries = {
        (path.parents[n], path.parents[n - 1] if n else path)
        for path in map(Path, listed.stdout.split())
        if path.parts[0] in (*PACKAGES, "csrc") and path.name != "__init__.py"
        for n in range(len(path.parents) - 1)
    }
    sizes = Counter(str(folder) for folder, _ in entries if folder.parts[-1] != "speech")
    tops = {name: sizes.pop(name) for name in PACKAGES}
    assert {k: v for k, v in tops.items() if v > MOST_ENTRIES_AT_TOP} == {}
    assert {k: v for k, v in sizes.items() if v > MOST_ENTRIES} == {}
