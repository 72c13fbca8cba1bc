"""`DecodeState`: sampling settings and progress of a batch of requests, on the device.

They are packed into a few tensors, so that a kernel takes few pointers and a request is moved by copying one row of
each; properties are views of single columns. `multistream_sample` reads a state and advances it by one row.

Axes: B requests, G segments of a request, S streams, C columns of logits over all streams, R forced rows, H rows of
history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe
from speechlm_ext.ops.multistream_sample.arguments import (
    find_eos_column,
    read_markers,
    scope_columns,
    spread,
)
from speechlm_ext.ops.multistream_sample.columns import Choice, Limits, Progress, Request, Sampling

__all__ = ["Choice", "DecodeState", "Limits", "Progress", "Request", "Sampling"]

_NO_LIMIT = 2**31 - 1


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
    """int64 ``[C]``: id of each column, ascending within each stream."""
    bounds: tuple[int, ...]
    """S + 1 values: stream s has columns ``bounds[s]`` to ``bounds[s + 1] - 1``."""
    delays: tuple[int, ...]
    """Rows by which each stream is shifted, S values."""
    pad_ids: tuple[int, ...]
    """Pad id of each stream, S values."""
    eos_id: int
    """End-of-segment id; sampling it in stream 0 ends the segment."""
    eos_column: int
    """Column of ``eos_id``, one of stream 0's; allowed in every segment."""
    tail: int
    """Rows of padding between a segment's end and the marker of the next one."""
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
    """int64 ``[B, R, S]``: forced ids by row of the request; -1: sample. R may be 0."""
    history: Tensor
    """int64 ``[B, H, S]``, written by each step: tokens by row of the request; rows from H on are not kept. H may be
    0."""
    history_logprob: Tensor
    """float32 ``[B, H, S]``, written by each step: log-probabilities; NaN where a stream had no content."""
    allowed: Tensor | None = None
    """bool ``[1 or B, C]``: columns that may be sampled; None allows all."""

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
        limits and markers broadcast to ``[B, G]``, the others to ``[B]``.

        Args:
            scope_ids: per stream int64 ``[V_s]``, ascending: the id of each column of that stream's logits. Stream 0's
                include ``eos_id``.
            delays, pad_ids: S values each.
            eos_id: end-of-segment id.
            scope: for each segment, per stream, the interval of ids ``(start, end)`` that may be sampled, or None for a
                stream without content; or an int tensor ``[B, G, S, 2]`` of ids, -1 for none. None: every column of
                every stream.
            num_segments: of each request, at most G; G is that of ``scope``, else 1.
            markers: id before each segment, the first one's unused.
            seed: an int gives request b the seed ``seed + b``; a tensor gives each its own, e.g. so that a request's
                tokens do not depend on its index in the batch. A random number is a function of (seed, row, stream).
            step: rows of the first segment before this state, e.g. those of its prefix.
            source, guide, guidance: see `Request` and the attribute; a request and the one that copies its tokens need
                equal settings.
            forced: int64 ``[B, R, S]``.
            num_rows: H, rows of the history.
            tail: default the largest delay.
            allowed: bool ``[1 or B, C]``.
            device: default that of ``scope_ids``.

        Raises:
            OpError: (a ValueError) settings that contradict each other or are out of range.
        """
        S, B = len(delays), batch_size
        if not (S >= 1 and len(scope_ids) == S and len(pad_ids) == S):
            raise OpError(
                f"DecodeState: delays has {S} streams, scope_ids {len(scope_ids)}, pad_ids {len(pad_ids)}"
            )
        device = scope_ids[0].device if device is None else torch.device(device)
        ids = [x.to(device, torch.int64) for x in scope_ids]
        bounds, eos_column = [0], find_eos_column(ids, eos_id)
        for x in ids:
            bounds.append(bounds[-1] + len(x))
        columns = scope_columns(ids, bounds, scope, B, S, device)
        G = columns.shape[1]
        per_stream = {
            "temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
            "top_k": top_k, "repetition_window": repetition_window,
        }  # fmt: skip
        per_segment = {
            "min_frames": min_frames, "max_frames": max_frames, "row_limit": row_limit,
            "marker": read_markers(markers, G),
        }  # fmt: skip
        per_request = {
            "seed": torch.arange(B) + seed if isinstance(seed, int) else seed, "num_segments": num_segments,
            "source": torch.arange(B) if source is None else source, "guide": -1 if guide is None else guide,
            "guidance": guidance, "step": step,
            "segment": 0, "row": 0, "finish": -1, "done": 0, "failed": 0, "arrived": 0,
        }  # fmt: skip
        x = {}
        for settings, shape in ((per_stream, (B, G, S)), (per_segment, (B, G)), (per_request, (B,))):
            for name, value in settings.items():
                x[name] = spread(name, value, shape, device)
        x["first_column"], x["end_column"] = columns.to(torch.int32).unbind(dim=-1)

        def packed(enum: type[IntEnum]) -> Tensor:
            return torch.stack([x[column.name.lower()] for column in enum], dim=-1)

        state = cls(
            column_ids=torch.cat(ids),
            bounds=tuple(bounds),
            delays=tuple(int(d) for d in delays),
            pad_ids=tuple(int(p) for p in pad_ids),
            eos_id=int(eos_id),
            eos_column=eos_column,
            tail=max(delays) if tail is None else int(tail),
            sampling=packed(Sampling),
            choice=packed(Choice),
            limits=packed(Limits),
            request=packed(Request),
            guidance=x["guidance"].contiguous(),
            progress=packed(Progress),
            forced=(torch.empty(B, 0, S) if forced is None else forced).to(device, torch.int64).contiguous(),
            history=torch.zeros(B, num_rows, S, dtype=torch.int64, device=device),
            history_logprob=torch.full((B, num_rows, S), torch.nan, device=device),
            allowed=None if allowed is None else allowed.to(device).contiguous(),
        )
        state._check()
        return state

    def _check(self) -> None:
        """Check all values, once, on the host; a step checks only shapes."""
        self._check_settings()
        (B, S), C, G = (self.batch_size, self.num_streams), self.column_ids.shape[0], self.limits.shape[1]
        if min(self.delays) < 0:
            raise OpError(f"DecodeState: delays must be 0 or more; got {list(self.delays)}")
        if self.tail < max(self.delays):
            raise OpError(f"DecodeState: tail must be at least {max(self.delays)}; got {self.tail}")
        used = torch.arange(G, device=self.choice.device)[None] < self.num_segments[:, None]
        if not bool((self.end_column[..., 0] > self.first_column[..., 0])[used].all()):
            raise OpError("DecodeState: stream 0 must have content in every segment: it ends the segment")
        if self.forced.dim() != 3 or self.forced.shape[0] != B or self.forced.shape[2] != S:
            raise OpError(f"DecodeState: forced must be int64 [{B}, R, {S}]; got {list(self.forced.shape)}")
        window = int(self.repetition_window.max()) if self.choice.numel() else 0
        if window > 0 and self.history.shape[1] == 0:
            raise OpError(
                f"DecodeState: repetition_window {window} needs the history; set num_rows to the largest row number"
            )
        if self.allowed is not None and (
            self.allowed.dtype != torch.bool or tuple(self.allowed.shape) not in ((1, C), (B, C))
        ):
            raise OpError(f"DecodeState: allowed must be bool [1 or {B}, {C}]; got {describe(self.allowed)}")

    def _check_settings(self) -> None:
        """Check the settings that are numbers."""
        finite, penalty, G = torch.isfinite, self.repetition_penalty, self.limits.shape[1]
        for name, good, wanted in (
            ("temperature", (self.temperature >= 0) & finite(self.temperature), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p > 0, "above 0 (1 is off)"),
            ("min_p", (self.min_p >= 0) & (self.min_p <= 1), "from 0 (off) to 1"),
            ("repetition_penalty", (penalty > 0) & finite(penalty), "above 0 (1 is off)"),
            ("repetition_window", self.repetition_window >= 0, "0 (off) or more rows"),
            ("guidance", finite(self.guidance), "a finite number"),
            ("num_segments", (self.num_segments >= 1) & (self.num_segments <= G), f"from 1 to {G}"),
            ("guide", self.guide >= -1, "-1 or a row of the logits"),
            ("source", self.source >= 0, "a row of the logits"),
            ("min_frames", self.min_frames <= self.max_frames, "at most max_frames"),
        ):
            if not bool(good.all()):
                bad = getattr(self, name)[~good].flatten()[0].item()
                raise OpError(f"DecodeState: {name} must be {wanted}; got {bad}")

    @property
    def batch_size(self) -> int:
        """B."""
        return self.progress.shape[0]

    @property
    def num_streams(self) -> int:
        """S."""
        return len(self.delays)

    def select(self, rows: Tensor) -> DecodeState:
        """A copy of the requests ``rows``, with unchanged ``source`` and ``guide``."""
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
