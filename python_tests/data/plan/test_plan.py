"""The pack plan: nothing lost, nothing over the budget, the same for the same seed, O(1) to any epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.data.conftest import MakeFolder, random_rows
from speechlm_ext.data.plan.bin_packing import pack_random, pack_tight, split_to
from speechlm_ext.data.plan.plan import PackPlan, PlanConfig, build_samples
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.tokens.folder import TokenCorpus
from speechlm_ext.errors import PlanError


def speech_like(count: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.exp(np.random.default_rng(seed).normal(6.3, 0.6, count)), 105, 1560).astype(np.int64)


class PlainSamples:
    """Samples of given lengths, each used once: the part of a ``SampleTable`` that a plan reads."""

    is_fixed = True

    def __init__(self, lengths: Sequence[int] | np.ndarray) -> None:
        self.values = np.asarray(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.values)

    def max_lengths(self) -> np.ndarray:
        return self.values

    def lengths(self, epoch: int, draw: int) -> np.ndarray:
        return self.values

    def copies(self, epoch: int, draw: int = 0) -> np.ndarray:
        return np.ones(len(self), np.int64)

    def name(self, sample: int) -> str:
        return f"sample {sample}"

    def drop(self, keep: np.ndarray) -> None:
        self.values = self.values[keep]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 130), min_size=1, max_size=80),
    st.integers(0, 2**31),
    st.sampled_from([130, 131, 192, 300, 1000]),
)
def test_packing_loses_nothing_and_keeps_to_the_budget(lengths: list[int], seed: int, budget: int) -> None:
    plan = PackPlan(PlainSamples(lengths), seed, budget)
    for epoch in (0, 1, 7):
        packs = plan.epoch_packs(epoch)
        assert len(packs) == plan.packs_per_epoch
        assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
        for pack in packs:
            assert 0 < sum(lengths[i] for i in pack) <= budget
    again = PackPlan(PlainSamples(lengths), seed, budget)
    assert all(np.array_equal(a, b) for a, b in zip(again.epoch_packs(7), plan.epoch_packs(7), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(200, 260))
def test_best_fit_takes_the_tightest_pack(lengths: list[int], budget: int) -> None:
    """The bucketed search makes the same packs as a plain scan over all packs (ties aside: free rows agree)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    free: list[int] = []
    for i in order:
        fitting = [f for f in free if f >= lengths[i]]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - lengths[i])
        else:
            free.append(budget - lengths[i])
    packs = pack_tight(np.array(lengths), budget, np.random.default_rng(0))
    assert sorted(budget - sum(lengths[i] for i in p) for p in packs) == sorted(free)


@pytest.mark.parametrize("count", [20_000, 200_000])
def test_fill_on_speech_like_lengths(count: int) -> None:
    lengths = speech_like(count)
    packs = pack_random(lengths, 8192, np.random.default_rng(0))
    assert lengths.sum() / (len(packs) * 8192) >= 0.995
    assert sum(map(len, packs)) == count


def test_packs_mix_lengths_and_epochs_differ() -> None:
    lengths = speech_like(20_000)
    plan = PackPlan(PlainSamples(lengths), 0, 8192)
    packs = plan.epoch_packs(0)
    means = np.array([lengths[p].mean() for p in packs])
    assert means.std() < 0.35 * lengths.std()
    halves = [lengths[np.concatenate(packs[i::2])].mean() for i in (0, 1)]
    assert abs(halves[0] - halves[1]) < 0.05 * lengths.mean()
    other = plan.epoch_packs(1)
    assert sum(set(a) == set(b) for a, b in zip(packs, other, strict=True)) == 0
    # Within a pack the order is random, too: not longest first.
    assert np.mean([lengths[p[0]] > lengths[p[-1]] for p in packs]) == pytest.approx(0.5, abs=0.1)


def test_longest_samples_are_used() -> None:
    lengths = np.array([10, 20, 500, 30, 500])
    plan = PackPlan(PlainSamples(lengths), 0, 500)
    assert {2, 4} <= set(np.concatenate(plan.epoch_packs(0)).tolist())


