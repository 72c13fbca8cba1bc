"""Decoding: milliseconds per step of a batch of TTS requests, with the key/value cache.

The model of ``benchmarks/train/step.py`` with random weights, so a request ends at its longest length. The tokens are
asked for, not the waveform.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.train.step import build


def measure(device: str, batch: int, steps: int) -> dict[str, object]:
    """Best time of a step over the sequence, after a prompt of 32 rows."""
    model, packed = build(device)
    model.eval()
    S = packed.ids.shape[1]
    prompt = packed.ids[:32].expand(batch, 32, S).contiguous()
    ranges = [model.layout.scopes("own")[s] for s in range(S)]
    times = []
    with torch.inference_mode():
        cache = model.new_cache()
        rows, length = prompt, 0
        for _ in range(steps):
            begun = time.perf_counter()
            count = rows.shape[1]
            position = torch.arange(length, length + count, device=rows.device).expand(batch, count)
            length += count
            mask = torch.ones(batch, length, dtype=torch.bool, device=rows.device)
            hidden = model.cached_hidden(rows, cache=cache, position_BT=position, key_mask_BK=mask)[:, -1]
            logits = model.scope_logits(hidden, ranges)
            picked = []
            for z, scope in zip(logits, ranges, strict=True):
                assert z is not None
                ids = torch.cat([torch.arange(a, b, device=z.device) for a, b in scope])
                picked.append(ids[z.argmax(-1)])
            rows = torch.stack(picked, 1)[:, None]
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    best = sorted(times[1:])
    middle = best[len(best) // 2]
    return {
        "batch": batch,
        "prefill_ms": round(times[0] * 1e3, 2),
        "step_ms_median": round(middle * 1e3, 3),
        "step_ms_best": round(best[0] * 1e3, 3),
        "frames_per_s": round(batch / middle, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    sizes = (16, 200) if arguments.device == "cuda" else (2, 6)
    print(json.dumps(measure(arguments.device, *sizes)))
