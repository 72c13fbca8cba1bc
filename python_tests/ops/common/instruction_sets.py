"""The instruction sets of the CPU kernels, for tests that take one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from speechlm_ext.ops.common.native import native


@contextmanager
def simd(name: str) -> Iterator[None]:
    """The CPU kernels use the set ``name`` while this lasts."""
    native.use_simd(name)
    try:
        yield
    finally:
        native.use_simd("")
