"""JSON of a known shape: what fits is built, what does not is named by its key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from speechlm_ext.errors import ConfigError, KMeansError, file_errors
from speechlm_ext.utils.files.json_shape import SHA256, SIZE, Range, build, check_shape, read_shaped
from speechlm_ext.utils.files.json_text import parse_json


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    pair: tuple[str, int]
    kind: Literal["a", "b"] = "a"
    best: Part | None = None
    counts: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


DATA = {
    "parts": [{"name": "x", "weight": 2}, {"name": "y"}],
    "pair": ["p", 3],
    "best": {"name": "z", "weight": 0.5},
    "counts": {"k": 4},
    "names": ["n"],
}


def test_dataclasses_are_built() -> None:
    built = build(Whole, DATA)
    assert built == Whole((Part("x", 2), Part("y")), ("p", 3), "a", Part("z", 0.5), {"k": 4}, ["n"])
    assert build(Whole, {**DATA, "best": None}).best is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parts": None}, "parts should be a list, got None"),
        ({"parts": [{"weight": 1}]}, r"key 'parts\.0\.name' is missing"),
        ({"parts": [{"name": "x", "size": 1}]}, r"unknown key 'parts\.0\.size', expected name, weight"),
        ({"parts": [{"name": True}]}, r"parts\.0\.name should be a text, got True"),
        ({"parts": [{"name": "\ud800"}]}, r"parts\.0\.name should be a text without lone surrogates"),
        ({"parts": [{"name": "x", "weight": 10**400}]}, r"parts\.0\.weight should be a finite number"),
        ({"parts": [{"name": "x", "weight": float("nan")}]}, r"parts\.0\.weight should be a finite number"),
        ({"pair": ["p"]}, "pair should be a list of 2"),
        ({"pair": ["p", 3.0]}, r"pair\.1 should be a whole number, got 3\.0"),
        ({"pair": ["p", False]}, r"pair\.1 should be a whole number, got False"),
        ({"kind": "c"}, r"kind should be one of \('a', 'b'\), got 'c'"),
        ({"best": {}}, r"key 'best\.name' is missing"),
        ({"counts": {"k": "4"}}, r"counts\.k should be a whole number"),
        ({"names": "n"}, "names should be a list, got 'n'"),
    ],
)
def test_the_first_difference_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build(Whole, {**DATA, **change})


@pytest.mark.parametrize(
    "value, shape, message",
    [
        (-1, SIZE, "from 0 to"),
        (2**60, SIZE, "from 0 to"),
        (1.5, Range(int, 0, 9), "a whole number"),
        ("AB" * 32, SHA256, "64 hex digits"),
        ([{"a": 1}, {}], [{"a": int}], r"key '1\.a' is missing"),
        ({"b": 1}, {"a?": int}, "unknown key 'b'"),
        ({"a": "x", "b": 1}, {"a?": int, "...": Any}, "a should be a whole number"),
        ([], dict, "the whole should be an object"),
    ],
)
def test_shapes_without_a_class(value: Any, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shape(value, shape)


def test_shapes_that_fit() -> None:
    check_shape({"b": 1}, {"a?": int, "...": Any})
    check_shape(["0a" * 32, None], list[SHA256 | None])  # type: ignore[valid-type]
    check_shape([{"a": 1}], [{"a": SIZE}])


def test_a_file_is_named_with_its_key(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": "x"}')
    with pytest.raises(
        ConfigError, match=r"a\.json is damaged: a should be a whole number, got 'x'; mend it\."
    ):
        read_shaped(path, {"a": int}, ConfigError, "mend it.")
    with pytest.raises(FileNotFoundError):
        read_shaped(tmp_path / "b.json", {}, ConfigError, "mend it.")


def test_errors_of_a_files_content_name_the_file() -> None:
    with pytest.raises(KMeansError, match=r"^f\.json: no good: key words\. Mend it\.$"):
        with file_errors(KMeansError, "f.json", "no good", "Mend it."):
            raise ConfigError("key\nwords.")
    with pytest.raises(KMeansError, match=r"f\.json: no good: 5 \(KeyError\)\. Mend it\."):
        with file_errors(KMeansError, "f.json", "no good", "Mend it."):
            raise KeyError(5)
    with pytest.raises(ConfigError, match=r"^f\.json is empty$"):
        with file_errors(KMeansError, "f.json", "no good", "Mend it."):
            raise ConfigError("f.json is empty")


@pytest.mark.parametrize("text", ["1e999", "[-1e400]"])
def test_numbers_beyond_every_float_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="larger than any finite number"):
        parse_json(text)
    assert parse_json("1e999", allow_nan=True) == float("inf")
