"""The fused decode step: transformers' own states for each family, one memory for the weights, and what is refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from python_tests.model.backbone.table import quiet, settings_of
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.backbone import decode_layers as module
from speechlm_ext.model.backbone.body import build_body, make_config, plain_step, run_packed, run_step
from speechlm_ext.model.backbone.decode_layers import decode_layers

quiet()
ROWS, STEPS = 3, 11
#: Family -> changes that make its parts show.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "smollm3": {},
    "olmo2": {},
}


def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small random body whose every parameter matters."""
    torch.manual_seed(1)
    body = build_body(make_config(settings_of(kind) | FAMILIES.get(kind, {}) | changes), 50).eval()
    with torch.no_grad():
        for parameter in body.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    return body.to(dtype)


def states(body: Any, step: Callable[[Any, Tensor, KVCache], Tensor], num_steps: int = STEPS) -> Tensor:
    """Hidden states of ``num_steps`` rows of three slots, the first of which starts later; one moves on the way."""
    weight, width = next(body.parameters()), body.config.hidden_size
    rows = torch.randn(num_steps, ROWS, width, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    cache, out = KVCache(ROWS + 1, 4, weight.dtype, weight.device), []
    with torch.no_grad():
        for number, row in enumerate(rows):
            if number == 3:
                cache.restore(0, 0)
            if number == 6:
                cache.move(2, 3)
                cache.move(3, 2)
            out.append(step(body, row, cache))
    return torch.stack(out)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_states_of_transformers_own_layers(kind: str, dtype: torch.dtype) -> None:
    body = make(kind, dtype)
    wanted = states(body, plain_step)
    layers = decode_layers(body, plain_step, None)
    assert layers is not None, "a family of the table has a fused step"
    found = states(body, run_step)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound * float(wanted.abs().max()))
    assert decode_layers(body, plain_step, None) is layers


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_each_part_of_a_layer_is_read(kind: str) -> None:
    """Every parameter that is changed in place changes the fused step as it changes transformers'."""
    body = make(kind)
    before = states(body, run_step, 4)
    for name, parameter in body.named_parameters():
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
        found, wanted = states(body, run_step, 4), states(body, plain_step, 4)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))
        # A bias of all keys alike is the one thing that a softmax cannot see.
        assert name.endswith("k_proj.bias") or not torch.allclose(found, before, rtol=1e-4, atol=1e-4), name
        with torch.no_grad():
            parameter.copy_(old)


