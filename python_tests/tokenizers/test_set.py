"""The set of tokenizers: storage, layout, and codec_ssl frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from python_tests.assets import waves
from speechlm_ext.errors import TokenizerError
from speechlm_ext.tokenizers import (
    EncoderKMeans,
    MFCCKMeans,
    RVQConfig,
    RVQKMeansCodec,
    SSLConfig,
    Tokenizer,
    TokenizerSet,
    load_tokenizer,
    register_tokenizer,
)
from speechlm_ext.tokenizers.artifact import ArrayTokenizer
from speechlm_ext.tokenizers.encoders.build import build_encoder


def test_protocol(tokenizer_set):
    for slot in ("text", "ssl", "codec"):
        assert isinstance(getattr(tokenizer_set, slot), Tokenizer)


def test_save_and_load(tokenizer_set, tmp_path):
    tokenizer_set.save(tmp_path)
    loaded = TokenizerSet.load(tmp_path)
    assert loaded.fingerprints() == tokenizer_set.fingerprints()
    assert sorted(loaded.fingerprints()) == ["codec", "ssl", "text_bpe"]
    TokenizerSet(text=tokenizer_set.text).save(tmp_path / "only_text")
    only = TokenizerSet.load(tmp_path / "only_text")
    assert only.codec is None and only.ssl is None and only.text.fingerprint == tokenizer_set.text.fingerprint
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        TokenizerSet.load(tmp_path / "nothing")


def test_layout(tokenizer_set):
    layout = tokenizer_set.make_layout("demo")
    assert layout.num_streams == 9 and layout.delays == tuple(range(9))
    assert layout.interval("ssl") == (256, 306) and layout.interval("codec7") == (306 + 7 * 64, 306 + 8 * 64)
    assert dict(layout.tokenizers) == tokenizer_set.fingerprints()
    assert TokenizerSet(text=tokenizer_set.text).make_layout().num_streams == 1
    assert tokenizer_set.make_layout("demo", delays=[0] + [1] * 8).max_delay == 1


def test_codec_ssl_frames(tokenizer_set):
    wave = waves()[4]
    frames = tokenizer_set.encode_codec_ssl(wave)
    assert frames.dtype == np.int32 and frames.shape == (-(-len(wave) // 320), 9)
    np.testing.assert_array_equal(frames[:, :1], tokenizer_set.ssl.encode(wave))
    np.testing.assert_array_equal(frames[:, 1:], tokenizer_set.codec.encode(wave))
    np.testing.assert_array_equal(
        tokenizer_set.decode_codec(frames[:, 1:]), tokenizer_set.codec.decode(frames[:, 1:])
    )


class _Shifted:
    """The SSL units with some frames cut, as another encoder's padding would."""

    kind, modality, sample_rate, frame_rate, vocab_sizes, fingerprint = (
        "cut",
        "ssl",
        16000,
        50.0,
        (50,),
        "0" * 64,
    )

    def __init__(self, ssl, cut):
        self._ssl, self._cut = ssl, cut

    def encode(self, x):
        return self._ssl.encode(x)[: -self._cut]


def test_codec_ssl_lengths_may_differ_by_one(tokenizer_set):
    wave = waves()[4]
    whole = tokenizer_set.encode_codec_ssl(wave)
    one = TokenizerSet(ssl=_Shifted(tokenizer_set.ssl, 1), codec=tokenizer_set.codec).encode_codec_ssl(wave)
    np.testing.assert_array_equal(one, whole[:-1])
    with pytest.raises(TokenizerError, match="46 ssl frames but 48 codec frames"):
        TokenizerSet(ssl=_Shifted(tokenizer_set.ssl, 2), codec=tokenizer_set.codec).encode_codec_ssl(wave)


def test_refusals(tokenizer_set):
    with pytest.raises(
        TokenizerError, match="codec slot needs a tokenizer of modality 'codec', got 'mfcc-kmeans'"
    ):
        TokenizerSet(codec=tokenizer_set.ssl)
    with pytest.raises(TokenizerError, match="needs a codec tokenizer"):
        TokenizerSet(text=tokenizer_set.text).decode_codec(np.zeros((1, 8), np.int32))
    slow = MFCCKMeans.fit(waves(), SSLConfig(num_clusters=5, frames_per_token=4))
    with pytest.raises(TokenizerError, match="ssl 16000 Hz at 25 frames/s and codec 16000 Hz at 50"):
        TokenizerSet(ssl=slow, codec=tokenizer_set.codec).encode_codec_ssl(waves()[0])
    with pytest.raises(TokenizerError, match="already MFCCKMeans"):
        register_tokenizer("mfcc-kmeans", _Shifted)


