"""Checking JSON against the shape that its reader expects; errors about a damaged or edited file name the key.

A shape is a type hint (``int``, ``float``, ``str``, ``bool``, ``X | None``, ``Literal``, ``list[X]``,
``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``, ``Any``), a :class:`Range`, :class:`SHA256`, a list ``[shape]`` of
any length, a dataclass, or a dict of shapes: an object of exactly these keys, where a key that ends in ``?`` may be
missing and ``"..."`` allows any others. A dataclass is an object of its fields; those with a default may be
missing.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.utils.files.json_text import read_json

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """A number in [``low``, ``high``]; an integer if ``kind`` is int."""

    kind: type
    low: float
    high: float


class SHA256:
    """64 hex digits."""


#: A count, size or position in a file.
SIZE = Range(int, 0, 2**53)
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def check_shape(value: Any, shape: Any, where: str = "") -> None:
    """Compare JSON data with a shape; ``where`` is its path inside the file.

    Raises ``ValueError`` with the first difference: path of the key, expected shape, and value.
    """
    if shape is Any:
        return
    if isinstance(shape, Mapping) or is_dataclass(shape) and isinstance(shape, type):
        _check_object(value, shape, where)
    elif shape is SHA256:
        if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
            raise _unexpected(where, "a sha256 of 64 hex digits", value)
    elif isinstance(shape, list):
        _check_list(value, list[shape[0]], where)  # type: ignore[valid-type]
    elif isinstance(shape, Range):
        check_shape(value, shape.kind, where)
        if not shape.low <= value <= shape.high:
            words = f"{_WORDS[shape.kind]} from {shape.low:g} to {shape.high:g}"
            raise _unexpected(where, words, value)
    elif get_origin(shape) in (Union, types.UnionType):
        _check_union(value, get_args(shape), where)
    elif get_origin(shape) is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in get_args(shape)):
            raise _unexpected(where, f"one of {get_args(shape)}", value)
    elif (get_origin(shape) or shape) in (list, tuple):
        _check_list(value, shape, where)
    elif (get_origin(shape) or shape) is dict:
        if not isinstance(value, dict):
            raise _unexpected(where, "an object", value)
        inner = (get_args(shape) or (str, Any))[1]
        for key, one in value.items():
            check_shape(one, inner, _join(where, key))
    else:
        _check_plain(value, shape, where)


def read_shaped(path: str | Path, shape: Any, error: type[SpeechLMError], hint: str) -> Any:
    """Read a JSON file of a known shape; ``hint`` is the remedy for a damaged file.

    Raises:
        FileNotFoundError: the file is missing; the caller says what that means.
        SpeechLMError: of class ``error``: unreadable, not strict JSON, or of another shape; it names file and key.
    """
    value = read_json(path, error, hint)
    try:
        check_shape(value, shape)
    except ValueError as problem:
        raise error(f"{path} is damaged: {problem}; {hint}") from None
    return value


def build(cls: Callable[..., T], value: Any, where: str = "") -> T:
    """Check the shape of an object and make a dataclass of it, nested ones too. Raises ``ValueError``."""
    check_shape(value, cls, where)
    return _build(cls, value)


def _build(shape: Any, value: Any) -> Any:
    if is_dataclass(shape) and isinstance(shape, type):
        hints = _hints(shape)
        return shape(**{key: _build(hints[key], one) for key, one in value.items()})
    if get_origin(shape) in (Union, types.UnionType) and value is not None:
        inner = next((s for s in get_args(shape) if is_dataclass(s)), None)
        return value if inner is None else _build(inner, value)
    if get_origin(shape) is tuple:
        kinds = get_args(shape)
        pairs = [(kinds[0], v) for v in value] if kinds[-1] is ... else zip(kinds, value, strict=True)
        return tuple(_build(kind, one) for kind, one in pairs)
    if get_origin(shape) is list:
        return [_build(get_args(shape)[0], one) for one in value]
    return value


@lru_cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _check_object(value: Any, shape: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise _unexpected(where, "an object", value)
    if isinstance(shape, Mapping):
        inner = {key.removesuffix("?"): one for key, one in shape.items()}
        needed = [key for key in shape if key != "..." and not key.endswith("?")]
    else:
        hints = _hints(shape)
        inner = {f.name: hints[f.name] for f in fields(shape)}
        needed = [f.name for f in fields(shape) if f.default is MISSING and f.default_factory is MISSING]
    for key in needed:
        if key not in value:
            raise ValueError(f"key {_join(where, key)!r} is missing")
    for key, one in value.items():
        if key not in inner and "..." not in inner:
            raise ValueError(f"unknown key {_join(where, key)[:80]!r}, expected {', '.join(inner)}")
        check_shape(one, inner.get(key, Any), _join(where, key))


def _check_union(value: Any, shapes: tuple[Any, ...], where: str) -> None:
    if value is None and type(None) in shapes:
        return
    problems = []
    for shape in shapes:
        if shape is not type(None):
            try:
                return check_shape(value, shape, where)
            except ValueError as problem:
                problems.append(problem)
    raise problems[-1]


def _check_list(value: Any, shape: Any, where: str) -> None:
    if not isinstance(value, list):
        raise _unexpected(where, "a list", value)
    kinds = get_args(shape) or (Any,)
    if get_origin(shape) is tuple and kinds[-1] is not ...:
        if len(value) != len(kinds):
            raise _unexpected(where, f"a list of {len(kinds)}", value)
    else:
        kinds = (kinds[0],) * len(value)
    for number, (one, kind) in enumerate(zip(value, kinds, strict=True)):
        check_shape(one, kind, _join(where, number))


def _check_plain(value: Any, kind: Any, where: str) -> None:
    ok = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        ok = is_number and abs(value) <= sys.float_info.max  # false for NaN, too
    if not ok:
        raise _unexpected(where, _WORDS.get(kind, str(kind)), value)
    if kind is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _unexpected(where, "a text without lone surrogates", value) from None


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _unexpected(where: str, expected: str, value: Any) -> ValueError:
    shown = ascii(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ValueError(f"{where or 'the whole'} should be {expected}, got {shown}")