def test_weights_have_one_memory_and_their_own_names(tmp_path: Any) -> None:
    body = make("qwen2")
    before = {name: value.clone() for name, value in body.state_dict().items()}
    parameters = dict(body.named_parameters())
    assert decode_layers(body, plain_step, None) is not None
    assert all(after is parameters[name] for name, after in body.named_parameters())
    attention = body.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    storage = parts[0].untyped_storage()
    assert all(p.untyped_storage().data_ptr() == storage.data_ptr() for p in parts)
    assert storage.nbytes() == sum(p.numel() * p.element_size() for p in parts), "no second copy"
    for name, value in body.state_dict().items():
        assert torch.equal(value, before[name]), name
    save_file(body.state_dict(), tmp_path / "model.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, before[name]), name
    other = copy.deepcopy(body)
    with torch.no_grad():
        other.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(attention.q_proj.weight, before["layers.0.self_attn.q_proj.weight"])


def test_a_body_trains_after_it_has_decoded() -> None:
    """The gradients and the optimizer's step of a body that has decoded, inside inference mode too, are those of a
    fresh one."""
    rows, position = torch.randn(5, make().config.hidden_size), torch.arange(5)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    bodies = [make(), make()]
    with torch.inference_mode():
        assert decode_layers(bodies[1], plain_step, None) is not None
    for body in bodies:
        optimizer = torch.optim.AdamW(body.parameters(), lr=0.1)
        run_packed(body.train(), rows, position, bounds).square().sum().backward()
        optimizer.step()
        body.eval()
    for a, b in zip(*(body.parameters() for body in bodies), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(
        states(bodies[1], run_step), states(bodies[0], plain_step), rtol=1e-4, atol=1e-4
    )


def test_weights_that_move_are_joined_again() -> None:
    body = make()
    first = decode_layers(body, plain_step, None)
    cache = KVCache(1, 8, torch.float32, torch.device("cpu"))
    row = torch.randn(1, body.config.hidden_size)
    with torch.no_grad():
        run_step(body, row, cache)
        for layer in body.layers:
            layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * 2
        found = run_step(body, row, cache)
        plain = KVCache(1, 8, torch.float32, torch.device("cpu"))
        for layer in body.layers:
            layer.mlp.up_proj.weight.div_(2)
        plain_step(body, row, plain)
        for layer in body.layers:
            layer.mlp.up_proj.weight.mul_(2)
        torch.testing.assert_close(found, plain_step(body, row, plain), rtol=1e-4, atol=1e-4)
    assert cache.layers is not None and cache.layers is not first
    body.to(torch.bfloat16)
    second = decode_layers(body, plain_step, None)
    assert second is not None and second.first_weight.dtype == torch.bfloat16


def _wrapped(body: Any) -> None:
    class Adapter(nn.Linear):
        pass

    old = body.layers[1].self_attn.v_proj
    body.layers[1].self_attn.v_proj = Adapter(old.in_features, old.out_features, bias=False)


def _hooked(body: Any) -> None:
    body.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: o * 2)


def _patched(body: Any) -> None:
    forward = body.layers[0].mlp.forward
    body.layers[0].mlp.forward = lambda x: forward(x) + 1


def _flat(body: Any) -> None:
    """Weights in a flat buffer, in which q, k and v are not neighbours."""
    attention = body.layers[0].self_attn
    parts = [
        attention.q_proj.weight,
        attention.o_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
    ]
    flat = torch.cat([p.detach().flatten() for p in parts])
    for p, part in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        p.data = part.view(p.shape)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_wrapped, "exactly"), (_hooked, "exactly"), (_patched, "exactly"), (_flat, "held by something else")],
)
def test_what_is_not_exactly_a_family_runs_through_transformers(
    change: Callable[[Any], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_logged", set())
    body = make("qwen3")
    assert decode_layers(body, plain_step, None) is not None
    change(body)
    with caplog.at_level(logging.INFO, logger="speechlm_ext"):
        assert decode_layers(body, plain_step, None) is None
        assert decode_layers(body, plain_step, None) is None
    assert [reason in record.message for record in caplog.records] == [True], "said once"
    assert torch.equal(states(body, run_step), states(body, plain_step))


def test_neighbours_in_a_flat_buffer_are_joined_where_they_are() -> None:
    """As in an engine that keeps its optimizer's copy of the weights in one buffer."""
    body = make("qwen3")
    parameters = [p for p in body.parameters() if p.ndim > 1]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view(p.shape)
    assert decode_layers(body, plain_step, None) is not None
    storage = flat.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in parameters)
    flat.mul_(1.5)  # the optimizer's step
    wanted = states(body, plain_step)
    torch.testing.assert_close(
        states(body, run_step), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "phi"])
def test_other_classes_have_no_fused_step(kind: str) -> None:
    assert decode_layers(make(kind), plain_step, None) is None


def test_a_step_that_differs_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_logged", set())
    monkeypatch.setattr(
        module, "silu_mul", lambda x: torch.nn.functional.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    )
    with caplog.at_level(logging.INFO, logger="speechlm_ext"):
        assert decode_layers(make(), plain_step, None) is None
    assert "the fused step differs" in caplog.text


@pytest.mark.parametrize("rope", ["dynamic", "llama3", "yarn"])
def test_rotary_tables_are_those_of_the_body(rope: str) -> None:
    """Tables are longer than the cache, but never so long that they change the embeddings of shorter sequences."""
    more = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    }
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0, **more.get(rope, {})}
    if rope == "yarn":
        parameters["original_max_position_embeddings"] = 16
    body = make(rope_parameters=parameters, max_position_embeddings=32)
    wanted = states(body, plain_step, 20)
    found = states(body, run_step, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
