"""A small codec, SSL units and a text tokenizer, fitted once on the committed recordings."""

from __future__ import annotations

import pytest

from python_tests.assets import recordings, waves
from speechlm_ext.tokenizers import (
    MFCCKMeans,
    RVQConfig,
    RVQKMeansCodec,
    SentencePieceText,
    SSLConfig,
    TextConfig,
    TokenizerSet,
)


@pytest.fixture(scope="session")
def codec() -> RVQKMeansCodec:
    return RVQKMeansCodec.fit(waves(), RVQConfig(codebook_size=64, griffin_lim_iterations=30))


@pytest.fixture(scope="session")
def ssl() -> MFCCKMeans:
    return MFCCKMeans.fit(waves(), SSLConfig(num_clusters=50))


@pytest.fixture(scope="session")
def text() -> SentencePieceText:
    return SentencePieceText.fit([r.text for r in recordings()], TextConfig(vocab_size=320))


@pytest.fixture(scope="session")
def tokenizer_set(text, ssl, codec) -> TokenizerSet:
    return TokenizerSet(text=text, ssl=ssl, codec=codec)
