"""One call of every op that has a CUDA kernel, on small awkward shapes: what compute-sanitizer watches."""

from __future__ import annotations

import torch

import speechlm_ext as sx


def main(device: str = "cuda") -> None:
    """Run them; their values are the tests' business."""
    torch.manual_seed(0)
    segments = [torch.randint(1, 999, (n, 9), device=device) for n in (37, 0, 5, 210)]
    settings = dict(delays=list(range(9)), pad_ids=[0] * 9)
    for tail in ("keep", "trim"):
        batch = sx.ops.delay_pack(segments, tail=tail, **settings)  # type: ignore[arg-type]
    batch = sx.ops.delay_pack([s.int() for s in segments], **settings)  # type: ignore[arg-type]
    sx.ops.delay_unpack(batch.ids, batch.cu_seqlens, delays=settings["delays"])
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
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
