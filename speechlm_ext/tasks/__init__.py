"""Task templates as data: the conditions and the targets of a task.

Each condition or target pairs a manifest field with a modality. The shipped templates are in ``templates.yaml``; a
user's file of the same form is added to them. Task ids are explicit in the data and never follow from an order of keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from speechlm_ext.errors import ConfigError
from speechlm_ext.utils.files.json_shape import check_shape
from speechlm_ext.utils.files.yaml_text import parse_yaml

FIELDS = ("text", "audio", "speaker")
MODALITIES = ("text_bpe", "ssl", "codec", "codec_ssl", "g2p", "spk")
SHIPPED_TASK_IDS = range(64, 112)
USER_TASK_IDS = range(112, 128)
TASK_IDS = range(64, 128)
#: Shape of a template in a file; the dataclass checks the other keys.
_PAIRS = list[tuple[str, str]]
_TEMPLATE = {"name": Any, "id": Any, "kind": Any, "conditions": _PAIRS, "targets": _PAIRS}


@dataclass(frozen=True)
class Entry:
    """One condition or target: a manifest ``field`` read as tokens of a ``modality``."""

    field: str
    modality: str

    def __post_init__(self) -> None:
        if self.field not in FIELDS or self.modality not in MODALITIES:
            raise ConfigError(
                f"a task's condition or target must have a field of {FIELDS} and a modality of {MODALITIES}, got "
                f"{self.field!r} and {self.modality!r}."
            )


@dataclass(frozen=True)
class TaskTemplate:
    """A task: ``conditions`` are given, ``targets`` are produced, in this order.

    Raises:
        ConfigError: a name or kind that is not a word, an id that is not an integer, or no target.
    """

    name: str
    id: int
    kind: str
    conditions: tuple[Entry, ...]
    targets: tuple[Entry, ...]

    def __post_init__(self) -> None:
        for name in ("name", "kind"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"a task's {name} must be a word, got {value!r}; quote numbers.")
        if isinstance(self.id, bool) or not isinstance(self.id, int):
            raise ConfigError(f"task {self.name!r}: id must be an integer, got {self.id!r}.")
        if not self.targets:
            raise ConfigError(f"task {self.name!r} has no target; a task must produce something.")

    @property
    def entries(self) -> tuple[tuple[Entry, bool], ...]:
        """All entries in sequence order, each with whether it is a target."""
        return tuple((e, False) for e in self.conditions) + tuple((e, True) for e in self.targets)


def parse_templates(text: str, where: str, allowed_ids: range) -> dict[str, TaskTemplate]:
    """Read templates from YAML text.

    Args:
        text: a YAML list of ``{name, id, kind, conditions, targets}``.
        where: name of the source, for messages.
        allowed_ids: task ids that this source may use.

    Raises:
        ConfigError: not such a list, an unknown field or modality, an id out of range or used twice.
    """
    try:
        rows = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise ConfigError(
            f"{where}: expected a YAML list of task templates, but it does not parse: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(rows, list):
        raise ConfigError(f"{where}: expected a YAML list of task templates, got {type(rows).__name__}.")
    tasks: list[TaskTemplate] = []
    for number, row in enumerate(rows):
        try:
            check_shape(row, _TEMPLATE)
            pairs = {key: tuple(Entry(*pair) for pair in row[key]) for key in ("conditions", "targets")}
            tasks.append(TaskTemplate(**{**row, **pairs}))
            check_tasks(tasks, allowed_ids)
        except ValueError as error:
            raise ConfigError(f"{where}: task {number}: {error}") from None
    return {task.name: task for task in tasks}


@lru_cache
def builtin_tasks() -> dict[str, TaskTemplate]:
    """The shipped templates by name."""
    text = resources.files(__package__).joinpath("templates.yaml").read_text("utf-8")
    return parse_templates(text, "templates.yaml", SHIPPED_TASK_IDS)


def load_tasks(user_file: str | Path | None = None) -> dict[str, TaskTemplate]:
    """Shipped templates plus those of ``user_file``.

    Raises:
        ConfigError: the file cannot be read, is malformed, or redefines a shipped task.
    """
    tasks = dict(builtin_tasks())
    if user_file is None:
        return tasks
    try:
        text = Path(user_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task file {user_file}: cannot be read as UTF-8 text ({error}).") from None
    for name, task in parse_templates(text, str(user_file), USER_TASK_IDS).items():
        if name in tasks:
            raise ConfigError(f"task file {user_file}: {name!r} is a shipped task; give yours another name.")
        tasks[name] = task
    return tasks


def check_tasks(tasks: Iterable[TaskTemplate], allowed_ids: range = TASK_IDS) -> None:
    """Check that tasks can be used together.

    Raises:
        ConfigError: a name or an id that occurs twice, or an id that is not one of ``allowed_ids``.
    """
    names: set[str] = set()
    ids: set[int] = set()
    for task in tasks:
        if task.id not in allowed_ids:
            raise ConfigError(
                f"task {task.name!r} has id {task.id}; expected one of {allowed_ids[0]} to {allowed_ids[-1]}."
            )
        if task.name in names or task.id in ids:
            raise ConfigError(f"task name {task.name!r} or id {task.id} occurs twice; give it another.")
        names.add(task.name)
        ids.add(task.id)


def resolve_task(name: str, trained: Iterable[TaskTemplate]) -> TaskTemplate:
    """Find the trained task of a name, or the only one of that kind.

    Raises:
        ConfigError: no trained task, or several, match.
    """
    trained = list(trained)
    exact = [t for t in trained if t.name == name]
    matches = exact or [t for t in trained if t.kind == name]
    if len(matches) != 1:
        known = ", ".join(f"{t.name} (kind {t.kind})" for t in trained) or "none"
        why = "is not one that the model was trained for" if not matches else "names several trained tasks"
        raise ConfigError(f"task {name!r} {why}. Trained tasks: {known}. Give one of these names.")
    return matches[0]
