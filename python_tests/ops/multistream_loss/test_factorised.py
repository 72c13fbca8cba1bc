"""The factorised softmax: streams of equal scopes share the exponentials of a row, where their biases allow it."""

from __future__ import annotations

import pytest
import torch

from python_tests.ops.multistream_loss.test_row_scopes import FIRST_ID, check_close, formula, make_case, run

WIDTH = 4311  # of the case "wide": stream 0 over all columns, streams 1 and 2 over all but the two outer ones


def case_of(width, dtype=torch.float32, num_rows=6):
    """Biases of streams 1 and 2 that reach over ``width``, with the row's largest logits where they are smallest."""
    case = make_case("wide", dtype, live="all", num_rows=num_rows)
    place = torch.linspace(0, 1, WIDTH, dtype=torch.float64)
    case.bias[1] = (place - 0.3) * width * WIDTH / (WIDTH - 3)
    case.bias[2] = case.bias[1].flip(0) + 5  # a large bias by itself is none
    case.z[::2] = (case.z[::2].double() - place * width * 0.9).to(dtype)
    return case


def is_shared(case, device):
    """Whether the exponentials were shared: the entropy's own path never does, and its bits differ."""
    tokens = [
        run(case, {}, device, entropy=entropy).token_nll.nan_to_num(nan=-1) for entropy in (False, True)
    ]
    return not torch.equal(*tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "shares"), [(0.5, True), (39.9, True), (40.1, False), (100.0, False)])
def test_both_sides_of_the_limit(width, shares, dtype, device):
    case = case_of(width, dtype)
    assert is_shared(case, device) == shares
    case.z = case.z.to(dtype)
    check_close(run(case, {}, device, entropy=False), formula(case, {}), entropy=False)
    check_close(
        run(case, dict(z_loss=0.1), device, entropy=False), formula(case, dict(z_loss=0.1)), entropy=False
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bias_that_is_not_finite_is_added_to_the_logits(bad, device):
    case = case_of(1.0)
    assert is_shared(case, device)
    case.bias[1, 77] = bad
    assert not is_shared(case, device)
    got = run(case, {}, device, entropy=False)
    if bad == -float("inf"):  # a masked id
        case.targets[:, :] = FIRST_ID + 60
        masked = run(case, {}, device, entropy=False)
        case.bias[1, 77] = -1e9
        check_close(masked, formula(case, {}), entropy=False)
    else:
        assert got.stream_loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf")])
def test_a_stream_without_targets_whose_bias_is_not_finite(bad, device):
    """It takes no part: a factor of it would make the other streams' gradients NaN, even times zero."""
    case = case_of(1.0)
    case.bias[1], case.live[:, 1] = bad, False
    got = run(case, {}, device, entropy=False)
    case.bias[1] = 0
    check_close(got, formula(case, {}), entropy=False)


def test_masked_logits_and_rows_without_any(device):
    """-inf is a probability of zero for every stream; a NaN breaks its row and no other."""
    case = case_of(10.0)
    case.z[:, 70:80] = float("-inf")
    case.targets[:, :] = FIRST_ID + 60
    assert is_shared(case, device)
    got = run(case, {}, device, entropy=False)
    case.z[:, 70:80] = -1e9
    check_close(got, formula(case, {}), entropy=False)
    broken = case_of(10.0)
    clean = run(broken, {}, device, entropy=False)
    broken.z[2, 100] = float("nan")
    got = run(broken, {}, device, entropy=False)
    others = torch.arange(len(broken.rows)) != 2
    assert got.token_nll[broken.rows[2]].isnan().all()
    assert torch.equal(got.grad[others], clean.grad[others])


@pytest.mark.parametrize("live", ["one", "random"])
def test_streams_that_are_not_live(live, device):
    """A row with one live stream of the tile, and rows with none, whose logits are not read."""
    case = make_case("full_and_codec", live=live, num_rows=40)
    dead = ~case.live[case.rows].any(dim=1)
    case.z[dead] = float("nan")
    got = run(case, {}, device, entropy=False)
    case.z[dead] = 0
    check_close(got, formula(case, {}), entropy=False)
