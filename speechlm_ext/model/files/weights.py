"""Reads weights files, and checks a model's sizes against their headers, before memory is allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from speechlm_ext.errors import CheckpointError, foreign_errors

#: Settings of transformers' configurations that are a dimension of some weight, or a number of weights.
_SIZES = (
    "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "head_dim", "num_hidden_layers",
    "n_layer", "num_layers", "num_attention_heads", "n_head", "num_key_value_heads", "num_experts",
    "num_local_experts", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip


def check_sizes(path: Path, backbone: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` for a missing or damaged file, or a configuration with larger sizes than its own.

    A damaged number could otherwise take all memory or time. Loading the weights compares every size exactly.
    """
    with _reading(path, "copy it again."), safe_open(path, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    largest = max([len(shapes), *(size for shape in shapes for size in shape)])
    for name in _SIZES:
        value = backbone.get(name)
        if isinstance(value, (int, float)) and value > largest:
            raise CheckpointError(
                f"{path} does not fit config.json beside it: backbone.{name} is {value:g}, but no weight has more than "
                f"{largest} rows or columns. Copy the folder again."
            )


def read_tensors(path: Path, way_out: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises :class:`CheckpointError`: it is missing or damaged."""
    with _reading(path, way_out):
        return load_file(path)


@contextlib.contextmanager
def _reading(path: Path, way_out: str) -> Iterator[None]:
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name}: the folder is incomplete; {way_out}")
    with foreign_errors(CheckpointError, f"{path} cannot be read", f"It is damaged or truncated: {way_out}"):
        if path.is_dir():  # which the library reports in its own way on each system
            raise IsADirectoryError("it is a folder")
        yield
