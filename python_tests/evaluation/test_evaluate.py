"""From results to records to scores, with and without an ASR scorer, and scoring stored records again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from python_tests.assets import recordings
from speechlm_ext.audio.files import read_audio, write_wav
from speechlm_ext.data.manifest import Utterance
from speechlm_ext.errors import AudioError, ConfigError, SpeechLMError, StorageError
from speechlm_ext.evaluation import transcribe
from speechlm_ext.evaluation.asr import scorer as scorer_module
from speechlm_ext.evaluation.asr.weights import AsrUnavailable
from speechlm_ext.evaluation.collect import read_utterance
from speechlm_ext.evaluation.evaluate import EvaluateConfig, run_evaluate
from speechlm_ext.evaluation.records import RecordError, read_records
from speechlm_ext.evaluation.scores import rate, score_records


def result(identity: str, **changes) -> dict:
    """A line of ``results.jsonl``."""
    request = {"text": None, "audio": None, "lang": "en"} | changes.pop("request", {})
    row = {
        "id": identity,
        "task": "asr",
        "finished": "eos",
        "modality": "text_bpe",
        "text": None,
        "audio": None,
    }
    row |= {
        "settings": {"greedy": True},
        "model": {"path": "m", "sha256": "0"},
        "error": None,
        "request": request,
    }
    return row | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three utterances, transcripts of two, speech for one, a failed item and a continuation."""
    source = recordings()[0]
    manifest = [
        {"id": "a", "audio": str(source.path), "text": "one two three", "lang": "en", "dataset": "numbers"},
        {"id": "b", "audio": str(source.path), "text": "four five", "lang": "en", "dataset": "numbers"},
        {"id": "c", "audio": str(source.path), "text": "uno dos", "lang": "es", "dataset": "numbers"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in manifest), "utf-8")
    write_wav(tmp_path / "wav" / "tts.a.wav", np.sin(np.arange(8000) / 20).astype(np.float32), 16000)
    speech = {"modality": "codec_ssl", "task": "codec_ssl_plain_tts"}
    rows = [
        result("asr.a", text="1 2 4", request={"audio": "a.wav"}),
        result("b", finished="failed", modality=None, error="x", request={"audio": "b.wav"}),
        result("asr.c", text="uno dos", request={"audio": "c.wav", "lang": "es"}),
        result("tts.a", audio="wav/tts.a.wav", request={"text": "one two three"}, **speech),
        result("tts.b", finished="failed", **(speech | {"modality": None}), request={"text": "four five"}),
        result("textlm.a", text="one two two", task="textlm", request={"text": "one"}),
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return tmp_path


def config(folder: Path, **changes) -> EvaluateConfig:
    values = {
        "output_dir": folder / "eval",
        "results": [folder / "results.jsonl"],
        "manifest": [folder / "test.jsonl"],
    }
    return EvaluateConfig(**(values | changes))


def test_scores_without_a_judge_are_skipped_with_the_reason(folder: Path):
    assert run_evaluate(config(folder, judge="none")) == 0
    scores = json.loads((folder / "eval" / "scores.json").read_text("utf-8"))
    # "1 2 4" has one error in three words; the failed item loses both of its words; Spanish is right.
    assert rate(scores["errors"], "asr", "numbers/en") == pytest.approx(3 / 5)
    assert rate(scores["errors"], "asr", "all/es") == 0.0
    assert rate(scores["errors"], "asr") == pytest.approx(3 / 7)
    assert scores["errors"]["recording"]["skipped"] == {"the judge was switched off": 2}
    assert rate(scores["errors"], "recording") is None
    # Speech that was never made cannot be saved by a missing judge: its words are errors.
    assert rate(scores["errors"], "tts") == 1.0
    assert {r.kind for r in read_records(folder / "eval")} == {"asr", "tts", "recording"}


class FakeScorer:
    """Gives one transcript for every clip."""

    def describe(self):
        return {"model": "fake"}

    def language(self, tag):
        return tag

    def transcribe(self, waves, langs, sample_rate):
        assert sample_rate == 16000 and len(waves) == len(langs)
        return ["One, two, three." for _ in waves]


def test_a_part_beyond_the_end_of_its_recording_is_refused(folder: Path):
    """It would be scored as silence, or as less than its text."""
    source = recordings()[0].path
    utterance = Utterance(
        "b", audio=source, text="four five", start=0.5, duration=999.0, manifest="m.jsonl", line=2
    )
    with pytest.raises(AudioError, match=r"m.jsonl:2: utterance 'b': .* reaches past the end"):
        read_utterance(utterance, 16000)
    part = read_utterance(replace(utterance, duration=0.25), 16000)
    np.testing.assert_array_equal(part, read_audio(source, 16000)[0][8000:12000])


def test_speech_and_recordings_are_transcribed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scorer_module, "load_asr_scorer", lambda *a, **k: FakeScorer())
    run_evaluate(config(folder))
    records = {(r.kind, r.id): r for r in read_records(folder / "eval")}
    spoken = records["tts", "a"]
    assert spoken.hypothesis == "One, two, three." and spoken.judge == {"model": "fake"}
    assert (folder / "eval" / str(spoken.audio)).is_file() and spoken.seconds == 0.5
    assert spoken.ids == {"file": "../results.jsonl", "id": "tts.a"}
    scores = json.loads((folder / "eval" / "scores.json").read_text("utf-8"))["errors"]
    assert rate(scores, "tts", "all") == pytest.approx(2 / 5)
    # The recording of "b" is transcribed as three wrong words: two substitutions and an insertion.
    assert rate(scores, "recording", "all") == pytest.approx(3 / 5)


