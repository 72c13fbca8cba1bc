"""Perplexity against an independent computation: one utterance at a time, logits and softmax written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from python_tests.data.sequence_oracle import assemble
from speechlm_ext import SpeechLM
from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.data.tokens.format import write_index, write_shard
from speechlm_ext.data.tokens.index import shard_name
from speechlm_ext.errors import CheckpointError, ConfigError, LayoutMismatchError
from speechlm_ext.evaluation.perplexity import perplexity
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import FrameTransformerConfig, ModelConfig
from speechlm_ext.tasks import builtin_tasks

LAYOUT = TokenLayout.build(ssl=12, codec=[8] * 2, text=30)
TASKS = ("codec_ssl_asr", "codec_ssl_audiolm", "textlm")


def tiny_model(layout: TokenLayout = LAYOUT, frame: FrameTransformerConfig | None = None) -> SpeechLM:
    backbone = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(1)
    tasks = tuple(builtin_tasks()[t] for t in TASKS)
    model = SpeechLM(ModelConfig(backbone, tasks, frame_transformer=frame), layout)
    # Far from uniform, so that a wrong alignment shows.
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    rows = []
    for i, (text, speech) in enumerate([(3, 5), (1, 9), (6, 2)]):
        rows.append({"id": f"u{i}", "dataset": "d", "speaker": "s", "lang": "en", "duration": speech / 50})
        rows[-1] |= {"text": "ab " * text, "text_bpe": rng.integers(0, 30, (text, 1))}
        rows[-1] |= {"ssl": rng.integers(0, 12, (speech, 1)), "codec": rng.integers(0, 8, (speech, 2))}
    write_shard(tmp_path / "t" / shard_name(0), rows, LAYOUT)
    write_index(tmp_path / "t", LAYOUT, 1)
    return tmp_path / "t"


def naive(model: SpeechLM, tokens: Path, task: str) -> dict[str, tuple[float, int]]:
    """``{interval name: (nll, count)}`` with every utterance by itself."""
    sums: dict[str, tuple[float, int]] = {}
    folder, layout = TokenFolder.open(tokens), model.layout
    names = {i: n.name for n in layout.intervals for i in range(n.start, n.end)}
    for number in range(len(folder)):
        frames, weight = assemble(
            builtin_tasks()[task], folder.utterance(number), layout, None, LossWeights()
        )
        length, streams = frames.shape
        delayed = np.zeros_like(frames)
        live = np.zeros((length, streams), bool)
        for s, delay in enumerate(layout.delays):
            delayed[delay:, s] = frames[: length - delay, s]
            live[delay:, s] = weight[: length - delay, s] > 0
        with torch.no_grad():
            ids = torch.from_numpy(delayed)
            hidden = model.hidden(ids, torch.arange(length), torch.tensor([0, length], dtype=torch.int32))
            for s, scope in enumerate(layout.scopes("own")):
                chosen = torch.cat([torch.arange(a, b) for a, b in scope])
                vector = model.head.stream_embed[s - 1] if s else 0.0
                h = hidden
                if s and model.frame is not None:
                    h = model.frame(hidden, model.embedding(ids.roll(-1, 0)[:, :-1, None]))[:, s - 1]
                log_p = torch.log_softmax((h + vector) @ model.head.weight[chosen].T, dim=-1)
                for n in range(length - 1):
                    target = int(delayed[n + 1, s])
                    if live[n + 1, s]:
                        nll, count = sums.get(names[target], (0.0, 0))
                        nll -= float(log_p[n, (chosen == target).nonzero().item()])
                        sums[names[target]] = (nll, count + 1)
    return sums


@pytest.mark.parametrize("multiscale", [False, True])
def test_equals_a_naive_computation(tokens: Path, multiscale: bool):
    """Also under other delays than those of the token folder: they are the model's."""
    frame = FrameTransformerConfig(hidden_size=8, num_layers=1, num_heads=2, ffn_size=8)
    model = tiny_model(LAYOUT.with_delays([0, 0, 0]), frame) if multiscale else tiny_model()
    found = perplexity(model, str(tokens), budget=24)
    audio = naive(model, tokens, "codec_ssl_audiolm")
    codec = [audio[f"codec{k}"] for k in range(2)]
    nll, count = sum(c[0] for c in codec), sum(c[1] for c in codec)
    part = found["codec_ssl_audiolm"]
    assert part["codec"]["count"] == count == 2 * (5 + 9 + 2)
    assert part["codec"]["ppl"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert part["ssl"]["ppl"] == pytest.approx(math.exp(audio["ssl"][0] / audio["ssl"][1]), rel=1e-4)
    assert part["audio"]["count"] == 3 * (5 + 9 + 2)
    for task in ("textlm", "codec_ssl_asr"):
        expected = naive(model, tokens, task)
        nll, count = (expected["text_bpe"][i] + expected["special"][i] for i in (0, 1))
        text = found[task]["text"]
        assert text["count"] == count == (3 + 1 + 6) + 3
        assert text["ppl"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    # Ten words and three ends: the same nll over another count.
    assert found["textlm"]["text_per_word"]["count"] == 13
    assert found["textlm"]["samples"] == 3
    assert perplexity(model, str(tokens), ["textlm"], limit=1)["textlm"]["text"]["count"] == 4


def test_other_tokens_are_refused(tokens: Path):
    with pytest.raises(LayoutMismatchError, match="vocabulary"):
        perplexity(tiny_model(TokenLayout.build(ssl=12, codec=[8] * 2, text=31)), str(tokens))
    with pytest.raises(ConfigError, match="ssl_asr"):
        perplexity(tiny_model(), str(tokens), ["ssl_asr"])


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_log_probabilities_that_are_not_finite_are_no_score(tokens: Path, value: float):
    """1e38 is a finite weight, but its logits are not; neither may end as NaN or as a huge but plausible number."""
    model = tiny_model()
    with torch.no_grad():
        model.head.weight.fill_(value)
        model.head.weight[::2] *= -1
    with pytest.raises(CheckpointError, match="not finite for textlm, among the samples u"):
        perplexity(model, tokens, ["textlm"])
