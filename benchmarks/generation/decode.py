"""Decoding: frames per second and milliseconds per step over batch sizes, and where the time goes.

    make bench-decode [ARGS="--batches 1 16 --frames 50"]
    python -m benchmarks.generation.decode [--device cpu|cuda] [--shape 30m|1p7b|smoke] [--batches 1 4 16 64]

Requests are text to speech with random weights, S = 9 and OpusLM's vocabulary; each ends at its longest length. The
rival is the reference toolkit's loop (``espnet_loop.py``), one utterance after the other; before anything is timed its
greedy tokens are compared with the engine's (in float32). Both times hold everything from the prompt's first row to the
last frame. ``step ms`` is the median of a run's steps, ``outside`` the share of the steps that is neither the
backbone's forward (attention and its cache's rows included) nor the head's products: embedding, sampling, state,
bookkeeping of the cache, Python. On a GPU steps are replayed CUDA graphs, into which no clock can look: there
``outside`` comes from a short second run without graphs, and CUDA events around those two. On the CPU the faster of two
rounds counts, for the rival too. Each measurement is a line of JSON as soon as it is made; a Markdown table ends the
run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.common.emit import emit
from benchmarks.generation.espnet_loop import decode_one
from benchmarks.generation.models import build, tts_prompt
from speechlm_ext import SpeechLM
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.model import lm
from speechlm_ext.utils.console import make_output_safe

TEXT, WARM = 30, 3
#: Frames of the run without graphs.
OUTSIDE_FRAMES = 20


class Clock:
    """Time spent inside wrapped calls, as the device sees it."""

    def __init__(self, device: str) -> None:
        self.device, self.spans = device, list[Any]()

    def wrap(self, call: Any) -> Any:
        """``call`` with its time added up."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = self.now()
            out = call(*args, **kwargs)
            self.spans.append((begun, self.now()))
            return out

        return timed

    def now(self) -> Any:
        """A moment: seconds, or a CUDA event."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> list[float]:
        """Seconds of each pair of moments; waits for the device."""
        if self.device == "cpu":
            return [b - a for a, b in spans]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in spans]


@contextlib.contextmanager
def watched(engine: Engine, clock: Clock) -> Iterator[None]:
    """Time the backbone and the head inside."""
    head = engine._head
    engine._head = clock.wrap(head)
    engine._head.used_by, engine._head.streams = head.used_by, head.streams
    try:
        with mock.patch.object(lm, "run_step", clock.wrap(lm.run_step)):
            yield
    finally:
        engine._head = head


def filled(model: SpeechLM, batch: int, frames: int, cuda_graphs: bool | None = None) -> Engine:
    """An engine with a batch of requests, prefilled."""
    engine = Engine(model, batch, cuda_graphs=cuda_graphs)
    jobs = [DecodeJob(b, tts_prompt(model.layout, str(b), TEXT, frames, b)) for b in range(batch)]
    engine.admit(jobs, prepare=False)
    return engine


def run_out(engine: Engine, clock: Clock) -> list[float]:
    """Decode until no request is left; seconds of each step, the check for completion left out on a GPU."""
    moments = []
    count = 0
    while engine.active:
        begun = clock.now()
        engine.step(may_capture=True)
        count += 1
        if clock.device == "cuda":  # behind it the host waits, and the device idles
            moments.append((begun, clock.now()))
        if count % engine.poll_interval == 0:
            engine.collect()
        if clock.device == "cpu":
            moments.append((begun, clock.now()))
    return clock.seconds(moments)


def outside(engine: Engine, device: str) -> tuple[float, list[float]]:
    """Share of the steps that is neither the backbone nor the head, and the seconds of each step."""
    clock = Clock(device)
    with watched(engine, clock):
        steps = run_out(engine, clock)
    return 1 - sum(clock.seconds(clock.spans)) / sum(steps), steps


def measure_batch(model: SpeechLM, batch: int, frames: int, device: str) -> dict[str, float]:
    """One batch from prefill to the last frame."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    begun = time.perf_counter()
    engine = filled(model, batch, frames)
    sync()
    prefill = time.perf_counter() - begun
    begun = time.perf_counter()
    if device == "cuda":
        steps = run_out(engine, Clock(device))
    else:
        share, steps = outside(engine, device)
    sync()
    seconds = time.perf_counter() - begun
    if device == "cuda":
        del engine  # its cache is the largest thing there
        share, _ = outside(filled(model, batch, min(frames, OUTSIDE_FRAMES), cuda_graphs=False), device)
    return {
        "batch": batch,
        "prefill_ms": round(prefill * 1e3, 2),
        "step_ms": round(statistics.median(steps) * 1e3, 3),
        "frames_per_s": round(batch * frames / (seconds + prefill), 1),
        "outside": round(share, 4),
    }


