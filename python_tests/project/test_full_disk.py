"""A disk that really fills up, under each command that writes: one clear error; the same command succeeds once there
is room. The disk is a tmpfs in a mount namespace of the test; where that is not allowed, the test is skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from python_tests.assets import MANIFEST

pytest.importorskip("deepspeed", reason="training needs deepspeed: pip install 'speechlm_ext[train]'")

#: Runs [[free KiB, arguments], ...] of ``speechlm`` on a tmpfs at argv[1] and prints the outcome of each. Each is a
#: process of its own, forked from one that has imported the slow modules.
DRIVER = """
import json, os, subprocess, sys, tempfile, traceback
import speechlm_ext.cli, speechlm_ext.generation.commands.generate
import speechlm_ext.data.tokenize.command, speechlm_ext.training.train, deepspeed
disk, steps = sys.argv[1], json.loads(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], check=True)
filler, out = os.path.join(disk, "filler"), []
for free, arguments in steps:
    if os.path.exists(filler):
        os.unlink(filler)
    have = os.statvfs(disk)
    with open(filler, "wb") as f:
        f.write(bytes(max(0, have.f_bavail * have.f_frsize - free * 1024)))
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stderr.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            try:
                code = speechlm_ext.cli.main(arguments)
            except SystemExit as stopped:
                code = stopped.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        said = stderr.read().decode()
    files = [os.path.join(d, n) for d, _, names in os.walk(disk) for n in names]
    out.append({"code": code, "stderr": said, "files": [os.path.relpath(f, disk) for f in files]})
print(json.dumps(out))
"""


def run(disk: Path, steps: list[tuple[int, list[str]]]) -> list[dict[str, Any]]:
    disk.mkdir()
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here (unshare --map-root-user --mount)")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", DRIVER, str(disk), json.dumps(steps)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    if "mount:" in done.stderr:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # imports may print before it


def test_every_command_reports_a_full_disk_and_succeeds_once_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    tokens, model = disk / "tokens", disk / "run"
    tokenize = [
        "tokenize",
        "--manifest",
        str(MANIFEST),
        "--output_dir",
        str(tokens),
        "--text.vocab-size",
        "300",
    ]
    tokenize += ["--ssl.num-clusters", "16", "--codec.num-codebooks", "3", "--codec.codebook-size", "16"]
    tokenize += ["--codec.griffin-lim-iterations", "4"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
run_dir: {model}
data: {{tokens: ["{tokens}"], budget: 512, tasks: [{{task: codec_ssl_asr}}, {{task: codec_ssl_plain_tts}}]}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2, ffn_size: 64, max_positions: 1024}}
steps: 4
save_every: 2
tensorboard: true
""",
        "utf-8",
    )
    train = ["train", "--config", str(recipe)]
    speak = ["generate", "--model", str(model / "checkpoints" / "latest"), "--task", "tts", "--text", "three"]
    speak += ["--max-len", "80", "-o", str(disk / "out.wav")]
    full_fit, full_shard, tokenized, full_train, trained, full_wav, spoken = run(
        disk,
        [
            (16, tokenize),
            (56, tokenize),
            (20000, tokenize),
            (200, train),
            (20000, train),
            (0, speak),
            (2000, speak),
        ],
    )
    for step in (full_fit, full_shard, full_train, full_wav):
        errors = [line for line in step["stderr"].splitlines() if "error:" in line]
        assert step["code"] != 0 and len(errors) >= 1, step["stderr"]
        assert "the disk is full" in errors[0] and str(disk) in errors[0], errors
        assert "Traceback" not in step["stderr"]
        assert not [f for f in step["files"] if "tmp" in f], "a half-written file was left"
    for step in (tokenized, trained, spoken):
        assert step["code"] == 0, step["stderr"]
    assert "out.wav" not in full_wav["files"] and "out.wav" in spoken["files"]
    assert any(f.startswith("run/checkpoints/step-00000004/") for f in trained["files"])
