"""multistream_embed against its rivals: ``make bench OP=multistream_embed``.

Rivals: `F.embedding_bag`; gathering ``[N, S, D]`` and summing it, as ESPnet-SpeechLM does; on a GPU that sum compiled
by torch. Half of the rows are text, with pads in all streams but the first. The limit of the forward pass is a copy of
as many bytes as it must read and write; of both passes, that and the same for the touched rows of the gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import speechlm_ext as sx
from benchmarks.harness import compare, devices

# name: (rows, streams, width, table rows, dtype)
SHAPES = {
    "smoke": (64, 9, 64, 500, torch.float32),
    "4k_fp32": (4096, 9, 1024, 62_670, torch.float32),
    "4k_bf16": (4096, 9, 1024, 62_670, torch.bfloat16),
    "16k_bf16": (16_384, 9, 2048, 62_670, torch.bfloat16),
}


def gather_and_sum(ids, table):
    return (F.embedding(ids, table) * (ids != 0).unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, passes, device):
    num_rows, num_streams, width, table_rows, dtype = SHAPES[shape]
    if device == "cpu" and shape == "16k_bf16":
        pytest.skip("a shape for GPUs")
    torch.manual_seed(0)
    ids = torch.randint(1, table_rows, (num_rows, num_streams))
    ids[torch.rand(num_rows) < 0.5, 1:] = 0
    real, touched = int((ids != 0).sum()), int(ids[ids != 0].unique().numel())
    ids = ids.to(device)
    table = torch.randn(table_rows, width, device=device).to(dtype).requires_grad_(passes != "forward")
    grad = torch.randn(num_rows, width, device=device).to(dtype)

    def timed(forward):
        if passes == "forward":
            return lambda: forward(ids, table)

        def both():
            table.grad = None
            forward(ids, table).backward(grad)
            return table.grad

        return both

    rivals = {
        "embedding_bag": timed(lambda i, t: F.embedding_bag(i, t, mode="sum", padding_idx=0)),
        "gather_and_sum": timed(gather_and_sum),
    }
    if device == "cuda":
        rivals["gather_and_sum_compiled"] = timed(torch.compile(gather_and_sum))
    wide = table.detach().double()
    expected = gather_and_sum(ids, wide) if passes == "forward" else None
    if expected is None:
        expected = torch.zeros(table_rows, width, dtype=torch.float64, device=device)
        flat = ids.flatten()
        sources = grad.double().repeat_interleave(num_streams, 0)[flat != 0]
        expected.index_add_(0, flat[flat != 0], sources)
    # Rivals that sum in 16 bits are allowed what that costs.
    tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())

    def check(name, got):
        assert float((got.double() - expected).abs().max()) <= tolerance, f"{name} computes something else"

    moved = (real + num_rows) * width * dtype.itemsize
    if passes != "forward":
        moved += (real + touched) * width * dtype.itemsize
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    compare(
        benchmark,
        op="multistream_embed",
        shape=f"{shape}_{passes}",
        device=device,
        ours=timed(sx.ops.multistream_embed),
        rivals=rivals,
        check=check,
        limit=lambda: target.copy_(source),
        bytes_moved=moved,
    )
