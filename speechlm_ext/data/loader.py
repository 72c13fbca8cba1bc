"""The training loader: an endless stream of packed batches whose whole state is one integer.

Pack p holds the same samples whatever the number of ranks. With W ranks, global step g consumes packs g W to
(g + 1) W - 1 and rank r takes the r-th of them. So ``packs_consumed`` (over all ranks) is the whole position in the
data, and a run resumes exactly, at once, and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from speechlm_ext.data.batch import Sample, SequencePacker
from speechlm_ext.data.plan.plan import PackPlan, PlanConfig, build_samples
from speechlm_ext.data.samples import SampleTable, TaskUse
from speechlm_ext.data.sequence import LossWeights, content_ids, speech_modality
from speechlm_ext.data.tokens.folder import Tokens, open_tokens
from speechlm_ext.errors import ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops import PackedBatch
from speechlm_ext.tasks import TaskTemplate
from speechlm_ext.utils.files.io import sha256_json

if TYPE_CHECKING:
    from speechlm_ext.tokenizers import TokenizerSet


@dataclass(frozen=True)
class SampleInfo:
    """Origin of one sequence of a batch."""

    id: str
    """Of the utterance."""
    task: str
    rows: int
    prompt: str | None
    """Id of the utterance that serves as speaker prompt."""


class PackLoader:
    """Endless iterator over this rank's packed batches; see the module's text."""

    def __init__(
        self,
        cfg: PlanConfig,
        tokens: Tokens | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        packs_consumed: int = 0,
    ) -> None:
        """Open the data and make the plan.

        Args:
            cfg: token folders, tasks, budget, seed and loss weights.
            tokens: folders instead of ``cfg.tokens``, opened or by path.
            rank, world: this process, and the number of processes.
            packs_consumed: starting position: packs consumed by all ranks together.

        Raises:
            PlanError, ShardError, LayoutMismatchError, ConfigError: the data or the settings are impossible.
        """
        if world < 1 or not 0 <= rank < world:
            raise ConfigError(f"rank must be in [0, world), got rank {rank} of {world}.")
        self.corpus = open_tokens(tokens if tokens is not None else cfg.tokens, cfg.delays)
        self.layout: TokenLayout = self.corpus.layout
        self.samples: SampleTable = build_samples(self.corpus, cfg)
        self.plan = PackPlan(self.samples, cfg.seed, cfg.budget, overlong=cfg.overlong)
        self.cfg, self.rank, self.world = cfg, rank, world
        self._packer = SequencePacker(self.layout, cfg.loss)
        self.packs_consumed = packs_consumed

    @property
    def packs_consumed(self) -> int:
        """Packs consumed by all ranks together: the loader's whole state. Assign it to move to any position."""
        return self._consumed

    @packs_consumed.setter
    def packs_consumed(self, value: int) -> None:
        if value < 0:
            raise ConfigError(f"packs_consumed must be >= 0, got {value}.")
        self._consumed = int(value)

    @property
    def packs_per_epoch(self) -> int:
        """Packs in an epoch, over all ranks."""
        return self.plan.packs_per_epoch

    @property
    def tasks(self) -> list[TaskTemplate]:
        """The templates of the trained tasks, each once."""
        return list({t.name: t for t in self.samples.templates}.values())

    @property
    def max_length(self) -> int:
        """Maximum number of rows of a sample over all epochs."""
        return int(self.samples.max_lengths().max())

    @cached_property
    def tokenizers(self) -> TokenizerSet | None:
        """The tokenizers that made the tokens, from the first folder; None where it holds none."""
        from speechlm_ext.tokenizers import TokenizerSet

        folder = self.corpus.folders[0].path / "tokenizers"
        return TokenizerSet.load(folder) if folder.is_dir() else None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that determines the samples of each pack; the folders' paths do not matter."""
        settings = asdict(self.cfg)
        for name in ("tokens", "loss", "task_file", "delays"):  # the layout has the delays
            del settings[name]
        content = {
            "layout": self.layout.sha256,
            "shards": [[s["sha256"] for s in f.index["shards"]] for f in self.corpus.folders],
            "templates": [asdict(t) for t in self.samples.templates],
            "settings": settings,
            "version": 1,
        }
        return sha256_json(content)

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        batch = self.load(self._consumed + self.rank)
        self._consumed += self.world
        return batch

    def load(self, pack: int) -> PackedBatch:
        """Make the batch of a pack counted from the start of training, whatever the state."""
        epoch, index = self.plan.locate(pack)
        draw = self.plan.draw(epoch)
        return self._packer.pack(
            [read_sample(self.samples, int(i), epoch, draw) for i in self.plan.epoch_packs(epoch)[index]]
        )

    def describe(self, pack: int) -> list[SampleInfo]:
        """The samples of a pack, in their order."""
        epoch, index = self.plan.locate(pack)
        lengths, draw = self.plan.lengths(epoch), self.plan.draw(epoch)
        out = []
        for i in self.plan.epoch_packs(epoch)[index].tolist():
            utterance = int(self.samples.utterance[i])
            prompt = None
            if self.samples.needs_prompt(i):
                prompt = self.corpus.utterance(int(self.samples.prompts(epoch, draw)[utterance]))["id"]
            template = self.samples.templates[self.samples.task[i]]
            out.append(
                SampleInfo(self.corpus.utterance(utterance)["id"], template.name, int(lengths[i]), prompt)
            )
        return out


