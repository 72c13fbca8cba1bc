"""What multistream_loss and multistream_logprobs check before they compute, and the layout of separate heads."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, check, describe, partition_hint
from speechlm_ext.ops.multistream_loss.scopes import GivenScopes, flatten, read_scopes

Heads = Literal["shared", "separate"]
_MOST_STREAMS = 64


def separate_head_rows(scopes: GivenScopes | Sequence[GivenScopes]) -> int:
    """Rows of the weight that ``heads="separate"`` needs for ``scopes`` (one set, or one for each kind of row)."""
    return read_scopes(_sets(scopes), None, True)[1]


def head_rows(scopes: GivenScopes | Sequence[GivenScopes], stream: int, start: int, end: int) -> slice | None:
    """With separate heads, the weight's rows of ids start to end - 1 in a stream; None where it has none for them."""
    for kind in read_scopes(_sets(scopes), None, True)[0]:
        for interval in kind[stream]:
            if interval.start <= start and end <= interval.end:
                return slice(interval.row + start - interval.start, interval.row + end - interval.start)
    return None


def _sets(scopes: GivenScopes | Sequence[GivenScopes]) -> Sequence[GivenScopes]:
    """Scopes of one kind of row as the list of one."""
    try:
        innermost = next(scope[0][0] for scope in scopes if len(scope))
        sets: Sequence[GivenScopes] = scopes if isinstance(innermost, Sequence) else [scopes]  # type: ignore
        return [[[_interval(*pair) for pair in scope] for scope in kind] for kind in sets]
    except (IndexError, StopIteration, TypeError):
        raise OpError(
            "multistream_loss: scopes must hold, for each stream, a list of intervals (start, end), or with row_scope "
            f"a list of such scopes; got {scopes!r}"
        ) from None


def _interval(start: int, end: int) -> tuple[int, int]:
    return operator.index(start), operator.index(end)


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    scopes: GivenScopes | Sequence[GivenScopes],
    row_scope: Tensor | None,
    heads: str,
    stream_embed: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> list[int]:
    """Checks shapes and gives the scopes as the op takes them."""
    op = "multistream_loss"
    check(
        hidden.dim() == 2 and hidden.is_floating_point(),
        lambda: f"{op}: hidden must be float [N, D]; got {describe(hidden)}",
    )
    num_rows, width = hidden.shape
    check(
        weight.dim() == 2 and weight.shape[1] == width and weight.is_floating_point(),
        lambda: (
            f"{op}: weight must be float [V, {width}] to fit hidden; got {describe(weight)}{partition_hint(weight)}"
        ),
    )
    given, vocab = _sets(scopes), weight.shape[0]
    num_streams = len(given[0])
    check(
        num_streams <= _MOST_STREAMS,
        lambda: f"{op}: at most {_MOST_STREAMS} streams; got scopes of {num_streams}",
    )
    check(
        tuple(targets.shape) == (num_rows, num_streams) and targets.dtype in (torch.int32, torch.int64),
        lambda: (
            f"{op}: targets must be int32 or int64 [{num_rows}, {num_streams}] (hidden's rows, one column per scope); "
            f"got {describe(targets)}"
        ),
    )
    check(
        loss_weight.shape == targets.shape and loss_weight.is_floating_point(),
        lambda: (
            f"{op}: loss_weight must be float {list(targets.shape)} like targets; got {describe(loss_weight)}"
        ),
    )
    check(
        heads in ("shared", "separate"), lambda: f'{op}: heads must be "shared" or "separate"; got {heads!r}'
    )
    separate = heads == "separate"
    sets, rows = read_scopes(given, None if separate else vocab, separate)
    check(
        not separate or rows == vocab,
        lambda: f"{op}: weight must have {rows} rows, one for each id of each stream's scope; got {vocab}",
    )
    if row_scope is None:
        check(
            len(sets) == 1,
            lambda: f"{op}: {len(sets)} kinds of rows have scopes; row_scope [N] must say which is which",
        )
    else:
        check(
            tuple(row_scope.shape) == (num_rows,) and row_scope.dtype in (torch.int32, torch.int64),
            lambda: f"{op}: row_scope must be int32 or int64 [{num_rows}]; got {describe(row_scope)}",
        )
    if stream_embed is not None:
        check(
            tuple(stream_embed.shape) == (num_streams, width),
            lambda: f"{op}: stream_embed must be [{num_streams}, {width}]; got {describe(stream_embed)}",
        )
    if bias is not None:
        check(tuple(bias.shape) == (vocab,), lambda: f"{op}: bias must be [{vocab}]; got {describe(bias)}")
    check(
        softcap is None or 0 < softcap < math.inf,
        lambda: f"{op}: softcap must be above 0 and finite; got {softcap}",
    )
    return flatten(sets)
