"""The version of the package, its only place, and the oldest Python and torch that it runs on.

The build reads this file without importing the package, so it imports nothing but the standard library.
"""

from __future__ import annotations

import re
import sys

__version__ = "0.1.0"

#: The oldest versions that run it; pyproject.toml declares the same.
MIN_PYTHON, MIN_TORCH = (3, 10), (2, 6)


def check_requirements() -> None:
    """Refuse a Python or a torch that is too old. Reads the installed torch's version without importing torch.

    Raises:
        ImportError: what is needed, what was found, and what to do, in one sentence.
    """
    if sys.version_info < MIN_PYTHON:
        raise ImportError(
            f"speechlm_ext {__version__} needs Python {_dotted(MIN_PYTHON)} or later, but this is Python "
            f"{_dotted(sys.version_info[:3])} ({sys.executable}): make an environment with a newer Python."
        )
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("torch")
    except PackageNotFoundError:
        return  # `import torch` says so by itself
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < MIN_TORCH:
        raise ImportError(
            f"speechlm_ext {__version__} needs torch {_dotted(MIN_TORCH)} or later, but torch {found} is installed: "
            f"pip install 'torch>={_dotted(MIN_TORCH)}'."
        )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
