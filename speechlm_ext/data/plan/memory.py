"""An estimate of what training needs in memory, from sizes alone: before a GPU is held, not instead of trying.

Counted are weights, gradients, Adam's moments and master weights under DeepSpeed's ZeRO, activations of a Llama-shaped
backbone and of a frame transformer, and one chunk of logits. Left out are the allocator's slack and communication
buffers; add 10 to 20 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from speechlm_ext.errors import ConfigError
from speechlm_ext.layout import TokenLayout

#: Sizes of a frame transformer, with the defaults of the training config (whose class takes long to import).
_FRAME = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "ffn_size": 384}
#: Rows of logits that the loss holds at a time, at least.
_LOGIT_ROWS = 512


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model and how it is trained; the names are those of the training config."""

    hidden_size: int = 256
    """Width D."""
    num_layers: int = 6
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key/value heads; default as many as heads."""
    ffn_size: int = 704
    """Width inside the feed-forward part."""
    max_positions: int | None = None
    """Longest sequence that the model takes; None does not check it."""
    tie_head: bool = False
    """Whether embedding and head share one table."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage."""
    world: int = 1
    """Number of processes."""
    activation_checkpointing: bool = False
    """Keep only each layer's input."""
    frame_transformer: dict[str, int] | None = None
    """Sizes of the transformer inside a frame, as in the training config; None: there is none."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "ffn_size", "world"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be >= 1, got {getattr(self, name)}.")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"model.zero_stage must be 0 to 3, got {self.zero_stage}.")
        for name, value in (self.frame_transformer or {}).items():
            if name not in _FRAME or value < 1:
                raise ConfigError(
                    f"model.frame_transformer has sizes {list(_FRAME)} of at least 1, got {name} {value}."
                )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each process."""

    num_parameters: int
    """Values, not bytes."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(shape: ModelShape, layout: TokenLayout, rows: int) -> MemoryEstimate:
    """Memory of one training step over packs of ``rows`` rows.

    Args:
        shape: sizes, precision, ZeRO stage and number of processes.
        layout: gives vocabulary and streams.
        rows: most rows in a pack.
    """
    D, F, V = shape.hidden_size, shape.ffn_size, layout.vocab_size
    kv = (shape.num_kv_heads or shape.num_heads) / shape.num_heads
    layer = int(2 * D * D + 2 * kv * D * D) + 3 * D * F + 2 * D
    count = (1 if shape.tie_head else 2) * V * D + layout.num_streams * D + shape.num_layers * layer + D
    # Values that are kept for each row and inner position of a frame, were every row a frame that is learnt.
    per_inner, inner = 0, layout.num_streams - 1
    if shape.frame_transformer is not None:
        frame = _FRAME | shape.frame_transformer
        W, L, f = frame["hidden_size"], frame["num_layers"], frame["ffn_size"]
        count += L * (4 * W * W + 3 * W * f + 2 * W) + W + 3 * D * W + inner * W + D
        per_inner = (
            (L * W + 8 * W + 4 * f if shape.activation_checkpointing else L * (8 * W + 4 * f)) + 3 * D + W
        )
    wide = 2 if shape.precision == "bf16" else 4
    optimizer = count * (8 + (4 if shape.precision == "bf16" else 0))
    weights = gradients = count * wide
    optimizer //= shape.world if shape.zero_stage >= 1 else 1
    gradients //= shape.world if shape.zero_stage >= 2 else 1
    weights //= shape.world if shape.zero_stage >= 3 else 1
    # Kept for the backward pass of a layer: two norms and their inputs, q, k, v, the attention's output, and gate,
    # up, their activation and product.
    inside = int((6 + 2 * kv) * D) + 4 * F
    per_row = shape.num_layers * D + inside if shape.activation_checkpointing else shape.num_layers * inside
    widest = max(sum(end - start for start, end in scope) for scope in layout.scopes("own"))
    return MemoryEstimate(
        count,
        weights,
        gradients,
        optimizer,
        rows * (per_row + 2 * D + inner * per_inner) * wide,
        2 * min(rows, _LOGIT_ROWS) * widest * 4,
    )
