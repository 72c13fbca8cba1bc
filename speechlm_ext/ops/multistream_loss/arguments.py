"""Checks of the arguments of multistream_loss and multistream_logprobs, and the layout of separate heads."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe, partition_hint
from speechlm_ext.ops.multistream_loss.rows import LossRows, pack
from speechlm_ext.ops.multistream_loss.scopes import (
    GivenScopes,
    Interval,
    flatten,
    local_targets,
    read_scopes,
)
from speechlm_ext.ops.multistream_loss.types import LossInputs, sum_dtype

Heads = Literal["shared", "separate"]
_MAX_STREAMS = 64
_OP = "multistream_loss"


def separate_head_rows(scopes: GivenScopes | Sequence[GivenScopes]) -> int:
    """Rows of the weight that ``heads="separate"`` needs for ``scopes`` (one set, or one for each kind of row).

    Raises:
        OpError: (a ValueError) scopes that are empty, overlap or are no lists of intervals.
    """
    return read_scopes(_sets(scopes), None, True)[1]


def head_rows(scopes: GivenScopes | Sequence[GivenScopes], stream: int, start: int, end: int) -> slice | None:
    """With separate heads, the weight's rows of ids start to end - 1 in a stream; None if it has none for them."""
    for kind in read_scopes(_sets(scopes), None, True)[0]:
        for interval in kind[stream]:
            if interval.start <= start and end <= interval.end:
                return slice(interval.row + start - interval.start, interval.row + end - interval.start)
    return None


def _sets(scopes: GivenScopes | Sequence[GivenScopes]) -> Sequence[GivenScopes]:
    """Scopes as a list of sets, one for each kind of row."""
    try:
        innermost = next(scope[0][0] for scope in scopes if len(scope))
        sets: Sequence[GivenScopes] = scopes if isinstance(innermost, Sequence) else [scopes]  # type: ignore
        return [[[_interval(*pair) for pair in scope] for scope in kind] for kind in sets]
    except (IndexError, StopIteration, TypeError):
        raise OpError(
            f"{_OP}: scopes must hold, for each stream, a list of intervals (start, end), or with row_scope "
            f"a list of such scopes; got {scopes!r}"
        ) from None


def _interval(start: int, end: int) -> tuple[int, int]:
    return operator.index(start), operator.index(end)


