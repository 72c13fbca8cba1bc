"""Files of JSON lines: a bad line has a place and stops no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from speechlm_ext.errors import ConfigError
from speechlm_ext.utils.files.json_text import read_json_lines


def test_every_line_has_its_place_and_its_own_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": NaN}\n\n[1]\n{"a": 1, "a": 2}\n{\n"\xff"\n')
    lines = read_json_lines(path, "file", ConfigError, all_utf8=False)
    assert [line.number for line in lines] == [1, 3, 4, 5, 6] and lines[1].where == f"{path}:3"
    assert list(lines[0].object()) == ["a"] and lines[1].value() == [1]
    reasons = ["expected a JSON object, got list", "occurs twice", "not JSON", "not UTF-8"]
    for line, reason in zip(lines[1:], reasons, strict=True):
        with pytest.raises(ValueError, match=reason):
            line.object()
    with pytest.raises(ConfigError, match=r"file .*a\.jsonl is not UTF-8 \(byte 36\); save it as UTF-8"):
        read_json_lines(path, "file", ConfigError)
    with pytest.raises(ConfigError, match="file .* cannot be read .*one JSON object per line"):
        read_json_lines(tmp_path, "file", ConfigError)
