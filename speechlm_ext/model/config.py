"""Configuration of a model, as written to a model folder's ``config.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from speechlm_ext import __version__
from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.tasks import TaskTemplate, check_tasks
from speechlm_ext.utils.files.json_shape import build, check_shape
from speechlm_ext.utils.files.json_text import read_json
from speechlm_ext.utils.files.run_folders import CONFIG_NAME
from speechlm_ext.utils.transformers_config import check_num_layers

MODEL_TYPE = "speechlm"
#: Releases before revision 2 left a backbone's sliding windows, attention sinks, soft caps, scales and biases out.
REVISION = 2


@dataclass(frozen=True)
class LossSettings:
    """How the multi-stream cross-entropy is computed; modality weights belong to the data."""

    scope: str = "own"
    """Ids over which each stream's softmax runs: ``full`` vocabulary, ``codec`` (all codebooks, as ESPnet-SpeechLM
    trains), each stream's ``own`` intervals, or ``modality``: as ``own``, but stream 0 of a frame of speech sees only
    speech and special ids and that of a text token only text and special ids, as in generation."""
    z_loss: float = 0.0
    """Weight of ``logsumexp²``, which keeps logits from drifting."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the scope."""
    softcap: float | None = None
    """Soft bound on the logits, ``softcap · tanh(logits / softcap)``."""
    recompute: bool = False
    """Compute the logits once more in the backward pass instead of holding the head's gradients since the forward."""

    def __post_init__(self) -> None:
        if self.scope not in ("full", "codec", "own", "modality"):
            raise ConfigError(f"loss.scope must be 'full', 'codec', 'own' or 'modality', got {self.scope!r}.")
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise ConfigError(
                f"loss.label_smoothing must be in [0, 1) and loss.z_loss >= 0, got {self.label_smoothing} and "
                f"{self.z_loss}."
            )


@dataclass(frozen=True)
class FrameTransformerConfig:
    """The small transformer inside a frame, which makes the stream layout multi-scale; see ``model/frame.py``."""

    hidden_size: int = 128
    """Its width."""
    num_layers: int = 2
    """Its layers."""
    num_heads: int = 4
    """Its attention heads."""
    ffn_size: int = 384
    """Width inside its feed-forward part."""

    def check(self) -> None:
        """Raise :class:`ConfigError` for invalid sizes.

        The settings that contain it call this: jsonargparse hides errors raised in an optional field's
        ``__post_init__``.
        """
        for name in ("hidden_size", "num_layers", "num_heads", "ffn_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"frame_transformer.{name} must be an integer of at least 1, got {value!r}."
                )
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"frame_transformer.hidden_size {self.hidden_size} must be a multiple of twice num_heads "
                f"{self.num_heads}: rotary positions turn pairs of a head's values."
            )


@dataclass(frozen=True)
class ModelConfig:
    """A SpeechLM without its weights and its token layout."""

    backbone: dict[str, Any]
    """The transformers configuration of the backbone, as its ``to_dict()`` gives it."""
    tasks: tuple[TaskTemplate, ...] = ()
    """The tasks that the model is trained for."""
    loss: LossSettings = field(default_factory=LossSettings)
    """Settings of the loss."""
    tie_head: bool = False
    """Whether the head shares the embedding table."""
    heads: Literal["shared", "separate"] = "shared"
    """``shared``: one output table for all streams. ``separate``: every stream has output rows of its own."""
    frame_transformer: FrameTransformerConfig | None = None
    """None: a frame's streams are predicted side by side (layouts ``delay`` and ``parallel``). Settings: one after the
    other, by a small transformer (layout ``multi-scale``), which needs delays of 0."""
    verify_backbone: bool = True
    """Whether the backbone must equal the pretrained model's own code; False: its numbers may differ."""
    revision: int = REVISION
    """Revision of the computation that the weights were trained on; see :data:`REVISION`."""

    def __post_init__(self) -> None:
        if self.heads not in ("shared", "separate"):
            raise ConfigError(f"heads must be 'shared' or 'separate', got {self.heads!r}.")
        if self.frame_transformer is not None:
            self.frame_transformer.check()
        check_tasks(self.tasks)
        if self.heads == "separate" and self.tie_head:
            raise ConfigError(
                "tie_head needs heads 'shared': separate heads have other rows than the embedding."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``config.json``."""
        return {"model_type": MODEL_TYPE, _RELEASE: __version__, **asdict(self)}

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """Read ``config.json`` of a model folder.

        Raises:
            CheckpointError: the folder or the file is missing, or does not describe a SpeechLM.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is not a model folder: it has no {CONFIG_NAME}. Expected a checkpoint such as "
                f"runs/NAME/checkpoints/latest, or an export of save_pretrained."
            )
        data = read_json(path, CheckpointError, _WAY_OUT)
        if not isinstance(data, dict) or data.pop("model_type", None) != MODEL_TYPE:
            raise CheckpointError(f"{path}: model_type is not {MODEL_TYPE!r}; this is another kind of model.")
        data = {**_OLDER, **data}
        try:
            check_shape(data.pop(_RELEASE, ""), str, _RELEASE)
            _require_all(data, cls)
            for name, part in (("loss", LossSettings), ("frame_transformer", FrameTransformerConfig)):
                if data[name] is not None:
                    check_shape(data[name], dict, name)
                    _require_all(data[name], part, f"{name}.")
            check_shape(data["backbone"], dict, "backbone")
            check_shape(data["backbone"].get("model_type"), str, "backbone.model_type")
            check_num_layers(data["backbone"])
            return build(cls, data)
        except ValueError as problem:
            raise CheckpointError(
                f"{path}: not a SpeechLM config: {str(problem).rstrip('.')}. {_WAY_OUT}"
            ) from None


#: Key of the release that wrote the file, for people: loading does not depend on it, and older files lack it.
_RELEASE = "speechlm_ext_version"
_WAY_OUT = "Copy the folder again, or use another checkpoint."
#: Values for the keys that ``config.json`` of older releases lacks.
_OLDER: dict[str, Any] = {"frame_transformer": None, "verify_backbone": True, "revision": 1}


def _require_all(data: dict[str, Any], kind: type, where: str = "") -> None:
    """Every setting must be in the file: a default in place of a lost one would make another model."""
    for one in fields(kind):
        if one.name not in data:
            raise ValueError(f"key {where + one.name!r} is missing")
