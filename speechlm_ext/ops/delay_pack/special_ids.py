"""Special ids of `delay_pack`: prefixes and suffixes in any form, as one ragged list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe, int_list
from speechlm_ext.ops.delay_pack.arguments import Specials, SpecialWeight, check_fits, host_tensor


def specials(
    prefix: Specials | None,
    suffix: Specials | None,
    prefix_weight: SpecialWeight,
    suffix_weight: SpecialWeight,
    num_segments: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """``[ids [P], offsets [n + 1], prefix lengths [n], weight [P]]`` of all special ids, segment by segment.

    int64, and float64 weights; ``[]`` if there are neither prefixes nor suffixes.
    """
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
        ids = torch.tensor([*before, *after], dtype=torch.int64, device="cpu").repeat(n)
        return [
            ids,
            torch.arange(n + 1, device="cpu") * size,
            torch.full((n,), len(before), device="cpu"),
            torch.cat(weights, dim=1).flatten(),
        ]
    sides = []
    for name, given, given_weight in (("prefix", prefix, prefix_weight), ("suffix", suffix, suffix_weight)):
        ids, offsets = _ragged(name, given, num_segments)
        check_fits(ids, name, dtype)
        repeat = 1 if _same_for_all(given) is None else num_segments
        sides.append((ids, offsets, _special_weight(name, given_weight, ids.shape[0], repeat)))
    (ids_p, offsets_p, weight_p), (ids_s, offsets_s, weight_s) = sides
    offsets = offsets_p + offsets_s
    # An id's index is its index within its own kind plus the number of ids of the other kind before it.
    count_p, count_s = ids_p.shape[0], ids_s.shape[0]
    place_p = torch.arange(count_p, device="cpu") + offsets_s[:-1].repeat_interleave(
        offsets_p.diff(), output_size=count_p
    )
    place_s = torch.arange(count_s, device="cpu") + offsets_p[1:].repeat_interleave(
        offsets_s.diff(), output_size=count_s
    )
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
    """The ids of every segment if one list is given for all, else None."""
    if given is None:
        return []
    if isinstance(given, tuple) and any(isinstance(t, Tensor) for t in given):
        return None
    rows = given.tolist() if isinstance(given, Tensor) else list(given)
    if any(isinstance(row, (Sequence, Tensor, np.ndarray)) for row in rows):
        return None
    return int_list(rows, "delay_pack: prefix or suffix")


def _ragged(name: str, given: Any, num_segments: int) -> tuple[Tensor, Tensor]:
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    if given is None:
        return empty, torch.zeros(num_segments + 1, dtype=torch.int64, device="cpu")
    if isinstance(given, tuple) and any(isinstance(t, Tensor) for t in given):
        message = (
            f"delay_pack: {name} must be ids [P] and offsets [{num_segments + 1}] that rise from 0 to P; got "
            f"{' and '.join(describe(t) for t in given)}"
        )
        if len(given) != 2:
            raise OpError(message)
        ids, offsets = (host_tensor(t, torch.int64) for t in given)
        if ids.dim() != 1 or offsets.shape != (num_segments + 1,):
            raise OpError(message)
        if not torch.compiler.is_compiling() and not (  # under compile the kernels check
            int(offsets[0]) == 0 and int(offsets[-1]) == len(ids) and bool((offsets.diff() >= 0).all())
        ):
            raise OpError(message)
        return ids, offsets
    same = _same_for_all(given)
    rows = [same] * num_segments if same is not None else list(given)
    if not all(isinstance(row, (Sequence, Tensor, np.ndarray)) for row in rows):
        raise OpError(
            f"delay_pack: {name} must be a list of ids, or one list of ids per segment; got a mixture"
        )
    if len(rows) != num_segments:
        raise OpError(f"delay_pack: {name} has {len(rows)} lists of ids for {num_segments} segments")
    lists = [host_tensor(row, torch.int64).reshape(-1) for row in rows]
    lengths = torch.tensor([0, *(len(row) for row in lists)], device="cpu")
    return torch.cat([empty, *lists]), lengths.cumsum(0)


def _special_weight(name: str, given: SpecialWeight, count: int, repeat: int) -> Tensor:
    """float64 ``[count]``: a weight for each id; a list of ``count / repeat`` weights is repeated."""
    out = host_tensor(given, torch.float64)
    if out.dim() == 0:
        return out.expand(count).contiguous()
    out = out.reshape(-1)
    if repeat > 1 and out.shape[0] * repeat == count:
        out = out.repeat(repeat)
    if out.shape[0] != count:
        raise OpError(
            f"delay_pack: {name}_weight must be one number or one for each of the {count} ids of {name}; got "
            f"{out.shape[0]}"
        )
    return out
