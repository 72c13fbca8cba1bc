"""The loader: exact resume from one integer, the same packs on any number of ranks, nothing lost."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from python_tests.data.conftest import LAYOUT, MakeFolder, random_rows
from python_tests.data.sequence_oracle import assemble
from speechlm_ext.data.loader import PackLoader, iter_eval
from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.errors import ConfigError, LayoutError, LayoutMismatchError, PlanError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops import delay_unpack
from speechlm_ext.tasks import builtin_tasks

PLAIN = [
    TaskUse("codec_ssl_asr"),
    TaskUse("codec_ssl_plain_tts"),
    TaskUse("textlm"),
    TaskUse("codec_ssl_audiolm"),
]
MIXED = [TaskUse("codec_ssl_asr"), TaskUse("codec_ssl_tts", factor=1.5), TaskUse("textlm", factor=0.5)]


def config(tasks: list[TaskUse], **more: object) -> PlanConfig:
    return PlanConfig(tasks=tasks, budget=256, seed=5, prompt_frames=20, **more)  # type: ignore[arg-type]


def same(a: object, b: object) -> bool:
    names = ("ids", "labels", "loss_weight", "position", "cu_seqlens")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


@pytest.mark.parametrize("tasks", [PLAIN, MIXED], ids=["plain", "prompts-and-fractions"])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_order_is_the_same_on_any_number_of_ranks(
    make_folder: MakeFolder, tasks: list[TaskUse], world: int
) -> None:
    folder = make_folder(random_rows(40))
    alone = list(islice(PackLoader(config(tasks), folder), 48))
    assert len(alone) > PackLoader(config(tasks), folder).packs_per_epoch, "must run into another epoch"
    ranks = [PackLoader(config(tasks), folder, rank=r, world=world) for r in range(world)]
    got = [next(ranks[r]) for _ in range(48 // world) for r in range(world)]
    assert all(same(a, b) for a, b in zip(alone, got, strict=True))
    assert {r.packs_consumed for r in ranks} == {48}


def test_delays_are_the_recipes(make_folder: MakeFolder) -> None:
    """The same folder under other delays: the same content, and the plan of a folder that was made with them."""
    folder = make_folder(random_rows(20))
    other = LAYOUT.with_delays([0, 0, 0, 0])
    made_so = make_folder(random_rows(20), "other", other)
    cfg = config(PLAIN, delays=[0, 0, 0, 0])
    loader, wanted = PackLoader(cfg, folder), PackLoader(config(PLAIN), made_so)
    assert loader.layout == other and folder.layout == LAYOUT
    assert all(same(a, b) for a, b in zip(islice(loader, 9), islice(wanted, 9), strict=True))
    # Delays that are the folder's own change nothing, so that a run goes on that was started without them.
    plain = PackLoader(config(PLAIN), folder)
    assert PackLoader(config(PLAIN, delays=[0, 1, 2, 3]), folder).fingerprint == plain.fingerprint
    assert loader.fingerprint != plain.fingerprint
    with pytest.raises(LayoutError, match=r"has 4 streams, so it takes as many delays; got \[0, 1\]"):
        PackLoader(config(PLAIN, delays=[0, 1]), folder)


@pytest.mark.parametrize("stop_at", [0, 1, 13, 40])
def test_resume_is_exact_at_any_point(make_folder: MakeFolder, stop_at: int) -> None:
    folder = make_folder(random_rows(40))
    whole = list(islice(PackLoader(config(MIXED), folder), 50))
    first = PackLoader(config(MIXED), folder)
    begun = list(islice(first, stop_at))
    state = first.packs_consumed
    assert state == stop_at
    # Resume on three ranks as far as whole steps go, then alone.
    rest = PackLoader(config(MIXED), folder, packs_consumed=state)
    got = begun + list(islice(rest, 50 - stop_at))
    assert all(same(a, b) for a, b in zip(whole, got, strict=True))
    rest.packs_consumed = 3
    assert same(next(rest), whole[3])
    other_world = PackLoader(config(MIXED), folder, rank=1, world=3, packs_consumed=state)
    assert same(next(other_world), PackLoader(config(MIXED), folder).load(state + 1))


def test_every_sample_exactly_once_in_an_epoch_and_epochs_differ(make_folder: MakeFolder) -> None:
    loader = PackLoader(config(PLAIN), make_folder(random_rows(40)))
    expected = Counter((f"d{i}", use.task) for i in range(40) for use in PLAIN)
    orders = []
    for epoch in range(3):
        start = epoch * loader.packs_per_epoch
        infos = [i for p in range(start, start + loader.packs_per_epoch) for i in loader.describe(p)]
        assert Counter((i.id, i.task) for i in infos) == expected
        orders.append([(i.id, i.task) for i in infos])
    assert orders[0] != orders[1] != orders[2]


def test_batch_is_the_assembled_samples(make_folder: MakeFolder) -> None:
    loader = PackLoader(config(PLAIN), make_folder(random_rows(20)))
    position = {u: i for i, u in enumerate(loader.corpus.folders[0].ids)}
    for pack in range(loader.packs_per_epoch):
        batch, infos = loader.load(pack), loader.describe(pack)
        assert batch.ids.shape[0] == sum(i.rows for i in infos) <= 256
        assert batch.cu_seqlens.tolist() == np.cumsum([0] + [i.rows for i in infos]).tolist()
        segments = delay_unpack(batch.ids, batch.cu_seqlens, delays=LAYOUT.delays)
        for info, got in zip(infos, segments, strict=True):
            frames, weight = assemble(
                builtin_tasks()[info.task], loader.corpus.utterance(position[info.id]), LAYOUT
            )
            keep = len(frames) - LAYOUT.max_delay
            assert np.array_equal(got.numpy(), frames[:keep]) and not frames[keep:].any()
            assert weight[keep:].sum() == 0
        total = sum(
            assemble(builtin_tasks()[i.task], loader.corpus.utterance(position[i.id]), LAYOUT)[1].sum()
            for i in infos
        )
        assert batch.loss_weight.sum().item() == pytest.approx(total, rel=1e-5)


def test_speaker_prompts_are_other_utterances_of_the_speaker(make_folder: MakeFolder) -> None:
    folder = make_folder(random_rows(30))
    loader = PackLoader(config([TaskUse("codec_ssl_tts")]), folder)
    seen = []
    for epoch in range(3):
        pairs = {}
        start = epoch * loader.packs_per_epoch
        for pack in range(start, start + loader.packs_per_epoch):
            for info in loader.describe(pack):
                assert info.prompt is not None and info.prompt != info.id
                assert int(info.prompt[1:]) % 3 == int(info.id[1:]) % 3
                pairs[info.id] = info.prompt
        assert sorted(pairs.values()) == sorted(pairs), "every utterance prompts once"
        seen.append(pairs)
    assert seen[0] != seen[1]
    # The frames in the batch are a crop of the prompting utterance, at most prompt_frames long.
    info, batch = loader.describe(0)[0], loader.load(0)
    segment = delay_unpack(batch.ids, batch.cu_seqlens, delays=LAYOUT.delays)[0].numpy()
    at = int(np.flatnonzero(segment[:, 0] == LAYOUT.marker_id("spk"))[0]) + 1
    source = folder.utterance(folder.ids.index(info.prompt or ""))
    starts = [LAYOUT.interval("ssl")[0]] + [LAYOUT.interval(f"codec{k}")[0] for k in range(3)]
    frames = np.concatenate([source["ssl"], source["codec"]], axis=1) + starts
    length = min(20, len(frames))
    crops = [frames[i : i + length] for i in range(len(frames) - length + 1)]
    assert any(np.array_equal(segment[at : at + length], crop) for crop in crops)
    assert (segment[at + length] == 0).all()


def test_factors(make_folder: MakeFolder) -> None:
    folder = make_folder(random_rows(41))
    tasks = [TaskUse("codec_ssl_asr", 2.5), TaskUse("textlm", 0.25), TaskUse("codec_ssl_audiolm", 0.25)]
    loader = PackLoader(config(tasks), folder)
    extras = []
    for epoch in range(3):
        start = epoch * loader.packs_per_epoch
        counts = Counter(
            (i.id, i.task) for p in range(start, start + loader.packs_per_epoch) for i in loader.describe(p)
        )
        asr = {k: v for k, v in counts.items() if k[1] == "codec_ssl_asr"}
        assert len(asr) == 41 and set(asr.values()) == {2, 3} and sum(asr.values()) == 82 + round(41 / 2)
        for task in ("textlm", "codec_ssl_audiolm"):
            assert sum(v for k, v in counts.items() if k[1] == task) == round(41 / 4)
        extras.append({k for k, v in asr.items() if v == 3})
    assert extras[0] != extras[1]


def test_dataset_factors_and_filters(make_folder: MakeFolder) -> None:
    folders = [
        make_folder(random_rows(12, dataset="a"), "ta"),
        make_folder(random_rows(8, 1, dataset="b"), "tb"),
    ]
    tasks = [TaskUse("codec_ssl_asr", datasets=["b"]), TaskUse("textlm", langs=["en"])]
    loader = PackLoader(config(tasks, dataset_factors={"b": 2}), folders)
    counts = Counter((i.id, i.task) for p in range(loader.packs_per_epoch) for i in loader.describe(p))
    expected = {(f"b{i}", "codec_ssl_asr"): 2 for i in range(8)}
    expected |= {(f"a{i}", "textlm"): 1 for i in range(1, 12, 2)} | {
        (f"b{i}", "textlm"): 2 for i in range(1, 8, 2)
    }
    assert counts == expected


def test_speakers_of_one_utterance_are_refused_and_counted(make_folder: MakeFolder) -> None:
    rows = random_rows(9)
    rows[0]["speaker"] = "alone"
    rows[1]["speaker"] = None
    loader = PackLoader(config([TaskUse("codec_ssl_tts")]), make_folder(rows))
    ids = {i.id for p in range(loader.packs_per_epoch) for i in loader.describe(p)}
    assert ids == {f"d{i}" for i in range(2, 9)}
    assert loader.samples.counts[0].no_prompt == 2
    with pytest.raises(PlanError, match="codec_ssl_tts.*no data.*9 have no other utterance"):
        PackLoader(config([TaskUse("codec_ssl_tts")]), make_folder(random_rows(9, speakers=0), "nobody"))


def test_eval_gives_each_sample_once_in_order(make_folder: MakeFolder) -> None:
    folder = make_folder(random_rows(25))
    weights = LossWeights(text=2.0)
    batches = list(iter_eval("codec_ssl_asr", folder, budget=150, loss=weights))
    assert [i for b in batches for i in b.ids] == folder.ids
    for b in batches:
        assert len(b.ids) == len(b.batch.cu_seqlens) - 1 == len(b.utterances)
        for k, utterance in enumerate(b.utterances):
            rows = slice(int(b.batch.cu_seqlens[k]), int(b.batch.cu_seqlens[k + 1]))
            frames, weight = assemble(builtin_tasks()["codec_ssl_asr"], utterance, LAYOUT, weights=weights)
            assert rows.stop - rows.start == len(frames)
            assert b.batch.ids[rows][:, 0].tolist() == frames[:, 0].tolist()
            assert b.batch.loss_weight[rows].sum().item() == pytest.approx(weight.sum())
    assert [i for b in iter_eval("textlm", folder, limit=3) for i in b.ids] == folder.ids[:3]


def test_rejects_bad_input(make_folder: MakeFolder) -> None:
    folder = make_folder(random_rows(10))
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        PackLoader(config(PLAIN), folder, rank=2, world=2)
    with pytest.raises(PlanError, match="needs \\d+ rows but a pack holds 30 .too long in all: \\d+ samples"):
        PackLoader(PlanConfig(tasks=PLAIN, budget=30), folder)
    with pytest.raises(PlanError, match="'nope' is not known; this layout can hold .*codec_ssl_asr"):
        PackLoader(config([TaskUse("nope")]), folder)
    with pytest.raises(PlanError, match="'asr' needs codec, which layout"):
        PackLoader(config([TaskUse("asr")]), folder)
    with pytest.raises(PlanError, match="no data set 'x' in the data; there are \\['d'\\]"):
        PackLoader(config([TaskUse("textlm", datasets=["x"])]), folder)
    other = make_folder(
        random_rows(4, longest=5), "other", TokenLayout.build(ssl=20, codec=[16] * 3, text=51)
    )
    with pytest.raises(LayoutMismatchError, match="vocabulary size"):
        PackLoader(config(PLAIN), [folder, other])


def test_fingerprint_follows_the_plan_not_the_place(make_folder: MakeFolder) -> None:
    one, two = make_folder(random_rows(10), "one"), make_folder(random_rows(10), "two")
    base = PackLoader(config(PLAIN), one).fingerprint
    assert PackLoader(config(PLAIN), two).fingerprint == base
    assert PackLoader(config(PLAIN, loss=LossWeights(text=3)), one).fingerprint == base
    assert PackLoader(config(PLAIN[:2]), one).fingerprint != base
    assert PackLoader(config(PLAIN), make_folder(random_rows(10, seed=1), "three")).fingerprint != base