def test_records_are_scored_again_alone(folder: Path, capsys: pytest.CaptureFixture):
    run_evaluate(config(folder, judge="none"))
    before = score_records(read_records(folder / "eval"))
    path = folder / "eval" / "records.jsonl"
    lines = path.read_text("utf-8").splitlines()
    changed = json.loads(lines[0]) | {"hypothesis": "one two three"}
    path.write_text("\n".join([json.dumps(changed), *lines[1:]]), "utf-8")
    run_evaluate(EvaluateConfig(records=folder / "eval", output_dir=folder / "again"))
    after = json.loads((folder / "again" / "scores.json").read_text("utf-8"))["errors"]
    assert rate(before, "asr") == pytest.approx(3 / 7) and rate(after, "asr") == pytest.approx(2 / 7)
    assert "WER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "holds no lines"),
        ("{", "not JSON"),
        ('{"id": "a"}', "not a record"),
        ('{"id": "a", "kind": "mos", "reference": "", "hypothesis": ""}', "kind must be"),
        ('{"id": "a", "kind": "asr", "reference": "x", "hypothesis": null}', "neither a hypothesis"),
        (
            '{"id": "a", "kind": "asr", "reference": "x", "reference": "y", "hypothesis": ""}',
            "key 'reference'",
        ),
        ('{"id": "a", "kind": "asr", "reference": null, "hypothesis": ""}', "'reference' must be a string"),
        ('{"id": "a", "kind": "asr", "reference": "x", "hypothesis": 5}', "'hypothesis' must be a string"),
        ('{"id": "a", "kind": "asr", "reference": "x", "hypothesis": "", "lang": null}', "'lang' must be"),
    ],
)
def test_bad_records_are_refused_by_line(tmp_path: Path, text: str, word: str):
    path = tmp_path / "records.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(RecordError, match=word):
        read_records(path)
    path.write_bytes(b"\xff")
    with pytest.raises(RecordError, match="UTF-8"):
        read_records(path)


def test_asr_result_without_reference_is_refused(folder: Path):
    (folder / "results.jsonl").write_text(
        json.dumps(result("zzz", text="x", request={"audio": "a"})), "utf-8"
    )
    with pytest.raises(RecordError, match="zzz"):
        run_evaluate(config(folder, judge="none"))


def test_a_folder_that_cannot_be_made_is_one_error(folder: Path):
    (folder / "file").write_text("")
    for name in ("file", "file/eval"):
        with pytest.raises(StorageError, match=f"could not write .*/{name}: "):
            run_evaluate(config(folder, output_dir=folder / name, judge="none"))


def test_settings_that_make_no_sense():
    for values in ({}, {"results": [Path("a")]}, {"tokens": ["t"], "output_dir": Path("o")}):
        with pytest.raises(ConfigError):
            EvaluateConfig(**values)
    with pytest.raises(ConfigError):
        EvaluateConfig(records=Path("r"), results=[Path("x")])


def test_without_an_asr_model_speech_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def unavailable(*args, **kwargs):
        raise AsrUnavailable("nothing there")

    monkeypatch.setattr(scorer_module, "load_asr_scorer", unavailable)
    assert run_evaluate(config(folder)) == 0
    scores = json.loads((folder / "eval" / "scores.json").read_text("utf-8"))
    assert scores["judge"] == {"skipped": "nothing there"}
    assert scores["errors"]["recording"]["skipped"] == {"nothing there": 2}


