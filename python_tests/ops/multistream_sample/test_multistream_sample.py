"""multistream_sample: the segments' state machine, and what fails how."""

from __future__ import annotations

import torch

from python_tests.ops.multistream_sample.cases import assert_step, copy_of, move
from speechlm_ext.ops import DecodeState, multistream_sample

EOS, PADS = 5, (0, 90, 91)
SCOPES = [torch.tensor([EOS, 10, 11, 12]), torch.tensor([20, 21]), torch.tensor([30, 31])]
SAY = [-9.0, 5.0, 0.0, 0.0]  # 10
END = [9.0, 0.0, 0.0, 0.0]
NAN, INF = float("nan"), float("inf")


def make_state(batch_size=2, delays=(0, 1, 2), **options):
    return DecodeState.new(
        batch_size,
        scope_ids=SCOPES,
        delays=delays,
        pad_ids=PADS,
        eos_id=EOS,
        **{"temperature": 0.0, "num_rows": 20, **options},
    )


def make_logits(batch_size=2, stream0=None):
    logits = torch.randn(batch_size, 8)
    if stream0 is not None:
        logits[:, :4] = torch.tensor(stream0)
    return logits


def roll(state, make, device="cpu", limit=50):
    """Rows until all requests are done, each compared with the reference."""
    expected, state = copy_of(state), move(state, torch.device(device))
    rows = []
    while not bool(state.is_done.all()):
        assert len(rows) < limit, "the request never ends"
        rows.append(assert_step(make(len(rows)), state, expected)[0].cpu())
    return torch.stack(rows, dim=1), state


def saying(frames):
    """Logits of stream 0 that end after so many frames."""
    return lambda n: make_logits(1, SAY if n < frames else END)


def test_ramp_in_end_and_ramp_out(device):
    """Three content frames under delays 0, 1, 2; the end counts in the row in which it is sampled."""
    rows, state = roll(make_state(1), saying(3), device)
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
    assert torch.equal(state.history[0, :5].cpu(), rows[0])
    assert torch.equal(state.history_logprob[0, :5].isnan().cpu(), is_fill)


def test_no_delay_and_a_delayed_first_stream():
    rows, _ = roll(make_state(1, delays=(0, 0, 0)), saying(2))
    assert (rows[0] == torch.tensor(PADS)).tolist() == [[False] * 3, [False] * 3, [False, True, True]]
    rows, state = roll(make_state(1, delays=(2, 0, 1)), saying(4))
    assert rows[0, :, 0].tolist() == [0, 0, 10, 10, EOS]
    assert state.finish.tolist() == [2]


def test_length_limits_per_request():
    state = make_state(
        3, temperature=1.0, min_frames=torch.tensor([[4], [0], [2]]), max_frames=torch.tensor([[4], [0], [6]])
    )
    _, state = roll(state, lambda n: make_logits(3))
    assert state.finish[0] == 4 and state.finish[1] == 0 and 2 <= int(state.finish[2]) <= 6


def test_row_limit_counts_the_request_s_rows():
    rows, state = roll(make_state(1, row_limit=3), lambda n: make_logits(1, SAY))
    assert rows[0, :, 0].tolist() == [10, 10, 10, EOS, 0] and state.finish.tolist() == [3]


def test_streams_without_a_scope_are_fill_and_end_at_once():
    state = make_state(1, scope=[[(EOS, 13), None, None]])
    rows, state = roll(state, lambda n: make_logits(1, END))
    assert rows.tolist() == [[[EOS, 90, 91]]]
    assert bool(state.is_done)


def test_a_given_beginning():
    """Rows that are past count as frames."""
    rows, _ = roll(make_state(1, step=2, max_frames=3), lambda n: make_logits(1, SAY))
    assert rows[0, :, 0].tolist() == [10, EOS, 0]
    assert rows[0, 0, 2] in (30, 31)


def test_segments_with_markers(device):
    """Two frames, `tail` rows of fill, the marker, and another segment whose scope is stream 0 alone."""
    scope = [[(EOS, 13), (20, 22), (30, 32)], [(11, 13), None, None]]
    state = make_state(
        1, scope=scope, num_segments=2, markers=[0, 77], tail=3, max_frames=torch.tensor([2, 1])
    )
    rows, state = roll(state, lambda n: make_logits(1, [0.0, 5.0, 4.0, 0.0]), device)
    assert rows[0, :, 0].tolist() == [10, 10, EOS, 0, 0, 0, 77, 11, EOS]
    assert rows[0, :, 1].gt(50).tolist() == [True, False, False, *[True] * 6]
    assert state.segment.tolist() == [1] and state.row.tolist() == [9]


