"""multistream_sample equals the reference to the bit, whatever the shapes, settings, logits and histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_tests.ops.common.instruction_sets import simd
from python_tests.ops.multistream_sample.cases import (
    DTYPES,
    LOGITS,
    MUTABLE,
    assert_step,
    copy_of,
    move,
    random_case,
    roll,
)
from speechlm_ext.ops import DecodeState, multistream_sample
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.multistream_sample.reference import multistream_sample as reference

WIDTHS = st.lists(st.sampled_from([1, 2, 3, 17, 63, 64, 100, 257, 300]), min_size=1, max_size=12)
COMMON = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def few(request):
    """Where each element costs a microsecond."""
    return "cuda_on_cpu" in request.node.name


@pytest.mark.parametrize("kind", LOGITS)
def test_rollouts(device, kind, few):
    @settings(max_examples=3 if few else 12, **COMMON)
    @given(seed=st.integers(0, 2**30), dtype=st.sampled_from(DTYPES), widths=WIDTHS)
    def check(seed, dtype, widths):
        roll(random_case(seed, kind, dtype, widths[: 4 if few else 6]), device, steps=8 if few else 30)

    check()


@settings(max_examples=3, **COMMON)
@given(seed=st.integers(0, 2**30), kind=st.sampled_from(LOGITS), dtype=st.sampled_from(DTYPES))
def test_rollouts_of_twelve_streams(seed, kind, dtype):
    roll(
        random_case(seed, kind, dtype, [300, 64, 1, 257, 2, 100, 3, 63, 17, 64, 1, 100]), torch.device("cpu")
    )


@pytest.mark.parametrize(
    "settings", [dict(top_k=30), dict(top_p=0.5), dict(top_k=1600, top_p=0.9, min_p=1e-6)]
)
@pytest.mark.parametrize("kind", ["equal", "near"])
def test_more_candidates_than_a_list_holds(device, kind, settings):
    """Equal logits, or logits that a histogram cannot tell apart beside one that is far away."""
    state = wide_case(1, [1700], temperature=1e4, **{**dict(top_k=0, top_p=1.0, min_p=0.0), **settings})
    x = torch.full((1, 1700), 3.0)
    if kind == "near":
        x += torch.randint(0, 3, (1, 1700)) * 1e-6
        x[0, 600] = -1e4
    assert_step(x, move(state, device), copy_of(state))


def test_more_columns_than_a_cache_holds(device):
    state = wide_case(
        1, [6500], temperature=0.8, top_k=30, num_rows=4, repetition_window=4, repetition_penalty=1.4
    )
    state.history[:] = torch.tensor([3, 6400, 17, 6499])[None, :, None]
    state.row[:] = 4
    assert_step(torch.randn(1, 6500) * 3, move(state, device), copy_of(state))


@settings(max_examples=12, **COMMON)
@given(
    seed=st.integers(0, 2**30),
    kind=st.sampled_from(LOGITS),
    dtype=st.sampled_from(DTYPES),
    widths=st.tuples(st.integers(1000, 5000), st.sampled_from([1, 256, 1024]), st.integers(1, 700)),
)
def test_every_instruction_set(seed, kind, dtype, widths):
    """Log-probabilities too: bits do not depend on the processor."""
    case = random_case(seed, kind, dtype, list(widths))
    states = {name: copy_of(case.state) for name in native.simd_available()}
    expected = copy_of(case.state)
    for _ in range(6):
        logits = case.logits()
        results = {}
        for name, state in states.items():
            with simd(name):
                results[name] = multistream_sample(logits, state)
        want = reference(logits, expected)
        for name, got in results.items():
            assert torch.equal(got.tokens, want[0]), name
            assert torch.equal(got.logprob.nan_to_num(7.0), results["generic"].logprob.nan_to_num(7.0)), name
            assert torch.equal(states[name].progress, expected.progress)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads(threads):
    """Enough columns that the requests are shared out."""
    before = torch.get_num_threads()
    case = wide_case(9, [9000, 7000, 50])
    expected, state = copy_of(case), copy_of(case)
    generator = torch.Generator().manual_seed(1)
    torch.set_num_threads(threads)
    try:
        for _ in range(4):
            assert_step(torch.randn(9, 16_050, generator=generator) * 3, state, expected)
    finally:
        torch.set_num_threads(before)


def wide_case(batch_size, widths, **options):
    ids, start = [], 0
    for width in widths:
        ids.append(torch.arange(start, start + width))
        start += width
    b = torch.arange(batch_size)[:, None, None]
    settings = dict(
        temperature=torch.tensor([0.0, 0.8, 1.0, 1.2])[b % 4],
        top_k=torch.tensor([0, 30, 2000])[b % 3],
        top_p=torch.tensor([1.0, 0.9])[b // 2 % 2],
        min_p=torch.tensor([0.0, 0.0, 0.01])[b // 3 % 3],
    )
    return DecodeState.new(
        batch_size,
        scope_ids=ids,
        delays=list(range(len(widths))),
        pad_ids=[0] * len(widths),
        eos_id=5,
        **{**settings, **options},
    )


@pytest.mark.parametrize("kind", ["normal", "equal", "ties"])
@pytest.mark.parametrize(
    "settings", [dict(), dict(top_k=30), dict(top_k=100_000), dict(top_p=0.9), dict(temperature=0.0)]
)
def test_200000_columns(kind, settings):
    x = torch.randn(1, 200_000) * 3
    x = {"normal": x, "equal": torch.ones_like(x), "ties": x.round()}[kind]
    case = wide_case(1, [200_000], **{**dict(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0), **settings})
    assert_step(x, copy_of(case), copy_of(case))


def test_tokens_do_not_depend_on_the_batch(device, few):
    """Nor on a request's place in it."""
    case = random_case(5, "normal", torch.float32, [300, 64, 100])
    case.state = DecodeState.new(
        5,
        scope_ids=[torch.arange(300), torch.arange(300, 364), torch.arange(364, 464)],
        delays=[0, 1, 2],
        pad_ids=[0] * 3,
        eos_id=3,
        temperature=torch.tensor([0.7, 0.0, 1.0, 1.3, 2.0])[:, None, None],
        top_k=torch.tensor([0, 0, 30, 5, 0])[:, None, None],
        top_p=torch.tensor([1.0, 1.0, 0.9, 1.0, 0.5])[:, None, None],
        max_frames=torch.tensor([3, 9, 9, 4, 9])[:, None],
        seed=torch.tensor([11, 22, 33, 44, 55]),
        num_rows=12,
    )
    case.num_rows = 5
    order = torch.tensor([4, 0, 2])
    together, part = move(case.state, device), move(case.state.select(order), device)
    part.source[:] = torch.arange(3)  # rows of the smaller batch's logits
    alone = move(case.state.select(torch.tensor([3])), device)
    alone.source[:] = 0
    for _ in range(3 if few else 12):
        logits = case.logits().to(device)
        whole = multistream_sample(logits, together)
        some = multistream_sample(logits[order.to(device)], part)
        one = multistream_sample(logits[3:4], alone)
        for x, y, z in zip(whole, some, one, strict=True):
            assert torch.equal(x[order.to(device)], y)
            assert torch.equal(x[3:4], z)
    assert few or len(together.history[:, :, 0].unique()) > 20


