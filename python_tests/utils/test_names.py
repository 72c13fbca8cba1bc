"""File names from ids: unique where case does not count, safe on every system, and reversible."""

from __future__ import annotations

import itertools

import pytest

from speechlm_ext.utils.names import MAX_BYTES, file_name, id_of


@pytest.mark.parametrize(
    ("item_id", "number", "name"),
    [
        ("utt1", 1, "utt1.wav"),
        ("1089-134686-0000", 1, "1089-134686-0000.wav"),
        ("LJ001", 1, "LJ001+3.wav"),
        ("aB", 1, "aB+2.wav"),
        ("a", 2, "a@2.wav"),
        ("a/2", 1, "a%2F2.wav"),
        ("a@2", 1, "a%402.wav"),
        ("a.2", 1, "a.2.wav"),
        ("..", 1, "%2E%2E.wav"),
        (".a..b.", 1, "%2Ea%2E.b%2E.wav"),
        ("-rf", 1, "%2Drf.wav"),
        ("con", 1, "%63on.wav"),
        ("Com1.x", 2, "%43om1.x@2.wav"),
        ("a\0\n", 1, "a%00%0A.wav"),
        ("ü~%", 1, "%C3%BC%7E%25.wav"),
    ],
)
def test_names_are_these_and_turn_back(item_id: str, number: int, name: str) -> None:
    assert file_name(item_id, ".wav", number=number) == name
    assert id_of(name, ".wav") == (item_id, number)


def test_names_are_unique_where_case_does_not_count() -> None:
    seen: dict[str, tuple[str, int]] = {}
    for length in range(4):
        for letters in itertools.product("aAbn.-/%~+@2_é", repeat=length):
            for number in (1, 2, 22):
                item = ("".join(letters), number)
                name = file_name(item[0], ".wav", number=number)
                assert seen.setdefault(name.lower(), item) == item
                assert id_of(name, ".wav") == item
                assert name.isascii() and "/" not in name and ".." not in name and name[0] not in ".-"


@pytest.mark.parametrize("letter", ["x", "X", "語", "/", "."])
def test_long_names_are_cut_and_still_differ(letter: str) -> None:
    ids = [letter * n for n in (195, 196, 200, 300, 301, 5000)] + [letter * 300 + "a", letter * 300 + "A"]
    names = [file_name(i, ".wav", number=number) for i in ids for number in (1, 12)]
    assert len({name.lower() for name in names}) == len(names)
    assert max(len(name.encode()) for name in names) <= MAX_BYTES
    cut = [name for name in names if "~" in name]
    assert len(cut) >= 10 and all(id_of(name, ".wav") is None for name in cut)


@pytest.mark.parametrize(
    "name", ["a%2f2.wav", "LJ001.wav", "a@1.wav", "a@x.wav", "a b.wav", ".wav", "%FF.wav"]
)
def test_names_of_others_are_not_turned_back(name: str) -> None:
    assert id_of(name, ".wav") is None
