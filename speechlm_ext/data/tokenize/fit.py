"""The tokenizers of a token folder: fitted on the manifest's recordings and texts, or copied from another folder.

Fitted tokenizers are recorded with a hash of everything they were fitted from, so a restart loads them and a run with
other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from speechlm_ext.data.manifest import Utterance
from speechlm_ext.data.recordings import read_wave
from speechlm_ext.data.tokenize.settings import TokenizeConfig
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
from speechlm_ext.utils.files.io import atomic_write_json
from speechlm_ext.utils.files.json_shape import read_shaped

FOLDER = "tokenizers"
RECORD = "fit.json"
Config = TypeVar("Config", TextConfig, SSLConfig, EncoderKMeansConfig, RVQConfig)


def get_tokenizers(cfg: TokenizeConfig, utterances: Sequence[Utterance]) -> TokenizerSet:
    """The tokenizers of a token folder: existing ones, those that an earlier run fitted there, or fitted now.

    Only a run over everything fits: a part, or ``merge``, needs tokenizers that are already there.

    Raises:
        ConfigError: the folder belongs to other settings, or has no tokenizers and this run may fit none.
        TokenizerError, AudioError: they cannot be loaded or fitted.
    """
    out = Path(cfg.output_dir)
    folder, record = out / FOLDER, out / RECORD
    if cfg.tokenizers is not None:
        return _copy_tokenizers(Path(cfg.tokenizers), out)
    key = _fit_key(cfg, utterances)
    if record.is_file():
        way_out = f"choose another output_dir, or delete {out}."
        if (
            read_shaped(record, {"inputs_sha256": str, "...": Any}, ConfigError, way_out)["inputs_sha256"]
            != key
        ):
            raise ConfigError(
                f"the tokenizers in {folder} were fitted on another manifest or with other settings. Choose another "
                f"output_dir, or keep these tokenizers with --tokenizers {folder}."
            )
        return TokenizerSet.load(folder)
    if cfg.part != (0, 1) or cfg.stage == "merge":
        raise ConfigError(
            f"{out} has no fitted tokenizers. Run once with --stage fit before the parts, or give --tokenizers FOLDER."
        )
    tokenizers = _fit(cfg, utterances)
    tokenizers.save(folder)
    atomic_write_json(record, {"inputs_sha256": key, "settings": _fit_settings(cfg)})
    return tokenizers


def _copy_tokenizers(source: Path, out: Path) -> TokenizerSet:
    folder = out / FOLDER
    tokenizers = TokenizerSet.load(source)
    if os.path.realpath(folder) != os.path.realpath(source):
        if folder.is_dir() and TokenizerSet.load(folder).fingerprints() != tokenizers.fingerprints():
            raise LayoutMismatchError(
                f"{out} was tokenized with other tokenizers than {source}; their ids mean different things. "
                "Choose another output_dir."
            )
        tokenizers.save(folder)
    return tokenizers


def _fit_settings(cfg: TokenizeConfig) -> dict[str, Any]:
    """Every setting that decides fitted tokenizers."""
    parts = {name: asdict(getattr(cfg, name)) for name in ("text", "ssl", "codec")}
    return {**parts, "minutes": cfg.fit_minutes, "resample": cfg.resample, "seed": cfg.seed}


def _fit_key(cfg: TokenizeConfig, utterances: Sequence[Utterance]) -> str:
    """Hash of everything that decides fitted tokenizers: settings, K-Means units, and the manifest's lines."""
    from speechlm_ext.kmeans import KMeans

    digest = hashlib.sha256(json.dumps(_fit_settings(cfg), sort_keys=True).encode())
    if cfg.ssl.kmeans is not None:  # the folder's name says nothing about the units in it
        digest.update(KMeans.load(cfg.ssl.kmeans).fingerprint.encode())
    for u in utterances:
        digest.update(
            json.dumps([u.dataset, u.id, u.audio and u.audio.name, u.text, u.start, u.duration]).encode()
        )
    return digest.hexdigest()


def _fit(cfg: TokenizeConfig, utterances: Sequence[Utterance]) -> TokenizerSet:
    text = _fit_text(cfg, utterances)
    ssl: Any = None
    codec: Any = None
    has_audio = any(u.audio is not None for u in utterances)
    waves = lru_cache(lambda rate: list(_fit_waves(cfg, utterances, rate)))
    if has_audio and cfg.ssl.kind != "none":
        if cfg.ssl.kmeans is not None:
            ssl = EncoderKMeans.from_kmeans(cfg.ssl.kmeans, encoder=cfg.ssl.encoder)
        elif cfg.ssl.kind == "encoder-kmeans":
            settings = _only(cfg.ssl, EncoderKMeansConfig)
            ssl = EncoderKMeans.fit(waves(cfg.ssl.sample_rate), settings, seed=cfg.seed)
        else:
            ssl = MFCCKMeans.fit(waves(cfg.ssl.sample_rate), _only(cfg.ssl, SSLConfig), seed=cfg.seed)
    if has_audio and cfg.codec.kind != "none":
        rate = cfg.codec.mel.sample_rate
        if ssl is not None:  # before a fit of minutes, not at the first recording after it
            require_equal_rates((ssl.sample_rate, ssl.frame_rate), (rate, cfg.codec.frame_rate))
        codec = RVQKMeansCodec.fit(waves(rate), _only(cfg.codec, RVQConfig), seed=cfg.seed)
    if text is None and ssl is None and codec is None:
        raise ConfigError(
            "no tokenizer is left to fit: the manifest has no text and no audio for the kinds chosen."
        )
    return TokenizerSet(text, ssl, codec)


def _fit_text(
    cfg: TokenizeConfig, utterances: Sequence[Utterance]
) -> HuggingFaceText | SentencePieceText | None:
    if cfg.text.kind == "huggingface":
        if cfg.text.path is None:
            raise ConfigError("text.kind 'huggingface' needs text.path, the folder of a tokenizer.")
        return HuggingFaceText.from_folder(cfg.text.path)
    texts = [u.text for u in utterances if u.text is not None]
    if cfg.text.kind == "none" or not texts:
        return None
    return SentencePieceText.fit(texts, _only(cfg.text, TextConfig))


def _fit_waves(cfg: TokenizeConfig, utterances: Sequence[Utterance], rate: int) -> Iterator[np.ndarray]:
    """Recordings in random order, ``fit_minutes`` of them."""
    spoken = [u for u in utterances if u.audio is not None]
    left = cfg.fit_minutes * 60 * rate
    for i in np.random.default_rng(cfg.seed).permutation(len(spoken)):
        if left <= 0:
            return
        try:
            wave, _ = read_wave(spoken[i], rate, cfg.resample)
        except AudioError as error:
            if cfg.skip_bad:
                continue
            raise AudioError(f"{spoken[i].where}: {error}") from None
        left -= len(wave)
        yield wave


def _only(settings: Any, kind: type[Config]) -> Config:
    """The settings of the tokenizer's own class, without those that select it."""
    return kind(**{f.name: getattr(settings, f.name) for f in fields(kind)})
