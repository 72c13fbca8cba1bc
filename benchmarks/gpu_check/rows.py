"""The rows of the ops, in order of value: an op's benchmark, its shape, and what else it takes."""

from __future__ import annotations

Named = tuple[str, ...]

#: Of the first run: what the ops are judged by.
FIRST_ROWS: tuple[Named, ...] = (
    ("multistream_loss", "1p7b_8k"),
    ("kmeans_assign", "ssl_million"),
    ("multistream_embed", "16k_bf16", "forward"),
    ("multistream_embed", "16k_bf16", "forward_backward"),
    ("decode_attention", "1p7b_1_2000"),
    ("decode_attention", "qwen3_1p7b_256_500"),
    ("decode_rows", "1p7b_1_2000"),
)
#: Of the second run.
OTHER_ROWS: tuple[Named, ...] = (
    ("multistream_loss", "1p7b_32k"),
    ("multistream_sample", "speech", "top_k"),
    ("delay_pack", "1p7b_8k"),
    ("kmeans_lloyd", "ssl_million"),
    ("kmeans_chunks", "ssl_million"),
    ("multistream_embed", "16k_bf16", "sparse"),
    ("delay_pack", "million"),
    ("decode_attention", "1p7b_256_500"),
    ("decode_attention", "135m_16_2000"),
    ("decode_rows", "1p7b_256_500"),
    ("multistream_sample", "speech_1", "top_k"),
    ("multistream_loss", "1p7b_8k_v114k"),
    ("multistream_embed", "16k_bf16", "features"),
    ("kmeans_assign", "ssl_clusters"),
    ("multistream_sample", "speech", "top_p"),
    ("multistream_sample", "text", "top_k"),
    ("multistream_embed", "4k_bf16", "forward"),
    ("multistream_embed", "decode", "forward"),
    ("delay_pack", "1p7b_32k"),
    ("kmeans_assign", "whisper_base"),
    ("multistream_loss", "1p7b_32k_v114k"),
    ("multistream_sample", "speech", "greedy"),
    ("multistream_sample", "speech", "full"),
    ("kmeans_assign", "mfcc"),
)


def name_of(row: Named) -> str:
    """The row as text."""
    return " ".join(row)


def names(rows: tuple[Named, ...], is_tiny: bool) -> list[str]:
    """The rows as text; ``is_tiny``: on each op's smallest shape, each once."""
    if is_tiny:
        rows = tuple(dict.fromkeys((op, "smoke", *words) for op, _, *words in rows))
    return [name_of(row) for row in rows]
