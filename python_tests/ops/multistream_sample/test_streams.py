"""multistream_sample, a few streams at a time: to the bit the results and the state of one call for the whole row."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_tests.ops.common.instruction_sets import simd
from python_tests.ops.multistream_sample.cases import (
    DTYPES,
    LOGITS,
    MUTABLE,
    NAMES,
    assert_close,
    copy_of,
    move,
    random_case,
)
from python_tests.ops.multistream_sample.test_exact import wide_case
from python_tests.ops.multistream_sample.test_multistream_sample import (
    END,
    EOS,
    NAN,
    SAY,
    make_logits,
    make_state,
)
from speechlm_ext.ops import multistream_sample
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.multistream_sample.reference import multistream_sample as reference

WIDTHS = st.lists(st.sampled_from([1, 2, 17, 64, 100, 257]), min_size=1, max_size=9)
COMMON = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NO_DELAY = (0, 0, 0)


@pytest.fixture
def few(request):
    """True on the shim, where each element costs a microsecond."""
    return "cuda_on_cpu" in request.node.name


def bits(x):
    """What compares NaNs too."""
    return x.cpu().view(torch.int32) if x.dtype == torch.float32 else x.cpu()


def assert_same_bits(got, want, what):
    assert torch.equal(bits(got), bits(want)), f"{what}: {got.tolist()} instead of {want.tolist()}"


def random_splits(S, pick):
    """``[(0, a), (a, b), ..., (z, S)]``."""
    cuts = [0, *(s for s in range(1, S) if pick.random() < 0.6), S]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def only(logits, state, streams):
    """The columns of these streams; the others hold NaN."""
    out = torch.full_like(logits, NAN)
    columns = slice(state.bounds[streams[0]], state.bounds[streams[1]])
    out[:, columns] = logits[:, columns]
    return out


def in_parts(logits, state, splits):
    """A row by several calls; the calls before the last one leave the state alone."""
    step, S = None, state.num_streams
    before = copy_of(state)
    for streams in splits:
        partial = step
        step = multistream_sample(only(logits, state, streams), state, streams=streams, partial=partial)
        assert partial is None or step is partial
        if streams[1] < S:
            for name in MUTABLE:
                assert_same_bits(getattr(state, name), getattr(before, name), f"{name} after {streams}")
    return step


def assert_row(logits, state, whole, splits):
    """The row in parts equals the row in one call: results and state."""
    got, want = in_parts(logits, state, splits), multistream_sample(logits, whole)
    for name in NAMES:
        assert_same_bits(getattr(got, name), getattr(want, name), f"{name} by {splits}")
    for name in MUTABLE:
        assert_same_bits(getattr(state, name), getattr(whole, name), f"{name} by {splits}")
    return got


def random_rollout(seed, kind, dtype, widths, device, steps, delayed):
    case, pick = random_case(seed, kind, dtype, widths), random.Random(seed)
    if not delayed:
        case.state = dataclasses.replace(case.state, delays=(0,) * len(widths))
    state, whole = move(case.state, device), move(case.state, device)
    for _ in range(steps):
        was_over = bool(whole.is_done.all())
        assert_row(case.logits().to(device), state, whole, random_splits(len(widths), pick))
        if was_over:
            break


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("kind", LOGITS)
def test_any_split_equals_the_whole_row(device, kind, delayed, few):
    @settings(max_examples=3 if few else 12, **COMMON)
    @given(seed=st.integers(0, 2**30), dtype=st.sampled_from(DTYPES), widths=WIDTHS)
    def check(seed, dtype, widths):
        random_rollout(seed, kind, dtype, widths[: 4 if few else 9], device, 6 if few else 25, delayed)

    check()


@settings(max_examples=15, **COMMON)
@given(seed=st.integers(0, 2**30), kind=st.sampled_from(LOGITS), dtype=st.sampled_from(DTYPES), widths=WIDTHS)
def test_every_instruction_set(seed, kind, dtype, widths):
    for name in native.simd_available():
        with simd(name):
            random_rollout(seed, kind, dtype, widths, torch.device("cpu"), 8, delayed=seed % 2 == 0)


@pytest.mark.parametrize("kind", LOGITS)
def test_each_call_equals_the_reference(device, kind, few):
    """Between the calls too, and the reference's parts equal its whole row."""

    @settings(max_examples=2 if few else 8, **COMMON)
    @given(seed=st.integers(0, 2**30), widths=WIDTHS)
    def check(seed, widths):
        assert_parts(seed, kind, widths[: 3 if few else 4], device, num_rows=4 if few else 12)

    check()


@settings(max_examples=3, **COMMON)
@given(seed=st.integers(0, 2**30), kind=st.sampled_from(LOGITS))
def test_each_call_of_nine_streams_equals_the_reference(seed, kind):
    assert_parts(seed, kind, [257, 64, 1, 100, 2, 17, 64, 1, 257], torch.device("cpu"), num_rows=12)


