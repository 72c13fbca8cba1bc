"""Stream decoders: any split of the codes gives the samples of the whole utterance, and the sound is as accurate."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from python_tests.assets import waves
from python_tests.tokenizers.codecs.griffin_lim import decode_whole, griffin_lim, quantizer_input
from speechlm_ext.errors import TokenizerError
from speechlm_ext.tokenizers import OverlapDecoder, RVQKMeansCodec, StreamDecoder, TokenizerSet
from speechlm_ext.tokenizers.codecs.phase import OnlinePhase
from speechlm_ext.tokenizers.encoders.mel import MelConfig
from speechlm_ext.tokenizers.streaming import stream_decoder


def decode_split(decoder: StreamDecoder, codes: np.ndarray, sizes) -> np.ndarray:
    """Push pieces of these sizes, then the rest; checks that no sample is later than the lookahead says."""
    parts, start = [], 0
    for size in [*sizes, len(codes)]:
        parts.append(decoder.push(codes[start : start + size]))
        start = min(start + size, len(codes))
        ready = sum(map(len, parts))
        assert ready >= (start - decoder.lookahead) * decoder.frame_samples
        assert ready <= start * decoder.frame_samples
    parts.append(decoder.flush())
    assert all(p.dtype == np.float32 for p in parts)
    return np.concatenate(parts)


def shortened(codec: RVQKMeansCodec, frames_per_token: int, iterations: int = 10) -> RVQKMeansCodec:
    """A codec with other tokens over the same analysis: random centroids around the codec's mean frame."""
    config = dataclasses.replace(
        codec.config,
        frames_per_token=frames_per_token,
        num_codebooks=2,
        codebook_size=8,
        griffin_lim_iterations=iterations,
    )
    generator = torch.Generator().manual_seed(frames_per_token)
    width = frames_per_token * config.mel.num_mels
    mean = codec.mean_F[: config.mel.num_mels].repeat(frames_per_token)
    return RVQKMeansCodec(config, mean, 0.7 * torch.randn(2, 8, width, generator=generator))


# ---- the RVQ codec -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("frames_per_token, lookahead", [(1, 11), (2, 5), (3, 4), (4, 2), (8, 1)])
def test_any_split_gives_the_same_samples(codec, frames_per_token, lookahead):
    """At 100 to 12.5 frames a second; tokens that do not divide a block included."""
    small, rng = shortened(codec, frames_per_token), np.random.default_rng(0)
    decoder = small.stream_decoder()
    assert isinstance(decoder, StreamDecoder) and decoder.lookahead == lookahead
    for count in (1, 2, 3, 13):
        codes = rng.integers(0, 8, (count, 2)).astype(np.int32)
        whole = small.decode(codes)
        assert whole.shape == (count * small.frame_samples,) and np.abs(whole).max() > 0.01
        for sizes in ([], [1] * count, [0, 2, 0, 5], rng.integers(0, 4, 6).tolist()):
            # One decoder for all utterances: a flush resets it.
            np.testing.assert_array_equal(decode_split(decoder, codes, sizes), whole)
    assert len(decoder.flush()) == 0


def test_earlier_samples_do_not_depend_on_later_codes(codec):
    small, rng = shortened(codec, 8), np.random.default_rng(1)
    codes = rng.integers(0, 8, (12, 2))
    other = np.concatenate([codes[:7], rng.integers(0, 8, (9, 2))])
    safe = (7 - small.stream_decoder().lookahead) * small.frame_samples
    np.testing.assert_array_equal(small.decode(codes)[:safe], small.decode(other)[:safe])


def test_as_accurate_as_griffin_lim_over_the_whole(codec):
    """Log-mel error of the sound to the codes."""
    errors = {"stream": 0.0, "whole": 0.0}
    for wave in waves()[::3]:
        codes = codec.encode(wave)
        wanted = codec.log_mel(codes)
        for name, sound in (("stream", codec.decode(codes)), ("whole", decode_whole(codec, codes))):
            errors[name] += float((quantizer_input(codec, sound) - wanted).square().mean().sqrt())
    assert errors["stream"] < 1.08 * errors["whole"]


