"""Faster norms, rotary positions and gates: exact for the families that they fit, and left out elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from torch import nn

from speechlm_ext.errors import ConfigError
from speechlm_ext.model.backbone import acceleration
from speechlm_ext.model.backbone.acceleration import accelerate, choose_acceleration, packed_kernels
from speechlm_ext.model.backbone.body import build_body, make_config, run_packed
from speechlm_ext.training.config import ModelSettings

SETTINGS = ModelSettings(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=96)


def make_body(model_type: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    plain = {**SETTINGS.llama(), "model_type": model_type, "head_dim": 16, **settings}
    return build_body(make_config(plain), 32)


def results(body: nn.Module) -> dict[str, torch.Tensor]:
    """Hidden states of a pack of sequences of 1, 40 and 19 rows, and all gradients."""
    rng = torch.Generator().manual_seed(1)
    bounds = [0, 1, 41, 60]
    rows = torch.randn(60, 64, generator=rng).requires_grad_()
    position = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])
    out = run_packed(body, rows, position, torch.tensor(bounds, dtype=torch.int32), bounds)
    body.zero_grad()
    out.backward(torch.randn(60, 64, generator=rng))
    assert rows.grad is not None
    found = {"out": out.detach(), "rows": rows.grad}
    return found | {n: p.grad.clone() for n, p in body.named_parameters() if p.grad is not None}


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 2e-5
) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        gap = (ours[name] - value).abs().max() / value.abs().max()
        assert gap < tolerance, f"{name} differs by {gap:.1e}"


EXPECTED = {
    "llama": "packed norm, rotary, gate",
    "mistral": "packed norm, rotary, gate",
    "qwen2": "packed norm, rotary, gate",
    "qwen3": "packed norm, rotary, gate",
    "olmo2": "packed norm, rotary, gate",
    "smollm3": "packed norm, rotary, gate",
    "phi3": "packed norm, rotary",  # gate and up are one product
    "cohere": "packed gate",  # pairs of neighbours are rotated, and the norm subtracts the mean
    "gemma": "packed rotary",  # a norm with 1 + weight, a gate with gelu
    "gpt2": "eager",
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_accelerated_bodies_give_the_same(model_type: str) -> None:
    body = make_body(model_type, **({"sliding_window": 7} if model_type == "mistral" else {}))
    before = results(body)
    state = copy.deepcopy(body.state_dict())
    assert accelerate(body, "packed") == EXPECTED[model_type]
    assert_same(results(body), before)
    after = body.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in state.items())


def test_a_class_is_never_changed() -> None:
    ours, other = make_body("llama"), make_body("llama")
    accelerate(ours, "packed")
    assert not any("forward" in vars(module) for module in other.modules())
    for module in ours.modules():
        assert type(module).forward.__globals__.get("apply_rotary_pos_emb") is not packed_kernels().rotary


WRONG = {
    "norm": {"norm": lambda x, w, eps: packed_kernels().norm(x, w, eps + 1e-2)},
    "rotary": {"rotary": lambda q, k, cos, sin: packed_kernels().rotary(q, k, cos, -sin)},
    "gate": {"swiglu": lambda g, u: g * u},
}


@pytest.mark.parametrize("part", WRONG)
def test_a_part_that_differs_is_left_out(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = dataclasses.replace(packed_kernels(), **WRONG[part])
    monkeypatch.setattr(acceleration, "packed_kernels", lambda: wrong)
    body = make_body("llama")
    before = results(body)
    with caplog.at_level(logging.INFO, "speechlm_ext"):
        kept = accelerate(body, "packed")
    assert part not in kept and len(kept.split(", ")) == 2
    assert f"packed's {part} is left out" in caplog.text and "differ" in caplog.text
    assert_same(results(body), before)


def test_a_wrong_gradient_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate.detach()) * up

    monkeypatch.setattr(
        acceleration, "packed_kernels", lambda real=packed_kernels: dataclasses.replace(real(), swiglu=swiglu)
    )
    assert accelerate(make_body("llama"), "packed") == "packed norm, rotary"


def test_tensors_that_the_kernels_do_not_take_are_the_modules_own() -> None:
    body, plain = make_body("llama"), make_body("llama")
    accelerate(body, "packed")
    cu, rows = torch.tensor([0, 5], dtype=torch.int32), torch.randn(5, 64, dtype=torch.float64)
    a, b = (run_packed(each.double(), rows, torch.arange(5), cu) for each in (body, plain))
    assert torch.equal(a, b)


def test_recomputed_activations_give_the_same() -> None:
    body = make_body("llama").train()
    before = results(body)
    accelerate(body, "packed")
    body.gradient_checkpointing_enable()
    assert_same(results(body), before)


def test_compiled_layers_give_the_same_for_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile, but not lowered to C++, which takes a minute."""
    body, plain = (make_body("llama", num_hidden_layers=1) for _ in range(2))
    compile_it, graphs = torch.compile, []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda call, **options: compile_it(call, backend=backend, **options)
    )
    torch._dynamo.reset()
    assert accelerate(body, "compile") == "compiled layers"
    assert_same(results(body), results(plain))
    counts = []
    for rows in (30, 31, 47, 50):
        cu, x = torch.tensor([0, 9, rows], dtype=torch.int32), torch.randn(rows, 64)
        position = torch.cat((torch.arange(9), torch.arange(rows - 9)))
        a, b = (run_packed(each, x, position, cu) for each in (body, plain))
        torch.testing.assert_close(a, b)
        counts.append(len(graphs))
    assert counts[-1] == counts[0], "a number of rows was compiled for itself"
    torch._dynamo.reset()


