"""Prompts that grow: what the last one had in common with the next stays in the key/value cache."""

from __future__ import annotations

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine.engine import Engine, Work
from speechlm_ext.generation.engine.rows import Decoded, prefix_rows
from speechlm_ext.generation.requests.prompt import Prompt
from speechlm_ext.generation.requests.settings import SamplingSettings
from speechlm_ext.model.lm import SpeechLMModel


def check_one_row(settings: SamplingSettings, where: str) -> None:
    """Raises :class:`GenerationError` for what is no settings, or takes more than the one row that a session has."""
    if not isinstance(settings, SamplingSettings):
        raise GenerationError(f"{where}: settings must be SamplingSettings, got {type(settings).__name__}.")
    names = ("guidance", "best_of", "n_best", "beam_size")
    given = [name for name in names if getattr(settings, name) != 1]
    if given:
        raise GenerationError(f"{where} takes no {', '.join(names)}; leave {', '.join(given)} out.")


class Session:
    """One slot whose rows are kept from prompt to prompt.

    Args:
        model: in eval mode.

    Attributes:
        held_RS: int64 ``[R, S]``, the delayed rows whose keys and values the cache has.
    """

    def __init__(self, model: SpeechLMModel) -> None:
        self.engine = Engine(model, 1, poll=1)
        self.layout = model.layout
        self.held_RS = np.empty((0, model.layout.num_streams), dtype=np.int64)

    def forget(self) -> None:
        """Start from nothing."""
        self.held_RS = self.held_RS[:0]

    def decode(self, prompt: Prompt) -> Decoded:
        """As :func:`speechlm_ext.generation.engine.engine.decode` of one prompt, reading only the rows that are new."""
        rows_RS = prefix_rows(prompt.frames_PS, self.layout)
        # The last row is always fed anew: its hidden state is what the decoder starts from.
        count = min(len(rows_RS) - 1, len(self.held_RS))
        differs = (rows_RS[:count] != self.held_RS[:count]).any(axis=1)
        held = int(differs.argmax()) if differs.any() else count
        self.forget()  # until it is through: an interruption leaves nothing to rely on
        finished = list[tuple[Work, Decoded]]()
        try:
            self.engine.admit([Work(prompt.id, prompt)], held=held)
            while not finished:
                self.engine.step()
                finished = self.engine.collect()
        finally:
            self.engine.cancel(prompt.id)
        ((_, decoded),) = finished
        if decoded.error is None:
            self.held_RS = decoded.rows_RS[:-1]  # the last row was said and not read
        return decoded
