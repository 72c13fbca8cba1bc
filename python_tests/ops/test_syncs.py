"""Ops that promise not to wait for the GPU do not: torch raises at every synchronization of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import speechlm_ext as sx
from speechlm_ext.ops.decode_layer import add_rms_norm, decode_attention, rope_and_store, silu_mul


def pack(device: str) -> Callable[[], object]:
    """delay_pack of segments in one tensor."""
    flat, offsets = torch.randint(1, 999, (210, 9), device=device), torch.tensor([0, 37, 37, 210])
    return lambda: sx.ops.delay_pack((flat, offsets), delays=list(range(9)), pad_ids=[0] * 9)


def embed(device: str) -> Callable[[], object]:
    """multistream_embed with the dense gradient."""
    ids = torch.randint(0, 50, (200, 9), device=device)
    table = torch.randn(50, 64, device=device, requires_grad=True)
    grad = torch.randn(200, 64, device=device)
    return lambda: torch.autograd.grad(sx.ops.multistream_embed(ids, table), table, grad)


def assign(device: str) -> Callable[[], object]:
    """kmeans_assign with an index that is there already."""
    index, x = (
        sx.ops.CentroidIndex.build(torch.randn(70, 33, device=device)),
        torch.randn(200, 33, device=device),
    )
    return lambda: sx.ops.kmeans_assign(x, index)


def sample(device: str) -> Callable[[], object]:
    """multistream_sample of one row."""
    state = sx.ops.DecodeState.new(
        6,
        scope_ids=[torch.arange(40, device=device)],
        delays=[0],
        pad_ids=[0],
        eos_id=9,
        top_k=5,
        num_rows=20,
    )
    logits = torch.randn(6, 40, device=device)
    return lambda: sx.ops.multistream_sample(logits, state)


def decode(device: str) -> Callable[[], object]:
    """A decode layer's step, without its products."""
    keys, values = torch.zeros(2, 3, 300, 2, 16, device=device).unbind()
    position, slot = torch.tensor([7, 255, 299], device=device), torch.arange(3, device=device)
    qkv, cos = torch.randn(3, 8 * 16, device=device), torch.randn(300, 16, device=device)
    weight = torch.randn(128, device=device)

    def call() -> object:
        query = rope_and_store(qkv, cos, cos, position, slot, keys, values, 4)
        mixed = decode_attention(query, keys, values, position + 1, slot, 0.3, window=270)
        return mixed, add_rms_norm(qkv, qkv, weight, 1e-6), silu_mul(qkv)

    return call


OPS = {
    "decode_layer": decode,
    "delay_pack": pack,
    "multistream_embed": embed,
    "kmeans_assign": assign,
    "multistream_sample": sample,
}


@contextmanager
def syncs_raise() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_no_op_waits_for_the_gpu(op, record_property):
    call = OPS[op]("cuda")
    call()  # the first call may initialize libraries
    with syncs_raise():
        call()
    record_property("syncs", 0)


@pytest.mark.cuda
def test_a_synchronization_raises():
    value = torch.ones(1, device="cuda")
    with syncs_raise(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("op", OPS)
def test_the_calls_are_valid(op):
    OPS[op]("cpu")()
