"""The pack plan: the samples of each pack in any epoch, from the lengths alone.

Every epoch has the same number of packs, so a position in training is one integer: pack p is pack ``p % P`` of epoch
``p // P``, and going to any position costs one epoch's plan. Epochs vary a little (random halves of factors, speaker
prompts), so P is the maximum over a few epochs. An epoch that needs fewer packs splits some; one that needs more is
drawn again. Both are pure functions of seed and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from speechlm_ext.data.plan.bin_packing import pack_random, pack_tight, split_to
from speechlm_ext.data.samples import SampleTable, TaskUse
from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.data.tokens.folder import TokenCorpus
from speechlm_ext.errors import PlanError
from speechlm_ext.tasks import load_tasks
from speechlm_ext.utils.text import counted

#: Epochs that are packed to find P.
_PROBES = 4
#: From this many samples in an epoch one epoch is enough to find P.
_LARGE = 50_000
#: Random draws for an epoch before giving up; the later ones also try the tighter packing.
_DRAWS = 16


@dataclass(frozen=True)
class PlanConfig:
    """Training data: token folders, tasks, and packing."""

    tokens: list[str] | str = field(default_factory=list)
    """A token folder or a list of them (the ``output_dir`` of ``speechlm tokenize``), all of one layout."""
    tasks: list[TaskUse] = field(default_factory=list)
    """Tasks with their factors and filters."""
    dataset_factors: dict[str, float] = field(default_factory=dict)
    """Factor per data set, multiplied with the task's; default 1."""
    budget: int = 8192
    """Maximum number of rows (frames of all streams together) in a pack."""
    seed: int = 0
    """Seed of order, packs, prompts and random halves."""
    prompt_frames: int = 500
    """Maximum number of frames of a speaker prompt."""
    overlong: Literal["error", "drop"] = "error"
    """Whether a sample longer than the budget is an error, or is left out and counted."""
    loss: LossWeights = field(default_factory=LossWeights)
    """Loss weight per modality, and the region with a loss."""
    task_file: str | None = None
    """YAML file with task templates of your own."""
    delays: list[int] | None = None
    """Rows by which each stream is shifted, instead of the delays in the token folders' layout: all 0 for the stream
    layouts ``parallel`` and ``multi-scale``."""


