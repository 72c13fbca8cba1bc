"""The results folder: every result keeps its own sound, and what is done is found again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from speechlm_ext.audio.files import read_audio
from speechlm_ext.generation import GenerationRequest
from speechlm_ext.generation.requests.request import GenerationResult
from speechlm_ext.generation.requests.results_folder import ResultsFolder, fingerprint
from speechlm_ext.utils.names import id_of

IDS = ["a", "a/2", "a.2", "a@2", "a_2", "A", "../b", "b", "con", "ü", "x" * 300, "x" * 299 + "y"]


def spoken(name: str, value: float, **more) -> GenerationResult:
    return GenerationResult(
        name, "tts", "eos", wav=np.full(160, value, np.float32), sample_rate=16000, **more
    )


def test_every_result_keeps_its_own_sound(tmp_path):
    folder = ResultsFolder(tmp_path, "model", "0" * 64)
    requests = [GenerationRequest(i, "tts", text="one") for i in IDS]
    levels = {}
    for number, request in enumerate(requests):
        levels[request.id] = [(3 * number + k + 1) / 64 for k in range(3)]
        first, *others = (spoken(request.id, level) for level in levels[request.id])
        folder.add(request, replace(first, alternatives=tuple(others)))
    rows = [json.loads(line) for line in folder.close(requests).read_text().split("\n") if line]
    folder.release()
    found = {}
    for row in rows:
        paths = [row["audio"], *(one["audio"] for one in row["alternatives"])]
        found[row["id"]] = [float(read_audio(tmp_path / path)[0][80]) for path in paths]
        if len(row["id"]) < 100:
            names = [id_of(path.removeprefix("wav/"), ".wav") for path in paths]
            assert names == [(row["id"], k) for k in (1, 2, 3)]
    assert found == levels
    assert len({p.name.lower() for p in (tmp_path / "wav").iterdir()}) == 3 * len(IDS)
    again = ResultsFolder(tmp_path, "model", "0" * 64)
    assert all(again.is_done(request) for request in requests)
    again.release()


def test_an_array_is_known_by_its_samples_not_its_bytes():
    wave = np.array([1, 2, 200, 4], np.uint8)
    same = GenerationRequest("a", "asr", audio=wave)
    others = [
        replace(same, audio=wave.view(np.int8)),
        replace(same, audio=wave.view(np.int16)),
        replace(same, audio=wave.view(">i2")),
        replace(same, audio_rate=8000),
    ]
    marks = [fingerprint(r, {"sha256": "0"}) for r in (same, *others)]
    assert marks[0] == fingerprint(replace(same, audio=wave.copy()), {"sha256": "0"})
    assert len(set(marks)) == 5


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_results_from_before_conversion_was_the_default_are_still_done(tmp_path, served, asked):
    request = GenerationRequest("a", "asr", text="one")
    folder = ResultsFolder(tmp_path, "model", "0" * 64)
    folder.add(replace(request, resample=served), spoken("a", 0.5))
    folder.release()
    folder = ResultsFolder(tmp_path, "model", "0" * 64)
    # What was served without conversion needed none; what was converted may now be refused.
    assert folder.is_done(replace(request, resample=asked)) == (asked or not served)
    folder.release()
