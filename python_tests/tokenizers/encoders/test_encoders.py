"""Feature encoders: values against transformers' own forward, frames like the codec's, windows, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from python_tests.assets import waves
from python_tests.tokenizers.encoders import models as hf_models
from speechlm_ext.errors import AudioError, ConfigError, TokenizerError
from speechlm_ext.tokenizers.encoders.build import MFCC, build_encoder
from speechlm_ext.tokenizers.encoders.huggingface import OVERLAP, WINDOW, HFEncoder, windows
from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram
from speechlm_ext.tokenizers.encoders.spec import EncoderSpec, FeatureEncoder
from speechlm_ext.tokenizers.encoders.weights import weights_sha256

KINDS = ("hubert", "hubert-stable", "wav2vec2", "wav2vec2-ctc", "wavlm", "wav2vec2-bert", "whisper")
LAYERS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``kind -> (folder, model, extractor)``, each made at its first use."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (folder, *hf_models.make(kind, folder))
        return made[kind]

    return get


@torch.inference_mode()
def transformers_hidden(model, extractor, wave: np.ndarray, layer: int) -> torch.Tensor:
    """The hidden state that the whole model's own forward gives, ``[T, F]``."""
    values = extractor(wave, sampling_rate=16000, return_tensors="pt")
    if "Whisper" in type(model).__name__:
        model = model.get_encoder()
    inputs = values["input_values"] if "input_values" in values else values["input_features"]
    output = getattr(model, "wav2vec2", model)(inputs, output_hidden_states=True)
    return (output.last_hidden_state if layer == LAYERS else output.hidden_states[layer])[0]


# ---- values ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [0, 1, LAYERS])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "whisper"])
def test_matches_transformers(models, kind, layer):
    """Our inputs cut to the frames that the model gives for them alone, so that attention sees the same in both."""
    folder, model, extractor = models(kind)
    encoder = build_encoder(f"hf:{folder}:{layer}")
    extra = (
        240 if kind == "wav2vec2-bert" else 80
    )  # the last frame's receptive field reaches beyond its 320 samples
    wave = np.resize(waves()[8], 99 * 320 + extra)
    expected = transformers_hidden(model, extractor, wave, layer)
    assert expected.shape == (99, 32) and encoder(wave).shape == (100, 32)
    with torch.inference_mode():
        ours = encoder._family.run(encoder._family.prepare(wave, 99), 0, 99, layer)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hubert-stable", "wav2vec2-ctc", "wavlm", "wav2vec2-bert"])