class PackPlan:
    """Packs of every epoch over a sample table; see the module's text."""

    def __init__(
        self,
        samples: SampleTable,
        seed: int = 0,
        budget: int = 8192,
        *,
        overlong: Literal["error", "drop"] = "error",
    ) -> None:
        """Check the lengths and fix the number of packs in an epoch.

        Args:
            samples: the samples; with ``overlong="drop"`` those that are too long are removed from it.
            budget: maximum number of rows in a pack.
            overlong: refuse samples longer than the budget, or drop and count them (``num_dropped``).

        Raises:
            PlanError: no sample, or a sample longer than the budget.
        """
        if budget < 1:
            raise PlanError(f"budget must be at least 1 row, got {budget}.")
        if overlong not in ("error", "drop"):
            raise PlanError(f"overlong must be 'error' or 'drop', got {overlong!r}.")
        self.seed, self.budget = seed, budget
        self._samples = samples
        longest = samples.max_lengths()
        is_overlong = longest > budget
        self.num_dropped = int(is_overlong.sum())
        if self.num_dropped and overlong == "error":
            raise PlanError(self._overlong_message(longest))
        if self.num_dropped == len(longest):
            raise PlanError(
                f"no sample is left to pack: {self.num_dropped} of {len(longest)} are longer than {budget} rows."
                if len(longest)
                else "there is no sample to pack; check the manifest, the tasks and their filters."
            )
        if self.num_dropped:
            samples.drop(~is_overlong)
        self.num_items = int(samples.copies(0).sum())
        """Samples with their repetitions in an epoch: the same number in each."""
        self.packs_per_epoch = self._count_packs()
        """P, the same in every epoch."""
        self._cache: dict[int, tuple[list[np.ndarray], int]] = {}

    def epoch_packs(self, epoch: int) -> list[np.ndarray]:
        """The packs of an epoch: for each its sample indices in order, int64."""
        return self._epoch(epoch)[0]

    def draw(self, epoch: int) -> int:
        """Number of the random draw that the epoch uses, for :class:`SampleTable`."""
        return self._epoch(epoch)[1]

    def locate(self, pack: int) -> tuple[int, int]:
        """``(epoch, index)`` of a pack counted from the start of training."""
        return divmod(pack, self.packs_per_epoch)

    def lengths(self, epoch: int) -> np.ndarray:
        """Rows of each sample in an epoch, int64."""
        return self._samples.lengths(epoch, self.draw(epoch))

    # ---- packing ------------------------------------------------------------------------------------------------
    def _epoch(self, epoch: int) -> tuple[list[np.ndarray], int]:
        if epoch not in self._cache:
            self._cache = {epoch: self._make(epoch)}
        return self._cache[epoch]

    def _count_packs(self) -> int:
        """P: the maximum over a few epochs, and a little more for epochs that were not tried."""
        if self.num_items == 0:
            raise PlanError("no sample is drawn in an epoch; all factors are too small for so few samples.")
        large = self.num_items >= _LARGE
        counts = []
        for epoch in range(1 if large else _PROBES):
            _, lengths = self._items(epoch, 0)
            counts.append(len(pack_random(lengths, self.budget, self._rng(epoch, 0))))
            if not large:
                # Best-fit decreasing is the fallback of an epoch with unlucky draws, so it must fit.
                counts.append(len(pack_tight(lengths, self.budget, self._rng(epoch, 0))))
        slack = max(counts) // 500
        return min(max(counts) + (slack if self._samples.is_fixed else max(1, slack)), self.num_items)

    def _make(self, epoch: int) -> tuple[list[np.ndarray], int]:
        for draw in range(_DRAWS):
            items, lengths = self._items(epoch, draw)
            rng = self._rng(epoch, draw)
            packs = pack_random(lengths, self.budget, rng)
            if len(packs) > self.packs_per_epoch and draw >= _DRAWS // 4:
                packs = pack_tight(lengths, self.budget, rng)
            if len(packs) > self.packs_per_epoch:
                continue
            packs = split_to(packs, self.packs_per_epoch)
            # The samples of a pack in random order, and the packs in random order.
            return [items[rng.permutation(np.array(packs[i]))] for i in rng.permutation(len(packs))], draw
        raise PlanError(
            f"epoch {epoch} needs more than the {self.packs_per_epoch} packs of an epoch in {_DRAWS} draws; choose a "
            "larger budget or whole factors."
        )

    def _rng(self, epoch: int, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, draw, 0])

    def _items(self, epoch: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """The sample index of every copy in an epoch, and its rows."""
        items = np.repeat(np.arange(len(self._samples)), self._samples.copies(epoch, draw))
        return items, self._samples.lengths(epoch, draw)[items]

    def _overlong_message(self, longest: np.ndarray) -> str:
        worst = int(longest.argmax())
        return (
            f"{self._samples.name(worst)} needs {int(longest[worst])} rows but a pack holds {self.budget} (too "
            f"long in all: {counted(self.num_dropped, 'sample')}). Raise budget to {int(longest[worst])}, cut the "
            "recordings, or leave them out with overlong: drop."
        )


def build_samples(corpus: TokenCorpus, cfg: PlanConfig) -> SampleTable:
    """The sample table of a plan config. Raises :class:`PlanError` or :class:`ConfigError`."""
    return SampleTable(
        corpus,
        cfg.tasks,
        load_tasks(cfg.task_file),
        dataset_factors=cfg.dataset_factors,
        seed=cfg.seed,
        prompt_frames=cfg.prompt_frames,
    )