def test_no_iterations_and_silence(codec):
    small = shortened(codec, 2, iterations=0)
    codes = np.random.default_rng(2).integers(0, 8, (9, 2))
    np.testing.assert_array_equal(decode_split(small.stream_decoder(), codes, [4]), small.decode(codes))
    silent = RVQKMeansCodec(small.config, small.mean_F - 50, small.codebooks_SKF)
    assert np.abs(silent.decode(codes)).max() < 1e-4


def test_bad_codes_are_refused_and_change_nothing(codec):
    small = shortened(codec, 2)
    codes = np.random.default_rng(3).integers(0, 8, (9, 2))
    decoder = small.stream_decoder()
    first = decoder.push(codes[:5])
    with pytest.raises(TokenizerError, match="id 8 at frame 0, stream 1"):
        decoder.push(np.array([[0, 8]]))
    with pytest.raises(TokenizerError, match=r"\[T, 2\]"):
        decoder.push(np.zeros((3, 3), np.int32))
    rest = [decoder.push(codes[5:]), decoder.flush()]
    np.testing.assert_array_equal(np.concatenate([first, *rest]), small.decode(codes))


# ---- phase -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mel",
    [
        MelConfig(),
        MelConfig(n_fft=1024),
        MelConfig(hop=150, window=450, n_fft=512),
        MelConfig(hop=100, window=201, n_fft=202),
    ],
    ids=str,
)
def test_one_window_is_fast_griffin_lim(mel):
    """All frames held until the end: torch's own transforms must give the same sound from zero phase."""
    torch.manual_seed(0)
    M_TF = torch.rand(9, mel.n_fft // 2 + 1)
    phase = OnlinePhase(mel, lookahead=9, iterations=0, momentum=0.7)
    assert len(phase.push(M_TF)) == 0
    phase.iterations = 5
    found = phase.finish()

    expected = griffin_lim(M_TF, mel, 5, 0.7, torch.zeros(10, mel.n_fft // 2 + 1))
    # Where windows hardly overlap the end is a small number over a small number.
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert float((found - expected).abs().mean()) < 1e-5


def test_a_tone_is_continuous():
    """Magnitudes of a steady tone, frame by frame: the sound keeps its level and its pitch across blocks."""
    mel = MelConfig()
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000) * 0.5
    window = torch.hann_window(640)
    M_TF = torch.stft(tone, 640, 160, 640, window, pad_mode="constant", return_complex=True).abs().T
    phase = OnlinePhase(mel, lookahead=6, iterations=30, momentum=0.99)
    sound = torch.cat([*(phase.push(M_TF[i : i + 4]) for i in range(0, 100, 4)), phase.finish()])
    assert sound.shape == (16000,)
    middle = sound[2000:14000]
    level = middle.unfold(0, 400, 400).square().mean(1).sqrt()
    assert float(level.min()) > 0.9 * 0.5 / 2**0.5 and float(level.max()) < 1.1 * 0.5 / 2**0.5
    spectrum = torch.fft.rfft(middle * torch.hann_window(12000)).abs()
    assert abs(int(spectrum.argmax()) * 16000 / 12000 - 440) < 1.5
    again = torch.stft(sound, 640, 160, 640, window, pad_mode="constant", return_complex=True).abs().T
    assert float((again - M_TF)[5:95].norm() / M_TF[5:95].norm()) < 0.1


# ---- any codec of finite context ---------------------------------------------------------------------------
class ConvCodec:
    """Codes → two convolutions → samples; it sees 3 frames before and 2 after. Integers: sums are exact."""

    kind, vocab_sizes, frame_samples = "conv", (5, 7), 3

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.table = rng.integers(-3, 4, (2, 7, 4)).astype(np.float64)
        self.first = rng.integers(-2, 3, (4, 4, 4)).astype(np.float64)  # offsets -2 … 1
        self.second = rng.integers(-2, 3, (3, 4, 3)).astype(np.float64)  # offsets -1 … 1

    @staticmethod
    def convolve(x_TC, kernel_KCD, before):
        padded = np.pad(x_TC, ((before, len(kernel_KCD) - 1 - before), (0, 0)))
        return sum(padded[k : k + len(x_TC)] @ kernel for k, kernel in enumerate(kernel_KCD))

    def decode(self, codes):
        x_TC = self.table[0][codes[:, 0]] + self.table[1][codes[:, 1]]
        hidden = np.maximum(self.convolve(x_TC, self.first, 2) + 1, 0)
        return (self.convolve(hidden, self.second, 1) / 1024).astype(np.float32).reshape(-1)

    def stream_decoder(self, left=3, right=2, block=1):
        return OverlapDecoder(
            self.decode, vocab_sizes=(5, 7), frame_samples=3, left=left, right=right, block=block
        )


@pytest.mark.parametrize("block", [1, 4, 30])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 23])
def test_overlap_equals_offline(block, count):
    conv, rng = ConvCodec(), np.random.default_rng(count)
    codes = np.stack([rng.integers(0, v, count) for v in conv.vocab_sizes], axis=1)
    whole = conv.decode(codes)
    for left, right in ((3, 2), (7, 4)):
        decoder = conv.stream_decoder(left, right, block)
        assert isinstance(decoder, StreamDecoder) and decoder.lookahead == right + block - 1
        for sizes in ([], [1] * count, [3, 0, 9]):
            np.testing.assert_array_equal(decode_split(decoder, codes, sizes), whole)


