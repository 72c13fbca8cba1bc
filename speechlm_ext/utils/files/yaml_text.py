"""Strict reading of YAML: a key that occurs twice in a mapping is an error, as in
:mod:`~speechlm_ext.utils.files.json_text`; with PyYAML alone the last one would silently win."""

from __future__ import annotations

from typing import Any

import yaml

#: The loader of jsonargparse: the one in C accepts some tabs that the one in Python refuses.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str) -> Any:
    """Parse one YAML text with PyYAML's safe loader.

    Raises:
        yaml.YAMLError: not YAML, or a key that occurs twice; the message has line and column.
    """
    check_unique_keys(text)
    return yaml.load(text, _LOADER)


def check_unique_keys(text: str) -> None:
    """Raise :class:`yaml.YAMLError` for a text that is not YAML or in which a key occurs twice in one mapping."""
    root = yaml.compose(text, Loader=_LOADER)
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
                if name in keys:
                    problem = f"key {key.value!r} occurs twice in one mapping; keep one of them"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                keys.add(name)
                todo += [key, value]
