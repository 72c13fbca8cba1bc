"""Backbones: text logits, gradients and decoding are the pretrained model's own, or the backbone is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

from python_tests.model.backbone.table import quiet, settings_of
from speechlm_ext import SpeechLM
from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import LossSettings, ModelConfig
from speechlm_ext.model.backbone.body import BackboneError, backbone_settings, max_positions
from speechlm_ext.model.backbone.proof import probe_backbone
from speechlm_ext.tokenizers.text.huggingface import HuggingFaceText

quiet()
NUM_TEXT = 60
LAYOUT = TokenLayout.build(ssl=6, codec=[5, 5], text=NUM_TEXT)
TEXT = slice(*LAYOUT.interval("text_bpe"))
#: One of each part that is carried, and classes that do not pass keywords on to their attention.
KINDS = ("cohere", "gemma2", "gemma3_text", "gpt_oss", "granite", "mistral", "phi", "qwen2", "stablelm")
REFUSED = {
    "bloom": "logits of one segment differ from its own code's",
    "lfm2": "in a pack the logits of a segment depend on its neighbour",
    "mamba": "in a pack the logits of a segment depend on its neighbour",
    "qwen3_5": "holds other models beside its text decoder",
    "whisper": "not a text decoder alone",
}


def pretrained(kind: str, folder: Path, **changes: Any) -> Any:
    """A small causal LM whose every part matters, in ``folder``."""
    torch.manual_seed(3)
    settings = settings_of(kind) | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, **changes: Any) -> SpeechLM:
    model = SpeechLM(ModelConfig(backbone_settings(folder), **changes), LAYOUT).eval()
    model.load_backbone(folder)
    return model


def rows_of(*segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.full((sum(map(len, segments)), LAYOUT.num_streams), LAYOUT.pad_id)
    ids[:, 0] = torch.cat(segments) + TEXT.start
    position = torch.cat([torch.arange(len(s)) for s in segments])
    return ids, position, torch.tensor([0, *map(len, segments)]).cumsum(0).to(torch.int32)


def text_logits(model: SpeechLM, hidden: torch.Tensor) -> torch.Tensor:
    """As decoding computes them."""
    return model.scope_head([[(TEXT.start, TEXT.stop)], [], []])(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_text_logits_are_the_pretrained_models(kind: str, tmp_path: Path) -> None:
    """Through the loss, through packed rows, through cache and head, and after the way through a checkpoint."""
    theirs = pretrained(kind, tmp_path / "theirs")
    loaded(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    model = SpeechLM.from_pretrained(tmp_path / "ours")
    a, b = torch.randint(0, NUM_TEXT, (17,)), torch.randint(0, NUM_TEXT, (11,))
    ids, position, bounds = rows_of(a, b)
    with torch.no_grad():
        right = torch.cat([theirs(input_ids=s[None]).logits[0, :, :NUM_TEXT] for s in (a, b)])
        atol = 1e-4 * float(right.abs().max())
        packed = text_logits(model, model.hidden(ids, position, bounds))
        torch.testing.assert_close(packed, right, rtol=0, atol=atol)
        cache = model.new_cache(2, 4)
        parts = [model.prefill(torch.cat((ids[:5], ids[17:20])), cache, [0, 1], [5, 3])]
        parts += [model.step_hidden(torch.stack((ids[5 + i], ids[20 + i])), cache) for i in range(8)]
        stepped = text_logits(model, torch.cat(parts))
        order = [*range(5), *range(17, 20), *(n for i in range(8) for n in (5 + i, 20 + i))]
        torch.testing.assert_close(stepped, right[order], rtol=0, atol=atol)
        # The op scores over its scope: the same logits beside those of the ids that the scope has more.
        labels = ids.roll(-1, 0)
        asked = torch.zeros_like(labels, dtype=torch.bool)
        asked[:-1, 0] = True
        logprobs, _ = model.logprobs(ids, labels, asked, position, bounds)
        scope = torch.cat([torch.arange(*r) for r in LAYOUT.scopes("own")[0]])
        full = model.scope_head([LAYOUT.scopes("own")[0], [], []])(model.hidden(ids, position, bounds))
        full[:, (scope >= TEXT.start) & (scope < TEXT.stop)] = right
        place = torch.searchsorted(scope, labels[:-1, 0].contiguous())
        wanted = full.log_softmax(-1)[torch.arange(len(place)), place]
        torch.testing.assert_close(logprobs[:-1, 0], wanted, rtol=0, atol=3 * atol)


@pytest.mark.parametrize("kind", ("gemma2", "gpt_oss", "mistral", "stablelm"))
def test_gradients_are_the_pretrained_models(kind: str, tmp_path: Path) -> None:
    theirs = pretrained(kind, tmp_path)
    model = loaded(tmp_path)
    segments = [torch.randint(0, NUM_TEXT, (n,)) for n in (14, 9)]
    right = sum(
        F.cross_entropy(theirs(input_ids=s[None]).logits[0, :-1, :NUM_TEXT], s[1:], reduction="sum")
        for s in segments
    )
    right.backward()
    hidden = model.hidden(*rows_of(*segments))
    logits = model.transforms.to_logits(
        F.linear(hidden / model.transforms.logit_scale, model.head.weight[TEXT])
    )
    last = torch.tensor([13, 22])
    keep = torch.ones(23, dtype=torch.bool)
    keep[last] = False
    F.cross_entropy(logits[keep], torch.cat([s[1:] for s in segments]), reduction="sum").backward()
    ours = dict(model.backbone.named_parameters())
    for name, parameter in theirs.base_model.named_parameters():
        if name in ours and parameter.grad is not None:
            wanted, found = parameter.grad, ours[name].grad
            assert found is not None, name
            assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max()) + 1e-6, name


@pytest.mark.parametrize("kind, reason", REFUSED.items())
def test_what_would_differ_is_refused_by_name(kind: str, reason: str) -> None:
    with pytest.raises(BackboneError, match=f"model type '{kind}'.*{reason}"):
        SpeechLM(ModelConfig(settings_of(kind)), LAYOUT)


def test_the_check_can_be_left_out_and_the_model_says_so(tmp_path: Path) -> None:
    pretrained("lfm2", tmp_path / "theirs")
    model = loaded(tmp_path / "theirs", verify_backbone=False)
    assert "NOT compared" in model.describe_backbone()
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["verify_backbone"] is False
    assert SpeechLM.from_pretrained(tmp_path / "ours").config.verify_backbone is False


def test_loaded_weights_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that only the loaded model has is noticed when its weights are there."""
    pretrained("llama", tmp_path)
    model = SpeechLM(ModelConfig(backbone_settings(tmp_path)), LAYOUT).eval()
    model.backbone.layers[1].self_attn.scaling *= 1.01
    with pytest.raises(BackboneError, match="model type 'llama': the logits of one segment differ"):
        model.load_backbone(tmp_path)


