"""The plan's report: counted against the batches themselves."""

from __future__ import annotations

from collections import Counter

import pytest

from python_tests.data.conftest import LAYOUT, MakeFolder, random_rows
from speechlm_ext.data.loader import PackLoader
from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.plan.report import format_report, make_report
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.data.tokens.folder import TokenCorpus
from speechlm_ext.errors import PlanError

TASKS = [
    TaskUse("codec_ssl_asr"),
    TaskUse("codec_ssl_tts", 1.5),
    TaskUse("textlm", 0.5),
    TaskUse("codec_ssl_audiolm"),
]


@pytest.mark.parametrize("region", ["target", "all"])
def test_counts_are_those_of_the_batches(make_folder: MakeFolder, region: str) -> None:
    folder = make_folder(random_rows(40))
    weights = LossWeights(text=1.25, ssl=0.5, codec=0.75, special=0.5, region=region)  # type: ignore[arg-type]
    cfg = PlanConfig(tasks=TASKS, budget=256, prompt_frames=20, loss=weights)
    loader = PackLoader(cfg, folder)
    report = make_report(loader.corpus, cfg)
    tokens, loss, rows = Counter[str](), Counter[str](), 0
    kinds = {
        "special": "special",
        "ssl": "ssl",
        "text_bpe": "text",
        "codec0": "codec",
        "codec1": "codec",
        "codec2": "codec",
    }
    for pack in range(loader.packs_per_epoch):
        batch = loader.load(pack)
        rows += len(batch.ids)
        for interval in LAYOUT.intervals:
            kind = kinds[interval.name]
            inside = (batch.ids >= max(interval.start, 1)) & (batch.ids < interval.end)
            tokens[kind] += int(inside.sum())
            inside = (batch.labels >= interval.start) & (batch.labels < interval.end)
            loss[kind] += float((batch.loss_weight * inside).sum())
    assert report.tokens == dict(tokens) and report.rows == rows
    assert report.packs_per_epoch == loader.packs_per_epoch
    assert report.padding == pytest.approx(1 - rows / (256 * loader.packs_per_epoch))
    assert report.pad_cells == pytest.approx(1 - sum(tokens.values()) / (rows * LAYOUT.num_streams))
    total = sum(loss.values())
    for kind, share in report.loss_share.items():
        assert share == pytest.approx(loss[kind] / total, rel=1e-5), kind
    assert [t.copies for t in report.tasks] == [40, 60, 20, 40] and report.longest == loader.max_length


def test_the_table_names_what_is_left_out(make_folder: MakeFolder) -> None:
    rows = random_rows(9)
    rows[0]["speaker"] = None
    rows[1]["text_bpe"] = rows[1]["text"] = None
    cfg = PlanConfig(tasks=[TaskUse("codec_ssl_tts", langs=["de", "en"])], budget=512)
    report = make_report(TokenCorpus([make_folder(rows)]), cfg)
    text = format_report(report)
    assert "left out of codec_ssl_tts: 1 lack a modality; 1 no other utterance of the speaker" in text
    assert "loss share" in text and "padding" in text and report.tasks[0].samples == 7


def test_refuses_what_cannot_work(make_folder: MakeFolder) -> None:
    corpus = TokenCorpus([make_folder(random_rows(9))])
    nothing = LossWeights(text=0, special=0)
    with pytest.raises(PlanError, match="nothing would be learned"):
        make_report(corpus, PlanConfig(tasks=[TaskUse("codec_ssl_asr")], loss=nothing))
    with pytest.raises(PlanError, match="no task was given; name one or more of .*codec_ssl_asr"):
        make_report(corpus, PlanConfig())
    with pytest.raises(PlanError, match="a pack holds 40"):
        make_report(corpus, PlanConfig(tasks=[TaskUse("codec_ssl_asr")], budget=40))
    with pytest.raises(PlanError, match="dataset_factors names 'x', but the data sets are \\['d'\\]"):
        make_report(corpus, PlanConfig(tasks=[TaskUse("textlm")], dataset_factors={"x": 2}))
