"""Checkpoints on the disk: whatever moment a process is killed at, the run has a whole one, and the next save leaves no
litter. The processes are forks of this one, which holds a model and an optimizer without DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from python_tests.model.files.test_digests import make
from speechlm_ext import SpeechLM
from speechlm_ext.errors import CheckpointError, StorageError, TrainingError
from speechlm_ext.training import checkpoint as ckpt
from speechlm_ext.utils.files import checkpoint_folders
from speechlm_ext.utils.files.checkpoint_folders import (
    latest_checkpoint,
    list_checkpoints,
    recover,
    resolve_latest,
)
from speechlm_ext.utils.files.io import sha256_file
from speechlm_ext.utils.files.run_folders import find_model_folder


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if torch.distributed.is_initialized():  # by a run in an earlier test of this process
        yield
        return
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Run:
    """A model, its optimizer, and a folder of checkpoints."""

    def __init__(self, root: Path, keep: int = 1, tokenizers: bool = False) -> None:
        self.root, self.keep = root, keep
        model = make()
        self.model = model if tokenizers else SpeechLM(model.config, model.layout)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.engine: Any = SimpleNamespace(optimizer=optimizer)
        self.step_once()

    def step_once(self) -> None:
        for number, parameter in enumerate(self.model.parameters(), start=1):
            parameter.grad = torch.full_like(parameter, 1.0 / number)
        self.engine.optimizer.step()

    def save(self, step: int) -> Path:
        state = ckpt.TrainerState(step=step, packs_consumed=7 * step, plan="p")
        return ckpt.save_checkpoint(self.engine, self.model, state, self.root, self.keep)


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def whole(folder: Path) -> None:
    """Check that a checkpoint can be resumed from."""
    ckpt.verify_files(folder)
    state = ckpt.read_state(folder)
    assert state.packs_consumed == 7 * state.step and folder.name == f"step-{state.step:08d}"


def killed_at(number: int, do: Callable[[], Any]) -> bool:
    """Do it in a fork that ends, without any cleaning up, before the ``number``-th change of a folder; False when it
    makes fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def before(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"):
                count += 1
                if count == number:
                    os._exit(9)

        sys.addaudithook(before)
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", [3, 6])
def test_a_kill_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, exchange: bool
) -> None:
    """``keep`` is 1. Step 6 succeeds the run's only checkpoint; step 3 takes the place of the one of that very step."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill is not a power cut
    if not exchange:  # a file system that cannot swap two names
        monkeypatch.setattr(checkpoint_folders, "_exchange", lambda *_: False)
    run = Run(tmp_path / "first")
    old = digests(run.save(3))
    run.step_once()
    wanted = Run(tmp_path / "wanted")
    wanted.model, wanted.engine = run.model, run.engine
    new = digests(wanted.save(step))
    assert new["model.safetensors"] != old["model.safetensors"]
    number, seen = 1, set()
    while True:
        run.root = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", run.root, symlinks=True)
        was_killed = killed_at(number, lambda: run.save(step))
        if exchange or step == 6:  # even for one who only looks
            assert list_checkpoints(run.root)
        recover(run.root)
        found = list_checkpoints(run.root)
        for folder in found:
            whole(folder)
        assert found and digests(found[-1]) in (old, new)
        seen.add(digests(found[-1]) == new)
        assert (run.root / "latest").is_dir()
        if was_killed and number % 5:
            number += 1
            continue
        run.save(step)
        assert sorted(p.name for p in run.root.iterdir()) == ["latest", f"step-{step:08d}"]
        assert digests(run.root / "latest") == new
        if not was_killed:
            break
        number += 1
    assert number > 20 and seen == {True, False}


def test_all_of_a_checkpoint_is_flushed_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    named: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        if Path(target).name.startswith("step-"):
            inside = [p for p in Path(source).rglob("*")]
            assert len([p for p in inside if p.is_file()]) == 9
            assert {p.stat().st_ino for p in (*inside, Path(source))} <= flushed
            named.append(Path(target).name)
            flushed.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    run = Run(tmp_path / "run", tokenizers=True)
    save = run.model.tokenizers.save

    def save_more(folder: Path) -> None:
        save(folder)
        (folder / "ssl" / "more.bin").write_bytes(b"of a user's tokenizer, which does not flush")

    monkeypatch.setattr(run.model.tokenizers, "save", save_more)
    run.save(3)
    assert named == ["step-00000003"] and run.root.stat().st_ino in flushed


def test_rights_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = Run(tmp_path / "run", tokenizers=True)
        run.save(1)
        run.model.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    for path in [*run.root.rglob("*"), *(tmp_path / "model").rglob("*")]:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, where: str, value: float) -> None:
    run = Run(tmp_path / "run")
    good = run.save(3)
    before = digests(run.root)
    weight = run.model.head.weight
    tensor = weight if where == "weight" else run.engine.optimizer.state[weight][where]
    with torch.no_grad():
        tensor[1, 2] = value
    name = "head.weight" if where == "weight" else f"{where}.head.weight"
    told = rf"step 6: of the weights and moments, '{name}' \(1 of {weight.numel()} values, the first is {value}\)"
    with pytest.raises(TrainingError, match=told) as caught:
        run.save(6)
    assert f"The newest checkpoint with finite values is {good};" in str(caught.value)
    assert digests(run.root) == before


def test_the_message_names_a_checkpoint_that_is_finite(tmp_path: Path) -> None:
    """Where an older version saved others behind it, or where there is none."""
    run = Run(tmp_path / "run", keep=3)
    said = str(ckpt.diverged(run.root, 1, "x"))
    assert f"There is no checkpoint with finite values in {run.root}." in said
    good, bad = run.save(3), run.save(6)
    moments = load_file(bad / "optimizer.safetensors")
    moments["exp_avg.head.weight"][0, 0] = float("nan")
    save_file(moments, bad / "optimizer.safetensors")
    said = str(ckpt.diverged(run.root, 7, "x"))
    assert (
        f"is {good}; the same command resumes from it (delete step-00000006, which cannot be used)." in said
    )
    with pytest.raises(CheckpointError, match=r"'exp_avg.head.weight' .* is not finite.*--resume PATH"):
        ckpt.read_moments(run.model, bad)
    moments["exp_avg.head.weight"] = moments["exp_avg.head.weight"][:1].nan_to_num()
    save_file(moments, bad / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="another model: expected 'exp_avg.head.weight' of shape"):
        ckpt.read_moments(run.model, bad)


def test_a_full_disk_leaves_the_checkpoints_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    run.save(3)
    before, fsync = digests(run.root / "step-00000003"), os.fsync
    fails_at = calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    while True:
        fails_at, calls = fails_at + 1, 0
        try:
            run.save(6)
        except StorageError as error:
            assert "the disk is full" in str(error)
            assert digests(run.root / "step-00000003") == before
            for folder in list_checkpoints(run.root):
                whole(folder)
        else:
            break
        assert not [p for p in run.root.iterdir() if p.name.startswith(".incomplete")]
    assert fails_at > 20


def test_what_counts_as_a_checkpoint(tmp_path: Path) -> None:
    for name in (
        "step-00000003",
        "step-100000000",
        "step-00000020",
        "step-00000020-copy",
        "step-x",
        ".step-00000030",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "step-00000099").mkdir()  # no state
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-00000003",
        "step-00000020",
        "step-100000000",
    ]
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_going_back_does_not_remove_what_was_just_saved(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", keep=1)
    run.save(6)
    run.save(4)  # of a run that went on from an older checkpoint
    assert [p.name for p in list_checkpoints(run.root)] == ["step-00000004", "step-00000006"]
    run.save(5)
    assert [p.name for p in list_checkpoints(run.root)] == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("keep", [1, 2, 4, 5])
def test_as_many_are_kept_as_asked(tmp_path: Path, keep: int) -> None:
    run = Run(tmp_path / "run", keep)
    for step in range(1, 8):
        run.save(step)
        kept = range(max(1, step - keep + 1), step + 1)
        assert [p.name for p in list_checkpoints(run.root)] == [f"step-{s:08d}" for s in kept]


def test_latest_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text file names it then; one takes the place of the other."""
    run = Run(tmp_path / "run")
    run.save(3)

    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "symlink", no_links)
        patched.setattr(Path, "symlink_to", no_links)
        run.save(6)
    latest = run.root / "latest"
    assert latest.is_file() and latest.read_text() == "step-00000006\n"
    assert resolve_latest(latest) == run.root / "step-00000006"
    found = SpeechLM.from_pretrained(latest).state_dict()
    assert all(torch.equal(found[n], v) for n, v in run.model.state_dict().items())
    run.save(9)
    assert latest.is_symlink() and resolve_latest(latest).resolve() == run.root.resolve() / "step-00000009"


