"""Delay presets against loops that follow each system's own definition, and against the code of transformers."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx


def codes(num_frames, num_streams, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 1000, (num_frames, num_streams), generator=generator)


def block(name, segment, **settings):
    preset = sx.ops.delay_preset(name, segment.shape[1], **settings)
    return sx.ops.delay_pack([segment], **preset)


SIZES = [(1, 1), (7, 1), (1, 4), (3, 4), (50, 4), (50, 9), (20, 17)]


@pytest.mark.parametrize(("num_frames", "num_streams"), SIZES)
def test_espnet_v1(num_frames, num_streams):
    """Stream n is shifted by n into a longer block, whose last S - 1 rows are cut."""
    x = codes(num_frames, num_streams)
    out = torch.zeros(num_frames + num_streams - 1, num_streams, dtype=torch.int64)
    for n in range(num_streams):
        for t in range(num_frames):
            out[t + n, n] = x[t, n]
    batch = block("espnet_v1", x)
    assert torch.equal(batch.ids, out[:num_frames])
    assert batch.loss_weight[-1].sum() == 0


@pytest.mark.parametrize(("num_frames", "num_streams"), SIZES)
def test_espnet_v2(num_frames, num_streams):
    """T + S - 1 rows, each stream with a pad of its own, and the pads are learnt."""
    x = codes(num_frames, num_streams)
    pads = [5000 + 10 * n for n in range(num_streams)]
    batch = block("espnet_v2", x, pad_ids=pads)
    for row in range(num_frames + num_streams - 1):
        for n in range(num_streams):
            frame = row - n
            want = int(x[frame, n]) if 0 <= frame < num_frames else pads[n]
            assert int(batch.ids[row, n]) == want
    assert len(batch.ids) == num_frames + num_streams - 1
    assert torch.equal(batch.loss_weight[:-1], torch.ones(len(batch.ids) - 1, num_streams))
    assert torch.equal(batch.labels[:-1], batch.ids[1:])


@pytest.mark.parametrize(("num_frames", "num_streams"), SIZES)
def test_audiocraft_pattern(num_frames, num_streams):
    """A pattern is a list of steps, each a list of (frame, codebook): the first step is empty, step t + 1 holds
    codebook q of frame t - q; what no step names is the special token."""
    x = codes(num_frames, num_streams)
    steps = [[]]
    for t in range(num_frames + num_streams - 1):
        steps.append([(t - q, q) for q in range(num_streams) if 0 <= t - q < num_frames])
    out = torch.full((len(steps), num_streams), 2048)
    for row, step in enumerate(steps):
        for frame, q in step:
            out[row, q] = x[frame, q]
    assert torch.equal(block("musicgen", x).ids, out)


@pytest.mark.parametrize(("num_frames", "num_codebooks"), [(4, 4), (17, 4), (60, 8)])
@pytest.mark.parametrize("channels", [1, 2])
def test_transformers_musicgen(num_frames, num_codebooks, channels):
    from transformers import MusicgenDecoderConfig
    from transformers.models.musicgen.modeling_musicgen import MusicgenForCausalLM

    config = MusicgenDecoderConfig(
        vocab_size=2048,
        num_hidden_layers=1,
        ffn_dim=8,
        num_attention_heads=1,
        hidden_size=8,
        num_codebooks=num_codebooks,
        audio_channels=channels,
        pad_token_id=2048,
        bos_token_id=2048,
    )
    model = MusicgenForCausalLM(config)
    batch = torch.stack([codes(num_frames, num_codebooks, seed) for seed in range(3)])
    steps = num_codebooks // channels
    # Theirs takes a first column of begin ids and the number of steps; with every frame given nothing is left to
    # generate.
    given = torch.cat([torch.full((3, num_codebooks, 1), 2048), batch.transpose(1, 2)], dim=2)
    _, pattern = model.build_delay_pattern_mask(
        given.reshape(3 * num_codebooks, -1), pad_token_id=2048, max_length=num_frames + steps
    )
    theirs = pattern.view(3, num_codebooks, -1).transpose(1, 2)
    name = "musicgen" if channels == 1 else "musicgen_stereo"
    preset = sx.ops.delay_preset(name, num_codebooks)
    ours = sx.ops.delay_pack(list(batch), **preset)
    assert torch.equal(ours.ids, theirs.reshape(-1, num_codebooks))
    back = sx.ops.delay_unpack(theirs.reshape(-1, num_codebooks), ours.cu_seqlens, delays=preset["delays"])
    assert torch.equal(torch.stack(back), batch)


@pytest.mark.parametrize("delays", [None, [0, 2, 0, 3, 1, 1, 1, 1, 4, 0, 2, 2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("num_frames", [1, 2, 40])
def test_moshi(num_frames, delays):
    """Each stream is rolled by its delay, its first frames replaced by the initial id; a row of initial ids comes
    before; the length stays, so the ends of delayed streams are dropped."""
    x = codes(num_frames, 17)
    shifts = delays or [0] + [0, 1, 1, 1, 1, 1, 1, 1] * 2
    initial = torch.tensor([32000] + [2048] * 16)
    rolled = []
    for k, d in enumerate(shifts):
        line = torch.roll(x[:, k], d)
        line[:d] = initial[k]
        rolled.append(line)
    out = torch.cat([initial[None], torch.stack(rolled, dim=1)])
    batch = block("moshi", x, delays=delays)
    # A frame that does not fit is dropped, never moved to the front.
    keep = torch.tensor([[row - 1 - d >= 0 for d in shifts] for row in range(num_frames + 1)])
    assert torch.equal(batch.ids, torch.where(keep, out, initial))
    assert torch.equal(batch.labels[:-1], batch.ids[1:])
    assert (batch.loss_weight[:-1] > 0).equal(keep[1:])


@pytest.mark.parametrize("num_frames", [1, 9, 64])
def test_dia(num_frames):
    """Row r shows frame r - delay: the begin id before the first frame, the pad after the last."""
    x = codes(num_frames, 9)
    delays = [0, 8, 9, 10, 11, 12, 13, 14, 15]
    batch = block("dia", x)
    assert len(batch.ids) == num_frames + 15
    for row in range(num_frames + 15):
        for c, d in enumerate(delays):
            frame = row - d
            want = 1026 if frame < 0 else 1025 if frame >= num_frames else int(x[frame, c])
            assert int(batch.ids[row, c]) == want


def test_transformers_dia():
    from transformers.models.dia.processing_dia import DiaProcessor

    x = codes(30, 9)
    preset = sx.ops.delay_preset("dia", 9)
    delays = preset["delays"]
    # Theirs keeps the length; frames that are all pad stand for the rows that the delays need.
    padded = torch.cat([x, torch.full((15, 9), 1025)])[None]
    index = DiaProcessor.build_indices(1, 45, 9, delays)
    theirs = DiaProcessor.apply_audio_delay(padded, 1025, 1026, index)[0]
    ours = sx.ops.delay_pack([x], **preset)
    assert torch.equal(ours.ids, theirs)
    index = DiaProcessor.build_indices(1, 45, 9, delays, revert=True)
    reverted = DiaProcessor.apply_audio_delay(theirs[None], 1025, 1026, index)[0]
    assert torch.equal(sx.ops.delay_unpack(ours.ids, ours.cu_seqlens, delays=delays)[0], reverted[:30])


def test_parallel():
    x = codes(11, 5)
    assert torch.equal(block("parallel", x).ids, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sx.ops.delay_preset("delay", 4), "must be one of parallel, espnet_v1"),
        (lambda: sx.ops.delay_preset("espnet_v2", 4), "give pad_ids"),
        (lambda: sx.ops.delay_preset("moshi", 4), r"give delays; the layout's own are for 1 \+ 8 k streams"),
        (lambda: sx.ops.delay_preset("musicgen_stereo", 3), "pairs of left and right; got 3"),
        (lambda: sx.ops.delay_preset("dia", 9, delays=[1, 2]), "delays must have 9 values"),
        (lambda: sx.ops.delay_preset("dia", 0), "num_streams must be 1 or more; got 0"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(sx.ops.OpError, match=message):
        call()