def test_fingerprints_of_stored_artifacts_never_change():
    """Layouts of token folders and checkpoints name their tokenizers by these."""
    centroids = torch.arange(78.0).reshape(2, 39)
    units = MFCCKMeans(SSLConfig(num_clusters=2), torch.zeros(39), torch.ones(39), centroids)
    assert units.fingerprint == "b7f12dc569d55d73688a5af73b45bd507fd1c45d30d78153a9bf0db754f45596"
    described = build_encoder("mfcc", frames_per_token=2).describe()
    encoder_units = EncoderKMeans(described, centroids)
    assert encoder_units.fingerprint == "79c955254601b7c78b1624ad38fcfffcfd42e3a8b8d84d51aeabb0ab9b537b9b"
    config = RVQConfig(num_codebooks=1, codebook_size=2)
    codec = RVQKMeansCodec(config, torch.zeros(160), torch.arange(320.0).reshape(1, 2, 160))
    assert codec.fingerprint == "86e7e77badf0eaf2bf1c3e2d7f449a97a0bf325d0ce579c19f12cf0a6575910a"


class _Levels(ArrayTokenizer):
    """Units of a user's own: the nearest of a few levels."""

    kind, modality, sample_rate, frame_rate = "test-levels", "ssl", 16000, 16000.0

    def __init__(self, name: str, levels: torch.Tensor) -> None:
        self.name, self.levels, self.vocab_sizes = name, levels, (len(levels),)

    def encode(self, x):
        return np.abs(x[:, None] - self.levels.numpy()).argmin(1).astype(np.int32)[:, None]

    def decode(self, ids):
        return self.levels.numpy()[ids[:, 0]]

    def settings(self):
        return {"name": self.name}

    def arrays(self):
        return {"levels": self.levels}

    @classmethod
    def from_artifact(cls, settings, arrays):
        return cls(settings["name"], arrays["levels"])


def test_a_tokenizer_of_ones_own(tmp_path):
    register_tokenizer("test-levels", _Levels)
    own = _Levels("a", torch.tensor([-1.0, 0.0, 1.0]))
    TokenizerSet(ssl=own).save(tmp_path)
    loaded = TokenizerSet.load(tmp_path).ssl
    assert isinstance(loaded, Tokenizer) and loaded.fingerprint == own.fingerprint
    assert loaded.encode(np.array([0.9, -0.2]))[:, 0].tolist() == [2, 1]
    assert _Levels("b", own.levels).fingerprint != own.fingerprint != _Levels("a", own.levels * 2).fingerprint
    TokenizerSet(ssl=_Levels("a", own.levels)).save(tmp_path)
    (tmp_path / "ssl" / "arrays.safetensors").write_bytes(save({"other": own.levels}))
    with pytest.raises(TokenizerError, match="not a tokenizer of kind test-levels: 'levels'"):
        load_tokenizer(tmp_path / "ssl")


@pytest.mark.parametrize("slot", ["ssl", "codec"])
def test_arrays_that_are_not_finite_are_never_saved_over_good_ones(slot, ssl, codec, tmp_path):
    good = {"ssl": ssl, "codec": codec}[slot]
    good.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    arrays = {name: array.clone() for name, array in good.arrays().items()}
    name = sorted(arrays)[0]
    arrays[name].view(-1)[5] = float("nan")
    ordered = [arrays[n] for n in good.arrays()]
    broken = type(good)(good.config, *ordered)
    with pytest.raises(
        TokenizerError, match=rf"was not saved .* '{name}' \(1 of \d+ values, the first is nan\)"
    ):
        broken.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    # As an older version would have written it, with a fingerprint of its own.
    save_file(arrays, tmp_path / "arrays.safetensors")
    with pytest.raises(
        TokenizerError, match=rf"arrays.safetensors cannot be used: '{name}' .* is not finite"
    ):
        load_tokenizer(tmp_path)
