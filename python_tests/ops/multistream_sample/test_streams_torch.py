"""multistream_sample, a few streams at a time: what it does not take, and within torch as the whole row's op is."""

from __future__ import annotations

import pytest
import torch

from python_tests.ops.multistream_sample.cases import MUTABLE, copy_of, move, random_case
from python_tests.ops.multistream_sample.test_multistream_sample import NAN, make_logits, make_state
from python_tests.ops.multistream_sample.test_streams import assert_same_bits
from python_tests.ops.multistream_sample.test_torch import STATE, a_state
from speechlm_ext.ops import OpError, SampledStep, multistream_sample


def a_part(state, streams=(0, 1)):
    return multistream_sample(make_logits(), state, streams=streams)


def broken(**changes):
    state = make_state()
    return multistream_sample(make_logits(), state, streams=(1, 2), partial=a_part(state)._replace(**changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: a_part(make_state(), (0, 4)), r"0 <= first < last <= 3; got \(0, 4\)"),
        (lambda: a_part(make_state(), (2, 2)), r"0 <= first < last <= 3; got \(2, 2\)"),
        (lambda: a_part(make_state(), (-1, 2)), r"got \(-1, 2\)"),
        (lambda: a_part(make_state(), (0, -1)), r"got \(0, -1\)"),
        (lambda: a_part(make_state(), (0, 1, 2)), r"two integers \(first, last\); got \(0, 1, 2\)"),
        (lambda: a_part(make_state(), 1), r"two integers \(first, last\); got 1"),
        (lambda: a_part(make_state(), (0.0, 1)), r"two integers \(first, last\); got \(0.0, 1\)"),
        (lambda: a_part(make_state(), (1, 2)), r"streams \(1, 2\) continue a row, so partial .* got a NoneType"),
        (
            lambda: multistream_sample(make_logits(), make_state(), streams=(1, 2), partial=(*a_part(make_state()),)),
            "partial must be the SampledStep of the call that sampled the streams before 1; got a tuple",
        ),
        (
            lambda: multistream_sample(make_logits(), make_state(), streams=(0, 1), partial=a_part(make_state())),
            "start a row, so partial must be None",
        ),
        (
            lambda: multistream_sample(make_logits(), make_state(), partial=a_part(make_state())),
            "got None: with partial, give the streams to sample",
        ),
        (lambda: broken(tokens=torch.zeros(2, 2, dtype=torch.int64)), "partial.tokens must have size 3 in dimension"),
        (lambda: broken(tokens=torch.zeros(2, 3)), "partial.tokens must be int64; got float32"),
        (lambda: broken(logprob=torch.zeros(3, 3)), "partial.logprob must have size 2 in dimension 0"),
        (lambda: broken(is_content=torch.zeros(3, 2, dtype=torch.bool).mT), "partial.is_content must be contiguous"),
        (lambda: broken(failed=torch.zeros(2)), "partial.failed must be bool"),
        (lambda: broken(done=torch.zeros(1, dtype=torch.bool)), "partial.done must have size 2"),
        (
            lambda: multistream_sample(make_logits(1), make_state(), streams=(0, 1)),
            r"logits must be .* \[2 or more, 8\]",
        ),
    ],
)  # fmt: skip
def test_rejects_bad_input(call, message):
    with pytest.raises(OpError, match=message):
        call()


@pytest.mark.parametrize("streams", [(0, 1), (1, 2), (1, 3), (0, 3)])
def test_opcheck(streams):
    case = random_case(8, "normal", torch.float32, [40, 7, 12])
    if streams[0] > 0:
        row = multistream_sample(case.logits(), case.state, streams=(0, streams[0]))
    else:
        row = SampledStep(*multistream_sample(case.logits(), copy_of(case.state)))
    arguments = (case.logits(), *(getattr(case.state, name) for name in STATE), *row, *streams)
    torch.library.opcheck(torch.ops.speechlm_ext.multistream_sample_streams.default, arguments)


def a_row(hidden, state, heads):
    """Stream 1's logits depend on stream 0's token, stream 2's on both."""
    step, S = None, state.num_streams
    logits = hidden.new_full((hidden.shape[0], heads.shape[1]), NAN)
    for s in range(S):
        columns = slice(state.bounds[s], state.bounds[s + 1])
        logits = logits.clone()
        logits[:, columns] = hidden @ heads[:, columns]
        step = multistream_sample(logits, state, streams=(s, s + 1), partial=step)
        hidden = hidden + step.tokens[:, s : s + 1] / 100
    return step, hidden


def test_a_row_compiled_without_a_break():
    heads = torch.randn(16, 420)
    compiled = torch.compile(a_row, fullgraph=True, backend="aot_eager")
    state, expected = a_state(), a_state()
    for _ in range(12):
        hidden = torch.randn(3, 16)
        (got, got_hidden), (want, want_hidden) = (
            compiled(hidden, state, heads),
            a_row(hidden, expected, heads),
        )
        for x, y in zip((*got, got_hidden), (*want, want_hidden), strict=True):
            assert_same_bits(x, y, "compiled")
        for name in MUTABLE:
            assert_same_bits(getattr(state, name), getattr(expected, name), name)
    assert bool(state.is_done.all())


def test_a_compiled_call_completes_what_it_is_given():
    """The given tensors themselves, not copies of them."""

    def go_on(logits, state, partial):
        return multistream_sample(logits, state, streams=(1, 2), partial=partial)

    compiled = torch.compile(go_on, fullgraph=True, backend="aot_eager")
    state, whole = a_state(), a_state()
    logits = torch.randn(3, 420)
    partial = multistream_sample(logits, state, streams=(0, 1))
    got, want = compiled(logits, state, partial), multistream_sample(logits, whole)
    for x, y, z in zip(got, partial, want, strict=True):
        assert x.data_ptr() == y.data_ptr()
        assert_same_bits(x, z, "compiled")
        assert_same_bits(y, z, "given")
    assert_same_bits(state.progress, whole.progress, "progress")


def test_gradients_are_left_alone():
    state = a_state()
    step = multistream_sample(torch.randn(3, 420, requires_grad=True), state, streams=(0, 1))
    step = multistream_sample(torch.randn(3, 420, requires_grad=True), state, streams=(1, 2), partial=step)
    assert not step.logprob.requires_grad


@pytest.mark.cuda
def test_replays_of_a_graph_equal_eager_rows():
    device = torch.device("cuda")
    eager, graphed = move(a_state(), device), move(a_state(), device)
    heads, hidden = torch.randn(16, 420, device=device), torch.zeros(3, 16, device=device)
    a_row(hidden, copy_of(graphed), heads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step, _ = a_row(hidden, graphed, heads)
    for _ in range(12):
        hidden.copy_(torch.randn(3, 16))
        graph.replay()
        for x, y in zip(step, a_row(hidden, eager, heads)[0], strict=True):
            assert_same_bits(x, y, "graph")
    for name in MUTABLE:
        assert_same_bits(getattr(graphed, name), getattr(eager, name), name)
    assert bool(graphed.is_done.all())