def seconds_of_rival(model: SpeechLM, frames: int, device: str) -> float:
    """One utterance with the rival."""
    begun = time.perf_counter()
    decode_one(model, tts_prompt(model.layout, "rival", TEXT, frames, 0))
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def check(model: SpeechLM, frames: int = 5) -> None:
    """Both loops say the same greedily, the engine for three utterances at once.

    Raises:
        AssertionError: they do not; no time would mean anything.
    """
    prompts = []
    for b in range(3):
        prompt = tts_prompt(model.layout, str(b), TEXT - b, frames, b)
        (segment,) = prompt.segments
        greedy = dataclasses.replace(segment, settings=dataclasses.replace(segment.settings, greedy=True))
        prompts.append(dataclasses.replace(prompt, segments=(greedy,)))
    jobs = [DecodeJob(prompt.id, prompt) for prompt in prompts]
    for job, decoded in Engine(model, len(jobs)).run(jobs):
        prompt = job.prompt
        rows_RS = torch.from_numpy(decoded.rows_RS[len(prompt.frames_PS) :])
        said_RS = decode_one(model, prompt, greedy=True).cpu()
        if not torch.equal(rows_RS, said_RS[: len(rows_RS)]) or bool(said_RS[len(rows_RS) :, 1:].any()):
            raise AssertionError(f"utterance {prompt.id}: the engine and the reference loop differ.")


def measure(
    device: str, shape: str, batches: list[int], frames: int, rival_frames: int, rounds: int
) -> list[dict[str, Any]]:
    """All batch sizes beside the rival, each handed over as it is measured; the best of each."""
    model = build(shape, device)
    if device == "cpu":
        check(model)
    measure_batch(model, 1, WARM, device)
    seconds_of_rival(model, WARM, device)
    best: dict[int, dict[str, Any]] = {}
    rival = 0.0
    for number in range(rounds):  # batches and rival by turns: what else the machine does meets them all
        # Rows before the first frame is whole weigh more in a shorter run: count them as in ours.
        S = model.layout.num_streams
        seconds = seconds_of_rival(model, rival_frames, device) * (frames + S) / (rival_frames + S)
        rival = max(rival, frames / seconds)
        print(f"round {number + 1}: reference loop {rival:.1f} frames/s", file=sys.stderr, flush=True)
        for batch in batches:
            row: dict[str, Any] = {
                "shape": shape,
                "frames": frames,
                **measure_batch(model, batch, frames, device),
            }
            if batch not in best or row["frames_per_s"] > best[batch]["frames_per_s"]:
                best[batch] = row
            row |= {"rival_frames_per_s": round(rival, 1), "ratio": round(row["frames_per_s"] / rival, 2)}
            if rounds > 1:
                row["round"] = number + 1
            emit(row)
    return [{**best[batch], "ratio": round(best[batch]["frames_per_s"] / rival, 2)} for batch in batches]


def table(rows: list[dict[str, Any]]) -> str:
    """The batches as Markdown."""
    lines = [
        "| batch | prefill ms | step ms | frames/s | of the reference loop | outside backbone and head |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = r["batch"], r["prefill_ms"], r["step_ms"], r["frames_per_s"], f"{r['ratio']}x"
        lines.append(f"| {' | '.join(map(str, cells))} | {r['outside']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--shape", choices=("smoke", "30m", "1p7b"))
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--frames", type=int)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    frames = arguments.frames or (500 if on_gpu else 100)
    rows = measure(
        arguments.device,
        arguments.shape or ("1p7b" if on_gpu else "30m"),
        arguments.batches or ([1, 16, 64, 256] if on_gpu else [1, 2, 4, 8, 16, 32, 64]),
        frames,
        min(frames, 100),
        1 if on_gpu else 2,
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {frames} frames each.\n")
    print(table(rows))


if __name__ == "__main__":
    make_output_safe()
    main()
