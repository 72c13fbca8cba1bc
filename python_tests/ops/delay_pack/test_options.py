"""delay_pack with special ids, groups, narrow segments, limits and every instruction set; rows that come in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import speechlm_ext as sx
from python_tests.ops.delay_pack.test_delay_pack import assert_same
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.delay_pack import reference

SMALL = st.integers(-3, 40)


@st.composite
def cases(draw):
    """Segments and every option at once, each of them there or not."""
    S = draw(st.integers(1, 7))
    n = draw(st.integers(0, 4))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    narrow = draw(st.booleans())
    widths = [draw(st.integers(1, S)) if narrow else S for _ in range(n)]
    lengths = [draw(st.integers(0, 25)) for _ in range(n)]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    segments = [
        torch.randint(0, 50, (length, width), generator=generator, dtype=dtype)
        for length, width in zip(lengths, widths, strict=True)
    ]
    delays = draw(st.lists(st.integers(0, 6), min_size=S, max_size=S))

    def maybe(value):
        return value() if draw(st.booleans()) else None

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    def ragged():
        return [draw(st.lists(SMALL, max_size=3)) for _ in range(n)]

    options = dict(
        id_offsets=maybe(
            lambda: torch.randint(
                0, 999, (n, S) if draw(st.booleans()) else (S,), generator=generator
            ).tolist()
        ),
        loss_weight=maybe(lambda: [rand(*s.shape) for s in segments]),
        tail=draw(st.one_of(st.sampled_from(["keep", "trim"]), st.integers(0, max(delays)))),
        segment_weight=maybe(lambda: rand(n, S)),
        prefix=maybe(ragged),
        suffix=maybe(ragged),
        prefix_weight=draw(st.sampled_from([0.0, 0.5])),
        suffix_weight=draw(st.sampled_from([1.0, 0.25])),
        groups=maybe(lambda: [0, *sorted(draw(st.lists(st.integers(0, n), max_size=3))), n]),
        tail_ids=maybe(lambda: draw(st.lists(SMALL, min_size=S, max_size=S))),
        fill_weight=draw(st.sampled_from([0.0, 0.75])),
        dtype=draw(st.sampled_from([None, torch.int32, torch.int64])),
    )
    return delays, draw(st.lists(SMALL, min_size=S, max_size=S)), segments, options


@pytest.mark.parametrize("simd", native.simd_available())
@settings(max_examples=200, deadline=None)
@given(cases())
def test_matches_reference(simd, case):
    delays, pads, segments, options = case
    expected = reference.delay_pack(segments, delays=delays, pad_ids=pads, **options)
    num_ids = torch.full((len(segments), len(delays)), 50)
    native.use_simd(simd)
    try:
        batch = sx.ops.delay_pack(
            segments, delays=delays, pad_ids=pads, **options, maps=True, num_ids=num_ids
        )
        assert_same(batch, expected)
        if segments and all(s.shape[1] == len(delays) for s in segments):
            if options["loss_weight"] is not None:
                options["loss_weight"] = torch.cat(options["loss_weight"])
            flat = torch.cat(segments)
            offsets = torch.tensor([0, *(len(s) for s in segments)]).cumsum(0)
            batch = sx.ops.delay_pack((flat, offsets), delays=delays, pad_ids=pads, **options, maps=True)
            assert_same(batch, expected)
    finally:
        native.use_simd("")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_matches_reference_on(device, case):
    delays, pads, segments, options = case
    expected = reference.delay_pack(segments, delays=delays, pad_ids=pads, **options)
    segments = [s.to(device) for s in segments]
    if options["loss_weight"] is not None:
        options["loss_weight"] = [w.to(device) for w in options["loss_weight"]]
    batch = sx.ops.delay_pack(segments, delays=delays, pad_ids=pads, **options, maps=True)
    assert_same(batch, expected)


@pytest.mark.parametrize("simd", native.simd_available())
@pytest.mark.parametrize("num_streams", range(1, 65))
def test_every_number_of_streams(num_streams, simd):
    S = num_streams
    generator = torch.Generator().manual_seed(S)
    delays = torch.randint(0, 5, (S,), generator=generator).tolist()
    width = (S + 1) // 2
    segments = [
        torch.randint(0, 2**40, (41, S), generator=generator),
        torch.randint(0, 2**40, (33, width), generator=generator),
    ]
    weights = [torch.rand(s.shape, generator=generator) for s in segments]
    options = dict(
        delays=delays, pad_ids=list(range(-S, 0)), id_offsets=[7 * s for s in range(S)], loss_weight=weights
    )
    native.use_simd(simd)
    try:
        assert_same(
            sx.ops.delay_pack(segments, **options, maps=True), reference.delay_pack(segments, **options)
        )
    finally:
        native.use_simd("")


def test_a_multi_task_sequence_by_hand():
    """Two samples, each text and then speech, as a speech language model is trained on them."""
    text, speech = torch.tensor([[3], [4]]), torch.tensor([[0, 1], [2, 3]])
    batch = sx.ops.delay_pack(
        [text, speech, text[:1]],
        delays=[0, 1],
        pad_ids=[0, 0],
        id_offsets=[[100, 0], [200, 300], [100, 0]],
        segment_weight=[[0, 0], [0.5, 0.25], [1, 1]],
        prefix=[[5, 64, 35], [34], [5, 35]],
        suffix=[[], [5], [5]],
        suffix_weight=2.0,
        groups=[0, 2, 3],
        maps=True,
    )
    x = [
        ([5, 0], [64, 0], [0, 0], 0, -1, -1, 0),
        ([64, 0], [35, 0], [0, 0], 0, -1, -1, 1),
        ([35, 0], [103, 0], [0, 0], 0, -1, -1, 2),
        ([103, 0], [104, 0], [0, 0], 0, 0, -1, 3),
        ([104, 0], [0, 0], [0, 0], 0, 1, -1, 4),
        ([0, 0], [34, 0], [0, 0], 0, -1, -1, 5),
        ([34, 0], [200, 0], [0.5, 0], 1, -1, -1, 6),
        ([200, 0], [202, 301], [0.5, 0.25], 1, 2, -1, 7),
        ([202, 301], [5, 303], [2, 0.25], 1, 3, 2, 8),
        ([5, 303], [0, 0], [0, 0], 1, -1, 3, 9),
        ([0, 0], [0, 0], [0, 0], 1, -1, -1, 10),
        ([5, 0], [35, 0], [0, 0], 2, -1, -1, 0),
        ([35, 0], [103, 0], [1, 0], 2, -1, -1, 1),
        ([103, 0], [5, 0], [2, 0], 2, 4, -1, 2),
        ([5, 0], [0, 0], [0, 0], 2, -1, -1, 3),
        ([0, 0], [0, 0], [0, 0], 2, -1, -1, 4),
    ]
    assert batch.ids.tolist() == [row[0] for row in x]
    assert batch.labels.tolist() == [row[1] for row in x]
    assert batch.loss_weight.tolist() == [row[2] for row in x]
    assert batch.segment_map.tolist() == [row[3] for row in x]
    assert batch.stream_map.tolist() == [[row[4], row[5]] for row in x]
    assert batch.position.tolist() == [row[6] for row in x]
    assert batch.cu_seqlens.tolist() == [0, 11, 16]


def test_specials_in_every_form():
    segments = [torch.tensor([[1]]), torch.tensor([[2]])]
    options = dict(delays=[0], pad_ids=[0])
    want = [7, 8, 1, 7, 8, 2]
    for prefix in ([7, 8], [[7, 8], [7, 8]], torch.tensor([7, 8]), torch.tensor([[7, 8], [7, 8]])):
        same = not isinstance(prefix[0], list) and not (
            isinstance(prefix, torch.Tensor) and prefix.dim() == 2
        )
        weight = [0.5, 0.25] if same else [0.5, 0.25, 0.5, 0.25]
        batch = sx.ops.delay_pack(segments, **options, prefix=prefix, prefix_weight=weight)
        assert batch.ids.flatten().tolist() == want
        assert batch.loss_weight.flatten().tolist() == [0.25, 1, 0, 0.25, 1, 0]
    ragged = (torch.tensor([7, 8, 9]), torch.tensor([0, 3, 3]))
    batch = sx.ops.delay_pack(segments, **options, suffix=ragged, suffix_weight=[1.0, 2.0, 3.0])
    assert batch.ids.flatten().tolist() == [1, 7, 8, 9, 2]
    assert batch.loss_weight.flatten().tolist() == [1, 2, 3, 0, 0]


@pytest.mark.parametrize("form", ["list", "flat"])
@pytest.mark.parametrize("frame", [0, 1, 30, 59])
@pytest.mark.parametrize(("bad", "num_ids"), [(50, 50), (-1, 50), (2**40, 50), (0, 0)])
def test_ids_out_of_range_are_named(form, frame, bad, num_ids, device):
    segments = [torch.randint(0, 50, (60, 3)) for _ in range(3)]
    segments[1][frame, 2] = bad
    segments = [s.to(device) for s in segments]
    given = segments if form == "list" else (torch.cat(segments), [0, 60, 120, 180])
    limits = [[50, 50, 50], [50, 50, num_ids], [50, 50, 50]]
    where = rf"segments\[1\]\[{frame if num_ids else 0}, 2\] \(frame {frame if num_ids else 0}, stream 2\)"
    with pytest.raises(IndexError, match=rf"{where} is .*must be in \[0, {num_ids}\)"):
        sx.ops.delay_pack(given, delays=[0, 1, 2], pad_ids=[0] * 3, num_ids=limits, check_ids=True)


@pytest.mark.parametrize("frame", [0, 30])
def test_ids_that_do_not_fit_are_named(frame, device):
    segment = torch.full((60, 2), 5)
    segment[frame, 1] = 2**31 - 100
    segment = segment.to(device)
    options = dict(delays=[0, 1], pad_ids=[0, 0], dtype=torch.int32, check_ids=True)
    fits = sx.ops.delay_pack([segment], **options, id_offsets=[0, 99])
    assert int(fits.ids[frame + 1, 1]) == 2**31 - 1
    with pytest.raises(IndexError, match=rf"\[{frame}, 1\] .* with its offset 2147483648, which torch.int32"):
        sx.ops.delay_pack([segment], **options, id_offsets=[0, 100])


def test_weights_of_empty_streams_stay_zero():
    """A NaN among the weights goes where its id goes, and into no stream that has no content."""
    weight = torch.full((40, 1), math.nan)
    batch = sx.ops.delay_pack(
        [torch.ones(40, 1, dtype=torch.int64)], delays=[0, 1], pad_ids=[0, 0], loss_weight=[weight]
    )
    assert batch.loss_weight[:39, 0].isnan().all()
    assert (batch.loss_weight[:, 1] == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_that_come_in_pieces(data):
    delays = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    pieces = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    batch = data.draw(st.sampled_from([None, 1, 3]))
    shape = (sum(pieces), len(delays)) if batch is None else (batch, sum(pieces), len(delays))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    rows = torch.randint(0, 1000, shape, dtype=dtype)
    unpacker = sx.ops.DelayUnpacker(delays)
    seen, frames = 0, []
    for size in pieces:
        frames.append(unpacker.push(rows[..., seen : seen + size, :]))
        seen += size
        assert sum(f.shape[-2] for f in frames) == max(0, seen - max(delays))
    got = torch.cat(frames, dim=-2)
    for one, whole in zip(
        [got] if batch is None else list(got), [rows] if batch is None else list(rows), strict=True
    ):
        (want,) = sx.ops.delay_unpack(whole, [0, len(whole)], delays=delays)
        assert torch.equal(one, want)
    unpacker.reset()
    assert torch.equal(unpacker.push(rows), got)


def test_streamed_rows_must_fit():
    unpacker = sx.ops.DelayUnpacker([0, 1])
    with pytest.raises(sx.ops.OpError, match=r"rows must be int32 or int64 \[n, 2\] or \[B, n, 2\]"):
        unpacker.push(torch.zeros(3, 3, dtype=torch.int64))
    unpacker.push(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(sx.ops.OpError, match=r"call reset\(\)"):
        unpacker.push(torch.zeros(2, 1, 2, dtype=torch.int64))
    with pytest.raises(sx.ops.OpError, match="delays must be 0 or more rows for 1 to 64 streams"):
        sx.ops.DelayUnpacker([])


PLAIN = dict(delays=[0, 3], pad_ids=[0, 0])
FEW = torch.tensor([[1, 2], [3, 4]])


def test_fakes_and_default_devices_leave_nothing_behind():
    """The small tensors that describe a block are real ones of the CPU whatever surrounds the call, and are not kept
    where they are not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    want = reference.delay_pack([FEW], **PLAIN)
    with FakeTensorMode():
        faked = sx.ops.delay_pack([torch.zeros(2, 2, dtype=torch.int64)], **PLAIN)
    assert faked.ids.shape == want[0].shape
    assert_same(sx.ops.delay_pack([FEW], **PLAIN, maps=True), want)
    with torch.device("meta"):
        batch = sx.ops.delay_pack([FEW], **PLAIN, maps=True, prefix=[], groups=[0, 1], num_ids=[9, 9])
        frames = sx.ops.DelayUnpacker([0, 1]).push(FEW)
    assert_same(batch, want)
    assert frames.tolist() == [[1, 4]]
    assert_same(sx.ops.delay_pack([FEW], **PLAIN, maps=True), want)


