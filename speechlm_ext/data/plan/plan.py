"""The pack plan: which samples stand together in which pack, for any epoch, from the lengths alone.

Every epoch has the same number of packs, so a position in training is one integer: pack p is pack ``p % P`` of epoch
``p // P``, and going to any position costs one epoch's plan. What an epoch holds varies a little (random halves of
factors, speaker prompts), so P is what a few probed epochs need at most, and an epoch that needs fewer splits some
packs; one that would need more throws its dice again. Both are pure functions of seed and epoch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from speechlm_ext.data.plan.bin_packing import pack_random, pack_tight, split_to
from speechlm_ext.data.samples import SampleTable, TaskUse
from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.data.tokens.folder import TokenCorpus
from speechlm_ext.errors import PlanError
from speechlm_ext.tasks import load_tasks

#: Epochs that are packed to find P, unless an epoch has so many samples that one says it all.
_PROBES = 4
_LARGE = 50_000
#: Throws of the dice for an epoch before giving up; the later ones also try the tighter packing.
_DRAWS = 16


@dataclass(frozen=True)
class PlanConfig:
    """What is trained on, and how it is packed."""

    tokens: list[str] | str = field(default_factory=list)
    """A token folder or a list of them (the ``output_dir`` of ``speechlm tokenize``), all of one layout."""
    tasks: list[TaskUse] = field(default_factory=list)
    """Tasks with their factors and filters."""
    dataset_factors: dict[str, float] = field(default_factory=dict)
    """Factor per data set, multiplied with the task's; default 1."""
    budget: int = 8192
    """Most rows (frames of all streams together) in a pack."""
    seed: int = 0
    """Decides order, packs, prompts and random halves."""
    prompt_frames: int = 500
    """Most frames of a speaker prompt."""
    overlong: Literal["error", "drop"] = "error"
    """What to do about a sample longer than the budget: stop, or leave it out and count it."""
    loss: LossWeights = field(default_factory=LossWeights)
    """Loss weight per modality, and which region is learnt."""
    task_file: str | None = None
    """YAML file with task templates of your own."""
    delays: list[int] | None = None
    """Rows by which each stream is shifted, instead of the delays in the token folders' layout: all 0 for the stream
    layouts ``parallel`` and ``multi-scale``."""


