"""Arguments of `DecodeState.new`, as tensors of the state's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError

#: Dtypes of the settings that are not int64.
_DTYPES = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "guidance"), torch.float32),
    **dict.fromkeys(("top_k", "repetition_window"), torch.int32),
}


def spread(name: str, value: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A setting as a tensor of ``shape``."""
    dtype = _DTYPES.get(name, torch.int64)
    try:
        tensor = torch.as_tensor(value, dtype=dtype, device=device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise OpError(f"DecodeState: {name} {error}") from None
    try:
        return tensor.expand(*shape)
    except RuntimeError:
        raise OpError(
            f"DecodeState: {name} got shape {list(tensor.shape)}, which does not broadcast to {list(shape)}"
        ) from None


def find_eos_column(ids: list[Tensor], eos_id: int) -> int:
    """The column of ``eos_id``, after a check of all streams' ids."""
    for s, x in enumerate(ids):
        if x.dim() != 1 or len(x) == 0 or not bool((x[1:] > x[:-1]).all()):
            raise OpError(
                f"DecodeState: scope_ids[{s}] must be ids [V_s] in ascending order, at least one; got {list(x.shape)}"
            )
    is_eos = (ids[0] == eos_id).nonzero()
    if len(is_eos) != 1:
        raise OpError(f"DecodeState: eos_id {eos_id} is not among scope_ids[0]; no request could ever end")
    return int(is_eos)


def read_markers(markers: Sequence[int] | Tensor, num_segments: int) -> Tensor:
    """int64, one marker per segment; 0 for a single segment without one."""
    out = torch.as_tensor(markers, dtype=torch.int64)
    if out.numel():
        return out
    if num_segments != 1:
        raise OpError(f"DecodeState: {num_segments} segments need markers, one each")
    return torch.zeros(1, dtype=torch.int64)


def scope_columns(
    ids: list[Tensor], bounds: list[int], scope: Any, B: int, S: int, device: torch.device
) -> Tensor:
    """int64 ``[B, G, S, 2]``: the scope's intervals of ids as intervals of columns."""
    if scope is None:
        return torch.tensor([bounds[:-1], bounds[1:]], device=device).T.expand(B, 1, S, 2)
    if isinstance(scope, Tensor):
        wanted = scope.to(device, torch.int64)
    elif isinstance(scope, Sequence) and len(scope) > 0 and all(len(segment) == S for segment in scope):
        wanted = torch.tensor([[(-1, -1) if r is None else r for r in seg] for seg in scope], device=device)
    else:
        raise OpError(f"DecodeState: scope must have a list of {S} (start, end) or None for each segment")
    if wanted.dim() == 3:
        wanted = wanted[None]
    if wanted.dim() != 4 or wanted.shape[0] not in (1, B) or tuple(wanted.shape[2:]) != (S, 2):
        raise OpError(f"DecodeState: scope must be [B, G, {S}, 2]; got {list(wanted.shape)}")
    wanted = wanted.expand(B, *wanted.shape[1:])
    out = []
    for s, x in enumerate(ids):
        start, end = wanted[..., s, 0].contiguous(), wanted[..., s, 1].contiguous()
        run = bounds[s] + torch.stack([torch.searchsorted(x, start), torch.searchsorted(x, end)], dim=-1)
        out.append(torch.where((end > start)[..., None], run, torch.zeros_like(run)))
    return torch.stack(out, dim=2)
