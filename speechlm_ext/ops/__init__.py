"""The ops: exact, fast, and usable alone in anybody's training script."""

from speechlm_ext.ops._native import OpError
from speechlm_ext.ops.delay_pack import PackedBatch, delay_pack, delay_unpack

__all__ = ["OpError", "PackedBatch", "delay_pack", "delay_unpack"]
