"""Fitting the tokenizers of a token folder on the manifest's own recordings and texts, or taking given ones.

What was fitted is remembered with a hash of everything it was fitted from, so a restart loads it and a run with other
settings is told to use another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from speechlm_ext.data.manifest import Utterance
from speechlm_ext.data.recordings import read_wave
from speechlm_ext.errors import AudioError, ConfigError, LayoutMismatchError
from speechlm_ext.tokenizers import (
    EncoderKMeans,
    EncoderKMeansConfig,
    HuggingFaceText,
    MFCCKMeans,
    RVQConfig,
    RVQKMeansCodec,
    SentencePieceText,
    SSLConfig,
    TextConfig,
    TokenizerSet,
    require_equal_rates,
)
from speechlm_ext.tokenizers.encoders.spec import SAMPLE_RATE, EncoderSpec
from speechlm_ext.utils.files.io import atomic_write_json
from speechlm_ext.utils.files.json_text import parse_json

FOLDER = "tokenizers"
RECORD = "fit.json"
Config = TypeVar("Config", TextConfig, SSLConfig, EncoderKMeansConfig, RVQConfig)


@dataclass(frozen=True)
class TextFit(TextConfig):
    """How to get the text tokenizer."""

    kind: Literal["sentencepiece", "huggingface", "none"] = "sentencepiece"
    """Train a SentencePiece model on the manifest's texts, read a Hugging Face tokenizer, or have none."""
    path: str | None = None
    """Folder of the Hugging Face tokenizer."""


@dataclass(frozen=True)
class SSLFit(SSLConfig):
    """How to get the SSL units."""

    kind: Literal["mfcc-kmeans", "encoder-kmeans", "none"] = "mfcc-kmeans"
    """K-Means units over normalised MFCCs, over the features of ``encoder``, or none."""
    encoder: str | None = None
    """Of ``encoder-kmeans``: ``mfcc``, ``log-mel``, or ``hf:FOLDER_OR_HUB_NAME:LAYER``."""
    kmeans: str | None = None
    """Of ``encoder-kmeans``: take the units of this folder, which ``speechlm kmeans fit`` has written, and fit none;
    they know their encoder, unless they were imported."""

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
    """How to get the codec."""

    kind: Literal["rvq-kmeans", "none"] = "rvq-kmeans"
    """Fit residual K-Means codebooks over log-mel frames, or have none."""


@dataclass(frozen=True)
class FitSettings:
    """Everything that decides fitted tokenizers, except the data."""

    text: TextFit
    ssl: SSLFit
    codec: CodecFit
    minutes: float
    resample: bool
    seed: int


def get_tokenizers(
    out: Path,
    given: str | None,
    settings: FitSettings,
    utterances: Sequence[Utterance],
    *,
    skip_bad: bool,
    may_fit: bool,
) -> TokenizerSet:
    """The tokenizers of the token folder ``out``: given ones, those fitted before, or fitted now.

    Args:
        given: folder of existing tokenizers, or None to fit.
        may_fit: False insists that they are there already.

    Raises:
        ConfigError: ``out`` belongs to other settings, or nothing may be fitted.
        TokenizerError, AudioError: they cannot be loaded or fitted.
    """
    folder = out / FOLDER
    if given is not None:
        tokenizers = TokenizerSet.load(given)
        if os.path.realpath(folder) != os.path.realpath(given):
            if folder.is_dir() and TokenizerSet.load(folder).fingerprints() != tokenizers.fingerprints():
                raise LayoutMismatchError(
                    f"{out} was tokenized with other tokenizers than {given}; their ids mean different things. "
                    "Choose another output_dir."
                )
            tokenizers.save(folder)
        return tokenizers
    key = _fit_key(settings, utterances)
    record = out / RECORD
    if record.is_file():
        try:
            found = parse_json(record.read_bytes())["inputs_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{record} is damaged ({error}); choose another output_dir, or delete {out}."
            ) from None
        if found != key:
            raise ConfigError(
                f"the tokenizers in {folder} were fitted on another manifest or with other settings. Choose another "
                f"output_dir, or keep these tokenizers with --tokenizers {folder}."
            )
        return TokenizerSet.load(folder)
    if not may_fit:
        raise ConfigError(
            f"{out} has no fitted tokenizers. Run once with --stage fit before the parts, or give --tokenizers FOLDER."
        )
    tokenizers = _fit(settings, utterances, skip_bad)
    tokenizers.save(folder)
    atomic_write_json(record, {"inputs_sha256": key, "settings": asdict(settings)})
    return tokenizers


