"""The parts of one Transformer layer over packed rows that lie between its matrix products, for training on the CPU.

Each reads and writes its tensors once, forward and backward, in float32. Internal to the package: the backbone's layers
are made of them where nothing better is there (:mod:`speechlm_ext.model.backbone.acceleration`).

Axes: N packed rows; D width of the residual stream; I width inside the feed-forward part; H heads, G key/value heads,
E head size.
"""

from speechlm_ext.ops.packed_layer.attention import ATTENTION_LANES, packed_attention
from speechlm_ext.ops.packed_layer.rows import packed_rms_norm, packed_rotary, packed_swiglu

__all__ = ["ATTENTION_LANES", "packed_attention", "packed_rms_norm", "packed_rotary", "packed_swiglu"]
