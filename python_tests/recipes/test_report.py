"""The report: every section is there, the file needs nothing from outside, and user text cannot become markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from python_tests.assets import demo_module, recordings, waves
from speechlm_ext.audio.files import write_wav
from speechlm_ext.evaluation.evaluate import SCORES
from speechlm_ext.evaluation.records import Record, write_records
from speechlm_ext.evaluation.scores import score_records
from speechlm_ext.evaluation.text.word_errors import align
from speechlm_ext.utils.files.io import atomic_write_json

media = demo_module("media")

SECTIONS = (
    "done scores curves listen transcripts continuations perplexity time method origin".split()  # ids, in order
)


class Page(HTMLParser):
    """Collects ids, addresses and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "poster", "data", "action"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What the stages of a small demo would have left, made by hand around real recordings."""
    source = [r for r in recordings()][:3]
    (tmp_path / "data").mkdir()
    rows = [
        {"id": r.id, "audio": str(r.path), "text": r.text, "lang": "en", "dataset": "numbers"} for r in source
    ]
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    about = {"composed": "Strings are composed.", "source": "a package", "licences": {"en": "CC-BY-SA-3.0"}}
    about["counts"] = [{"split": "train", "dataset": "numbers", "lang": "en", "count": 7, "minutes": 1.5}]
    atomic_write_json(tmp_path / "data" / "about.json", about)
    records, results = [], []
    for r, wave in zip(source, waves(), strict=False):
        audio = f"wav/tts.{r.id}.wav"
        write_wav(tmp_path / "generated" / audio, wave[::-1].copy(), 16000)
        write_wav(tmp_path / "eval" / "resynthesis" / f"{r.id}.wav", wave, 16000)
        common = {"lang": "en", "dataset": "numbers", "seconds": len(wave) / 16000}
        heard = {"tts": f"../generated/{audio}", "codec": f"resynthesis/{r.id}.wav", "recording": str(r.path)}
        records += [Record(r.id, k, r.text, r.text, audio=a, **common) for k, a in heard.items()]
        records.append(Record(r.id, "asr", r.text, r.text + " <b>extra</b>", finished="eos", **common))
        request = {"text": "<i>the</i>", "lang": "en"}
        results.append({"id": f"textlm.{r.id}", "text": "<i>the</i> end", "audio": None, "request": request})
        results.append({"id": f"audiolm.{r.id}", "text": None, "audio": audio, "request": {"text": None}})
    write_records(tmp_path / "eval" / "records.jsonl", records)
    (tmp_path / "generated" / "results.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in results), "utf-8"
    )
    judge = {
        "model": "whisper-base",
        "source": "wheels",
        "window_s": 10.0,
        "compute_type": "int8",
        "version": "v",
    }
    ppl = {"textlm": {"text": {"ppl": 12.5, "nll": 1.0, "count": 4}}}
    ppl["codec_ssl_audiolm"] = {
        k: {"ppl": p, "nll": 1.0, "count": 9} for k, p in (("audio", 40.0), ("ssl", 20.0))
    }
    scores = {"errors": score_records(records), "perplexity": ppl, "judge": judge}
    atomic_write_json(tmp_path / "eval" / SCORES, scores)
    log = [
        {
            "step": s,
            "seconds": s * 2.0,
            "loss": 5 / s,
            "lr": 1e-3,
            "packs_consumed": s,
            "positions_per_second": 100,
        }
        | {
            "stream_loss": {"ssl": 5 / s, "codec0": 4 / s},
            "stream_accuracy": {"ssl": 0.1 * s, "codec0": 0.05 * s},
        }
        for s in range(1, 9)
    ]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log), "utf-8")
    return tmp_path


STATE = {"train": {"seconds": 90.0, "commit": "abc123"}, "evaluate": {"seconds": 30.0, "commit": "abc123"}}


def test_demo_report_has_every_part_and_stands_alone(out: Path):
    metrics = demo_module("report").write(out, False, STATE)
    text = (out / "report.html").read_text("utf-8")
    page = Page(text)
    assert not page.open, "every element is closed"
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert not outside
    assert "@import" not in text and "url(" not in text and "<script" not in text
    # Three examples with three players each, and three audio continuations with two.
    assert page.tags.count("audio") == 3 * 3 + 3 * 2
    assert page.tags.count("img") == 2 + 15
    for words in ("Strings are composed.", "CC-BY-SA-3.0", "goal missed", "whisper-base", "abc123", "12.5"):
        assert words in page.text, words
    # Raw text of models is shown, never interpreted.
    assert "<i>the</i>" in page.text and "i" not in page.tags
    assert metrics["asr_wer"] > 0.05 and metrics["tts_wer"] == 0.0


def test_metrics_have_the_promised_keys(out: Path):
    demo_module("report").write(out, False, STATE)
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    keys = {"asr_wer", "tts_wer", "codec_wer", "textlm_ppl", "audiolm_ppl", "seconds", "commit"}
    assert keys <= set(metrics)
    assert metrics["textlm_ppl"] == 12.5 and metrics["audiolm_ppl"] == 40.0
    assert metrics["seconds"] == {"train": 90.0, "evaluate": 30.0} and metrics["commit"] == "abc123"
    words = sum(len(r.text.split()) for r in recordings()[:3])
    # "<b>extra</b>" is three extra words in each of three transcripts: b, extra, b.
    assert metrics["asr_wer"] == pytest.approx(9 / words)


def test_skipped_scores_are_null_with_a_reason(out: Path):
    path = out / "eval" / SCORES
    scores = json.loads(path.read_text("utf-8"))
    scores["judge"] = {"skipped": "no weights for the judge"}
    for kind in ("tts", "codec", "recording"):
        scores["errors"][kind] |= {"groups": {}, "skipped": {"no weights for the judge": 3}}
    atomic_write_json(path, scores)
    metrics = demo_module("report").write(out, False, STATE)
    assert metrics["tts_wer"] is None and metrics["skipped"]["tts_wer"] == "no weights for the judge"
    assert "no weights for the judge" in Page((out / "report.html").read_text("utf-8")).text


def test_report_of_own_recordings_and_of_nothing(tmp_path: Path):
    (tmp_path / "data").mkdir()
    atomic_write_json(tmp_path / "data" / "about.json", {"own": "my-voices", "how": "two are held out"})
    metrics = demo_module("report").write(tmp_path, True, {})
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "my-voices" in text and "spoken numbers" not in text and "composed data" in text
    assert metrics["asr_wer"] is None and metrics["goals"] == {}


def test_flac_holds_the_wave_and_spectrogram_shows_the_tone():
    import io

    tone = (0.5 * np.sin(2 * np.pi * 2000 * np.arange(8000) / 16000)).astype(np.float32)
    read, rate = soundfile.read(io.BytesIO(media.flac_bytes(tone, 16000)), dtype="float32")
    assert rate == 16000 and np.abs(read - tone).max() < 2**-15
    from matplotlib.image import imread

    picture = imread(io.BytesIO(media.spectrogram_png(tone, 16000)))[:, 20, :3].sum(axis=1)
    # 2 kHz lies a quarter of the way up a picture of 0 to 8 kHz.
    assert abs(1 - picture.argmax() / len(picture) - 0.25) < 0.02


def test_marked_words_show_each_kind_of_error():
    parts = demo_module("page").environment().get_template("parts.html").module

    def marked_words(reference: str, hypothesis: str) -> str:
        return str(parts.marked_words(align(reference, hypothesis)))

    html = marked_words("one two three", "one too three four")
    assert '<span class="substitute" title="instead of two">too <s>two</s></span>' in html
    assert '<span class="insert">four</span>' in html
    assert 'class="delete">three' in marked_words("one two three", "one two")
    assert "nothing" in marked_words("", "")
    assert "&lt;b&gt;" in str(parts.marked_words([("equal", "<b>", "<b>")])), "text cannot become markup"


def test_curves_draw_one_line_per_stream():
    log = [
        {"step": s, "seconds": s, "stream_loss": {"ssl": 1.0 / s, "codec0": 2.0 / s}} for s in range(1, 20)
    ]
    svg = media.curves_svg(log, "stream_loss", "loss", {"ssl": "text and ssl"}).decode()
    assert len(re.findall(r'id="line2d_\d+"', svg)) > 2 and "#d9534f" in svg
    assert svg == media.curves_svg(log, "stream_loss", "loss", {"ssl": "text and ssl"}).decode()


def test_own_data_is_split_once_and_for_all(tmp_path: Path):
    own = demo_module("own_data")
    source = recordings()[0]
    rows = [{"id": f"u{i}", "audio": str(source.path), "text": f"t {i}"} for i in range(40)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    own.prepare_own(tmp_path, tmp_path / "out")
    own.prepare_own(tmp_path, tmp_path / "again")
    splits = {}
    for split in ("train", "test"):
        lines = (tmp_path / "out" / f"{split}.jsonl").read_text("utf-8")
        assert lines == (tmp_path / "again" / f"{split}.jsonl").read_text("utf-8")
        splits[split] = {json.loads(line)["id"] for line in lines.splitlines()}
    assert len(splits["test"]) == 2 and len(splits["train"]) == 38 and not splits["test"] & splits["train"]
    from speechlm_ext.errors import SpeechLMError

    with pytest.raises(SpeechLMError, match="manifest.jsonl"):
        own.prepare_own(tmp_path / "none", tmp_path / "x")
