"""A table and a head that ZeRO partitions over two processes: filled, used, and trained for a few steps.

``main`` runs on both processes (``drive.py``); each rank writes what it sees to ``partitioned.RANK``, as safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.config import LossSettings
from speechlm_ext.model.embedding import MultiStreamEmbedding, gathered
from speechlm_ext.model.head import MultiStreamHead
from speechlm_ext.training.engine import import_deepspeed
from speechlm_ext.training.launch import init_distributed

PRETRAINED = torch.arange(160.0).view(20, 8) / 100
SEED = 7
LAYOUT = TokenLayout.build(ssl=7, codec=(5, 5), text=11)
D, STEPS, ROWS = 8, 2, 12
VARIANTS = [
    (tied, LossSettings(scope=scope, recompute=recompute))
    for tied in (False, True)
    for scope, recompute in (("own", False), ("modality", True))
]


class Tied(nn.Module):
    """Embedding and head on one table, each of which a forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = MultiStreamEmbedding(40, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).logsumexp(-1).mean()


def fill_and_step(
    model: Tied, start: Callable[[], Any], step: Callable[[Tensor], None], seed: int
) -> dict[str, Tensor]:
    """Fill the table, then ``start()`` the engine and take a step with the same ids on every rank."""
    found = {}
    table = model.embedding
    table.load_text_rows(PRETRAINED, 10, 30, generator=torch.Generator().manual_seed(seed))
    with gathered(table.weight):
        found["filled"] = table.weight.detach().clone()
    loss = start()(torch.arange(36).view(12, 3))
    found["loss"] = loss.detach().clone()
    step(loss)
    with gathered(table.weight):
        found["stepped"] = table.weight.detach().clone()
    return found


class Small(nn.Module):
    """Embedding, a checkpointed layer, and a head that may share the embedding's table."""

    def __init__(self, tied: bool, settings: LossSettings) -> None:
        super().__init__()
        self.embedding = MultiStreamEmbedding(LAYOUT.vocab_size, D)
        self.body = nn.Linear(D, D)
        self.head = MultiStreamHead(
            LAYOUT.vocab_size,
            D,
            LAYOUT.num_streams,
            LAYOUT.scopes(settings.scope),
            settings,
            weight=self.embedding.weight if tied else None,
            contents=LAYOUT.stream0_contents() if settings.scope == "modality" else None,
        )

    def forward(self, ids: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        def layer(x: Tensor) -> Tensor:
            return torch.tanh(self.body(x))

        hidden = checkpoint(layer, self.embedding(ids), use_reentrant=False)
        return self.head(hidden, labels, weight).loss_sum


def fill(model: Small) -> None:
    """The same values on every rank, whatever part of each table it holds."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        with gathered(parameter), torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Speech and text rows, other ones on each rank and in each step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.zeros(ROWS, LAYOUT.num_streams, dtype=torch.int64)
    for s, (start, end) in enumerate(LAYOUT.content_ranges("codec_ssl")):  # type: ignore[misc]
        ids[:, s] = torch.randint(start, end, (ROWS,), generator=generator)
    start, end = LAYOUT.interval("text_bpe")
    ids[::2] = LAYOUT.pad_id
    ids[::2, 0] = torch.randint(start, end, (ROWS // 2,), generator=generator)
    labels = ids.roll(-1, 0)
    weight = torch.rand(labels.shape, generator=generator) * (labels != LAYOUT.pad_id)
    return ids, labels, weight


def values(model: Small, name: str) -> dict[str, Tensor]:
    """All parameters, gathered."""
    found = {}
    for key, parameter in model.named_parameters():
        with gathered(parameter):
            found[f"{name}.{key}"] = parameter.detach().clone()
    return found


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings for a ZeRO stage, with every parameter partitioned in stage 3 and no clipping."""
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # which is 1 otherwise
    }


def new_engine(model: nn.Module, lr: float, stage: int) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return import_deepspeed().initialize(model=model, optimizer=optimizer, config=zero_config(stage))[0]


def trained_table(rank: int) -> dict[str, Tensor]:
    """What a table partitioned from its construction on holds; the ranks draw differently, and rank 0's rows count."""
    with import_deepspeed().zero.Init(config_dict_or_path=zero_config(3)):
        model = Tied()
    assert model.embedding.weight.numel() == 0, "the table is not partitioned"
    engines: list[Any] = []

    def step(loss: Tensor) -> None:
        engines[0].backward(loss)
        engines[0].step()

    def start() -> Any:
        engines.append(new_engine(model, 0.5, 3))
        return engines[0]

    found = fill_and_step(model, start, step, SEED + rank)
    engines[0].destroy()
    return found


def trained_head(rank: int, stage: int, variant: tuple[bool, LossSettings], name: str) -> dict[str, Tensor]:
    """Losses and parameters of a few steps with a head, under ``name``."""
    with import_deepspeed().zero.Init(config_dict_or_path=zero_config(3), enabled=stage == 3):
        model = Small(*variant)
    if stage == 3:
        assert model.head.weight.numel() == 0, "the head is not partitioned"
    fill(model)
    engine = new_engine(model, 0.1, stage)
    assert engine.zero_optimization_stage() == stage
    losses = []
    for step in range(STEPS):
        loss = engine(*batch(rank, step))
        losses.append(loss.detach().clone())
        engine.backward(loss)
        engine.step()
    found = {f"{name}.losses": torch.stack(losses), **values(engine.module, name)}
    engine.destroy()
    return found


def sparse_table(rank: int, stage: int) -> dict[str, Tensor]:
    """A table with a sparse gradient after a step of SGD, or none if the ZeRO stage refuses such a gradient."""
    table = MultiStreamEmbedding(40, 8, sparse=True)
    table.load_text_rows(torch.ones(39, 8), 1, 40)
    engine = new_engine(table, 0.5, stage)
    try:
        engine.backward(engine(sparse_ids(rank)).square().sum())
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        engine.step()
        return {f"sparse.{stage}": table.weight.detach().clone()}
    except RuntimeError as error:
        assert "sparse" in str(error).lower(), error
        return {}
    finally:
        engine.destroy()


def sparse_ids(rank: int) -> Tensor:
    return torch.arange(9).view(3, 3) * (1 + rank)


def main(root: Path) -> None:
    rank, _, _ = init_distributed()
    found = trained_table(rank)
    for stage in (1, 2, 3):
        for number, variant in enumerate(VARIANTS):
            found |= trained_head(rank, stage, variant, f"{stage}.{number}")
    for stage in (0, 1, 2, 3):
        found |= sparse_table(rank, stage)
    save_file({k: v.contiguous() for k, v in found.items()}, root / f"partitioned.{rank}")
