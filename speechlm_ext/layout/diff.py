"""``speechlm layout``: show a token layout, or the first difference of two."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from speechlm_ext.layout.layout import FILE_NAME, TokenLayout
from speechlm_ext.utils.files.run_folders import find_model_folder


@dataclass(frozen=True)
class LayoutConfig:
    """Show the token layout of a token folder, checkpoint or model folder, or compare two.

    ``speechlm layout --path tokens/train`` or, to compare, ``… --other runs/a/checkpoints/latest``;
    the exit code of a comparison is 0 when the ids mean the same, 1 when not.
    """

    path: str
    """Folder, or the ``token_layout.json`` itself."""
    other: str | None = None
    """A second one to compare with."""
    json: bool = False
    """Print the layout as JSON."""


def run_layout(cfg: LayoutConfig) -> int:
    """Print a layout or the first difference; returns the exit code."""
    layout = _load(cfg.path)
    if cfg.other is not None:
        difference = layout.first_difference(_load(cfg.other))
        print("same ids" if difference is None else f"different: {difference}")
        return 0 if difference is None else 1
    if cfg.json:
        print(json.dumps(layout.to_dict(), indent=2))
        return 0
    print(f"{layout}  {layout.num_streams} streams  {layout.vocab_size} ids")
    for interval in layout.intervals:
        print(f"  {interval.name:<10} [{interval.start}, {interval.end})")
    for stream in layout.streams:
        print(f"  stream {stream.name:<8} delay {stream.delay}  carries {', '.join(stream.carries)}")
    for modality, fingerprint in layout.tokenizers:
        print(f"  tokenizer {modality:<10} {fingerprint}")
    return 0


def _load(path: str) -> TokenLayout:
    """The layout of a folder, or of a run's newest checkpoint where the folder has none of its own."""
    if Path(path).is_file() or (Path(path) / FILE_NAME).is_file():
        return TokenLayout.load(path)
    return TokenLayout.load(find_model_folder(path))
