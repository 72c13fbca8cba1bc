"""speechlm_ext: fused multi-stream kernels for speech language models, and a toolkit on top of them.

``import speechlm_ext as sx`` is cheap: rooms load when they are first touched.

    sx.ops            delay_pack, multistream_embed, multistream_loss, kmeans_assign, multistream_sample
    sx.KMeans         units from features: in memory, streamed, or on many processes
    sx.TokenLayout    which id means what, as versioned data
    sx.SpeechLM       the model: from_pretrained, generate, stream, chat, listen, save_pretrained
    sx.MultiStreamEmbedding  its input table as a module of its own
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from speechlm_ext.version import __version__, check_requirements

check_requirements()  # before anything that an old Python or torch could fail at

from speechlm_ext.utils.moved import install  # noqa: E402

if TYPE_CHECKING:
    from speechlm_ext import ops
    from speechlm_ext.kmeans.estimator import KMeans
    from speechlm_ext.layout import TokenLayout
    from speechlm_ext.model.embedding import MultiStreamEmbedding
    from speechlm_ext.speechlm import SpeechLM

__all__ = ["KMeans", "MultiStreamEmbedding", "SpeechLM", "TokenLayout", "__version__", "ops"]

install()

_LAZY = {
    "ops": ("speechlm_ext.ops", None),
    "KMeans": ("speechlm_ext.kmeans", "KMeans"),
    "TokenLayout": ("speechlm_ext.layout", "TokenLayout"),
    "MultiStreamEmbedding": ("speechlm_ext.model.embedding", "MultiStreamEmbedding"),
    "SpeechLM": ("speechlm_ext.speechlm", "SpeechLM"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'speechlm_ext' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
