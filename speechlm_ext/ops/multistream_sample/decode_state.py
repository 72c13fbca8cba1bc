"""`DecodeState`: where each request of a batch stands in its segments, and how it samples; all of it on the device.

What does not change from step to step is packed into a few tensors, so that a kernel gets few pointers and a request
is moved by copying one row of each; the names below are views of them. `multistream_sample` reads a state and moves it
past the row that it sampled.

Axes: B requests, G segments of a request, S streams, C columns of logits over all streams, R forced rows, H rows kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import check, describe

_NO_LIMIT = 2**31 - 1


class Sampling(IntEnum):
    """Columns of `DecodeState.sampling`."""

    TEMPERATURE = 0
    """0: greedy."""
    TOP_P = 1
    """1: off."""
    MIN_P = 2
    """Relative to the most probable token (Nguyen et al. 2024); 0: off."""
    REPETITION_PENALTY = 3
    """Divides positive and multiplies negative logits of recent ids (Keskar et al. 2019); 1: off."""


class Choice(IntEnum):
    """Columns of `DecodeState.choice`."""

    FIRST_COLUMN = 0
    """First column that the stream may sample."""
    END_COLUMN = 1
    """End of its columns, exclusive; equal to the first: the stream is padding."""
    TOP_K = 2
    """0: off."""
    REPETITION_WINDOW = 3
    """Rows of the stream whose ids the repetition penalty applies to."""


class Limits(IntEnum):
    """Columns of `DecodeState.limits`."""

    MIN_FRAMES = 0
    """Content frames before the segment may end."""
    MAX_FRAMES = 1
    """Content frames after which its end is forced."""
    ROW_LIMIT = 2
    """Row of the request at which its end is forced, if that comes first."""
    MARKER = 3
    """Id in stream 0 before the segment; unused for the first one, whose marker ends the prompt."""


class Request(IntEnum):
    """Columns of `DecodeState.request`."""

    SEED = 0
    NUM_SEGMENTS = 1
    SOURCE = 2
    """Row of the logits to sample from: the request's own, unless it copies another request's tokens."""
    GUIDE = 3
    """Row of the unconditional logits for classifier-free guidance, or -1."""


class Progress(IntEnum):
    """Columns of `DecodeState.progress`."""

    SEGMENT = 0
    """Index of stream 0's current segment."""
    STEP = 1
    """Rows sampled since the segment's frame 0 in a stream without delay."""
    ROW = 2
    """Rows sampled since the request's first row."""
    FINISH = 3
    """Content frames of the segment once its end is sampled, else -1."""
    DONE = 4
    """1 if the request is complete, else 0."""
    FAILED = 5
    """1 if it failed (see `SampledStep.failed`), else 0."""
    ARRIVED = 6
    """Counter by which a GPU's thread blocks find the last of them; 0 between steps."""


def _view(packed: str, column: IntEnum, doc: str) -> property:
    """A view of one column of a packed tensor; writing into it changes the state."""
    return property(lambda state: getattr(state, packed)[..., column], doc=doc)


