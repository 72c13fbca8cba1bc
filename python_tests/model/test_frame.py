"""The frame transformer: loss and gradients against a plain formula, its cache against a full recompute, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from python_tests.model.tables import init_tables
from speechlm_ext import SpeechLM
from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import FrameTransformerConfig, LossSettings, ModelConfig
from speechlm_ext.ops import PackedBatch
from speechlm_ext.training import ModelSettings

LAYOUT = TokenLayout.build(ssl=6, codec=[5, 4, 3], text=9, delays=[0] * 4)
TINY = ModelSettings(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24, max_positions=64)
FRAME = FrameTransformerConfig(hidden_size=8, num_layers=2, num_heads=2, ffn_size=12)
SCOPES = ["full", "codec", "own", "modality"]


def make(layout: TokenLayout = LAYOUT, **changes) -> SpeechLM:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = SpeechLM(ModelConfig(TINY.llama(), frame_transformer=FRAME, **changes), layout).eval()
    init_tables(model, 0.5)
    torch.nn.init.normal_(model.frame.to_hidden.weight)  # so that its part is as large as the backbone's
    return model


def exact(model: SpeechLM) -> SpeechLM:
    """The model in float64, with norms that do not go through float32 as transformers' do."""
    body = model.frame.body
    for owner, name in [
        (body, "norm"),
        *((layer, n) for layer in body.layers for n in ("input_layernorm", "post_attention_layernorm")),
    ]:
        norm = torch.nn.RMSNorm(FRAME.hidden_size, eps=1e-5)
        norm.weight = getattr(owner, name).weight
        setattr(owner, name, norm)
    return model.double()


def batch(lengths: list[int], text_only: bool = False) -> dict[str, torch.Tensor]:
    """A packed row of speech and text frames with labels, weights, and labels that nobody weighs."""
    N, g = sum(lengths), torch.Generator().manual_seed(1)
    ids = torch.zeros(N + 1, LAYOUT.num_streams, dtype=torch.int64)
    for s, (start, end) in enumerate(LAYOUT.content_ranges("codec_ssl")):  # type: ignore[misc]
        ids[:, s] = torch.randint(start, end, (N + 1,), generator=g)
    is_text = torch.ones(N + 1).bool() if text_only else torch.arange(N + 1) % 3 == 1
    text = torch.randint(*LAYOUT.interval("text_bpe"), (N + 1,), generator=g)
    ids[is_text] = LAYOUT.pad_id
    ids[is_text, 0] = text[is_text]
    weight = torch.rand(N, LAYOUT.num_streams, generator=g, dtype=torch.float64)
    weight[ids[1:] == LAYOUT.pad_id] = 0
    weight[::5] = 0
    weight[3, 2] = 0  # a stream in the middle of a frame that is not learnt, and is read all the same
    position = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "ids": ids[:-1],
        "labels": ids[1:],
        "loss_weight": weight,
        "position": position,
        "cu_seqlens": bounds,
    }


def naive_logits(model: SpeechLM, hidden_D: torch.Tensor, frame_S: torch.Tensor, stream: int) -> torch.Tensor:
    """Logits of the whole vocabulary for one stream of one frame: Llama written out, one position after the other."""
    h = hidden_D
    if stream:
        f, body = model.frame, model.frame.body
        table = model.embedding.weight

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

        x = torch.stack(
            [
                f.from_hidden.weight @ hidden_D
                + f.from_token.weight @ norm(table[frame_S[s]], f.token_norm.weight)
                + f.stream_embed[s]
                for s in range(stream)
            ]
        )
        T, H, P = len(x), FRAME.num_heads, FRAME.hidden_size // FRAME.num_heads
        # In float32, as transformers has it.
        angle = torch.arange(T)[:, None] * (1 / 10000.0 ** (torch.arange(0, P, 2) / P))
        cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angle.cos(), angle.sin()))

        def turn(v: torch.Tensor) -> torch.Tensor:
            half = torch.cat([-v[..., P // 2 :], v[..., : P // 2]], -1)
            return v * cos + half * sin

        for layer in body.layers:
            a = layer.self_attn
            n = norm(x, layer.input_layernorm.weight)
            q, k, v = ((n @ w.weight.T).view(T, H, P).transpose(0, 1) for w in (a.q_proj, a.k_proj, a.v_proj))
            scores = turn(q) @ turn(k).transpose(1, 2) * P**-0.5
            scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), float("-inf"))
            x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, H * P) @ a.o_proj.weight.T
            n, m = norm(x, layer.post_attention_layernorm.weight), layer.mlp
            x = x + (F.silu(n @ m.gate_proj.weight.T) * (n @ m.up_proj.weight.T)) @ m.down_proj.weight.T
        h = hidden_D + f.to_hidden.weight @ norm(x[-1], body.norm.weight)
    vectors = model.head.stream_vectors()
    return h if vectors is None else h + vectors[stream]


