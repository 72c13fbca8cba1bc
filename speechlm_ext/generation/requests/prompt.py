"""The token frames that a request becomes, and the lengths of its targets.

The frames are the beginning of the sequence that training assembles for the same content: ``[sos][task]``, each
condition as ``[marker] content`` and ``max_delay`` pad frames, then the target's marker and, for a continuation, the
beginning of its content. Frames are not delayed: the decoder places frame u of stream s in row ``u + delay[s]``. That
rule covers the ramp-in after a marker, the lagging codes at the end of a continued beginning, and any delays.

Axes: P prompt frames, T content frames, S streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from speechlm_ext.errors import ConfigError, GenerationError
from speechlm_ext.generation.requests.encode_fields import content_streams, encode_request
from speechlm_ext.generation.requests.request import GenerationRequest, check_request
from speechlm_ext.generation.requests.settings import MAX_COUNT, SamplingSettings
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.tasks import Entry, TaskTemplate, resolve_task
from speechlm_ext.tokenizers import TokenizerSet

#: More frames than any sequence has.
NO_LIMIT = MAX_COUNT
_TEXT = Entry("text", "text_bpe")


@dataclass(frozen=True)
class Segment:
    """A target to generate."""

    modality: str
    settings: SamplingSettings
    """Resolved for the modality."""
    min_new: int
    """Frames to generate before the end is allowed."""
    max_new: int
    """Frames to generate before the end is forced."""
    row_limit: int = NO_LIMIT
    """The end is also forced at this frame of the whole sequence, so that the rest fits into the context."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request as the decoder reads it; frames are in layout ids, undelayed."""

    id: str
    template: TaskTemplate
    frames_PS: np.ndarray
    """int64 ``[P, S]``, up to the first target's marker or the beginning of its content."""
    num_given: int
    """Frames of the target's content at the end of ``frames_PS``."""
    segments: tuple[Segment, ...]
    """The targets in order; the decoder emits the markers between them."""
    unconditional_PS: np.ndarray | None = None
    """``frames_PS`` without the conditions, for classifier-free guidance."""
    target_TS: np.ndarray | None = None
    """int64 ``[T, S]``: the target's content, of a request that scores it."""
    target_text: str | None = None
    """The text of ``target_TS``."""

    @property
    def modality(self) -> str:
        """Modality of the last target."""
        return self.segments[-1].modality

    @property
    def num_slots(self) -> int:
        """Rows of a batch that the request takes."""
        return 1 if self.unconditional_PS is None else 2

    def with_seed_offset(self, offset: int) -> Prompt:
        """The same prompt with ``offset`` added to its seed."""
        if offset == 0:
            return self
        segments = tuple(
            replace(s, settings=replace(s.settings, seed=(s.settings.seed + offset) % 2**63))
            for s in self.segments
        )
        return replace(self, segments=segments)


def build_prompt(request: GenerationRequest, model: SpeechLMModel) -> Prompt:
    """Check a request against the model, tokenize its fields and lay out the frames up to the first target."""
    tokenizers = require_tokenizers(model)
    template = find_task(request, model.tasks)
    check_request(request, template)
    if request.settings.best_of > 1:
        recognition_task(template, model.tasks, f"request {request.id!r}")
    layout, settings = model.layout, request.settings
    contents, prefix_TS, target_TS = encode_request(request, template, layout, tokenizers)
    start = [special_frame(layout.sos_eos_id, layout), special_frame(layout.task_id(template.name), layout)]
    conditions: list[np.ndarray] = []
    for entry, frames_TS in zip(template.conditions, contents, strict=True):
        marker = special_frame(layout.marker_id(entry.modality), layout)
        conditions += [marker, frames_TS, pad_frames(layout.max_delay, layout)]
    prefix_TS = pad_frames(0, layout) if prefix_TS is None else prefix_TS
    target = [special_frame(layout.marker_id(template.targets[0].modality), layout), prefix_TS]
    frames_PS = np.concatenate([*start, *conditions, *target])
    num_content = sum(map(len, contents)) + len(prefix_TS)
    where = f"request {request.id!r} (task {template.name})"
    lengths = settings
    if target_TS is not None:
        # The end must be neither ruled out nor forced in any frame, or its probability would be 0 or 1.
        longest = len(target_TS) + 1
        lengths = replace(settings, min_len=longest, max_len=longest, min_len_ratio=None, max_len_ratio=None)
    segments = plan_segments(lengths, template, len(frames_PS), num_content, model, where)
    if target_TS is not None:
        segments = (replace(segments[0], settings=settings.resolved(segments[0].modality), min_new=0),)
    return Prompt(
        request.id,
        template,
        frames_PS,
        len(prefix_TS),
        segments,
        unconditional_PS=np.concatenate([*start, *target]) if settings.guidance != 1.0 else None,
        target_TS=target_TS,
        target_text=request.target_text,
    )