@dataclass(frozen=True)
class EvalBatch:
    """Whole samples for evaluation, one per segment."""

    batch: PackedBatch
    ids: list[str]
    """Utterance id of each segment."""
    utterances: list[dict[str, Any]]
    """The stored data of each (see :meth:`TokenFolder.utterance`)."""


def iter_eval(
    task: str | TaskUse,
    tokens: Tokens,
    *,
    budget: int = 8192,
    loss: LossWeights | None = None,
    seed: int = 0,
    prompt_frames: int = 500,
    task_file: str | None = None,
    limit: int | None = None,
) -> Iterator[EvalBatch]:
    """Every sample of a task once, in the data's order, whole and with its id.

    A batch takes samples as long as they fit into ``budget`` rows; a longer one is a batch of its own, so nothing is
    left out. Speaker prompts are those of epoch 0.

    Args:
        task: name of a task, or a :class:`TaskUse` with filters (its factor is ignored).
        tokens: token folders of the split.
        limit: maximum number of samples.

    Raises:
        PlanError: the task has no data here.
    """
    use = replace(task, factor=1.0) if isinstance(task, TaskUse) else TaskUse(task)
    cfg = PlanConfig(tasks=[use], seed=seed, prompt_frames=prompt_frames, task_file=task_file)
    corpus = open_tokens(tokens)
    samples = build_samples(corpus, cfg)
    lengths = samples.lengths(0)
    weights = loss or LossWeights()
    group: list[int] = []
    rows = 0
    for i in range(len(samples) if limit is None else min(limit, len(samples))):
        if group and rows + lengths[i] > budget:
            yield _eval_batch(samples, group, weights)
            group, rows = [], 0
        group.append(i)
        rows += int(lengths[i])
    if group:
        yield _eval_batch(samples, group, weights)


def _eval_batch(samples: SampleTable, group: list[int], weights: LossWeights) -> EvalBatch:
    found = [read_sample(samples, i, epoch=0, draw=0) for i in group]
    utterances = [dict(sample.utterance) for sample in found]
    batch = SequencePacker(samples.corpus.layout, weights).pack(found)
    return EvalBatch(batch, [u["id"] for u in utterances], utterances)


def read_sample(samples: SampleTable, sample: int, epoch: int, draw: int) -> Sample:
    """A sample with its data and its speaker prompt in an epoch."""
    corpus = samples.corpus
    number = int(samples.utterance[sample])
    prompt = None
    if samples.needs_prompt(sample):
        other = int(samples.prompts(epoch, draw)[number])
        frames = content_ids(speech_modality(corpus.layout), corpus.utterance(other), corpus.layout, None)
        prompt = frames[samples.crop(sample, other, epoch, draw)]
    return Sample(samples.templates[samples.task[sample]], corpus.utterance(number), prompt)