def _fit_key(settings: FitSettings, utterances: Sequence[Utterance]) -> str:
    from speechlm_ext.kmeans import KMeans

    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    if settings.ssl.kmeans is not None:  # the folder's name says nothing of the units in it
        digest.update(KMeans.load(settings.ssl.kmeans).fingerprint.encode())
    for u in utterances:
        digest.update(
            json.dumps([u.dataset, u.id, u.audio and u.audio.name, u.text, u.start, u.duration]).encode()
        )
    return digest.hexdigest()


def _fit(settings: FitSettings, utterances: Sequence[Utterance], skip_bad: bool) -> TokenizerSet:
    texts = [u.text for u in utterances if u.text is not None]
    has_audio = any(u.audio is not None for u in utterances)
    text: Any = None
    if settings.text.kind == "huggingface":
        if settings.text.path is None:
            raise ConfigError("text.kind 'huggingface' needs text.path, the folder of a tokenizer.")
        text = HuggingFaceText.from_folder(settings.text.path)
    elif settings.text.kind == "sentencepiece" and texts:
        text = SentencePieceText.fit(texts, _plain(settings.text, TextConfig))
    ssl: Any = None
    codec: Any = None
    waves: dict[int, list[np.ndarray]] = {}
    if has_audio and settings.ssl.kind == "encoder-kmeans" and settings.ssl.kmeans is not None:
        ssl = EncoderKMeans.from_kmeans(settings.ssl.kmeans, encoder=settings.ssl.encoder)
    elif has_audio and settings.ssl.kind != "none":
        rate = settings.ssl.sample_rate
        waves[rate] = list(_fit_waves(settings, utterances, rate, skip_bad))
        if settings.ssl.kind == "encoder-kmeans":
            ssl = EncoderKMeans.fit(
                waves[rate], _plain(settings.ssl, EncoderKMeansConfig), seed=settings.seed
            )
        else:
            ssl = MFCCKMeans.fit(waves[rate], _plain(settings.ssl, SSLConfig), seed=settings.seed)
    if has_audio and settings.codec.kind != "none":
        rate = settings.codec.mel.sample_rate
        if ssl is not None:  # before a fit of minutes, not at the first recording behind it
            require_equal_rates((ssl.sample_rate, ssl.frame_rate), (rate, settings.codec.frame_rate))
        if rate not in waves:
            waves[rate] = list(_fit_waves(settings, utterances, rate, skip_bad))
        codec = RVQKMeansCodec.fit(waves[rate], _plain(settings.codec, RVQConfig), seed=settings.seed)
    if text is None and ssl is None and codec is None:
        raise ConfigError(
            "no tokenizer is left to fit: the manifest has no text and no audio for the kinds chosen."
        )
    return TokenizerSet(text, ssl, codec)


def _fit_waves(
    settings: FitSettings, utterances: Sequence[Utterance], rate: int, skip_bad: bool
) -> Iterator[np.ndarray]:
    """Recordings in random order until they last long enough."""
    spoken = [u for u in utterances if u.audio is not None]
    left = settings.minutes * 60 * rate
    for i in np.random.default_rng(settings.seed).permutation(len(spoken)):
        if left <= 0:
            return
        try:
            wave, _ = read_wave(spoken[i], rate, settings.resample)
        except AudioError as error:
            if skip_bad:
                continue
            raise AudioError(f"{spoken[i].where}: {error}") from None
        left -= len(wave)
        yield wave


def _plain(settings: Any, kind: type[Config]) -> Config:
    """The tokenizer's own settings, without what is said here about how to get it."""
    return kind(**{f.name: getattr(settings, f.name) for f in fields(kind)})
