"""Helpers for the settings of all verbs: old names, one value in place of a list, options without effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from speechlm_ext.errors import ConfigError

Value = TypeVar("Value")


def take_old_name(settings: Any, old: str, new: str, needed: str | None = None) -> None:
    """Move a value from the field ``old`` to ``new``; for ``__post_init__`` of frozen settings.

    Raises :class:`ConfigError`: both are set and differ, or neither is but the setting, described by ``needed``, is
    required.
    """
    value = getattr(settings, old)
    if value is None:
        if needed and not getattr(settings, new):
            raise ConfigError(f"{new} is needed: {needed}.")
        return
    other = getattr(settings, new)
    if other and other != value:
        raise ConfigError(
            f"{new} is {str(other)!r} but {old}, its old name, {str(value)!r}; give only {new}."
        )
    object.__setattr__(settings, new, value)
    object.__setattr__(settings, old, None)


def as_list(value: list[Value] | Value) -> list[Value]:
    """One value or a list of them as a list."""
    return value if isinstance(value, list) else [value]


def refuse_options(settings: Any, names: Sequence[str], purpose: str) -> None:
    """Raise :class:`ConfigError` if a setting is changed that would have no effect.

    ``purpose`` says what they are for and what to do, e.g. ``"for recordings; leave it out"``.
    """
    defaults = {field.name: field.default for field in fields(settings)}
    given = [f"--{name}" for name in names if getattr(settings, name) != defaults[name]]
    if given:
        raise ConfigError(f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} {purpose}.")


def check_positive(settings: object, *names: str) -> None:
    """Raise :class:`ConfigError` for the first of these attributes that is below 1."""
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise ConfigError(f"{type(settings).__name__}: {name} must be at least 1, got {value}.")