def require_tokenizers(model: SpeechLMModel) -> TokenizerSet:
    """The model's tokenizers. Raises :class:`GenerationError` if it has none."""
    if model.tokenizers is None:
        raise GenerationError("the model has no tokenizers; load a model folder that contains tokenizers/.")
    return model.tokenizers


def find_task(request: GenerationRequest, tasks: tuple[TaskTemplate, ...]) -> TaskTemplate:
    """The trained task of a request. Raises :class:`GenerationError` if none or several match."""
    try:
        return resolve_task(request.task, tasks)
    except ConfigError as error:
        raise GenerationError(f"request {request.id!r}: {error}") from None


def recognition_task(template: TaskTemplate, tasks: Sequence[TaskTemplate], where: str) -> TaskTemplate:
    """The trained task that recognizes the speech of ``template``'s target."""
    target = template.targets[-1]
    if _TEXT not in template.conditions or target.modality not in ("codec", "codec_ssl", "ssl"):
        raise GenerationError(
            f"{where}: best_of selects among tries at speaking a text; task {template.name} does not speak one."
        )
    for task in tasks:
        if task.conditions == (target,) and task.targets == (_TEXT,):
            return task
    raise GenerationError(
        f"{where}: best_of needs a model that is trained to recognize {target.modality} speech (a task with condition "
        f"{target.field}/{target.modality} and target text/text_bpe); this one knows {[t.name for t in tasks]}."
    )


def special_frame(token_id: int, layout: TokenLayout) -> np.ndarray:
    """A frame int64 ``[1, S]`` with a special id in stream 0 and pad in the others."""
    frame = pad_frames(1, layout)
    frame[0, 0] = token_id
    return frame


def pad_frames(count: int, layout: TokenLayout) -> np.ndarray:
    """int64 ``[count, S]`` of pad."""
    return np.full((count, layout.num_streams), layout.pad_id, dtype=np.int64)


def plan_segments(
    settings: SamplingSettings,
    template: TaskTemplate,
    num_rows: int,
    num_content: int,
    model: SpeechLMModel,
    where: str,
) -> tuple[Segment, ...]:
    """The lengths of all targets, as the settings ask and so that all fit into the model's context.

    Args:
        num_rows: of the prompt.
        num_content: content frames of the prompt, the unit of ``max_len_ratio``.
    """
    layout, context = model.layout, model.max_positions
    settings.check_streams([stream.name for stream in layout.streams], where)
    shortest, longest = settings.lengths(num_content, where)
    min_rows = max(shortest, 1)
    segments: list[Segment] = []
    extra = 0  # rows that must still fit after the last frame of a target
    for target in reversed(template.targets):
        slowest = max(layout.delays[s] for s in content_streams(target.modality, layout))
        # Frame T - 1 of the slowest stream is in row T - 1 + delay; the row before is the last one fed.
        extra = max(slowest - 1, layout.delays[0], extra)
        limit = context - extra
        resolved = settings.resolved(target.modality)
        segments.append(Segment(target.modality, resolved, shortest, min(longest, limit), limit))
        extra += (
            min_rows + layout.max_delay + 2
        )  # this target's content, and the end, pad and marker before it
    segments.reverse()
    room = segments[0].row_limit - num_rows
    if room < min_rows:
        raise GenerationError(
            f"{where}: the prompt has {num_rows} rows and at least {min_rows} more must fit"
            f"{' for each target' if len(segments) > 1 else ''}, but the model's context is {context}; shorten the "
            "text or audio, or min_len."
        )
    return (replace(segments[0], max_new=min(longest, room)), *segments[1:])
