"""The processes of a run: started through torchrun, or joined by each of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from speechlm_ext.errors import ConfigError, TrainingError
from speechlm_ext.training.config import TrainConfig, to_yaml
from speechlm_ext.training.engine import import_deepspeed
from speechlm_ext.training.resume import find_resume
from speechlm_ext.utils.files.checkpoint_folders import latest_checkpoint, recover
from speechlm_ext.utils.files.run_folders import CHECKPOINTS


def launch(config: TrainConfig) -> Path:
    """Run ``config.processes`` processes through torchrun; returns the last checkpoint's folder.

    Raises:
        ConfigError: the machine has fewer GPUs than processes.
        CheckpointError: the run cannot be resumed as asked; nothing is started.
        TrainingError: a process failed.
    """
    run_dir = Path(config.run_dir)
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and devices < config.processes:
        raise ConfigError(
            f"processes is {config.processes}, but this machine has {devices} GPU(s); each process needs one of "
            f"its own. Set --processes {devices}."
        )
    root = run_dir / CHECKPOINTS
    if root.is_dir():
        recover(root)
    find_resume(config, root)  # fail before anything is started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), "utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={config.processes}", "-m"]
        command = [*torchrun, "speechlm_ext.cli", "train", "--config", str(path)]
        code = subprocess.run(command, check=False).returncode
    newest = latest_checkpoint(root)
    if code != 0 or newest is None:
        left = f"no checkpoint is in {root}" if newest is None else f"the newest checkpoint is {newest}"
        raise TrainingError(f"a training process ended with exit code {code}; its message is above; {left}.")
    return newest


def init_distributed() -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, or make one of a single process.

    Returns:
        ``(rank, world, device)``.
    """
    deepspeed = import_deepspeed()
    alone: dict[str, str] = {}
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        os.environ.update(alone, LOCAL_RANK="0")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if use_cuda else "gloo", auto_mpi_discovery=False, verbose=False
        )
    for name in alone:  # processes started from this one would take its port, and its rank
        del os.environ[name]
    device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def set_threads(config: TrainConfig) -> int:
    """Give each process of this machine its share of the cores; returns the number of threads."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // local_world)
    torch.set_num_threads(threads)
    return threads


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
