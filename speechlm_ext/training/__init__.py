"""Training: DeepSpeed is the one engine, on one CPU process as on many GPUs."""

from speechlm_ext.training.config import ModelSettings, OptimizerSettings, TrainConfig
from speechlm_ext.training.train import run_train

__all__ = ["ModelSettings", "OptimizerSettings", "TrainConfig", "run_train"]
