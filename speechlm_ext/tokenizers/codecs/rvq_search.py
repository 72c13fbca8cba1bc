"""Encoding by residual vector quantization: beam search over the stages of a codebook.

Axes: N rows, S stages, K centroids of a stage, F features, B hypotheses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


class SearchTables(NamedTuple):
    """Tables of the codebooks for :func:`beam_search`, made by :func:`search_tables`."""

    squares_SK: torch.Tensor
    """Squared norm of each centroid."""
    cross: list[torch.Tensor]
    """Of stage s, float32 ``[s * K, K]``: inner products of its centroids with those of earlier stages."""


def search_tables(codebooks_SKF: torch.Tensor) -> SearchTables:
    """Norms and inner products of centroids: ``S * (S - 1) / 2 * K * K`` floats, 7 MB for 8 stages of 256."""
    width = codebooks_SKF.shape[2]
    cross = [codebooks_SKF[:s].reshape(-1, width) @ book_KF.T for s, book_KF in enumerate(codebooks_SKF)]
    return SearchTables(codebooks_SKF.square().sum(2), cross)


def beam_search(
    x_NF: torch.Tensor, codebooks_SKF: torch.Tensor, tables: SearchTables, beam: int, chunk: int = 1024
) -> torch.Tensor:
    """Residual codes of each row, int64 ``[N, S]``, keeping the ``beam`` best partial codes at every stage.

    The residual r = x - sum of chosen centroids is never materialized: with tables of the centroids' inner products,
    ``|r - c|² = |r|² - 2 (x·c - sum of chosen·c) + |c|²`` costs one row of K numbers per chosen centroid instead of
    a product over F.

    Args:
        tables: :func:`search_tables` of the codebooks.
        beam: 1 is the greedy search.
        chunk: rows at a time, which bounds memory by about ``chunk * (S + 2 * beam) * K`` floats.
    """
    squares_SK, cross = tables
    num_stages, size, _ = codebooks_SKF.shape
    codes = []
    for start in range(0, len(x_NF), chunk):
        rows_NF = x_NF[start : start + chunk]
        dots_NSK = (rows_NF @ codebooks_SKF.flatten(0, 1).T).view(-1, num_stages, size)
        error_NB = rows_NF.square().sum(1, keepdim=True)
        codes_NBS = torch.zeros(len(rows_NF), 1, 0, dtype=torch.int64)
        for stage in range(num_stages):
            dots_NBK = dots_NSK[:, None, stage]
            if stage:
                bags = (codes_NBS + torch.arange(stage) * size).flatten(0, 1)
                chosen_NBK = functional.embedding_bag(bags, cross[stage], mode="sum")
                dots_NBK = dots_NBK - chosen_NBK.view(*codes_NBS.shape[:2], size)
            flat = (error_NB[..., None] + squares_SK[stage]).sub_(dots_NBK, alpha=2).flatten(1)
            error_NB, best_NB = flat.topk(min(beam, flat.shape[1]), dim=1, largest=False)
            parent_NB, code_NB = best_NB // size, best_NB % size
            history = codes_NBS.gather(1, parent_NB[..., None].expand(-1, -1, stage))
            codes_NBS = torch.cat([history, code_NB[..., None]], dim=2)
        # topk sorts ascending, so the first hypothesis is the best one.
        codes.append(codes_NBS[:, 0])
    return torch.cat(codes)