def read_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    *,
    scopes: GivenScopes | Sequence[GivenScopes],
    row_scope: Tensor | None,
    heads: str,
    stream_embed: Tensor | None,
    bias: Tensor | None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    rows: LossRows | None = None,
) -> LossInputs:
    """Check all arguments but the values in tensors (see `check_values`), and give them their dtypes."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise OpError(f"{_OP}: hidden must be float [N, D]; got {describe(hidden)}")
    num_rows, width = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != width or not weight.is_floating_point():
        raise OpError(
            f"{_OP}: weight must be float [V, {width}] to fit hidden; got {describe(weight)}{partition_hint(weight)}"
        )
    sets = _sets(scopes)
    num_streams = len(sets[0])
    if num_streams > _MAX_STREAMS:
        raise OpError(f"{_OP}: at most {_MAX_STREAMS} streams; got scopes of {num_streams}")
    if tuple(targets.shape) != (num_rows, num_streams) or targets.dtype not in (torch.int32, torch.int64):
        raise OpError(
            f"{_OP}: targets must be int32 or int64 [{num_rows}, {num_streams}] (hidden's rows, one column per scope); "
            f"got {describe(targets)}"
        )
    if loss_weight.shape != targets.shape or not loss_weight.is_floating_point():
        raise OpError(
            f"{_OP}: loss_weight must be float {list(targets.shape)} like targets; got {describe(loss_weight)}"
        )
    if heads not in ("shared", "separate"):
        raise OpError(f'{_OP}: heads must be "shared" or "separate"; got {heads!r}')
    merged, num_weights = read_scopes(
        sets, None if heads == "separate" else weight.shape[0], heads == "separate"
    )
    if heads == "separate" and num_weights != weight.shape[0]:
        raise OpError(
            f"{_OP}: weight must have {num_weights} rows, one for each id of each stream's scope; got {weight.shape[0]}"
        )
    if row_scope is None and len(sets) > 1:
        raise OpError(f"{_OP}: scopes has {len(sets)} kinds of rows; row_scope [N] must give each row's kind")
    if row_scope is not None and (
        tuple(row_scope.shape) != (num_rows,) or row_scope.dtype not in (torch.int32, torch.int64)
    ):
        raise OpError(f"{_OP}: row_scope must be int32 or int64 [{num_rows}]; got {describe(row_scope)}")
    if stream_embed is not None and tuple(stream_embed.shape) not in (
        (num_streams, width),
        (num_streams - 1, width),
    ):
        raise OpError(
            f"{_OP}: stream_embed must be [{num_streams}, {width}], or [{num_streams - 1}, {width}] where stream 0 has "
            f"no vector; got {describe(stream_embed)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise OpError(f"{_OP}: bias must be [{weight.shape[0]}]; got {describe(bias)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise OpError(f"{_OP}: softcap must be above 0 and finite; got {softcap}")
    if not 0 <= z_loss < math.inf:
        raise OpError(f"{_OP}: z_loss must be 0 or more and finite; got {z_loss}")
    if not 0 <= label_smoothing < 1:
        raise OpError(f"{_OP}: label_smoothing must be in [0, 1); got {label_smoothing}")
    flat = flatten(merged)
    if rows is not None:
        rows.check(targets, flat)
    loss_weight = loss_weight.detach().to(sum_dtype(hidden.dtype))
    return LossInputs(
        hidden=hidden,
        weight=weight,
        targets=targets.to(torch.int64),
        live=loss_weight > 0,
        coef_loss=loss_weight,
        scopes=flat,
        row_scope=None if row_scope is None else row_scope.to(torch.int64),
        stream_embed=stream_embed,
        bias=bias,
        z_loss=float(z_loss),
        label_smoothing=float(label_smoothing),
        softcap=float(softcap or 0),
        rows=None if rows is None else rows.index,
        row_counts=[] if rows is None else list(rows.counts),
        narrow=_is_autocast(hidden),
    )


def _is_autocast(hidden: Tensor) -> bool:
    """Whether F.linear would round its float32 factors to bfloat16 here."""
    device = hidden.device.type
    return (
        hidden.dtype in (torch.float32, torch.bfloat16)
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == torch.bfloat16
    )


def plan_loss_rows(
    loss_weight: Tensor,
    *,
    scopes: GivenScopes | Sequence[GivenScopes],
    row_scope: Tensor | None = None,
    heads: Heads = "shared",
) -> LossRows:
    """The rows that `multistream_loss` computes, from a batch that is still on the CPU.

    With them the op waits for no GPU, and a captured CUDA graph leaves out rows without a target.

    Args:
        loss_weight: float ``[N, S]`` on the CPU; may be a mask.
        scopes, row_scope, heads: of the call that gets the rows.

    Returns:
        `LossRows`, to be moved to the batch's device with ``rows.to(device)``.

    Raises:
        OpError: (a ValueError) tensors that are not on the CPU or do not fit ``scopes``.
    """
    sets = _sets(scopes)
    num_streams = len(sets[0])
    if loss_weight.dim() != 2 or loss_weight.shape[1] != num_streams or loss_weight.device.type != "cpu":
        raise OpError(
            f"plan_loss_rows: loss_weight must be [N, {num_streams}] on the CPU; got {describe(loss_weight)}"
        )
    if (row_scope is None) != (len(sets) == 1) or (
        row_scope is not None
        and (row_scope.shape != loss_weight.shape[:1] or row_scope.device != loss_weight.device)
    ):
        raise OpError(
            f"plan_loss_rows: {len(sets)} kinds of rows need a row_scope [{loss_weight.shape[0]}] on the CPU "
            f"(one kind: None); got {describe(row_scope)}"
        )
    merged, _ = read_scopes(sets, None, heads == "separate")
    index, counts = pack(merged, loss_weight > 0, row_scope)
    return LossRows(index, counts, loss_weight.shape[0], tuple(flatten(merged)))


def read_chunk_bytes(chunk_bytes: int | None) -> int:
    """0 for None, the device's default."""
    if chunk_bytes is not None and not (isinstance(chunk_bytes, int) and chunk_bytes > 0):
        raise OpError(f"{_OP}: chunk_bytes must be an int above 0; got {chunk_bytes!r}")
    return chunk_bytes or 0


def check_values(inputs: LossInputs) -> None:
    """Check the weights, row_scope and live targets; on a GPU this synchronizes once."""
    targets, weight, row_scope, sets = inputs.targets, inputs.coef_loss, inputs.row_scope, inputs.sets
    bad_weight = ~((weight >= 0) & weight.isfinite())
    found = [bad_weight.any()]
    if row_scope is not None:
        unknown = (row_scope < 0) | (row_scope >= len(sets))
        found.append(unknown.any())
    outside: list[tuple[int, tuple[Interval, ...], Tensor]] = []
    for kind, scopes in enumerate(sets):
        live = inputs.live_of(kind)
        for s, scope in enumerate(scopes):
            outside.append((s, scope, live[:, s] & (local_targets(targets[:, s], scope) < 0)))
            found.append(outside[-1][2].any())
    if not bool(torch.stack(found).any()):  # the only synchronization
        return
    if bool(found[0]):
        n, s = bad_weight.nonzero()[0].tolist()
        raise OpError(
            f"{_OP}: loss_weight[{n}, {s}] is {float(weight[n, s])}; weights must be finite and >= 0"
        )
    if row_scope is not None and bool(found[1]):
        n = int(unknown.nonzero()[0])
        raise OpError(
            f"{_OP}: row_scope[{n}] is {int(row_scope[n])}; it must be 0 to {len(sets) - 1}, an index into scopes"
        )
    for s, scope, bad in outside:
        if bool(bad.any()):
            n = int(bad.nonzero()[0])
            raise OpError(
                f"{_OP}: targets[{n}, {s}] (row {n}, stream {s}) is id {int(targets[n, s])}, outside the stream's "
                f"scope {[(i.start, i.end) for i in scope]}, with weight {float(weight[n, s])}. Give it weight 0 or "
                "widen the scope"
            )
