"""The run's log: every line is whole or refused, and what cannot be written is said once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from speechlm_ext.errors import CheckpointError, StorageError, TrainingError
from speechlm_ext.training.log import RunLog, read_log

ROW = {"step": 1, "loss": 2.5, "stream_loss": {"ssl": 1.25, "codec0": 1.25}, "grad_norm": 0.75}


def test_lines_come_back_and_those_behind_the_checkpoint_go(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 4, True, False)
    for step in (1, 2, 3):
        log.write({**ROW, "step": step})
    log.close()
    assert read_log(tmp_path) == [{**ROW, "step": step} for step in (1, 2, 3)]
    log = RunLog(tmp_path, 2, 4, True, False)
    log.write({**ROW, "step": 3, "loss": 9.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(1, 2.5), (2, 2.5), (3, 9.0)]


def test_a_cut_last_line_is_left_out_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_log(tmp_path) == []
    # A line separator of Unicode is no end of a line.
    path.write_text('{"step": 1, "note": "a\u2028b"}\n\n{"step": 2}\n{"step": 3, "lo', "utf-8")
    assert read_log(tmp_path) == [{"step": 1, "note": "a\u2028b"}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}', "utf-8")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]
    for line in ('{"step": 2, "lo', '{"step": 2, "step": 3}', "[2]", '{"loss": 1}', '{"step": true}', "\0\0"):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n', "utf-8")
        with pytest.raises(CheckpointError, match=r"log\.jsonl:2 is"):
            read_log(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_logged(tmp_path: Path, value: float) -> None:
    log = RunLog(tmp_path, 0, 4, True, False)
    with pytest.raises(TrainingError, match="stream_loss codec0 is (nan|inf) at step 1"):
        log.write({**ROW, "stream_loss": {"ssl": 1.0, "codec0": value}})
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_tensorboard_shows_what_the_lines_say(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # the second resumes at step 2
        log = RunLog(tmp_path, first, 4, True, True)
        for step in steps:
            log.write({**ROW, "step": step, "loss": 10.0 * first + step})
        log.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "stream_loss/ssl", "stream_loss/codec0", "grad_norm"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_a_full_disk_under_tensorboard_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, 0, 4, True, True)
    assert log.board is not None
    log.board._file.close()
    log.board._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with caplog.at_level(logging.WARNING, "speechlm_ext"):
        log.write({**ROW, "step": 1})
        log.write({**ROW, "step": 2})
        log.close()
    assert [r.message for r in caplog.records] == [
        "TensorBoard's files cannot be written (No space left on device): training continues without them, "
        f"{tmp_path / 'log.jsonl'} has all numbers"
    ]
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]


def test_a_folder_that_tensorboard_cannot_use_does_not_end_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    log = RunLog(tmp_path, 0, 4, True, True)
    log.write(ROW)
    log.close()
    assert read_log(tmp_path) == [ROW]


def test_a_full_disk_under_the_log_is_one_error(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 4, True, False)
    assert log.file is not None
    log.file.close()
    log.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(StorageError, match=r"could not write .*log\.jsonl: the disk is full"):
        log.write(ROW)
    log.close()  # says nothing more
