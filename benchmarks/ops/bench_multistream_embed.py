"""multistream_embed against its rivals: ``make bench OP=multistream_embed``.

Rivals: `F.embedding_bag`; gathering ``[N, S, D]`` and summing it, as ESPnet-SpeechLM does; on a GPU that sum compiled
by torch. Half of the rows are text, with pads in all streams but the first. The limit of the forward pass is a copy of
as many bytes as it must read and write; of both passes, that and the same for the touched rows of the gradient.

Passes: ``forward``; ``forward_backward`` with the dense gradient; ``sparse``, both with a coalesced sparse gradient;
``features``, a forward in which every other row takes a row of continuous features (rivals: a second pass for them).
The shape ``decode`` is one step of generation for a batch of 8.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import speechlm_ext as sx
from benchmarks.common.harness import Case, compare, compiled, devices

# name: (rows, streams, width, table rows, dtype)
SHAPES = {
    "smoke": (64, 9, 64, 500, torch.float32),
    "decode": (8, 9, 256, 13_000, torch.float32),
    "4k_fp32": (4096, 9, 1024, 62_670, torch.float32),
    "4k_bf16": (4096, 9, 1024, 62_670, torch.bfloat16),
    "16k_bf16": (16_384, 9, 2048, 62_670, torch.bfloat16),
}
PASSES = ["forward", "forward_backward", "sparse", "features"]


def gather_and_sum(ids, table, sparse=False):
    return (F.embedding(ids, table, sparse=sparse) * (ids != 0).unsqueeze(-1)).sum(1)


def embedding_bag(ids, table, sparse=False):
    return F.embedding_bag(ids, table, mode="sum", padding_idx=0, sparse=sparse)


def make_case(shape, passes, device):
    num_rows, num_streams, width, table_rows, dtype = SHAPES[shape]
    torch.manual_seed(0)
    ids = torch.randint(1, table_rows, (num_rows, num_streams))
    ids[torch.rand(num_rows) < 0.5, 1:] = 0
    real, touched = int((ids != 0).sum()), int(ids[ids != 0].unique().numel())
    ids = ids.to(device)
    has_backward, sparse = passes in ("forward_backward", "sparse"), passes == "sparse"
    table = torch.randn(table_rows, width, device=device).to(dtype).requires_grad_(has_backward)
    grad = torch.randn(num_rows, width, device=device).to(dtype)
    positions = torch.randperm(num_rows)[: num_rows // 2].to(device)
    features = torch.randn(num_rows // 2, width, device=device).to(dtype)

    def timed(embed):
        if passes == "features":
            return lambda: embed(ids, table).index_add_(0, positions, features)
        if not has_backward:
            return lambda: embed(ids, table)

        def both():
            (found,) = torch.autograd.grad(embed(ids, table, sparse=sparse), table, grad)
            return found.coalesce() if sparse else found

        return both

    def with_features():
        return sx.ops.multistream_embed(ids, table, features=features, feature_positions=positions)

    rivals = {"embedding_bag": timed(embedding_bag), "gather_and_sum": timed(gather_and_sum)}
    if device == "cuda" and (run := compiled(shape, gather_and_sum, ids, table)) is not None:
        rivals["gather_and_sum_compiled"] = timed(run)
    wide = table.detach().double()
    if has_backward:
        expected = torch.zeros(table_rows, width, dtype=torch.float64, device=device)
        flat = ids.flatten()
        sources = grad.double().repeat_interleave(num_streams, 0)[flat != 0]
        expected.index_add_(0, flat[flat != 0], sources)
    else:
        expected = gather_and_sum(ids, wide)
        if passes == "features":
            expected.index_add_(0, positions, features.double())
    # Rivals that sum in 16 bits are allowed what that costs.
    tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())

    def check(name, got):
        error = float((got.to_dense().double() - expected).abs().max())
        assert error <= tolerance, f"{name} computes something else"

    moved = (real + num_rows) * width * dtype.itemsize
    if has_backward:
        moved += (real + touched) * width * dtype.itemsize
    if passes == "features":
        moved += len(features) * width * dtype.itemsize
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Case(
        op="multistream_embed",
        shape=f"{shape}_{passes}",
        device=device,
        ours=with_features if passes == "features" else timed(sx.ops.multistream_embed),
        rivals=rivals,
        check=check,
        limit=lambda: target.copy_(source),
        needs_grad=has_backward,
        extra=dict(bytes_moved=moved),
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, passes, device):
    if device == "cpu" and shape == "16k_bf16":
        pytest.skip("a shape for GPUs")
    if shape == "decode" and passes != "forward":
        pytest.skip("generation has a forward alone")
    compare(benchmark, make_case(shape, passes, device))
