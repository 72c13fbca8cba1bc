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
import re
import sys
from typing import TYPE_CHECKING, Any

#: The version's only place: wheels, the compiled module and model folders take it from here, by reading this line.
__version__ = "0.1.0"
#: The oldest versions that run the package; pyproject.toml declares the same.
MIN_PYTHON, MIN_TORCH = (3, 10), (2, 6)


def check_requirements() -> None:
    """Raise ImportError, in one sentence, for a Python or a torch that is too old. Does not import torch."""

    def dotted(numbers: tuple[int, ...]) -> str:
        return ".".join(map(str, numbers))

    if sys.version_info < MIN_PYTHON:
        raise ImportError(
            f"speechlm_ext {__version__} needs Python {dotted(MIN_PYTHON)} or later, but this is Python "
            f"{dotted(sys.version_info[:3])} ({sys.executable}): make an environment with a newer Python."
        )
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("torch")
    except PackageNotFoundError:
        return  # `import torch` will say so
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < MIN_TORCH:
        raise ImportError(
            f"speechlm_ext {__version__} needs torch {dotted(MIN_TORCH)} or later, but torch {found} is installed: "
            f"pip install 'torch>={dotted(MIN_TORCH)}'."
        )


check_requirements()  # before anything that an old Python or torch would fail at

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
