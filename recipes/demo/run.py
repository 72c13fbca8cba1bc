"""The demo: from recordings to a scored SpeechLM, stage by stage.

    python recipes/demo/run.py [--output_dir runs/demo] [--data FOLDER] [--quick] [--stage NAME | --from NAME]

Every stage prints the command that it runs, so that each can be repeated by hand. A stage that has finished with the
same inputs is skipped; ``--stage`` runs one again, ``--from`` that one and all after it. An interrupted training run
resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import own_data
import prepare_data
import report as demo_report
import torch
from make_requests import make_requests

from speechlm_ext.errors import ConfigError, SpeechLMError
from speechlm_ext.tokenizers import TokenizerSet
from speechlm_ext.utils.console import make_output_safe
from speechlm_ext.utils.files.io import atomic_write_json, sha256_file
from speechlm_ext.utils.files.json_text import parse_json
from speechlm_ext.utils.files.run_folders import find_model_folder
from speechlm_ext.utils.machine import commit_of

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "demo.yaml"
OWN_RECIPE = HERE.parent / "own_folder.yaml"
TOKENIZE_RECIPE = HERE / "tokenize.yaml"
OWN_TOKENIZE_RECIPE = HERE / "tokenize_own.yaml"
STATE = "stages.json"
#: Same transcripts as the full 30 s on the held-out English numbers, in about a third of the time.
ASR_WINDOW_S = 15.0


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    out: Path
    data: Path | None
    quick: bool
    debs: Path | None
    recipe: Path
    steps: int | None

    @property
    def own(self) -> bool:
        """Whether the recordings are the user's own."""
        return self.data is not None

    def checkpoint(self) -> Path:
        """The newest checkpoint. Raises :class:`SpeechLMError` if there is none."""
        found = find_model_folder(self.out / "model")
        if found == self.out / "model":
            raise ConfigError(f"no checkpoint in {found}; run the train stage first.")
        return found


# ---- the stages -----------------------------------------------------------------------------------------------------
def stage_data(o: Options) -> None:
    """Recordings to ``data/train.jsonl`` and ``data/test.jsonl``."""
    if o.data is not None:
        print("  " + own_data.prepare_own(o.data, o.out / "data"))
        return
    config = None
    if o.quick:
        config = prepare_data.DataConfig(
            train_numbers={"en": 60, "es": 5}, test_numbers={"en": 4, "es": 2}, max_seconds=3.0
        )
    print(f"  prepare_data.prepare({str(o.out / 'data')!r})")
    prepare_data.prepare(o.out / "data", o.debs, config)


def stage_tokenize(o: Options) -> None:
    """Manifests to token folders; the test split uses the train split's tokenizers."""
    for split in ("train", "test"):
        manifest = str(o.out / "data" / f"{split}.jsonl")
        arguments = ["--manifest", manifest, "--output_dir", str(o.out / "tokens" / split)]
        if split == "test":
            arguments += ["--tokenizers", str(o.out / "tokens" / "train" / "tokenizers")]
        config = OWN_TOKENIZE_RECIPE if o.own else TOKENIZE_RECIPE
        speechlm("tokenize", "--config", str(config), *arguments)


def stage_plan(o: Options) -> None:
    """Print the plan of the training run."""
    speechlm("plan", *_train_arguments(o))


def stage_train(o: Options) -> None:
    """Train, or resume an interrupted run."""
    speechlm("train", *_train_arguments(o))


def _train_arguments(o: Options) -> list[str]:
    arguments = ["--config", str(o.recipe), "--run_dir", str(o.out / "model")]
    arguments += ["--data.tokens", str(o.out / "tokens" / "train")]
    if o.own:
        arguments += ["--data.overlong", "drop"]
    if torch.cuda.is_available() or os.cpu_count() == 1:
        arguments += ["--processes", "1"]
    steps = o.steps or (30 if o.quick else None)
    return arguments + (["--steps", str(steps), "--log_every", "5"] if steps else [])


def stage_generate(o: Options) -> None:
    """Answer the requests for held-out items."""
    codec = TokenizerSet.load(o.out / "tokens" / "train" / "tokenizers").codec
    requests = o.out / "requests.jsonl"
    test = o.out / "data" / "test.jsonl"
    make_requests(test, requests, codec.frame_rate, o.own, limit=3 if o.quick else None)
    speechlm(
        *("generate", "--model", str(o.checkpoint()), "--requests", str(requests)),
        *("--output_dir", str(o.out / "generated"), "--batch_size", "128"),
        accept=(0, 1),  # 1: some requests failed
    )


def stage_evaluate(o: Options) -> None:
    """Score the results and the model."""
    speechlm(
        *("evaluate", "--results", str(o.out / "generated" / "results.jsonl")),
        *("--manifest", str(o.out / "data" / "test.jsonl")),
        *("--model", str(o.checkpoint()), "--tokens", str(o.out / "tokens" / "test")),
        *("--output_dir", str(o.out / "eval"), "--cache_dir", str(o.out.parent / "cache")),
        *("--judge_window_s", str(ASR_WINDOW_S)),
    )


def stage_report(o: Options) -> None:
    """Write ``metrics.json`` and ``report.html`` from the outputs of the other stages."""
    demo_report.write(o.out, o.own, read_state(o.out))


class Stage(NamedTuple):
    """One stage of the demo."""

    about: str
    run: Callable[[Options], None]
    writes: tuple[str, ...] = ()
    """Outputs that are removed before it runs on other inputs."""