@dataclass(eq=False)
class DecodeState:
    """Sampling settings and progress of B requests on one device. Make one with :meth:`new`.

    Settings are per segment: per stream the columns that may be sampled, how a token is chosen among them, and the
    segment's length limits. The segment that a request is in decides which apply.
    """

    column_ids: Tensor
    """int64 ``[C]``: the id of each column, ascending within each stream."""
    bounds: tuple[int, ...]
    """S + 1 values: stream s owns columns ``bounds[s]`` to ``bounds[s + 1]``."""
    delays: tuple[int, ...]
    """Rows by which each stream is shifted, S values."""
    pad_ids: tuple[int, ...]
    """Fill of each stream, S values."""
    eos_id: int
    """Ends a segment when stream 0 says it."""
    eos_column: int
    """Its column, one of stream 0's; it may be sampled in every segment."""
    tail: int
    """Fill frames between a segment's end and the marker of the next one."""
    sampling: Tensor
    """float32 ``[B, G, S, 4]``, columns `Sampling`."""
    choice: Tensor
    """int32 ``[B, G, S, 4]``, columns `Choice`."""
    limits: Tensor
    """int64 ``[B, G, 4]``, columns `Limits`."""
    request: Tensor
    """int64 ``[B, 4]``, columns `Request`."""
    guidance: Tensor
    """float32 ``[B]``: logits become ``u + guidance * (c - u)`` where there is a guide u."""
    progress: Tensor
    """int64 ``[B, 7]``, columns `Progress`; written by each step."""
    forced: Tensor
    """int64 ``[B, R, S]``: ids that are given, by row of the request; -1: to be sampled. R may be 0."""
    history: Tensor
    """int64 ``[B, H, S]``, written by each step: the row of tokens, by row of the request; rows from H on are lost. H
    may be 0."""
    history_logprob: Tensor
    """float32 ``[B, H, S]``, written by each step: log-probabilities, NaN where a stream had no content."""
    allowed: Tensor | None = None
    """bool ``[1 or B, C]``: columns that may be sampled at all; None allows all."""

    @classmethod
    def new(
        cls,
        batch_size: int,
        *,
        scope_ids: Sequence[Tensor],
        delays: Sequence[int],
        pad_ids: Sequence[int],
        eos_id: int,
        scope: Sequence[Sequence[tuple[int, int] | None]] | Tensor | None = None,
        num_segments: int | Tensor = 1,
        markers: Sequence[int] | Tensor = (),
        temperature: float | Sequence[float] | Tensor = 1.0,
        top_k: int | Sequence[int] | Tensor = 0,
        top_p: float | Sequence[float] | Tensor = 1.0,
        min_p: float | Sequence[float] | Tensor = 0.0,
        repetition_penalty: float | Sequence[float] | Tensor = 1.0,
        repetition_window: int | Sequence[int] | Tensor = 0,
        seed: int | Tensor = 0,
        min_frames: int | Tensor = 0,
        max_frames: int | Tensor = _NO_LIMIT,
        row_limit: int | Tensor = _NO_LIMIT,
        step: int | Tensor = 0,
        source: Tensor | None = None,
        guide: Tensor | None = None,
        guidance: float | Tensor = 1.0,
        forced: Tensor | None = None,
        num_rows: int = 0,
        tail: int | None = None,
        allowed: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> DecodeState:
        """A state before its first row.

        Sampling settings are one value, one per stream (a list of S), or any tensor that broadcasts to ``[B, G, S]``;
        limits and markers broadcast to ``[B, G]``, the rest to ``[B]``.

        Args:
            scope_ids: per stream int64 ``[V_s]``, ascending: the id of each column of that stream's logits. Stream 0's
                include ``eos_id``.
            delays, pad_ids: S values each.
            eos_id: ends a segment.
            scope: for each segment, per stream, the run of ids ``(start, end)`` that may be sampled, or None for a
                stream without content; or an int tensor ``[B, G, S, 2]`` of ids, -1 for none. None: every column of
                every stream.
            num_segments: of each request, at most G; G is what ``scope`` has, else 1.
            markers: id before each segment, the first one's unused.
            seed: an int gives request b the seed ``seed + b``; a tensor chooses them, e.g. so that a request's tokens
                do not depend on its place in the batch. A random number is a function of (seed, row, stream) alone.
            step: rows of the first segment that are past, e.g. those of a given beginning.
            source, guide, guidance: see the attributes; a followed request and its follower get equal settings.
            forced: int64 ``[B, R, S]``.
            num_rows: H, rows of the history.
            tail: default the largest delay.
            allowed: bool ``[1 or B, C]``.
            device: default that of ``scope_ids``.

        Raises:
            OpError: (a ValueError) settings that contradict each other or are out of range.
        """
        S, B = len(delays), batch_size
        check(
            S >= 1 and len(scope_ids) == S and len(pad_ids) == S,
            f"DecodeState: delays has {S} streams, scope_ids {len(scope_ids)}, pad_ids {len(pad_ids)}",
        )
        device = scope_ids[0].device if device is None else torch.device(device)
        ids = [x.to(device, torch.int64) for x in scope_ids]
        for s, x in enumerate(ids):
            check(
                x.dim() == 1 and len(x) > 0 and bool((x[1:] > x[:-1]).all()),
                f"DecodeState: scope_ids[{s}] must be ids [V_s] in ascending order, at least one; got {list(x.shape)}",
            )
        is_eos = (ids[0] == eos_id).nonzero()
        check(
            len(is_eos) == 1,
            f"DecodeState: eos_id {eos_id} is not among scope_ids[0]; no request could ever end",
        )
        bounds = [0]
        for x in ids:
            bounds.append(bounds[-1] + len(x))
        columns = _columns(ids, bounds, scope, B, S, device)
        G = columns.shape[1]

        def spread(value: object, dtype: torch.dtype, *shape: int) -> Tensor:
            tensor = torch.as_tensor(value, dtype=dtype, device=device)
            try:
                return tensor.expand(*shape)
            except RuntimeError:
                raise ValueError(
                    f"got shape {list(tensor.shape)}, which does not broadcast to {list(shape)}"
                ) from None

        f, i, n = torch.float32, torch.int32, torch.int64
        settings = {
            "temperature": (temperature, f, (B, G, S)), "top_p": (top_p, f, (B, G, S)), "min_p": (min_p, f, (B, G, S)),
            "repetition_penalty": (repetition_penalty, f, (B, G, S)), "top_k": (top_k, i, (B, G, S)),
            "repetition_window": (repetition_window, i, (B, G, S)), "min_frames": (min_frames, n, (B, G)),
            "max_frames": (max_frames, n, (B, G)), "row_limit": (row_limit, n, (B, G)),
            "marker": (_markers(markers, G), n, (B, G)), "num_segments": (num_segments, n, (B,)),
            "seed": (torch.arange(B) + seed if isinstance(seed, int) else seed, n, (B,)),
            "source": (torch.arange(B) if source is None else source, n, (B,)),
            "guide": (-1 if guide is None else guide, n, (B,)), "guidance": (guidance, f, (B,)),
            "step": (step, n, (B,)),
        }  # fmt: skip
        x = {}
        for name, (value, dtype, shape) in settings.items():
            try:
                x[name] = spread(value, dtype, *shape)
            except (ValueError, TypeError, RuntimeError) as error:
                check(False, f"DecodeState: {name} {error}")
        x["first_column"], x["end_column"] = columns[..., 0], columns[..., 1]
        zero = torch.zeros(B, dtype=n, device=device)
        x |= {"segment": zero, "row": zero, "finish": zero - 1, "done": zero, "failed": zero, "arrived": zero}
        state = cls(
            column_ids=torch.cat(ids),
            bounds=tuple(bounds),
            delays=tuple(int(d) for d in delays),
            pad_ids=tuple(int(p) for p in pad_ids),
            eos_id=int(eos_id),
            eos_column=int(is_eos),
            tail=max(delays) if tail is None else int(tail),
            sampling=torch.stack([x[c.name.lower()] for c in Sampling], dim=-1).contiguous(),
            choice=torch.stack([x[c.name.lower()].to(i) for c in Choice], dim=-1).contiguous(),
            limits=torch.stack([x[c.name.lower()] for c in Limits], dim=-1).contiguous(),
            request=torch.stack([x[c.name.lower()] for c in Request], dim=-1).contiguous(),
            guidance=x["guidance"].contiguous(),
            progress=torch.stack([x[c.name.lower()] for c in Progress], dim=-1).contiguous(),
            forced=(torch.empty(B, 0, S) if forced is None else forced).to(device, n).contiguous(),
            history=torch.zeros(B, num_rows, S, dtype=n, device=device),
            history_logprob=torch.full((B, num_rows, S), torch.nan, device=device),
            allowed=None if allowed is None else allowed.to(device).contiguous(),
        )
        state._check()
        return state

    def _check(self) -> None:
        """The values, once, on the host; a step checks shapes alone."""
        (B, S), C = (self.batch_size, self.num_streams), self.column_ids.shape[0]

        def require(name: str, good: Tensor, wanted: str) -> None:
            if not bool(good.all()):
                bad = getattr(self, name)[~good].flatten()[0].item()
                check(False, f"DecodeState: {name} must be {wanted}; got {bad}")

        finite = torch.isfinite
        require("temperature", (self.temperature >= 0) & finite(self.temperature), "0 (greedy) or more")
        require("top_k", self.top_k >= 0, "0 (off) or more")
        require("top_p", self.top_p > 0, "above 0 (1 is off)")
        require("min_p", (self.min_p >= 0) & (self.min_p <= 1), "from 0 (off) to 1")
        penalty = self.repetition_penalty
        require("repetition_penalty", (penalty > 0) & finite(penalty), "above 0 (1 is off)")
        require("repetition_window", self.repetition_window >= 0, "0 (off) or more rows")
        require("guidance", finite(self.guidance), "a finite number")
        G = self.limits.shape[1]
        require("num_segments", (self.num_segments >= 1) & (self.num_segments <= G), f"from 1 to {G}")
        require("guide", (self.guide >= -1), "-1 or a row of the logits")
        require("source", (self.source >= 0), "a row of the logits")
        require("min_frames", self.min_frames <= self.max_frames, "at most max_frames")
        check(min(self.delays) >= 0, f"DecodeState: delays must be 0 or more; got {list(self.delays)}")
        check(
            self.tail >= max(self.delays),
            f"DecodeState: tail must be at least {max(self.delays)}; got {self.tail}",
        )
        used = torch.arange(G, device=self.choice.device)[None] < self.num_segments[:, None]
        check(
            bool((self.end_column[..., 0] > self.first_column[..., 0])[used].all()),
            "DecodeState: stream 0 must have content in every segment: it says where the segment ends",
        )
        check(
            self.forced.dim() == 3 and self.forced.shape[0] == B and self.forced.shape[2] == S,
            f"DecodeState: forced must be int64 [{B}, R, {S}]; got {list(self.forced.shape)}",
        )
        window = int(self.repetition_window.max()) if self.choice.numel() else 0
        check(
            window == 0 or self.history.shape[1] > 0,
            f"DecodeState: repetition_window {window} needs the rows said so far; set num_rows to as many as may come",
        )
        if self.allowed is not None:
            check(
                self.allowed.dtype == torch.bool and tuple(self.allowed.shape) in ((1, C), (B, C)),
                f"DecodeState: allowed must be bool [1 or {B}, {C}]; got {describe(self.allowed)}",
            )

    @property
    def batch_size(self) -> int:
        """B."""
        return self.progress.shape[0]

    @property
    def num_streams(self) -> int:
        """S."""
        return len(self.delays)

    def select(self, rows: Tensor) -> DecodeState:
        """The state of some of the requests, as a copy. ``source`` and ``guide`` are kept as they are."""
        names = ("sampling", "choice", "limits", "request", "guidance", "progress", "forced", "history")
        parts = {name: getattr(self, name)[rows] for name in (*names, "history_logprob")}
        if self.allowed is not None and self.allowed.shape[0] == self.batch_size:
            parts["allowed"] = self.allowed[rows]
        return dataclasses.replace(self, **parts)

    # Views of single columns; writing into one changes the state.
    temperature = _view("sampling", Sampling.TEMPERATURE, "float32 [B, G, S].")
    top_p = _view("sampling", Sampling.TOP_P, "float32 [B, G, S].")
    min_p = _view("sampling", Sampling.MIN_P, "float32 [B, G, S].")
    repetition_penalty = _view("sampling", Sampling.REPETITION_PENALTY, "float32 [B, G, S].")
    first_column = _view("choice", Choice.FIRST_COLUMN, "int32 [B, G, S], first column of the scope.")
    end_column = _view("choice", Choice.END_COLUMN, "int32 [B, G, S], end of the scope, exclusive.")
    top_k = _view("choice", Choice.TOP_K, "int32 [B, G, S].")
    repetition_window = _view("choice", Choice.REPETITION_WINDOW, "int32 [B, G, S].")
    min_frames = _view("limits", Limits.MIN_FRAMES, "int64 [B, G].")
    max_frames = _view("limits", Limits.MAX_FRAMES, "int64 [B, G].")
    row_limit = _view("limits", Limits.ROW_LIMIT, "int64 [B, G].")
    marker = _view("limits", Limits.MARKER, "int64 [B, G].")
    seed = _view("request", Request.SEED, "int64 [B].")
    num_segments = _view("request", Request.NUM_SEGMENTS, "int64 [B].")
    source = _view("request", Request.SOURCE, "int64 [B], row of the logits to sample from.")
    guide = _view("request", Request.GUIDE, "int64 [B], row of the unconditional logits, or -1.")
    segment = _view("progress", Progress.SEGMENT, "int64 [B], index of stream 0's current segment.")
    step = _view("progress", Progress.STEP, "int64 [B], rows sampled since the segment's frame 0.")
    row = _view("progress", Progress.ROW, "int64 [B], rows sampled since the request's first row.")
    finish = _view("progress", Progress.FINISH, "int64 [B], frames of an ended segment, else -1.")
    done = _view("progress", Progress.DONE, "int64 [B], 1 if the request is complete, else 0.")

    @property
    def is_done(self) -> Tensor:
        """bool ``[B]``: the request is complete."""
        return self.done != 0

    @property
    def failed(self) -> Tensor:
        """bool ``[B]``: see `SampledStep.failed`."""
        return self.progress[:, Progress.FAILED] != 0


def _markers(markers: Sequence[int] | Tensor, num_segments: int) -> Tensor:
    given = torch.as_tensor(markers, dtype=torch.int64)
    if given.numel() == 0:
        check(num_segments == 1, f"DecodeState: {num_segments} segments need markers, one each")
        return torch.zeros(1, dtype=torch.int64)
    return given


def _columns(
    ids: list[Tensor], bounds: list[int], scope: Any, B: int, S: int, device: torch.device
) -> Tensor:
    """int64 ``[B, G, S, 2]``: the runs of ids as runs of columns."""
    if scope is None:
        runs = torch.tensor([bounds[:-1], bounds[1:]], device=device).T
        return runs.expand(B, 1, S, 2)
    if isinstance(scope, Tensor):
        wanted = scope.to(device, torch.int64)
    else:
        check(
            isinstance(scope, Sequence) and all(len(segment) == S for segment in scope) and len(scope) > 0,
            f"DecodeState: scope must have a list of {S} (start, end) or None for each segment",
        )
        wanted = torch.tensor([[(-1, -1) if r is None else r for r in seg] for seg in scope], device=device)
    if wanted.dim() == 3:
        wanted = wanted[None]
    check(
        wanted.dim() == 4 and wanted.shape[0] in (1, B) and tuple(wanted.shape[2:]) == (S, 2),
        f"DecodeState: scope must be [B, G, {S}, 2]; got {list(wanted.shape)}",
    )
    wanted = wanted.expand(B, *wanted.shape[1:])
    out = []
    for s, x in enumerate(ids):
        start, end = wanted[..., s, 0].contiguous(), wanted[..., s, 1].contiguous()
        run = bounds[s] + torch.stack([torch.searchsorted(x, start), torch.searchsorted(x, end)], dim=-1)
        out.append(torch.where((end > start)[..., None], run, torch.zeros_like(run)))
    return torch.stack(out, dim=2)
