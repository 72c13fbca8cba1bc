"""Scopes, random inputs and a token-by-token formula for multistream_loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import speechlm_ext as sx

#: Number of ids, and each stream's scope.
SCOPES = {
    "full_and_own": (20, [[(0, 20)], [(3, 9)], [(9, 12)]]),
    "full_and_codec": (20, [[(0, 20)], [(3, 12)], [(3, 12)]]),
    "disjoint": (23, [[(0, 4), (10, 23)], [(4, 7)], [(7, 10)]]),
    "partial_overlap": (20, [[(0, 8)], [(5, 12)], [(2, 6), (14, 18)]]),
    "touching_intervals": (20, [[(5, 10), (0, 5)], [(0, 5), (5, 10)], [(12, 20)]]),
    "one_stream": (7, [[(0, 7)]]),
    "one_class": (7, [[(0, 7)], [(4, 5)]]),
}
OPTIONS = {"plain": {}, "all": dict(z_loss=0.1, label_smoothing=0.2, softcap=3.0)}
# Ids 0-3 special, 4-9 speech, 10-15 codes, 16-24 text. Kind 0: a frame of speech, 1: text, 2: anything.
KINDS = [
    [[(0, 10)], [(10, 13)], [(13, 16)]],
    [[(0, 4), (16, 25)], [(10, 13)], [(13, 16)]],
    [[(0, 10), (16, 25)], [(10, 16)], [(10, 16)]],
]
VOCAB, MOST_IDS, D = 25, 70, 6


def ids_of(scope):
    return torch.cat([torch.arange(a, b) for a, b in sorted(scope)])


def head_rows(sets, s, separate):
    """For stream s the weight's row of every id (-1: none), found by laying the heads out one after the other."""
    if not separate:
        return torch.arange(MOST_IDS)
    base = sum(len(ids_union(sets, k)) for k in range(s))
    rows = torch.full((MOST_IDS,), -1)
    ids = ids_union(sets, s)
    rows[ids] = base + torch.arange(len(ids))
    return rows


def ids_union(sets, s):
    return torch.unique(torch.cat([ids_of(scopes[s]) for scopes in sets]))


def formula(parts, targets, weights, sets, kinds, separate, z_loss=0.0, label_smoothing=0.0, softcap=None):
    """``(weighted loss, logprobs, entropies)``, token by token."""
    hidden, weight, embed, bias = parts
    total = sum(p.sum() * 0 for p in parts if p is not None)
    logprobs, entropies = torch.zeros(2, *targets.shape, dtype=hidden.dtype)
    for n, s in (weights > 0).nonzero().tolist():
        ids = ids_of(sets[kinds[n]][s])
        rows = head_rows(sets, s, separate)[ids]
        logits = weight[rows] @ (hidden[n] + (0 if embed is None else embed[s]))
        logits = logits if bias is None else logits + bias[rows]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        at = (ids == targets[n, s]).nonzero()[0]
        loss = F.cross_entropy(logits[None], at, label_smoothing=label_smoothing)
        total = total + weights[n, s] * (loss + z_loss * logits.logsumexp(0) ** 2)
        log_p = logits.log_softmax(0).detach()
        logprobs[n, s], entropies[n, s] = log_p[at], -(log_p.exp() * log_p).sum()
    return total, logprobs, entropies


def make_case(
    sets, num_rows, separate, *, with_embed=True, with_bias=True, seed=0, live=0.6, vocab=VOCAB, width=D
):
    generator = torch.Generator().manual_seed(seed)
    num_streams = len(sets[0])
    kinds = torch.randint(0, len(sets), (num_rows,), generator=generator)
    targets = torch.zeros(num_rows, num_streams, dtype=torch.int64)
    for n in range(num_rows):
        for s in range(num_streams):
            ids = ids_of(sets[kinds[n]][s])
            targets[n, s] = ids[torch.randint(0, len(ids), (), generator=generator)]
    weights = torch.rand(num_rows, num_streams, generator=generator, dtype=torch.float64)
    weights *= torch.rand(num_rows, num_streams, generator=generator) < live
    rows = sum(len(ids_union(sets, s)) for s in range(num_streams)) if separate else vocab
    shapes = [
        (num_rows, width),
        (rows, width),
        (num_streams, width) if with_embed else None,
        (rows,) if with_bias else None,
    ]
    parts = [
        None
        if shape is None
        else torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    return parts, targets, weights, kinds


def call(parts, targets, weights, sets, kinds, separate, **options):
    hidden, weight, embed, bias = parts
    single = len(sets) == 1
    return sx.ops.multistream_loss(
        hidden,
        weight,
        targets,
        weights,
        scopes=sets[0] if single else sets,
        row_scope=None if single else kinds,
        heads="separate" if separate else "shared",
        stream_embed=embed,
        bias=bias,
        **options,
    )


def named_case(name, num_rows=11, width=5, dtype=torch.float64):
    """``(scopes, parts, targets, weights)`` of one of `SCOPES`, with a shared head."""
    vocab, scopes = SCOPES[name]
    parts, targets, weights, _ = make_case([scopes], num_rows, False, vocab=vocab, width=width)
    return scopes, [p.detach().to(dtype).requires_grad_() for p in parts], targets, weights


def named_formula(scopes, parts, targets, weights, **options):
    """``(weighted loss, NLL of each token)``."""
    kinds = torch.zeros(len(targets), dtype=torch.int64)
    loss, logprobs, _ = formula(parts, targets, weights, [scopes], kinds, False, **options)
    return loss, 0 - logprobs
