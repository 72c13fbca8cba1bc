"""delay_pack against its rivals: ``make bench OP=delay_pack``.

Rivals: the list form where the flat form is timed; the plain-torch reference; a loop of shifts per segment and stream;
for segments of equal lengths the way ESPnet-SpeechLM does it, which collates them to a padded batch and makes one slice
assignment per stream, the same for a batch that is there already, and that compiled by torch; and audiocraft's pattern
provider, cold, as it is for every new length (``make bench`` installs it; only its ids are compared, it makes nothing
else). The limit is a copy of the bytes that the op must write into memory that is there already.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import speechlm_ext as sx
from benchmarks.common.harness import Case, compare, compiled, devices
from speechlm_ext.ops.delay_pack import reference

# name: (streams, frames per segment). The packs that training makes, a batch of utterances, and one small utterance.
SHAPES = {
    "smoke": (9, [500]),
    "batch32": (9, [1500] * 32),
    "1p7b_8k": (9, [700, 1200, 300, 2100, 900, 1500, 600, 892]),
    "1p7b_32k": (9, [700, 1200, 300, 2100, 900, 1500, 600, 892] * 4),
    "million": (9, [1250] * 800),
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


def batched(ids_BTS, weight_BTS):
    """One slice assignment per stream for a batch of equal lengths, and labels and weights of the next row."""
    B, T, S = ids_BTS.shape
    rows = T + S - 1
    ids = torch.zeros(B, rows + 1, S, dtype=ids_BTS.dtype, device=ids_BTS.device)
    weight = torch.zeros(B, rows + 1, S, device=ids_BTS.device)
    for n in range(S):
        ids[:, n : n + T, n] = ids_BTS[:, :, n]
        weight[:, n : n + T, n] = weight_BTS[:, :, n]
    return (
        ids[:, :-1].reshape(-1, S),
        ids[:, 1:].reshape(-1, S),
        weight[:, 1:].reshape(-1, S),
        torch.arange(rows, dtype=torch.int32, device=ids.device).repeat(B),
        torch.arange(B + 1, dtype=torch.int32, device=ids.device) * rows,
    )


def fields(batch):
    return batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens


def check_against(expected):
    def check(name, got):
        for value, want in zip(got, expected, strict=True):
            assert torch.equal(value.to(want.device), want), f"{name} computes something else"

    return check


def make_case(shape, device):
    segments, weights, delays = make_segments(shape, device)
    settings = dict(delays=delays, pad_ids=[0] * len(delays))
    expected = reference.delay_pack(segments, loss_weight=weights, **settings)[:5]
    flat, flat_weight = torch.cat(segments), torch.cat(weights)
    offsets = torch.tensor([0, *(len(s) for s in segments)]).cumsum(0)
    rivals = {
        "list_form": lambda: fields(sx.ops.delay_pack(segments, loss_weight=weights, **settings)),
        "reference": lambda: reference.delay_pack(segments, loss_weight=weights, **settings)[:5],
        "loop": lambda: loop(segments, weights, len(delays)),
    }
    if len({len(s) for s in segments}) == 1:
        batch = torch.stack(segments), torch.stack(weights)
        rivals["espnet"] = lambda: batched(*(pad_sequence(x, batch_first=True) for x in (segments, weights)))
        rivals["espnet_from_batch"] = lambda: batched(*batch)
        if (run := compiled(shape, batched, *batch)) is not None:
            rivals["espnet_from_batch_compiled"] = lambda: run(*batch)
    there = [torch.empty_like(t) for t in expected]
    return Case(
        op="delay_pack",
        shape=shape,
        device=device,
        ours=lambda: fields(sx.ops.delay_pack((flat, offsets), loss_weight=flat_weight, **settings)),
        rivals=rivals,
        check=check_against(expected),
        limit=lambda: [a.copy_(b) for a, b in zip(there, expected, strict=True)],
        extra=dict(bytes_written=sum(t.numel() * t.element_size() for t in expected)),
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, device):
    if shape == "million" and device == "cpu":
        pytest.skip("a million frames are for a GPU's bandwidth")
    compare(benchmark, make_case(shape, device))


def audiocraft_patterns():
    """audiocraft's module of patterns by itself: the package's own import needs a torch of long ago."""
    found = importlib.util.find_spec("audiocraft")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "modules" / "codebooks_patterns.py"
    spec = importlib.util.spec_from_file_location("audiocraft_codebooks_patterns", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(("batch_size", "num_streams"), [(1, 9), (1, 32), (32, 9)])
def test_bench_audiocraft(benchmark, batch_size, num_streams, device):
    """Both make MusicGen's layout of 1,500 frames; ours makes labels, weights and positions too."""
    patterns = audiocraft_patterns()
    if patterns is None:
        pytest.skip("audiocraft is not installed: pip install --no-deps audiocraft")
    S = num_streams
    segments = list(torch.randint(1, 60_000, (batch_size, 1500, S), device=device))
    batch = torch.stack(segments).transpose(1, 2).contiguous()
    flat, offsets = torch.cat(segments), torch.tensor([0, *(len(s) for s in segments)]).cumsum(0)
    preset = sx.ops.delay_preset("musicgen", S, pad_ids=0)

    def provider():
        pattern = patterns.DelayedPatternProvider(S).get_pattern(batch.shape[2])
        values, _, _ = pattern.build_pattern_sequence(batch, 0)
        return (values.transpose(1, 2).reshape(-1, S),)

    def ours():
        return fields(sx.ops.delay_pack((flat, offsets), **preset))

    expected = reference.delay_pack(segments, **{k: v for k, v in preset.items()})[:5]

    def check(name, got):
        check_against(expected[: len(got)])(name, got)

    shape, rivals = f"musicgen_b{batch_size}_s{S}", {"audiocraft_cold": provider}
    case = Case(op="delay_pack", shape=shape, device=device, ours=ours, rivals=rivals, check=check)
    compare(benchmark, case)
