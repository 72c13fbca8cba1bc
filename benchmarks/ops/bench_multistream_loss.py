"""multistream_loss, forward and backward, against its rivals: ``make bench OP=multistream_loss``.

Rivals: ESPnet-SpeechLM's way at the same scopes (the hidden states of all streams, stream 0 over the whole vocabulary,
the others over the codes), that compiled by torch, torch's own `F.linear_cross_entropy` once per stream, and on a GPU
Liger's fused loss (called as ESPnet-SpeechLM calls it, and once per stream) and QuACK's once per stream; a row names
those that are not installed. The limit is the op's own matrix products by themselves; a GPU's row has their TFLOP/s.

Rows are planned on the host, as in training: the op waits for nothing.

Shapes: half of the rows text and half speech; speech alone; speech alone with stream 0 over speech ids, against
ESPnet's way over all ids as well; and a vocabulary of speech alone that every stream runs over.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import speechlm_ext as sx
from benchmarks.common.harness import ROUNDS, Case, compare, compiled, devices
from speechlm_ext.ops.multistream_loss import chunks as internals
from speechlm_ext.ops.multistream_loss.rows import plan_rows
from speechlm_ext.ops.multistream_loss.scopes import read_scopes


class Shape(NamedTuple):
    """Sizes of a benchmark."""

    N: int
    speech: float
    """Share of the rows that hold speech."""
    D: int
    V: int
    codes: tuple[int, int]
    """Ids of the streams after the first."""
    first: tuple[int, int] | None = None
    """Ids of stream 0; None: all."""
    S: int = 9


SHAPES = {
    "smoke": Shape(256, 0.5, 64, 2_000, (200, 1_224)),
    "half_speech": Shape(2048, 0.5, 576, 62_670, (5_256, 13_448)),
    "speech": Shape(2048, 1.0, 576, 62_670, (5_256, 13_448)),
    "speech_modality": Shape(2048, 1.0, 576, 62_670, (5_256, 13_448), (0, 5_256)),
    "codes_alone": Shape(2048, 1.0, 576, 13_192, (0, 13_192)),
    "1p7b_8k": Shape(8192, 0.5, 2048, 62_670, (256, 13_448)),
    "1p7b_8k_v114k": Shape(8192, 0.5, 2048, 113_870, (256, 13_448)),
    "1p7b_32k": Shape(32_768, 0.5, 2048, 62_670, (256, 13_448)),
    "1p7b_32k_v114k": Shape(32_768, 0.5, 2048, 113_870, (256, 13_448)),
}
#: For an H100 (80 GB): seconds, and bytes beside inputs and gradients.
GOALS = {"1p7b_8k": {"seconds": 10.5e-3, "peak_bytes": 1 << 30}}

CODE_WEIGHT = 0.0625


def make_inputs(shape, device, dtype):
    """``((hidden, weight, stream_embed), targets, loss_weight, scopes)``."""
    N, share, D, V, (low, high), first, S = shape
    torch.manual_seed(0)
    # On the device itself: the largest table has 233 million numbers.
    hidden, weight, embed = (
        (torch.randn(rows, D, device=device) * scale).to(dtype).requires_grad_()
        for rows, scale in ((N, 0.5), (V, 0.05), (S, 0.05))
    )
    is_speech = torch.arange(N) < int(N * share)
    targets = torch.randint(low, high, (N, S))
    targets[:, 0] = torch.where(
        is_speech, torch.randint(0, max(1, low or V), (N,)), torch.randint(0, V, (N,))
    )
    weights = torch.full((N, S), CODE_WEIGHT) * is_speech[:, None]
    weights[:, 0] = 1  # one for all rows, which is all that Liger's loss can
    scopes = [[first or (0, V)]] + [[(low, high)]] * (S - 1)
    return (hidden, weight, embed), targets.to(device), weights.to(device), scopes


def own_products(shape, parts, live, scopes):
    """The op's matrix products, into memory that is there already, and their number of operations.

    On a GPU each is whole, since that is the fastest way to compute it; on the CPU they are cut as the op cuts them,
    which keeps their results in the caches.
    """
    hidden, weight = parts[0].detach(), parts[1].detach()
    device, dtype = hidden.device, hidden.dtype
    sets, _ = read_scopes([scopes], shape.V, False)
    grad_weight, grad_hidden = torch.zeros_like(weight), torch.zeros_like(hidden)
    work = []
    for group, rows in plan_rows(sets, live, None)[0]:
        chunk = len(rows)
        if device.type == "cpu":
            chunk = internals.chunk_rows(group, len(rows), dtype, device)
        logits = torch.zeros(min(chunk, len(rows)), group.columns, device=device, dtype=dtype)
        work.append((group, len(rows), chunk, logits))

    def run():
        for group, num_rows, chunk, logits in work:
            for start in range(0, num_rows, chunk):
                end = min(num_rows, start + chunk)
                h, out = hidden[start:end], grad_hidden[start:end]
                for interval, z in internals.blocks(group, logits[: end - start]):
                    ids = slice(interval.row, interval.row + interval.num_ids)
                    torch.mm(h, weight[ids].T, out=z)
                    out.addmm_(z, weight[ids])
                    grad_weight[ids].addmm_(z.T, h)

    columns = [sum(interval.num_ids for interval in group.root) for group, *_ in work]
    flop = sum(6 * num_rows * n * shape.D for (_, num_rows, *_), n in zip(work, columns, strict=True))
    return run, flop


def one_by_one(loss_of_stream):
    """The weighted sum over streams of a loss per token; rows without a target are left out."""

    def run(hidden, weight, embed, targets, weights, scopes):
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_S = hidden[:, None] + embed[None]  # [N, S, D], as it leaves the model there
        for s, [(low, high)] in enumerate(scopes):
            live = weights[:, s] > 0
            nll = loss_of_stream(hidden_S[live, s], weight[low:high], targets[live, s] - low)
            total = total + (nll * weights[live, s]).sum()
        return total

    return run


def eager(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def chunked(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none")


def liger(hidden, weight, embed, targets, weights, scopes):
    """As ESPnet-SpeechLM calls it: stream 0 over all ids, and the other streams together in a second call."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    hidden_S = hidden[:, None] + embed[None]
    [(low, high)] = scopes[1]
    live = weights[:, 1] > 0
    rest = hidden_S[live, 1:].flatten(0, 1)
    first = loss(weight, hidden_S[:, 0].contiguous(), targets[:, 0])
    return first + CODE_WEIGHT * loss(weight[low:high], rest, (targets[live, 1:] - low).flatten())