class PackPlan:
    """Packs of every epoch over a sample table; see the module's text."""

    def __init__(
        self,
        samples: SampleTable | np.ndarray,
        seed: int = 0,
        budget: int = 8192,
        *,
        overlong: Literal["error", "drop"] = "error",
    ) -> None:
        """Check the lengths and fix the number of packs in an epoch.

        Args:
            samples: a sample table, or plain lengths int ``[n]`` with every sample used once.
            budget: most rows in a pack.
            overlong: refuse samples longer than the budget, or drop them (``num_dropped`` says how many).

        Raises:
            PlanError: no sample, a length below 1, or a sample longer than the budget.
        """
        if budget < 1:
            raise PlanError(f"budget must be at least 1 row, got {budget}.")
        if overlong not in ("error", "drop"):
            raise PlanError(f"overlong must be 'error' or 'drop', got {overlong!r}.")
        self.seed, self.budget = seed, budget
        self._samples = samples
        longest = samples.max_lengths() if isinstance(samples, SampleTable) else np.asarray(samples, np.int64)
        if len(longest) and longest.min() < 1:
            raise PlanError(
                f"sample {int(longest.argmin())} has length {int(longest.min())}; lengths must be >= 1."
            )
        over = longest > budget
        self.num_dropped = int(over.sum())
        if self.num_dropped and overlong == "error":
            raise PlanError(self._overlong_message(longest, over))
        if isinstance(samples, SampleTable) and self.num_dropped:
            samples.drop(~over)
        self._plain = None if isinstance(samples, SampleTable) else longest
        self._usable = np.flatnonzero(~over)
        if self.num_dropped == len(longest):
            raise PlanError(
                f"no sample is left to pack: {self.num_dropped} of {len(longest)} are longer than {budget} rows."
                if len(longest)
                else "there is no sample to pack; check the manifest, the tasks and their filters."
            )
        self.packs_per_epoch = self._count_packs()
        """P, the same in every epoch."""
        self._cache: dict[int, tuple[list[np.ndarray], int]] = {}
        self._lock = threading.Lock()

    def epoch_packs(self, epoch: int) -> list[np.ndarray]:
        """The packs of an epoch: for each the sample indices, int64, in the order in which they stand in it."""
        return self._epoch(epoch)[0]

    def draw(self, epoch: int) -> int:
        """Which throw of the dice the epoch uses, for :class:`SampleTable`."""
        return self._epoch(epoch)[1]

    def locate(self, pack: int) -> tuple[int, int]:
        """``(epoch, index)`` of a pack counted from the beginning of training."""
        return divmod(pack, self.packs_per_epoch)

    def pack(self, pack: int) -> np.ndarray:
        """Sample indices of a pack counted from the beginning of training."""
        epoch, index = self.locate(pack)
        return self.epoch_packs(epoch)[index]

    def lengths(self, epoch: int) -> np.ndarray:
        """Rows of each sample in an epoch, int64."""
        if isinstance(self._samples, SampleTable):
            return self._samples.lengths(epoch, self.draw(epoch))
        assert self._plain is not None
        return self._plain

    # ---- how ----------------------------------------------------------------------------------------------------
    def _epoch(self, epoch: int) -> tuple[list[np.ndarray], int]:
        with self._lock:
            if epoch not in self._cache:
                while len(self._cache) > 1:
                    # Ranks and workers stand near each other, so the present epoch and its neighbour are enough.
                    self._cache.pop(min(self._cache))
                self._cache[epoch] = self._make(epoch)
            return self._cache[epoch]

    def _count_packs(self) -> int:
        """P: the most that a few epochs need, and a little more where the data is large enough not to mind."""
        if self._size_of_epoch() == 0:
            raise PlanError("no sample is drawn in an epoch; all factors are too small for so few samples.")
        large = self._size_of_epoch() >= _LARGE
        counts = []
        for epoch in range(1 if large else _PROBES):
            _, lengths = self._items(epoch, 0)
            counts.append(len(pack_random(lengths, self.budget, self._rng(epoch, 0))))
            if not large:
                # Longest first is the way out of an epoch whose throws are unlucky, so it must fit.
                counts.append(len(pack_tight(lengths, self.budget, self._rng(epoch, 0))))
        fixed = not isinstance(self._samples, SampleTable) or self._samples.is_fixed
        slack = max(counts) // 500 if fixed else max(1, max(counts) // 500)
        return min(max(counts) + slack, self._size_of_epoch())

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

    def _size_of_epoch(self) -> int:
        """Copies of samples in an epoch: the same in each."""
        return (
            int(self._samples.copies(0).sum())
            if isinstance(self._samples, SampleTable)
            else len(self._usable)
        )

    def _items(self, epoch: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """The sample of every copy in an epoch, and its rows."""
        if isinstance(self._samples, SampleTable):
            items = np.repeat(np.arange(len(self._samples)), self._samples.copies(epoch, draw))
            return items, self._samples.lengths(epoch, draw)[items]
        assert self._plain is not None
        return self._usable, self._plain[self._usable]

    def _overlong_message(self, longest: np.ndarray, over: np.ndarray) -> str:
        worst = int(longest.argmax())
        name = f"sample {worst}"
        if isinstance(self._samples, SampleTable):
            table = self._samples
            utterance = table.corpus.utterance(int(table.utterance[worst]))
            task = table.templates[table.task[worst]].name
            name = f"utterance {utterance['id']!r} of {utterance['dataset']!r} as {task}"
        more = int(over.sum()) - 1
        return (
            f"{name} needs {int(longest[worst])} rows but a pack holds {self.budget}; "
            f"{more} more sample{' is' if more == 1 else 's are'} too long. Raise budget to {int(longest[worst])}, cut "
            "the recordings, or leave them out with overlong: drop."
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
