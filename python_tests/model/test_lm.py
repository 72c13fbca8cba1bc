"""The model: packed rows equal lone segments, the loss equals a naive one, files round-trip, damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from speechlm_ext import SpeechLM
from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import HostFacts, LossSettings, ModelConfig
from speechlm_ext.model.backbone.body import BackboneError
from speechlm_ext.ops import PackedBatch
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


def test_facts_on_the_host_stand_for_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = make(), [12, 3, 11]
    ids, position, bounds = rows(lengths)
    labels = ids.roll(-1, 0)
    batch = PackedBatch(ids, labels, (labels != LAYOUT.pad_id).float(), position, bounds)
    inputs = (batch.ids, batch.labels, batch.loss_weight, batch.position)
    expected = model(*inputs, bounds).loss_sum
    facts = HostFacts.read(batch)
    read, tolist = list[torch.Tensor](), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (read.append(self), tolist(self))[1])
    hidden = model.hidden(ids, position, bounds, facts)
    monkeypatch.undo()
    assert not any(tensor is bounds for tensor in read)  # it would wait for a GPU
    assert torch.equal(hidden, model.hidden(ids, position, bounds))
    assert torch.equal(model(*inputs, bounds, facts=facts).loss_sum, expected)


@pytest.mark.parametrize("bounds", [(0, 12, 26), (0, 12, 15, 27)])
def test_facts_of_another_batch_are_refused(bounds: tuple[int, ...]) -> None:
    ids, position, cu_seqlens = rows([12, 3, 11])
    with pytest.raises(
        ConfigError, match=rf"26 positions and 3 sequences.*of {bounds[-1]} and {len(bounds) - 1}\."
    ):
        make().hidden(ids, position, cu_seqlens, HostFacts(bounds))


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


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cache_equals_packed(groups: int) -> None:
    """Prefill in pieces, then row by row in slots that move: the packed form's hidden states."""
    backbone = TINY.llama() | {"num_key_value_heads": groups}
    torch.manual_seed(0)
    model = SpeechLM(ModelConfig(backbone), LAYOUT).eval()
    lengths = [7, 4, 9]
    ids, position, bounds = rows(lengths)
    packed = model.hidden(ids, position, bounds)
    sequences = [ids[a:b] for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    wanted = packed.split(lengths)
    with torch.no_grad():
        cache = model.new_cache(4, 2)  # too short: it grows
        found = model.prefill(torch.cat([sequences[0][:4], sequences[1][:2]]), cache, [0, 1], [4, 2])
        torch.testing.assert_close(found, torch.cat([wanted[0][:4], wanted[1][:2]]), rtol=1e-4, atol=1e-6)
        found = model.prefill(torch.cat([sequences[1][2:3], sequences[2][:6]]), cache, [1, 2], [1, 6])
        torch.testing.assert_close(found, torch.cat([wanted[1][2:3], wanted[2][:6]]), rtol=1e-4, atol=1e-6)
        found = model.step_hidden(torch.stack([sequences[0][4], sequences[1][3], sequences[2][6]]), cache)
        torch.testing.assert_close(
            found, torch.stack([wanted[0][4], wanted[1][3], wanted[2][6]]), rtol=1e-4, atol=1e-6
        )
        # The first sequence ends; the third takes its slot, and a copy of it the next one.
        cache.truncate(0, 0)
        cache.copy(2, [0, 1])
        for row in (7, 8):
            found = model.step_hidden(torch.stack([sequences[2][row]] * 2), cache)
            torch.testing.assert_close(found, wanted[2][row].expand(2, -1), rtol=1e-4, atol=1e-6)
        # Going back: what was there before the last two rows gives the same again.
        cache.truncate(0, 7)
        found = model.prefill(sequences[2][7:], cache, [0], [2])
        torch.testing.assert_close(found, wanted[2][7:], rtol=1e-4, atol=1e-6)


def test_what_is_not_a_number_stays_in_its_slot() -> None:
    model = make()
    ids, position, bounds = rows([5])
    wanted = model.hidden(ids, position, bounds)
    with torch.no_grad():
        cache = model.new_cache(2, 8)
        model.prefill(ids, cache, [0], [5])
        for store in cache.stores():
            store[:] = torch.nan
        cache.restore(0, 0)  # what an earlier request left is not read
        model.prefill(ids[:2], cache, [0], [2])
        model.prefill(ids[:4], cache, [1], [4])
        found = model.step_hidden(torch.stack([ids[2], ids[4]]), cache)
    torch.testing.assert_close(found, wanted[[2, 4]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", ["shared", "separate"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scope_head_is_the_head(heads: str, softcap: float | None) -> None:
    """All streams' logits in one go equal each stream's own, whatever ranges lie side by side."""
    model = make(heads=heads, loss=LossSettings(softcap=softcap))
    torch.manual_seed(0)
    hidden = torch.randn(3, model.head.weight.shape[1])
    text, ssl = LAYOUT.interval("text_bpe"), LAYOUT.interval("ssl")
    codec = [LAYOUT.interval(f"codec{k}") for k in range(LAYOUT.num_codebooks)]
    end = (LAYOUT.sos_eos_id, LAYOUT.sos_eos_id + 1)
    for ranges in (
        [sorted([end, ssl, text]), *([c] for c in codec)],
        [sorted([end, text]), *([] for _ in codec)],
        [sorted([end, ssl]), *([c] for c in codec)],
    ):
        head = model.scope_head(ranges)
        with torch.no_grad():
            found = head(hidden)
            expected = []
            vectors = model.head.stream_vectors()
            for s, parts in enumerate(ranges):
                for a, b in parts:
                    h = hidden if vectors is None else hidden + vectors[s]
                    z = h @ model.head.weight[model.head.rows_of(s, a, b)].T
                    expected.append(z if softcap is None else softcap * torch.tanh(z / softcap))
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-6)
        assert [len(i) for i in head.ids] == [sum(b - a for a, b in parts) for parts in ranges]
        assert sum(count for _, _, count in head.runs) == found.shape[1]
        assert head.used_by(ranges) == [True] * len(head.runs)
    # Only what is asked for is computed.
    head = model.scope_head([sorted([end, ssl, text]), *([c] for c in codec)])
    before = head(hidden).clone()
    used = head.used_by([[end, text], *([] for _ in codec)])
    after = head(hidden * 2, used)
    columns = head.ids[0]
    is_text = (columns >= text[0]) & (columns < text[1])
    is_ssl = (columns >= ssl[0]) & (columns < ssl[1])
    assert not torch.equal(after[:, : len(columns)][:, is_text], before[:, : len(columns)][:, is_text])
    torch.testing.assert_close(after[:, : len(columns)][:, is_ssl], before[:, : len(columns)][:, is_ssl])


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
    with pytest.raises(CheckpointError, match="model.safetensors is a file"):
        SpeechLM.from_pretrained(tmp_path / "model.safetensors")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        SpeechLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["backbone"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not fit"):
        SpeechLM.from_pretrained(tmp_path, verify=False)
    settings["model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="another kind of model"):
        SpeechLM.from_pretrained(tmp_path, verify=False)
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
    with pytest.raises(BackboneError, match="llama.*Its own head is not tied"):
        make(tie_head=True).load_backbone(tmp_path)
    tied = make(tie_head=True, verify_backbone=False)
    tied.load_backbone(tmp_path)
    assert tied.head.weight is tied.embedding.weight
    assert torch.equal(tied.head.weight[start:end], theirs.get_input_embeddings().weight)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        model.load_backbone(tmp_path / "nowhere")
