"""``hf:NAME:LAYER``: hidden states of a Hugging Face speech encoder as features.

Three families, by ``model_type`` of the model's ``config.json``:

- **Whisper** (``whisper``): mel frames through the convolutions, the first positions, the layers. The layers run on
  the recording's true length: padding to 30 s costs many times the work and clusters no better.
- **waveform models** (HuBERT, wav2vec 2.0, WavLM, data2vec-audio, UniSpeech, …): a stack of strided convolutions.
- **wav2vec2-bert** (``wav2vec2-bert``): filter-bank frames, two stacked to one.

A model's input is prepared for the whole recording (normalization included) and padded with zeros to a full last frame:
frame ``i`` starts where the model's own frame ``i`` starts. Recordings longer than 30 s (1500 frames of 20 ms) go
through the layers in windows of 1500 frames that overlap by 250. The first half of an overlap comes from the first
window and the second half from the next, so every frame has at least 125 frames of context on both sides, or the
recording's end. Positions count from 0 in each window.

Only safetensors weights are read, and no code of a model's repository is run. A weight that is missing in the file is
an error: transformers would initialize it at random.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from speechlm_ext.errors import TokenizerError, foreign_errors
from speechlm_ext.tokenizers.encoders.spec import (
    SAMPLE_RATE,
    EncoderSpec,
    FeatureEncoder,
    average_frames,
    check_encoder_wave,
)
from speechlm_ext.tokenizers.encoders.weights import load_parts, model_folder, weights_sha256
from speechlm_ext.utils.device import one_thread

WINDOW = 1500
"""Max. frames that go through the layers at once: Whisper's number of positions."""
OVERLAP = 250
"""Frames that a window shares with the next."""


class HFEncoder(FeatureEncoder):
    """A Hugging Face speech encoder up to one hidden state.

    On the CPU it runs on one thread, so the features do not depend on the number of cores; use several processes to
    encode recordings in parallel.

    Args:
        spec: of kind ``hf``.
        device: where the model runs, in float32.

    Raises:
        TokenizerError: the model is missing, damaged or not a speech encoder of a known family, works at another
            sampling rate, or has no such layer.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, spec: EncoderSpec, *, device: str | torch.device = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.folder = model_folder(spec.name)
        self._config, self._extractor, self._model = load_parts(self.folder, spec)
        where = f"feature encoder {spec}: the model in {self.folder} cannot be used"
        with foreign_errors(TokenizerError, where, "Copy its folder again."):
            self._set_up(spec)
        self._model.to(self.device)

    def _set_up(self, spec: EncoderSpec) -> None:
        """Set the model's sizes, and run it on a short sound to check its configuration and extractor."""
        self._family = _FAMILIES.get(self._config.model_type, _Waveform)(self._model, self._extractor)
        layers = self._family.layers
        if spec.layer > len(layers):
            raise TokenizerError(
                f"feature encoder {spec}: layer {spec.layer} does not exist, the model has {len(layers)} layers. "
                f"Choose one of 0 (what enters the first layer) to {len(layers)} (the output of the last)."
            )
        # Hidden state L is the input of layer L + 1; later layers are not needed.
        del layers[spec.layer + 1 :]
        rate = int(self._extractor.sampling_rate)
        if rate != SAMPLE_RATE:
            raise TokenizerError(
                f"feature encoder {spec}: its model works at {rate} Hz, but only {SAMPLE_RATE} Hz is supported; choose "
                "another model."
            )
        self._samples_per_frame = self._family.samples_per_frame
        if not 0 < self._samples_per_frame <= SAMPLE_RATE:
            raise ValueError(f"a frame has {self._samples_per_frame} samples")
        self.frame_rate = SAMPLE_RATE / self._samples_per_frame / spec.frames_per_token
        self.num_features = int(self._config.hidden_size)
        sound = np.sin(np.arange(2 * self._samples_per_frame * spec.frames_per_token, dtype=np.float32))
        with one_thread():
            shape = tuple(self._encode(sound, torch.device("cpu")).shape)
        if shape != (2, self.num_features):
            raise ValueError(f"expected features {[2, self.num_features]} of two frames, got {list(shape)}")

    def __call__(self, wave: np.ndarray, sample_rate: int | None = None) -> torch.Tensor:
        """See `FeatureEncoder`."""
        wave = check_encoder_wave(wave, sample_rate, self)
        if self.device.type != "cpu":
            return self._encode(wave, self.device)
        with one_thread():
            return self._encode(wave, self.device)

    @torch.inference_mode()
    def _encode(self, wave: np.ndarray, device: torch.device) -> torch.Tensor:
        length = math.ceil(len(wave) / self._samples_per_frame)
        inputs = self._family.prepare(wave, length).to(device)
        parts = []
        for window in windows(length):
            hidden_TF = self._family.run(inputs, window.start, window.end, self.spec.layer)
            if len(hidden_TF) != window.end - window.start:
                raise TokenizerError(
                    f"feature encoder {self.spec}: expected {window.end - window.start} frames of the model, got "
                    f"{len(hidden_TF)}; models that change the frame rate between layers are not supported."
                )
            kept_TF = hidden_TF[window.keep_start - window.start : window.keep_end - window.start]
            parts.append(kept_TF.float().cpu())
        features_TF = parts[0] if len(parts) == 1 else torch.cat(parts)
        return average_frames(features_TF, self.spec.frames_per_token).contiguous()

    @cached_property
    def weights_sha256(self) -> str:
        """sha256 of the model's weights file (of several, over their sha256s); 64 hex digits."""
        return weights_sha256(self.folder)

    def describe(self) -> dict[str, Any]:
        """See `FeatureEncoder`: with the weights' sha256 and how the input is normalized."""
        return super().describe() | {
            "model_type": self._config.model_type,
            "weights_sha256": self.weights_sha256,
            "do_normalize": bool(getattr(self._extractor, "do_normalize", False)),
        }


