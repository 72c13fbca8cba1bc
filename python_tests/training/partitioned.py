"""A table that ZeRO-3 partitions from its construction on: fill it, use it, take a step. Started by torchrun.

``partitioned.py RESULTS``: each rank writes what it sees to the file RESULTS.RANK, as safetensors.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from speechlm_ext.model.embedding import MultiStreamEmbedding, whole
from speechlm_ext.training.engine import import_deepspeed, init_distributed

PRETRAINED = torch.arange(160.0).view(20, 8) / 100
SEED = 7


class Tied(nn.Module):
    """Embedding and head on one table, each of which a forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = MultiStreamEmbedding(40, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).logsumexp(-1).mean()


def run(model: nn.Module, start: Any, step: Any, seed: int) -> dict[str, Tensor]:
    """Fill the table, then ``start()`` the engine and take a step with the same ids on every rank."""
    found = {}
    table = model.embedding
    table.load_text_rows(PRETRAINED, 10, 30, generator=torch.Generator().manual_seed(seed))
    with whole(table.weight):
        found["filled"] = table.weight.detach().clone()
    loss = start()(torch.arange(36).view(12, 3))
    found["loss"] = loss.detach().clone()
    step(loss)
    with whole(table.weight):
        found["stepped"] = table.weight.detach().clone()
    return found


def main(results: str) -> None:
    rank, _, _ = init_distributed()
    deepspeed = import_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # which is 1 otherwise
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Tied()
    assert model.embedding.weight.numel() == 0, "the table is not partitioned"
    engines: list[Any] = []

    def start() -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        engines.append(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])
        return engines[0]

    def step(loss: Tensor) -> None:
        engines[0].backward(loss)
        engines[0].step()

    # Ranks that draw differently: rank 0's rows count.
    found = run(model, start, step, SEED + rank)
    save_file({k: v.contiguous() for k, v in found.items()}, f"{results}.{rank}")


if __name__ == "__main__":
    main(sys.argv[1])