def test_a_stream_ahead_of_stream_0_enters_the_next_segment_first():
    scope = [[(EOS, 13), (20, 22), None]] * 2
    state = make_state(
        1,
        delays=(2, 0, 0),
        scope=scope,
        num_segments=2,
        markers=[0, 77],
        tail=2,
        max_frames=torch.tensor([1, 2]),
    )
    rows, _ = roll(state, lambda n: make_logits(1, SAY))
    assert rows[0, :, 0].tolist() == [0, 0, 10, EOS, 0, 0, 77, 10, 10, EOS]
    assert rows[0, :, 1].gt(50).tolist() == [False, True, True, True, True, False, False, True, True, True]


def test_forced_rows(device):
    """A given id counts as said, whatever the logits: its end ends, its log-probability is that of its column."""
    forced = torch.full((2, 4, 3), -1)
    forced[:, 0, 0], forced[:, 1, 1], forced[0, 2, 0] = 11, 20, EOS
    forced[:, 0, 2] = 55  # in a row in which the stream has no content, and outside of its ids
    rows, state = roll(make_state(2, forced=forced, max_frames=6), lambda n: make_logits(2, SAY), device)
    assert rows[0, :3, 0].tolist() == [11, 10, EOS] and rows[1, :3, 0].tolist() == [11, 10, 10]
    assert rows[:, 1, 1].tolist() == [20, 20] and rows[:, 0, 2].tolist() == [55, 55]
    assert state.finish.tolist() == [2, 6]
    want = torch.tensor(SAY).log_softmax(0)[2]
    torch.testing.assert_close(state.history_logprob[:, 0, 0].cpu(), want.expand(2))


def test_forced_ids_outside_the_scope_and_where_logits_are_bad(device):
    forced = torch.tensor([12, 11, 999, EOS])[:, None, None].repeat(1, 2, 3)
    forced[..., 1:] = -1
    state = make_state(4, forced=forced, scope=[[(EOS, 12), None, None]], min_frames=1)
    logits = make_logits(4, [0.0, 1.0, 2.0, 3.0])
    logits[1, 1] = NAN
    step = assert_step(logits, move(state, device), copy_of(state))
    assert step[0][:, 0].tolist() == [12, 11, 999, EOS]
    # Outside of what was allowed: 0. Where nobody can tell: NaN, and no failure, for the id was given.
    assert step[1][:, 0].nan_to_num(7.0).tolist() == [0.0, 7.0, 0.0, 0.0]
    assert not bool(step[3].any())


def test_allowed_masks_per_request():
    allowed = torch.ones(2, 8, dtype=torch.bool)
    allowed[:, :4] = torch.tensor([[False, True, False, False], [True, False, False, True]])
    allowed[:, 6] = False
    state = make_state(2, temperature=1.0, allowed=allowed)
    for n in range(4):
        step = multistream_sample(make_logits(), state)
        assert step.tokens[0, 0] == 10
        if n >= 2:
            assert step.tokens[0, 2] == 31


def test_nothing_allowed_fails():
    allowed = torch.ones(1, 8, dtype=torch.bool)
    allowed[0, 4:6] = False
    state = make_state(1, allowed=allowed)
    rows, state = roll(state, lambda n: make_logits(1, SAY))
    assert rows[0, :, 0].tolist() == [10, EOS] and state.failed.tolist() == [True]


def test_guidance(device):
    """u + w (c - u); a column that the conditional logits forbid stays forbidden."""
    state = make_state(1, guide=torch.tensor([1]), guidance=3.0, scope=[[(EOS, 13), None, None]])
    logits = make_logits(2)
    logits[0, :4] = torch.tensor([-INF, 1.0, 2.0, 1.9])
    logits[1, :4] = torch.tensor([0.0, 1.0, 2.0, 1.5])
    step = assert_step(logits, move(state, device), copy_of(state))
    assert int(step[0][0, 0]) == 12
    want = torch.tensor([1.0, 2.0, 2.7]).log_softmax(0)[2]
    torch.testing.assert_close(step[1][0, 0].cpu(), want)


