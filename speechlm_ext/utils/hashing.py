"""sha256 of JSON values; that of a file is ``utils/files/io.sha256_file``."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sha256_json(value: Any) -> str:
    """Return the sha256 of a JSON value as 64 hex digits; the order of keys in its objects does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
