"""Settings of ``speechlm train``; a YAML recipe mirrors these classes field by field."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Literal

import yaml

from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.errors import ConfigError
from speechlm_ext.model.backbone.acceleration import Acceleration
from speechlm_ext.model.backbone.body import backbone_settings
from speechlm_ext.model.config import FrameTransformerConfig, LossSettings, ModelConfig
from speechlm_ext.utils.options import check_positive


@dataclass(frozen=True)
class ModelSettings:
    """The model: a small Llama from scratch, or a pretrained backbone."""

    backbone: str | None = None
    """Folder of a pretrained transformers causal LM to start from; its text rows are copied, and the sizes below
    are then taken from it. The text tokenizer of the token folder must be that of the backbone."""
    verify_backbone: bool = True
    """Compare the backbone's text logits with those of the pretrained model's own code, and the text tokenizer with the
    backbone's. False skips both, and the checkpoint's config.json records it."""
    hidden_size: int = 256
    """Width D."""
    num_layers: int = 6
    """Number of transformer layers."""
    num_heads: int = 4
    """Number of attention heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads; default num_heads."""
    ffn_size: int = 704
    """Width inside the feed-forward part."""
    max_positions: int = 4096
    """Longest sequence in frames."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    tie_head: bool = False
    """Share one table between embedding and head."""
    heads: Literal["shared", "separate"] = "shared"
    """One output table for all streams, or output rows for every stream."""
    loss: LossSettings = field(default_factory=LossSettings)
    """How the multi-stream loss is computed."""
    frame_transformer: FrameTransformerConfig | None = None
    """A small transformer over the streams of a frame: the layout ``multi-scale``, which needs data.delays of 0."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ConfigError(
                f"model: hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}, and that a "
                f"multiple of num_kv_heads {self.num_kv_heads}."
            )
        if self.frame_transformer is not None:
            self.frame_transformer.check()

    def model_config(self) -> ModelConfig:
        """The configuration of the model. Raises :class:`ConfigError` for a backbone that cannot be used."""
        return ModelConfig(
            self.llama() if self.backbone is None else backbone_settings(self.backbone),
            loss=self.loss,
            tie_head=self.tie_head,
            heads=self.heads,
            frame_transformer=self.frame_transformer,
            verify_backbone=self.verify_backbone,
        )

    def llama(self) -> dict[str, object]:
        """The transformers configuration of the model from scratch."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads or self.num_heads,
            "intermediate_size": self.ffn_size,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
        }


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate, as a share of the peak."""
    warmup_steps: int = 100
    """Steps from 0 to the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; tables, norms and vectors are not decayed."""
    clip: float = 1.0
    """Maximum norm of the gradient; larger ones are scaled down."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr_ratio", "eps", "weight_decay", "clip"):
            value = getattr(self, name)
            if not 0 <= value <= 3e38:  # as float32 has them; NaN fails too
                raise ConfigError(f"optimizer.{name} must be a finite number of 0 or more, got {value}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must be from 0 to below 1, got {list(self.betas)}.")

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0) of ``total``: a pure function, so resume needs no state."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        low = self.lr * self.min_lr_ratio
        return low + 0.5 * (self.lr - low) * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TrainConfig:
    """Train a SpeechLM on token folders.

    ``speechlm train --config recipe.yaml``. Several processes on one machine: ``--processes N``; on many machines put
    ``torchrun … -m`` before ``speechlm_ext.cli train …``. Every setting can be overridden with a
    dotted option, e.g. ``--optimizer.lr 3e-4``.
    """

    run_dir: str
    """Folder of the run: resolved config, logs and checkpoints."""
    data: PlanConfig
    """Token folders, tasks, and how samples are packed."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """The model."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """The optimizer."""
    steps: int = 1000
    """Number of optimizer steps of the run."""
    accumulation: int = 1
    """Packs per process and optimizer step."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage: 1 partitions the optimizer over processes, 2 gradients too, 3 weights too; 0 nothing."""
    precision: str = "fp32"
    """``fp32`` or ``bf16``; bf16 keeps fp32 master weights."""
    acceleration: Acceleration = "auto"
    """Norms, rotary positions and gates of the backbone: ``packed`` (this package's, float32 on the CPU), ``liger`` (on
    a GPU), ``compile`` (``torch.compile`` of the layers), ``eager`` (transformers' own). ``auto`` takes packed on the
    CPU, and liger, else compile, on a GPU, where they can be had. All give the same losses up to rounding."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    log_every: int = 10
    """Steps between log lines."""
    resume: str = "auto"
    """``auto``: resume from the run folder's newest checkpoint if there is one; ``none``: the run folder must be new;
    or the path of a checkpoint, or of another run's folder, for its newest one."""
    verify: bool = True
    """Compare the checkpoint's files with their digests before resuming from it."""
    seed: int = 0
    """Seed of the initial weights."""
    processes: int = 1
    """Processes to start on this machine (ignored under torchrun). Two single-threaded processes learn faster from
    small packs than one process with two threads."""
    threads: int | None = None
    """CPU threads per process; default all cores divided by the processes."""
    tensorboard: bool = True
    """Write TensorBoard files beside the JSONL log, if tensorboard is installed."""

    def __post_init__(self) -> None:
        check_positive(
            self, "steps", "accumulation", "save_every", "keep_checkpoints", "log_every", "processes"
        )
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}.")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}.")


def to_yaml(config: TrainConfig) -> str:
    """A recipe that gives this configuration again."""
    plain = json.loads(json.dumps(asdict(config), default=str))  # tuples as lists, paths as strings
    return yaml.safe_dump(plain, sort_keys=False)
