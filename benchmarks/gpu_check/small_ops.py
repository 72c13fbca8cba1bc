"""One call of every op that has a CUDA kernel, on small awkward shapes, for compute-sanitizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import speechlm_ext as sx
from benchmarks.common.emit import emit
from speechlm_ext.ops.decode_layer import add_rms_norm, decode_attention, rope_and_store, silu_mul
from speechlm_ext.ops.kmeans_assign.sums import kmeans_sums


def pack(device: str) -> None:
    """delay_pack and delay_unpack, with an empty segment."""
    segments = [torch.randint(1, 999, (n, 9), device=device) for n in (37, 0, 5, 210)]
    settings = dict(delays=list(range(9)), pad_ids=[0] * 9)
    for tail in ("keep", "trim"):
        batch = sx.ops.delay_pack(segments, tail=tail, **settings)  # type: ignore[arg-type]
    batch = sx.ops.delay_pack([s.int() for s in segments], **settings)  # type: ignore[arg-type]
    sx.ops.delay_unpack(batch.ids, batch.cu_seqlens, delays=settings["delays"])


def embed(device: str) -> None:
    """multistream_embed and its gradients, dense and sparse, with features."""
    for width, dtype in ((64, torch.float32), (33, torch.bfloat16), (72, torch.float16)):
        table = torch.randn(50, width, device=device).to(dtype).requires_grad_()
        ids = torch.randint(0, 50, (200, 9), device=device)
        ids[:150, 0] = 7  # a run that several blocks share
        sx.ops.multistream_embed(ids, table, scale=[0.5] * 9).sum().backward()
        features = torch.randn(90, width, device=device).to(dtype).requires_grad_()
        positions = torch.arange(199, 19, -2, device=device)
        sx.ops.multistream_embed(
            ids, table, features=features, feature_positions=positions, sparse=True
        ).sum().backward()


def loss(device: str) -> None:
    """multistream_loss in every dtype, with and without its options, over scopes with odd borders."""
    scopes = [[(0, 517)], [(100, 301)], [(100, 301)], [(301, 402), (440, 441)]]
    targets = torch.tensor([516, 300, 100, 440], device=device).expand(700, 4).contiguous()
    weights = torch.rand(700, 4, device=device)
    weights[::2, 1:] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        parts = [
            torch.randn(shape, device=device).to(dtype).requires_grad_()
            for shape in ((700, 33), (517, 33), (4, 33), (517,))
        ]
        for options in (
            {},
            dict(z_loss=0.1, label_smoothing=0.1, softcap=3.0, reduction="none", entropy=True),
        ):
            out = sx.ops.multistream_loss(
                *parts[:2], targets, weights, scopes=scopes, stream_embed=parts[2], bias=parts[3], **options
            )
            (out.loss_sum if out.token_nll is None else out.token_nll.sum()).backward()


def kmeans(device: str) -> None:
    """kmeans_assign in every dtype: near ties, copies, rows that are not finite, more candidates than a list holds; and
    the clusters' sums."""
    centroids = torch.randn(700, 33, device=device)
    centroids[650:] = centroids[:50]
    x = torch.cat([torch.randn(200, 33, device=device), (centroids[:50] + centroids[50:100]) / 2])
    x[3, 2], x[7] = float("nan"), 1e16
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for mode in ("exact", "fast"):
            sx.ops.kmeans_assign(x.to(dtype), centroids, mode=mode, return_distance=True)  # type: ignore[call-overload]
        labels = sx.ops.kmeans_assign(x.to(dtype), centroids)
        zeros, one = (
            torch.zeros(33, dtype=torch.float64, device=device),
            torch.ones(33, device=device).double(),
        )
        sums, counts = zeros.expand(700, 33).clone(), torch.zeros(700, dtype=torch.int64, device=device)
        kmeans_sums(x.to(dtype), labels, zeros, one * 2**-20, sums, counts)


