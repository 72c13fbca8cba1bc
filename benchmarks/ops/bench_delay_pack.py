"""delay_pack against its rivals: ``make bench OP=delay_pack``.

Rivals: the list form where the flat form is timed; the plain-torch reference; a loop of shifts per segment and stream,
the way ESPnet-SpeechLM does it, with labels and weights by slicing; that loop compiled by torch, for one segment. The
limit is a copy of the bytes that the op must write.
"""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from benchmarks.harness import compare, devices
from speechlm_ext.ops.reference import delay_pack as reference

# name: (streams, frames per segment). The packs that training makes, a batch of utterances, and one small utterance.
SHAPES = {
    "smoke": (9, [500]),
    "batch32": (9, [1500] * 32),
    "1p7b_8k": (9, [700, 1200, 300, 2100, 900, 1500, 600, 892]),
    "1p7b_32k": (9, [700, 1200, 300, 2100, 900, 1500, 600, 892] * 4),
}


def make_segments(shape, device):
    num_streams, lengths = SHAPES[shape]
    torch.manual_seed(0)
    segments = [torch.randint(1, 60_000, (n, num_streams), device=device) for n in lengths]
    return segments, [torch.rand(s.shape, device=device) for s in segments], list(range(num_streams))


def loop(segments, weights, num_streams):
    """A loop over segments and streams: out of place shifts, then labels and weights of the next row."""
    ids, labels, loss_weight, position, lengths = [], [], [], [], []
    for segment, weight in zip(segments, weights, strict=True):
        rows = segment.shape[0] + num_streams - 1
        shifted = torch.zeros(rows + 1, num_streams, dtype=segment.dtype, device=segment.device)
        shifted_weight = torch.zeros(rows + 1, num_streams, device=segment.device)
        for n in range(num_streams):
            shifted[n : n + segment.shape[0], n] = segment[:, n]
            shifted_weight[n : n + segment.shape[0], n] = weight[:, n]
        ids.append(shifted[:-1])
        labels.append(shifted[1:])
        loss_weight.append(shifted_weight[1:])
        position.append(torch.arange(rows, dtype=torch.int32, device=segment.device))
        lengths.append(rows)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat(ids), torch.cat(labels), torch.cat(loss_weight), torch.cat(position), borders


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, device):
    segments, weights, delays = make_segments(shape, device)
    settings = dict(delays=delays, pad_ids=[0] * len(delays))
    expected = reference.delay_pack(segments, loss_weight=weights, **settings)
    flat, flat_weight = torch.cat(segments), torch.cat(weights)
    offsets = torch.tensor([0, *(len(s) for s in segments)]).cumsum(0)

    def fields(batch):
        return batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens

    def check(name, got):
        for value, want in zip(got, expected, strict=True):
            assert torch.equal(value.to(want.device), want), f"{name} computes something else"

    rivals = {
        "list_form": lambda: fields(sx.ops.delay_pack(segments, loss_weight=weights, **settings)),
        "reference": lambda: reference.delay_pack(segments, loss_weight=weights, **settings),
        "loop": lambda: loop(segments, weights, len(delays)),
    }
    if len(segments) == 1:  # a graph per list of lengths takes minutes and is thrown away with the batch
        compiled = torch.compile(loop)
        try:
            compiled(segments, weights, len(delays))
            rivals["loop_compiled"] = lambda: compiled(segments, weights, len(delays))
        except Exception as error:  # noqa: BLE001 - no C++ or Triton back end here: not our subject
            print(f"torch.compile does not manage the loop here: {type(error).__name__}")
    written = sum(t.numel() * t.element_size() for t in expected)
    compare(
        benchmark,
        op="delay_pack",
        shape=shape,
        device=device,
        ours=lambda: fields(sx.ops.delay_pack((flat, offsets), loss_weight=flat_weight, **settings)),
        rivals=rivals,
        check=check,
        limit=lambda: [t.clone() for t in expected],
        bytes_written=written,
    )
