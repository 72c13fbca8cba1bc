"""``encoder-kmeans`` units: nearest centroids of an encoder's features; artifacts that record their model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from python_tests.assets import MANIFEST, waves
from python_tests.tokenizers.encoders import models as hf_models
from speechlm_ext.data.tokenize.command import run_tokenize
from speechlm_ext.data.tokenize.settings import CodecFit, SSLFit, TextFit, TokenizeConfig
from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.errors import AudioError, ConfigError, LayoutMismatchError, TokenizerError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.tokenizers import EncoderKMeans, EncoderKMeansConfig, TokenizerSet, load_tokenizer
from speechlm_ext.tokenizers.encoders.build import build_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny HuBERT."""
    folder = tmp_path_factory.mktemp("models") / "hubert"
    hf_models.make("hubert", folder)
    return folder


@pytest.fixture(scope="module")
def units(model) -> EncoderKMeans:
    return EncoderKMeans.fit(waves(), EncoderKMeansConfig(encoder=f"hf:{model}:2", num_clusters=24))


def test_units_are_the_nearest_centroids(units, model):
    x = build_encoder(f"hf:{model}:2")(waves()[8]).double()
    expected = torch.cdist(
        x, units.centroids_KF.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(1)
    found = units.encode(waves()[8])
    assert found.dtype == np.int32 and found.shape == (-(-len(waves()[8]) // 320), 1)
    np.testing.assert_array_equal(found[:, 0], expected.numpy())
    assert len(set(np.concatenate([units.encode(w)[:, 0] for w in waves()]))) == 24


def test_the_fit_is_k_means_over_the_features(units, model):
    x = torch.cat([build_encoder(f"hf:{model}:2")(wave) for wave in waves()])
    expected = KMeans(24, max_iter=20, random_state=0, progress=False).fit(x)
    torch.testing.assert_close(units.centroids_KF, expected.cluster_centers_, rtol=0, atol=0)
    few = EncoderKMeansConfig(encoder="mfcc", num_clusters=24, max_fit_frames=100)
    one, same, other = (EncoderKMeans.fit(waves(), few, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("frames_per_token", [2, 4])
@pytest.mark.parametrize("encoder", ["mfcc", "log-mel", "model"])
def test_rate_and_number_of_frames_are_the_codecs(model, codec, encoder, frames_per_token):
    name = f"hf:{model}:1" if encoder == "model" else encoder
    config = EncoderKMeansConfig(encoder=name, num_clusters=5, frames_per_token=frames_per_token)
    ssl = EncoderKMeans.fit(waves()[:4], config)
    assert ssl.frame_rate == 100 / frames_per_token and ssl.sample_rate == 16000
    if frames_per_token == 2:
        for num_samples in (1, 320, 321, 16079):
            wave = np.resize(waves()[5], num_samples)
            assert len(ssl.encode(wave)) == len(codec.encode(wave))
        frames = TokenizerSet(ssl=ssl, codec=codec).encode_codec_ssl(waves()[0])
        np.testing.assert_array_equal(frames[:, 0], ssl.encode(waves()[0])[:, 0])
    else:
        with pytest.raises(TokenizerError, match="codec_ssl needs equal rates"):
            TokenizerSet(ssl=ssl, codec=codec).encode_codec_ssl(waves()[0])


def test_save_and_load(units, tmp_path):
    units.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, EncoderKMeans) and loaded.fingerprint == units.fingerprint
    np.testing.assert_array_equal(loaded.encode(waves()[2]), units.encode(waves()[2]))
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    assert len(record["config"]["weights_sha256"]) == 64 and record["config"]["model_type"] == "hubert"
    record["config"]["frames_per_token"] = 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(TokenizerError, match="does not match its own sha256"):
        load_tokenizer(tmp_path)


def test_a_missing_or_other_model_is_one_error(units, model, tmp_path):
    units.save(tmp_path / "t")
    moved = tmp_path / "moved"
    model.rename(moved)
    try:
        loaded = load_tokenizer(tmp_path / "t")  # training on tokens does not need the model
        assert loaded.fingerprint == units.fingerprint
        with pytest.raises(TokenizerError, match=rf"folder {model} does not exist"):
            loaded.encode(waves()[0])
        # Its new path can be written into the artifact: the units stay the same.
        path = tmp_path / "t" / "tokenizer.json"
        path.write_text(path.read_text().replace(str(model), str(moved)))
        there = load_tokenizer(tmp_path / "t")
        assert there.fingerprint == units.fingerprint
        np.testing.assert_array_equal(there.encode(waves()[2]), units.encode(waves()[2]))
        # Another model at the same path is refused.
        hf_models.make("hubert-stable", model)
        units.save(tmp_path / "s")
        with pytest.raises(TokenizerError, match=r"of the encoder .* but the centroids were fitted on"):
            load_tokenizer(tmp_path / "s").prepare()
    finally:
        if model.is_dir():
            for file in model.iterdir():
                file.unlink()
            model.rmdir()
        moved.rename(model)


def test_refusals(units, model):
    with pytest.raises(AudioError, match="at least one sample"):
        units.encode(np.zeros(0, np.float32))
    with pytest.raises(TokenizerError, match="cannot be decoded to sound"):
        units.decode(np.zeros((3, 1), np.int32))
    with pytest.raises(
        TokenizerError, match=r"num_clusters 200 needs .* got 50 \(1\.0 s of audio\).*at most 50"
    ):
        EncoderKMeans.fit([waves()[8][:16000]])
    with pytest.raises(ConfigError, match="num_clusters must be at least 1"):
        EncoderKMeansConfig(num_clusters=0)
    with pytest.raises(ConfigError, match="unknown feature encoder 'hubert'"):
        EncoderKMeansConfig(encoder="hubert")
    with pytest.raises(ConfigError, match=r"3 frames of 10 ms are 1\.5 frames of hf:.* multiple of 2"):
        EncoderKMeans.fit(waves()[:1], EncoderKMeansConfig(encoder=f"hf:{model}:1", frames_per_token=3))
    with pytest.raises(TokenizerError, match=r"expected centroids \[K, 39\] for mfcc, got \[4, 3\]"):
        EncoderKMeans(build_encoder("mfcc").describe(), torch.zeros(4, 3))
    with pytest.raises(TokenizerError, match="key 'encoder' is missing"):
        EncoderKMeans({}, torch.zeros(4, 3))


# ---- speechlm tokenize -------------------------------------------------------------------------------------
def tokenize(out, **ssl) -> TokenizeConfig:
    return TokenizeConfig(
        manifest=str(MANIFEST),
        output_dir=str(out),
        text=TextFit(kind="none"),
        ssl=SSLFit(kind="encoder-kmeans", **ssl),
        codec=CodecFit(codebook_size=8, num_codebooks=2, max_fit_frames=2000),
        num_workers=0,
    )


def test_tokenize_fits_units_on_an_encoder(model, tmp_path):
    result = run_tokenize(tokenize(tmp_path / "a", encoder=f"hf:{model}:2", num_clusters=16))
    assert result.complete and result.num_utterances == len(waves())
    fitted = TokenizerSet.load(tmp_path / "a" / "tokenizers").ssl
    assert isinstance(fitted, EncoderKMeans) and fitted.vocab_sizes == (16,)
    folder = TokenFolder.open(tmp_path / "a")
    for i, wave in enumerate(waves()):
        np.testing.assert_array_equal(folder.utterance(i)["ssl"], fitted.encode(wave))


def test_tokenize_takes_units_of_kmeans_fit(model, tmp_path):
    encoder = build_encoder(f"hf:{model}:2")
    x = torch.cat([encoder(wave) for wave in waves()])
    KMeans(7, progress=False).fit(x).save(tmp_path / "u", features=encoder.describe())
    cfg = tokenize(tmp_path / "a", kmeans=str(tmp_path / "u"))
    run_tokenize(cfg)
    fitted = TokenizerSet.load(tmp_path / "a" / "tokenizers").ssl
    assert (
        fitted.vocab_sizes == (7,)
        and fitted.fingerprint == EncoderKMeans.from_kmeans(tmp_path / "u").fingerprint
    )
    # Other units under the same path are other tokens.
    KMeans(8, progress=False).fit(x).save(tmp_path / "u", features=encoder.describe())
    with pytest.raises((ConfigError, LayoutMismatchError), match="Choose another"):
        run_tokenize(cfg)


def test_tokenize_settings_that_contradict():
    with pytest.raises(ConfigError, match="settings of ssl.kind encoder-kmeans"):
        SSLFit(encoder="log-mel")
    with pytest.raises(ConfigError, match="encoder-kmeans needs ssl.encoder"):
        SSLFit(kind="encoder-kmeans")
    with pytest.raises(ConfigError, match="unknown feature encoder"):
        SSLFit(kind="encoder-kmeans", encoder="hubert")
    with pytest.raises(ConfigError, match="works at 16000 Hz, but ssl.sample_rate is 24000"):
        SSLFit(kind="encoder-kmeans", encoder="mfcc", sample_rate=24000)
