"""multistream_sample within torch: opcheck, torch.compile, CUDA graphs; the state lies on the device and moves on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from python_tests.ops.multistream_sample.cases import MUTABLE, assert_same_state, copy_of, move, random_case
from speechlm_ext.ops import DecodeState, multistream_sample

STATE = ("column_ids", "sampling", "choice", "limits", "request", "guidance", "progress", "forced", "history",
         "history_logprob", "allowed", "bounds", "delays", "pad_ids", "eos_id", "eos_column", "tail")  # fmt: skip


@pytest.mark.parametrize("seed", [1, 8])
def test_opcheck(seed):
    case = random_case(seed, "normal", torch.float32, [40, 7, 12])
    arguments = (case.logits(), *(getattr(case.state, name) for name in STATE))
    torch.library.opcheck(torch.ops.speechlm_ext.multistream_sample.default, arguments)


def a_state(batch_size=3):
    return DecodeState.new(
        batch_size,
        scope_ids=[torch.arange(300), torch.arange(300, 420)],
        delays=[0, 1],
        pad_ids=[0, 0],
        eos_id=3,
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        repetition_penalty=1.1,
        repetition_window=4,
        max_frames=9,
        num_rows=16,
    )


def test_compiled_without_a_break():
    """One node: the result is used, and the state has moved."""
    head = torch.randn(16, 420)

    def step(hidden, state):
        out = multistream_sample(hidden @ head, state)
        return out.tokens + 1, out.done

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state, expected = a_state(), a_state()
    for _ in range(12):
        hidden = torch.randn(3, 16)
        for x, y in zip(compiled(hidden, state), step(hidden, expected), strict=True):
            assert torch.equal(x, y)
        assert_same_state(state, expected)
    assert bool(state.is_done.all())


def test_gradients_are_left_alone():
    logits = torch.randn(3, 420, requires_grad=True)
    step = multistream_sample(logits, a_state())
    assert not step.logprob.requires_grad


def test_the_state_is_changed_in_place():
    """A graph's replay reads and writes these addresses."""
    state = a_state()
    before = {name: getattr(state, name).data_ptr() for name in MUTABLE}
    rows = [multistream_sample(torch.zeros(3, 420), state).tokens for _ in range(6)]
    assert {name: getattr(state, name).data_ptr() for name in MUTABLE} == before
    assert state.row.tolist() == [6] * 3
    assert len(torch.stack(rows)[:, 0, 0].unique()) > 1  # the same logits, other numbers


@pytest.mark.cuda
def test_replays_of_a_graph_equal_eager_steps():
    device = torch.device("cuda")
    eager, graphed = move(a_state(), device), move(a_state(), device)
    logits = torch.zeros(3, 420, device=device)
    multistream_sample(logits, copy_of(graphed))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = multistream_sample(logits, graphed)
    for _ in range(12):
        logits.copy_(torch.randn(3, 420))
        graph.replay()
        for x, y in zip(step, multistream_sample(logits, eager), strict=True):
            assert torch.equal(x, y)
    for field in dataclasses.fields(eager):
        if field.name in MUTABLE:
            got, want = getattr(graphed, field.name), getattr(eager, field.name)
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert bool(graphed.is_done.all())


@pytest.mark.cuda
def test_a_gpu_and_a_cpu_say_the_same():
    for seed in range(40):
        case = random_case(seed, ["normal", "ties", "bad"][seed % 3], torch.bfloat16, [5000, 1024, 700, 1])
        there, here = move(case.state, torch.device("cuda")), copy_of(case.state)
        for _ in range(8):
            logits = case.logits()
            for x, y in zip(
                multistream_sample(logits.cuda(), there), multistream_sample(logits, here), strict=True
            ):
                torch.testing.assert_close(x.cpu(), y, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(there.progress.cpu(), here.progress)
