"""Whether two trees would compile to the same module."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path


def digest_of_sources(root: Path, settings: str) -> str:
    """sha256 of all that the module is made from."""
    digest = hashlib.sha256(f"{sys.version} {settings}".encode())
    # __init__.py has the version.
    files = [root / "setup.py", root / "CMakeLists.txt", root / "speechlm_ext" / "__init__.py"]
    for folder in ("csrc", "cmake"):
        files += sorted(path for path in (root / folder).rglob("*") if path.is_file())
    for path in files:
        if path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
