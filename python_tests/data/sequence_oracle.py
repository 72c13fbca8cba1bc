"""What a training sequence is, written down a second time for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.layout import TokenLayout
from speechlm_ext.tasks import TaskTemplate


def assemble(
    template: TaskTemplate,
    u: dict[str, Any],
    layout: TokenLayout,
    prompt: np.ndarray | None = None,
    weights: LossWeights = LossWeights(),  # noqa: B008 - frozen
) -> tuple[np.ndarray, np.ndarray]:
    """The undelayed frames int64 ``[T, S]`` of a sample's sequence in layout ids, and each token's loss weight float32
    ``[T, S]``, one token at a time."""
    w = weights
    S = layout.num_streams
    ids: list[list[int]] = []
    weight: list[list[float]] = []

    def special(token: int, learnt: float) -> None:
        ids.append([token] + [0] * (S - 1))
        weight.append([learnt] + [0.0] * (S - 1))

    everything = w.region == "all"
    special(5, 0.0)
    special(dict(layout.special)[f"task:{template.name}"], w.special if everything else 0.0)
    for entry, is_target in template.entries:
        special(dict(layout.special)[f"modality:{entry.modality}"], w.special if everything else 0.0)
        if entry.modality in ("text_bpe", "ssl"):
            columns, starts = (
                [np.asarray(u[entry.modality]).reshape(-1)],
                [layout.interval(entry.modality)[0]],
            )
            each = [w.text if entry.modality == "text_bpe" else w.ssl]
        else:
            K = layout.num_codebooks
            with_ssl = layout.has("codec_ssl")
            if entry.modality == "spk":
                assert prompt is not None
                columns = [prompt[:, c] for c in range(prompt.shape[1])]
            else:
                columns = ([u["ssl"][:, 0]] if with_ssl else []) + [u["codec"][:, c] for c in range(K)]
            starts = ([layout.interval("ssl")[0]] if with_ssl else []) + [
                layout.interval(f"codec{k}")[0] for k in range(K)
            ]
            each = [w.ssl] * with_ssl + [w.codec / K] * K
        for t in range(min(len(c) for c in columns)):
            ids.append(
                [int(c[t]) + s for c, s in zip(columns, starts, strict=True)] + [0] * (S - len(columns))
            )
            learnt = is_target or everything
            weight.append([x * learnt for x in each] + [0.0] * (S - len(columns)))
        if is_target:
            # As much as one frame of the content that it ends.
            special(5, w.special * sum(each))
        for _ in range(max(layout.delays)):
            special(0, 0.0)
    return np.array(ids), np.array(weight, np.float32)
