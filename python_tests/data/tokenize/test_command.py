"""Tokenizing: the folder that comes out, restarts, parts, and everything that can be wrong with the input."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechlm_ext.data.loader import PackLoader
from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.tokenize import shards as tokenize_module
from speechlm_ext.data.tokenize.command import run_tokenize
from speechlm_ext.data.tokenize.settings import CodecFit, SSLFit, TextFit, TokenizeConfig
from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.data.tokens.index import INDEX
from speechlm_ext.errors import (
    AudioError,
    ConfigError,
    LayoutMismatchError,
    ManifestError,
    ShardError,
    StorageError,
    TokenizerError,
)
from speechlm_ext.tokenizers import RVQKMeansCodec, TokenizerSet

RATE = 16000
WORDS = ["one", "two", "three", "four", "five", "six"]
Make = Callable[..., TokenizeConfig]


def sound(i: int, seconds: float = 0.3) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(i).normal(0, 0.05, len(t))
    return (0.3 * np.sin(2 * np.pi * (150 + 40 * i) * t) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short recordings with text, two speakers, and a tokenizer folder fitted on them."""
    folder = tmp_path_factory.mktemp("corpus")
    rows: list[dict[str, Any]] = []
    for i in range(10):
        soundfile.write(folder / f"u{i}.wav", sound(i), RATE)
        text = f"{WORDS[i % 6]} {WORDS[i % 5]}"
        rows.append({"id": f"u{i}", "audio": f"u{i}.wav", "text": text, "speaker": f"s{i % 2}", "lang": "en"})
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run_tokenize(config(folder, folder / "fitted", stage="fit"))
    return folder


def config(corpus: Path, output_dir: Path | str, **more: Any) -> TokenizeConfig:
    settings: dict[str, Any] = {
        "manifest": [str(corpus / "train.jsonl")],
        "output_dir": str(output_dir),
        "text": TextFit(vocab_size=300),
        "ssl": SSLFit(num_clusters=8),
        "codec": CodecFit(num_codebooks=2, codebook_size=8),
        "rows_per_shard": 3,
        "num_workers": 0,
    }
    return TokenizeConfig(**{**settings, **more})


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Make:
    """A config with the fitted tokenizers and ``out`` in a fresh folder; ``rows`` replaces the manifest."""

    def build(rows: list[dict[str, Any]] | bytes | None = None, **more: Any) -> TokenizeConfig:
        if rows is not None:
            path = tmp_path / "m.jsonl"
            raw = rows if isinstance(rows, bytes) else "".join(json.dumps(r) + "\n" for r in rows).encode()
            path.write_bytes(raw)
            more["manifest"] = [str(path)]
        fixed = {"output_dir": str(tmp_path / "out"), "tokenizers": str(corpus / "fitted" / "tokenizers")}
        return config(corpus, **{**fixed, **more})

    return build


def test_folder_holds_what_the_tokenizers_say(corpus: Path, tmp_path: Path) -> None:
    result = run_tokenize(config(corpus, tmp_path / "out"))
    assert (result.complete, result.num_utterances, result.num_rejected, result.shards_made) == (
        True,
        10,
        0,
        4,
    )
    folder = TokenFolder.open(tmp_path / "out", verify=True)
    tokenizers = TokenizerSet.load(tmp_path / "out" / "tokenizers")
    assert folder.layout == tokenizers.make_layout() == result.layout
    assert folder.ids == [f"u{i}" for i in range(10)]
    wave, _ = soundfile.read(corpus / "u7.wav", dtype="float32")
    got, both = folder.utterance(7), tokenizers.encode_codec_ssl(wave)
    assert np.array_equal(got["ssl"], both[:, :1]) and np.array_equal(got["codec"], both[:, 1:])
    assert tokenizers.text.decode(got["text_bpe"]) == got["text"] == "two three"
    assert (got["speaker"], got["lang"], got["dataset"], got["duration"]) == ("s1", "en", "train", 0.3)
    loader = PackLoader(PlanConfig(tasks=[TaskUse("codec_ssl_tts")], budget=512), folder)
    assert next(loader).ids.max() < folder.layout.vocab_size and loader.tokenizers is not None