STAGES = {
    "data": Stage("get the recordings and write train and test manifests", stage_data),
    "tokenize": Stage(
        "fit the tokenizers and turn recordings and texts into tokens", stage_tokenize, ("tokens",)
    ),
    "plan": Stage("print data, steps and memory of the training run", stage_plan),
    "train": Stage("train the model", stage_train, ("model",)),
    "generate": Stage(
        "transcribe, speak and continue held-out items",
        stage_generate,
        ("generated", "requests.jsonl", "beginnings", "parts"),
    ),
    "evaluate": Stage("score: word errors of texts and speech, perplexity", stage_evaluate, ("eval",)),
    "report": Stage("write metrics.json and report.html", stage_report),
}


def speechlm(*arguments: str, accept: tuple[int, ...] = (0,)) -> None:
    """Run ``speechlm …`` as a user does. Raises :class:`ConfigError` for an exit code that is not accepted."""
    print(f"  $ speechlm {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "speechlm_ext.cli", *arguments]).returncode
    if code not in accept:
        raise ConfigError(f"`speechlm {arguments[0]}` ended with code {code}; its message is above.")


# ---- finished stages ------------------------------------------------------------------------------------------------
def read_state(out: Path) -> dict[str, Any]:
    """Key, seconds and commit of each stage that ran."""
    try:
        return parse_json((out / STATE).read_bytes())
    except (OSError, ValueError):
        return {}


def stage_keys(o: Options) -> dict[str, str]:
    """A hash per stage over everything that it depends on, the stages before it included."""
    files = {
        "data": [HERE / "prepare_data.py", HERE / "number_words.py", HERE / "own_data.py"],
        "tokenize": [OWN_TOKENIZE_RECIPE if o.own else TOKENIZE_RECIPE],
        "train": [o.recipe],
        "generate": [HERE / "make_requests.py"],
    }
    if o.data is not None:
        files["data"] += sorted(o.data.glob("*.jsonl"))
    keys, before = {}, json.dumps([str(o.data), o.quick, str(o.debs)])
    for name in STAGES:
        parts = [before, name, str(o.steps) if name == "train" else ""]
        parts += [sha256_file(f) for f in files.get(name, []) if f.is_file()]
        keys[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        # No stage depends on the printed plan.
        before = before if name == "plan" else keys[name]
    return keys


def run_stages(o: Options, chosen: list[str], force: list[str]) -> None:
    """Run the chosen stages that are unfinished or forced, and record each.

    Raises:
        SpeechLMError: a stage failed; those before it are kept.
    """
    o.out.mkdir(parents=True, exist_ok=True)
    state, keys = read_state(o.out), stage_keys(o)
    for number, (name, stage) in enumerate(STAGES.items(), 1):
        if name not in chosen:
            continue
        entry = state.get(name, {})
        head = f"[{number}/{len(STAGES)}] {name}: {stage.about}"
        same = entry.get("key") == keys[name]
        if same and entry.get("done") and name not in force and name != "report":
            print(f"{head} — done before ({entry['seconds']:.0f} s)", flush=True)
            continue
        print(head, flush=True)
        if not same or (name in force and name != "tokenize"):
            for path in stage.writes:
                _remove(o.out / path)
        state[name] = {"key": keys[name], "done": False}
        atomic_write_json(o.out / STATE, state)
        started = time.perf_counter()
        stage.run(o)
        # A resumed training run counts the time before its interruption as well.
        seconds = max(time.perf_counter() - started, _logged_seconds(o.out) if name == "train" else 0.0)
        state[name] = {
            "key": keys[name],
            "done": True,
            "seconds": round(seconds, 1),
            "commit": commit_of(HERE),
        }
        atomic_write_json(o.out / STATE, state)
        if name == "report":
            demo_report.write(o.out, o.own, state, page=False)  # its own time is known only now
        print(f"  {seconds:.1f} s", flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _logged_seconds(out: Path) -> float:
    from speechlm_ext.training.log import read_log

    rows = read_log(out / "model")
    return float(rows[-1]["seconds"]) if rows else 0.0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        *("--output_dir", "--output-dir", "--out"),
        dest="out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for everything that is written; --out is its old name",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        help="your own recordings: a folder with manifest.jsonl (5 %% are held out), or train.jsonl and test.jsonl",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny data and training: checks that everything runs"
    )
    parser.add_argument(
        "--debs", type=Path, default=None, help="folder with the Debian packages, instead of a download"
    )
    parser.add_argument("--recipe", type=Path, default=None, help="training recipe, instead of the demo's")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps, instead of the recipe's")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--stage", choices=list(STAGES), help="run only this stage, also if it is done")
    some.add_argument("--from", dest="first", choices=list(STAGES), help="run this stage and all after it")
    a = parser.parse_args(argv)
    names = list(STAGES)
    chosen = [a.stage] if a.stage else names
    force = [a.stage] if a.stage else (names[names.index(a.first) :] if a.first else [])
    options = Options(
        a.out, a.data or None, a.quick, a.debs, a.recipe or (OWN_RECIPE if a.data else RECIPE), a.steps
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Keeps the home folder clean: matplotlib writes its list of fonts there by default.
    os.environ.setdefault("MPLCONFIGDIR", str((a.out.parent / "cache" / "matplotlib").absolute()))
    started = time.perf_counter()
    try:
        run_stages(options, chosen, force)
    except SpeechLMError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; rerun the same command to resume.", file=sys.stderr)
        return 130
    print(f"{time.perf_counter() - started:.0f} s in all. Report: {options.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
