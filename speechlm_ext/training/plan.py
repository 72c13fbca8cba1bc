"""``speechlm plan``: the pack plan of a training recipe and an estimate of its memory, before a GPU is held.

Settings that cannot work are refused here with the errors that training would raise. The number of parameters is exact;
activations are those of a Llama-shaped backbone and of a frame transformer, plus one chunk of logits. Not counted are
the allocator's slack and communication buffers: add 10 to 20 %.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.plan.report import PlanReport, format_report, make_report
from speechlm_ext.data.tokens.folder import open_tokens
from speechlm_ext.errors import PlanError
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model import SpeechLMModel
from speechlm_ext.model.backbone.proof import probe_backbone
from speechlm_ext.training.config import ModelSettings, TrainConfig

#: Minimum number of rows of logits that the loss holds at a time.
_LOGIT_ROWS = 512


@dataclass(frozen=True)
class PlanModelSettings(ModelSettings):
    """The model, as in a training recipe."""

    precision: Literal["fp32", "bf16"] | None = None
    """Old name of ``precision`` at the top."""
    zero_stage: int | None = None
    """Old name of ``zero_stage`` at the top."""
    world: int | None = None
    """Old name of ``processes`` at the top."""
    activation_checkpointing: bool | None = None
    """Old name of ``activation_checkpointing`` at the top."""


@dataclass(frozen=True)
class PlanCommandConfig(TrainConfig):
    """Print what a training run would see and need, and refuse settings that cannot work.

    ``speechlm plan --config recipe.yaml`` takes a recipe of ``speechlm train`` or its ``data`` part alone; the other
    settings then have their defaults. ``processes`` is the number of processes on all machines.
    """

    run_dir: str = ""
    """Not used; a recipe has it."""
    data: PlanConfig = field(default_factory=PlanConfig)
    """Token folders, tasks, and how samples are packed."""
    model: PlanModelSettings = field(default_factory=PlanModelSettings)
    """The model."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        for name in ("precision", "zero_stage", "world", "activation_checkpointing"):
            value = getattr(self.model, name)
            if value is not None:
                object.__setattr__(self, "processes" if name == "world" else name, value)
        super().__post_init__()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each process."""

    num_parameters: int
    """Values, not bytes."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def run_plan(config: PlanCommandConfig) -> tuple[PlanReport, MemoryEstimate]:
    """Make the plan of the first epoch, print report and memory estimate, and return them.

    Raises:
        SpeechLMError: data or settings with which training cannot work.
    """
    corpus = open_tokens(config.data.tokens, config.data.delays)
    report = make_report(corpus, config.data)
    model = empty_model(config.model, corpus.layout)
    if report.longest > model.max_positions:
        raise PlanError(
            f"the longest sample has {report.longest} rows but the model takes {model.max_positions} "
            "(model.max_positions). Raise it, or cut the recordings."
        )
    memory = estimate_memory(model, config)
    if config.json:
        print(json.dumps({**asdict(report), "memory": asdict(memory)}, indent=2))
    else:
        print(f"{format_report(report)}\n{format_memory(memory)}")
    return report, memory


def empty_model(settings: ModelSettings, layout: TokenLayout) -> SpeechLMModel:
    """The model with weights that have shapes but no memory (device ``meta``). Raises :class:`ConfigError`."""
    config = settings.model_config()
    # It computes, so not on device meta; the result is kept for the model.
    probe_backbone(config.backbone, verify=config.verify_backbone)
    with torch.device("meta"):
        return SpeechLMModel(config, layout)


def estimate_memory(model: SpeechLMModel, config: TrainConfig) -> MemoryEstimate:
    """Memory of one training step on packs of ``config.data.budget`` rows; ``model`` may be an :func:`empty_model`."""
    body, layout, rows = model.backbone.config, model.layout, config.data.budget
    bytes_per_value = 2 if config.precision == "bf16" else 4
    count = model.num_parameters()
    optimizer = count * (8 + (4 if config.precision == "bf16" else 0))
    weights = gradients = count * bytes_per_value
    optimizer //= config.processes if config.zero_stage >= 1 else 1
    gradients //= config.processes if config.zero_stage >= 2 else 1
    weights //= config.processes if config.zero_stage >= 3 else 1
    # Kept for the backward pass of a layer: two norms and their inputs, q, k, v, the attention's output, and gate,
    # up, their activation and product.
    D, num_heads = body.hidden_size, body.num_attention_heads
    kv = (getattr(body, "num_key_value_heads", None) or num_heads) / num_heads
    inside = int((6 + 2 * kv) * D) + 4 * (getattr(body, "intermediate_size", None) or 4 * D)
    checkpointing, num_layers = config.activation_checkpointing, body.num_hidden_layers
    per_row = num_layers * D + inside if checkpointing else num_layers * inside
    if config.model.frame_transformer is not None:
        # For each row and inner position of a frame, as if every row were a frame that is learnt.
        frame = config.model.frame_transformer
        W, L, F = frame.hidden_size, frame.num_layers, frame.ffn_size
        per_inner = (L * W + 8 * W + 4 * F if checkpointing else L * (8 * W + 4 * F)) + 3 * D + W
        per_row += (layout.num_streams - 1) * per_inner
    widest = max(sum(end - start for start, end in scope) for scope in layout.scopes("own"))
    return MemoryEstimate(
        count,
        weights,
        gradients,
        optimizer,
        activations=rows * (per_row + 2 * D) * bytes_per_value,
        logits=2 * min(rows, _LOGIT_ROWS) * widest * 4,
    )


def format_memory(memory: MemoryEstimate) -> str:
    """The estimate on one line."""
    sizes = asdict(memory)
    num_parameters = sizes.pop("num_parameters")
    parts = ", ".join(f"{name} {_size(value)}" for name, value in sizes.items())
    return f"memory per process, estimated: {_size(memory.total)} ({parts}); {num_parameters / 1e6:,.1f} M parameters"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
