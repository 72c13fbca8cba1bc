"""MFCC units on real recordings: features against a direct formula, units that depend on content, not on
level."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from python_tests.assets import waves
from python_tests.kmeans.conftest import plus_plus
from speechlm_ext.audio.waveform import resample_audio
from speechlm_ext.errors import AudioError, ConfigError, KMeansError, TokenizerError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.counter_rng import row_keys
from speechlm_ext.tokenizers import MFCCKMeans, SSLConfig, load_tokenizer
from speechlm_ext.tokenizers.centroids import fit
from speechlm_ext.tokenizers.encoders.build import MFCC, deltas
from speechlm_ext.tokenizers.encoders.spec import average_frames


def test_units_of_real_recordings(ssl):
    units = [ssl.encode(wave)[:, 0] for wave in waves()]
    assert len(set(np.concatenate(units))) >= 45  # of 50: no collapse
    changes = np.mean(units[8][1:] != units[8][:-1])
    assert 0.2 < changes < 0.9  # neither constant nor noise


@pytest.mark.parametrize("num_samples", [1, 320, 321, 16000, 60 * 16000])
def test_number_of_frames_is_the_codecs(ssl, codec, num_samples):
    wave = np.resize(waves()[5], num_samples)
    units = ssl.encode(wave)
    assert units.shape == (-(-num_samples // 320), 1) and units.dtype == np.int32
    if num_samples <= 16000:
        assert len(units) == len(codec.encode(wave))


def test_same_sound_same_units(ssl):
    """A pause in front moves the units and does not change them (away from the edge)."""
    wave = waves()[8]
    plain = ssl.encode(wave)[:, 0]
    moved = ssl.encode(np.concatenate([np.zeros(3200, np.float32), wave]))[:, 0]
    assert (plain[5:] == moved[15:]).mean() > 0.97


def test_mfcc_against_a_direct_computation():
    wave = waves()[0]
    features = MFCC(16000)(wave)
    assert features.shape == (-(-len(wave) // 160), 39)
    frame, half = 40, 200
    padded = np.pad(wave, 512)
    part = padded[512 + frame * 160 - half : 512 + frame * 160 + half] * np.hanning(401)[:400]
    spectrum = np.abs(np.fft.rfft(part, 512)) * 2 / np.hanning(401)[:400].sum()
    mel = MFCC(16000)._mel
    bands = np.log(mel.filters_MF.numpy() @ spectrum + 1e-5)
    cepstra = [
        np.sqrt((1 if k == 0 else 2) / 40) * (bands * np.cos(np.pi / 40 * (np.arange(40) + 0.5) * k)).sum()
        for k in range(13)
    ]
    np.testing.assert_allclose(features[frame, :13], cepstra, rtol=1e-3, atol=1e-3)


def test_deltas_of_a_ramp_are_its_slope():
    ramp = torch.arange(10.0)[:, None] * torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(deltas(ramp)[2:-2], torch.tensor([[1.0, -2.0]]).expand(6, -1))


def test_average_frames_repeats_the_last():
    x = torch.tensor([[1.0], [3.0], [5.0]])
    torch.testing.assert_close(average_frames(x, 2), torch.tensor([[2.0], [5.0]]))


def test_save_load_and_determinism(ssl, tmp_path):
    ssl.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, MFCCKMeans) and loaded.fingerprint == ssl.fingerprint
    np.testing.assert_array_equal(loaded.encode(waves()[2]), ssl.encode(waves()[2]))
    again = MFCCKMeans.fit(waves(), SSLConfig(num_clusters=50))  # the fixture may come from another process
    assert again.fingerprint == ssl.fingerprint
    assert MFCCKMeans.fit(waves(), SSLConfig(num_clusters=50), seed=1).fingerprint != ssl.fingerprint


def test_refusals(ssl):
    with pytest.raises(AudioError, match="at least one sample"):
        ssl.encode(np.zeros(0, np.float32))
    with pytest.raises(AudioError, match="not a finite number"):
        ssl.encode(np.full(10, np.inf, np.float32))
    with pytest.raises(TokenizerError, match="cannot be decoded to sound"):
        ssl.decode(np.zeros((3, 1), np.int32))
    with pytest.raises(
        TokenizerError, match=r"num_clusters 200 needs .* got 50 \(1\.0 s of audio\).*at most 50"
    ):
        MFCCKMeans.fit([waves()[8][:16000]])
    with pytest.raises(ConfigError, match="num_clusters must be at least 1"):
        SSLConfig(num_clusters=0)
    with pytest.raises(ConfigError, match="multiple of 100 Hz"):
        SSLConfig(sample_rate=11025)


def test_units_are_the_nearest_centroids(ssl):
    wave = waves()[3]
    features_TF = average_frames(MFCC(16000)(wave), 2)
    x_TF = ((features_TF - ssl.mean_F) / ssl.scale_F).double()
    distance_TK = torch.cdist(x_TF, ssl.centroids_KF.double(), compute_mode="donot_use_mm_for_euclid_dist")
    np.testing.assert_array_equal(ssl.encode(wave)[:, 0], distance_TK.argmin(1).numpy())
    # Ties go to the lowest index.
    doubled = MFCCKMeans(SSLConfig(num_clusters=100), ssl.mean_F, ssl.scale_F, ssl.centroids_KF.repeat(2, 1))
    np.testing.assert_array_equal(doubled.encode(wave), ssl.encode(wave))


@pytest.mark.parametrize("rate", [8000, 24000])
def test_other_sampling_rates(rate):
    few = SSLConfig(sample_rate=rate, num_clusters=5, max_fit_frames=100)
    units = MFCCKMeans.fit([resample_audio(wave, 16000, rate) for wave in waves()[:3]], few)
    assert (units.sample_rate, units.frame_rate) == (rate, 50.0)
    assert units.encode(np.zeros(rate // 10 + 1, np.float32)).shape == (6, 1)


# ---- the K-Means underneath --------------------------------------------------------------------------------
def test_fit_is_k_means_from_a_plain_start():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    found = fit(x, 6, seed=3, iterations=5)
    some = x[row_keys(3, "init rows/0", torch.arange(300)).argsort()[: 32 * 6]]
    start = some[plus_plus(some, 6, seed=3, purpose="k-means++/0")]
    assert len(start.unique(dim=0)) == 6
    want = KMeans(6, init=start, max_iter=5, tol=0.0).fit(x)
    assert torch.equal(found.cluster_centers_, want.cluster_centers_)
    assert torch.equal(found.labels_, want.labels_)
    with pytest.raises(KMeansError, match="6 clusters need at least as many rows, got 5"):
        fit(x[:5], 6, seed=0, iterations=5)


def test_fewer_distinct_frames_than_clusters():
    x = torch.zeros(20, 3)
    assert torch.equal(fit(x, 5, seed=0, iterations=5).cluster_centers_, torch.zeros(5, 3))
