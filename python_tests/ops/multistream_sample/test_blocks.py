"""multistream_sample on the GPU: the blocks of a request, one per stream, in any order and interleaved."""

from __future__ import annotations

import pytest
import torch

from python_tests import cuda_on_cpu
from python_tests.ops.multistream_sample.test_multistream_sample import (
    EOS,
    make_logits,
    make_state,
    roll,
    saying,
)


@pytest.mark.parametrize("seed", cuda_on_cpu.SEEDS)
def test_blocks_without_content(seed):
    """A block that samples nothing has no barrier before it arrives; another one may then move the request on."""
    with cuda_on_cpu.kernels_on_cpu(cuda_on_cpu.load(), seed):
        rows, _ = roll(make_state(1), saying(3))
    assert rows[0, :, 0].tolist() == [10, 10, 10, EOS, 0]


@pytest.mark.parametrize("seed", cuda_on_cpu.SEEDS)
def test_forced_ids_without_column(seed):
    forced = torch.full((2, 4, 3), 999_999)
    with cuda_on_cpu.kernels_on_cpu(cuda_on_cpu.load(), seed):
        rows, state = roll(make_state(forced=forced, max_frames=6), lambda n: make_logits())
    assert (rows[:, :4][:, 2:] == 999_999).all() and state.row.min() > 4
