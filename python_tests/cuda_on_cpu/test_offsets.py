"""Every kernel that can reach past 2^31 elements of a tensor without visiting them all does so, in sparse memory.

Not here, since their kernels visit all elements or rows: outputs and values by row (embed, delay_pack), the dense sum
of scatter_sum, which zeroes the rows between, the products of kmeans_assign, the gradient of multistream_loss. Their
offsets are 64-bit by their types, and 32-bit arithmetic that overflows is a fault in every test.
"""

from __future__ import annotations

import dataclasses
import mmap

import pytest
import torch

from python_tests import cuda_on_cpu
from python_tests.ops.multistream_sample.test_multistream_sample import END, SAY, make_state
from speechlm_ext.ops import delay_unpack, multistream_embed, multistream_sample

LARGE = 1 << 31
_SPARSE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux


def sparse(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory where they are written."""
    numel = torch.Size(shape).numel()
    assert numel > LARGE
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=_SPARSE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.fixture
def shim():
    """The native module itself; ops run its kernels meanwhile."""
    module = cuda_on_cpu.load()
    with cuda_on_cpu.kernels_on_cpu(module):
        module.forget_memory()
        yield module


@pytest.mark.parametrize("width", [1024, 1029])  # by vectors, and by elements
def test_rows_of_the_embedding_table(shim, width):
    num_rows = LARGE // width + 9
    table = sparse(num_rows, width, dtype=torch.bfloat16)
    table[-3:] = torch.randn(3, width).bfloat16()
    ids = torch.tensor([[num_rows - 1, num_rows - 2], [num_rows - 3, num_rows - 1]])
    got = multistream_embed(ids, table)
    torch.testing.assert_close(got, table[ids].float().sum(1).bfloat16(), rtol=0, atol=0)


def test_rows_of_the_features(shim):
    width = 1 << 18
    num_features = LARGE // width + 5
    features = sparse(num_features, width, dtype=torch.bfloat16)
    features[-1] = torch.randn(width).bfloat16()
    positions = torch.full((num_features,), -1)
    positions[-1] = 0
    out = torch.full((1, width), float("nan"), dtype=torch.bfloat16)
    slots = torch.full((1,), -1, dtype=torch.int32)
    table = torch.randn(2, width).bfloat16()
    ids = torch.tensor([[1]])
    shim.multistream_embed(ids, table, None, [0], [], features, positions, out, slots, None, 1, 0)
    torch.testing.assert_close(out[0], (table[1].float() + features[-1].float()).bfloat16(), rtol=0, atol=0)


def test_clusters_of_kmeans_sums(shim):
    width = 1024
    num_clusters = LARGE // width + 3
    x = torch.randn(4, width)
    sums = sparse(num_clusters, width, dtype=torch.float64)
    labels = torch.full((4,), num_clusters - 1, dtype=torch.int32)
    step = torch.full((width,), 2.0**-30, dtype=torch.float64)
    offset = torch.zeros(width, dtype=torch.float64)
    shim.kmeans_sums(x, labels, offset, step, sums, None, torch.arange(4), 1, 0)
    torch.testing.assert_close(sums[-1], x.double().sum(0), rtol=0, atol=4 * 2.0**-30)
    assert not sums[:3].any()


def test_centroids_of_kmeans_assign(shim):
    """Two candidates, the first and the last, compared by their distances."""
    num_clusters, width = (1 << 12) + 1, (1 << 19) + 32
    centroids = sparse(num_clusters, width, dtype=torch.float32)
    x = torch.ones(1, width)
    centroids[-1] = 1.0
    padded = num_clusters + 3  # to groups of four
    terms = torch.zeros(4, padded)
    terms[1, 1 : num_clusters - 1] = 1.0  # half norms
    terms[1, num_clusters:] = float("inf")
    rows = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])  # no errors
    labels, counts = torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    distance = torch.full((1,), float("nan"), dtype=torch.float64)
    products = torch.zeros(1, padded)
    shim.kmeans_rescore_cuda(products, x, centroids, terms, rows, labels, distance, counts, 0)
    assert (labels.tolist(), distance.tolist(), counts.tolist()) == ([num_clusters - 1], [0.0], [1, 2, 0])


def test_rows_of_delay_unpack(shim):
    num_streams, delay = 32, LARGE // 32
    ids = sparse(delay + 2, num_streams, dtype=torch.int32)
    ids[:2, 1:] = 7
    ids[delay:, 0] = torch.tensor([5, 6], dtype=torch.int32)
    (got,) = delay_unpack(ids, [0, delay + 2], delays=[delay] + [0] * (num_streams - 1))
    assert got[:, 0].tolist() == [5, 6] and (got[:, 1:] == 7).all()


def test_logits_of_multistream_sample(shim):
    num_rows = LARGE // 8 + 2
    logits = sparse(num_rows, 8, dtype=torch.float16)
    logits[-1, :4] = torch.tensor(SAY)
    logits[-2, :4] = torch.tensor(END)
    state = make_state(2, delays=(0, 0, 0), source=torch.tensor([num_rows - 1, num_rows - 2]))
    assert multistream_sample(logits, state).tokens[:, 0].tolist() == [10, 5]


def test_history_of_multistream_sample(shim):
    """The second request writes its row behind the first one's 2^31 ids."""
    length = LARGE // 3 + 1
    state = make_state(2, delays=(0, 0, 0))
    state = dataclasses.replace(
        state,
        history=sparse(2, length, 3, dtype=torch.int64),
        history_logprob=sparse(2, length, 3, dtype=torch.float32),
    )
    small = torch.tensor([SAY + [0.0] * 4, END + [0.0] * 4])
    tokens = multistream_sample(small, state).tokens
    assert torch.equal(state.history[:, 0], tokens) and tokens[:, 0].tolist() == [10, 5]


def test_rows_of_multistream_loss(shim):
    """One live row, the last; its scope is the last columns."""
    columns = 1 << 20
    rows = LARGE // columns + 1
    logits = sparse(rows, columns, dtype=torch.bfloat16)
    logits[-1, -4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    live, coef = torch.zeros(rows, 1, dtype=torch.bool), torch.ones(rows, 1)
    live[-1] = True
    targets, token_nll = torch.full((rows, 1), 2), torch.full((rows, 1), float("nan"))
    loss, correct = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    count = torch.zeros(1, dtype=torch.int64)
    streams = [(0, False, False, [(0, columns - 4, 4)])]
    bytes_ = shim.multistream_loss_workspace(logits, 1, streams, False)
    workspace = torch.full((bytes_,), 255, dtype=torch.uint8)
    shim.multistream_loss_rows(
        logits, torch.arange(rows), targets, live, coef, None, None, streams, 0.0, 0.0, 0.0, False, token_nll, None,
        loss, correct, count, None, 1, workspace, 0,
    )  # fmt: skip
    want = torch.logsumexp(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0) - 3.0
    torch.testing.assert_close(token_nll[-1, 0], want)
    torch.testing.assert_close(loss[0].float(), want)
    assert token_nll[:-1].isnan().all() and correct.item() == 0
