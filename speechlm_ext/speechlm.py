"""``sx.SpeechLM``: load, save, and generate with a model, on top of ``model/`` and ``generation/``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from speechlm_ext.generation import (
    Chat,
    GenerationRequest,
    GenerationResult,
    Listener,
    SamplingSettings,
    StreamChunk,
)
from speechlm_ext.generation.generate import generate
from speechlm_ext.generation.live.stream import request_of, stream
from speechlm_ext.model.files.model_folder import load_model, save_model
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.utils.files.run_folders import find_model_folder


class SpeechLM(SpeechLMModel):
    """A speech language model: load, generate, stream, save.

    Arguments and forward are those of :class:`speechlm_ext.model.SpeechLMModel`.
    """

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", *, verify: bool = True
    ) -> SpeechLM:
        """Load a model folder, or the newest checkpoint of a run folder.

        Loading is strict: exactly the model's weights must be there.

        Args:
            folder: a checkpoint, an export, or a run folder.
            device: of the model.
            verify: compare the files with their digests, and check that every weight is finite.

        Raises:
            CheckpointError: not a model folder, a missing or damaged file, or weights that have another shape or are
                not finite.
            LayoutError, LayoutMismatchError: its layout is damaged or not that of its tokenizers.
        """
        return load_model(find_model_folder(folder), cls, device, verify=verify)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder; see :func:`speechlm_ext.model.files.model_folder.save_model`.

        Raises:
            CheckpointError: a weight is not finite; the folder is left as it is.
            StorageError: the disk is full or the folder cannot be written.
        """
        save_model(self, folder)

    def generate(self, requests: Sequence[GenerationRequest], batch_size: int = 16) -> list[GenerationResult]:
        """Generate text and speech for many requests together; see :func:`speechlm_ext.generation.generate`."""
        return generate(self, requests, batch_size=batch_size)

    def stream(
        self, request: GenerationRequest | None = None, *, chunk_frames: int = 1, **fields: Any
    ) -> Iterator[StreamChunk]:
        """Generate one request and yield text and audio as they are decoded.

        Args:
            request: a request, or None and its fields and sampling settings as keywords:
                ``model.stream(task="tts", text="one two", seed=3)``.
            chunk_frames: minimum number of frames of a chunk.

        Raises:
            GenerationError, TokenizerError: see :func:`speechlm_ext.generation.live.stream.stream`.
        """
        return stream(self, request_of(request, fields), chunk_frames)

    def chat(self, task: str) -> Chat:
        """Start a dialogue under the special token of ``task``."""
        return Chat(self, task)

    def listen(
        self, task: str, chunk_seconds: float = 1.0, settings: SamplingSettings | None = None
    ) -> Listener:
        """Transcribe audio as it arrives, in chunks of ``chunk_seconds``."""
        return Listener(self, task, chunk_seconds, settings)
