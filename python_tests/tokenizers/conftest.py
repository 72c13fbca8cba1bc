"""A small codec, SSL units and a text tokenizer, fitted once per run on the committed recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from filelock import FileLock

from python_tests.assets import recordings, waves
from speechlm_ext.tokenizers import (
    MFCCKMeans,
    RVQConfig,
    RVQKMeansCodec,
    SentencePieceText,
    SSLConfig,
    TextConfig,
    TokenizerSet,
    load_tokenizer,
)


@pytest.fixture(scope="session")
def fitted_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """``fitted_once(name, fit)``: the tokenizer that one process of the run fits and the others load."""
    # Processes of pytest-xdist have folders of their own below the run's.
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if base.name.startswith("popen-") else base) / "tokenizers"
    shared.mkdir(exist_ok=True)

    def get(name: str, fit: Callable[[], Any]) -> Any:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name / "tokenizer.json").is_file():
                fit().save(shared / name)
        return load_tokenizer(shared / name)

    return get


@pytest.fixture(scope="session")
def codec(fitted_once) -> RVQKMeansCodec:
    config = RVQConfig(codebook_size=64, griffin_lim_iterations=30)
    return fitted_once("codec", lambda: RVQKMeansCodec.fit(waves(), config))


@pytest.fixture(scope="session")
def ssl(fitted_once) -> MFCCKMeans:
    return fitted_once("ssl", lambda: MFCCKMeans.fit(waves(), SSLConfig(num_clusters=50)))


@pytest.fixture(scope="session")
def text(fitted_once) -> SentencePieceText:
    texts = [recording.text for recording in recordings()]
    return fitted_once("text", lambda: SentencePieceText.fit(texts, TextConfig(vocab_size=320)))


@pytest.fixture(scope="session")
def tokenizer_set(text, ssl, codec) -> TokenizerSet:
    return TokenizerSet(text=text, ssl=ssl, codec=codec)
