"""The chunks of a call on a GPU: their size, their labels, and the order that they ask of two streams."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import speechlm_ext as sx
from python_tests import cuda_on_cpu
from python_tests.ops.kmeans_assign.test_kmeans_assign import assert_exact, randn

assign_module = sys.modules["speechlm_ext.ops.kmeans_assign.kmeans_assign"]
MAIN = 0  # the caller's stream
WIDTH, CLUSTERS = 9, 30


@pytest.fixture
def shim(monkeypatch) -> Iterator[ModuleType]:
    """The CUDA kernels with chunks of 128 rows."""
    shim = cuda_on_cpu.load()
    shim.reset_machine()
    monkeypatch.setattr(assign_module, "_PRODUCT_BYTES", 1)
    with cuda_on_cpu.kernels_on_cpu(shim):
        assert assign_module.has_cublas(torch.empty(0))  # before anything is recorded
        yield shim
    shim.reset_machine()


def test_chunks_are_whole_waves():
    """Of an H100's 132 multiprocessors: tiles of 128 rows by 256 centroids."""
    rows = assign_module.chunk_rows
    assert rows(5000, 16 << 20, 132) == 6 * 128  # 120 tiles
    assert rows(5000, 34 << 20, 132) == 13 * 128  # 260 tiles, two waves
    assert rows(500, 16 << 20, 132) == 65 * 128  # 130 tiles
    assert rows(1 << 20, 16 << 20, 132) == 128
    for num_clusters in (4, 100, 3000, 20_000):
        chunk = rows(num_clusters, 16 << 20, 132)
        assert chunk % 128 == 0 and chunk * num_clusters * 4 <= 16 << 20


@pytest.mark.parametrize("source", ["cuBLAS", "torch"])
@pytest.mark.parametrize("code_bytes", [1, 2 * 16 * 128 * 2, 1 << 20])  # codes of one chunk, of two, of all
def test_labels_of_several_chunks(shim, monkeypatch, source, code_bytes):
    monkeypatch.setattr(assign_module, "_CODE_BYTES", code_bytes)
    monkeypatch.setattr(assign_module, "has_cublas", lambda tensor: source == "cuBLAS")
    x = randn(700, WIDTH, seed=1)
    x[130, 3], x[699] = float("nan"), 1e16
    shim.take_events()
    stats = assert_exact(x, randn(CLUSTERS, WIDTH, seed=2))
    events = shim.take_events()
    assert int(stats.num_reranked) > 0
    assert events.get("cublasGemmEx", 0) == (6 if source == "cuBLAS" else 0)
    assert events["kmeans_rescore_cuda.cu: kernel"] == 6


def schedule(shim: ModuleType, num_rows: int) -> list[tuple[str, str, int, int]]:
    index = sx.ops.CentroidIndex.build(randn(CLUSTERS, WIDTH, seed=2))
    shim.keep_schedule(True)
    try:
        sx.ops.kmeans_assign(randn(num_rows, WIDTH, seed=1), index)
        return shim.take_schedule()
    finally:
        shim.keep_schedule(False)


class Order:
    """What is sure to have ended before a work begins, by the streams' own order and their events."""

    def __init__(self, entries: list[tuple[str, str, int, int]]) -> None:
        self.before: list[frozenset[int]] = []  # for each work those that end before it
        self.works: dict[str, list[int]] = defaultdict(list)
        done: dict[int, set[int]] = defaultdict(set)  # by stream
        signals: dict[int, set[int]] = {}
        self.streams: set[int] = set()
        for what, name, stream, event in entries:
            if what == "record":
                signals[event] = set(done[stream])
            elif what == "wait":
                done[stream] |= signals[event]
            else:
                self.works[name.split("<")[0] if what == "launch" else what].append(len(self.before))
                self.before.append(frozenset(done[stream]))
                done[stream].add(len(self.before) - 1)
                self.streams.add(stream)
        self.at_end = frozenset(done[MAIN])


@pytest.mark.parametrize("code_bytes", [1, 1 << 20])
def test_what_streams_wait_for(shim, monkeypatch, code_bytes):
    """A product waits for its codes and for the labels of its buffer's former products, labels for their products, the
    caller for all; and a product does not wait for the labels of the chunk before it."""
    monkeypatch.setattr(assign_module, "_CODE_BYTES", code_bytes)
    order = Order(schedule(shim, 5 * 128 + 7))
    products, labels = order.works["product"], order.works["kernel"]
    codes = order.works["quantize_rows_kernel"]
    assert len(products) == len(labels) == 6 and len(codes) == (6 if code_bytes == 1 else 1)
    assert len(order.streams) == 2
    for i in range(6):
        assert codes[min(i, len(codes) - 1)] in order.before[products[i]]
        assert products[i] in order.before[labels[i]]
        if i >= 2:
            assert labels[i - 2] in order.before[products[i]]
        if i >= 1:
            assert labels[i - 1] not in order.before[products[i]]
    for i in range(1, len(codes)):
        assert products[i - 1] in order.before[codes[i]]  # its codes are read until then
    assert order.at_end == frozenset(range(len(order.before)))


def test_one_chunk_and_a_capture_have_one_stream(shim):
    assert Order(schedule(shim, 100)).streams == {MAIN}
    shim.machine().is_capturing = True
    entries = schedule(shim, 1000)
    assert Order(entries).streams == {MAIN}
    assert {what for what, *_ in entries} == {"launch", "product"}


def test_after_an_error_the_caller_still_waits(shim):
    """The labels of the first chunk may be under way when a product fails; its memory must not be freed before."""
    index = sx.ops.CentroidIndex.build(randn(CLUSTERS, WIDTH, seed=2))
    x = randn(600, WIDTH, seed=1)
    shim.keep_schedule(True)
    try:
        shim.cublas_handle().fail_after = 2
        with pytest.raises(RuntimeError, match="CUBLAS_STATUS_INTERNAL_ERROR"):
            sx.ops.kmeans_assign(x, index)
        order = Order(shim.take_schedule())
    finally:
        shim.keep_schedule(False)
        shim.reset_cublas(True)
    assert len(order.works["kernel"]) == 2
    assert order.at_end == frozenset(range(len(order.before)))


@pytest.mark.cuda
@pytest.mark.parametrize("num_rows", [700, 20_000])
def test_a_captured_call_gives_the_same(num_rows):
    index = sx.ops.CentroidIndex.build(randn(300, 64, seed=2).cuda())
    x = randn(num_rows, 64, seed=1).cuda()
    want = sx.ops.kmeans_assign(x, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = sx.ops.kmeans_assign(x, index)
    labels.zero_()
    graph.replay()
    assert torch.equal(labels, want)
