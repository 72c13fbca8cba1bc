"""Fits of codebooks: features of all recordings, and K-Means in memory, by this process alone, seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import TokenizerError
from speechlm_ext.kmeans import KMeans


def extract_features(
    waves: Iterable[np.ndarray],
    extract: Callable[[np.ndarray], torch.Tensor],
    *,
    frame_rate: float,
    num_clusters: int,
    setting: str,
) -> torch.Tensor:
    """Features of all recordings of a fit, float32 ``[N, F]`` with ``N >= num_clusters``.

    ``setting`` is the name of ``num_clusters`` for errors. Raises :class:`AudioError`: a waveform that cannot be used;
    :class:`TokenizerError`: fewer frames than clusters.
    """
    parts = [extract(check_wave(wave, f"waveform {i} of the fit")) for i, wave in enumerate(waves)]
    num_frames = sum(map(len, parts))
    if num_frames < num_clusters:
        raise TokenizerError(
            f"{setting} {num_clusters} needs at least as many frames to fit on, got {num_frames} "
            f"({num_frames / frame_rate:.1f} s of audio). Give more audio, or set {setting} to at most {num_frames}."
        )
    return torch.cat(parts)


def sample_rows(x_NF: torch.Tensor, max_rows: int, seed: int) -> torch.Tensor:
    """``max_rows`` rows drawn at random, or all where there are not more."""
    if len(x_NF) <= max_rows:
        return x_NF
    order = torch.randperm(len(x_NF), generator=torch.Generator().manual_seed(seed))
    return x_NF[order[:max_rows]]


def fit(x_NF: torch.Tensor, num_clusters: int, *, seed: int, iterations: int) -> KMeans:
    """K-Means fitted to the rows of ``x_NF``; ``seed`` fixes the result.

    Lloyd stops before ``iterations`` if no centroid moves. Raises :class:`KMeansError`: fewer rows than clusters.
    """
    # The start is plain k-means++, not greedy: a codec from the greedy start used half as many codes in its last stages
    # and had a 6 % larger error on new speech. A subsample suffices, since the start only has to be spread out.
    return KMeans(
        num_clusters,
        n_local_trials=1,
        init_size=32 * num_clusters,
        max_iter=iterations,
        tol=0.0,
        random_state=seed,
        distributed=False,
        progress=False,
    ).fit(x_NF)
