"""delay_pack against its plain-torch reference, its inverse, and hand-written blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speechlm_ext as sx
from speechlm_ext.ops.common.native import OpError
from speechlm_ext.ops.delay_pack import op, reference

FIELDS = ("ids", "labels", "loss_weight", "position", "cu_seqlens", "segment_map", "stream_map")

# (delays, frames of each segment): regular, awkward, and the smallest.
SHAPES = {
    "speech": ([0, 1, 2, 3, 4, 5, 6, 7, 8], [37, 5, 210]),
    "parallel": ([0, 0, 0], [4, 9]),
    "acoustic_delay": ([0, 1, 1, 1], [13, 1, 2]),
    "no_stream_at_zero": ([2, 5], [3, 0, 7]),
    "delays_fall": ([3, 0, 2, 1, 7], [31, 47, 123]),
    "one_stream": ([0], [5, 0, 1]),
    "one_delayed_stream": ([4], [2, 9]),
    "all_empty": ([0, 2], [0, 0]),
    "shorter_than_delay": ([0, 6], [2, 3, 1]),
    "many_streams": (list(range(37)), [11, 64]),
    "many_small": ([0, 1], [1, 2, 0] * 300),
    "several_tiles": ([0, 1, 2], [5000, 1, 3000]),
}


def make_segments(lengths, num_streams, dtype, device="cpu"):
    return [torch.randint(1, 1000, (n, num_streams), dtype=dtype, device=device) for n in lengths]


def assert_same(batch, expected):
    for name, want in zip(FIELDS, expected, strict=True):
        got = getattr(batch, name)
        if got is None:
            assert name.endswith("_map"), name
            continue
        assert got.dtype == want.dtype, name
        torch.testing.assert_close(
            got, want.to(got.device), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("tail", ["keep", "trim"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, weighted, tail, device):
    delays, lengths = SHAPES[shape]
    segments = make_segments(lengths, len(delays), dtype, device)
    settings = dict(
        delays=delays,
        pad_ids=[-7 - s for s in range(len(delays))],
        id_offsets=[100 * s for s in range(len(delays))],
        loss_weight=[torch.rand(s.shape, device=device) for s in segments] if weighted else None,
        tail=tail,
    )
    expected = reference.delay_pack(segments, **settings)
    assert_same(sx.ops.delay_pack(segments, **settings), expected)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    if weighted:
        settings["loss_weight"] = torch.cat(settings["loss_weight"])
    assert_same(sx.ops.delay_pack((torch.cat(segments), offsets), **settings), expected)


def test_block_by_hand():
    codes = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    weight = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    batch = sx.ops.delay_pack(
        [codes, codes[:1]],
        delays=[0, 1, 2],
        pad_ids=[90, 91, 92],
        id_offsets=[0, 10, 20],
        loss_weight=[weight, weight[:1]],
    )
    assert batch.ids.tolist() == [
        [1, 91, 92],
        [4, 12, 92],
        [7, 15, 23],
        [90, 18, 26],
        [90, 91, 29],
        [1, 91, 92],
        [90, 12, 92],
        [90, 91, 23],
    ]
    assert batch.labels.tolist() == [
        [4, 12, 92],
        [7, 15, 23],
        [90, 18, 26],
        [90, 91, 29],
        [90, 91, 92],
        [90, 12, 92],
        [90, 91, 23],
        [90, 91, 92],
    ]
    expected_weight = [
        [0.4, 0.2, 0],
        [0.7, 0.5, 0.3],
        [0, 0.8, 0.6],
        [0, 0, 0.9],
        [0, 0, 0],
        [0, 0.2, 0],
        [0, 0, 0.3],
        [0, 0, 0],
    ]
    torch.testing.assert_close(batch.loss_weight, torch.tensor(expected_weight))
    assert batch.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 8]


def test_trim_is_lossless_after_pad_frames():
    codes = torch.arange(1, 16).view(5, 3)
    padded = torch.cat([codes, torch.zeros(2, 3, dtype=torch.int64)])
    batch = sx.ops.delay_pack([padded], delays=[0, 1, 2], pad_ids=[0, 0, 0], tail="trim")
    assert batch.ids.tolist() == sx.ops.delay_pack([codes], delays=[0, 1, 2], pad_ids=[0, 0, 0]).ids.tolist()
    (back,) = sx.ops.delay_unpack(batch.ids, batch.cu_seqlens, delays=[0, 1, 2])
    assert torch.equal(back, codes)


id_values = st.one_of(st.integers(0, 50), st.integers(-(2**63), 2**63 - 1))


@st.composite
def ragged(draw):
    num_streams = draw(st.integers(1, 6))
    delays = draw(st.lists(st.integers(0, 9), min_size=num_streams, max_size=num_streams))
    pads = draw(st.lists(id_values, min_size=num_streams, max_size=num_streams))
    lengths = draw(st.lists(st.integers(0, 12), max_size=5))
    rows = st.lists(id_values, min_size=num_streams, max_size=num_streams)
    frames = [draw(st.lists(rows, min_size=n, max_size=n)) for n in lengths]
    segments = [torch.tensor(f, dtype=torch.int64).reshape(-1, num_streams) for f in frames]
    return delays, pads, segments


@settings(max_examples=150, deadline=None)
@given(ragged())
def test_roundtrip(case):
    delays, pads, segments = case
    batch = sx.ops.delay_pack(segments, delays=delays, pad_ids=pads)
    back = sx.ops.delay_unpack(batch.ids, batch.cu_seqlens, delays=delays)
    assert len(back) == len(segments)
    for got, want in zip(back, segments, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(
        back, reference.delay_unpack(batch.ids, batch.cu_seqlens, delays=delays), strict=True
    ):
        assert torch.equal(got, want)


@settings(max_examples=60, deadline=None)
@given(ragged())
def test_packed_equals_unpacked(case):
    """A block of many segments is its segments' own blocks, one after the other: nothing leaks."""
    delays, pads, segments = case
    together = sx.ops.delay_pack(segments, delays=delays, pad_ids=pads)
    alone = [sx.ops.delay_pack([s], delays=delays, pad_ids=pads) for s in segments]
    for name in ("ids", "labels", "loss_weight", "position"):
        if alone:
            assert torch.equal(getattr(together, name), torch.cat([getattr(a, name) for a in alone])), name


