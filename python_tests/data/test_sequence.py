"""Sequences: against an independent loop, and against frames written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.data.sequence_oracle import assemble
from speechlm_ext.data.batch import Sample, SequencePacker
from speechlm_ext.data.sequence import LossWeights, sequence_length
from speechlm_ext.errors import ConfigError, LayoutError, ShardError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tasks import TaskTemplate, builtin_tasks, parse_templates

TASKS = builtin_tasks()
CODEC_SSL = TokenLayout.build(ssl=20, codec=[16] * 3, text=50)
CODEC = TokenLayout.build(codec=[16] * 3, text=50)
PARALLEL = TokenLayout.build(ssl=20, codec=[16] * 3, text=50, delays=[0, 0, 0, 0])
SSL_ONLY = TokenLayout.build(ssl=20, text=50)


def packed(
    template: TaskTemplate,
    u: dict[str, Any],
    layout: TokenLayout,
    prompt: np.ndarray | None = None,
    weights: LossWeights = LossWeights(),  # noqa: B008 - frozen
) -> tuple[np.ndarray, np.ndarray]:
    """The packed sequence of one sample, as undelayed frames and their weights."""
    batch = SequencePacker(layout, weights).pack([Sample(template, u, prompt)])
    rows = len(batch.ids)
    assert batch.position.tolist() == list(range(rows)) and batch.cu_seqlens.tolist() == [0, rows]
    assert torch.equal(batch.labels[:-1], batch.ids[1:]) and (batch.labels[-1] == layout.pad_id).all()
    assert batch.loss_weight[-1].sum() == 0
    pads, nothing = (
        np.full((rows, layout.num_streams), layout.pad_id),
        np.zeros((rows, layout.num_streams), np.float32),
    )
    frames, weight = pads.copy(), nothing.copy()
    own = np.concatenate([nothing[:1], batch.loss_weight.numpy()[:-1]])
    for s, d in enumerate(layout.delays):
        frames[: rows - d, s] = batch.ids[d:, s]
        weight[: rows - d, s] = own[d:, s]
        assert (batch.ids[:d, s] == layout.pad_id).all() and (own[:d, s] == 0).all()
    return frames, weight


def possible(layout: TokenLayout) -> list[TaskTemplate]:
    return [t for t in TASKS.values() if all(layout.has(e.modality) for e, _ in t.entries)]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_matches_a_loop_and_its_length_formula(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from([CODEC_SSL, CODEC, PARALLEL, SSL_ONLY]))
    template = data.draw(st.sampled_from(possible(layout)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    text, ssl, codec, prompt_len = (data.draw(st.integers(1, 6)) for _ in range(4))
    u = {
        "id": "u",
        "text_bpe": rng.integers(0, 50, (text, 1)),
        "ssl": rng.integers(0, 20, (ssl, 1)),
        "codec": rng.integers(0, 16, (codec, 3)),
    }
    width = layout.num_codebooks + layout.has("codec_ssl")
    prompt = rng.integers(0, 16, (prompt_len, width)) if layout.has("spk") else None
    weights = LossWeights(
        text=1.5, ssl=0.25, codec=0.75, special=2.0, region=data.draw(st.sampled_from(["target", "all"]))
    )
    frames, weight = packed(template, u, layout, prompt, weights)
    ids, expected = assemble(template, u, layout, prompt, weights)
    assert frames.tolist() == ids.tolist()
    assert np.allclose(weight, expected, atol=1e-7)
    lengths = {"text_bpe": text, "ssl": ssl, "codec": codec, "spk": prompt_len}
    assert sequence_length(template, lengths, layout) == len(frames)
    arrays = {k: np.array([v, v + 1]) for k, v in lengths.items()}
    assert sequence_length(template, arrays, layout)[0] == len(frames)


def test_frames_by_hand() -> None:
    layout = TokenLayout.build(ssl=5000, codec=[1024] * 2, text=100)
    # special [0,256) | ssl [256,5256) | codec0 [5256,6280) | codec1 [6280,7304) | text [7304,7404)
    u = {
        "id": "u",
        "text_bpe": np.array([[3], [0]]),
        "ssl": np.array([[0], [4999]]),
        "codec": np.array([[0, 1023], [7, 0], [9, 9]]),
    }
    asr, weight = packed(TASKS["codec_ssl_asr"], u, layout)
    assert asr.tolist() == [
        [5, 0, 0],
        [80, 0, 0],
        [34, 0, 0],
        [256, 5256, 7303],
        [5255, 5263, 6280],
        [0, 0, 0],
        [0, 0, 0],
        [35, 0, 0],
        [7307, 0, 0],
        [7304, 0, 0],
        [5, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]
    assert weight.sum() == 3 and weight[8:11, 0].tolist() == [1, 1, 1]
    tts, weight = packed(TASKS["codec_ssl_plain_tts"], u, layout)
    assert tts[:, 0].tolist() == [5, 82, 35, 7307, 7304, 0, 0, 34, 256, 5255, 5, 0, 0]
    assert weight[8:10].tolist() == [[0.5, 0.25, 0.25]] * 2 and weight[10].tolist() == [1, 0, 0]
    assert weight.sum() == 3.0


def test_codec_weight_is_shared_over_the_codebooks() -> None:
    layout = TokenLayout.build(ssl=5000, codec=[1024] * 8, text=49152, g2p=70)
    assert LossWeights().of_streams("codec_ssl", layout).tolist() == [0.5] + [0.0625] * 8
    assert LossWeights().of_streams("text_bpe", layout).tolist() == [1.0] + [0.0] * 8
    assert LossWeights(ssl=0.25).of_streams("ssl", layout).tolist() == [0.25] + [0.0] * 8
    alone = TokenLayout.build(codec=[1024] * 8, text=10)
    assert LossWeights().of_streams("codec", alone).tolist() == [0.0625] * 8


def test_the_end_of_a_target_counts_as_much_as_a_frame_of_it() -> None:
    layout = TokenLayout.build(ssl=5000, codec=[1024] * 8, text=49152)
    weights = LossWeights(text=4.0, ssl=0.5, codec=0.5, special=0.5)
    assert weights.of_end("text_bpe", layout) == 2.0
    assert weights.of_end("codec_ssl", layout) == 0.5
    assert weights.of_end("ssl", layout) == 0.25
    u = {"id": "u", "text_bpe": np.array([[1], [2]]), "ssl": np.array([[2]]), "codec": np.zeros((1, 8), int)}
    _, weight = packed(TASKS["codec_ssl_asr"], u, layout, None, weights)
    assert weight[weight > 0].tolist() == [4.0, 4.0, 2.0]


def test_chain_of_targets() -> None:
    chain = parse_templates(
        "- {name: st, id: 112, kind: st, conditions: [], targets: [[text, text_bpe], [audio, ssl]]}",
        "x",
        [112],
    )
    layout = TokenLayout.build(ssl=4, text=6, tasks={**TASKS, **chain})
    u = {"id": "u", "text_bpe": np.array([[1]]), "ssl": np.array([[2]])}
    frames, weight = packed(chain["st"], u, layout)
    assert frames[:, 0].tolist() == [5, 112, 35, 261, 5, 33, 258, 5]
    assert weight[:, 0].tolist() == [0, 0, 0, 1, 1, 0, 0.5, 0.5]


def test_rejects_what_does_not_fit() -> None:
    u = {"id": "u7", "text_bpe": np.array([[1]]), "ssl": np.array([[2]]), "codec": np.array([[1, 2, 3]])}
    with pytest.raises(ShardError, match="'u7' has no text_bpe tokens"):
        packed(TASKS["textlm"], {**u, "text_bpe": None}, CODEC_SSL)
    with pytest.raises(ShardError, match="'u7': codec_ssl content has 3 streams but layout .* has 4"):
        packed(TASKS["codec_ssl_audiolm"], {**u, "codec": np.array([[1, 2]])}, CODEC_SSL)
    with pytest.raises(
        ShardError, match=r"'u7': text_bpe ids of stream 0 must be in \[0, 50\), got 50 to 50"
    ):
        packed(TASKS["textlm"], {**u, "text_bpe": np.array([[50]])}, CODEC_SSL)
    with pytest.raises(ShardError, match="must be in"):
        packed(TASKS["textlm"], {**u, "text_bpe": np.array([[-1]])}, CODEC_SSL)
    with pytest.raises(LayoutError, match="needs a speaker prompt"):
        packed(TASKS["codec_ssl_tts"], u, CODEC_SSL)
    with pytest.raises(LayoutError, match="cannot hold 'codec' content"):
        packed(TASKS["audiolm"], u, CODEC_SSL)
    with pytest.raises(ConfigError, match="'text' must be a number >= 0, got -1"):
        LossWeights(text=-1)
    with pytest.raises(ConfigError, match="region"):
        LossWeights(region="some")  # type: ignore[arg-type]
