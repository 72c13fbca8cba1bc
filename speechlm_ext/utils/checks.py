"""Checks that settings share."""

from __future__ import annotations

from speechlm_ext.errors import ConfigError


def check_positive(settings: object, *names: str) -> None:
    """Require attributes that are numbers of at least 1.

    Args:
        settings: object with the attributes, e.g. a config in its ``__post_init__``.
        names: of the attributes.

    Raises:
        ConfigError: the first attribute below 1, by class and name.
    """
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise ConfigError(f"{type(settings).__name__}: {name} must be at least 1, got {value}.")