def test_locate_and_cache() -> None:
    plan = PackPlan(PlainSamples(speech_like(300)), 3, 2048)
    P = plan.packs_per_epoch
    expected = [plan.epoch_packs(e)[i].copy() for e in range(5) for i in range(P)]
    for pack in (4 * P + 1, 0, 2 * P, 3 * P - 1, P):
        epoch, index = plan.locate(pack)
        assert np.array_equal(plan.epoch_packs(epoch)[index], expected[pack])
        again = PackPlan(PlainSamples(speech_like(300)), 3, 2048)
        assert np.array_equal(again.epoch_packs(epoch)[index], expected[pack])


def test_overlong() -> None:
    lengths = np.array([10, 300, 20, 999, 400])
    with pytest.raises(
        PlanError, match="sample 3 needs 999 rows but a pack holds 256 .too long in all: 3 samples.*999"
    ):
        PackPlan(PlainSamples(lengths), 0, 256)
    samples = PlainSamples(lengths)
    plan = PackPlan(samples, 0, 256, overlong="drop")
    assert plan.num_dropped == 3 and samples.values.tolist() == [10, 20]
    assert sorted(np.concatenate(plan.epoch_packs(0)).tolist()) == [0, 1]
    with pytest.raises(PlanError, match="no sample is left to pack: 5 of 5"):
        PackPlan(PlainSamples(lengths), 0, 5, overlong="drop")


@pytest.mark.parametrize(
    "lengths, budget, message",
    [
        ([], 10, "no sample to pack"),
        ([3], 0, "budget must be at least 1"),
    ],
)
def test_rejects_bad_sizes(lengths: list[int], budget: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PackPlan(PlainSamples(lengths), 0, budget)


def test_split_to_keeps_every_item() -> None:
    packs = split_to([[1, 2, 3, 4, 5], [6], [7, 8]], 6)
    assert len(packs) == 6 and sorted(i for p in packs for i in p) == list(range(1, 9)) and all(packs)


@pytest.mark.parametrize("seed", range(3))
def test_epochs_with_prompts_and_fractions_have_equal_pack_counts(make_folder: MakeFolder, seed: int) -> None:
    corpus = TokenCorpus([make_folder(random_rows(150, seed, longest=90))])
    tasks = [TaskUse("codec_ssl_tts", 1.5), TaskUse("codec_ssl_asr", 0.3), TaskUse("textlm", 2.75)]
    samples = build_samples(corpus, PlanConfig(tasks=tasks, seed=seed, prompt_frames=40))
    plan = PackPlan(samples, seed, 400)
    totals = set()
    for epoch in range(12):
        lengths = plan.lengths(epoch)
        assert (lengths <= samples.max_lengths()).all()
        packs = plan.epoch_packs(epoch)
        assert len(packs) == plan.packs_per_epoch and max(lengths[p].sum() for p in packs) <= 400
        totals.add(sum(len(p) for p in packs))
    assert totals == {150 + 75 + 45 + 300 + round(0.75 * 150)}


def test_max_lengths_are_reached(make_folder: MakeFolder) -> None:
    rows = random_rows(12, speakers=3)
    corpus = TokenCorpus([make_folder(rows)])
    samples = build_samples(corpus, PlanConfig(tasks=[TaskUse("codec_ssl_tts")], prompt_frames=30))
    seen = np.max([samples.lengths(epoch) for epoch in range(200)], axis=0)
    assert np.array_equal(seen, samples.max_lengths())


def test_overlong_names_the_utterance_and_drop_counts_it(make_folder: MakeFolder) -> None:
    rows = random_rows(10, longest=20)
    rows[4]["ssl"] = np.zeros((300, 1), int)
    rows[4]["codec"] = np.zeros((300, 3), int)
    corpus = TokenCorpus([make_folder(rows)])
    cfg = PlanConfig(tasks=[TaskUse("codec_ssl_asr"), TaskUse("textlm")])
    with pytest.raises(
        PlanError,
        match="utterance 'd4' of 'd' as codec_ssl_asr needs 3\\d\\d rows but a pack holds 128 .*: 1 sample\\)",
    ):
        PackPlan(build_samples(corpus, cfg), 0, 128)
    samples = build_samples(corpus, cfg)
    plan = PackPlan(samples, 0, 128, overlong="drop")
    assert (plan.num_dropped, samples.counts[0].overlong, samples.counts[1].overlong) == (1, 1, 0)
    assert sum(len(p) for p in plan.epoch_packs(0)) == 19 == len(samples)
