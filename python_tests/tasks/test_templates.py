"""Task templates: the shipped ones, a user's file, and what is refused in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from speechlm_ext.errors import ConfigError
from speechlm_ext.tasks import Entry, builtin_tasks, load_tasks, resolve_task


def test_shipped_templates() -> None:
    """Ids, conditions and targets as published; OpusLM's checkpoints use 80 to 83."""
    expected = {
        "textlm": (64, "", "text:text_bpe"),
        "audiolm": (65, "", "audio:codec"),
        "ssl_audiolm": (66, "", "audio:ssl"),
        "ssl_tts": (68, "text:text_bpe", "audio:ssl"),
        "bpe_tts": (69, "text:text_bpe speaker:spk", "audio:codec"),
        "asr": (70, "audio:codec", "text:text_bpe"),
        "ssl_asr": (71, "audio:ssl", "text:text_bpe"),
        "codec_ssl_asr": (80, "audio:codec_ssl", "text:text_bpe"),
        "codec_ssl_tts": (81, "text:text_bpe speaker:spk", "audio:codec_ssl"),
        "codec_ssl_plain_tts": (82, "text:text_bpe", "audio:codec_ssl"),
        "codec_ssl_audiolm": (83, "", "audio:codec_ssl"),
        "plain_tts": (98, "text:text_bpe", "audio:codec"),
    }

    def show(entries: tuple[Entry, ...]) -> str:
        return " ".join(f"{e.field}:{e.modality}" for e in entries)

    got = {t.name: (t.id, show(t.conditions), show(t.targets)) for t in builtin_tasks().values()}
    assert got == expected


def test_entries_are_in_sequence_order() -> None:
    entries = builtin_tasks()["codec_ssl_tts"].entries
    assert [(e.modality, is_target) for e, is_target in entries] == [
        ("text_bpe", False),
        ("spk", False),
        ("codec_ssl", True),
    ]


def test_user_file_is_added(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "- {name: st, id: 113, kind: st, conditions: [[audio, ssl]], targets: [[text, text_bpe], [audio, ssl]]}"
    )
    tasks = load_tasks(file)
    assert set(tasks) == {*builtin_tasks(), "st"} and tasks["st"].id == 113
    assert [e.modality for e in tasks["st"].targets] == ["text_bpe", "ssl"]
    assert "st" not in builtin_tasks() and load_tasks() == builtin_tasks()


ROW = "- {name: x, id: 112, kind: k, conditions: [], targets: [[text, text_bpe]]}"
BAD = {
    "not-yaml": ("[", "does not parse"),
    "not-a-list": ("a: 1", "expected a YAML list of task templates, got dict"),
    "empty": ("", "expected a YAML list of task templates, got NoneType"),
    "missing-key": (
        "- {name: x, id: 112, kind: k, targets: [[text, text_bpe]]}",
        "task 0: key 'conditions' is missing",
    ),
    "extra-key": (ROW.replace("}", ", more: 1}"), "task 0: unknown key 'more', expected name, id, kind"),
    "not-a-mapping": ("- 3", "task 0: the whole should be an object, got 3"),
    "unknown-field": (
        ROW.replace("[text,", "[video,"),
        "task 0: a task's condition or target must have .*'video'",
    ),
    "unknown-modality": (
        ROW.replace("text_bpe", "mel"),
        "task 0: a task's condition or target must have .*'mel'",
    ),
    "no-target": (ROW.replace("[[text, text_bpe]]", "[]"), "'x' has no target"),
    "id-of-ours": (ROW.replace("112", "80"), "'x' has id 80; expected one of 112 to 127"),
    "id-too-high": (ROW.replace("112", "128"), "has id 128"),
    "twice": (f"{ROW}\n{ROW}", "occurs twice"),
    "id-twice": (f"{ROW}\n{ROW.replace('name: x', 'name: y')}", "name 'y' or id 112 occurs twice"),
    "shipped-name": (ROW.replace("name: x", "name: textlm"), "'textlm' is a shipped task"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD.keys())
def test_bad_user_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"mine.yaml.*{message}"):
        load_tasks(file)


def test_more_malformed_rows_are_errors_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text in (
        ROW.replace("conditions: []", "conditions: null"),
        ROW.replace("conditions: []", "conditions: 3"),
        ROW.replace("id: 112", "id: [1]"),
        ROW.replace("id: 112", "id: '112'"),
        ROW.replace("name: x", "name: [1]"),
        ROW.replace("name: x", "name: 3"),
        ROW.replace("[text, text_bpe]", "[[text], text_bpe]"),
        ROW.replace("[text, text_bpe]", "[text, {a: 1}]"),
        ROW.replace("id: 112", "id: true"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match="mine.yaml"):
            load_tasks(file)


def test_unreadable_user_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: cannot be read"):
        load_tasks(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"- {name: \xe9}")
    with pytest.raises(ConfigError, match="latin.yaml: cannot be read as UTF-8"):
        load_tasks(tmp_path / "latin.yaml")


def test_resolve_by_name_or_kind() -> None:
    tasks = builtin_tasks()
    trained = [tasks["codec_ssl_asr"], tasks["codec_ssl_tts"], tasks["codec_ssl_plain_tts"], tasks["textlm"]]
    assert resolve_task("asr", trained).name == "codec_ssl_asr"
    assert resolve_task("codec_ssl_tts", trained).id == 81
    with pytest.raises(
        ConfigError, match="'tts' names several trained tasks. Trained tasks: .*codec_ssl_plain_tts"
    ):
        resolve_task("tts", trained)
    with pytest.raises(ConfigError, match="'audiolm' is not one that the model was trained for"):
        resolve_task("audiolm", trained)
