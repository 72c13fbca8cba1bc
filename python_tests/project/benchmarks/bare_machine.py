"""A process without the packages that a GPU machine may lack: one that holds torch and what commonly lies beside it.

``bare_environment`` gives variables under which a Python process, and each that it starts, can import the packages of
``PRESENT`` with what they require, and no other that happens to be installed here: a ``sitecustomize`` on PYTHONPATH
takes the others out of the import system and out of the list of distributions.
"""

from __future__ import annotations

import functools
import os
import re
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

#: Distributions that such a machine has, of those that code of ours could import.
PRESENT = """
    accelerate build cmake cython einops filelock huggingface-hub hypothesis jinja2 joblib matplotlib ninja numba numpy
    onnxruntime packaging pandas pillow pip protobuf psutil py-cpuinfo pyarrow pybind11 pytest pytest-benchmark
    pytest-timeout pytest-xdist pyyaml regex requests rich safetensors scikit-learn scipy sentencepiece setuptools sympy
    tensorboard threadpoolctl tiktoken tokenizers torch torchaudio tqdm transformers triton typing-extensions wheel
""".split()

_SITE = """
import sys
from importlib.machinery import PathFinder

MODULES, DISTRIBUTIONS = {modules!r}, {distributions!r}


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MODULES else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        for found in PathFinder.find_distributions(*args, **kwargs):
            if (found.metadata["Name"] or "").lower().replace("_", "-") not in DISTRIBUTIONS:
                yield found


sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_requirements(names: list[str]) -> set[str]:
    """The distributions and what they require, as far as it is installed."""
    found: set[str] = set()
    waiting = [_normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            required = [Requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [_normal(r.name) for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@functools.cache
def hidden() -> tuple[frozenset[str], frozenset[str]]:
    """Modules and distributions that are installed here and that the machine lacks."""
    present = _with_requirements(PRESENT) | {"speechlm-ext"}
    by_module = {m: {_normal(d) for d in ds} for m, ds in packages_distributions().items()}
    modules = frozenset(m for m, ds in by_module.items() if not ds & present)
    return modules, frozenset(d for ds in by_module.values() for d in ds if d not in present)


def bare_environment(folder: Path) -> dict[str, str]:
    """Variables of a bare process; ``folder`` gets the ``sitecustomize``. Nothing of a pytest around it is in them."""
    modules, distributions = (sorted(names) for names in hidden())
    (folder / "sitecustomize.py").write_text(
        _SITE.format(modules=set(modules), distributions=set(distributions)), "utf-8"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SPEECHLM_", "OUT"))}
    return {**kept, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
