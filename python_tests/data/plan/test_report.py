"""The plan's report: counted against the batches themselves."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from python_tests.data.conftest import LAYOUT, MakeFolder, random_rows
from speechlm_ext import SpeechLM
from speechlm_ext.data.loader import PackLoader
from speechlm_ext.data.plan.memory import ModelShape, estimate_memory
from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.plan.report import PlanReportConfig, make_report, run_plan
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.errors import ConfigError, PlanError, ShardError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import FrameTransformerConfig, ModelConfig
from speechlm_ext.training import ModelSettings

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


def test_prints_a_table_and_json(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_rows(9)
    rows[0]["speaker"] = None
    rows[1]["text_bpe"] = rows[1]["text"] = None
    path = str(make_folder(rows).path)
    cfg = PlanConfig([path], [TaskUse("codec_ssl_tts", langs=["de", "en"])], budget=512)
    run_plan(PlanReportConfig(cfg, ModelShape()))
    text = capsys.readouterr().out
    assert "left out of codec_ssl_tts: 1 lack a modality; 1 no other utterance of the speaker" in text
    assert "loss share" in text and "memory per process, estimated" in text and "padding" in text
    report = run_plan(PlanReportConfig(cfg, ModelShape(), json=True))
    printed = json.loads(capsys.readouterr().out)
    assert printed["tasks"][0]["samples"] == 7 == report.tasks[0].samples
    assert printed["memory"]["num_parameters"] == report.memory.num_parameters  # type: ignore[union-attr]


def test_refuses_what_cannot_work(make_folder: MakeFolder) -> None:
    path = str(make_folder(random_rows(9)).path)
    nothing = LossWeights(text=0, special=0)
    with pytest.raises(PlanError, match="nothing would be learnt"):
        run_plan(PlanReportConfig(PlanConfig([path], [TaskUse("codec_ssl_asr")], loss=nothing)))
    with pytest.raises(PlanError, match="no task was given; name at least one of .*codec_ssl_asr"):
        run_plan(PlanReportConfig(PlanConfig([path])))
    with pytest.raises(ShardError, match="no token folder was given"):
        run_plan(PlanReportConfig(PlanConfig([], [TaskUse("textlm")])))
    with pytest.raises(PlanError, match="the model takes 16 \\(model.max_positions\\)"):
        run_plan(
            PlanReportConfig(PlanConfig([path], [TaskUse("codec_ssl_asr")]), ModelShape(max_positions=16))
        )
    with pytest.raises(PlanError, match="a pack holds 40"):
        run_plan(PlanReportConfig(PlanConfig([path], [TaskUse("codec_ssl_asr")], budget=40)))
    with pytest.raises(PlanError, match="dataset_factors names 'x', but the data sets are \\['d'\\]"):
        run_plan(PlanReportConfig(PlanConfig([path], [TaskUse("textlm")], dataset_factors={"x": 2})))
    with pytest.raises(ConfigError, match="zero_stage must be 0 to 3"):
        ModelShape(zero_stage=4)
    with pytest.raises(ConfigError, match="of at least 1, got depth 3"):
        ModelShape(frame_transformer={"depth": 3})


def test_parameter_count_is_the_model_s() -> None:
    """Against transformers' own Llama, embedding and head aside."""
    from transformers import LlamaConfig, LlamaModel

    layout = TokenLayout.build(ssl=20, codec=[16] * 3, text=50)
    shape = ModelShape(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=48)
    config = LlamaConfig(
        vocab_size=layout.vocab_size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    llama = sum(p.numel() for p in LlamaModel(config).parameters())
    got = estimate_memory(shape, layout, 100)
    assert got.num_parameters == llama + layout.vocab_size * 32 + layout.num_streams * 32
    assert (got.weights, got.gradients, got.optimizer) == tuple(np.array([4, 4, 8]) * got.num_parameters)
    # And with a frame transformer, of the project's own model.
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 24}
    backbone = ModelSettings(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=48).llama()
    model = SpeechLM(
        ModelConfig(backbone, frame_transformer=FrameTransformerConfig(**sizes)), layout.with_delays([0] * 4)
    )
    framed = estimate_memory(replace(shape, frame_transformer=sizes), layout, 100)
    # The estimate counts a vector for stream 0, which has none.
    assert framed.num_parameters == model.num_parameters() + 32
    assert framed.activations > 1.5 * got.activations
    sharded = ModelShape(32, 3, 4, 2, 48, precision="bf16", zero_stage=3, world=4)
    part = estimate_memory(sharded, layout, 100)
    assert part.optimizer == 12 * got.num_parameters // 4 and part.weights == 2 * got.num_parameters // 4