def sample(device: str) -> None:
    """multistream_sample in every dtype and with every filter: ties, a NaN, columns outside of a cache, guidance,
    repeated ids, several segments, rows in one call and in several."""
    widths = [7001, 300, 1]
    bounds = torch.tensor([0, *widths]).cumsum(0).tolist()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = sx.ops.DecodeState.new(
            6,
            scope_ids=[torch.arange(a, b, device=device) for a, b in zip(bounds, bounds[1:], strict=False)],
            delays=[0, 1, 2],
            pad_ids=[0, 0, 0],
            eos_id=9,
            scope=[[(0, 7001), (7001, 7301), (7301, 7302)], [(5, 2000), None, (7301, 7302)]],
            markers=[0, 1],
            num_segments=2,
            temperature=torch.tensor([0.0, 0.8, 1.0, 1.3, 1e30, 0.8])[:, None, None],
            top_k=torch.tensor([0, 30, 0, 3000, 0, 0])[:, None, None],
            top_p=torch.tensor([1.0, 0.9, 0.5, 0.9, 0.7, 1.0])[:, None, None],
            min_p=torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.0])[:, None, None],
            repetition_penalty=1.2,
            repetition_window=5,
            max_frames=4,
            guide=torch.tensor([-1, -1, 0, 1, -1, -1]),
            guidance=2.0,
            num_rows=12,
        )
        for step in range(12):
            logits = (torch.randn(6, bounds[-1], device=device) * 3).round().to(dtype)
            logits[5, 40] = float("nan") if step == 3 else 0.0
            if step % 2 == 0:
                sx.ops.multistream_sample(logits, state)
                continue
            row = None  # a row in several calls
            for streams in ((0, 1), (1, 2), (2, 3)) if step % 4 == 1 else ((0, 2), (2, 3)):
                row = sx.ops.multistream_sample(logits, state, streams=streams, partial=row)


def decode(device: str) -> None:
    """The parts of a decode layer in every dtype: odd sizes and whole vectors, heads that share keys, norms over a head
    and over all, rows out of range, windows and sinks."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for heads, groups, key_size, value_size in (
            (9, 3, 64, 64),
            (8, 1, 128, 128),
            (4, 4, 38, 13),
            (6, 3, 64, 32),
        ):
            keys = torch.zeros(7, 600, groups, key_size, device=device).to(dtype)
            values = torch.zeros(7, 600, groups, value_size, device=device).to(dtype)
            position = torch.tensor([0, 599, 255, 256, -1, 700, 511], device=device)
            slot = torch.tensor([6, 0, 5, 1, 4, 2, 9], device=device)
            width = (heads + groups) * key_size + groups * value_size
            qkv = torch.randn(7, width, device=device).to(dtype)
            cos, sin = (torch.randn(600, key_size, device=device).to(dtype) for _ in range(2))
            norms = [torch.randn(n * key_size, device=device).to(dtype) for n in (1, 1, heads, groups)]
            rope_and_store(qkv, cos, sin, position, slot, keys, values, heads, *norms[:2], 1e-6)
            query = rope_and_store(
                qkv, cos, sin, position, slot, keys, values, heads, *norms[2:], 1e-6, "all"
            )
            decode_attention(query, keys, values, position + 1, slot, 0.1)
            sinks = torch.randn(heads, device=device)
            decode_attention(query, keys, values, position + 1, slot, 0.1, 300, 20.0, sinks)
            add_rms_norm(qkv, qkv, qkv[0].contiguous(), 1e-6)
            silu_mul(qkv[:, : width // 2 * 2])


#: In order of value: a tool that runs out of time has seen the first.
OPS: dict[str, Callable[[str], None]] = {
    "multistream_sample": sample,
    "decode_layer": decode,
    "multistream_loss": loss,
    "multistream_embed": embed,
    "kmeans_assign": kmeans,
    "delay_pack": pack,
}


def main() -> None:
    """Run every op and hand over its name; the tests check their values."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    for name, run in OPS.items():
        run(device)
        if device == "cuda":
            torch.cuda.synchronize()
        emit({"op": name})


if __name__ == "__main__":
    main()
