"""Seeded damage to folders: what disks, copies and editors do to files, for tests of every reader.

:func:`damaged` copies a good folder once per case, damages one file in it and yields what was done. A reader then has
two honest outcomes: it gives the values of the undamaged folder, or it raises one error of the project that names the
folder. :func:`outcome` tells which of the two it was, or what else.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechlm_ext.errors import SpeechLMError

#: What a JSON value may become. The words in angle brackets are written as numbers that JSON has no words for.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**9, 10**30, -(10**18), 0.5, 1e300, "<1e999>", "<NaN>", "<-Infinity>", "", "x",
    "../x", "\ud800", "\0", [], {}, [[]], [None], {"x": None}, "a" * 70_000, ["x"], 64)  # fmt: skip


def damaged(
    good: Path, work: Path, *, cases: int, seed: int = 0, skip: Callable[[Path], bool] = lambda path: False
) -> Iterator[tuple[str, Path]]:
    """Damaged copies of a folder, one after the other under one path.

    Args:
        good: a folder; it is not touched.
        work: an empty folder for the copy.
        cases: how many.
        seed: decides which file is damaged in which way.
        skip: whether a file is left alone.

    Yields:
        ``(what was done, the damaged copy)``.
    """
    files = sorted(p for p in good.rglob("*") if p.is_file() and not skip(p.relative_to(good)))
    copy = work / "damaged"
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy, symlinks=True)
        file = copy / rng.choice(files).relative_to(good)
        others = [copy / p.relative_to(good) for p in files if copy / p.relative_to(good) != file]
        ways: list[Any] = [_truncate, _flip_bits, _overwrite, _append, _empty, _remove, _to_folder, _dangle]
        ways += [_cut_out, _repeat] + ([partial(_swap, others=others)] if others else [])
        if file.suffix in (".json", ".jsonl"):
            ways += 3 * [_edit_json] * len(ways)
        what = rng.choice(ways)(file, rng)
        yield f"case {number}: {file.relative_to(copy)}: {what}", copy
    shutil.rmtree(copy, ignore_errors=True)


# ---- bytes -----------------------------------------------------------------------------------------------------
def _truncate(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    length = rng.choice([rng.randrange(len(data)), len(data) - 1, min(8, len(data) - 1)]) if data else 0
    file.write_bytes(data[:length])
    return f"cut to {length} of {len(data)} bytes"


def _flip_bits(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes() or b"\0")
    # Headers and footers are where a flipped bit means most.
    spans = [(0, len(data)), (0, min(64, len(data))), (max(0, len(data) - 400), len(data))]
    places = [(rng.randrange(*rng.choice(spans)), rng.randrange(8)) for _ in range(rng.choice([1, 1, 1, 8]))]
    for place, bit in places:
        data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"flipped (byte, bit) {places}"


def _overwrite(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    start = rng.randrange(len(data) + 1)
    length = min(rng.choice([1, 8, 64, 4096]), len(data) - start)
    zeros = rng.random() < 0.5
    file.write_bytes(
        data[:start] + (bytes(length) if zeros else rng.randbytes(length)) + data[start + length :]
    )
    return f"{'zeros' if zeros else 'noise'} over {length} bytes from {start}"


def _cut_out(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    start, length = rng.randrange(len(data) + 1), rng.choice([1, 8, 512])
    file.write_bytes(data[:start] + data[start + length :])
    return f"{length} bytes missing from {start}"


def _repeat(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    start, length = rng.randrange(len(data) + 1), rng.choice([1, 8, 512])
    file.write_bytes(data[: start + length] + data[start:])
    return f"{length} bytes twice from {start}"


def _append(file: Path, rng: random.Random) -> str:
    tail = rng.choice([b"\0", b"\n", b"{}", b"\xff" * 9, rng.randbytes(100)])
    with open(file, "ab") as out:
        out.write(tail)
    return f"{tail[:8]!r} at its end"


# ---- whole files -----------------------------------------------------------------------------------------------
def _empty(file: Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return "emptied"


def _remove(file: Path, rng: random.Random) -> str:
    file.unlink()
    return "removed"


def _to_folder(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a folder in its place"


def _dangle(file: Path, rng: random.Random) -> str:
    target = rng.choice(["nowhere", file.name])
    file.unlink()
    file.symlink_to(target)
    return f"a link to {target!r} in its place"


def _swap(file: Path, rng: random.Random, others: Sequence[Path]) -> str:
    other = rng.choice(others)
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.name}"


# ---- JSON ------------------------------------------------------------------------------------------------------
def _edit_json(file: Path, rng: random.Random) -> str:
    """One edit at a random place of a JSON file, or of a random line of a JSON-lines file."""
    lines = file.read_bytes().split(b"\n")
    number = rng.choice([n for n, line in enumerate(lines) if line.strip()] or [0])
    if file.suffix == ".json":
        lines, number = [file.read_bytes()], 0
    try:
        value = json.loads(lines[number])
    except ValueError:
        return _truncate(file, rng)
    value, what = _edit(value, rng)
    text = json.dumps(value)
    for name in ("1e999", "NaN", "-Infinity"):
        text = text.replace(f'"<{name}>"', name)
    lines[number] = text.replace("<again>", "").encode()
    file.write_bytes(b"\n".join(lines))
    return what


def _edit(value: Any, rng: random.Random) -> tuple[Any, str]:
    places = list(_places(value))
    if not places or rng.random() < 0.04:
        new = rng.choice(_VALUES)
        return new, f"all of it is {new!r}"[:80]
    # Deep lists of numbers would get all the attention otherwise.
    deepest = rng.randint(1, max(len(p) for p in places))
    path = rng.choice([p for p in places if len(p) <= deepest])
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    key, name = path[-1], ".".join(map(str, path))
    ways = ["set", "set", "set", "remove", "near"] + (["rename", "again", "extra"] * isinstance(inside, dict))
    way, old = rng.choice(ways), inside[key]
    if way == "remove":
        del inside[key]
        return value, f"{name} removed"
    if way == "rename":
        inside[f"{key}_"] = inside.pop(key)
        return value, f"{name} renamed"
    if way == "again":  # the same key twice, with two values
        inside[f"{key}<again>"] = rng.choice(_VALUES)
        return value, f"{name} twice"
    if way == "extra":
        inside["unheard_of"] = rng.choice(_VALUES)
        return value, f"a key more beside {name}"
    new = rng.choice(_VALUES)
    if way == "near":  # a value of the same kind
        if isinstance(old, bool):
            new = not old
        elif isinstance(old, (int, float)):
            new = rng.choice([old + 1, old - 1, -old, float(old), str(old)])
        elif isinstance(old, str):
            new = rng.choice([old[:-1], old + "x", old.upper(), [old]])
        elif isinstance(old, list):
            new = rng.choice([old[:-1], old + old[-1:], old[::-1], dict(enumerate(old))])
    inside[key] = new
    return value, f"{name} = {new!r}"[:120]


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


# ---- outcomes --------------------------------------------------------------------------------------------------
class _Late(BaseException):
    """A reader takes too long; no reader may take it for an error of its file."""


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Late(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[Path], Any], folder: Path, good: Any, *, seconds: int = 30) -> str:
    """What reading a damaged folder comes to.

    Args:
        read: reads the folder and gives a value that can be compared.
        good: the value of the undamaged folder.
        seconds: how long a reader may take.

    Returns:
        ``same``: the undamaged values. ``refused``: one error of the project, on one line that names the folder or a
        file of it. Else what is wrong: ``different values``, ``unnamed: …``, ``not one line: …`` or ``foreign: …``.
    """
    try:
        with _at_most(seconds):
            return "same" if read(folder) == good else "different values"
    except SpeechLMError as error:
        message = str(error)
        if str(folder) not in message:
            return f"unnamed: {message[:300]}"
        return "refused" if len(message) < 2000 and "\n" not in message else f"not one line: {message[:300]}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"foreign: {type(error).__name__}: {str(error)[:200]}"


def plain(value: Any) -> Any:
    """A value that ``==`` compares: arrays become their type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