def sums_by_stream(loss_of_stream):
    """The weighted sum of a summed loss per stream; within a stream all weights are equal."""

    def run(hidden, weight, embed, targets, weights, scopes):
        total = hidden.new_zeros((), dtype=torch.float32)
        for s, [(low, high)] in enumerate(scopes):
            live = weights[:, s] > 0
            loss = loss_of_stream(hidden[live] + embed[s], weight[low:high], targets[live, s] - low)
            total = total + (CODE_WEIGHT if s else 1) * loss.float()
        return total

    return run


def liger_stream(hidden, weight, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(
        weight, hidden, targets
    )


def quack_stream(hidden, weight, targets):
    """In chunks where QuACK can, which needs sizes that 8 divides; else its whole logits."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    if all(size % 8 == 0 for size in (*hidden.shape, *weight.shape)):
        return chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return linear_cross_entropy_func(hidden, weight, None, targets, reduction="sum")


#: On a GPU: name -> package, its wheel, and the loss of one call.
FUSED = {
    "liger": ("liger_kernel", "liger-kernel", liger),
    "liger_per_stream": ("liger_kernel", "liger-kernel", sums_by_stream(liger_stream)),
    "quack_per_stream": ("quack", "quack-kernels", sums_by_stream(quack_stream)),
}


def make_case(shape, device):
    sizes = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    parts, targets, weights, scopes = make_inputs(sizes, device, dtype)

    def gradients(loss):
        return (loss.detach(), *torch.autograd.grad(loss, parts))

    rows = sx.ops.plan_loss_rows(weights.cpu(), scopes=scopes).to(targets.device)

    def ours():
        out = sx.ops.multistream_loss(
            parts[0],
            parts[1],
            targets,
            weights,
            scopes=scopes,
            stream_embed=parts[2],
            rows=rows,
            check_values=False,
        )
        return gradients(out.loss_sum)

    espnet = one_by_one(eager)
    rivals = {"espnet": lambda: gradients(espnet(*parts, targets, weights, scopes))}
    call = (*parts, targets, weights, scopes)
    if (run := compiled(shape, espnet, *call)) is not None:
        rivals["espnet_compiled"] = lambda: gradients(run(*call))
    if hasattr(F, "linear_cross_entropy"):
        rivals["torch_linear_cross_entropy"] = lambda: gradients(
            one_by_one(chunked)(*parts, targets, weights, scopes)
        )
    missing, versions = [], {}
    for name, (package, wheel, loss) in FUSED.items() if device == "cuda" and sizes.first is None else ():
        if importlib.util.find_spec(package):
            rivals[name] = lambda loss=loss: gradients(loss(*parts, targets, weights, scopes))
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a folder on the path
                versions[wheel] = importlib.metadata.version(wheel)
        else:
            missing.append(f"{name}: {wheel} is not installed")
    if not hasattr(F, "linear_cross_entropy"):
        missing.append(f"torch_linear_cross_entropy: torch {torch.__version__} has none")
    if sizes.first is not None:
        everything = [[(0, sizes.V)], *scopes[1:]]
        rivals["espnet_all_ids"] = lambda: gradients(espnet(*parts, targets, weights, everything))
    wide = tuple(p.detach().double() for p in parts)
    few = slice(0, 64)
    want = one_by_one(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="none"))(
        wide[0][few], wide[1], wide[2], targets[few], weights[few].double(), scopes
    )
    got = sx.ops.multistream_loss(
        parts[0][few], parts[1], targets[few], weights[few], scopes=scopes, stream_embed=parts[2]
    ).loss_sum
    torch.testing.assert_close(got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    reference = ours()

    def check(name, result):
        if name == "espnet_all_ids":
            return  # another loss on purpose: what is saved by leaving ids out
        for a, b in zip(result, reference, strict=True):
            error = float((a.float() - b.float()).norm() / b.float().norm())
            assert error < (3e-2 if dtype == torch.bfloat16 else 1e-4), (
                f"{name} computes something else: {error}"
            )

    products, flop = own_products(sizes, parts, weights > 0, scopes)
    return Case(
        op="multistream_loss",
        shape=shape,
        device=device,
        ours=ours,
        rivals=rivals,
        check=check,
        limit=products,
        limit_flop=flop,
        extra={"rivals_skipped": missing, "rival_versions": versions} if device == "cuda" else {},
        goals=GOALS.get(shape, {}),
        rounds=5 if sizes.N > 1000 else ROUNDS,
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, device):
    if shape.startswith("1p7b") and device == "cpu":
        pytest.skip("a shape for GPUs")
    compare(benchmark, make_case(shape, device))