def test_lazily_negated_ids_keep_their_sign():
    negated = torch._neg_view(FEW)
    assert torch.equal(sx.ops.delay_pack([negated], **PLAIN).ids, sx.ops.delay_pack([-FEW], **PLAIN).ids)


@pytest.mark.parametrize("form", ["list", "flat"])
def test_minus_one_is_an_id_like_any_other(form):
    segment = torch.full((200, 3), 5)
    segment[100, 1] = -1
    given = [segment] if form == "list" else (segment, [0, 200])
    options = dict(delays=[0, 1, 2], pad_ids=[0] * 3, dtype=torch.int32)
    assert_same(sx.ops.delay_pack(given, **options, maps=True), reference.delay_pack([segment], **options))


@pytest.mark.parametrize("num_frames", [1, 40])
@pytest.mark.parametrize(
    ("dtype", "value", "offset"), [(torch.int32, 5, 2**31 - 1), (torch.int64, 5, 2**63 - 1)]
)
def test_sums_that_overflow_are_named(dtype, value, offset, num_frames):
    segment = torch.full((num_frames, 1), value, dtype=dtype)
    with pytest.raises(
        IndexError, match=rf"\[0, 0\] .* is 5, with its offset {value + offset}, which {dtype}"
    ):
        sx.ops.delay_pack([segment], delays=[0], pad_ids=[0], id_offsets=[offset])