# ---- one item never loses the others --------------------------------------------------------------------------------
class PickyScorer(FakeScorer):
    """Knows English, and fails on clips of one length."""

    def __init__(self, bad_length: int):
        self.bad_length = bad_length
        self.clips: list[int] = []

    def language(self, tag):
        return scorer_module.AsrScorer.language(
            SimpleNamespace(languages=("en",), settings=SimpleNamespace(model="fake")), tag
        )

    def transcribe(self, waves, langs, sample_rate):
        self.clips.append(len(waves))
        assert all(self.language(lang) == "en" for lang in langs)
        if any(len(wave) == self.bad_length for wave in waves):
            raise IndexError("list index out of range")
        return super().transcribe(waves, langs, sample_rate)


def speech_folder(tmp_path: Path, items: list[tuple[str, str, int]]) -> Path:
    """Generated speech of so many samples for each ``(id, lang, samples)``; of 0 the file is damaged."""
    speech = {"modality": "codec_ssl", "task": "codec_ssl_plain_tts"}
    rows = []
    for name, lang, samples in items:
        path = tmp_path / "wav" / f"{name}.wav"
        write_wav(path, np.full(samples or 10, 0.1, np.float32), 16000)
        if not samples:
            path.write_bytes(b"RIFF")
        request = {"text": "one two three", "lang": lang}
        rows.append(result(name, audio=f"wav/{name}.wav", request=request, **speech))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    (tmp_path / "test.jsonl").write_text('{"id": "other", "text": "x"}\n', "utf-8")
    return tmp_path


def test_a_clip_that_fails_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    items = [("a", "en-US", 8000), ("b", "EN", 4000), ("c", "xx", 8000), ("d", "fra", 8000), ("e", "eng", 0)]
    scorer = PickyScorer(bad_length=4000)
    monkeypatch.setattr(scorer_module, "load_asr_scorer", lambda *a, **k: scorer)
    folder = speech_folder(tmp_path, items)
    assert run_evaluate(config(folder)) == 0
    records = {r.id: r for r in read_records(folder / "eval")}
    assert records["a"].hypothesis == "One, two, three." and records["a"].lang == "en-US"
    assert records["b"].skipped == "IndexError: list index out of range"
    assert "'xx'" in records["c"].skipped and "'fra'" in records["d"].skipped
    assert "e.wav" in records["e"].skipped
    scores = json.loads((folder / "eval" / "scores.json").read_text("utf-8"))["errors"]
    assert rate(scores, "tts") == 0.0 and scores["tts"]["num_skipped"] == 4
    assert sorted(scorer.clips) == [1, 1, 2]  # the two in English together, then each alone


def test_an_unreadable_recording_does_not_stop_resynthesis_or_cutting(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text("utf-8").splitlines()]
    (folder / "bad.wav").write_bytes(b"RIFF")
    rows[0] |= {"audio": "bad.wav", "start": 0.0, "duration": 0.5}
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    monkeypatch.setattr(scorer_module, "load_asr_scorer", lambda *a, **k: FakeScorer())
    run_evaluate(config(folder))
    records = {(r.kind, r.id): r for r in read_records(folder / "eval")}
    assert "bad.wav" in records["recording", "a"].skipped
    assert records["recording", "b"].hypothesis == records["tts", "a"].hypothesis == "One, two, three."


def test_scores_are_there_when_perplexity_fails(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from speechlm_ext.evaluation import evaluate as run

    def fails(cfg):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "_check_tokens", lambda cfg: None)
    monkeypatch.setattr(run, "_perplexity", fails)
    with pytest.raises(RuntimeError):
        run_evaluate(config(folder, judge="none", originals=False, model=folder, tokens=["t"]))
    scores = json.loads((folder / "eval" / "scores.json").read_text("utf-8"))
    assert rate(scores["errors"], "asr") == pytest.approx(3 / 7)


