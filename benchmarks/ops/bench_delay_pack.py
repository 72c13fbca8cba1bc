"""delay_pack against its rivals: ``make bench OP=delay_pack``.

Rivals, on the same inputs in the same run: the plain-torch reference; one shift loop per segment, the way
ESPnet-SpeechLM does it, with labels and weights by slicing; the same compiled by torch where that works; and a plain
copy of the bytes that the op must write, which is the machine's limit. Results are compared before anything is timed.
``extra_info`` carries op, shape, device, bytes written, and the fraction of the copy's speed.
"""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from speechlm_ext.ops.reference import delay_pack as reference

# name: (streams, frames per segment). The packs that training makes, and one small utterance.
SHAPES = {
    "smoke": (9, [500]),
    "1p7b_8k": (9, [700, 1200, 300, 2100, 900, 1500, 600, 892]),
    "1p7b_32k": (9, [700, 1200, 300, 2100, 900, 1500, 600, 892] * 4),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


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


def synchronised(function, device):
    if device == "cpu":
        return function

    def run():
        function()
        torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rival", ["ours", "ours_flat", "reference", "loop", "loop_compiled", "copy"])
def test_bench(benchmark, rival, shape, device):
    segments, weights, delays = make_segments(shape, device)
    pads = [0] * len(delays)
    settings = dict(delays=delays, pad_ids=pads)
    expected = reference.delay_pack(segments, loss_weight=weights, **settings)
    flat, flat_weight = torch.cat(segments), torch.cat(weights)
    offsets = torch.tensor([0, *(len(s) for s in segments)]).cumsum(0)

    def ours(batch):
        return batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens

    runs = {
        "ours": lambda: ours(sx.ops.delay_pack(segments, loss_weight=weights, **settings)),
        "ours_flat": lambda: ours(sx.ops.delay_pack((flat, offsets), loss_weight=flat_weight, **settings)),
        "reference": lambda: reference.delay_pack(segments, loss_weight=weights, **settings),
        "loop": lambda: loop(segments, weights, len(delays)),
        "copy": lambda: tuple(t.clone() for t in expected),
    }
    if rival == "loop_compiled":
        if len(segments) > 1:
            pytest.skip(
                "a graph per list of lengths: compiling takes minutes and is thrown away with the batch"
            )
        compiled = torch.compile(loop)
        runs[rival] = lambda: compiled(segments, weights, len(delays))
        try:
            runs[rival]()
        except Exception as error:  # noqa: BLE001 - no C++ or Triton back end, or too large a graph: not our subject
            pytest.skip(f"torch.compile does not manage the loop here: {type(error).__name__}")
    for got, want in zip(runs[rival](), expected, strict=True):
        assert torch.equal(got.to(want.device), want), f"{rival} computes something else"

    benchmark.group = f"delay_pack {shape} {device}"
    benchmark.pedantic(synchronised(runs[rival], device), rounds=15, iterations=2, warmup_rounds=2)
    written = sum(t.numel() * t.element_size() for t in expected)
    best = benchmark.stats.stats.min
    copy_time = _time_copy(expected, device)
    benchmark.extra_info.update(
        op="delay_pack",
        rival=rival,
        shape=shape,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        bytes_written=written,
        gb_per_s=round(written / best / 1e9, 3),
        limit_fraction=round(copy_time / best, 4),
        times_copy=round(best / copy_time, 2),
    )


def _time_copy(tensors, device) -> float:
    """Best time of a plain copy of the outputs, measured beside each rival: shared machines drift."""
    import time

    run = synchronised(lambda: [t.clone() for t in tensors], device)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