def test_a_request_that_follows_another_one():
    """The same row of logits, settings and seed: the same tokens."""
    state = make_state(
        2, temperature=1.0, source=torch.tensor([0, 0]), seed=torch.tensor([3, 3]), max_frames=9, num_rows=12
    )
    _, state = roll(state, lambda n: make_logits(2))
    assert torch.equal(state.history[0], state.history[1]) and len(state.history[0].unique()) > 4


def test_repetition_penalty(device):
    """Ids of the last `window` rows, never the end; log-probabilities are those before."""
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.9, 0.0, 0.0, 0.0, 0.0]])
    state = make_state(
        1, scope=[[(EOS, 13), None, None]], repetition_penalty=1.5, repetition_window=2, max_frames=5
    )
    rows, state = roll(state, lambda n: logits, device)
    assert rows[0, :5, 0].tolist() == [10, 11, 12, 10, 11]
    want = logits[0, :4].log_softmax(0)[1:]
    torch.testing.assert_close(state.history_logprob[0, :3, 0].cpu(), want)


def test_a_penalty_that_overflows_stays_finite():
    for penalty, x in ((1e-38, 30.0), (1e38, -30.0)):
        state = make_state(
            1, temperature=1.0, scope=[[(10, 13), None, None]], repetition_penalty=penalty, repetition_window=9,
            min_frames=5, max_frames=5,
        )  # fmt: skip
        _, state = roll(state, lambda n, x=x: torch.full((1, 8), x))
        assert state.finish.tolist() == [5] and not bool(state.failed)


def test_bad_logits_end_their_request_alone(device):
    logits = make_logits(3, [0.0, 9.0, 0.0, 0.0])
    logits[1, 2] = NAN
    state = make_state(3)
    step = assert_step(logits, move(state, device), copy_of(state))
    assert step[3].tolist() == [False, True, False] and step[4].tolist() == [False, True, False]
    assert step[0][:, 0].tolist() == [10, EOS, 10]


def test_a_stream_that_fails_takes_stream_0_with_it(device):
    """Stream 0 was sampled already: it says the end instead, without a log-probability."""
    state = make_state(3, step=4)
    logits = make_logits(3, [0.0, 9.0, 0.0, 0.0])
    logits[0, 6], logits[2, 5] = NAN, INF
    state = move(state, device)
    step = assert_step(logits, state, move(state, torch.device("cpu")))
    assert step[3].tolist() == [True, False, True]
    assert step[0][0].tolist()[::2] == [EOS, 91] and step[0][2].tolist()[:2] == [EOS, 90]
    assert step[1][[0, 2], 0].tolist() == [0.0, 0.0]
    assert state.finish.tolist() == [-1, -1, -1]


def test_bad_logits_that_do_not_matter(device):
    """A NaN where nothing is sampled, where the limits or the scope forbid the column, or in nobody's row."""
    logits = make_logits(3)
    logits[0, 4:] = logits[0, 0] = logits[0, 3] = NAN
    logits[1:] = NAN
    state = make_state(1, min_frames=3, scope=[[(EOS, 12), (20, 22), (30, 32)]])
    assert not bool(assert_step(logits, move(state, device), copy_of(state))[3])


def test_a_stream_that_would_fail_does_not_where_stream_0_ends_before(device):
    """On a GPU it is sampled beside stream 0, before its end is known."""
    state = make_state(1, delays=(0, 0, 0))
    logits = make_logits(1, END)
    logits[0, 4:] = NAN
    step = assert_step(logits, move(state, device), copy_of(state))
    assert step[0].tolist() == [[EOS, 90, 91]] and step[2].tolist() == [[True, False, False]]
    assert not bool(step[3]) and bool(step[4])


def test_logprob_is_of_the_token():
    step = multistream_sample(make_logits(2, [0.0, 2.0, 1.0, -1.0]), make_state(2, min_frames=1))
    want = torch.tensor([2.0, 1.0, -1.0]).log_softmax(0)[0]
    torch.testing.assert_close(step.logprob, torch.tensor([[want, 0.0, 0.0]] * 2))


def test_history_smaller_than_the_request():
    _, state = roll(make_state(1, num_rows=2, max_frames=5), lambda n: make_logits(1, SAY))
    assert state.history[0, :, 0].tolist() == [10, 10] and int(state.row) == 7