def test_tokens_and_language_are_checked_before_anything_is_transcribed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def too_late(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(scorer_module, "load_asr_scorer", too_late)
    with pytest.raises(ConfigError, match="'English'"):
        run_evaluate(config(folder, lang="English"))
    with pytest.raises(SpeechLMError, match="token_layout"):
        run_evaluate(config(folder, model=folder, tokens=[str(folder)]))


def test_one_id_for_two_utterances_is_refused(folder: Path):
    (folder / "more.jsonl").write_text('{"id": "c", "text": "something else"}\n', "utf-8")
    with pytest.raises(SpeechLMError, match=r"more.jsonl:1.*'c'.*test.jsonl:3"):
        run_evaluate(config(folder, manifest=[folder / "test.jsonl", folder / "more.jsonl"], judge="none"))
    run_evaluate(config(folder, manifest=[folder / "test.jsonl", folder / "test.jsonl"], judge="none"))


def test_an_item_that_cannot_be_scored_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from speechlm_ext.evaluation import scores as module

    def wer(refs, hyps, lang):
        if refs == ["uno dos"]:
            raise ZeroDivisionError("float division by zero")
        return plain(refs, hyps, lang)

    plain = module.wer
    run_evaluate(config(folder, judge="none"))
    monkeypatch.setattr(module, "wer", wer)
    scores = score_records(read_records(folder / "eval"))
    assert rate(scores, "asr") == pytest.approx(3 / 5) and scores["asr"]["num_skipped"] == 1
    assert "'c': float division by zero" in next(iter(scores["asr"]["skipped"]))


# ---- texts of every kind --------------------------------------------------------------------------------------------
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\ufeff"


def test_separators_inside_texts_survive_from_manifest_to_report(tmp_path: Path):
    from speechlm_ext.evaluation.text.word_errors import align

    text = "one" + "two".join(SEPARATORS) + "three"
    manifest = json.dumps({"id": "u", "audio": "u.wav", "text": text}, ensure_ascii=False).replace(
        "\x0b", "\\u000b"
    )
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + manifest.encode() + b"\n")
    write_wav(tmp_path / "u.wav", np.zeros(100, np.float32), 16000)
    rows = [
        result("u", text=text, request={"audio": "u.wav"}),
        result("asr.u", text="x\u2028y", request={"audio": "a"}),
    ]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "results.jsonl").write_bytes(lines.encode())
    run_evaluate(config(tmp_path, judge="none"))
    first, second = read_records(tmp_path / "eval")
    assert (first.reference, first.hypothesis, second.hypothesis) == (text, text, "x\u2028y")
    assert score_records([first])["asr"]["groups"]["all"]["wer"]["errors"] == 0
    assert {operation for operation, _, _ in align(first.reference, first.hypothesis)} == {"equal"}


def test_records_of_the_first_rule_are_scored_by_the_present_one(tmp_path: Path):
    line = (
        '{"id": "u", "kind": "asr", "reference": "की बात", "hypothesis": "का बात", "lang": "HI", "dataset": "d", '
        '"task": "asr", "audio": null, "ids": null, "finished": "eos", "settings": null, "model": null, "judge": null, '
        '"seconds": null, "skipped": null, "version": 1}\n'
    )
    (tmp_path / "records.jsonl").write_text(line, "utf-8")
    assert run_evaluate(EvaluateConfig(records=tmp_path, out=tmp_path / "again")) == 0
    scores = json.loads((tmp_path / "again" / "scores.json").read_text("utf-8"))["errors"]["asr"]
    assert scores["rule"] == "nfkc-lower-nopunct-digits:best-reading-v2"
    counts = scores["groups"]["d/hi"]
    assert (counts["wer"]["errors"], counts["wer"]["total"]) == (1, 2)
    assert (counts["cer"]["errors"], counts["cer"]["total"]) == (1, 6)


def test_sums_of_items_are_the_counts_of_the_set():
    from speechlm_ext.evaluation.text.word_errors import sum_counts, wer

    refs, hyps = ["one two", "three four five"], ["one too", "three five 6"]
    assert sum_counts([wer([r], [h]) for r, h in zip(refs, hyps, strict=True)]) == wer(refs, hyps)


def test_an_interrupted_evaluation_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted(FakeScorer):
        lengths: ClassVar[list[int]] = []
        stop_at = 3

        def transcribe(self, waves, langs, sample_rate):
            if len(self.lengths) == self.stop_at:
                raise KeyboardInterrupt
            self.lengths.append(len(waves[0]))
            return super().transcribe(waves, langs, sample_rate)

    monkeypatch.setattr(transcribe, "BATCH_SIZE", 1)
    scorer = Interrupted()
    monkeypatch.setattr(scorer_module, "load_asr_scorer", lambda *a, **k: scorer)
    items = [("a", "en", 1000), ("b", "en", 2000), ("c", "de", 3000), ("d", "en", 4000), ("e", "de", 1000)]
    folder = speech_folder(tmp_path, items)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(config(folder))
    partial = folder / "eval" / "judge.partial.jsonl"
    assert len(scorer.lengths) == 3
    partial.write_bytes(partial.read_bytes()[:-5])  # killed while writing
    scorer.stop_at = 99
    run_evaluate(config(folder))
    # Three were transcribed, the last of them is cut; the same samples in another language are another clip.
    first, rest = scorer.lengths[:3], scorer.lengths[3:]
    assert sorted([*first[:2], *rest]) == [1000, 1000, 2000, 3000, 4000]
    assert [r.hypothesis for r in read_records(folder / "eval")] == ["One, two, three."] * 5
    assert not partial.exists()
