"""The demo's data recipe: transcripts, composed strings, splits; on packages built here from the committed
recordings."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import soundfile

from python_tests.assets import demo_module, waves
from speechlm_ext.errors import ConfigError

number_words = demo_module("number_words")
prepare_data = demo_module("prepare_data")

av = pytest.importorskip("av")


@pytest.mark.parametrize(
    ("text", "lang", "expected"),
    [
        ("Press 1, then the Pound-key.", "en", "press one then the pound key"),
        ("It is 10 A.M. o’clock", "en", "it is ten am o'clock"),
        ("Marque 2 ahora, 50 o 16", "es", "marque dos ahora cincuenta o dieciséis"),
        ("appuyez sur 7 ou 80", "fr", "appuyez sur sept ou quatre vingts"),
        ("Нажмите 1, чтобы… решётку", "ru", "нажмите один чтобы решетку"),
        ("dial 1234", "en", None),
        ("3D audio", "en", "three d audio"),
        ("press * or #", "en", None),
        ("il tempo sar? esattamente", "it", None),
        ("Who is this? Press star.", "en", "who is this press star"),
        ("...", "en", None),
    ],
)
def test_normalize(text, lang, expected):
    assert number_words.normalize(text, lang) == expected


def test_number_words_are_unambiguous():
    """No composed word is a sequence of other composed words, so text and recordings determine each other."""
    for lang, words in number_words.RECORDED_WORDS.items():
        said = list(words.values())
        assert len(set(said)) == len(said) >= 22, lang
        assert not any("-" in word or " " in word for word in said)
    assert number_words.RECORDED_WORDS["es"]["10"] == "diez"


def write_g722(path, wave):
    pcm = np.zeros(-(-len(wave) // 320) * 320, np.int16)
    pcm[: len(wave)] = (wave * 32767).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        for start in range(0, len(pcm), 320):
            frame = av.AudioFrame.from_ndarray(pcm[None, start : start + 320], format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def debs(tmp_path_factory):
    """Ten small packages of the real ones' shape, with real recordings under the expected names."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    folder = tmp_path_factory.mktemp("debs")
    for lang in prepare_data.LANGUAGES:
        sound = folder / "tree" / f"asterisk-core-sounds-{lang}-g722"
        root = sound / "usr/share/asterisk/sounds" / f"{lang}_XX_f_Voice"
        lines = ["; a comment", ""]
        for index, (key, word) in enumerate(number_words.RECORDED_WORDS[lang].items()):
            write_g722(root / f"digits/{key}.g722", waves()[index % 4])
            lines.append(f"digits/{key}: {word}")
        for index in range(20):
            write_g722(root / f"prompt-{index:02d}.g722", waves()[4 + index % 8])
            lines.append(f"prompt-{index:02d}: Text Number {'abcdefghijklmnopqrst'[index]}.")
        for key, line in {
            "beep": "beep: [a tone]",
            "silence/1": "silence/1: (silence)",
            "dial": "dial: dial 1234",
            "twice": "twice: one text\ntwice: another text",
            "untold": "",
            "same-a": "same-a: the same words",
            "same-b": "same-b: the same words",
        }.items():
            write_g722(root / f"{key}.g722", waves()[0])
            lines.append(line)
        write_g722(root / "long.g722", np.tile(waves()[8], 8))
        lines.append("long: a very long one")
        document = (
            folder / "tree" / f"asterisk-core-sounds-{lang}" / f"usr/share/doc/asterisk-core-sounds-{lang}"
        )
        document.mkdir(parents=True)
        document.joinpath(f"core-sounds-{lang}.txt.gz").write_bytes(
            gzip.compress("\n".join(lines).encode("utf-8-sig"))
        )
        for package in (document.parents[3], sound):
            (package / "DEBIAN").mkdir()
            fields = {"Package": package.name, "Version": "1", "Architecture": "all", "Maintainer": "nobody"}
            control = "".join(
                f"{name}: {value}\n" for name, value in {**fields, "Description": "test"}.items()
            )
            (package / "DEBIAN/control").write_text(control)
            subprocess.run(
                ["dpkg-deb", "-b", "--root-owner-group", package, folder], check=True, capture_output=True
            )
    return folder


