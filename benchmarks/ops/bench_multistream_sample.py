"""multistream_sample against its rivals: ``make bench OP=multistream_sample``.

One step of a batch: every stream of every request is sampled at temperature 0.8 with top-k 30, top-p 0.9 or neither, or
greedily. Rivals: transformers' logits processors, then softmax and `torch.multinomial`, per stream, as its generation
does it; torch's own `topk`, softmax and multinomial, per stream; the op's reference in plain torch. Rivals only draw;
the op also gives the log-probability of each token, keeps the history and moves the requests' states on. The limit is a
copy of the logits.

Shapes: ``speech`` is a batch of 16 with 5,000 columns for stream 0 and 1,024 for each of eight others, ``speech_1`` one
request of it, ``text`` a batch of 16 with one stream of 50,000.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.harness import Case, compare, devices
from speechlm_ext.ops import DecodeState, multistream_sample
from speechlm_ext.ops.multistream_sample.reference import multistream_sample as reference

# name: (requests, columns of each stream)
SHAPES = {
    "smoke": (2, [60, 40]),
    "speech": (16, [5000, *[1024] * 8]),
    "speech_1": (1, [5000, *[1024] * 8]),
    "text": (16, [50_000]),
}
MODES = {
    "greedy": dict(temperature=0.0),
    "top_k": dict(temperature=0.8, top_k=30),
    "top_p": dict(temperature=0.8, top_p=0.9),
    "full": dict(temperature=0.8),
}


def make_state(requests, widths, device, settings):
    ids = torch.arange(sum(widths), device=device).split(widths)
    return DecodeState.new(
        requests,
        scope_ids=ids,
        delays=[0] * len(widths),
        pad_ids=[0] * len(widths),
        eos_id=0,
        min_frames=2**30,
        **settings,
    )


def with_transformers(parts, settings):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if settings["temperature"] == 0:
        return torch.cat([x.argmax(-1, keepdim=True) for x in parts], 1)
    processors = [TemperatureLogitsWarper(settings["temperature"])]
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    out = []
    for x in parts:
        for process in processors:
            x = process(None, x)
        out.append(torch.multinomial(x.softmax(-1), 1))
    return torch.cat(out, 1)


def with_torch(parts, settings):
    if settings["temperature"] == 0:
        return torch.cat([x.argmax(-1, keepdim=True) for x in parts], 1)
    out = []
    for x in parts:
        if "top_k" in settings:
            values, columns = x.topk(min(settings["top_k"], x.shape[-1]), dim=-1)
            p = (values / settings["temperature"]).softmax(-1)
        else:
            p = (x / settings["temperature"]).softmax(-1)
            if "top_p" in settings:
                p, columns = p.sort(dim=-1, descending=True)
                p = p.masked_fill(p.cumsum(-1) - p >= settings["top_p"], 0)
            else:
                columns = torch.arange(x.shape[-1], device=x.device).expand_as(x)
        out.append(columns.gather(1, torch.multinomial(p, 1)))
    return torch.cat(out, 1)


def kept(x, settings):
    """What may be drawn from float64 logits; top-p with some room for rivals that sum in float32."""
    if settings["temperature"] == 0:
        return x == x.amax(-1, keepdim=True)
    if "top_k" in settings:
        return x >= x.topk(min(settings["top_k"], x.shape[-1]), dim=-1).values[:, -1:]
    p, order = (x / settings["temperature"]).softmax(-1).sort(dim=-1, descending=True)
    below = p.cumsum(-1) - p < settings.get("top_p", 2.0) + 1e-5
    return torch.zeros_like(below).scatter(-1, order, below)


def make_case(shape, mode, device):
    requests, widths = SHAPES[shape]
    settings = MODES[mode]
    torch.manual_seed(0)
    logits = (torch.randn(requests, sum(widths)) * 3).to(device)
    firsts = torch.tensor([0, *widths]).cumsum(0)[:-1].to(device)
    parts = logits.split(widths, dim=1)
    # The op may not end: its state would. Rivals know nothing of that.
    logits[:, 0] = -1e4
    allowed = [kept(x.double(), settings) for x in parts]
    state, other = (make_state(requests, widths, device, settings) for _ in range(2))

    def check(name, got):
        columns = got[0] - firsts if name in ("ours", "reference") else got
        for s, mask in enumerate(allowed):
            assert bool(mask.gather(1, columns[:, s : s + 1]).all()), f"{name} draws what is not kept"

    for _ in range(3):
        assert torch.equal(multistream_sample(logits, state)[0], reference(logits, other)[0])
    copy = torch.empty_like(logits)
    return Case(
        op="multistream_sample",
        shape=f"{shape}_{mode}",
        device=device,
        ours=lambda: multistream_sample(logits, state),
        rivals={
            "transformers": lambda: with_transformers(parts, settings),
            "torch": lambda: with_torch(parts, settings),
            "reference": lambda: reference(logits, other),
        },
        check=check,
        limit=lambda: copy.copy_(logits),
        extra=dict(bytes_moved=2 * logits.numel() * logits.element_size()),
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, mode, device):
    compare(benchmark, make_case(shape, mode, device))
