"""Prompts that grow: the rows that a prompt shares with the last one stay in the key/value cache."""

from __future__ import annotations

import time

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.rows import Decoded, prefix_rows
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.generate import decode_content, make_result
from speechlm_ext.generation.requests.prompt import Prompt
from speechlm_ext.generation.requests.request import GenerationResult
from speechlm_ext.generation.requests.settings import SamplingSettings
from speechlm_ext.model.lm import SpeechLMModel


def check_one_row(settings: SamplingSettings, where: str) -> None:
    """Raise :class:`GenerationError` unless ``settings`` are settings that take a single row of a batch."""
    if not isinstance(settings, SamplingSettings):
        raise GenerationError(f"{where}: settings must be SamplingSettings, got {type(settings).__name__}.")
    names = ("guidance", "best_of", "n_best", "beam_size")
    given = settings.changed(*names)
    if given:
        raise GenerationError(f"{where} takes no {', '.join(names)}; leave {', '.join(given)} out.")


class Session:
    """One slot of a model in eval mode that keeps its rows from prompt to prompt.

    Attributes:
        cached_RS: int64 ``[R, S]``, the delayed rows whose keys and values are in the cache.
    """

    def __init__(self, model: SpeechLMModel) -> None:
        self.model, self.layout = model, model.layout
        self.engine = Engine(model, 1, poll_interval=1)
        self.cached_RS = np.empty((0, model.layout.num_streams), dtype=np.int64)

    def generate(self, prompt: Prompt) -> tuple[GenerationResult, np.ndarray]:
        """Decode a prompt, prefilling only its new rows: its result, and the target's content int64 ``[T, S]``."""
        start = time.perf_counter()
        rows_RS = prefix_rows(prompt.frames_PS, self.layout)
        # The last row is always fed again: the decoder starts from its hidden state.
        count = min(len(rows_RS) - 1, len(self.cached_RS))
        differs = (rows_RS[:count] != self.cached_RS[:count]).any(axis=1)
        num_cached = int(differs.argmax()) if differs.any() else count
        self.cached_RS = self.cached_RS[:0]  # an interruption leaves nothing to rely on
        finished = list[tuple[DecodeJob, Decoded]]()
        try:
            self.engine.admit([DecodeJob(prompt.id, prompt)], num_cached)
            while not finished:
                self.engine.step()
                finished = self.engine.collect()
        finally:
            self.engine.cancel(prompt.id)
        ((_, decoded),) = finished
        if decoded.error is None:
            self.cached_RS = decoded.rows_RS[:-1]  # the last row was sampled and not fed
        result = make_result(prompt, decoded, time.perf_counter() - start, self.model)
        return decode_content(result, self.model), decoded.content_TS