SMALL = prepare_data.DataConfig(
    train_single_words={"en": 1},
    train_numbers={"en": 12, "es": 4},
    test_numbers={"en": 5, "ru": 2},
    test_prompts=0.1,
)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_prepare(debs, tmp_path):
    manifests = prepare_data.prepare(tmp_path / "data", debs, SMALL)
    train, test = read(manifests.train), read(manifests.test)
    rows = train + test
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        info = soundfile.info(manifests.train.parent / row["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert abs(info.duration - row["duration"]) < 1e-3 and row["duration"] <= 15
        assert row["text"] == row["text"].lower() and set(row) == {
            "id", "audio", "text", "speaker", "lang", "duration", "dataset",
        }  # fmt: skip
    # Each English word stands alone once; the counts below are those of the strings.
    singles = [r for r in train if r["dataset"] == "numbers" and len(r["text"].split()) == 1]
    assert Counter(r["text"] for r in singles) == Counter(set(number_words.RECORDED_WORDS["en"].values()))
    train = [r for r in train if r not in singles]
    count = Counter(
        (split, r["dataset"], r["lang"]) for split, rs in (("train", train), ("test", test)) for r in rs
    )
    assert count["train", "numbers", "en"] == 12 and count["test", "numbers", "en"] == 5
    assert count["train", "numbers", "es"] == 4 and count["test", "numbers", "ru"] == 2
    assert count["train", "numbers", "ru"] == count["test", "numbers", "es"] == 0
    words = len(number_words.RECORDED_WORDS["en"])
    held_out = round(0.1 * (words + 22))
    assert count["test", "prompts", "en"] == held_out
    assert count["train", "prompts", "en"] == words + 22 - held_out  # 20 prompts and 2 of the same words

    texts = {
        split: [r["text"] for r in rs if r["dataset"] == "numbers"]
        for split, rs in (("a", train), ("b", test))
    }
    assert not set(texts["a"]) & set(texts["b"])
    vocabulary = {word for words in number_words.RECORDED_WORDS.values() for word in words.values()}
    # Longer strings are practised than are asked for.
    assert all(set(text.split()) <= vocabulary for text in texts["a"] + texts["b"])
    lengths = {split: {len(text.split()) for text in found} for split, found in texts.items()}
    assert lengths["a"] <= set(range(2, 8)) and max(lengths["a"]) > 5 and lengths["b"] <= set(range(2, 6))
    assert not any(
        "digits" in r["id"] or r["text"] == "the same words" for r in test if r["dataset"] == "prompts"
    )

    about = json.loads((tmp_path / "data/about.json").read_text())
    notes = "\n".join(about["notes"])
    assert "composed" in about["composed"] and about["licences"]["ru"] == "CC-BY-3.0"
    for expected in (
        "en: 1 recordings left out: two different transcripts (twice)",
        "no transcript",
        "longer than 15 s",
    ):
        assert expected in notes
    assert not (tmp_path / "data/unpacked").exists()


def test_prepare_is_deterministic_and_done_once(debs, tmp_path):
    first = prepare_data.prepare(tmp_path / "a", debs, SMALL)
    second = prepare_data.prepare(tmp_path / "b", debs, SMALL)
    assert first.train.read_bytes() == second.train.read_bytes()
    for row in read(first.train)[::7]:
        assert (tmp_path / "a" / row["audio"]).read_bytes() == (tmp_path / "b" / row["audio"]).read_bytes()
    stamp = first.train.stat().st_mtime_ns
    prepare_data.prepare(tmp_path / "a", tmp_path / "no-such-folder", SMALL)
    assert first.train.stat().st_mtime_ns == stamp


def test_compose_has_the_words_and_the_gaps():
    voice = prepare_data._Voice({"x": np.full(8000, 0.5, np.float32), "y": np.full(4000, -0.5, np.float32)})
    config = prepare_data.DataConfig(speed=0.0, gain_db=(0.0, 0.0), noise_db=(-90.0, -90.0), gap=(0.1, 0.1))
    wave = prepare_data.compose(("x", "y", "x"), voice, config, np.random.default_rng(0))
    sign = np.sign(np.where(np.abs(wave) > 0.25, wave, 0))
    runs = np.flatnonzero(np.diff(np.concatenate([[0], sign, [0]])))
    lengths = np.diff(runs)[::2]
    gaps = np.diff(runs)[1::2]
    np.testing.assert_allclose(lengths, [8000, 4000, 8000], atol=60)
    np.testing.assert_allclose(gaps, [1600, 1600], atol=60)


def test_trim_silence_keeps_the_word():
    word = waves()[0]
    padded = np.concatenate([np.zeros(8000, np.float32), word, np.zeros(12000, np.float32)])
    trimmed = prepare_data.trim_silence(padded)
    assert len(trimmed) <= len(word) + 800
    assert (trimmed**2).sum() > 0.99 * (word**2).sum()


def test_no_packages_names_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no asterisk-core-sounds-en_.*deb in"):
        prepare_data.prepare(tmp_path / "data", tmp_path, SMALL)
    monkeypatch.setattr(prepare_data.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="make demo DATA=folder"):
        prepare_data.prepare(tmp_path / "data", None, SMALL)


def test_failed_download_gives_apts_reason(tmp_path, monkeypatch):
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get is not installed")
    refused = subprocess.CompletedProcess([], 100, "", "W: a warning\nE: Unable to fetch some archives")
    monkeypatch.setattr(prepare_data.subprocess, "run", lambda *args, **kwargs: refused)
    with pytest.raises(ConfigError, match="Unable to fetch some archives.*make demo DATA=folder"):
        prepare_data.fetch_packages(tmp_path / "cache")