def test_unpack_of_trimmed_block_drops_the_cut_frames(device):
    segments = make_segments([9, 1, 30], 3, torch.int64, device)
    batch = sx.ops.delay_pack(segments, delays=[1, 0, 4], pad_ids=[0, 0, 0], tail="trim")
    back = sx.ops.delay_unpack(batch.ids, batch.cu_seqlens, delays=[1, 0, 4])
    assert [len(b) for b in back] == [5, 0, 26]
    for got, want in zip(back, segments, strict=True):
        assert torch.equal(got, want[: len(got)])


def test_non_contiguous_input_and_threads():
    flat = torch.randint(0, 1000, (7, 60_000)).T[:, ::2]
    offsets = [0, 20_000, 20_000, 60_000]
    weight = torch.rand(4, 60_000).T
    settings = dict(delays=[3, 0, 1, 2], pad_ids=[0] * 4)
    segments = [flat[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    weights = [weight[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    expected = reference.delay_pack(segments, loss_weight=weights, **settings)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_same(sx.ops.delay_pack((flat, offsets), loss_weight=weight, **settings), expected)
    finally:
        torch.set_num_threads(before)


def test_no_segments():
    batch = sx.ops.delay_pack([], delays=[0, 1], pad_ids=[0, 0])
    assert batch.ids.shape == (0, 2) and batch.cu_seqlens.tolist() == [0]
    assert sx.ops.delay_unpack(batch.ids, batch.cu_seqlens, delays=[0, 1]) == []


def test_two_segments_as_a_tuple_are_a_list():
    a, b = make_segments([3, 4], 2, torch.int64)
    settings = dict(delays=[0, 1], pad_ids=[0, 0])
    assert torch.equal(sx.ops.delay_pack((a, b), **settings).ids, sx.ops.delay_pack([a, b], **settings).ids)


def test_int32_pad_and_offsets_reach_the_limits():
    segment = torch.tensor([[2**31 - 1], [-(2**31)]], dtype=torch.int32)
    batch = sx.ops.delay_pack([segment], delays=[1], pad_ids=[2**31 - 1])
    assert batch.ids.flatten().tolist() == [2**31 - 1, 2**31 - 1, -(2**31)]


IDS = torch.zeros(4, 2, dtype=torch.int64)
GOOD = dict(delays=[0, 1], pad_ids=[0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sx.ops.delay_pack([IDS.float()], **GOOD),
            r"segments\[0\] must be int32 or int64 .* float32 \[4, 2\]",
        ),
        (lambda: sx.ops.delay_pack([IDS, IDS.int()], **GOOD), r"segments\[1\] is int32"),
        (
            lambda: sx.ops.delay_pack([IDS, IDS.repeat(1, 2)], **GOOD),
            r"segments\[1\] has 4 streams but delays has 2",
        ),
        (lambda: sx.ops.delay_pack([IDS, IDS[:, :0]], **GOOD), r"segments\[1\] has 0 streams"),
        (lambda: sx.ops.delay_pack((IDS[:, :1], [0, 4]), **GOOD), r"\(flat\) has 1 streams but delays has 2"),
        (
            lambda: sx.ops.delay_pack([IDS], delays=[0] * 65, pad_ids=[0] * 65),
            "there must be 1 to 64 streams; got 65",
        ),
        (
            lambda: sx.ops.delay_pack([IDS.repeat(1, 33)[:, :65]], delays=[0] * 65, pad_ids=[0] * 65),
            "there must be 1 to 64 streams; got 65",
        ),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, tail=2),
            "tail must be 0 to 1 rows, the largest delay; got 2",
        ),
        (lambda: sx.ops.delay_pack([IDS], **GOOD, tail=-1), "tail must be 0 to 1 rows"),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, groups=[0, 2]),
            r"groups must rise from 0 to 1.* got \[0, 2\]",
        ),
        (lambda: sx.ops.delay_pack([IDS] * 3, **GOOD, groups=[0, 2, 1, 3]), "groups must rise from 0 to 3"),
        (lambda: sx.ops.delay_pack([IDS], **GOOD, groups=[]), r"groups must be \[g \+ 1\] offsets"),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, prefix=[[1], [2]]),
            "prefix has 2 lists of ids for 1 segments",
        ),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, suffix=(torch.tensor([1, 2]), torch.tensor([0, 1]))),
            r"suffix must be ids \[P\] and offsets \[2\] that rise from 0 to P",
        ),
        (
            lambda: sx.ops.delay_pack([IDS.int()], **GOOD, prefix=[2**31]),
            r"prefix\[0\] = 2147483648 does not fit",
        ),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, suffix=[3, 4], suffix_weight=[1.0, 2.0, 3.0]),
            "suffix_weight must be one number or one for each of the 2 ids of suffix; got 3",
        ),
        (
            lambda: sx.ops.delay_pack([IDS] * 3, **GOOD, id_offsets=torch.zeros(2, 2).long()),
            r"id_offsets must have 2 values, one per stream, or be \[3, 2\], a row for each segment; got \[2, 2\]",
        ),
        (
            lambda: sx.ops.delay_pack([IDS] * 3, **GOOD, segment_weight=[[1.0, 1.0]]),
            r"segment_weight must be \[3, 2\]",
        ),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, num_ids=[4, -1]),
            "num_ids must be 0 or more; got -1 for stream 1",
        ),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, dtype=torch.int16),
            "dtype must be int32 or int64; got torch.int16",
        ),
        (
            lambda: sx.ops.delay_pack([IDS], delays=[0, 1], pad_ids=[0, 0], tail_ids=[0]),
            "tail_ids must have 2",
        ),
        (
            lambda: sx.ops.delay_pack([IDS, IDS[:, :1]], **GOOD, loss_weight=torch.ones(8, 2)),
            "loss_weight must be a list, one tensor per segment, if the segments have different widths",
        ),
        (lambda: sx.ops.delay_pack([IDS[0]], **GOOD), r"segments\[0\] must be"),
        (lambda: sx.ops.delay_pack([[1, 2]], **GOOD), r"segments\[0\] must be a tensor; got a list"),
        (lambda: sx.ops.delay_pack([IDS], delays=[0, -1], pad_ids=[0, 0]), "delays must be 0 or more"),
        (lambda: sx.ops.delay_pack([IDS], delays=[], pad_ids=[]), "at least one value"),
        (lambda: sx.ops.delay_pack([IDS], delays=[0, 1], pad_ids=[0]), "pad_ids must have 2 values"),
        (lambda: sx.ops.delay_pack([IDS], **GOOD, id_offsets=[1]), "id_offsets must have 2 values"),
        (
            lambda: sx.ops.delay_pack([IDS.int()], delays=[0, 1], pad_ids=[0, 2**40]),
            r"pad_ids\[1\] = .* does not fit",
        ),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, tail="drop"),
            'tail must be "keep", "trim" or a number of rows',
        ),
        (
            lambda: sx.ops.delay_pack((IDS, [0, 3, 2, 4]), **GOOD),
            r"offsets must not fall; offsets\[2\] = 2 after 3",
        ),
        (
            lambda: sx.ops.delay_pack((IDS, [0, 3]), **GOOD),
            "the last of offsets must be the number of frames, 4; got 3",
        ),
        (lambda: sx.ops.delay_pack((IDS, [1, 4]), **GOOD), "must start at 0; got 1"),
        (lambda: sx.ops.delay_pack((IDS, [0, 9]), **GOOD), "the last of offsets"),
        (lambda: sx.ops.delay_pack((IDS, []), **GOOD), "offsets"),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, loss_weight=[IDS]),
            r"loss_weight\[0\] must be float \[4, 2\]",
        ),
        (lambda: sx.ops.delay_pack([IDS], **GOOD, loss_weight=[]), "0 entries for 1 segments"),
        (
            lambda: sx.ops.delay_pack([IDS], **GOOD, loss_weight=[torch.ones(3, 2)]),
            r"loss_weight\[0\] must be float \[4, 2\] .* got float32 \[3, 2\]",
        ),
        (lambda: sx.ops.delay_pack([IDS], delays=[0, 2**31 - 1], pad_ids=[0, 0]), "more than cu_seqlens"),
        (lambda: sx.ops.delay_unpack(IDS, [0, 5], delays=[0, 1]), "must end at the number of rows, 4; got 5"),
        (lambda: sx.ops.delay_unpack(IDS, [0, 3, 1, 4], delays=[0, 1]), "must not fall"),
        (lambda: sx.ops.delay_unpack(IDS, [2, 4], delays=[0, 1]), "must start at 0"),
        (lambda: sx.ops.delay_unpack(IDS, [0, 4], delays=[0, 1, 2]), "2 streams but delays has 3"),
        (lambda: sx.ops.delay_unpack(IDS, [0, 4], delays=[0, -1]), "delays must be 0 or more"),
    ],
)
def test_rejects_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "delay_" in str(error.value)


