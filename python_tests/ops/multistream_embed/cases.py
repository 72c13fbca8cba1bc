"""Inputs and judgements that the tests of multistream_embed and scatter_sum share."""

from __future__ import annotations

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {
    "plain": {},
    "pad_minus_one": dict(pad_id=-1),
    "pad_three": dict(pad_id=3),
    "offsets": dict(offsets=[0, 5, 10]),
    "zero_offsets": dict(offsets=[0, 0, 0]),
    "scale": dict(scale=[1.0, -0.5, 2.0]),
    "all": dict(pad_id=2, offsets=[3, 0, 7], scale=[0.0, 1.5, 2.0]),
}


def make_ids(pad_id, dtype=torch.int64, num_rows=17):
    """Ids of 3 streams in [0, 5), with pads, and with a row of pads alone."""
    ids = torch.randint(0, 5, (num_rows, 3), dtype=dtype)
    ids[torch.rand(ids.shape) < 0.3] = pad_id
    ids[4] = pad_id
    return ids


def rule_of(options):
    """The options in the order in which ops and references take them."""
    return options.get("pad_id", 0), options.get("offsets"), options.get("scale")


def assert_no_worse(got, torch_result, exact):
    """At most twice the error of torch's own op of the same dtype; a rounding step is allowed to both."""
    error, rival = ((t.double().cpu() - exact.cpu()).abs().max() for t in (got, torch_result))
    step = torch.finfo(got.dtype).eps * exact.abs().max().cpu() / 2
    assert error <= 2 * torch.maximum(rival, step), (error, rival, step)