def naive(model: SpeechLM, b: dict[str, torch.Tensor], softcap: float | None = None) -> torch.Tensor:
    """``[N, S]`` log-probabilities of the labels, 0 where they have no weight."""
    hidden = model.hidden(b["ids"], b["position"], b["cu_seqlens"])
    head, live = model.head, b["loss_weight"] > 0
    kinds = head.row_scope(b["labels"], b["loss_weight"])
    out = []
    for n in range(len(hidden)):
        for s in range(LAYOUT.num_streams):
            if not live[n, s]:
                out.append(hidden.new_zeros(()))
                continue
            scope = (head.scopes if kinds is None else head.scopes[int(kinds[n])])[s]
            ids = torch.cat([torch.arange(a, z) for a, z in scope])
            rows = torch.cat([torch.arange(*head.rows_of(s, a, z).indices(10**6)[:2]) for a, z in scope])
            z = naive_logits(model, hidden[n], b["labels"][n], s) @ head.weight[rows].T
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            out.append(z.log_softmax(0)[int((ids == b["labels"][n, s]).nonzero())])
    return torch.stack(out).view(len(hidden), -1)


@pytest.mark.parametrize("heads", ["shared", "separate"])
@pytest.mark.parametrize("scope", SCOPES)
def test_loss_and_gradients_are_the_naive_ones(scope: str, heads: str) -> None:
    model = exact(make(loss=LossSettings(scope=scope, softcap=9.0), heads=heads))
    b = batch([6, 1, 8])
    out = model(**b)
    found = torch.autograd.grad(out.loss_sum, tuple(model.parameters()))
    log_p = naive(model, b, 9.0)
    wanted = -(log_p * b["loss_weight"]).sum()
    torch.testing.assert_close(out.loss_sum, wanted, rtol=1e-10, atol=1e-10)
    for (name, _), a, z in zip(
        model.named_parameters(), found, torch.autograd.grad(wanted, tuple(model.parameters())), strict=True
    ):
        torch.testing.assert_close(a, z, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert a.any() or name == "head.stream_embed", name
    # Per stream, as a model without it reports.
    live = b["loss_weight"] > 0
    torch.testing.assert_close(out.stream_loss, -(log_p * b["loss_weight"]).sum(0), rtol=1e-9, atol=1e-9)
    assert torch.equal(out.stream_count, live.sum(0))
    torch.testing.assert_close(out.stream_weight, b["loss_weight"].sum(0).float())
    with torch.no_grad():
        model.frame.to_hidden.weight.mul_(1.5)
    assert not torch.allclose(model(**b).stream_loss[1:], out.stream_loss[1:])
    assert torch.equal(model(**b).stream_loss[:1], out.stream_loss[:1]), "stream 0 is the backbone's own"


@pytest.mark.parametrize("scope", SCOPES)
def test_scores_are_the_naive_ones(scope: str) -> None:
    model = exact(make(loss=LossSettings(scope=scope)))
    b = batch([9, 5])
    with torch.no_grad():
        wanted = naive(model, b)
        mask = b["loss_weight"] > 0
        found, entropy = model.logprobs(b["ids"], b["labels"], mask, b["position"], b["cu_seqlens"])
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert bool((entropy[mask] > 0).all()) and not entropy[~mask].any() and not found[~mask].any()
        out = model(**b, reduction="none")
        torch.testing.assert_close(out.token_nll, -wanted, rtol=1e-9, atol=1e-9)
        # How many labels are the most probable of their scope, stream by stream.
        b["loss_weight"] = mask.double()
        out = model(**b)
        hidden = model.hidden(b["ids"], b["position"], b["cu_seqlens"])
        kinds = model.head.row_scope(b["labels"], b["loss_weight"])
        best = torch.zeros(LAYOUT.num_streams, dtype=torch.int64)
        for n, s in mask.nonzero().tolist():
            spans = (model.head.scopes if kinds is None else model.head.scopes[int(kinds[n])])[s]
            ids = torch.cat([torch.arange(a, z) for a, z in spans])
            z = naive_logits(model, hidden[n], b["labels"][n], s) @ model.head.weight[ids].T
            best[s] += ids[z.argmax()] == b["labels"][n, s]
        assert torch.equal(out.stream_correct, best)


def test_token_losses_carry_gradients() -> None:
    model, b = exact(make()), batch([7])
    out = model(**b, reduction="none")
    coefficient = torch.randn_like(out.token_nll)
    parameters = tuple(model.parameters())
    found = torch.autograd.grad((out.token_nll * coefficient).sum(), parameters)
    wanted = torch.autograd.grad((-naive(model, b) * coefficient).sum(), parameters)
    for a, z in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, z, rtol=1e-7, atol=1e-9)