def test_a_checkpoint_of_a_release_that_left_parts_out_is_refused(tmp_path: Path) -> None:
    for kind, message in (("mistral", "a sliding window"), ("phi", "has_bias=True")):
        pretrained(kind, tmp_path / kind)
        loaded(tmp_path / kind).save_pretrained(tmp_path / f"{kind}-ours")
        config = tmp_path / f"{kind}-ours" / "config.json"
        data = json.loads(config.read_text())
        del data["revision"], data["verify_backbone"]
        config.write_text(json.dumps(data))
        (config.parent / "digests.json").unlink()  # as of that release
        with pytest.raises(CheckpointError, match=f"left out parts of backbone '{kind}' .*{message}"):
            SpeechLM.from_pretrained(tmp_path / f"{kind}-ours")


def test_a_soft_cap_of_ones_own_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"loss.softcap is 5.0, but the backbone caps its logits at 30.0"):
        SpeechLM(ModelConfig(settings_of("gemma2"), loss=LossSettings(softcap=5.0)), LAYOUT)


def test_sequences_end_where_positions_start_to_depend_on_neighbours() -> None:
    settings = settings_of("phi3") | {"sliding_window": None, "original_max_position_embeddings": 32}
    settings["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    model = SpeechLM(ModelConfig(settings), LAYOUT)
    assert model.backbone.config.max_position_embeddings == 128
    assert model.max_positions == max_positions(model.backbone.config) == 32


def test_rows_beyond_which_rotary_embeddings_change_are_refused(tmp_path: Path) -> None:
    """A longer sample would change the states of its neighbours in the pack and of the rows in the cache."""
    settings = settings_of("llama") | {"max_position_embeddings": 32}
    settings["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = SpeechLM(ModelConfig(settings), LAYOUT).eval()
    with torch.no_grad():
        ids, position, bounds = rows_of(torch.arange(33), torch.arange(9))
        message = r"a sequence has 33 rows.*'llama' change beyond 32 rows"
        with pytest.raises(ConfigError, match=message):
            model.hidden(ids, position, bounds)
        with pytest.raises(ConfigError, match=message):
            model.prefill(ids, model.new_cache(2, 4), [0, 1], [33, 9])
        cache = model.new_cache(2, 4)
        model.prefill(torch.cat((ids[:31], ids[33:36])), cache, [0, 1], [31, 3])
        model.step_hidden(torch.stack((ids[31], ids[36])), cache)
        with pytest.raises(ConfigError, match=message):
            model.step_hidden(torch.stack((ids[32], ids[37])), cache)
        # A slot that only fills a step up stays empty, however many steps there are.
        right = model.hidden(*rows_of(torch.arange(9)))
        cache = model.new_cache(2, 64)
        cache.release(1)
        for row in range(9):
            found = model.step_hidden(ids[row : row + 1].repeat(2, 1), cache)
        torch.testing.assert_close(found[0], right[8])
        assert cache.held == cache.lengths.tolist() == [9, 0]


def test_nothing_random_is_left_in_training() -> None:
    model = SpeechLM(
        ModelConfig(settings_of("gpt2") | {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}), LAYOUT
    )
    row = rows_of(torch.arange(9))
    model.train()
    assert torch.equal(model.hidden(*row), model.hidden(*row))
    said = model.describe_backbone()
    assert all(
        f"{name} 0.3" in said.split("switched off: ")[1]
        for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop")
    )


def words(count: int, folder: Path, first: int = 0) -> str:
    """A tokenizer of ``count`` words; returns its fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"w{first + i}": i for i in range(count)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return HuggingFaceText.from_folder(folder).fingerprint


def test_the_text_tokenizer_must_be_the_backbones(tmp_path: Path) -> None:
    """Another tokenizer of no larger size has other words for the same rows."""
    pretrained("llama", tmp_path)
    own = words(NUM_TEXT, tmp_path)
    other = words(NUM_TEXT, tmp_path / "other", first=1)
    settings = backbone_settings(tmp_path)

    def make(fingerprint: str, **changes: Any) -> SpeechLM:
        layout = TokenLayout.build(ssl=6, codec=[5, 5], text=NUM_TEXT, tokenizers={"text_bpe": fingerprint})
        return SpeechLM(ModelConfig(settings, **changes), layout)

    make(own).load_backbone(tmp_path)
    with pytest.raises(
        BackboneError, match=f"text tokenizer .fingerprint {other[:12]}. is not the backbone's"
    ):
        make(other).load_backbone(tmp_path)
    make(other, verify_backbone=False).load_backbone(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match="its own tokenizer cannot be read"):
        make(own).load_backbone(tmp_path)


def test_probing_changes_no_random_state() -> None:
    probe_backbone.__globals__["_probe"].cache_clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    probe_backbone(settings_of("llama"))
    assert torch.equal(torch.get_rng_state(), before)
