"""Random states and logits for multistream_sample, and the comparison with the reference."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch

from speechlm_ext.ops import DecodeState, multistream_sample
from speechlm_ext.ops.multistream_sample.reference import multistream_sample as reference

NAMES = ("tokens", "logprob", "is_content", "failed", "done")
MUTABLE = ("progress", "history", "history_logprob")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS = ("normal", "ties", "equal", "zeros", "gaps", "bad", "huge")
SETTINGS = {
    "temperature": [0.0, 1e-3, 0.8, 1.0, 1.0, 1.7, 1e30],
    "top_k": [0, 0, 1, 2, 30, 2**31 - 1],
    "top_p": [1e-9, 0.5, 0.9, 1.0, 1.0],
    "min_p": [0.0, 0.0, 0.05, 1.0],
    "repetition_penalty": [1.0, 0.5, 1.3, 1e-38, 1e38],
    "repetition_window": [0, 2, 100],
}


def copy_of(state: DecodeState) -> DecodeState:
    """With its own progress and history."""
    return dataclasses.replace(state, **{name: getattr(state, name).clone() for name in MUTABLE})


@dataclass
class Case:
    """A state, and what its logits are made of."""

    state: DecodeState
    num_rows: int
    kind: str
    dtype: torch.dtype
    generator: torch.Generator
    wide: bool

    def logits(self) -> torch.Tensor:
        """Of one step; every other case's rows lie in a wider tensor."""
        shape = (self.num_rows, len(self.state.column_ids))
        x = torch.randn(shape, generator=self.generator) * 3
        chance = torch.rand(shape, generator=self.generator)
        if self.kind == "ties":
            x = x.round()
        elif self.kind == "equal":
            x[:] = 2.5
        elif self.kind == "zeros":
            x = torch.where(chance < 0.5, 0.0, -0.0)
        elif self.kind == "gaps":
            x[chance < 0.4] = float("-inf")
        elif self.kind == "bad":
            x[chance < 0.003] = float("nan")
            x[chance > 0.998] = float("inf")
        elif self.kind == "huge":
            x = x * 1e37 if self.dtype != torch.float16 else x * 1e3
        x = x.to(self.dtype)
        if self.wide:
            x = torch.cat([x, x.new_zeros(shape[0], 5)], dim=1)[:, : shape[1]]
        return x


def random_case(seed: int, kind: str, dtype: torch.dtype, widths: list[int], widest: int = 300) -> Case:
    """All else follows from the seed. ``widths``: columns of the streams; that of stream 0 includes the end."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    B, S, G = pick.randint(1, 4), len(widths), pick.randint(1, 3)
    ids, start = [], 7
    for width in widths:
        gaps = torch.randint(1, 4, (width,), generator=generator)
        ids.append(start + gaps.cumsum(0))
        start = int(ids[-1][-1]) + 1
    delays = [pick.randint(0, 3) for _ in widths]
    scope = torch.full((B, G, S, 2), -1)
    for b in range(B):
        for g in range(G):
            for s, x in enumerate(ids):
                if s > 0 and pick.random() < 0.2:
                    continue
                first = pick.randrange(len(x)) if pick.random() < 0.5 else 0
                last = pick.randint(first, len(x) - 1) if pick.random() < 0.5 else len(x) - 1
                scope[b, g, s, 0], scope[b, g, s, 1] = x[first], x[last] + 1

    def several(name: str, *shape: int) -> torch.Tensor:
        values = torch.tensor(SETTINGS[name])
        return values[torch.randint(len(values), shape, generator=generator)]

    H = pick.choice([0, 3, 40])
    R = pick.choice([0, 0, 9])
    forced = torch.full((B, R, S), -1)
    for s, x in enumerate(ids):
        chosen = x[torch.randint(len(x), (B, R), generator=generator)]
        forced[..., s] = torch.where(torch.rand(B, R, generator=generator) < 0.2, chosen, -1)
    forced[torch.rand(B, R, S, generator=generator) < 0.02] = 999_999
    C, num_rows = sum(widths), B + pick.choice([0, 0, 3])
    allowed = None
    if pick.random() < 0.3:
        allowed = torch.rand(pick.choice([1, B]), C, generator=generator) < 0.9
    least = torch.randint(0, 4, (B, G), generator=generator)
    state = DecodeState.new(
        B,
        scope_ids=ids,
        delays=delays,
        pad_ids=[pick.randint(0, 6) for _ in widths],
        eos_id=int(ids[0][pick.randrange(len(ids[0]))]),
        scope=scope,
        num_segments=torch.randint(1, G + 1, (B,), generator=generator),
        markers=list(range(1, G + 1)),
        **{n: several(n, B, G, S) for n in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
        repetition_window=several("repetition_window", B, G, S) if H else 0,
        seed=torch.randint(-(2**62), 2**62, (B,), generator=generator),
        min_frames=least,
        max_frames=least + torch.randint(0, 5, (B, G), generator=generator),
        row_limit=torch.randint(0, 40, (B, G), generator=generator),
        source=torch.randint(num_rows, (B,), generator=generator) if pick.random() < 0.3 else None,
        guide=torch.randint(-1, num_rows, (B,), generator=generator) if pick.random() < 0.4 else None,
        guidance=torch.randn(B, generator=generator) * 3,
        forced=forced,
        num_rows=H,
        tail=max(delays) + pick.randint(0, 2),
        allowed=allowed,
    )
    return Case(state, num_rows, kind, dtype, generator, wide=pick.random() < 0.5)


def assert_same_state(got: DecodeState, want: DecodeState) -> None:
    """The parts that a step writes."""
    assert torch.equal(got.progress.cpu(), want.progress)
    assert torch.equal(got.history.cpu(), want.history)
    assert_close(got.history_logprob.cpu(), want.history_logprob)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Log-probabilities."""
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def assert_step(logits: torch.Tensor, state: DecodeState, expected: DecodeState) -> tuple[torch.Tensor, ...]:
    """Sample a row with the op and with the reference, compare everything, and return the op's results."""
    got = multistream_sample(logits.to(state.progress.device), state)
    want = reference(logits, expected)
    for name, x, y in zip(NAMES, got, want, strict=True):
        x = x.cpu()
        if name == "logprob":
            assert_close(x, y)
        else:
            assert torch.equal(x, y), f"{name}: {x.tolist()} instead of {y.tolist()}"
    assert_same_state(state, expected)
    return got


def move(state: DecodeState, device: torch.device) -> DecodeState:
    """A copy on the device."""
    names = [f.name for f in dataclasses.fields(state) if isinstance(getattr(state, f.name), torch.Tensor)]
    return dataclasses.replace(copy_of(state), **{n: getattr(state, n).to(device, copy=True) for n in names})


def roll(case: Case, device: torch.device, steps: int = 30) -> DecodeState:
    """A whole rollout beside the reference, one row longer than the longest request."""
    state, expected = move(case.state, device), copy_of(case.state)
    for _ in range(steps):
        was_over = bool(expected.is_done.all())
        assert_step(case.logits(), state, expected)
        if was_over:
            break
    return state
