"""The decoder's rows equal those of training, for any delays; masks, lengths and batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from python_tests.generation.tools import (
    ScriptedModel,
    decode,
    make_layout,
    make_prompt,
    random_content,
    shift,
    training_frames,
)
from speechlm_ext.generation.requests.request import SamplingSettings
from speechlm_ext.tasks import builtin_tasks

GREEDY = SamplingSettings(greedy=True)
LAYOUTS = [
    ("codec_ssl", (0, 1, 2, 3)),
    ("codec_ssl", (0, 0, 0, 0)),
    ("codec_ssl", (0, 1, 1, 1)),
    ("codec_ssl", (0, 5, 2, 0)),
    ("codec_ssl", (2, 3, 2, 4)),
    ("codec_ssl", (1, 0, 3, 1)),
    ("codec", (0, 1, 2)),
    ("codec", (0, 3, 1)),
    ("ssl", (0,)),
    ("ssl", (2,)),
]
TASKS = {
    "codec_ssl": [
        "textlm",
        "codec_ssl_asr",
        "codec_ssl_tts",
        "codec_ssl_plain_tts",
        "codec_ssl_audiolm",
        "ssl_audiolm",
    ],
    "codec": ["textlm", "asr", "bpe_tts", "plain_tts", "audiolm"],
    "ssl": ["textlm", "ssl_asr", "ssl_tts", "ssl_audiolm"],
}


def sample(layout, task, rng, num_target=6, num_condition=5):
    entries = builtin_tasks()[task].entries
    return [
        random_content(layout, entry.modality, num_target if is_target else num_condition, rng)
        for entry, is_target in entries
    ]


def strip_tail(rows, layout):
    """Rows up to the last one with a token."""
    return rows[: np.flatnonzero((rows != layout.pad_id).any(axis=1))[-1] + 1]


@pytest.mark.parametrize("kind, delays", LAYOUTS)
def test_forced_rows_equal_training_rows(kind, delays):
    """Every task, empty to long targets, with and without a given beginning, all in one batch."""
    layout, rng = make_layout(kind, delays), np.random.default_rng(3)
    prompts, teacher, expected = [], [], []
    for task, num_target, num_given in itertools.product(TASKS[kind], (0, 1, 2, 6), (0, 1, 2, 6)):
        contents = sample(layout, task, rng, num_given + num_target)
        if num_given and len(contents) > 1:
            continue
        given = contents[-1][:num_given] if num_given else None
        prompts.append(make_prompt(layout, task, contents[:-1], given))
        teacher.append(contents[-1][num_given:])
        expected.append((contents[-1], shift(training_frames(layout, task, contents), layout)))
    for one, (content, rows) in zip(decode(ScriptedModel(layout), prompts, teacher), expected, strict=True):
        np.testing.assert_array_equal(one.rows_RS, strip_tail(rows, layout))
        np.testing.assert_array_equal(one.content_TS, content)
        assert one.finished == "eos" and one.num_scored == 0


@pytest.mark.parametrize("kind, delays", LAYOUTS)
def test_free_rows_equal_training_rows_of_the_same_content(kind, delays):
    layout, rng = make_layout(kind, delays), np.random.default_rng(4)
    choices = (GREEDY, SamplingSettings(seed=5, top_k=5), SamplingSettings(top_p=0.7))
    prompts, samples = [], []
    for task, number, settings in itertools.product(TASKS[kind], range(4), choices):
        contents = sample(layout, task, rng)
        given = contents[-1][:number] if len(contents) == 1 else None
        prompts.append(make_prompt(layout, task, contents[:-1], given, settings, max_new=5 + number))
        samples.append((task, contents[:-1], given))
    decoded = decode(ScriptedModel(layout), prompts)
    for prompt, one, (task, conditions, given) in zip(prompts, decoded, samples, strict=True):
        frames = training_frames(layout, task, [*conditions, one.content_TS])
        rows = strip_tail(shift(frames, layout), layout)
        # A stream ahead of stream 0 cannot know of an end that stream 0 has not chosen yet.
        ahead = [s for s, d in enumerate(delays) if d < delays[0] and one.finished == "eos"]
        keep = [s for s in range(layout.num_streams) if s not in ahead]
        np.testing.assert_array_equal(one.rows_RS[:, keep], rows[:, keep])
        for s, ids in enumerate(layout.content_ranges(prompt.modality)):
            column = one.content_TS[:, s]
            if ids is None:
                assert (column == layout.pad_id).all()
            else:
                assert ((column >= ids[0]) & (column < ids[1])).all()
        if given is not None:
            np.testing.assert_array_equal(one.content_TS[: len(given)], given)
    assert {one.finished for one in decoded} == {"max_len", "eos"}


def test_end_of_segment_has_no_stray_row():
    layout = make_layout("codec", (0, 1, 2))
    prompt = make_prompt(layout, "audiolm", [], settings=GREEDY)
    P = len(prompt.frames_PS)
    model = ScriptedModel(layout, {(layout.sos_eos_id, P + 3): 100.0, (layout.sos_eos_id, P): 100.0})
    one = decode(model, [prompt])[0]
    real = one.rows_RS != layout.pad_id
    # min_len 1 keeps the end out of row P; it comes in row P + 3, and two rows of ramp-out follow.
    assert one.rows_RS[P + 3, 0] == layout.sos_eos_id
    np.testing.assert_array_equal(
        real[P:],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 1]],
    )
    assert one.finished == "eos" and len(one.content_TS) == 3


@pytest.mark.parametrize("task", ["codec_ssl_audiolm", "textlm", "ssl_audiolm"])
def test_min_and_max_length(task):
    layout = make_layout()
    eos = layout.sos_eos_id
    eager = ScriptedModel(layout, {(eos, row): 100.0 for row in range(40)})
    shy = ScriptedModel(layout, {(eos, row): -100.0 for row in range(40)})
    for least in (0, 1, 4):
        settings = SamplingSettings(greedy=True, min_len=least, max_len=9)
        one = decode(eager, [make_prompt(layout, task, [], settings=settings)])[0]
        assert (len(one.content_TS), one.finished) == (least, "eos")
        one = decode(shy, [make_prompt(layout, task, [], settings=settings)])[0]
        assert (len(one.content_TS), one.finished) == (9, "max_len")


def test_batch_equals_alone():
    layout, rng = make_layout(), np.random.default_rng(5)
    model = ScriptedModel(layout)
    prompts = []
    for number in range(14):
        task = TASKS["codec_ssl"][number % 6]
        contents = sample(layout, task, rng, num_condition=1 + number)
        settings = [
            GREEDY,
            SamplingSettings(seed=7),
            SamplingSettings(top_p=0.5, temperature=2.0, seed=number),
        ]
        given = contents[-1][: number // 2] if len(contents) == 1 else None
        prompts.append(
            make_prompt(
                layout, task, contents[:-1], given, settings[number % 3], f"r{number}", max_new=1 + 3 * number
            )
        )
    together = decode(model, prompts)
    for prompt, one in zip(prompts, together, strict=True):
        alone = decode(model, [prompt])[0]
        np.testing.assert_array_equal(one.rows_RS, alone.rows_RS)
        np.testing.assert_array_equal(one.content_TS, alone.content_TS)
        assert (one.finished, one.num_scored) == (alone.finished, alone.num_scored)
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-5)
    assert len({one.rows_RS.shape[0] for one in together}) > 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_logits_fail_their_request_only(value):
    layout, rng = make_layout(), np.random.default_rng(6)
    short = make_prompt(layout, "textlm", [], settings=GREEDY, name="short")
    long = make_prompt(
        layout,
        "codec_ssl_plain_tts",
        [random_content(layout, "text_bpe", 9, rng)],
        settings=GREEDY,
        name="long",
    )
    text_id = layout.interval("text_bpe")[0]
    model = ScriptedModel(layout, {(text_id, len(short.frames_PS) + 2): value})
    broken, fine = decode(model, [short, long])
    assert broken.finished == "failed" and "short" in broken.error and "not finite" in broken.error
    np.testing.assert_array_equal(fine.rows_RS, decode(ScriptedModel(layout), [long])[0].rows_RS)