# ---- the choice -----------------------------------------------------------------------------------------------------
@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Which packages seem to be installed."""
    names: set[str] = set()
    monkeypatch.setattr(
        acceleration.importlib.util, "find_spec", lambda name: name if name in names else None
    )
    return names


def test_a_gpu_takes_liger_then_compilation_then_nothing(installed: set[str]) -> None:
    def choice() -> tuple[str, str]:
        return choose_acceleration("cuda", torch.bfloat16)

    assert choice()[0] == "eager" and "liger_kernel is not installed" in choice()[1]
    installed.add("triton")
    assert choice()[0] == "compile" and "liger_kernel is not installed" in choice()[1]
    installed.add("liger_kernel")
    assert choice() == ("liger", "liger_kernel is installed")
    installed.remove("triton")
    assert choice()[0] == "eager" and "needs triton" in choice()[1]


def test_the_cpu_takes_the_packages_own_kernels_in_float32() -> None:
    assert choose_acceleration("cpu", torch.float32) == ("packed", "float32 on the CPU")
    assert choose_acceleration("cpu", torch.bfloat16)[0] == "eager"
    assert choose_acceleration("cpu", torch.float32, "eager") == ("eager", "as asked")


@pytest.mark.parametrize(
    "device, dtype, asked, why",
    [
        ("cpu", torch.float32, "liger", "not installed"),
        ("cuda", torch.bfloat16, "packed", "float32 on the CPU"),
        ("cpu", torch.bfloat16, "packed", "float32 on the CPU"),
        ("cuda", torch.bfloat16, "compile", "needs triton"),
        ("cpu", torch.float32, "fast", "must be one of"),
    ],
)
def test_what_is_asked_and_impossible_is_an_error(
    installed: set[str], device: str, dtype: torch.dtype, asked: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        choose_acceleration(device, dtype, asked)


def test_liger_is_refused_on_the_cpu_with_the_reason(installed: set[str]) -> None:
    installed.update(("liger_kernel", "triton"))
    with pytest.raises(ConfigError, match="run on a GPU"):
        choose_acceleration("cpu", torch.float32, "liger")


@pytest.mark.cuda
@pytest.mark.parametrize("choice", ["liger", "compile"])
def test_accelerated_bodies_give_the_same_on_a_gpu(choice: str) -> None:
    try:
        choose_acceleration("cuda", torch.float32, choice)
    except ConfigError as error:
        pytest.skip(str(error))
    body = make_body("llama").cuda()
    expected = acceleration._results(body)
    assert (
        accelerate(body, choice)
        == {"liger": "liger norm, rotary, gate", "compile": "compiled layers"}[choice]
    )
    assert acceleration._difference(body, expected) is None