def test_text_alone_costs_nothing_and_every_parameter_has_a_gradient() -> None:
    """Frames are computed where they are learnt; with none, one stands in so that all ranks do the same."""
    model, b = make(), batch([5, 6], text_only=True)
    b["loss_weight"] = b["loss_weight"].float()
    sizes: list[int] = []
    model.frame.body.register_forward_pre_hook(
        lambda _, a, k: sizes.append(k["inputs_embeds"].shape[0]), with_kwargs=True
    )
    model(**b).loss_sum.backward()
    assert sizes == [1]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        assert not (name.startswith("frame.") and parameter.grad.any()), name
    mixed = batch([6, 1, 8])
    mixed["loss_weight"] = mixed["loss_weight"].float()
    model(**mixed)
    assert sizes[1:] == [int((mixed["loss_weight"][:, 1:] > 0).any(1).sum())] and sizes[1] < 15


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_batch_known_on_the_host_has_the_same_loss(scope: str, text_only: bool) -> None:
    model, b = make(loss=LossSettings(scope=scope)), batch([5, 1, 8], text_only)
    b["loss_weight"] = b["loss_weight"].float()
    facts = model.facts(PackedBatch(**b))
    assert len(facts.frame_rows_R) >= 1
    assert torch.equal(model(**b, facts=facts).loss_sum, model(**b).loss_sum)


def test_stepping_through_a_frame_is_the_whole_of_it() -> None:
    """The cache, reused frame after frame by batches of changing size, gives what a full pass gives."""
    model = exact(make())
    cache = model.new_frame_cache(5)
    S, g = LAYOUT.num_streams, torch.Generator().manual_seed(2)
    with torch.no_grad():
        for rows in (3, 5, 1):
            for store in cache.stores():
                store.fill_(torch.nan)  # what was there before is never read
            hidden = torch.randn(rows, 16, generator=g, dtype=torch.float64)
            frames = torch.stack(
                [torch.randint(*r, (rows,), generator=g) for r in LAYOUT.content_ranges("codec_ssl")], 1
            )
            whole = model.frame(hidden, model.embedding(frames[:, :-1, None]))
            for s in range(1, S):
                found = model.stream_hidden(hidden, frames[:, s - 1], s, cache)
                torch.testing.assert_close(found, whole[:, s - 1], rtol=1e-10, atol=1e-10)
                wanted = naive_logits(model, hidden[0], frames[0], s)
                torch.testing.assert_close(found[0] + model.head.stream_vectors()[s], wanted)


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_save_and_load(tmp_path: Path, heads: str) -> None:
    model, b = make(heads=heads), batch([5, 6])
    model.save_pretrained(tmp_path)
    again = SpeechLM.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.frame_transformer == FRAME
    mask = b["loss_weight"] > 0
    a, z = (
        m.logprobs(b["ids"], b["labels"], mask, b["position"], b["cu_seqlens"])[0] for m in (model, again)
    )
    assert torch.equal(a, z)
    config = json.loads((tmp_path / "config.json").read_text())
    config["frame_transformer"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="depth"):
        SpeechLM.from_pretrained(tmp_path, verify=False)
    # A folder from before there were frame transformers.
    torch.manual_seed(0)
    SpeechLM(ModelConfig(TINY.llama()), LAYOUT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["frame_transformer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SpeechLM.from_pretrained(tmp_path, verify=False).frame is None


def test_refuses_what_cannot_be() -> None:
    delayed = LAYOUT.with_delays([0, 1, 2, 3])
    with pytest.raises(ConfigError, match=r"delays them by \[0, 1, 2, 3\].*data.delays to \[0, 0, 0, 0\]"):
        make(delayed)
    with pytest.raises(ConfigError, match="one stream"):
        make(TokenLayout.build(ssl=6, text=9))
    with pytest.raises(ConfigError, match="hidden_size 12 must be a multiple of twice num_heads 4"):
        ModelSettings(frame_transformer=FrameTransformerConfig(hidden_size=12, num_heads=4))
    with pytest.raises(ConfigError, match="num_layers must be an integer of at least 1, got 0"):
        ModelConfig(TINY.llama(), frame_transformer=FrameTransformerConfig(num_layers=0))