def test_values_out_of_range_fail_and_harm_nobody(device, few):
    """What lies on a device cannot be checked before a launch: such a request fails or is clamped."""
    huge = 2**40
    changes = {
        "segment": [-1, 3, huge], "num_segments": [0, 9, -huge], "source": [-1, 2, huge], "guide": [2, huge],
        "first_column": [-9, 17, 2**31 - 1], "end_column": [-9, 39, 2**31 - 1], "row": [-huge, huge],
        "step": [-huge, huge], "finish": [-huge, 0, huge], "max_frames": [-huge], "top_k": [-5],
        "temperature": [-1.0, float("nan"), float("inf")], "top_p": [-1.0, float("nan"), 7.0],
        "min_p": [-1.0, float("nan"), 7.0], "repetition_penalty": [0.0, -1.0, float("nan"), float("inf")],
        "guidance": [float("nan")],
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for name, values in changes.items():
        for value in values:
            temperature = 0.8 if name in ("temperature", "top_p", "min_p", "top_k") else 0.0
            expected = wide_case(
                2, [40, 17], temperature=temperature, num_rows=4, repetition_penalty=1.5, repetition_window=9
            )
            getattr(expected, name)[1].fill_(value)
            state = move(expected, device)
            for _ in range(1 if few else 3):
                assert_step(torch.randn(2, 57, generator=generator), state, expected)
            assert int(state.failed[0]) == 0, (name, value)


def test_a_finished_request_stays_as_it_is(device):
    case = random_case(3, "normal", torch.float32, [50, 20])
    state = move(case.state, device)
    state.done[:] = 1
    before = move(state, torch.device("cpu"))
    step = multistream_sample(case.logits().to(device), state)
    for name in MUTABLE:
        assert torch.equal(getattr(state, name).cpu().nan_to_num(7.0), getattr(before, name).nan_to_num(7.0))
    assert step.tokens.cpu().tolist() == [list(state.pad_ids)] * state.batch_size
    assert not bool(step.is_content.any()) and not bool(step.failed.any()) and bool(step.done.all())


def test_no_requests(device):
    state = wide_case(2, [9, 4]).select(torch.arange(0))
    step = multistream_sample(torch.randn(0, 13, device=device), move(state, device))
    assert step.tokens.shape == (0, 2) and step.done.shape == (0,)
