"""multistream_sample: the random numbers, the distributions they draw from, and the segment's state machine."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from speechlm_ext.ops import DecodeState, advance, multistream_sample
from speechlm_ext.ops.reference import multistream_sample as internals

EOS, PADS = 5, (0, 90, 91)
SCOPES = [torch.tensor([EOS, 10, 11, 12]), torch.tensor([20, 21]), torch.tensor([30, 31])]


def make_state(batch_size=2, delays=(0, 1, 2), **options):
    return DecodeState.new(
        batch_size,
        scope_ids=SCOPES,
        delays=delays,
        pad_ids=PADS,
        eos_id=EOS,
        **{"temperature": 0.0, **options},
    )


def make_logits(batch_size=2, stream0=None):
    logits = [torch.randn(batch_size, len(scope)) for scope in SCOPES]
    if stream0 is not None:
        logits[0] = torch.tensor(stream0).expand(batch_size, 4).clone()
    return logits


def roll(state, make, limit=50):
    rows = []
    while not bool(state.is_done.all()):
        assert len(rows) < limit, "the request never ends"
        rows.append(multistream_sample(make(len(rows)), state).tokens)
        state = advance(state, rows[-1])
    return torch.stack(rows, dim=1), state


def test_philox_known_answers():
    """The vectors published with Random123."""
    zero, ones = torch.tensor([0]), torch.tensor([0xFFFFFFFF])
    words = [int(w) for w in internals.philox([zero] * 4, [zero] * 2)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(w) for w in internals.philox([ones] * 4, [ones] * 2)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    parts = [torch.tensor([w]) for w in pi]
    assert [int(w) for w in internals.philox(parts[:4], parts[4:])] == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def test_greedy_takes_the_lowest_index_among_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, float("-inf")]])
    assert internals.lowest_argmax(logits).tolist() == [1, 0, 0]


def test_frequencies_follow_the_softmax():
    count = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    numbers = internals.uniform(torch.full((count,), 7), torch.arange(count), 3)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    column, logprob, failed = internals.sample_rows(
        logits.expand(count, 4),
        torch.full((count,), 0.7),
        torch.zeros(count).long(),
        torch.ones(count),
        numbers,
    )
    expected = (logits / 0.7).softmax(0)
    frequency = torch.bincount(column, minlength=4) / count
    # Four standard deviations of a binomial.
    assert bool(((frequency - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-9).all())
    torch.testing.assert_close(logprob, logits.log_softmax(0)[column])
    assert not bool(failed.any())


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2]),
        (2, 1.0, [0, 1]),
        (1, 1.0, [0]),
        (9, 1.0, [0, 1, 2]),
        (0, 0.8, [0, 1]),  # .6 does not reach .8, so the token that crosses it stays
        (0, 0.6, [0]),
        (0, 0.61, [0, 1]),
        (0, 1e-9, [0]),
        (2, 0.99, [0, 1]),  # .6 and .3 become 2/3 and 1/3 after top-k
        (2, 0.66, [0]),
    ],
)
def test_top_k_and_top_p(top_k, top_p, kept):
    logits = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    mask = internals.keep_top(logits, torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64))
    assert mask[0].nonzero().flatten().tolist() == kept


def test_top_k_keeps_exactly_k_of_equals():
    mask = internals.keep_top(torch.zeros(1, 5), torch.tensor([2]), torch.tensor([1.0]))
    assert mask[0].tolist() == [True, True, False, False, False]


def test_tokens_do_not_depend_on_the_batch():
    logits = [torch.randn(6, len(scope)) for scope in SCOPES]
    seeds = torch.tensor([11, 22, 33, 44, 55, 66])
    settings = dict(temperature=1.3, top_k=3, top_p=0.9)
    state = make_state(6, seed=seeds, **settings)
    together = torch.stack([multistream_sample(logits, advance_by(state, n)).tokens for n in range(5)])
    order = [4, 0, 2]
    part = make_state(3, seed=seeds[order], **settings)
    alone = torch.stack(
        [multistream_sample([x[order] for x in logits], advance_by(part, n)).tokens for n in range(5)]
    )
    assert torch.equal(together[:, order], alone)
    assert len(together[:, :, 0].unique()) > 1


def advance_by(state, steps):
    keep = torch.full((state.step.shape[0], 3), 10)
    for _ in range(steps):
        state = advance(state, keep)
    return state


def test_ramp_in_end_and_ramp_out():
    """Three content frames under delays 0, 1, 2; the end counts in the row in which it is sampled."""
    say = [[-9.0, 5.0, 0.0, 0.0]] * 3 + [[9.0, 0.0, 0.0, 0.0]] * 9
    rows, state = roll(make_state(1), lambda n: make_logits(1, say[n]))
    is_fill = rows[0] == torch.tensor(PADS)
    assert is_fill.tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
        [False, False, False],
        [True, True, False],
    ]
    assert rows[0, :, 0].tolist() == [10, 10, 10, EOS, 0]
    assert state.finish.tolist() == [3]


def test_no_delay_and_a_delayed_first_stream():
    say = [[-9.0, 5.0, 0.0, 0.0]] * 2 + [[9.0, 0.0, 0.0, 0.0]] * 9
    rows, _ = roll(make_state(1, delays=(0, 0, 0)), lambda n: make_logits(1, say[n]))
    assert (rows[0] == torch.tensor(PADS)).tolist() == [[False] * 3, [False] * 3, [False, True, True]]
    rows, state = roll(make_state(1, delays=(2, 0, 1)), lambda n: make_logits(1, say[max(0, n - 2)]))
    assert rows[0, :, 0].tolist() == [0, 0, 10, 10, EOS]
    assert state.finish.tolist() == [2]


def test_length_limits_per_request():
    state = make_state(
        3, temperature=1.0, min_frames=torch.tensor([4, 0, 2]), max_frames=torch.tensor([4, 0, 6])
    )
    torch.manual_seed(1)
    _, state = roll(state, lambda n: make_logits(3))
    assert state.finish[0] == 4 and state.finish[1] == 0 and 2 <= int(state.finish[2]) <= 6


def test_inactive_streams_are_fill_and_end_at_once():
    rows, state = roll(
        make_state(1, active=[True, False, False]), lambda n: make_logits(1, [9.0, 0.0, 0.0, 0.0])
    )
    assert rows.tolist() == [[[EOS, 90, 91]]]
    assert bool(state.is_done)


def test_allowed_masks_per_request():
    allowed = [
        torch.tensor([[False, True, False, False], [True, False, False, True]]),
        None,
        torch.tensor([False, True]),
    ]
    state = make_state(2, temperature=1.0, allowed=allowed)
    for _ in range(4):
        step = multistream_sample(make_logits(), state)
        assert step.tokens[0, 0] == 10
        if int(state.step[0]) >= 2 and bool(step.is_content[0, 2]):
            assert step.tokens[0, 2] == 31
        state = advance(state, step.tokens)


def test_bad_logits_end_their_request_alone():
    logits = make_logits(3, [0.0, 9.0, 0.0, 0.0])
    logits[0][1, 2] = float("nan")
    step = multistream_sample(logits, make_state(3))
    assert step.failed.tolist() == [False, True, False]
    assert step.tokens[:, 0].tolist() == [10, EOS, 10]
    state = advance_by(make_state(3), 4)
    logits = make_logits(3, [0.0, 9.0, 0.0, 0.0])
    logits[2][0] = float("nan")
    step = multistream_sample(logits, state)
    assert step.failed.tolist() == [True, False, False]
    assert step.tokens[0, [0, 2]].tolist() == [EOS, 91]
    # A NaN where nothing is sampled, or where the mask forbids the column, does not matter.
    logits = make_logits(1)
    logits[1][0] = float("nan")
    logits[0][0, 0] = float("nan")
    assert not bool(multistream_sample(logits, make_state(1, min_frames=3)).failed)


def test_logprob_is_of_the_token():
    logits = make_logits(2, [0.0, 2.0, 1.0, -1.0])
    step = multistream_sample(logits, make_state(2, min_frames=1))
    want = torch.tensor([2.0, 1.0, -1.0]).log_softmax(0)[0]
    torch.testing.assert_close(step.logprob, torch.tensor([[want, 0.0, 0.0]] * 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: multistream_sample(make_logits()[:2], make_state()),
            "logits has 2 streams, the state has 3",
        ),
        (lambda: multistream_sample(make_logits(3), make_state(2)), r"logits\[0\] must be float \[2, 4\]"),
        (lambda: make_state(top_p=0.0), "top_p above 0"),
        (lambda: make_state(temperature=-1.0), "temperature and top_k must be 0 or more"),
        (lambda: make_state(min_frames=3, max_frames=2), "min_frames 3 is above max_frames 2"),
        (lambda: make_state(delays=(0, 1)), "delays has 2 streams, scope_ids 3"),
        (
            lambda: DecodeState.new(1, scope_ids=[torch.tensor([1])], delays=[0], pad_ids=[0], eos_id=5),
            "eos_id 5 is not among",
        ),
    ],
)
def test_rejects_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_public_names():
    assert sx.ops.multistream_sample is multistream_sample
