"""The rvq-kmeans codec on real recordings: accuracy, determinism, storage, refusals."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from python_tests.assets import waves
from python_tests.tokenizers.codecs.griffin_lim import quantizer_input, synthesize
from speechlm_ext.errors import AudioError, ConfigError, TokenizerError
from speechlm_ext.tokenizers import RVQConfig, RVQKMeansCodec, load_tokenizer
from speechlm_ext.tokenizers.codecs.rvq_search import beam_search, search_tables
from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram


def rmse(a, b) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("index", [0, 5, 8])
def test_round_trip_of_real_recordings(codec, index):
    wave = waves()[index]
    codes = codec.encode(wave)
    sound = codec.decode(codes)
    original = quantizer_input(codec, wave)
    # The quantiser alone: the log-mel that the codes stand for. A codec that outputs the mean has an error
    # above 1.
    assert rmse(codec.log_mel(codes), original) < 0.30
    # After phase reconstruction and a second analysis little may be added to that.
    assert rmse(quantizer_input(codec, sound), original) < 0.38
    loudness = np.sqrt((sound[: len(wave)] ** 2).mean() / (wave**2).mean())
    assert 0.85 < loudness < 1.1


def test_more_stages_keep_more(codec):
    wave = waves()[8]
    codes, original = codec.encode(wave), quantizer_input(codec, wave)
    errors = []
    for stages in (1, 2, 4, 8):
        part = RVQKMeansCodec(
            dataclasses.replace(codec.config, num_codebooks=stages),
            codec.mean_F,
            codec.codebooks_SKF[:stages],
        )
        errors.append(rmse(part.log_mel(codes[:, :stages]), original))
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2] > 1.2**3 * errors[3]


@pytest.mark.parametrize("num_samples", [1, 160, 319, 320, 321, 16000, 33000])
def test_number_of_frames(codec, num_samples):
    wave = np.resize(waves()[5], num_samples)
    codes = codec.encode(wave)
    assert codes.shape == (-(-num_samples // 320), 8) and codes.dtype == np.int32
    sound = codec.decode(codes)
    assert sound.shape == (len(codes) * 320,) and sound.dtype == np.float32
    assert np.isfinite(sound).all() and np.abs(sound).max() <= 1


def test_silence_and_loud_noise(codec):
    silence = codec.decode(codec.encode(np.zeros(16000, np.float32)))
    assert np.abs(silence).max() < 0.02
    loud = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    assert np.isfinite(codec.decode(codec.encode(loud))).all()


def test_25_hz():
    codec = RVQKMeansCodec.fit(waves(), RVQConfig(frames_per_token=4, codebook_size=32, num_codebooks=2))
    assert codec.frame_rate == 25.0 and codec.vocab_sizes == (32, 32)
    assert codec.encode(np.zeros(641, np.float32)).shape == (2, 2)
    assert codec.decode(np.zeros((3, 2), np.int32)).shape == (3 * 640,)


def test_fit_and_codes_are_deterministic(codec):
    small = RVQConfig(codebook_size=16, num_codebooks=2, max_fit_frames=200)
    first, second, other = (RVQKMeansCodec.fit(waves(), small, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint == second.fingerprint != other.fingerprint
    codes = codec.encode(waves()[3])
    np.testing.assert_array_equal(codes, codec.encode(waves()[3]))
    np.testing.assert_array_equal(codec.decode(codes), codec.decode(codes))
    with_two_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        np.testing.assert_array_equal(codes, codec.encode(waves()[3]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(with_two_threads)


def test_save_and_load(codec, tmp_path):
    codec.save(tmp_path / "codec")
    loaded = load_tokenizer(tmp_path / "codec")
    assert isinstance(loaded, RVQKMeansCodec) and loaded.fingerprint == codec.fingerprint
    assert loaded.config == codec.config and loaded.vocab_sizes == (64,) * 8
    np.testing.assert_array_equal(loaded.encode(waves()[1]), codec.encode(waves()[1]))
    assert sorted(p.name for p in (tmp_path / "codec").iterdir()) == ["arrays.safetensors", "tokenizer.json"]


def test_damaged_artifacts_are_refused(codec, tmp_path):
    codec.save(tmp_path)
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    arrays = (tmp_path / "arrays.safetensors").read_bytes()

    (tmp_path / "arrays.safetensors").write_bytes(arrays[:-100])
    with pytest.raises(TokenizerError, match="arrays.safetensors cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "arrays.safetensors").write_bytes(arrays[:-1] + bytes([arrays[-1] ^ 1]))
    with pytest.raises(TokenizerError, match="does not match its own sha256"):
        load_tokenizer(tmp_path)
    (tmp_path / "arrays.safetensors").unlink()
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "arrays.safetensors").write_bytes(arrays)

    for change, message in (
        ({"kind": "nonsense"}, "of kind 'nonsense'; known are"),
        ({"version": 99}, "version 99 is not 1"),
        ({"config": {"mel": {}, "colour": 1}}, "not a tokenizer of kind rvq-kmeans"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a tokenizer's description"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no tokenizer.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_too_little_audio_names_the_way_out():
    with pytest.raises(
        TokenizerError, match=r"codebook_size 256 needs .* got 10 \(0\.2 s of audio\).*at most 10"
    ):
        RVQKMeansCodec.fit([waves()[0][:3200]])
    with pytest.raises(TokenizerError, match="got 0"):
        RVQKMeansCodec.fit([])


def test_constant_audio_can_be_fitted():
    codec = RVQKMeansCodec.fit([np.zeros(32000, np.float32)], RVQConfig(codebook_size=16, num_codebooks=2))
    assert np.abs(codec.decode(codec.encode(np.zeros(3200, np.float32)))).max() < 0.01


def test_bad_waveforms_and_codes(codec):
    with pytest.raises(AudioError, match="at least one sample"):
        codec.encode(np.zeros(0, np.float32))
    with pytest.raises(AudioError, match="sample 2 of 3 is nan"):
        codec.encode(np.array([0, 0, np.nan]))
    with pytest.raises(TokenizerError, match=r"expected integer ids \[T, 8\], got int32 \[4, 7\]"):
        codec.decode(np.zeros((4, 7), np.int32))
    with pytest.raises(TokenizerError, match="id 64 at frame 1, stream 3"):
        codec.decode(np.array([[0] * 8, [0, 0, 0, 64, 0, 0, 0, 0]]))
    assert codec.decode(np.zeros((0, 8), np.int32)).shape == (0,)


def test_impossible_settings():
    for bad in ({"beam": 0}, {"codebook_size": 0}, {"griffin_lim_momentum": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            RVQConfig(**bad)
    with pytest.raises(ConfigError, match="hop <= window / 2"):
        MelConfig(hop=400)
    with pytest.raises(ConfigError, match="f_max"):
        MelConfig(f_max=9000)


def test_beam_search_is_greedy_at_one_and_exhaustive_when_wide():
    generator = torch.Generator().manual_seed(0)
    x_NF = torch.randn(50, 3, generator=generator)
    books_SKF = torch.randn(2, 6, 3, generator=generator)
    greedy_first = torch.cdist(x_NF, books_SKF[0]).argmin(1)
    greedy_second = torch.cdist(x_NF - books_SKF[0][greedy_first], books_SKF[1]).argmin(1)
    expected = torch.stack([greedy_first, greedy_second], 1)
    assert torch.equal(beam_search(x_NF, books_SKF, search_tables(books_SKF), beam=1, chunk=7), expected)
    sums = (books_SKF[0][:, None] + books_SKF[1][None]).flatten(0, 1)
    best = torch.cdist(x_NF, sums).argmin(1)
    exhaustive = torch.stack([best // 6, best % 6], 1)
    assert torch.equal(beam_search(x_NF, books_SKF, search_tables(books_SKF), beam=6), exhaustive)


@pytest.mark.parametrize("beam", [1, 3, 40])
def test_beam_search_follows_the_residuals(beam):
    """Against a search in float64, row by row, that subtracts the chosen centroids one after the other."""
    generator = torch.Generator().manual_seed(beam)
    x_NF = torch.randn(20, 12, generator=generator)
    books_SKF = (
        torch.randn(4, 16, 12, generator=generator) * torch.tensor([1.0, 0.6, 0.4, 0.2])[:, None, None]
    )
    expected = []
    for row in x_NF.double():
        partial = [((), row)]
        for book_KF in books_SKF.double():
            grown = [(codes + (k,), rest - c) for codes, rest in partial for k, c in enumerate(book_KF)]
            partial = sorted(grown, key=lambda p: float(p[1].square().sum()))[:beam]
        expected.append(partial[0][0])
    assert beam_search(x_NF, books_SKF, search_tables(books_SKF), beam, chunk=7).tolist() == [
        list(codes) for codes in expected
    ]


@pytest.mark.parametrize("n_fft", [640, 1024])
def test_mel_inversion_without_quantiser(n_fft):
    mel = MelSpectrogram(MelConfig(n_fft=n_fft))
    log_mel = mel.encode(waves()[8])
    again = mel.encode(synthesize(mel, log_mel, iterations=30, momentum=0.99))
    assert rmse(again, log_mel) < 0.2
    magnitude = mel.magnitude(log_mel) * mel._scale
    assert rmse(torch.log(magnitude @ mel.filters_MF.T + 1e-3), log_mel) < 0.05


def test_mel_of_a_tone():
    """A full-scale sine has magnitude about 1 in the band around its frequency and nothing far from it."""
    mel = MelSpectrogram(MelConfig())
    wave = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    bands = mel.encode(wave)[50].exp()
    peak = int(bands.argmax())
    centre = (mel.filters_MF[peak] * torch.arange(321)).sum() / mel.filters_MF[peak].sum() * 25
    assert abs(float(centre) - 1000) < 60 and 0.5 < float(bands[peak]) < 2.2
    assert float(bands[peak + 12 :].max()) < 0.01 and float(bands[: peak - 12].max()) < 0.01
