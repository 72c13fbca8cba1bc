"""The special ids of `delay_pack`: prefixes and suffixes in any form, as one ragged list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.ops._delay_pack_args import Specials, SpecialWeight, check_fits
from speechlm_ext.ops._native import check, describe


def specials(
    prefix: Specials | None,
    suffix: Specials | None,
    prefix_weight: SpecialWeight,
    suffix_weight: SpecialWeight,
    num_segments: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """``[ids [P], offsets [n + 1], prefix lengths [n], weight [P]]`` of all special ids, those of each segment side by
    side; ``[]`` for none."""
    if prefix is None and suffix is None:
        return []
    before, after = _same_for_all(prefix), _same_for_all(suffix)
    if before is not None and after is not None:
        check_fits(before, "prefix", dtype)
        check_fits(after, "suffix", dtype)
        n, size = num_segments, len(before) + len(after)
        weights = (
            _special_weight("prefix", prefix_weight, len(before) * n, n).view(n, len(before)),
            _special_weight("suffix", suffix_weight, len(after) * n, n).view(n, len(after)),
        )
        ids = torch.tensor([*before, *after], dtype=torch.int64).repeat(n)
        return [
            ids,
            torch.arange(n + 1) * size,
            torch.full((n,), len(before)),
            torch.cat(weights, dim=1).flatten(),
        ]
    sides = []
    for name, given, given_weight in (("prefix", prefix, prefix_weight), ("suffix", suffix, suffix_weight)):
        ids, offsets = _ragged(name, given, num_segments)
        check_fits(ids.tolist(), name, dtype)
        sides.append((ids, offsets, _special_weight(name, given_weight, ids.shape[0], num_segments)))
    (ids_p, offsets_p, weight_p), (ids_s, offsets_s, weight_s) = sides
    offsets = offsets_p + offsets_s
    # A special id's place is its place among its own kind and the number of the other kind before it.
    place_p = torch.arange(ids_p.shape[0]) + offsets_s[:-1].repeat_interleave(offsets_p.diff())
    place_s = torch.arange(ids_s.shape[0]) + offsets_p[1:].repeat_interleave(offsets_s.diff())
    place = torch.cat([place_p, place_s])
    ids = torch.cat([ids_p, ids_s])
    weight = torch.cat([weight_p, weight_s])
    return [
        torch.empty_like(ids).scatter_(0, place, ids),
        offsets,
        offsets_p.diff(),
        torch.empty_like(weight).scatter_(0, place, weight),
    ]


def _same_for_all(given: Specials | None) -> list[int] | None:
    """The ids that every segment has, where they are given that way."""
    if given is None:
        return []
    if isinstance(given, tuple) and any(isinstance(t, Tensor) for t in given):
        return None
    rows = given.tolist() if isinstance(given, Tensor) else list(given)
    return None if any(isinstance(row, (Sequence, Tensor)) for row in rows) else [int(i) for i in rows]


def _ragged(name: str, given: Any, num_segments: int) -> tuple[Tensor, Tensor]:
    if given is None:
        return torch.empty(0, dtype=torch.int64), torch.zeros(num_segments + 1, dtype=torch.int64)
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(t, Tensor) for t in given):
        ids, offsets = (t.detach().to("cpu", torch.int64) for t in given)
        check(
            ids.dim() == 1
            and offsets.shape == (num_segments + 1,)
            and int(offsets[0]) == 0
            and int(offsets[-1]) == ids.shape[0]
            and bool((offsets.diff() >= 0).all()),
            f"delay_pack: {name} must be ids [P] and offsets [{num_segments + 1}] that rise from 0 to P; got "
            f"{describe(given[0])} and {describe(given[1])}",
        )
        return ids, offsets
    same = _same_for_all(given)
    rows = [same] * num_segments if same is not None else list(given)
    check(
        len(rows) == num_segments,
        f"delay_pack: {name} has {len(rows)} lists of ids for {num_segments} segments",
    )
    lists = [torch.as_tensor(row, dtype=torch.int64).reshape(-1) for row in rows]
    lengths = torch.tensor([0, *(len(row) for row in lists)])
    return torch.cat([torch.empty(0, dtype=torch.int64), *lists]), lengths.cumsum(0)


def _special_weight(name: str, given: SpecialWeight, count: int, num_segments: int) -> Tensor:
    if isinstance(given, (int, float)):
        return torch.full((count,), float(given), dtype=torch.float64)
    out = torch.as_tensor(given, dtype=torch.float64).detach().to("cpu").reshape(-1)
    if num_segments and out.shape[0] * num_segments == count:
        out = out.repeat(num_segments)
    check(
        out.shape[0] == count,
        f"delay_pack: {name}_weight must be one number or one for each of the {count} ids of {name}; got "
        f"{out.shape[0]}",
    )
    return out
