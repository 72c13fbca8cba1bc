"""multistream_sample: what it takes, and what it says of what it does not take."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from python_tests.ops.multistream_sample.cases import copy_of
from python_tests.ops.multistream_sample.test_multistream_sample import make_logits, make_state
from speechlm_ext.ops import DecodeState, OpError, multistream_sample


def test_logits_of_each_stream_or_side_by_side():
    logits, state = make_logits(2), make_state(2, temperature=1.0)
    one = multistream_sample(logits, copy_of(state))
    parts = multistream_sample(logits.split([4, 2, 2], dim=1), copy_of(state))
    strided = multistream_sample(logits.T.contiguous().T, copy_of(state))
    for x, y, z in zip(one, parts, strided, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def broken(**changes):
    state = make_state()
    for name, value in changes.items():
        setattr(state, name, value)
    return multistream_sample(make_logits(), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multistream_sample([torch.zeros(2, 4)] * 2, make_state()), "logits has 2 streams, the state has 3"),
        (lambda: multistream_sample([torch.zeros(2, 3)] * 3, make_state()), r"logits\[0\] must be float \[R, 4\]"),
        (lambda: multistream_sample(make_logits(1), make_state()), r"\[2 or more, 8\]; got float32 \[1, 8\]"),
        (lambda: multistream_sample(make_logits().double(), make_state()), "must be float32, bfloat16 or float16"),
        (lambda: broken(progress=torch.zeros(2, 6, dtype=torch.int64)), "progress must have size 7 in dimension 1"),
        (lambda: broken(choice=torch.zeros(2, 1, 3, 4)), "choice must be int32; got float32"),
        (lambda: broken(history=torch.zeros(2, 5, 3, dtype=torch.int64)), "history_logprob must have size 5"),
        (lambda: broken(limits=torch.zeros(2, 0, 4, dtype=torch.int64)), "limits must have at least one segment"),
        (lambda: broken(sampling=torch.zeros(2, 1, 4, 3).mT), "sampling must be contiguous"),
        (lambda: broken(allowed=torch.ones(3, 8, dtype=torch.bool)), "allowed must have 1 or 2 rows"),
        (lambda: broken(bounds=(0, 4, 6, 7)), "logits must have 7 columns"),
        (lambda: broken(bounds=(0, 9, 6, 8)), "bounds must ascend"),
        (lambda: broken(eos_column=4), "eos_column 4 is none of stream 0's 4"),
        (lambda: broken(delays=(0, -1, 2)), "delay -1 of stream 1"),
        (lambda: make_state(top_p=0.0), "top_p must be above 0"),
        (lambda: make_state(temperature=-1.0), "temperature must be 0"),
        (lambda: make_state(min_frames=3, max_frames=2), "min_frames must be at most max_frames; got 3"),
        (lambda: make_state(delays=(0, 1)), "delays has 2 streams, scope_ids 3"),
        (lambda: make_state(num_rows=0, repetition_window=3), "repetition_window 3 needs the history"),
        (
            lambda: DecodeState.new(1, scope_ids=[torch.tensor([1])], delays=[0], pad_ids=[0], eos_id=5),
            "eos_id 5 is not among",
        ),
    ],
)  # fmt: skip
def test_rejects_bad_input(call, message):
    with pytest.raises(OpError, match=message):
        call()


def test_public_names():
    assert sx.ops.multistream_sample is multistream_sample