@pytest.mark.parametrize("others", [["step-00000003"], [], ["step-00000003", "latest-copy"]])
def test_latest_is_a_folder_after_a_copy_that_follows_links(tmp_path: Path, others: list[str]) -> None:
    """``cp -L``, and storages without links. It may be all that was copied, or a second copy; nothing is lost."""
    run = Run(tmp_path / "run")
    saved = digests(run.save(3))
    copied = tmp_path / "copy"
    for name in ["latest", *others]:
        shutil.copytree(run.root / "step-00000003", copied / name)
    assert find_model_folder(copied).name == (others[0] if others else "latest")
    recover(copied)
    newest = latest_checkpoint(copied)
    assert newest is not None and newest.name == "step-00000003" and digests(newest) == saved
    aside = {0: [], 1: ["latest-copy"], 2: ["latest-copy", "latest-copy-2"]}[len(others)]
    assert sorted(p.name for p in copied.iterdir()) == [*aside, "step-00000003"]
    run.root = copied
    run.save(6)
    assert (copied / "latest").is_symlink() and digests(copied / "latest") == digests(
        copied / "step-00000006"
    )
    assert all(digests(copied / name) == saved for name in aside)


def test_a_folder_latest_that_is_no_checkpoint_is_kept_aside(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    (run.root / "latest").mkdir(parents=True)
    (run.root / "latest" / "trainer_state.json").write_text('{"step": true}')
    run.save(3)
    assert sorted(p.name for p in run.root.iterdir()) == ["latest", "latest-copy", "step-00000003"]


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert len({sha256_file(run.save(3) / "model.safetensors") for _ in range(8)}) == 1
    for number in range(8):
        run.model.save_pretrained(tmp_path / str(number))
    assert len({sha256_file(tmp_path / str(number) / "model.safetensors") for number in range(8)}) == 1


STATE = {"step": 3, "packs_consumed": 21, "optimizer_step": 1.0, "plan": "p", "seconds": 0.5, "meter": None}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "damaged"),
        ("[]", r"should be an object, got \[\]"),
        ("\xff", "not UTF-8"),
        ('{"step": 3, "step": 4}', "'step' occurs twice"),
        (json.dumps({**STATE, "seconds": float("nan")}), "NaN is not a JSON number"),
        (
            json.dumps({**STATE, "seconds": 1}).replace(": 1,", ": 1e999,"),
            "1e999 is larger than any finite number",
        ),
        (json.dumps({**STATE, "step": "3"}), "step should be a whole number, got '3'"),
        (json.dumps({**STATE, "step": -1}), "step should be a whole number from 0 .*got -1"),
        (json.dumps({**STATE, "step": True}), "step should be a whole number, got True"),
        (json.dumps({**STATE, "packs_consumed": 1.5}), "packs_consumed"),
        (json.dumps({**STATE, "optimizer_step": 10**400}), "optimizer_step"),
        (json.dumps({**STATE, "plan": None}), "plan"),
        (json.dumps({**STATE, "meter": {"steps": 1}}), "meter"),
        (json.dumps({**STATE, "meter": {"steps": 1, "seconds": 1.0, "ranks": [[1.0], []]}}), "meter"),
        (json.dumps({**STATE, "more": 1}), "unknown key 'more'"),
        (json.dumps({k: v for k, v in STATE.items() if k != "plan"}), "key 'plan' is missing"),
    ],
)
def test_a_damaged_state_is_one_clear_error(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({**STATE, "totals": {"logged_step": 3}}))  # as older versions wrote it
    assert ckpt.read_state(tmp_path) == ckpt.TrainerState(**{**STATE, "step": 3})
    path.write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=told) as caught:
        ckpt.read_state(tmp_path)
    assert str(path) in str(caught.value)