def test_a_last_frame_filled_up_with_zeros(models, kind):
    """A call equals the model's forward of the prepared recording with zeros after it."""
    folder, model, extractor = models(kind)
    wave = waves()[8][:31990]
    if kind == "wav2vec2-bert":
        inputs = extractor(
            np.pad(wave, (0, 100 * 320 + 240 - 31990)), sampling_rate=16000, return_tensors="pt"
        )["input_features"]
    else:
        values = extractor(wave, sampling_rate=16000, return_tensors="pt")["input_values"]
        inputs = torch.nn.functional.pad(values, (0, 100 * 320 + 80 - 31990))
    with torch.inference_mode():
        output = getattr(model, "wav2vec2", model)(inputs, output_hidden_states=True)
    torch.testing.assert_close(
        build_encoder(f"hf:{folder}:2")(wave), output.hidden_states[2][0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layer", [0, 2, LAYERS])
def test_whisper_matches_transformers_on_thirty_seconds(models, layer):
    folder, model, extractor = models("whisper")
    wave = np.resize(np.concatenate(waves()), 30 * 16000)
    wave[-400:] = 0  # its analysis mirrors the recording at 30 s, where ours sees silence
    ours = build_encoder(f"hf:{folder}:{layer}")(wave)
    torch.testing.assert_close(ours, transformers_hidden(model, extractor, wave, layer), rtol=1e-4, atol=1e-4)


def test_whisper_on_the_true_length_sees_the_same_mel_frames(models):
    """Before attention nothing depends on the padding but the last frame's neighbour."""
    folder, model, extractor = models("whisper")
    wave = waves()[8]
    ours = build_encoder(f"hf:{folder}:0")(wave)
    expected = transformers_hidden(model, extractor, wave, 0)[: len(ours)]
    torch.testing.assert_close(ours[:-1], expected[:-1], rtol=1e-4, atol=1e-4)


def test_mfcc_and_log_mel_are_the_tokenizers_own():
    wave = waves()[8]
    torch.testing.assert_close(build_encoder("mfcc")(wave), MFCC(16000)(wave), rtol=0, atol=0)
    mel = build_encoder("log-mel", frames_per_token=2)
    expected = MelSpectrogram(MelConfig()).encode(wave)
    even = expected[: len(expected) // 2 * 2].reshape(-1, 2, 80).mean(1)
    torch.testing.assert_close(mel(wave)[: len(even)], even)
    assert (mel.frame_rate, mel.num_features) == (50.0, 80)


def test_features_do_not_depend_on_threads(models):
    encoder = build_encoder(f"hf:{models('hubert')[0]}:2")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = encoder(waves()[8])
        torch.set_num_threads(4)
        assert torch.equal(encoder(waves()[8]), one) and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


# ---- frames ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_samples", [1, 79, 320, 321, 399, 400, 16000, 16079])
@pytest.mark.parametrize("kind", [*KINDS, "mfcc"])
def test_number_of_frames_is_the_codecs(models, kind, num_samples):
    encoder = build_encoder("mfcc" if kind == "mfcc" else f"hf:{models(kind)[0]}:1", frames_per_token=2)
    assert isinstance(encoder, FeatureEncoder)
    features = encoder(np.resize(waves()[5], num_samples))
    hop = 320 if kind == "mfcc" else 640
    assert features.shape == (-(-num_samples // hop), encoder.num_features)
    assert features.dtype == torch.float32 and bool(features.isfinite().all())
    assert encoder.frame_rate == 16000 / hop


@pytest.mark.parametrize("length", [1, 250, 251, 1499, 1500, 1501, 2750, 2751, 9999])
def test_windows_cover_each_frame_once_with_context(length):
    kept = []
    for begin, end, keep_from, keep_to in windows(length):
        assert begin <= keep_from < keep_to <= end and end - begin <= WINDOW
        assert keep_from - begin == (OVERLAP // 2 if begin else 0)
        assert end - keep_to == (OVERLAP // 2 if end < length else 0)
        kept += range(keep_from, keep_to)
    assert kept == list(range(length))
    assert len(windows(length)) == 1 or length > WINDOW


@pytest.mark.parametrize("kind", ["whisper", "hubert-stable", "wav2vec2-bert"])
def test_long_recordings_go_in_windows(models, kind):
    """A window's kept part equals the window alone, and kept parts join without a gap."""
    encoder = build_encoder(f"hf:{models(kind)[0]}:1")
    wave = np.resize(np.concatenate(waves()), 2750 * 320 + 5)
    features = encoder(wave)
    length = -(-len(wave) // 320)
    assert features.shape == (length, 32)
    assert len(windows(length)) == 3
    inputs = encoder._family.prepare(wave, length)
    with torch.inference_mode():
        for begin, end, keep_from, keep_to in [(0, 1500, 0, 1375), (1250, 2750, 1375, 2625)]:
            alone = encoder._family.run(inputs, begin, end, 1)
            torch.testing.assert_close(
                features[keep_from:keep_to],
                alone[keep_from - begin : keep_to - begin],
                rtol=1e-5,
                atol=1e-5,
            )


# ---- specs and descriptions --------------------------------------------------------------------------------
def test_specs():
    assert EncoderSpec.parse("hf:facebook/hubert-base-ls960:9") == EncoderSpec(
        "hf", "facebook/hubert-base-ls960", 9
    )
    assert EncoderSpec.parse("hf:C:/models/x:0").name == "C:/models/x"
    assert str(EncoderSpec.parse("hf:a/b:12")) == "hf:a/b:12" and str(EncoderSpec.parse("mfcc")) == "mfcc"
    for bad in ("hubert", "hf:", "hf:a/b", "hf:a/b:", "hf:a/b:x", "hf::3", "hf:a/b:-1", "mfcc:2"):
        with pytest.raises(ConfigError, match="expected"):
            EncoderSpec.parse(bad)
    with pytest.raises(ConfigError, match="frames_per_token must be at least 1, got 0"):
        EncoderSpec.parse("mfcc", frames_per_token=0)


def test_descriptions(models, tmp_path):
    folder, model, _ = models("hubert")
    described = build_encoder(f"hf:{folder}:2").describe()
    assert described == {
        "encoder": f"hf:{folder}:2",
        "frames_per_token": 1,
        "sample_rate": 16000,
        "frame_rate": 50.0,
        "num_features": 32,
        "model_type": "hubert",
        "weights_sha256": weights_sha256(folder),
        "do_normalize": False,
    }
    json.dumps(described)
    # Weights in several files give the same features and a hash of their own.
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    split = HFEncoder(EncoderSpec("hf", str(tmp_path), 2))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert split.describe()["weights_sha256"] != described["weights_sha256"]
    torch.testing.assert_close(split(waves()[0]), build_encoder(f"hf:{folder}:2")(waves()[0]), rtol=0, atol=0)


# ---- refusals ----------------------------------------------------------------------------------------------
def copy_model(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_refuses_waves(models):
    for spec in ("mfcc", f"hf:{models('hubert')[0]}:1"):
        encoder = build_encoder(spec)
        with pytest.raises(AudioError, match="expected a waveform at 16000 Hz, got 8000 Hz; resample"):
            encoder(waves()[0], 8000)
        with pytest.raises(AudioError, match="at least one sample"):
            encoder(np.zeros(0, np.float32))
        with pytest.raises(AudioError, match="not a finite number"):
            encoder(np.full(500, np.nan, np.float32))


def test_refuses_folders(models, tmp_path):
    good = models("hubert")[0]
    with pytest.raises(TokenizerError, match=r"folder /no/such/model does not exist; give a model's folder"):
        build_encoder("hf:/no/such/model:3")
    with pytest.raises(TokenizerError, match=r"layer 4 does not exist, the model has 3 layers.*0 .*to 3"):
        build_encoder(f"hf:{good}:4")
    copied = copy_model(good, tmp_path / "a")
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no preprocessor_config\.json"):
        build_encoder(f"hf:{copied}:1")
    copied = copy_model(good, tmp_path / "b")
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(TokenizerError, match=r"only pytorch_model\.bin; pickled weights are not read"):
        build_encoder(f"hf:{copied}:1")
    copied = copy_model(good, tmp_path / "c")
    (copied / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        build_encoder(f"hf:{copied}:1")


def test_refuses_weights_that_are_missing(models, tmp_path):
    """transformers would fill them with random numbers and log a line."""
    copied = copy_model(models("hubert")[0], tmp_path / "a")
    weights = load_file(copied / "model.safetensors")
    name = "encoder.layers.0.attention.k_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(TokenizerError, match=rf"{name} is missing"):
        build_encoder(f"hf:{copied}:1")
    whisper = copy_model(models("whisper")[0], tmp_path / "b")
    weights = load_file(whisper / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "decoder" not in k},
        whisper / "model.safetensors",
        {"format": "pt"},
    )
    assert build_encoder(f"hf:{whisper}:1").num_features == 32  # the decoder is not needed


def test_refuses_other_models(models, tmp_path):
    import transformers as hf

    text = hf.BertModel(
        hf.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
        )
    )
    text.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="type 'bert' is not a speech encoder"):
        build_encoder(f"hf:{tmp_path / 'bert'}:1")
    copied = copy_model(models("hubert")[0], tmp_path / "slow")
    config = json.loads((copied / "preprocessor_config.json").read_text())
    (copied / "preprocessor_config.json").write_text(json.dumps(config | {"sampling_rate": 8000}))
    with pytest.raises(TokenizerError, match="its model works at 8000 Hz, but only 16000 Hz"):
        build_encoder(f"hf:{copied}:1")
