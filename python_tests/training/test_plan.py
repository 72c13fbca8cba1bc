"""``speechlm plan``: a training recipe as it is, and a memory estimate whose parameters are those of the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from python_tests.data.conftest import LAYOUT, MakeFolder, make_folder, random_rows  # noqa: F401
from speechlm_ext import SpeechLM
from speechlm_ext.cli import main
from speechlm_ext.data import PlanConfig, TaskUse
from speechlm_ext.errors import ConfigError, PlanError, ShardError
from speechlm_ext.model import FrameTransformerConfig, ModelConfig
from speechlm_ext.training import ModelSettings
from speechlm_ext.training.plan import (
    PlanCommandConfig,
    PlanModelSettings,
    empty_model,
    estimate_memory,
    run_plan,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SIZES = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48}


@pytest.mark.parametrize("name", ["own_folder.yaml", "demo.yaml", "demo_multiscale.yaml"])
def test_takes_a_training_recipe(
    make_folder: MakeFolder,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    tokens = str(make_folder(random_rows(9)).path)
    options = ["--data.tokens", tokens, "--data.tasks", "[{task: codec_ssl_asr}, {task: textlm}]"]
    if name == "demo_multiscale.yaml":
        options += ["--data.delays", "[0, 0, 0, 0]"]
    assert main(["plan", "--config", str(RECIPES / name), *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [t["task"] for t in printed["tasks"]] == ["codec_ssl_asr", "textlm"]
    model = yaml.safe_load((RECIPES / name).read_text("utf-8"))["model"]
    frame = model.pop("frame_transformer", None)
    settings = ModelSettings(**model, frame_transformer=frame and FrameTransformerConfig(**frame))
    layout = LAYOUT.with_delays([0] * 4) if frame else LAYOUT
    assert printed["memory"]["num_parameters"] == empty_model(settings, layout).num_parameters()


def test_data_alone_has_an_estimate_too(
    make_folder: MakeFolder,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "plan.yaml"
    data = {"tokens": str(make_folder(random_rows(9)).path), "tasks": [{"task": "textlm"}]}
    recipe.write_text(yaml.safe_dump({"data": data}), "utf-8")
    assert main(["plan", "--config", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "textlm" in printed and "memory per process, estimated" in printed
    old = {"precision": "bf16", "zero_stage": 3, "world": 4, "activation_checkpointing": True}
    recipe.write_text(yaml.safe_dump({"data": data, "model": old}), "utf-8")
    assert main(["plan", "--config", str(recipe)]) == 0
    assert capsys.readouterr().out != printed
    config = PlanCommandConfig(model=PlanModelSettings(**old))
    assert (config.precision, config.zero_stage, config.processes) == ("bf16", 3, 4)
    assert config.activation_checkpointing


def test_refuses_what_training_would_refuse(make_folder: MakeFolder) -> None:  # noqa: F811
    path = str(make_folder(random_rows(9)).path)
    with pytest.raises(ShardError, match="no token folder was given"):
        run_plan(PlanCommandConfig(data=PlanConfig([], [TaskUse("textlm")])))
    data = PlanConfig([path], [TaskUse("codec_ssl_asr")])
    with pytest.raises(PlanError, match="the model takes 16 \\(model.max_positions\\)"):
        run_plan(PlanCommandConfig(data=data, model=PlanModelSettings(max_positions=16)))
    for settings in ({"zero_stage": 4}, {"model": PlanModelSettings(zero_stage=4)}):
        with pytest.raises(ConfigError, match="zero_stage must be 0, 1, 2 or 3"):
            PlanCommandConfig(**settings)


def test_parameters_are_those_of_the_model() -> None:
    settings = ModelSettings(**SIZES)
    config = PlanCommandConfig(data=PlanConfig(budget=100), model=PlanModelSettings(**SIZES))
    plain = estimate_memory(empty_model(settings, LAYOUT), config)
    assert plain.num_parameters == SpeechLM(ModelConfig(settings.llama()), LAYOUT).num_parameters()
    assert (plain.weights, plain.gradients) == (4 * plain.num_parameters,) * 2
    assert plain.optimizer == 8 * plain.num_parameters

    frame, layout = FrameTransformerConfig(16, 2, 2, 24), LAYOUT.with_delays([0] * 4)
    framed_model = PlanModelSettings(**SIZES, frame_transformer=frame)
    framed = estimate_memory(empty_model(framed_model, layout), replace(config, model=framed_model))
    model = SpeechLM(ModelConfig(settings.llama(), frame_transformer=frame), layout)
    assert framed.num_parameters == model.num_parameters()
    assert framed.activations > 1.5 * plain.activations

    sharded = replace(config, precision="bf16", zero_stage=3, processes=4)
    part = estimate_memory(empty_model(settings, LAYOUT), sharded)
    assert part.optimizer == 12 * plain.num_parameters // 4 and part.weights == 2 * plain.num_parameters // 4
    checkpointing = estimate_memory(
        empty_model(settings, LAYOUT), replace(config, activation_checkpointing=True)
    )
    assert checkpointing.activations < plain.activations
