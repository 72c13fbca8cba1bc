"""The counted calls of a whole model: a training step and a decode step of a Llama with any number of layers.

Both have the form a + b L for L layers. The weights are bfloat16, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import speechlm_ext.ops as ops
from benchmarks.generation.models import tts_prompt
from python_tests.cuda_on_cpu.launches.cases import Case, Setup, opus_layout
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.model.backbone import decode_layers
from speechlm_ext.model.backbone.fused_weights import FusedLinear
from speechlm_ext.model.config import LossSettings, ModelConfig
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.ops.common.cublas import has_cublas
from speechlm_ext.training.config import ModelSettings

#: Numbers of layers that are counted: two give a and b, the third confirms them.
LAYERS = (1, 2, 3)


def _model(device: torch.device, num_layers: int, scope: str) -> SpeechLMModel:
    settings = ModelSettings(
        hidden_size=8, num_layers=num_layers, num_heads=2, ffn_size=16, max_positions=512,
        loss=LossSettings(scope=scope), verify_backbone=False,
    )  # fmt: skip
    config = ModelConfig(settings.llama(), loss=settings.loss, verify_backbone=False)
    torch.manual_seed(0)
    return SpeechLMModel(config, opus_layout()).to(torch.bfloat16).to(device)


@cache
def _batch() -> ops.PackedBatch:
    """Two samples, two rows of text and two frames of speech, with delays of 0; the last of each has no label."""
    layout, rng = opus_layout(), np.random.default_rng(0)
    segments, weights = [], []
    for modality, num_frames in (("text_bpe", 2), ("codec_ssl", 2)):
        spans = layout.content_ranges(modality)
        ids = [
            rng.integers(*span, num_frames) if span else np.full(num_frames, layout.pad_id) for span in spans
        ]
        segments.append(torch.from_numpy(np.stack(ids, 1)))
        weights.append(torch.tensor([float(span is not None) for span in spans]).expand(num_frames, -1))
    return ops.delay_pack(segments, delays=[0] * 9, pad_ids=[layout.pad_id] * 9, loss_weight=weights)


def train_step(device: torch.device, num_layers: int, scope: str = "own") -> Callable[[], Tensor]:
    """Forward, backward and a fused AdamW step of transformers' own layers; without DeepSpeed, clipping and the log."""
    model = _model(device, num_layers, scope)
    facts, batch = model.facts(_batch()).to(device), _batch().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        out = model(batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens, facts=facts)
        out.loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss_sum.detach()

    has_cublas(batch.loss_weight)  # it multiplies and waits once on each device
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    optimizer.zero_grad(set_to_none=True)
    return step


class _JointCopy(FusedLinear):
    """Joint weights of simulated CUDA tensors, which have no address: a copy, that is not checked."""

    @classmethod
    def of(cls, linears: Sequence[torch.nn.Linear]) -> _JointCopy:
        return cls(tuple(linears), torch.cat([x.weight.detach() for x in linears]), None)

    def is_current(self) -> bool:
        return True


def _decoding(device: torch.device, num_layers: int) -> Engine:
    """An engine in the middle of two requests."""
    model = _model(device, num_layers, "own").eval()
    is_simulated = type(model.embedding.weight.data) is not torch.Tensor
    fuse = mock.patch.object(decode_layers, "fuse_linears", _JointCopy.of)
    with fuse if is_simulated else contextlib.nullcontext():
        engine = Engine(model, num_slots=2, cuda_graphs=False)
        engine.admit([DecodeJob(i, tts_prompt(opus_layout(), str(i), 3, 40, seed=i)) for i in range(2)])
        engine.step()
    assert engine._cache.layers is not None
    return engine


def decode_step(device: torch.device, num_layers: int) -> Callable[[], object]:
    """A step of two requests outside a CUDA graph; in a graph all of it is one launch."""
    return _decoding(device, num_layers).step


def decode_check(device: torch.device) -> Callable[[], object]:
    """The check for requests that are done, once in eight steps."""
    return _decoding(device, 1).collect


#: Name -> setup for a number of layers.
DEPTHS: dict[str, tuple[str, Callable[[torch.device, int], Callable[[], object]]]] = {
    "training step": ("training", train_step),
    "training step, scopes by modality": ("training", partial(train_step, scope="modality")),
    "decode step": ("decoding", decode_step),
}


def at_depth(name: str, num_layers: int) -> Case:
    """A case of ``DEPTHS`` with a number of layers."""
    page, setup = DEPTHS[name]
    call: Setup = lambda device: setup(device, num_layers)  # noqa: E731
    return Case(page, f"{name}, {num_layers} layers", call)


CASES = [
    *(at_depth(name, num_layers) for name in DEPTHS for num_layers in LAYERS),
    Case("decoding", "check for finished requests", decode_check),
]
