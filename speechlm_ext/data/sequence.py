"""The training sequence of a sample: its parts, lengths, ids and loss weights.

``[sos][task]``, then for each condition and target ``[marker] content [eos if target]`` and ``max_delay`` pad
frames, into which delayed streams extend. A special token is in stream 0, with pad in the others. Raw id r of a stream
becomes ``start + r`` of that stream's interval, so code 0 is a real code and never pad. Each token has a loss weight;
0 means that it is a condition.

`speechlm_ext.data.batch` writes such sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from speechlm_ext.errors import ConfigError, LayoutError, ShardError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tasks import TaskTemplate

#: A count of frames, or an array of counts: lengths of many utterances are computed at once.
Lengths = TypeVar("Lengths", int, np.ndarray)


@dataclass(frozen=True)
class LossWeights:
    """Weight of each kind of token in the loss."""

    text: float = 1.0
    """Weight of a text token (and of a g2p token)."""
    ssl: float = 0.5
    """Weight of an SSL unit."""
    codec: float = 0.5
    """Weight of a frame's codec codes together; each of K codebooks gets 1/K of it (0.0625 each for 8)."""
    special: float = 1.0
    """Factor of special tokens with a loss: the end of a target counts ``special`` times a frame of that target (a text
    token, a speech frame with all its streams); with ``region: all`` markers and task count ``special`` each."""
    region: Literal["target", "all"] = "target"
    """Region with a loss: ``target`` is the targets only, ``all`` includes the conditions."""

    def __post_init__(self) -> None:
        for name in ("text", "ssl", "codec", "special"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"loss weight {name!r} must be a number >= 0, got {value!r}.")
        if self.region not in ("target", "all"):
            raise ConfigError(f"loss region must be 'target' or 'all', got {self.region!r}.")

    def of_streams(self, modality: str, layout: TokenLayout) -> np.ndarray:
        """Weight of one frame of ``modality`` content in each stream, float32 ``[S]``; 0 where the stream is pad."""
        kinds = content_kinds(modality, layout)
        return np.array([0 if kind is None else self.of_kind(kind, layout) for kind in kinds], np.float32)

    def of_end(self, modality: str, layout: TokenLayout) -> float:
        """Weight of the token that ends a target: that of one frame of it, so that stopping is learned as well as
        content, whatever the weights of the modalities."""
        return self.special * float(self.of_streams(modality, layout).sum())

    def of_kind(self, kind: str, layout: TokenLayout) -> float:
        """Weight of one token of a kind: ``text``, ``ssl`` or ``codec``."""
        return self.codec / layout.num_codebooks if kind == "codec" else float(getattr(self, kind))


def content_kinds(modality: str, layout: TokenLayout) -> list[str | None]:
    """Per stream the kind of its ids in ``modality`` content: text, ssl or codec; None where it is pad."""
    names = {(i.start, i.end): i.name.rstrip("0123456789") for i in layout.intervals}
    kinds = {"codec": "codec", "ssl": "ssl"}
    ranges = layout.content_ranges(modality)
    return [None if span is None else kinds.get(names[span], "text") for span in ranges]


def speech_modality(layout: TokenLayout) -> str:
    """The modality of recordings, and so of speaker prompts: codec_ssl if the layout has SSL units, else codec."""
    return "codec_ssl" if layout.has("codec_ssl") else "codec"


def content_columns(modality: str, layout: TokenLayout) -> tuple[str, ...]:
    """The stored token columns (of ``text_bpe``, ``ssl``, ``codec``) that make up ``modality`` content."""
    if modality == "spk":
        modality = speech_modality(layout)
    return ("ssl", "codec") if modality == "codec_ssl" else (modality,)


def content_length(modality: str, lengths: Mapping[str, Lengths], layout: TokenLayout) -> Lengths:
    """Frames of ``modality`` content; codec_ssl is as long as the shorter of its two.

    Args:
        lengths: frames (an int, or an int array over utterances) per column ``text_bpe``, ``ssl``, ``codec``, and
            ``spk`` for the speaker prompt.
    """
    if modality == "spk":
        return lengths["spk"]
    columns = content_columns(modality, layout)
    out = lengths[columns[0]]
    for column in columns[1:]:
        out = np.minimum(out, lengths[column]) if isinstance(out, np.ndarray) else min(out, lengths[column])
    return out


def sequence_length(template: TaskTemplate, lengths: Mapping[str, Lengths], layout: TokenLayout) -> Lengths:
    """Rows of a sample's sequence, exactly.

    Args:
        template: the task.
        lengths: frames per stored column, see :func:`content_length`; arrays give an array.
        layout: for the number of pad frames after each part.

    Returns:
        Number of frames T, an int or an int array as in ``lengths``.
    """
    total = 2 + len(template.entries) * (1 + layout.max_delay) + len(template.targets)
    parts = [content_length(entry.modality, lengths, layout) for entry, _ in template.entries]
    return sum(parts[1:], parts[0] + total)


def content_ids(
    modality: str, utterance: Mapping[str, Any], layout: TokenLayout, prompt: np.ndarray | None
) -> np.ndarray:
    """Raw ids int32 or int64 ``[T, C]`` of one part, a column for each stream that it fills.

    Args:
        utterance: raw int ids ``[T, C]`` under ``text_bpe``, ``ssl``, ``codec``; ``id`` for messages.
        prompt: raw speech frames ``[T, C]`` of another utterance for ``spk`` (SSL first where the layout has it).

    Raises:
        ShardError: the utterance lacks the modality, or has another number of streams.
        LayoutError: there is no speaker prompt.
    """
    where = f"utterance {utterance.get('id', '?')!r}"
    if modality == "spk":
        if prompt is None:
            raise LayoutError(f"{where}: the task needs a speaker prompt and none was given.")
        columns = [prompt]
    else:
        columns = [utterance.get(name) for name in content_columns(modality, layout)]
        if any(c is None for c in columns):
            raise ShardError(
                f"{where} has no {modality} tokens; tokenize its audio and text, or leave the task out."
            )
    columns = [np.asarray(c) for c in columns]
    columns = [c[:, None] if c.ndim == 1 else c for c in columns]
    shortest = min(len(c) for c in columns)
    raw_TC = columns[0] if len(columns) == 1 else np.concatenate([c[:shortest] for c in columns], axis=1)
    width = sum(span is not None for span in layout.content_ranges(modality))
    if raw_TC.shape[1] != width:
        raise ShardError(
            f"{where}: {modality} content has {raw_TC.shape[1]} streams but layout {layout} has {width} for it; "
            "the tokens were made with other tokenizers."
        )
    return raw_TC if raw_TC.dtype in (np.int32, np.int64) else raw_TC.astype(np.int64)
