"""The ops: exact, fast, and usable alone in anybody's training script."""

from speechlm_ext.ops.common.native import OpError
from speechlm_ext.ops.delay_pack.delay_pack import PackedBatch, delay_pack
from speechlm_ext.ops.delay_pack.presets import delay_preset
from speechlm_ext.ops.delay_pack.unpack import DelayUnpacker, delay_unpack
from speechlm_ext.ops.kmeans_assign.index import CentroidIndex
from speechlm_ext.ops.kmeans_assign.kmeans_assign import AssignStats, kmeans_assign
from speechlm_ext.ops.multistream_embed.multistream_embed import multistream_embed
from speechlm_ext.ops.multistream_loss.arguments import plan_loss_rows, separate_head_rows
from speechlm_ext.ops.multistream_loss.multistream_loss import (
    MultiStreamLoss,
    multistream_logprobs,
    multistream_loss,
)
from speechlm_ext.ops.multistream_loss.rows import LossRows
from speechlm_ext.ops.multistream_sample.decode_state import DecodeState
from speechlm_ext.ops.multistream_sample.multistream_sample import SampledStep, multistream_sample
from speechlm_ext.ops.scatter_sum.scatter_sum import scatter_sum_rows, segment_sum

__all__ = [
    "AssignStats",
    "CentroidIndex",
    "DecodeState",
    "DelayUnpacker",
    "LossRows",
    "MultiStreamLoss",
    "OpError",
    "PackedBatch",
    "SampledStep",
    "delay_pack",
    "delay_preset",
    "delay_unpack",
    "kmeans_assign",
    "multistream_embed",
    "multistream_logprobs",
    "multistream_loss",
    "multistream_sample",
    "plan_loss_rows",
    "scatter_sum_rows",
    "segment_sum",
    "separate_head_rows",
]
