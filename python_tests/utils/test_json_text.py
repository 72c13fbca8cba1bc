"""The one JSON reader: strict where leniency loses data."""

from __future__ import annotations

import pytest

from speechlm_ext.errors import ConfigError, ManifestError, foreign_errors
from speechlm_ext.utils.files.io import atomic_write_json
from speechlm_ext.utils.files.json_text import json_line, parse_json, read_json, split_lines


def test_values_are_those_of_json():
    assert parse_json('{"a": [1, 2.5, null, true, "\\u2028"], "b": {"a": 1}}') == {
        "a": [1, 2.5, None, True, "\u2028"],
        "b": {"a": 1},
    }
    assert parse_json('{"a": "é"}'.encode()) == {"a": "é"}


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"x": {"b": 1, "b": 1}}', "key 'b' occurs twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at offset 7"),
        ("{", "Expecting property name"),
    ],
)
def test_what_would_lose_data_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_nan_is_taken_where_it_is_allowed():
    assert parse_json("[Infinity]", allow_nan=True) == [float("inf")]


def test_lines_end_at_line_feeds_only():
    text = "\ufeffone\u2028two\x85\r\n\n \nthree\x0bfour"
    assert [(n, raw.decode()) for n, raw in split_lines(text.encode())] == [
        (1, "one\u2028two\x85\r"),
        (4, "three\x0bfour"),
    ]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigError, match=r"a\.json is damaged: key 'a' occurs twice.*; copy it again\."):
        read_json(tmp_path / "a.json", ConfigError, "copy it again.")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json", ConfigError, "copy it again.")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path, ConfigError, "copy it again.")


def test_foreign_errors_become_ours():
    with (
        pytest.raises(ManifestError, match=r"m\.jsonl:3: broken \(RuntimeError\)\. Mend it\."),
        foreign_errors(ManifestError, "m.jsonl:3", "Mend it."),
    ):
        raise RuntimeError("\nbroken\nmore")
    with pytest.raises(ConfigError, match="^as it is$"), foreign_errors(ManifestError, "w", "h"):
        raise ConfigError("as it is")
    with pytest.raises(MemoryError), foreign_errors(ManifestError, "w", "h"):
        raise MemoryError


def test_lines_are_written_as_they_are_and_names_that_are_no_utf8_with_escapes(tmp_path):
    assert json_line({"text": "три\u2028one"}) == '{"text": "три\u2028one"}\n'
    value = {"audio": b"wav/\xff.wav".decode("utf-8", "surrogateescape"), "text": "три"}
    line = json_line(value)
    assert line.isascii() and parse_json(line) == value
    atomic_write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", ConfigError, "") == value
