"""Settings of ``speechlm tokenize``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from speechlm_ext.errors import ConfigError
from speechlm_ext.tokenizers import RVQConfig, SSLConfig, TextConfig
from speechlm_ext.tokenizers.encoders.spec import SAMPLE_RATE, EncoderSpec
from speechlm_ext.utils.options import check_positive, take_old_name


@dataclass(frozen=True)
class TextFit(TextConfig):
    """Source of the text tokenizer."""

    kind: Literal["sentencepiece", "huggingface", "none"] = "sentencepiece"
    """Train a SentencePiece model on the manifest's texts, read a Hugging Face tokenizer, or have none."""
    path: str | None = None
    """Folder of the Hugging Face tokenizer."""


@dataclass(frozen=True)
class SSLFit(SSLConfig):
    """Source of the SSL units."""

    kind: Literal["mfcc-kmeans", "encoder-kmeans", "none"] = "mfcc-kmeans"
    """K-Means units over normalised MFCCs, over the features of ``encoder``, or none."""
    encoder: str | None = None
    """Of ``encoder-kmeans``: ``mfcc``, ``log-mel``, or ``hf:FOLDER_OR_HUB_NAME:LAYER``."""
    kmeans: str | None = None
    """Of ``encoder-kmeans``: folder of units from ``speechlm kmeans fit``, which are used instead of fitting; they name
    their encoder, unless they were imported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "encoder-kmeans":
            if self.encoder is not None or self.kmeans is not None:
                raise ConfigError(
                    f"ssl.encoder and ssl.kmeans are settings of ssl.kind encoder-kmeans, but it is {self.kind!r}."
                )
        elif self.sample_rate != SAMPLE_RATE:
            raise ConfigError(
                f"ssl.kind encoder-kmeans works at {SAMPLE_RATE} Hz, but ssl.sample_rate is {self.sample_rate}."
            )
        elif self.encoder is None and self.kmeans is None:
            raise ConfigError(
                "ssl.kind encoder-kmeans needs ssl.encoder (mfcc, log-mel, or hf:FOLDER_OR_HUB_NAME:LAYER such as "
                "hf:facebook/hubert-base-ls960:9) to fit units, or ssl.kmeans, a folder of fitted ones."
            )
        elif self.encoder is not None:
            EncoderSpec.parse(self.encoder)


@dataclass(frozen=True)
class CodecFit(RVQConfig):
    """Source of the codec."""

    kind: Literal["rvq-kmeans", "none"] = "rvq-kmeans"
    """Fit residual K-Means codebooks over log-mel frames, or have none."""


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn manifests into a token folder: fit tokenizers, encode, write shards and an index.

    ``speechlm tokenize --manifest data/train.jsonl --output_dir tokens/train``; then the same tokenizers for another
    split: ``speechlm tokenize --manifest data/test.jsonl --output_dir tokens/test --tokenizers
    tokens/train/tokenizers``.
    """

    manifest: list[str] | str
    """A manifest (JSON lines) or a list of them; each is a data set named after its file, unless its lines name one."""
    output_dir: str = ""
    """The token folder to write; needed."""
    tokenizers: str | None = None
    """Folder with existing tokenizers; without it they are fitted on the manifests."""
    text: TextFit = field(default_factory=TextFit)
    """Text tokenizer to fit."""
    ssl: SSLFit = field(default_factory=SSLFit)
    """SSL units to fit."""
    codec: CodecFit = field(default_factory=CodecFit)
    """Codec to fit."""
    fit_minutes: float = 30.0
    """Minutes of recordings, drawn at random, that SSL units and codec are fitted on."""
    delays: list[int] | int | None = None
    """Frames by which each stream is delayed; default 0, 1, 2, … Training can choose others (``data.delays``)."""
    task_file: str | None = None
    """YAML file with task templates of your own; their ids become part of the layout."""
    skip_bad: bool = False
    """Leave out bad items instead of stopping; they are listed in ``rejected.jsonl`` and counted."""
    resample: bool = True
    """Convert recordings of another sampling rate, which the log notes once; ``false`` makes them bad items."""
    num_workers: int | None = None
    """Processes; default one per core."""
    rows_per_shard: int = 1000
    """Utterances in a shard."""
    shard: str | None = None
    """``i/N``: make only every N-th shard, starting with the i-th (from 0)."""
    stage: Literal["all", "fit", "merge"] = "all"
    """``fit`` only fits the tokenizers, ``merge`` only writes the index over the shards of all parts."""
    seed: int = 0
    """Seed of the fits."""
    out: str | None = None
    """Old name of ``output_dir``."""

    def __post_init__(self) -> None:
        take_old_name(self, "out", "output_dir", needed="the token folder to write")
        check_positive(self, "rows_per_shard")
        self.part  # noqa: B018 - checks ``shard``

    @property
    def part(self) -> tuple[int, int]:
        """``shard`` as numbers ``(i, N)``; ``(0, 1)`` is everything."""
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not match or not int(match[1]) < int(match[2]):
            raise ConfigError(f"shard must be i/N with 0 <= i < N, e.g. 0/4, got {self.shard!r}.")
        return int(match[1]), int(match[2])
