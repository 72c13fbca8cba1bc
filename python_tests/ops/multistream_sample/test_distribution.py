"""What multistream_sample draws from: against an exact softmax in float64, in Hugging Face's order of filters."""

from __future__ import annotations

import math

import pytest
import torch

from speechlm_ext.ops import DecodeState, multistream_sample
from speechlm_ext.ops.multistream_sample import reference as internals

#: temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.5, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.3, 9, 0.9, 0.02),
]


def exact(logits, temperature, top_k, top_p, min_p):
    """Probabilities float64 ``[B, V]``: temperature, top-k, top-p, min-p, one after the other."""
    x = logits.double() / temperature
    if top_k:
        kth = x.topk(min(top_k, x.shape[-1]), dim=-1).values[:, -1:]
        x = x.masked_fill(x < kth, -math.inf)
    if top_p < 1:
        p, order = x.softmax(-1).sort(dim=-1, descending=True)
        crossed = p.cumsum(-1) - p >= top_p
        x = x.masked_fill(torch.zeros_like(crossed).scatter(-1, order, crossed), -math.inf)
    p = x.softmax(-1)
    p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True)


def spread(values, count):
    temperature, top_k, top_p, min_p = values
    full = torch.full((count,), 1.0)
    return full * temperature, full.int() * top_k, full * top_p, full * min_p


@pytest.mark.parametrize("values", SETTINGS)
@pytest.mark.parametrize("size", [3, 50, 3000])
def test_the_reference_is_an_exact_softmax(values, size):
    """A probability is off by some units in the last place of float32, so the distance of the distributions is too."""
    x = torch.randn(200, size) * 3
    temperature, top_k, top_p, min_p = spread(values, 200)
    weight = internals.weights(x, temperature)
    p = weight.masked_fill(~internals.keep(x, weight, top_k, top_p, min_p), 0).double()
    distance = (p / p.sum(-1, keepdim=True) - exact(x, *values)).abs().sum(-1) / 2
    assert float(distance.max()) < 3e-7


def test_what_a_weight_rounds_away():
    """At worst, all columns but one lie where weights are 0 already: their share is below 2^-41 each."""
    x = torch.full((1, 200_000), -28.5)
    x[0, 7] = 0.0
    weight = internals.weights(x, torch.ones(1))
    assert int(weight.sum()) == 2**40
    assert float(1 - x.double().softmax(-1)[0, 7]) < 200_000 * 2.0**-41


@pytest.mark.parametrize("values", SETTINGS)
def test_draws_follow_the_distribution(values):
    """10^5 draws against float64: Pearson's chi-square, at five standard deviations of it."""
    count, size = 100_000, 20
    x = torch.randn(size) * 2
    state = DecodeState.new(
        count,
        scope_ids=[torch.arange(size)],
        delays=[0],
        pad_ids=[0],
        eos_id=0,
        seed=torch.randint(-(2**62), 2**62, (count,)),
        **dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True)),
    )
    tokens = multistream_sample(x.expand(count, size), state).tokens[:, 0]
    expected = exact(x[None], *values)[0] * count
    found = torch.bincount(tokens, minlength=size)
    possible = expected > 0
    assert int(found[~possible].sum()) == 0
    statistic = float(((found - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_numbers_of_rows_and_streams_are_independent():
    """The same seed in other rows and streams: uniform in [0, 1), without correlation."""
    rows, streams = torch.arange(1000)[:, None], torch.arange(64)[None]
    numbers = internals.uniform(torch.full((1000, 64), 7), rows.expand(1000, 64), streams)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 5 / math.sqrt(12 * numbers.numel())
    for other in (numbers.roll(1, 0), numbers.roll(1, 1)):
        correlation = float(((numbers - 0.5) * (other - 0.5)).mean()) * 12
        assert abs(correlation) < 5 / math.sqrt(numbers.numel())


def test_philox_known_answers():
    """The vectors published with Random123."""
    zero, ones = torch.tensor([0]), torch.tensor([0xFFFFFFFF])
    words = [int(w) for w in internals.philox([zero] * 4, [zero] * 2)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(w) for w in internals.philox([ones] * 4, [ones] * 2)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    parts = [torch.tensor([w]) for w in pi]
    words = [int(w) for w in internals.philox(parts[:4], parts[4:])]
    assert words == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (0, 1.0, 0.0, [0, 1, 2]),
        (2, 1.0, 0.0, [0, 1]),
        (1, 1.0, 0.0, [0]),
        (9, 1.0, 0.0, [0, 1, 2]),
        (0, 0.8, 0.0, [0, 1]),  # .6 does not reach .8, so the token that crosses it stays
        (0, 0.59, 0.0, [0]),
        (0, 0.61, 0.0, [0, 1]),
        (0, 1e-9, 0.0, [0]),
        (2, 0.99, 0.0, [0, 1]),  # .6 and .3 become 2/3 and 1/3 after top-k
        (2, 0.66, 0.0, [0]),
        (0, 1.0, 0.4, [0, 1]),  # of the largest: .24
        (0, 1.0, 1.0, [0]),
        (0, 0.5, 0.1, [0]),
    ],
)
def test_what_top_k_top_p_and_min_p_keep(top_k, top_p, min_p, kept):
    x = torch.tensor([[0.6, 0.3, 0.1]]).log()
    weight = internals.weights(x, torch.ones(1))
    mask = internals.keep(x, weight, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    assert mask[0].nonzero().flatten().tolist() == kept


def test_top_k_keeps_exactly_k_of_equals():
    x = torch.zeros(1, 5)
    weight = internals.weights(x, torch.ones(1))
    mask = internals.keep(x, weight, torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert mask[0].tolist() == [True, True, False, False, False]


def test_greedy_takes_the_lowest_index_among_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, float("-inf")], [-0.0, 0.0, -0.0]])
    assert internals.lowest_argmax(logits).tolist() == [1, 0, 0, 0]


def test_an_infinite_temperature_is_uniform_over_what_is_allowed():
    x = torch.tensor([[3.0, float("-inf"), -7.0]])
    assert internals.weights(x, torch.tensor([float("inf")])).tolist() == [[2**40, 0, 2**40]]


def test_the_power_of_two_is_exact():
    """`torch.exp2` of whole numbers, which the reference's exponential relies on."""
    k = torch.arange(-126.0, 1.0)
    assert torch.exp2(k).tolist() == [2.0**n for n in range(-126, 1)]
    x = torch.linspace(-87, 0, 1_000_001)
    error = (internals.exponential(x).double() / x.double().exp() - 1).abs()
    assert float(error.max()) < 2 * 2.0**-23


@pytest.mark.parametrize("size", [2, 100, 5000, 50_000])
def test_log_probabilities_are_accurate(size):
    """Against float64, at most twice the error of torch's own float32 formula."""
    count = 200_000 // size + 8
    x = torch.randn(count, size) * 4
    ids = torch.arange(size)
    state = DecodeState.new(
        count,
        scope_ids=[ids],
        delays=[0],
        pad_ids=[0],
        eos_id=0,
        temperature=torch.rand(count)[:, None, None] * 2,
    )
    step = multistream_sample(x, state)
    want = x.double().log_softmax(-1).gather(-1, step.tokens)
    error = (step.logprob - want).abs().max()
    theirs = (x.log_softmax(-1).gather(-1, step.tokens) - want).abs().max()
    assert float(error) <= 2 * float(theirs) + 1e-7
