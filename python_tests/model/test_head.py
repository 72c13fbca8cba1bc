"""MultiStreamHead: kinds of rows from labels, separate heads, and their losses against a naive one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from python_tests.model.test_lm import LAYOUT, make, rows
from speechlm_ext import SpeechLM
from speechlm_ext.errors import ConfigError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import LossSettings, ModelConfig
from speechlm_ext.ops import PackedBatch, separate_head_rows

SSL, TEXT, SPECIAL = LAYOUT.interval("ssl"), LAYOUT.interval("text_bpe"), LAYOUT.interval("special")
END = LAYOUT.sos_eos_id


def test_modality_preset() -> None:
    kinds = LAYOUT.scopes("modality")
    assert LAYOUT.stream0_contents() == [SSL, TEXT]
    assert kinds[0][0] == [(0, SSL[1])]  # special and ssl ids lie side by side
    assert kinds[1][0] == [SPECIAL, TEXT]
    assert kinds[2] == LAYOUT.scopes("own")
    assert kinds[0][1:] == kinds[1][1:] == LAYOUT.scopes("own")[1:]


def test_rows_are_of_the_modality_of_their_label() -> None:
    model = make(loss=LossSettings(scope="modality"))
    s, t, p = SSL[0], TEXT[1] - 1, LAYOUT.pad_id
    cases = [  # label of stream 0, whether it is learnt, kind
        (END, True, 2),  # a special token before any content
        (t, True, 1),
        (END, True, 1),  # the end of a text
        (p, False, 1),  # without a loss a row keeps the kind before it
        (END, True, 2),  # not right after content
        (s, True, 0),
        (s, True, 0),
        (END, True, 0),
        (t, False, 0),  # a condition: nothing is learnt
        (t, True, 1),
        (END, True, 1),
        (END, True, 2),  # after an end, which is no content
    ]
    labels = torch.full((len(cases), LAYOUT.num_streams), p)
    labels[:, 0] = torch.tensor([label for label, _, _ in cases])
    weight = torch.zeros(labels.shape)
    weight[:, 0] = torch.tensor([float(learnt) for _, learnt, _ in cases])
    assert model.head.row_scope(labels, weight).tolist() == [kind for _, _, kind in cases]
    assert model.head.row_scope(labels[:0], weight[:0]).tolist() == []
    assert make().head.row_scope(labels, weight) is None


@pytest.mark.parametrize("heads", ["shared", "separate"])
@pytest.mark.parametrize("scope", ["own", "codec", "modality"])
def test_loss_is_the_naive_one(scope: str, heads: str) -> None:
    model = make(loss=LossSettings(scope=scope, recompute=heads == "separate"), heads=heads)
    ids, position, bounds = rows([6, 5])
    labels, weight = ids.roll(-1, 0), torch.rand(11, LAYOUT.num_streams)
    labels[3, 0], labels[4, 0] = TEXT[0], END
    weight[labels == LAYOUT.pad_id] = 0
    weight[4:7, 0] = 1
    labels[5:7, 0] = SSL[0]
    out = model(ids, labels, weight, position, bounds)
    hidden = model.hidden(ids, position, bounds)
    kinds = model.head.row_scope(labels, weight)
    sets = LAYOUT.scopes(scope) if kinds is not None else [LAYOUT.scopes(scope)]
    expected = hidden.new_zeros(())
    for n, s in (weight > 0).nonzero().tolist():
        ranges = sets[0 if kinds is None else int(kinds[n])][s]
        columns = torch.cat([torch.arange(a, b) for a, b in ranges])
        own = torch.cat(
            [torch.arange(r.start, r.stop) for r in (model.head.rows_of(s, a, b) for a, b in ranges)]
        )
        vectors = model.head.stream_vectors()
        logits = (hidden[n] if vectors is None else hidden[n] + vectors[s]) @ model.head.weight[own].T
        log_p = F.log_softmax(logits, dim=0)
        expected = expected - weight[n, s] * log_p[(columns == labels[n, s]).nonzero()[0, 0]]
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-4, atol=1e-5)
    logprobs, entropy = model.logprobs(ids, labels, weight > 0, position, bounds)
    torch.testing.assert_close(-(logprobs * weight).sum(), expected, rtol=1e-4, atol=1e-5)
    assert not logprobs[weight == 0].any() and (entropy[weight > 0] > 0).all()
    ours = torch.autograd.grad(out.loss_sum, model.head.weight)[0]
    theirs = torch.autograd.grad(expected, model.head.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_separate_heads_have_rows_of_their_own(tmp_path: Path) -> None:
    layout = TokenLayout.build(ssl=6, codec=(4, 4), text=9)
    model = SpeechLM(
        ModelConfig(make().config.backbone, loss=LossSettings(scope="codec"), heads="separate"), layout
    )
    codec, V = 8, layout.vocab_size
    assert model.head.weight.shape[0] == separate_head_rows(layout.scopes("codec")) == V + 2 * codec
    assert model.head.stream_vectors() is None
    start, end = layout.interval("codec")
    assert model.head.rows_of(0, start, end) == slice(start, end)
    assert model.head.rows_of(1, start, end) == slice(V, V + codec)
    assert model.head.rows_of(2, start + 2, end) == slice(V + codec + 2, V + 2 * codec)
    with pytest.raises(ConfigError, match="stream 1 has no output rows for ids 0 to 3: with separate heads"):
        model.scope_head([[], [(0, 4)], []])
    model.save_pretrained(tmp_path)
    again = SpeechLM.from_pretrained(tmp_path)
    assert again.config.heads == "separate" and torch.equal(again.head.weight, model.head.weight)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="tie_head needs heads 'shared'"):
        make(tie_head=True, heads="separate")
    with pytest.raises(ConfigError, match="heads must be 'shared' or 'separate', got 'own'"):
        make(heads="own")
    with pytest.raises(ConfigError, match="must be 'full', 'codec', 'own' or 'modality', got 'x'"):
        LossSettings(scope="x")


@pytest.mark.parametrize("heads", ["shared", "separate"])
@pytest.mark.parametrize("scope", ["full", "codec", "own", "modality"])
def test_a_batch_known_on_the_host_has_the_same_loss(
    scope: str, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and nothing is looked for in the batch: no value decides a size."""
    torch.manual_seed(0)
    model = make(loss=LossSettings(scope=scope), heads=heads)
    ids, position, bounds = rows([7, 12])
    labels, weight = ids.roll(-1, 0), torch.rand(19, LAYOUT.num_streams)
    labels[4:9, 0] = torch.randint(*TEXT, (5,))
    weight[labels == LAYOUT.pad_id] = 0
    weight[4:9, 1:] = weight[2] = 0
    batch = PackedBatch(ids, labels, weight, position, bounds)
    arguments = (ids, labels, weight, position, bounds)
    expected = model(*arguments)
    expected.loss_sum.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    facts = model.facts(batch)
    assert facts.bounds == (0, 7, 19) and facts.loss_rows.num_rows == 19
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    found = model(*arguments, facts=facts)
    assert torch.equal(found.loss_sum, expected.loss_sum) and torch.equal(
        found.stream_count, expected.stream_count
    )
    found.loss_sum.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
