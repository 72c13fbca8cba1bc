"""The parts of a decode step of one Transformer layer: a row of M requests each, for Llama-type backbones.

A request's rows have the same bits alone and in any batch, on the CPU for any number of threads as well. For inference:
none has gradients. Internal to the package: the engine's decode layer is made of them.

Axes: M rows of a step, one for each request; K input and N output width; D width of the residual stream; H heads, G
key/value heads; E head size of queries and keys, F of values; B slots of the cache, R rows of a slot; P positions.
"""

from speechlm_ext.ops.decode_layer.activation import silu_mul
from speechlm_ext.ops.decode_layer.attention import decode_attention
from speechlm_ext.ops.decode_layer.linear import decode_linear
from speechlm_ext.ops.decode_layer.norm import add_rms_norm
from speechlm_ext.ops.decode_layer.rotary import rope_and_store

__all__ = ["add_rms_norm", "decode_attention", "decode_linear", "rope_and_store", "silu_mul"]
