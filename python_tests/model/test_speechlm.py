"""The model: packed rows equal lone segments, the loss equals a naive one, files round-trip, damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import LossSettings, ModelConfig, SpeechLM
from speechlm_ext.model.attention import Packing, choose_attention, packed_attention
from speechlm_ext.training import ModelSettings

LAYOUT = TokenLayout.build(ssl=6, codec=[5, 5], text=9)
TINY = ModelSettings(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24, max_positions=64)


def make(**changes) -> SpeechLM:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return SpeechLM(ModelConfig(TINY.llama(), **changes), LAYOUT).eval()


def rows(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random legal ids, positions and bounds of a packed row."""
    N = sum(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(N, LAYOUT.num_streams, dtype=torch.int64)
    for s, (start, end) in enumerate(LAYOUT.content_ranges("codec_ssl")):  # type: ignore[misc]
        ids[:, s] = torch.randint(start, end, (N,), generator=generator)
    ids[::3, 1] = LAYOUT.pad_id
    position = torch.cat([torch.arange(n) for n in lengths])
    return ids, position, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("lengths", [[7], [1, 9, 1], [12, 3, 11, 4, 0, 12, 1], [2, 2, 2]])
def test_packed_equals_lone_segments(lengths: list[int]) -> None:
    """No sample sees another: each segment's hidden states are those of the segment alone."""
    model = make()
    ids, position, bounds = rows(lengths)
    packed = model.hidden(ids, position, bounds)
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        if a < b:
            alone = model.hidden(ids[a:b], position[a:b], torch.tensor([0, b - a], dtype=torch.int32))
            torch.testing.assert_close(packed[a:b], alone, rtol=1e-4, atol=1e-6)


def test_packed_attention_and_gradients_match_float64() -> None:
    """Grouped SDPA against a masked softmax in float64, forward and backward, with grouped heads."""
    lengths, H, G, E = [9, 1, 5, 8, 2], 4, 2, 8
    N = sum(lengths)
    q, k, v = (torch.randn(N, heads, E, dtype=torch.float64, requires_grad=True) for heads in (H, G, G))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = packed_attention(q, k, v, Packing.build(bounds, "sdpa"), E**-0.5)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (segment[:, None] == segment[None]) & torch.ones(N, N).tril().bool()
    scores = torch.einsum("nhe,mhe->hnm", q, k.repeat_interleave(H // G, 1)) * E**-0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    naive = torch.einsum("hnm,mhe->nhe", weights, v.repeat_interleave(H // G, 1))
    torch.testing.assert_close(out, naive, rtol=1e-10, atol=1e-10)
    coefficient = torch.randn_like(naive)
    ours = torch.autograd.grad((out * coefficient).sum(), (q, k, v))
    theirs = torch.autograd.grad((naive * coefficient).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scope", ["full", "codec", "own"])
def test_loss_is_the_naive_one(scope: str) -> None:
    model = make(loss=LossSettings(scope=scope))
    ids, position, bounds = rows([6, 5])
    labels, weight = ids.roll(-1, 0), torch.rand(11, LAYOUT.num_streams)
    weight[labels == LAYOUT.pad_id] = 0
    out = model(ids, labels, weight, position, bounds)
    hidden = model.hidden(ids, position, bounds)
    vectors = model.head.stream_vectors()
    assert vectors is not None and not vectors[0].any()
    expected = hidden.new_zeros(())
    for s, ranges in enumerate(LAYOUT.scopes(scope)):
        columns = torch.cat([torch.arange(a, b) for a, b in ranges])
        log_p = F.log_softmax((hidden + vectors[s]) @ model.head.weight[columns].T, dim=1)
        for n in range(11):
            if weight[n, s] > 0:
                expected = expected - weight[n, s] * log_p[n, (columns == labels[n, s]).nonzero()[0, 0]]
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-4, atol=1e-5)


def test_cache_equals_packed() -> None:
    """Left-padded decoding with a cache gives the packed form's hidden states."""
    model = make()
    lengths = [7, 4]
    ids, position, bounds = rows(lengths)
    packed = model.hidden(ids, position, bounds)
    T = max(lengths)
    batch = torch.zeros(2, T, LAYOUT.num_streams, dtype=torch.int64)
    places = torch.zeros(2, T, dtype=torch.int64)
    mask = torch.zeros(2, T, dtype=torch.bool)
    for b, n in enumerate(lengths):
        a = int(bounds[b])
        batch[b, T - n :], places[b, T - n :], mask[b, T - n :] = ids[a : a + n], position[a : a + n], True
    cache, parts = model.new_cache(), []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7)):
            parts.append(
                model.cached_hidden(
                    batch[:, start:end],
                    cache=cache,
                    position_BT=places[:, start:end],
                    key_mask_BK=mask[:, :end],
                )
            )
    decoded = torch.cat(parts, 1)
    for b, n in enumerate(lengths):
        a = int(bounds[b])
        torch.testing.assert_close(decoded[b, T - n :], packed[a : a + n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tie_head", [False, True])
def test_save_and_load(tmp_path: Path, tie_head: bool) -> None:
    model = make(tie_head=tie_head)
    model.save_pretrained(tmp_path)
    again = SpeechLM.from_pretrained(tmp_path)
    assert again.layout == LAYOUT and again.config == model.config
    ids, position, bounds = rows([5, 3])
    assert torch.equal(again.hidden(ids, position, bounds), model.hidden(ids, position, bounds))
    assert (again.head.weight is again.embedding.weight) == tie_head


def test_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        SpeechLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a model folder"):
        SpeechLM.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        SpeechLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["backbone"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not fit"):
        SpeechLM.from_pretrained(tmp_path)
    settings["model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="another kind of model"):
        SpeechLM.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="backbone"):
        SpeechLM(ModelConfig({"model_type": "no-such-model"}), LAYOUT)


def test_pretrained_backbone_keeps_text_rows(tmp_path: Path) -> None:
    """Body and text rows are the backbone's; new rows have the table's own scale, not its variance."""
    torch.manual_seed(3)
    settings = {k: v for k, v in TINY.llama().items() if k != "model_type"}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=False, **settings))
    torch.nn.init.normal_(theirs.get_input_embeddings().weight, std=0.5)
    theirs.save_pretrained(tmp_path)
    model = make()
    model.load_backbone(tmp_path)
    start, end = LAYOUT.interval("text_bpe")
    assert torch.equal(model.embedding.weight[start:end], theirs.get_input_embeddings().weight)
    assert torch.equal(model.head.weight[start:end], theirs.get_output_embeddings().weight)
    assert torch.equal(model.backbone.layers[1].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight)
    new = model.embedding.weight.detach()[1:start]
    assert 0.4 < float(new.std()) < 0.7 and not model.embedding.weight[LAYOUT.pad_id].any()
    tied = make(tie_head=True)
    tied.load_backbone(tmp_path)
    assert tied.head.weight is tied.embedding.weight
    assert torch.equal(tied.head.weight[start:end], theirs.get_input_embeddings().weight)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        model.load_backbone(tmp_path / "nowhere")


def test_attention_choice_says_why() -> None:
    name, reason = choose_attention("cpu", torch.float32)
    assert name == "sdpa" and "no CUDA device" in reason
