"""``sx.SpeechLM``: the model with all that people do with it, on top of ``model/`` and ``generation/``."""

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
        """Load a model folder, or the newest checkpoint of a run folder; strict: every weight must be there and nothing
        else.

        Args:
            folder: a checkpoint, an export, or the folder of a run.
            device: where the model goes.
            verify: compare its files with their digests, and see that every weight is finite.

        Raises:
            CheckpointError: not a model folder, or one of its files is missing or damaged, or its weights are of
                another shape or not finite.
            LayoutError, LayoutMismatchError: its layout is damaged or is not the one of its tokenizers.
        """
        return load_model(find_model_folder(folder), cls, device, verify=verify)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder; see :func:`speechlm_ext.model.files.model_folder.save_model`.

        Raises:
            CheckpointError: a weight is not finite; what the folder holds is untouched.
            StorageError: the disk is full or the folder cannot be written.
        """
        save_model(self, folder)

    def generate(self, requests: Sequence[GenerationRequest], batch_size: int = 16) -> list[GenerationResult]:
        """Decode many requests together; see :func:`speechlm_ext.generation.generate`."""
        return generate(self, requests, batch_size=batch_size)

    def stream(
        self, request: GenerationRequest | None = None, *, chunk_frames: int = 1, **fields: Any
    ) -> Iterator[StreamChunk]:
        """Decode one request and yield text and sound as they become final.

        Args:
            request: what to decode, or None and its fields and sampling settings as keywords:
                ``model.stream(task="tts", text="one two", seed=3)``.
            chunk_frames: fewest frames of a chunk.
        """
        return stream(self, request_of(request, fields), chunk_frames)

    def chat(self, task: str) -> Chat:
        """A dialogue that opens with ``task``'s token."""
        return Chat(self, task)

    def listen(
        self, task: str, chunk_seconds: float = 1.0, settings: SamplingSettings | None = None
    ) -> Listener:
        """Transcribe audio as it arrives."""
        return Listener(self, task, chunk_seconds, settings)
