"""A dialogue: turns of text or speech, with one key/value cache for all turns.

The sequence is ``[sos][task]``, then for each turn ``[role][marker] content``, the end token after a turn of the model,
and ``max_delay`` pad frames. A reply prefills only the turns since the last one: the earlier rows are in the cache, as
after a fresh prefill of the whole dialogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechlm_ext.audio.waveform import says_conversions
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.live.session import Session, check_one_row
from speechlm_ext.generation.requests.encode_fields import content_frames, encode_field
from speechlm_ext.generation.requests.prompt import (
    Prompt,
    pad_frames,
    plan_segments,
    require_tokenizers,
    special_frame,
)
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.settings import SamplingSettings
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.tasks import Entry, TaskTemplate

ROLES = ("system", "user", "assistant")
#: Modalities of a turn.
MODALITIES = ("text_bpe", "codec_ssl", "codec", "ssl")


@dataclass(frozen=True, eq=False)
class Turn:
    """A turn of the dialogue; ``result`` is None unless the model generated it."""

    role: str
    modality: str
    frames_TS: np.ndarray
    """int64 ``[T, S]`` content in layout ids."""
    result: GenerationResult | None = None


class Chat:
    """Several turns with a model.

        chat = Chat(model, task="textlm")
        chat.say("What is the time?")
        print(chat.reply().text)

    Args:
        model: with tokenizers, in eval mode.
        task: the special token that opens the dialogue; a task that the model was trained for.

    Raises:
        GenerationError: the model has no tokenizers. LayoutError: it has no such task or no roles.
    """

    def __init__(self, model: SpeechLMModel, task: str) -> None:
        self.tokenizers = require_tokenizers(model)
        self.model, self.layout, self.task = model, model.layout, task
        layout = model.layout
        self._frames = [special_frame(layout.sos_eos_id, layout), special_frame(layout.task_id(task), layout)]
        self._session = Session(model)
        self.turns: list[Turn] = []

    @property
    def frames_TS(self) -> np.ndarray:
        """int64 ``[T, S]``: the whole dialogue so far, undelayed."""
        return np.concatenate(self._frames)

    def say(
        self,
        text: str | None = None,
        *,
        audio: str | Path | np.ndarray | None = None,
        role: str = "user",
        modality: str | None = None,
        resample: bool = True,
    ) -> None:
        """Add a turn of text or of speech.

        Args:
            audio: a recording, or a float waveform at the tokenizers' rate.
            role: ``system``, ``user`` or ``assistant``.
            modality: default text_bpe for text, and for speech codec_ssl if the layout has it, else codec.
            resample: convert recordings of another rate and log it; False makes them an error.

        Raises:
            GenerationError: neither or both of text and audio, an unknown role or modality, or content that gives no
                tokens.
            AudioError, TokenizerError: content that cannot be used.
        """
        if (text is None) == (audio is None):
            raise GenerationError("a turn is text or audio: give one of them.")
        field = "text" if text is not None else "audio"
        if modality is None:
            speech = "codec_ssl" if self.layout.has("codec_ssl") else "codec"
            modality = "text_bpe" if text is not None else speech
        self._check(role, modality)
        name = f"turn {len(self.turns)}"
        request = GenerationRequest(name, self.task, text=text, audio=audio, resample=resample)
        with says_conversions():
            raw_TC = encode_field(request, field, modality, self.tokenizers)
        frames_TS = content_frames(raw_TC, modality, self.layout, name)
        self._frames += [
            *self._opening(role, modality),
            frames_TS,
            pad_frames(self.layout.max_delay, self.layout),
        ]
        self.turns.append(Turn(role, modality, frames_TS))

    def reply(
        self, modality: str = "text_bpe", settings: SamplingSettings | None = None, role: str = "assistant"
    ) -> GenerationResult:
        """Generate the next turn.

        Args:
            modality: of the reply: text_bpe, codec, codec_ssl or ssl.
            settings: lengths and sampling; no guidance, best_of, n_best or beam_size.

        Returns:
            The result, as of a request; one that failed adds no turn.

        Raises:
            GenerationError: an unknown role or modality, settings that do not apply, or the context cannot hold the
                dialogue and a reply.
        """
        settings = SamplingSettings() if settings is None else settings
        check_one_row(settings, "a chat's reply")
        self._check(role, modality)
        name = f"turn {len(self.turns)}"
        template = TaskTemplate(
            self.task,
            self.layout.task_id(self.task),
            "dialogue",
            (),
            (Entry("text" if modality == "text_bpe" else "audio", modality),),
        )
        opening = self._opening(role, modality)
        frames_PS = np.concatenate([*self._frames, *opening])
        num_content = sum(len(turn.frames_TS) for turn in self.turns)
        segments = plan_segments(settings, template, len(frames_PS), num_content, self.model, name)
        result, content_TS = self._session.generate(Prompt(name, template, frames_PS, 0, segments))
        if result.finished != "failed":
            end = special_frame(self.layout.sos_eos_id, self.layout)
            self._frames += [*opening, content_TS, end, pad_frames(self.layout.max_delay, self.layout)]
            self.turns.append(Turn(role, modality, content_TS, result))
        return result

    def _check(self, role: str, modality: str) -> None:
        if role not in ROLES:
            raise GenerationError(f"role must be one of {', '.join(ROLES)}; got {role!r}.")
        known = [name for name in MODALITIES if self.layout.has(name)]
        if modality not in known:
            raise GenerationError(
                f"modality must be one that the model has: {', '.join(known)}; got {modality!r}."
            )

    def _opening(self, role: str, modality: str) -> list[np.ndarray]:
        ids = (self.layout.special_id(role), self.layout.marker_id(modality))
        return [special_frame(token_id, self.layout) for token_id in ids]
