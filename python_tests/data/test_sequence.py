"""Sequences: against an independent loop, and against frames written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm_ext.data.sequence import LossWeights, assemble, sequence_length
from speechlm_ext.errors import ConfigError, LayoutError, ShardError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tasks import TaskTemplate, builtin_tasks, parse_templates

TASKS = builtin_tasks()
CODEC_SSL = TokenLayout.build(ssl=20, codec=[16] * 3, text=50)
CODEC = TokenLayout.build(codec=[16] * 3, text=50)
PARALLEL = TokenLayout.build(ssl=20, codec=[16] * 3, text=50, delays=[0, 0, 0, 0])
SSL_ONLY = TokenLayout.build(ssl=20, text=50)


def oracle(
    template: TaskTemplate, u: dict[str, Any], layout: TokenLayout, prompt: np.ndarray | None, w: LossWeights
) -> tuple[list[list[int]], list[list[float]]]:
    """The same frames, one token at a time."""
    S = layout.num_streams
    ids: list[list[int]] = []
    weight: list[list[float]] = []

    def special(token: int, learnt: float) -> None:
        ids.append([token] + [0] * (S - 1))
        weight.append([learnt] + [0.0] * (S - 1))

    everything = w.region == "all"
    special(5, 0.0)
    special(dict(layout.special)[f"task:{template.name}"], w.special if everything else 0.0)
    for entry, is_target in template.entries:
        special(dict(layout.special)[f"modality:{entry.modality}"], w.special if everything else 0.0)
        if entry.modality in ("text_bpe", "ssl"):
            columns, starts = [u[entry.modality][:, 0]], [layout.interval(entry.modality)[0]]
            each = [w.text if entry.modality == "text_bpe" else w.ssl]
        else:
            K = layout.num_codebooks
            with_ssl = layout.has("codec_ssl")
            if entry.modality == "spk":
                assert prompt is not None
                columns = [prompt[:, c] for c in range(prompt.shape[1])]
            else:
                columns = ([u["ssl"][:, 0]] if with_ssl else []) + [u["codec"][:, c] for c in range(K)]
            starts = ([layout.interval("ssl")[0]] if with_ssl else []) + [
                layout.interval(f"codec{k}")[0] for k in range(K)
            ]
            each = [w.ssl] * with_ssl + [w.codec / K] * K
        for t in range(min(len(c) for c in columns)):
            ids.append(
                [int(c[t]) + s for c, s in zip(columns, starts, strict=True)] + [0] * (S - len(columns))
            )
            learnt = is_target or everything
            weight.append([x * learnt for x in each] + [0.0] * (S - len(columns)))
        if is_target:
            # As much as one frame of the content that it ends.
            special(5, w.special * sum(each))
        for _ in range(max(layout.delays)):
            special(0, 0.0)
    return ids, weight


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
    frames, weight = assemble(template, u, layout, prompt, weights)
    ids, expected = oracle(template, u, layout, prompt, weights)
    assert frames.dtype == np.int64 and weight.dtype == np.float32
    assert frames.tolist() == ids
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
    asr, weight = assemble(TASKS["codec_ssl_asr"], u, layout)
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
    tts, weight = assemble(TASKS["codec_ssl_plain_tts"], u, layout)
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
    _, weight = assemble(TASKS["codec_ssl_asr"], u, layout, None, weights)
    assert weight[weight > 0].tolist() == [4.0, 4.0, 2.0]


def test_chain_of_targets() -> None:
    chain = parse_templates(
        "- {name: st, id: 112, kind: st, conditions: [], targets: [[text, text_bpe], [audio, ssl]]}",
        "x",
        [112],
    )
    layout = TokenLayout.build(ssl=4, text=6, tasks={**TASKS, **chain})
    u = {"id": "u", "text_bpe": np.array([[1]]), "ssl": np.array([[2]])}
    frames, weight = assemble(chain["st"], u, layout)
    assert frames[:, 0].tolist() == [5, 112, 35, 261, 5, 33, 258, 5]
    assert weight[:, 0].tolist() == [0, 0, 0, 1, 1, 0, 0.5, 0.5]


def test_rejects_what_does_not_fit() -> None:
    u = {"id": "u7", "text_bpe": np.array([[1]]), "ssl": np.array([[2]]), "codec": np.array([[1, 2, 3]])}
    with pytest.raises(ShardError, match="'u7' has no text_bpe tokens"):
        assemble(TASKS["textlm"], {**u, "text_bpe": None}, CODEC_SSL)
    with pytest.raises(ShardError, match="'u7': codec_ssl content has 3 streams but layout .* has 4"):
        assemble(TASKS["codec_ssl_audiolm"], {**u, "codec": np.array([[1, 2]])}, CODEC_SSL)
    with pytest.raises(
        ShardError, match=r"'u7': text_bpe ids of stream 0 must be in \[0, 50\), got 50 to 50"
    ):
        assemble(TASKS["textlm"], {**u, "text_bpe": np.array([[50]])}, CODEC_SSL)
    with pytest.raises(ShardError, match="must be in"):
        assemble(TASKS["textlm"], {**u, "text_bpe": np.array([[-1]])}, CODEC_SSL)
    with pytest.raises(LayoutError, match="needs a speaker prompt"):
        assemble(TASKS["codec_ssl_tts"], u, CODEC_SSL)
    with pytest.raises(LayoutError, match="cannot hold 'codec' content"):
        assemble(TASKS["audiolm"], u, CODEC_SSL)
    with pytest.raises(ConfigError, match="'text' must be a number >= 0, got -1"):
        LossWeights(text=-1)
    with pytest.raises(ConfigError, match="region"):
        LossWeights(region="some")  # type: ignore[arg-type]