def assert_parts(seed, kind, widths, device, num_rows):
    """Rows sampled in random parts by the op, by the reference, and whole by the reference."""
    case, pick = random_case(seed, kind, torch.float32, widths), random.Random(seed)
    state, expected, whole = move(case.state, device), copy_of(case.state), copy_of(case.state)
    for _ in range(num_rows):
        step = want = None
        logits = case.logits()
        for streams in random_splits(state.num_streams, pick):
            part = only(logits, state, streams)
            step = multistream_sample(part.to(device), state, streams=streams, partial=step)
            want = reference(part, expected, streams, want)
            for name, x, y in zip(NAMES, step, want, strict=True):
                if name == "logprob":
                    assert_close(x.cpu(), y)
                else:
                    assert_same_bits(x, y, f"{name} of {streams}")
            assert_same_bits(state.progress, expected.progress, "progress")
        for x, y in zip(want, reference(logits, whole), strict=True):
            assert_same_bits(x, y, "the reference")
        for name in MUTABLE:
            assert_same_bits(getattr(expected, name), getattr(whole, name), name)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(threads):
    """Enough columns that the requests are shared out."""
    before = torch.get_num_threads()
    case = wide_case(9, [9000, 7000, 50])
    state, whole = copy_of(case), copy_of(case)
    torch.set_num_threads(threads)
    try:
        for splits in ([(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 3)]):
            assert_row(torch.randn(9, 16_050) * 3, state, whole, splits)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("segment", 3), ("segment", -1), ("step", 2**40), ("step", -(2**40)), ("finish", 0), ("finish", 2**40),
     ("finish", -(2**40)), ("row", 2**40), ("source", 9), ("num_segments", 9), ("is_over", 1)],
)  # fmt: skip
def test_values_out_of_range(device, name, value):
    """What lies on a device cannot be checked before a launch."""
    case = dataclasses.replace(wide_case(2, [40, 17, 5], num_rows=4), delays=NO_DELAY)
    if name == "is_over":
        case.done[1] = value
    else:
        getattr(case, name)[1].fill_(value)
    state, whole = move(case, device), move(case, device)
    for _ in range(2):
        assert_row(torch.randn(2, 62, device=device), state, whole, [(0, 1), (1, 2), (2, 3)])


def test_an_end_in_an_earlier_call_counts(device):
    """The streams behind stream 0 are fill, whatever their logits hold, and the request is done."""
    state = move(make_state(2, delays=NO_DELAY), device)
    logits = make_logits(2, SAY)
    logits[0, :4] = torch.tensor(END)
    step = multistream_sample(only(logits, state, (0, 1)).to(device), state, streams=(0, 1))
    assert step.tokens.tolist() == [[EOS, 90, 91], [10, 90, 91]]
    assert step.is_content.tolist() == [[True, False, False]] * 2
    assert step.done.tolist() == [False, False] and state.row.tolist() == [0, 0]
    logits[0, 4:] = NAN
    step = multistream_sample(logits.to(device), state, streams=(1, 3), partial=step)
    assert step.tokens[0].tolist() == [EOS, 90, 91] and int(step.tokens[1, 1]) in (20, 21)
    assert step.is_content.tolist() == [[True, False, False], [True, True, True]]
    assert step.failed.tolist() == [False, False] and step.done.tolist() == [True, False]
    assert state.row.tolist() == [1, 1] and state.finish.tolist() == [0, -1]


def test_a_stream_that_fails_ends_its_request_with_the_last_call(device):
    """Stream 0's token stands until then, and the streams behind the bad one are sampled as in a whole row."""
    state = move(make_state(2, delays=NO_DELAY), device)
    logits = make_logits(2, SAY)
    logits[1, 4] = NAN
    step = multistream_sample(logits.to(device), state, streams=(0, 2))
    assert step.failed.tolist() == [False, True] and step.tokens[:, 0].tolist() == [10, 10]
    assert step.tokens[1].tolist() == [10, 90, 91] and bool(step.logprob[1, 0] < 0)
    step = multistream_sample(logits.to(device), state, streams=(2, 3), partial=step)
    assert step.tokens[1, :2].tolist() == [EOS, 90] and int(step.tokens[1, 2]) in (30, 31)
    assert step.logprob[1, 0] == 0 and step.is_content[1].tolist() == [True] * 3
    assert step.failed.tolist() == [False, True] and step.done.tolist() == [False, True]
    assert state.failed.tolist() == [False, True] and state.finish.tolist() == [-1, -1]
    assert state.history[:, 0, 0].tolist() == [10, EOS]


def test_stream_0_that_fails(device):
    state = move(make_state(1, delays=NO_DELAY), device)
    logits = make_logits(1, [0.0, NAN, 0.0, 0.0]).to(device)
    step = None
    for s in range(3):
        step = multistream_sample(logits, state, streams=(s, s + 1), partial=step)
        assert step.tokens.tolist() == [[EOS, 90, 91]] and step.failed.tolist() == [True]
    assert step.done.tolist() == [True] and step.is_content.tolist() == [[True, False, False]]


def test_the_tensors_of_the_first_call_are_completed(device):
    state = move(make_state(1, delays=NO_DELAY), device)
    logits = make_logits(1, SAY).to(device)
    first = multistream_sample(logits, state, streams=(0, 1))
    where = [x.data_ptr() for x in first]
    last = multistream_sample(logits, state, streams=(1, 3), partial=first)
    assert last is first and [x.data_ptr() for x in last] == where


def test_all_streams_in_one_call_are_the_whole_row(device):
    state = move(make_state(2, temperature=1.0), device)
    whole = copy_of(state)
    for _ in range(4):
        assert_row(make_logits(2).to(device), state, whole, [(0, 3)])