def test_parts_make_the_same_shards(corpus: Path, make: Make, tmp_path: Path) -> None:
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    run_tokenize(make(output_dir=str(alone)))
    first = run_tokenize(make(output_dir=str(parts), shard="1/2"))
    assert not first.complete and first.shards_made == 2 and not (parts / INDEX).exists()
    with pytest.raises(ShardError, match="was not finished"):
        TokenFolder.open(parts)
    with pytest.raises(ShardError, match="2 of 4 shards are not there yet.*shard-00000.parquet"):
        run_tokenize(make(output_dir=str(parts), stage="merge"))
    assert run_tokenize(make(output_dir=str(parts), shard="0/2")).complete
    (parts / INDEX).unlink()
    assert run_tokenize(make(output_dir=str(parts), stage="merge")).complete
    assert (
        json.loads((parts / INDEX).read_text())["shards"] == json.loads((alone / INDEX).read_text())["shards"]
    )
    with pytest.raises(ConfigError, match="has no fitted tokenizers. Run once with --stage fit"):
        run_tokenize(config(corpus, tmp_path / "fresh", shard="0/2"))
    for bad in ("2/2", "x", "1"):
        with pytest.raises(ConfigError, match="shard must be i/N"):
            run_tokenize(make(shard=bad))


def test_processes_make_the_same_shards(
    corpus: Path, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the same counts of converted recordings, and the same error for a bad one, which is in the last shard."""
    bad_items(tmp_path)
    soundfile.write(tmp_path / "8000.wav", sound(1)[::2], 8000)
    rows = [{"id": f"u{i}", "audio": str(corpus / f"u{i}.wav"), "text": WORDS[i % 6]} for i in range(9)]
    rows[2]["audio"] = rows[5]["audio"] = "8000.wav"
    rows.append({"id": "bad7", "audio": "noise.wav"})
    said = []
    for num_workers in (0, 2):
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "speechlm_ext"),
            pytest.raises(AudioError, match="m.jsonl:10: utterance 'bad7'"),
        ):
            run_tokenize(make(rows, output_dir=str(tmp_path / str(num_workers)), num_workers=num_workers))
        said.append([r.message for r in caplog.records if "converted" in r.message])
    assert said[0] == said[1] and said[0][0].startswith("2 recordings converted from 8000 Hz to 16000 Hz")
    alone, many = (sorted((tmp_path / name).glob("shard-*")) for name in ("0", "2"))
    assert len(alone) == 3 and [p.read_bytes() for p in alone] == [p.read_bytes() for p in many]


def test_restart_makes_only_what_is_missing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    real = tokenize_module.write_shard
    stop_after = 2

    def counting(path: Path, *args: Any) -> None:
        if len(encoded) == stop_after:
            raise KeyboardInterrupt
        encoded.append(path.name)
        real(path, *args)

    monkeypatch.setattr(tokenize_module, "write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        run_tokenize(make())
    stop_after = 99
    result = run_tokenize(make())
    assert encoded == [f"shard-{n:05d}.parquet" for n in range(4)]
    assert (result.shards_made, result.shards_kept, result.num_utterances) == (2, 2, 10)
    assert run_tokenize(make()).shards_kept == 4
    # A truncated shard is made again; so is one whose rows changed, and only that.
    out = result.out
    whole = (out / "shard-00001.parquet").read_bytes()
    (out / "shard-00001.parquet").write_bytes(whole[:-9])
    with pytest.raises(ShardError, match="shard-00001.parquet has .* bytes"):
        TokenFolder.open(out)
    assert run_tokenize(make()).shards_made == 1
    assert (out / "shard-00001.parquet").read_bytes() == whole and len(
        TokenFolder.open(out, verify=True)
    ) == 10
    cfg = make()
    rows = [json.loads(line) for line in Path(cfg.manifest[0]).read_text().splitlines()]
    for row in rows:
        row["audio"] = str(Path(cfg.manifest[0]).parent / row["audio"])
        row["dataset"] = "train"
    rows[9]["text"] = "six"
    result = run_tokenize(make(rows))
    assert (result.shards_made, result.shards_kept) == (1, 3)
    assert TokenFolder.open(out).utterance(9)["text"] == "six"
    # A shorter manifest leaves no shard of the longer one behind; what is none of ours stays.
    (out / "shard-copy.parquet").write_bytes(b"")
    assert run_tokenize(make(rows[:4])).num_utterances == 4
    kept = ["shard-00000.parquet", "shard-00001.parquet", "shard-copy.parquet"]
    assert sorted(p.name for p in out.glob("shard-*")) == kept
    # Also where no shard is made again: the index has no rows of the longer manifest.
    assert run_tokenize(make(rows[:3])).shards_made == 0 and TokenFolder.open(out).ids == ["u0", "u1", "u2"]


def test_fitting_is_remembered_and_not_mixed(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_tokenize(config(corpus, out))
    assert run_tokenize(config(corpus, out)).layout == first.layout
    with pytest.raises(ConfigError, match="fitted on another manifest or with other settings.*--tokenizers"):
        run_tokenize(config(corpus, out, ssl=SSLFit(num_clusters=9)))
    with pytest.raises(LayoutMismatchError, match="already holds tokens of another layout \\(delays"):
        run_tokenize(config(corpus, out, delays=[0, 0, 0]))
    other = tmp_path / "other"
    run_tokenize(config(corpus, other, ssl=SSLFit(num_clusters=9), stage="fit"))
    with pytest.raises(LayoutMismatchError, match="was tokenized with other tokenizers than"):
        run_tokenize(config(corpus, out, tokenizers=str(other / "tokenizers")))
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        run_tokenize(config(corpus, tmp_path / "x", tokenizers=str(tmp_path)))


def test_unequal_rates_are_told_before_the_codec_is_fitted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And bad items that may be skipped do not hide it."""
    monkeypatch.setattr(RVQKMeansCodec, "fit", lambda *_, **__: pytest.fail("fitted"))
    with pytest.raises(
        TokenizerError, match="^codec_ssl needs equal rates, got ssl 16000 Hz at 25 frames/s and"
    ):
        run_tokenize(
            config(corpus, tmp_path / "o", ssl=SSLFit(num_clusters=8, frames_per_token=4), skip_bad=True)
        )
    assert not (tmp_path / "o").exists()


def test_modalities_can_be_left_out(corpus: Path, make: Make, tmp_path: Path) -> None:
    text = run_tokenize(config(corpus, tmp_path / "t", ssl=SSLFit(kind="none"), codec=CodecFit(kind="none")))
    assert text.layout.num_streams == 1 and not text.layout.has("ssl")
    assert TokenFolder.open(text.out).utterance(0)["codec"] is None
    codec = run_tokenize(config(corpus, tmp_path / "c", ssl=SSLFit(kind="none")))
    assert codec.layout.has("codec") and codec.layout.num_streams == 2
    assert TokenFolder.open(codec.out).utterance(0)["codec"].shape[1] == 2
    only_text = run_tokenize(make([{"id": "a", "text": "one"}]))
    assert TokenFolder.open(only_text.out).utterance(0)["ssl"] is None


def test_segments_of_a_long_recording(make: Make, corpus: Path, tmp_path: Path) -> None:
    long = np.concatenate([sound(1), sound(2)])
    soundfile.write(tmp_path / "long.wav", long, RATE, subtype="FLOAT")
    rows = [
        {"id": "a", "audio": "long.wav", "start": 0, "duration": 0.3},
        {"id": "b", "audio": "long.wav", "start": 0.3},
    ]
    folder = TokenFolder.open(run_tokenize(make(rows)).out)
    tokenizers = TokenizerSet.load(corpus / "fitted" / "tokenizers")
    for i, part in enumerate((long[: len(long) // 2], long[len(long) // 2 :])):
        assert np.array_equal(folder.utterance(i)["codec"], tokenizers.codec.encode(part))
        assert folder.utterance(i)["duration"] == pytest.approx(0.3)
    rows[1]["duration"] = 0.5
    with pytest.raises(
        AudioError, match="m.jsonl:2: utterance 'b': start 0.3 s with duration 0.5 s reaches past the end"
    ):
        run_tokenize(make(rows))


def test_user_tasks_become_part_of_the_layout(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(
        "- {name: repeat, id: 112, kind: repeat, conditions: [[audio, ssl]], targets: [[audio, ssl]]}"
    )
    result = run_tokenize(make(task_file=str(file)))
    assert result.layout.task_id("repeat") == 112
    cfg = PlanConfig([str(result.out)], [TaskUse("repeat")], budget=512, task_file=str(file))
    ids = next(PackLoader(cfg)).ids
    assert (ids[:, 0] == 112).sum() > 0


# ---- bad input ------------------------------------------------------------------------------------------------------
def bad_items(folder: Path) -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    (folder / "empty.wav").write_bytes(b"")
    (folder / "noise.wav").write_bytes(b"this is no sound at all" * 9)
    soundfile.write(folder / "none.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(folder / "nan.wav", np.full(4000, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "rate.wav", sound(1), 8000)
    soundfile.write(folder / "whole.wav", sound(1), RATE)
    (folder / "cut.wav").write_bytes((folder / "whole.wav").read_bytes()[: 44 + 4800])
    return {
        "empty": ({"audio": "empty.wav"}, AudioError, "empty.wav is empty"),
        "unreadable": ({"audio": "noise.wav"}, AudioError, "noise.wav cannot be read"),
        "no-samples": ({"audio": "none.wav"}, AudioError, "none.wav holds no samples"),
        "not-finite": ({"audio": "nan.wav"}, AudioError, "nan.wav: sample 0"),
        "wrong-rate": ({"audio": "rate.wav"}, AudioError, "rate.wav has sampling rate 8000 Hz but 16000 Hz"),
        "cut": ({"audio": "cut.wav"}, AudioError, "cut.wav promises 4800 samples but holds 2400"),
        "missing": ({"audio": "gone.wav"}, ManifestError, "gone.wav does not exist"),
    }


@pytest.mark.parametrize(
    "which", ["empty", "unreadable", "no-samples", "not-finite", "wrong-rate", "cut", "missing"]
)
def test_bad_audio_is_named_or_skipped(
    make: Make, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row, error, message = bad_items(tmp_path)[which]
    good = {"id": "good", "text": "one two"}
    rows = [good, {"id": "bad7", **row}, {"id": "last", "text": "two"}]
    with pytest.raises(error, match=f"m.jsonl:2: utterance 'bad7': .*{message}"):
        run_tokenize(make(rows, resample=False))
    assert not (tmp_path / "out" / INDEX).exists()
    result = run_tokenize(make(rows, resample=False, skip_bad=True))
    assert (result.num_utterances, result.num_rejected, result.complete) == (2, 1, True)
    assert TokenFolder.open(result.out).ids == ["good", "last"]
    (rejected,) = [json.loads(line) for line in (result.out / "rejected.jsonl").read_text().splitlines()]
    assert (rejected["id"], rejected["line"]) == ("bad7", 2) and message.split()[-1] in rejected["reason"]
    assert "1 bad items were left out, see" in capsys.readouterr().out
    # Without skip_bad the skipped item is an error again, although its shard is there.
    with pytest.raises(error, match="bad7"):
        run_tokenize(make(rows, resample=False))


def test_another_rate_is_converted_and_said_once(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soundfile.write(tmp_path / "8000.wav", sound(1)[::2], 8000)
    soundfile.write(tmp_path / "32000.wav", np.repeat(sound(1), 2), 32000)
    rows = [{"id": f"u{i}", "audio": f"{(8000, 32000)[i % 2]}.wav"} for i in range(5)]
    with caplog.at_level(logging.INFO, "speechlm_ext"):
        result = run_tokenize(make(rows))
    assert TokenFolder.open(result.out).utterance(0)["duration"] == pytest.approx(0.3, abs=0.01)
    said = [r.message for r in caplog.records if "converted" in r.message]
    assert said == [
        "3 recordings converted from 8000 Hz to 16000 Hz; above 4000 Hz there is nothing in them, unlike in others",
        "2 recordings converted from 32000 Hz to 16000 Hz",
    ]


def test_bad_audio_stops_or_is_left_out_of_the_fit(corpus: Path, tmp_path: Path) -> None:
    bad_items(tmp_path)
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(corpus / row["audio"])
    rows.append({"id": "bad7", "audio": "noise.wav", "text": "six"})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = config(corpus, tmp_path / "out", manifest=[str(tmp_path / "m.jsonl")])
    with pytest.raises(AudioError, match="m.jsonl:11: utterance 'bad7': .*noise.wav"):
        run_tokenize(cfg)
    assert run_tokenize(dataclasses.replace(cfg, skip_bad=True)).num_rejected == 1


def test_bad_manifests(make: Make, tmp_path: Path) -> None:
    good = json.dumps({"id": "a", "text": "one"}).encode() + b"\n"
    for raw, message in (
        (b"", "m.jsonl is empty"),
        (good + b'{"id": "b", "text": "\xff"}\n', "m.jsonl:2: not UTF-8"),
        (good + good, "m.jsonl:2: id 'a' is already in line 1"),
    ):
        with pytest.raises(ManifestError, match=message):
            run_tokenize(make(raw))
    result = run_tokenize(make(good + good + b'{"id": "b", "text": "\xff"}\n[]\n', skip_bad=True))
    assert (result.num_utterances, result.num_rejected) == (1, 3)
    lines = [json.loads(line)["line"] for line in (result.out / "rejected.jsonl").read_text().splitlines()]
    assert lines == [2, 3, 4]
    with pytest.raises(ManifestError, match="every one of 1 lines is bad"):
        run_tokenize(make(b"[]\n", skip_bad=True))
    cfg = make(good)
    other = tmp_path / "m2.jsonl"
    other.write_bytes(b'{"id": "a", "text": "two", "dataset": "m"}\n')
    with pytest.raises(ManifestError, match="m2.jsonl:1: id 'a' of data set 'm' is already at .*m.jsonl:1"):
        run_tokenize(dataclasses.replace(cfg, manifest=[*cfg.manifest, str(other)]))
    with pytest.raises(ConfigError, match="no manifest was given"):
        run_tokenize(dataclasses.replace(cfg, manifest=[]))


def test_full_disk_is_said_and_the_run_goes_on_later(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    real, calls = os.replace, []

    def full(src: Any, dst: Any) -> None:
        if str(dst).endswith(".parquet"):
            calls.append(dst)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(src, dst)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        StorageError, match="shard-00001.parquet: the disk is full .*run the same command again"
    ):
        run_tokenize(make())
    monkeypatch.setattr(os, "replace", real)
    result = run_tokenize(make())
    assert (result.shards_kept, result.shards_made, result.num_utterances) == (1, 3, 10)
    assert not list(result.out.glob(".shard*"))


def test_text_without_a_tokenizer(corpus: Path, make: Make, tmp_path: Path) -> None:
    only_codec = config(corpus, tmp_path / "c", text=TextFit(kind="none"), stage="fit")
    run_tokenize(only_codec)
    with pytest.raises(TokenizerError, match="m.jsonl:1: utterance 'a': no tokenizer fits it"):
        run_tokenize(make([{"id": "a", "text": "one"}], tokenizers=str(tmp_path / "c" / "tokenizers")))
