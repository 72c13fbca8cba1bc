"""delay_pack as an op of torch: what its native layer refuses, opcheck, compile, export, meta tensors, autocast."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from python_tests.ops.delay_pack.test_delay_pack import FIELDS, IDS


def test_native_layer_checks_for_itself():
    """The compiled functions never trust their caller: a wrong tensor is named, nothing is written."""
    from speechlm_ext.ops.common.native import native

    table = torch.tensor([0, 4, 0, 1, 0, 0, 0, 0])
    counts = [1, -1, 2, 4, 0, 0, 0, 0, 0, 1]
    int32 = torch.int32
    good = [torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2)]
    good += [torch.zeros(5, dtype=int32), torch.zeros(2, dtype=int32)]

    def call(ids=IDS, weight=None, table=table, counts=counts, out=good, bad=None):
        native.delay_pack(ids, weight, table, None, counts, 0.0, out, bad, 1, 0)

    call()
    with pytest.raises(ValueError, match="ids must be contiguous"):
        call(ids=torch.zeros(2, 4, dtype=torch.int64).T)
    with pytest.raises(ValueError, match=r"ids must be int32 or int64; got uint8 \[4, 2\] on cpu"):
        call(ids=IDS.to(torch.uint8))
    with pytest.raises(ValueError, match=r"out_ids must have size 5 in dimension 0; got int64 \[4, 2\]"):
        call(out=[IDS, *good[1:]])
    with pytest.raises(ValueError, match="position must have 1 dimensions"):
        call(out=[*good[:3], torch.zeros(5, 1, dtype=int32), good[4]])
    with pytest.raises(ValueError, match="5 or 7 outputs are needed"):
        call(out=good[:4])
    with pytest.raises(ValueError, match="the table has 3 entries"):
        call(table=torch.tensor([0, 4, 0]))
    with pytest.raises(ValueError, match="10 counts are needed; got 9"):
        call(counts=counts[:9])
    for place, wrong in ((0, 2), (0, -1), (1, 0), (2, 3), (3, 5), (4, 1), (5, 1), (6, 2), (7, 1), (9, 2)):
        with pytest.raises(ValueError, match="delay_pack: "):
            call(counts=[*counts[:place], wrong, *counts[place + 1 :]])
    with pytest.raises(ValueError, match="loss_weight must be a torch.Tensor; got a int"):
        call(weight=3)
    with pytest.raises(ValueError, match="ids must be on cpu"):
        call(ids=IDS.to("meta"))
    with pytest.raises(ValueError, match="ids must have 8 ids; got int64 \\[3, 2\\]"):
        call(ids=IDS[:3].contiguous())
    wide = torch.tensor([0, 2, 4, 0, 1, 0, 0, 0, 0, 2, 1, 0, 7])  # two segments, of widths 2 and 1
    with pytest.raises(ValueError, match="segment 1 starts at id 4, but the table says 7"):
        call(ids=IDS[:3].contiguous(), table=wide, counts=[2, -1, 2, 4, 0, 1, 0, 0, 0, 1])
    grouped = torch.tensor([0, 2, 4, 0, 1, 0, 0, 0, 0, 0, 2, 0, 1, 2, 2])
    with pytest.raises(
        ValueError, match="segment 1 is in the group of segments 0 to 2, but the table says 1 to 2"
    ):
        call(table=grouped, counts=[2, 1, 2, 4, 0, 0, 0, 0, 0, 1])

    ops = torch.ops.speechlm_ext
    rule = (table, counts, 0.0, torch.int64, False, False)
    with pytest.raises(ValueError, match=r"segments\[0\] or its weights do not fit the table"):
        ops.delay_pack_segments([IDS[:3]], [], *rule)
    with pytest.raises(ValueError, match=r"segments\[0\] or its weights do not fit the table"):
        ops.delay_pack_segments([IDS], [torch.ones(4, 2).double()], *rule)
    with pytest.raises(ValueError, match="2 weights for a table of 1"):
        ops.delay_pack_segments([IDS], [torch.ones(4, 2)] * 2, *rule)
    with pytest.raises(ValueError, match="0 segments"):
        ops.delay_pack_segments([], [], *rule)


def op_arguments(name, **settings):
    """The arguments with which the public function calls an op."""
    seen = {}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is getattr(torch.ops.speechlm_ext, name).default:
                seen["args"] = args
            return func(*args, **(kwargs or {}))

    with Spy():
        sx.ops.delay_pack(**settings)
    return seen["args"]


@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(everything, device):
    flat = torch.randint(0, 9, (12, 3), device=device)
    offsets = torch.tensor([0, 5, 12])
    weight = torch.rand(12, 3, device=device)
    settings = dict(delays=[0, 1, 2], pad_ids=[0, 0, 0], loss_weight=weight)
    if everything:
        settings |= dict(
            id_offsets=[1, 2, 3],
            tail=1,
            segment_weight=torch.rand(2, 3),
            prefix=[[7, 8], [9]],
            suffix=[5],
            groups=[0, 2],
            tail_ids=[1, 1, 1],
            fill_weight=0.5,
            num_ids=[10, 10, 10],
            dtype=torch.int32,
            maps=True,
        )
    args = op_arguments("delay_pack", segments=(flat, offsets), **settings)
    torch.library.opcheck(torch.ops.speechlm_ext.delay_pack.default, args)
    segments, weights = list(flat.split([5, 7])), list(weight.split([5, 7]))
    if everything:
        segments[1], weights[1] = segments[1][:, :1], weights[1][:, :1]
    settings["loss_weight"] = weights
    args = op_arguments("delay_pack_segments", segments=segments, **settings)
    torch.library.opcheck(torch.ops.speechlm_ext.delay_pack_segments.default, args)
    torch.library.opcheck(torch.ops.speechlm_ext.delay_unpack.default, (flat, offsets, [0, 1, 2], 8))


class Step(torch.nn.Module):
    def forward(self, flat, offsets, weight):
        batch = sx.ops.delay_pack(
            (flat, offsets),
            delays=[0, 1, 3],
            pad_ids=[0, 0, 0],
            loss_weight=weight,
            prefix=[4, 5],
            num_ids=[99, 99, 99],
            maps=True,
        )
        return batch.ids * 2, batch.labels, batch.loss_weight.sum(), *(getattr(batch, f) for f in FIELDS[3:])


def step_inputs(num_frames, device="cpu"):
    return (
        torch.randint(1, 50, (num_frames, 3), device=device),
        torch.tensor([0, 4, num_frames]),
        torch.rand(num_frames, 3, device=device),
    )


def test_compile(device):
    step = Step()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_frames in (6, 17):
        inputs = step_inputs(num_frames, device)
        for got, want in zip(compiled(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_export(device):
    step = Step()
    frames = torch.export.Dim("frames", min=5, max=4096)
    shapes = ({0: frames}, None, {0: frames})
    program = torch.export.export(step, step_inputs(9, device), dynamic_shapes=shapes)
    for num_frames in (9, 31):
        inputs = step_inputs(num_frames, device)
        for got, want in zip(program.module()(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_meta_tensors_and_autocast():
    flat, offsets, weight = step_inputs(9)
    want = Step()(flat, offsets, weight)
    got = Step()(flat.to("meta"), offsets, weight.to("meta"))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(Step()(flat, offsets, weight), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