def test_weights_carry_no_gradient(device):
    weight = torch.rand(2, 2, requires_grad=True)
    for form in ([FEW.to(device)], (FEW.to(device), [0, 2])):
        held = [weight.to(device)] if isinstance(form, list) else weight.to(device)
        assert not sx.ops.delay_pack(form, **PLAIN, loss_weight=held).loss_weight.requires_grad


def test_ragged_specials_compile():
    flat, offsets = torch.arange(60).view(30, 2), torch.tensor([0, 10, 10, 30])

    def step(flat, offsets):
        ragged = (torch.tensor([1, 2]), torch.tensor([0, 1, 1, 2]))
        return sx.ops.delay_pack((flat, offsets), **PLAIN, prefix=ragged, suffix=[[3], [], [4, 5]]).ids

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(flat, offsets), step(flat, offsets))


def test_offsets_of_specials_may_be_a_list():
    segments = [torch.tensor([[1]]), torch.tensor([[2]])]
    batch = sx.ops.delay_pack(segments, delays=[0], pad_ids=[0], prefix=(torch.tensor([5, 6]), [0, 1, 2]))
    assert batch.ids.flatten().tolist() == [5, 1, 6, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(delays=[0, 1.9]), "delays must be a list of integers"),
        (dict(pad_ids=[0.5, 0]), "pad_ids must be a list of integers"),
        (dict(id_offsets=[1.5, 2]), "integers are needed"),
        (dict(groups=[0, 1.9]), "integers are needed"),
        (dict(prefix=[8.7]), "prefix or suffix must be a list of integers"),
        (dict(prefix=[[1], 2]), "got a mixture"),
        (dict(prefix=[[1, 2, 3]], prefix_weight=[0.1, 0.2]), "one for each of the 3 ids of prefix; got 2"),
    ],
)
def test_refuses_what_is_not_whole(options, message):
    with pytest.raises(sx.ops.OpError, match=message):
        sx.ops.delay_pack([FEW], **{**PLAIN, **options})


def test_what_the_kernels_refuse_is_the_op_s_error():
    with pytest.raises(sx.ops.OpError, match="the last of offsets must be the number of frames"):
        sx.ops.delay_pack((FEW, [0, 1]), **PLAIN)
    ops = torch.ops.speechlm_ext
    with pytest.raises(sx.ops.OpError, match="do not fit the table"):
        bytes_ = torch.ones(4, 2, dtype=torch.uint8)
        table = torch.tensor([0, 4, 0, 0, 0, 0, 0, 0])
        counts = [1, -1, 2, 4, 0, 0, 0, 0, 0, 0]
        ops.delay_pack_segments([bytes_], [], table, counts, 0.0, torch.int64, False, False)
    with pytest.raises(sx.ops.OpError, match="does not fit the counts"):
        counts = [2**61, 0, 1, 0, 1, 1, 0, 0, 2**61, 0]
        ops.delay_pack(FEW, None, torch.zeros(8, dtype=torch.int64), counts, 0.0, torch.int64, False, False)