class Window(NamedTuple):
    """A window of frames ``start`` to ``end``, of which ``keep_start`` to ``keep_end`` are kept."""

    start: int
    end: int
    keep_start: int
    keep_end: int


def windows(length: int) -> list[Window]:
    """Cut ``length`` frames into windows of at most `WINDOW` frames.

    The kept parts follow each other without a gap; a window is longer than `OVERLAP` unless it is the only one.
    """
    starts = range(0, max(length - OVERLAP, 1), WINDOW - OVERLAP)
    result = []
    for start in starts:
        is_last = start == starts[-1]
        end = length if is_last else start + WINDOW
        keep_start = start + OVERLAP // 2 if start else 0
        result.append(Window(start, end, keep_start, end if is_last else end - OVERLAP // 2))
    return result


# ---- the families: prepare(wave, T) -> inputs of the whole recording; run(inputs, start, end, layer) -> [T, F] ----
class _Whisper:
    def __init__(self, model: Any, extractor: Any) -> None:
        self._encoder, self._extractor = model, extractor
        self.layers = model.layers
        self._per_frame = model.conv1.stride[0] * model.conv2.stride[0]
        self.samples_per_frame = self._per_frame * extractor.hop_length
        self._num_layers = len(model.layers)
        # transformers before 5 wants a mask of heads by position and returns tuples.
        names = inspect.signature(type(model.layers[0]).forward).parameters
        self._more: dict[str, Any] = {"layer_head_mask": None} if "layer_head_mask" in names else {}

    def prepare(self, wave: np.ndarray, length: int) -> torch.Tensor:
        # Zeros up to the end of the last window, so that the frames are those of a recording padded to 30 s.
        padded = np.zeros(length * self.samples_per_frame + self._extractor.n_fft, np.float32)
        padded[: len(wave)] = wave
        mel = self._extractor(padded, sampling_rate=SAMPLE_RATE, padding="do_not_pad", truncation=False)
        return torch.from_numpy(np.asarray(mel["input_features"][0][:, : length * self._per_frame]))

    def run(self, inputs: torch.Tensor, start: int, end: int, layer: int) -> torch.Tensor:
        encoder, gelu = self._encoder, torch.nn.functional.gelu
        mel = inputs[None, :, start * self._per_frame : end * self._per_frame]
        x = gelu(encoder.conv2(gelu(encoder.conv1(mel)))).transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        for block in self.layers[:layer]:
            x = block(x, attention_mask=None, **self._more)
            x = x[0] if isinstance(x, tuple) else x
        return (encoder.layer_norm(x) if layer == self._num_layers else x)[0]


class _HiddenStates:
    """Models whose forward returns the hidden states."""

    def __init__(self, model: Any, extractor: Any) -> None:
        self._model, self._extractor = model, extractor
        self.layers = model.encoder.layers
        self._num_layers = len(self.layers)
        model.adapter = None  # it follows the last layer

    def _hidden(self, inputs: torch.Tensor, layer: int) -> torch.Tensor:
        output = self._model(inputs, output_hidden_states=True)
        # transformers' version decides whether the last of hidden_states has the final norm.
        return (output.last_hidden_state if layer == self._num_layers else output.hidden_states[layer])[0]


class _Waveform(_HiddenStates):
    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        stride = field = 1
        for kernel, step in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
            field += (kernel - 1) * stride
            stride *= step
        self.samples_per_frame, self._field = stride, field

    def prepare(self, wave: np.ndarray, length: int) -> torch.Tensor:
        values = np.asarray(self._extractor(wave, sampling_rate=SAMPLE_RATE)["input_values"][0], np.float32)
        padded = np.zeros((length - 1) * self.samples_per_frame + self._field, np.float32)
        used = min(len(padded), len(values))
        padded[:used] = values[:used]
        return torch.from_numpy(padded)

    def run(self, inputs: torch.Tensor, start: int, end: int, layer: int) -> torch.Tensor:
        part = inputs[start * self.samples_per_frame : (end - 1) * self.samples_per_frame + self._field]
        return self._hidden(part[None], layer)


class _Wav2Vec2Bert(_HiddenStates):
    _WINDOW, _HOP = 400, 160  # of the filter bank, fixed in its feature extractor

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        self._stride = int(extractor.stride)
        self.samples_per_frame = self._HOP * self._stride

    def prepare(self, wave: np.ndarray, length: int) -> torch.Tensor:
        padded = np.zeros((length * self._stride - 1) * self._HOP + self._WINDOW, np.float32)
        used = min(len(padded), len(wave))
        padded[:used] = wave[:used]
        values = self._extractor(padded, sampling_rate=SAMPLE_RATE)["input_features"][0]
        return torch.from_numpy(np.asarray(values, np.float32))

    def run(self, inputs: torch.Tensor, start: int, end: int, layer: int) -> torch.Tensor:
        return self._hidden(inputs[None, start:end], layer)


_FAMILIES: dict[str, Callable[[Any, Any], Any]] = {"whisper": _Whisper, "wav2vec2-bert": _Wav2Vec2Bert}
