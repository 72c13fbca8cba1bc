"""One step of the backbone alone: the fused layers beside transformers' layers, in four ways.

    python -m benchmarks.generation.decode_layers [--shape smoke|30m|1p7b] [--batches 1 4 16] [--keys 300]

``fused``: ours. ``layers``: transformers' layers with our cache, as backbones of other classes decode. ``static``:
transformers' own generation step, its layers with its StaticCache and SDPA. ``compiled``: the same through
torch.compile. Every rival's hidden states are compared with the fused step's before anything is timed. The rivals take
turns, a few steps each, and the fastest step of each counts: what else the machine does meets all of them. Each
measurement is a line of JSON as soon as it is made; a Markdown table ends the run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.common.emit import emit
from benchmarks.generation.models import SHAPES, build
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.backbone.body import plain_step, run_step
from speechlm_ext.utils.console import make_output_safe

#: Steps of a rival's turn.
TURN = 5
#: Steps that are compared.
COMPARED = 6
Step = Callable[[Tensor], Tensor]


class OursOrLayers:
    """A step over a :class:`KVCache`; ``rewind`` goes back to a number of rows."""

    def __init__(self, body: Any, step: Callable[..., Tensor], batch: int, num_rows: int) -> None:
        weight = next(body.parameters())
        self.body, self.step = body, step
        self.cache = KVCache(batch, num_rows, weight.dtype, weight.device)

    def rewind(self, num_rows: int) -> None:
        for slot in range(self.cache.num_slots):
            self.cache.restore(slot, num_rows)

    def __call__(self, x_BD: Tensor) -> Tensor:
        return self.step(self.body, x_BD, self.cache)


class Static:
    """A step of transformers' layers with its StaticCache, compiled or not."""

    def __init__(self, body: Any, is_compiled: bool, batch: int, num_rows: int) -> None:
        self.body, self.row = body, 0
        self.cache = StaticCache(config=body.config, max_cache_len=num_rows)
        self.forward = torch.compile(body, dynamic=False) if is_compiled else body

    def rewind(self, num_rows: int) -> None:
        self.row = num_rows
        for layer in self.cache.layers:
            if getattr(layer, "cumulative_length", None) is not None:
                layer.cumulative_length.fill_(num_rows)

    def __call__(self, x_BD: Tensor) -> Tensor:
        position = torch.full((len(x_BD), 1), self.row, device=x_BD.device)
        ours = self.body.config._attn_implementation
        self.body.set_attn_implementation("sdpa")
        try:
            out = self.forward(
                inputs_embeds=x_BD[:, None], position_ids=position, past_key_values=self.cache, use_cache=True
            )
        finally:
            self.body.set_attn_implementation(ours)
        self.row += 1
        return out.last_hidden_state[:, 0]


def rivals(body: Any, batch: int, num_rows: int, with_compiled: bool) -> dict[str, Any]:
    """Name -> a step with a cache of its own."""
    out: dict[str, Any] = {
        "fused": OursOrLayers(body, run_step, batch, num_rows),
        "layers": OursOrLayers(body, plain_step, batch, num_rows),
        "static": Static(body, False, batch, num_rows),
    }
    if with_compiled:
        out["compiled"] = Static(body, True, batch, num_rows)
    return out


def check(steps: dict[str, Any], x_TBD: Tensor) -> None:
    """Raise AssertionError unless all rivals compute the same states from an empty cache on."""
    found = {name: torch.stack([step(x_BD) for x_BD in x_TBD]).float() for name, step in steps.items()}
    right = found["layers"]
    bound = 1e-4 if x_TBD.dtype == torch.float32 else 0.1
    for name, states in found.items():
        difference = float((states - right).abs().max() / right.abs().max())
        if not difference <= bound:
            raise AssertionError(
                f"{name} differs from transformers' layers by {difference:.2g} of the largest value"
            )


@torch.inference_mode()
def measure(body: Any, batch: int, keys: int, rounds: int, with_compiled: bool) -> dict[str, float]:
    """Milliseconds of the fastest step of each rival."""
    weight = next(body.parameters())
    steps = rivals(body, batch, keys + TURN + 1, with_compiled)
    assert steps["fused"].cache.layers is None
    width = body.config.hidden_size
    x_TBD = torch.randn(COMPARED, batch, width, device=weight.device, dtype=weight.dtype)
    check(steps, x_TBD)
    assert steps["fused"].cache.layers is not None, "this body has no fused layers"
    sync = torch.cuda.synchronize if weight.is_cuda else lambda: None
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            step.rewind(keys)
            for _ in range(TURN):
                sync()
                start = time.perf_counter()
                step(x_TBD[0])
                sync()
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="30m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--keys", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rival out")
    arguments = parser.parse_args()
    body = build(arguments.shape, arguments.device).backbone
    rows = []
    for batch in arguments.batches:
        found = measure(body, batch, arguments.keys, arguments.rounds, not arguments.no_compile)
        row: dict[str, Any] = {"shape": arguments.shape, "batch": batch, "keys": arguments.keys}
        emit(row | {f"{name}_ms": round(ms, 3) for name, ms in found.items()})
        rows.append((batch, found))
    names = list(rows[0][1])
    print(
        f"\ntorch {torch.__version__}, {torch.get_num_threads()} thread(s); ms, and times as long as fused.\n"
    )
    print(f"| batch | {' | '.join(names)} |")
    print("|---" * (len(names) + 1) + "|")
    for batch, found in rows:
        cells = [f"{ms:.2f} ({ms / found['fused']:.2f}x)" for ms in found.values()]
        print(f"| {batch} | {' | '.join(cells)} |")


if __name__ == "__main__":
    make_output_safe()
    main()
