"""The command line: ``speechlm VERB``. Each verb is a dataclass of settings and a function, both in the verb's room.

``--config recipe.yaml`` fills the settings from a file, dotted options override them, unknown keys fail. A verb's
modules are imported only when it is called, so ``speechlm --help`` is quick. A verb of two words (``kmeans fit``)
belongs to a group, whose help lists its verbs.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from speechlm_ext.errors import ConfigError, SpeechLMError, foreign_errors


@dataclass(frozen=True)
class Verb:
    """Where a verb's settings and function live."""

    module: str
    config: str
    function: str
    help: str


VERBS = {
    "doctor": Verb(
        "speechlm_ext.doctor",
        "DoctorConfig",
        "run_doctor",
        "what is installed, compiled and will be used, and why",
    ),
    "tokenize": Verb(
        "speechlm_ext.data.tokenize", "TokenizeConfig", "run_tokenize", "recordings and texts -> token shards"
    ),
    "plan": Verb(
        "speechlm_ext.data.report",
        "PlanReportConfig",
        "run_plan",
        "what a training run would see and need, before it holds a machine",
    ),
    "train": Verb(
        "speechlm_ext.training",
        "TrainConfig",
        "run_train",
        "train a model on token shards, or go on with a run",
    ),
    "generate": Verb(
        "speechlm_ext.generation.cli", "GenerateConfig", "run_generate", "text or speech from a model"
    ),
    "evaluate": Verb(
        "speechlm_ext.evaluation.run",
        "EvaluateConfig",
        "run_evaluate",
        "scores of a model, or of stored records",
    ),
    "kmeans fit": Verb(
        "speechlm_ext.kmeans.cli_fit",
        "FitConfig",
        "run_fit",
        "K-Means units from recordings or feature shards",
    ),
    "kmeans assign": Verb(
        "speechlm_ext.kmeans.cli_assign",
        "AssignConfig",
        "run_assign",
        "recordings or feature shards -> unit labels",
    ),
    "kmeans inspect": Verb(
        "speechlm_ext.kmeans.cli_inspect",
        "InspectConfig",
        "run_inspect",
        "what a K-Means artefact is, and how its units are used",
    ),
    "layout": Verb(
        "speechlm_ext.layout_diff",
        "LayoutConfig",
        "run_layout",
        "show a token layout, or the first difference of two",
    ),
}

GROUPS = {
    "kmeans": "Discrete units of speech by K-Means: fit them to recordings, label recordings with them, look at them.\n"
    "\n"
    "  speechlm kmeans fit     --audio data/manifest.jsonl --encoder hf:facebook/hubert-base-ls960:9 --output units/\n"
    "  speechlm kmeans assign  --kmeans units/ --audio data/manifest.jsonl --output labels/train\n"
    "  speechlm kmeans inspect --kmeans units/",
}


def usage(group: str | None = None) -> str:
    """The text that lists all verbs, or those of a group."""
    verbs = [(name, v) for name, v in VERBS.items() if group is None or name.startswith(f"{group} ")]
    head = f"usage: speechlm {f'{group} ' if group else ''}VERB [--config FILE.yaml] [--option VALUE …]"
    about = f"\n\n{GROUPS[group]}" if group else ""
    return f"{head}{about}\n\nverbs:\n" + "\n".join(f"  {name:<15} {verb.help}" for name, verb in verbs)


def split_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb's name, of one word or two, and the words behind it."""
    count = 2 if argv[0] in GROUPS and len(argv) > 1 and not argv[1].startswith("-") else 1
    return " ".join(argv[:count]), list(argv[count:])


def build_parser(name: str) -> Any:
    """The argument parser of one verb."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    from speechlm_ext.config_file import OneLineErrors

    class Parser(OneLineErrors, ArgumentParser):
        """Ends with one line where a setting cannot be used."""

    class Help(DefaultHelpFormatter):
        """Leaves a module's ``EXAMPLES`` as they are."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text if text == examples else super()._fill_text(text, width, indent)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    config, examples = getattr(module, verb.config), getattr(module, "EXAMPLES", None)
    parser = Parser(
        allow_abbrev=False,
        prog=f"speechlm {name}",
        description=config.__doc__,
        epilog=examples,
        formatter_class=Help,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(config, None, as_group=False)
    return parser


def _options(argv: Sequence[str], flags: Collection[str] = ()) -> list[str]:
    """Options as the parser knows them: ``--top-k`` is ``--top_k``, ``-o`` is ``--output``.

    Args:
        flags: names of the settings that are true or false; alone on the line they mean true.
    """
    options = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        name, equals, value = word.partition("=")
        if word == "-o":
            word = "--output"
        elif name.startswith("--"):
            name = name[2:].replace("-", "_")
            word = f"--{name}{equals}{value}"
            if name in flags and not equals and following.startswith("-"):
                word += "=true"
        options.append(word)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 interrupted, 2 a mistake that the message explains."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{usage()}\n\n'speechlm VERB --help' explains a verb's settings.")
        return 0 if argv else 2
    name, rest = split_verb(argv)
    if name == "--version":
        from importlib.metadata import version

        print(f"speechlm_ext {version('speechlm_ext')}")
        return 0
    if name in GROUPS:
        asks = rest[:1] in (["-h"], ["--help"])
        where = sys.stdout if asks else sys.stderr
        print("" if asks else f"speechlm: error: {name} needs a verb.\n", end="", file=where)
        print(f"{usage(name)}\n\n'speechlm {name} VERB --help' explains a verb's settings.", file=where)
        return 0 if asks else 2
    if name not in VERBS:
        known = usage(argv[0] if argv[0] in GROUPS else None)
        print(f"speechlm: error: unknown verb {name!r}.\n{known}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("speechlm_ext").setLevel(logging.INFO)
    verb = VERBS[name]
    try:
        from speechlm_ext.config_file import check_config_files, refuse_nan

        parser = build_parser(name)
        flags = {action.dest for action in parser._actions if getattr(action, "_typehint", None) is bool}
        options = _options(rest, flags)
        check_config_files(options)
        hint = f"'speechlm {name} --help' explains them."
        with foreign_errors(ConfigError, "the settings cannot be read", hint):
            values = parser.parse_args(options)
        values.pop("config", None)
        refuse_nan(values)
        config = getattr(importlib.import_module(verb.module), verb.config)
        settings = parser.instantiate(values)
        result = getattr(importlib.import_module(verb.module), verb.function)(config(**vars(settings)))
    except SpeechLMError as error:
        print(f"speechlm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "speechlm: interrupted; what was saved is intact, the same command goes on from there.",
            file=sys.stderr,
        )
        return 1
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


if __name__ == "__main__":
    sys.exit(main())
