"""MultiStreamHead under ZeRO 1, 2 and 3 on two processes, tied and untied, with gradient checkpointing.

Started by torchrun: ``partitioned_head.py RESULTS``: each rank writes what it sees to RESULTS.RANK, as safetensors.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.config import LossSettings
from speechlm_ext.model.embedding import MultiStreamEmbedding, whole
from speechlm_ext.model.head import MultiStreamHead
from speechlm_ext.training.engine import import_deepspeed, init_distributed

LAYOUT = TokenLayout.build(ssl=7, codec=(5, 5), text=11)
D, STEPS, ROWS = 8, 2, 12
VARIANTS = [
    (tied, LossSettings(scope=scope, recompute=recompute))
    for tied in (False, True)
    for scope, recompute in (("own", False), ("modality", True))
]


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
        with whole(parameter), torch.no_grad():
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
        with whole(parameter):
            found[f"{name}.{key}"] = parameter.detach().clone()
    return found


def main(results: str) -> None:
    rank, _, _ = init_distributed()
    deepspeed = import_deepspeed()
    found: dict[str, Tensor] = {}
    for stage in (1, 2, 3):
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # which is 1 otherwise
        }
        for number, (tied, settings) in enumerate(VARIANTS):
            name = f"{stage}.{number}"
            with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
                model = Small(tied, settings)
            if stage == 3:
                assert model.head.weight.numel() == 0, "the head is not partitioned"
            fill(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
            assert engine.zero_optimization_stage() == stage
            losses = []
            for step in range(STEPS):
                loss = engine(*batch(rank, step))
                losses.append(loss.detach().clone())
                engine.backward(loss)
                engine.step()
            found[f"{name}.losses"] = torch.stack(losses)
            found |= values(engine.module, name)
            engine.destroy()
    save_file({k: v.contiguous() for k, v in found.items()}, f"{results}.{rank}")


if __name__ == "__main__":
    main(sys.argv[1])
