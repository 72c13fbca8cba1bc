"""How time and memory of multistream_loss grow with rows, vocabulary and streams: ``make bench-growth``.

Prints two tables in Markdown and draws ``docs/ops/multistream_loss_growth.png``: forward and backward in float32 on the
CPU, against ESPnet-SpeechLM's way (see ``ops/bench_multistream_loss.py``), the better of two runs of each in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import speechlm_ext as sx  # noqa: E402
from benchmarks.common.harness import peak_bytes, seconds_of  # noqa: E402
from benchmarks.ops.bench_multistream_loss import Shape, eager, make_inputs, one_by_one  # noqa: E402
from speechlm_ext.utils.console import make_output_safe  # noqa: E402

PICTURE = Path(__file__).resolve().parents[2] / "docs/ops/multistream_loss_growth.png"
ROWS, VOCABULARIES, STREAMS = (512, 2048, 4096), (13_192, 62_670, 113_870), (1, 2, 3, 5, 9, 17)
D = 576
CODES = (5_000, 13_192)

Measured = tuple[float, int | None]


def measure(shape: Shape) -> dict[str, Measured]:
    """``{who: (seconds, bytes beyond inputs and results)}``."""
    parts, targets, weights, scopes = make_inputs(shape, "cpu", torch.float32)

    def gradients(loss: torch.Tensor) -> Any:
        return (loss.detach(), *torch.autograd.grad(loss, parts))

    def ours() -> Any:
        hidden, weight, embed = parts
        out = sx.ops.multistream_loss(hidden, weight, targets, weights, scopes=scopes, stream_embed=embed)
        return gradients(out.loss_sum)

    def espnet() -> Any:
        return gradients(one_by_one(eager)(*parts, targets, weights, scopes))

    runs: dict[str, Callable[[], Any]] = {"ours": ours, "espnet": espnet}
    found: dict[str, Measured] = {}
    for _ in range(2):
        for name, run in runs.items():
            found[name] = (min(seconds_of(run, 1, "cpu"), found.get(name, (1e9, 0))[0]), None)
    return {name: (found[name][0], peak_bytes(run, "cpu")) for name, run in runs.items()}


def cells(label: str, found: dict[str, Measured]) -> str:
    (ours, our_bytes), (theirs, their_bytes) = found["ours"], found["espnet"]

    def mib(size: int | None) -> str:
        return "?" if size is None else f"{size / 2**20:,.0f}"

    return (
        f"| {label} | {ours:.2f} s | {theirs:.2f} s | {theirs / ours:.1f} x | {mib(our_bytes)} MiB "
        f"| {mib(their_bytes)} MiB |"
    )


def draw(by_streams: dict[int, dict[str, Measured]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), layout="constrained")
    for index, (panel, unit, scale) in enumerate(zip(axes, ("seconds", "MiB"), (1, 2**20), strict=True)):
        for name, label, colour in (
            ("espnet", "a product for each stream", "#b0553a"),
            ("ours", "multistream_loss", "#2a6f97"),
        ):
            values = [(found[name][index] or 0) / scale for found in by_streams.values()]
            panel.plot(list(by_streams), values, marker="o", color=colour, label=label)
        panel.set_xlabel("streams S")
        panel.set_ylabel(unit)
        panel.set_ylim(bottom=0)
        panel.set_xticks(list(by_streams))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("time", loc="left")
    axes[1].set_title("memory beyond inputs and gradients", loc="left")
    axes[0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=160)


def main() -> None:
    head = "| {} | ours | ESPnet's way | ratio | our memory | its memory |\n|---|---|---|---|---|---|"
    print(f"Half text and half speech, S = 9, D = {D}\n\n{head.format('N, V')}", flush=True)
    for V in VOCABULARIES:
        for N in ROWS:
            print(cells(f"{N}, {V:,}", measure(Shape(N, 0.5, D, V, CODES))), flush=True)
    V = CODES[1]
    print(f"\nSpeech alone, all streams over V = {V:,}, N = 2048, D = {D}\n\n{head.format('S')}", flush=True)
    by_streams = {}
    for S in STREAMS:
        by_streams[S] = measure(Shape(2048, 1.0, D, V, (0, V), None, S))
        print(cells(str(S), by_streams[S]), flush=True)
    draw(by_streams)


if __name__ == "__main__":
    make_output_safe()
    main()