def test_batch_moves_as_a_whole():
    batch = sx.ops.delay_pack([IDS], **GOOD, maps=True).to("meta")
    assert all(getattr(batch, name).device.type == "meta" for name in FIELDS)
    assert sx.ops.delay_pack([IDS], **GOOD).to("meta").stream_map is None


def test_a_capturing_stream_is_refused(monkeypatch):
    """Before anything is pinned or copied, which would spoil the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(OpError, match="cannot be captured in a CUDA graph.*before the capture"):
        op._to_device(torch.zeros(3, dtype=torch.int64), torch.device("cuda"))
    assert op._to_device(torch.zeros(3, dtype=torch.int64), torch.device("cpu")) is None


@pytest.mark.cuda
def test_cuda_refuses_a_capture():
    flat = torch.randint(1, 50, (500, 9), device="cuda")
    with pytest.raises(OpError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sx.ops.delay_pack([flat], delays=list(range(9)), pad_ids=[0] * 9)
    torch.cuda.synchronize()


@pytest.mark.cuda
def test_cuda_uses_the_current_stream():
    flat = torch.randint(1, 50, (500, 9), device="cuda")
    settings = dict(delays=list(range(9)), pad_ids=[0] * 9)
    expected = reference.delay_pack([flat], **settings)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        batch = sx.ops.delay_pack([flat], **settings)
    stream.synchronize()
    assert_same(batch, expected)
