"""From the tokens of utterances to a packed, delayed batch, in one call of `delay_pack`: a sample's conditions and
targets are segments, the special tokens around them prefixes and suffixes, and the sample is their group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from speechlm_ext.data.sequence import LossWeights, content_ids
from speechlm_ext.errors import ShardError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops import OpError, PackedBatch, delay_pack
from speechlm_ext.tasks import TaskTemplate


@dataclass(frozen=True)
class Sample:
    """One utterance in one task."""

    template: TaskTemplate
    utterance: Mapping[str, Any]
    """Raw int ids ``[T, C]`` under ``text_bpe``, ``ssl``, ``codec``; ``id`` for messages."""
    prompt: np.ndarray | None = None
    """Raw speech frames ``[T, C]`` of another utterance for ``spk`` (SSL first where the layout has it)."""


@dataclass(frozen=True)
class _Rule:
    """Everything constant for content of one modality."""

    marker: int
    id_offsets: np.ndarray
    num_ids: np.ndarray
    weights: np.ndarray
    end_weight: float


class SequencePacker:
    """Writes samples as training sequences (see `speechlm_ext.data.sequence`), delayed and packed."""

    def __init__(self, layout: TokenLayout, weights: LossWeights | None = None) -> None:
        """Args:
        layout: the id intervals and the streams' delays.
        weights: loss weight per modality, and the region with a loss.
        """
        self.layout = layout
        self.weights = weights or LossWeights()
        self._rules: dict[str, _Rule] = {}

    def pack(self, samples: Sequence[Sample]) -> PackedBatch:
        """One sequence per sample.

        Returns:
            int64 ids and labels ``[N, S]`` in layout ids, with weight 0 outside the loss. The first row of a sequence
            is never a label.

        Raises:
            ShardError: an utterance lacks a modality, has another number of streams, or ids outside their interval.
            LayoutError: the layout cannot hold a modality of a task, or a speaker prompt is missing.
        """
        layout, special = self.layout, self.weights.special
        condition_weight = special * (self.weights.region == "all")
        segments, names, rules, has_loss, groups = [], [], [], [], [0]
        prefix, prefix_weight, prefix_offsets = [], [], [0]
        suffix, suffix_weight, suffix_offsets = [], [], [0]
        for sample in samples:
            prefix += [layout.sos_eos_id, layout.task_id(sample.template.name)]
            prefix_weight += [0.0, condition_weight]
            for entry, is_target in sample.template.entries:
                rule = self._rule(entry.modality)
                raw_TC = content_ids(entry.modality, sample.utterance, layout, sample.prompt)
                segments.append(torch.from_numpy(raw_TC if raw_TC.flags.writeable else raw_TC.copy()))
                names.append((sample.utterance.get("id", "?"), entry.modality))
                rules.append(rule)
                has_loss.append(is_target or self.weights.region == "all")
                prefix.append(rule.marker)
                prefix_weight.append(condition_weight)
                prefix_offsets.append(len(prefix))
                if is_target:
                    suffix.append(layout.sos_eos_id)
                    suffix_weight.append(rule.end_weight)
                suffix_offsets.append(len(suffix))
            groups.append(len(segments))
        S = layout.num_streams
        if len({segment.dtype for segment in segments}) > 1:
            segments = [segment.long() for segment in segments]
        weights_nS = np.stack(
            [r.weights * flag for r, flag in zip(rules, has_loss, strict=True)] or [np.zeros((0, S))]
        )
        arguments: dict[str, Any] = dict(
            delays=layout.delays,
            pad_ids=[layout.pad_id] * S,
            id_offsets=torch.from_numpy(np.array([r.id_offsets for r in rules])),
            num_ids=torch.from_numpy(np.array([r.num_ids for r in rules])),
            segment_weight=torch.from_numpy(weights_nS),
            prefix=(torch.tensor(prefix), torch.tensor(prefix_offsets)),
            suffix=(torch.tensor(suffix, dtype=torch.int64), torch.tensor(suffix_offsets)),
            prefix_weight=prefix_weight,
            suffix_weight=suffix_weight,
            groups=groups,
            dtype=torch.int64,
        )
        try:
            return delay_pack(segments, **arguments)
        except OpError as error:
            self._name_bad_utterance(segments, names, rules, error)
            raise

    def _rule(self, modality: str) -> _Rule:
        rule = self._rules.get(modality)
        if rule is None:
            layout = self.layout
            spans = [span or (0, 0) for span in layout.content_ranges(modality)]
            rule = self._rules[modality] = _Rule(
                layout.marker_id(modality),
                np.array([start for start, _ in spans], np.int64),
                np.array([end - start for start, end in spans], np.int64),
                self.weights.of_streams(modality, layout),
                self.weights.of_end(modality, layout),
            )
        return rule

    @staticmethod
    def _name_bad_utterance(
        segments: Sequence[torch.Tensor],
        names: Sequence[tuple[str, str]],
        rules: Sequence[_Rule],
        error: OpError,
    ) -> None:
        """Raise the op's error with the name of the utterance instead of a segment's number."""
        for segment, (name, modality), rule in zip(segments, names, rules, strict=True):
            for stream in range(segment.shape[1] if len(segment) else 0):
                low, high = (int(v) for v in segment[:, stream].aminmax())
                if low < 0 or high >= rule.num_ids[stream]:
                    raise ShardError(
                        f"utterance {name!r}: {modality} ids of stream {stream} must be in "
                        f"[0, {rule.num_ids[stream]}), got {low} to {high}; the tokens were made with other tokenizers."
                    ) from error
