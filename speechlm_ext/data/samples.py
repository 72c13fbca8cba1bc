"""Samples: pairs of utterance and task, how often each is used in an epoch, and its speaker prompt.

Utterances are stored once, however many tasks use them. Everything random is a pure function of (seed, epoch, draw),
so training can start in any epoch. ``draw`` is 0 unless the plan draws an epoch again, see
:mod:`speechlm_ext.data.plan.plan`.

Speaker prompts: in each epoch the utterances of a speaker form a random ring, and each is prompted by the next. So a
prompt is never the utterance itself, every utterance serves equally often, and an epoch's total number of prompt
frames does not change. A speaker with a single utterance has no valid prompt, since a crop of the target would leak the
answer: such samples are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from speechlm_ext.data.sequence import content_columns, content_length, sequence_length, speech_modality
from speechlm_ext.data.tokens.folder import TokenCorpus
from speechlm_ext.errors import PlanError
from speechlm_ext.tasks import TaskTemplate
from speechlm_ext.utils.options import as_list

#: Samples of similar length among which a fractional factor draws its extra copies, so that their rows hardly vary.
_STRATUM = 64


@dataclass(frozen=True)
class TaskUse:
    """A task and how much of it to train."""

    task: str
    """Name of a task template, e.g. ``codec_ssl_asr``."""
    factor: float = 1.0
    """How often each sample is used in an epoch; 2.5 is twice each and a random half once more."""
    datasets: list[str] | str | None = None
    """Only utterances of this data set, or of a list of them; default all."""
    langs: list[str] | str | None = None
    """Only utterances in this language, or in a list of them; default all."""

    def __post_init__(self) -> None:
        for name in ("datasets", "langs"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, as_list(value))


@dataclass(frozen=True)
class SampleCounts:
    """Number of samples of a task, and of utterances left out, by reason."""

    task: str
    samples: int
    filtered: int
    """Outside the chosen data sets or languages."""
    lacking: int
    """Without a modality that the task needs."""
    no_prompt: int
    """Without another utterance of the same speaker to prompt with."""
    overlong: int
    """Longer than the budget and dropped on request."""


class SampleTable:
    """All samples of a training run.

    Attributes:
        task, utterance: int64 ``[n]``: index into ``templates``, and into the corpus.
        speech_lengths: int64 frames of speech of every utterance of the corpus.
        factor: float64 ``[n]`` copies per epoch.
        counts: one per task use.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        uses: Sequence[TaskUse],
        templates: Mapping[str, TaskTemplate],
        *,
        dataset_factors: Mapping[str, float] | None = None,
        seed: int = 0,
        prompt_frames: int = 500,
    ) -> None:
        """Pair tasks with utterances.

        Args:
            templates: the known task templates by name.
            dataset_factors: factor per data set, multiplied with the task's; default 1.
            prompt_frames: maximum number of frames of a speaker prompt.

        Raises:
            PlanError: an unknown task, data set or factor, a task that the layout cannot hold, or one without data.
        """
        self.corpus, self.seed, self.prompt_frames = corpus, seed, prompt_frames
        self._drawn: tuple[tuple[int, int], np.ndarray] | None = None
        self.templates = [self._template(use, templates) for use in uses]
        if not uses:
            raise PlanError(f"no task was given; name one or more of {self._feasible(templates)}.")
        if prompt_frames < 1:
            raise PlanError(f"prompt_frames must be >= 1, got {prompt_frames}.")
        per_dataset = self._dataset_factors(dataset_factors or {})
        speech = content_length(speech_modality(corpus.layout), corpus.lengths, corpus.layout)
        self.speech_lengths = speech.astype(np.int64)
        # Utterances that can prompt: with a speaker and speech, where the speaker has at least two of them.
        pool = (corpus.speaker >= 0) & (speech > 0)
        count = np.bincount(corpus.speaker[pool], minlength=1)
        self._pool = np.flatnonzero(pool & (count[np.maximum(corpus.speaker, 0)] > 1))
        promptable = np.zeros(len(corpus), bool)
        promptable[self._pool] = True
        parts, self.counts = [], []
        for number, (use, template) in enumerate(zip(uses, self.templates, strict=True)):
            wanted = self._filter(use)
            whole, prompted = wanted.copy(), np.ones(len(corpus), bool)
            for entry, _ in template.entries:
                if entry.modality == "spk":
                    prompted = promptable
                else:
                    for column in content_columns(entry.modality, corpus.layout):
                        whole &= corpus.lengths[column] > 0
            chosen = np.flatnonzero(whole & prompted)
            account = SampleCounts(
                use.task,
                len(chosen),
                int((~wanted).sum()),
                int((wanted & ~whole).sum()),
                int((whole & ~prompted).sum()),
                overlong=0,
            )
            self.counts.append(account)
            factors = use.factor * per_dataset[corpus.dataset[chosen]]
            if not (factors > 0).any():
                raise PlanError(
                    f"task {use.task!r} has no data: of {len(corpus)} utterances {account.filtered} are outside its "
                    f"data sets and languages, {account.lacking} lack a modality, {account.no_prompt} have no other "
                    f"utterance of their speaker to prompt with, and the factor of {account.samples} is 0. Leave the "
                    "task out or add data."
                )
            parts.append((np.full(len(chosen), number), chosen, factors))
        self.task, self.utterance, self.factor = (np.concatenate([p[k] for p in parts]) for k in range(3))
        self._uses_prompt = np.array([any(e.modality == "spk" for e, _ in t.entries) for t in self.templates])
        self.is_fixed = bool((self.factor == np.floor(self.factor)).all() and not self._uses_prompt.any())
        """Whether every epoch has the same samples with the same lengths."""

    def __len__(self) -> int:
        return len(self.task)

    # ---- lengths, prompts, copies -------------------------------------------------------------------------------
    def lengths(self, epoch: int, draw: int = 0) -> np.ndarray:
        """Rows of each sample in an epoch, int64 ``[n]``."""
        prompt_len = None
        if self._uses_prompt.any():
            prompt_len = np.minimum(self.speech_lengths[self.prompts(epoch, draw)], self.prompt_frames)
        return self._lengths(prompt_len)

    def max_lengths(self) -> np.ndarray:
        """Maximum number of rows of each sample over all epochs, int64 ``[n]``."""
        if not self._uses_prompt.any():
            return self._lengths(None)
        # The longest other utterance of the speaker: the longest, or the second longest for the longest itself.
        pool = self._pool[np.lexsort((self.speech_lengths[self._pool], self.corpus.speaker[self._pool]))]
        speaker = self.corpus.speaker[pool]
        last = np.flatnonzero(np.append(speaker[1:] != speaker[:-1], True))[: len(pool)]
        group = np.searchsorted(speaker[last], speaker)
        longest = np.zeros(len(self.corpus), np.int64)
        longest[pool] = self.speech_lengths[pool[last]][group]
        longest[pool[last]] = self.speech_lengths[pool[last - 1]]
        return self._lengths(np.minimum(longest, self.prompt_frames))

    def _lengths(self, prompt_len: np.ndarray | None) -> np.ndarray:
        out = np.zeros(len(self), np.int64)
        for number, template in enumerate(self.templates):
            mine = self.task == number
            at = self.utterance[mine]
            columns = {c: v[at].astype(np.int64) for c, v in self.corpus.lengths.items()}
            if prompt_len is not None:
                columns["spk"] = prompt_len[at]
            out[mine] = sequence_length(template, columns, self.corpus.layout)
        return out

    def prompts(self, epoch: int, draw: int = 0) -> np.ndarray:
        """Index of the utterance that prompts each one in an epoch, int64 over the corpus; its own where none can."""
        if self._drawn is not None and self._drawn[0] == (epoch, draw):
            return self._drawn[1]
        pool = self._pool
        rng = np.random.default_rng([self.seed, epoch, draw, 1])
        pool = pool[np.lexsort((rng.random(len(pool)), self.corpus.speaker[pool]))]
        following = np.arange(len(self.corpus))
        if len(pool):
            speaker = self.corpus.speaker[pool]
            first = np.flatnonzero(np.append(True, speaker[1:] != speaker[:-1]))
            last = np.append(first[1:], len(pool)) - 1
            following[pool[:-1]] = pool[1:]
            following[pool[last]] = pool[first]
        self._drawn = ((epoch, draw), following)
        return following

    def crop(self, sample: int, prompt: int, epoch: int, draw: int = 0) -> slice:
        """The frames of utterance ``prompt`` in the sample's prompt: up to ``prompt_frames``, from a random start."""
        spare = int(self.speech_lengths[prompt]) - self.prompt_frames
        if spare <= 0:
            return slice(0, int(self.speech_lengths[prompt]))
        start = int(np.random.default_rng([self.seed, epoch, draw, 2, sample]).integers(spare + 1))
        return slice(start, start + self.prompt_frames)

    def needs_prompt(self, sample: int) -> bool:
        """Whether the sample's task has a speaker prompt."""
        return bool(self._uses_prompt[self.task[sample]])

    def copies(self, epoch: int, draw: int = 0) -> np.ndarray:
        """How often each sample is used in an epoch, int64 ``[n]``.

        Each sample gets the factor's integer part; of the samples of a task and factor, a share equal to its fraction,
        rounded, gets one more, drawn evenly over the lengths.
        """
        whole = np.floor(self.factor).astype(np.int64)
        rng = np.random.default_rng([self.seed, epoch, draw, 3])
        typical = self._lengths(self.speech_lengths) if (self.factor != whole).any() else None
        partial = np.flatnonzero(self.factor != whole)
        for task, factor in np.unique(np.stack([self.task[partial], self.factor[partial]], axis=1), axis=0):
            assert typical is not None
            group = np.flatnonzero((self.task == task) & (self.factor == factor))
            group = group[np.argsort(typical[group], kind="stable")]
            group = group[np.lexsort((rng.random(len(group)), np.arange(len(group)) // _STRATUM))]
            share = factor - np.floor(factor)
            wanted = round(share * len(group))
            # Evenly spaced picks along the order above, from a random start.
            at = np.floor((np.arange(wanted) + rng.random()) * (len(group) / max(wanted, 1))).astype(np.int64)
            whole[group[at]] += 1
        return whole

    def name(self, sample: int) -> str:
        """A sample's utterance, data set and task, for messages."""
        utterance = self.corpus.utterance(int(self.utterance[sample]))
        task = self.templates[self.task[sample]].name
        return f"utterance {utterance['id']!r} of {utterance['dataset']!r} as {task}"

    def drop(self, keep: np.ndarray) -> None:
        """Keep only the samples of the mask ``keep``; the others count as overlong in ``counts``."""
        dropped = np.bincount(self.task[~keep], minlength=len(self.templates))
        self.counts = [
            replace(counts, samples=counts.samples - int(count), overlong=counts.overlong + int(count))
            for counts, count in zip(self.counts, dropped, strict=True)
        ]
        self.task, self.utterance, self.factor = self.task[keep], self.utterance[keep], self.factor[keep]

    # ---- checks -------------------------------------------------------------------------------------------------
    def _feasible(self, templates: Mapping[str, TaskTemplate]) -> str:
        layout = self.corpus.layout
        return ", ".join(
            t.name for t in templates.values() if all(layout.has(e.modality) for e, _ in t.entries)
        )

    def _template(self, use: TaskUse, templates: Mapping[str, TaskTemplate]) -> TaskTemplate:
        template = templates.get(use.task)
        if template is None:
            raise PlanError(
                f"task {use.task!r} is not known; this layout can hold {self._feasible(templates)}."
            )
        lacking = [e.modality for e, _ in template.entries if not self.corpus.layout.has(e.modality)]
        if lacking:
            raise PlanError(
                f"task {use.task!r} needs {' and '.join(lacking)}, which layout {self.corpus.layout} cannot hold; it "
                f"can hold {self._feasible(templates)}."
            )
        self.corpus.layout.task_id(template.name)
        if not 0 < use.factor < float("inf"):
            raise PlanError(
                f"task {use.task!r}: factor must be > 0, got {use.factor}; leave the task out instead."
            )
        return template

    def _dataset_factors(self, factors: Mapping[str, float]) -> np.ndarray:
        names = self.corpus.datasets
        for name, factor in factors.items():
            if name not in names:
                raise PlanError(f"dataset_factors names {name!r}, but the data sets are {names}.")
            if not 0 <= factor < float("inf"):
                raise PlanError(f"dataset_factors: {name!r} must be >= 0, got {factor}.")
        return np.array([float(factors.get(name, 1.0)) for name in names])

    def _filter(self, use: TaskUse) -> np.ndarray:
        keep = np.ones(len(self.corpus), bool)
        for kind, wanted, names, index in (
            ("data set", use.datasets, self.corpus.datasets, self.corpus.dataset),
            ("language", use.langs, self.corpus.langs, self.corpus.lang),
        ):
            if wanted is not None:
                unknown = [w for w in wanted if w not in names]
                if unknown:
                    raise PlanError(
                        f"task {use.task!r}: no {kind} {unknown[0]!r} in the data; there are {names}."
                    )
                keep &= np.isin(index, [names.index(w) for w in wanted])
        return keep
