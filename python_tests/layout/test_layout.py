"""TokenLayout: the published ids, save and load, hash, and the first difference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm_ext.errors import LayoutError, LayoutMismatchError
from speechlm_ext.layout import FILE_NAME, Interval, Stream, TokenLayout
from speechlm_ext.tasks import load_tasks

OPUS = TokenLayout.build(ssl=5000, codec=[1024] * 8, text=49152, g2p=70)
SMALL = TokenLayout.build(ssl=20, codec=[16] * 3, text=50, tokenizers={"ssl": "a" * 64, "text_bpe": "b" * 64})


def test_ids_are_those_of_the_published_checkpoints() -> None:
    assert OPUS.vocab_size == 62_670
    assert OPUS.interval("special") == (0, 256)
    assert OPUS.interval("ssl") == (256, 5256)
    assert OPUS.interval("codec") == (5256, 13448)
    assert [OPUS.interval(f"codec{k}") for k in (0, 7)] == [(5256, 6280), (12424, 13448)]
    assert OPUS.interval("text_bpe") == (13448, 62600)
    assert OPUS.interval("g2p") == (62600, 62670)
    assert TokenLayout.build(ssl=5000, codec=[1024] * 8, text=100_352, g2p=70).vocab_size == 113_870
    assert (OPUS.pad_id, OPUS.sos_eos_id, OPUS.special_id("unk")) == (0, 5, 1)
    assert [OPUS.special_id(r) for r in ("system", "user", "assistant")] == [8, 9, 10]
    markers = {"codec": 32, "ssl": 33, "codec_ssl": 34, "text_bpe": 35, "g2p": 36, "spk": 37}
    assert {m: OPUS.marker_id(m) for m in markers} == markers
    tasks = {
        "textlm": 64,
        "codec_ssl_asr": 80,
        "codec_ssl_tts": 81,
        "codec_ssl_plain_tts": 82,
        "codec_ssl_audiolm": 83,
    }
    assert {t: OPUS.task_id(t) for t in tasks} == tasks
    assert (OPUS.num_streams, OPUS.delays, OPUS.max_delay) == (9, tuple(range(9)), 8)


def test_content_ranges() -> None:
    assert OPUS.content_ranges("codec_ssl")[:2] == ((256, 5256), (5256, 6280))
    assert OPUS.content_ranges("spk") == OPUS.content_ranges("codec_ssl")
    assert OPUS.content_ranges("text_bpe") == ((13448, 62600),) + (None,) * 8
    codec = TokenLayout.build(codec=[16, 16], text=5)
    assert codec.content_ranges("codec") == ((256, 272), (272, 288)) == codec.content_ranges("spk")
    assert [codec.has(m) for m in ("codec", "codec_ssl", "ssl", "spk", "text_bpe")] == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert [OPUS.has(m) for m in ("codec", "codec_ssl", "ssl", "spk", "g2p")] == [
        False,
        True,
        True,
        True,
        True,
    ]
    text = TokenLayout.build(text=5)
    assert (text.num_streams, text.vocab_size, text.delays) == (1, 261, (0,))
    with pytest.raises(LayoutError, match="cannot hold 'codec' content; it has .*'ssl'"):
        OPUS.content_ranges("codec")


def test_scopes() -> None:
    assert SMALL.scopes("full") == [[(0, 374)]] * 4
    assert SMALL.scopes("codec") == [[(0, 374)]] + [[(276, 324)]] * 3
    assert SMALL.scopes("own") == [[(0, 276), (324, 374)], [(276, 292)], [(292, 308)], [(308, 324)]]
    assert TokenLayout.build(codec=[16, 16], text=5).scopes("own") == [[(0, 272), (288, 293)], [(272, 288)]]
    with pytest.raises(LayoutError, match="'full', 'codec', 'own' or 'modality', got 'mine'"):
        SMALL.scopes("mine")


@settings(max_examples=60, deadline=None)
@given(
    ssl=st.none() | st.integers(1, 5000),
    codec=st.lists(st.integers(1, 1024), max_size=9),
    text=st.none() | st.integers(1, 10**6),
    g2p=st.none() | st.integers(1, 100),
    data=st.data(),
)
def test_any_layout_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory,
    ssl: int | None,
    codec: list[int],
    text: int | None,
    g2p: int | None,
    data: st.DataObject,
) -> None:
    streams = max(1, len(codec) + (ssl is not None)) if codec else 1
    delays = data.draw(st.lists(st.integers(0, 12), min_size=streams, max_size=streams))
    layout = TokenLayout.build(
        ssl=ssl, codec=codec, text=text, g2p=g2p, delays=delays, tokenizers={"ssl": "f" * 64}
    )
    folder = tmp_path_factory.mktemp("layout")
    path = layout.save(folder)
    for where in (folder, path, str(path)):
        again = TokenLayout.load(where)
        assert again == layout and again.sha256 == layout.sha256
    # Every id belongs to exactly one interval.
    ends = [(i.start, i.end) for i in layout.intervals]
    assert ends[0][0] == 0 and all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
    assert ends[-1][1] == layout.vocab_size == 256 + (ssl or 0) + sum(codec) + (text or 0) + (g2p or 0)


def test_hash_follows_meaning_not_the_name_or_the_file_s_order(tmp_path: Path) -> None:
    renamed = dataclasses.replace(SMALL, name="other")
    assert renamed.sha256 == SMALL.sha256 and SMALL.first_difference(renamed) is None
    path = SMALL.save(tmp_path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items()))))
    assert TokenLayout.load(path) == SMALL
    assert str(SMALL) == f"ssl20+codec3x16+text50@{SMALL.sha256[:8]}"


CHANGES = {
    "streams": (TokenLayout.build(ssl=20, codec=[16] * 4, text=50), "number of streams: 4 against 5"),
    "delays": (
        TokenLayout.build(ssl=20, codec=[16] * 3, text=50, delays=[0, 1, 1, 1]),
        "delays: .*0, 1, 2, 3.* against",
    ),
    "vocabulary": (TokenLayout.build(ssl=20, codec=[16] * 3, text=51), "vocabulary size: 374 against 375"),
    "intervals": (
        TokenLayout.build(ssl=19, codec=[16] * 3, text=51),
        r"intervals: ssl \[256, 276\) against ssl \[256, 275\)",
    ),
    "special": (
        dataclasses.replace(SMALL, special=SMALL.special[:-1]),
        "special: 25 against 24; .* is in only one",
    ),
    "tokenizer": (
        TokenLayout.build(
            ssl=20, codec=[16] * 3, text=50, tokenizers={"ssl": "c" * 64, "text_bpe": "b" * 64}
        ),
        "tokenizers: ssl=aaaa.* against ssl=cccc",
    ),
}


@pytest.mark.parametrize("other, difference", CHANGES.values(), ids=CHANGES.keys())
def test_first_difference_is_named(other: TokenLayout, difference: str) -> None:
    with pytest.raises(
        LayoutMismatchError, match=f"checkpoint a has token layout .*, but shards b has .*{difference}"
    ):
        SMALL.require_same(other, "checkpoint a", "shards b")
    assert other.first_difference(SMALL) is not None and SMALL.sha256 != other.sha256
    SMALL.require_same(SMALL, "a", "b")


def test_carried_modalities_are_compared() -> None:
    moved = dataclasses.replace(SMALL, streams=(*SMALL.streams[:3], Stream("codec2", 3, ("codec1",))))
    assert (
        "streams: stream 'codec2' (delay 3, codec2) against stream 'codec2' (delay 3, codec1)"
        == SMALL.first_difference(moved)
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: d["intervals"][-1].update(end=375), "does not match its own sha256"),
        (lambda d: d["special"][0].__setitem__(1, 3), "does not match its own sha256"),
        (lambda d: d["streams"][1].update(delay=2), "does not match its own sha256"),
        (lambda d: d.update(version=2), "layout version 2 is not 1"),
        (lambda d: d.pop("streams"), "not a token layout: key 'streams' is missing"),
        (lambda d: d.pop("sha256"), "not a token layout: sha256 should be"),
        (lambda d: d["intervals"][1].update(start=300), "must start at 256"),
    ],
)
def test_tampered_file_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    path = SMALL.save(tmp_path)
    data = json.loads(path.read_text())
    damage(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(LayoutError, match=message):
        TokenLayout.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe"])
def test_what_is_no_layout_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(LayoutError, match="not a token layout"):
        TokenLayout.load(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "no" / FILE_NAME):
        with pytest.raises(LayoutError, match="no token_layout.json at"):
            TokenLayout.load(where)


def test_rejects_contradictions() -> None:
    with pytest.raises(LayoutError, match="expected 4 delays, one per stream, got 2"):
        TokenLayout.build(ssl=20, codec=[16] * 3, text=50, delays=[0, 1])
    with pytest.raises(LayoutError, match="needs a delay >= 0"):
        TokenLayout.build(ssl=20, codec=[16], delays=[0, -1])
    with pytest.raises(LayoutError, match="hold at least one id"):
        TokenLayout.build(text=0)
    special, ids = Interval("special", 0, 256), (("pad", 0), ("sos_eos", 5))
    with pytest.raises(LayoutError, match="unique and begin with 'special'"):
        TokenLayout("x", (Stream("t", 0, ("a",)),), (Interval("a", 0, 5),), ids)
    with pytest.raises(LayoutError, match="at least one stream"):
        TokenLayout("x", (), (special,), ids)
    with pytest.raises(LayoutError, match="unknown: \\['b'\\]"):
        TokenLayout("x", (Stream("t", 0, ("b",)),), (special,), ids)
    with pytest.raises(LayoutError, match="special ids must be unique"):
        TokenLayout("x", (Stream("t", 0, ("special",)),), (special,), (("pad", 0), ("sos_eos", 0)))
    with pytest.raises(LayoutError, match="has no special token 'task:none'"):
        SMALL.task_id("none")
    with pytest.raises(LayoutError, match="has no 'g2p'"):
        SMALL.interval("g2p")


def test_user_tasks_become_special_ids(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("- {name: mine, id: 120, kind: x, conditions: [], targets: [[text, text_bpe]]}")
    layout = TokenLayout.build(text=5, tasks=load_tasks(file))
    assert layout.task_id("mine") == 120
    assert "special: " in (TokenLayout.build(text=5).first_difference(layout) or "")