def test_overlap_needs_the_whole_context():
    """With less context than the receptive field the sound differs, but is the same for any split."""
    conv, rng = ConvCodec(), np.random.default_rng(0)
    codes = np.stack([rng.integers(0, v, 23) for v in conv.vocab_sizes], axis=1)
    for left, right in ((2, 2), (3, 1)):
        one = decode_split(conv.stream_decoder(left, right), codes, [])
        assert not np.array_equal(one, conv.decode(codes))
        np.testing.assert_array_equal(one, decode_split(conv.stream_decoder(left, right), codes, [1] * 23))


def test_overlap_keeps_no_more_than_its_context():
    conv = ConvCodec()
    decoder = conv.stream_decoder()
    for _ in range(100):
        decoder.push(np.zeros((1, 2), np.int64))
    assert len(decoder._buffer.codes_TC) <= 3 + 1 + 2


def test_overlap_refuses_what_cannot_work():
    conv = ConvCodec()
    for name, value in (("left", -1), ("right", -1), ("block", 0), ("frame_samples", 0)):
        with pytest.raises(TokenizerError, match=f"{name} must be at least"):
            OverlapDecoder(
                conv.decode, **{**dict(vocab_sizes=(5, 7), frame_samples=3, left=0, right=0), name: value}
            )
    wrong = OverlapDecoder(conv.decode, vocab_sizes=(5, 7), frame_samples=4, left=0, right=0)
    with pytest.raises(TokenizerError, match=r"must decode to \[4\] samples, got \[3\]"):
        wrong.push(np.zeros((1, 2), np.int64))


def test_codecs_say_how_they_stream(codec, text):
    assert stream_decoder(ConvCodec()).lookahead == 2
    assert TokenizerSet(codec=codec).stream_codec().frame_samples == codec.frame_samples
    with pytest.raises(TokenizerError, match="cannot be decoded while its codes arrive.*OverlapDecoder"):
        stream_decoder(object())
    with pytest.raises(TokenizerError, match="needs a codec tokenizer"):
        TokenizerSet(text=text).stream_codec()
