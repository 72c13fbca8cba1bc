"""The command line: ``speechlm VERB``. A verb is a dataclass of settings and a function.

``--config recipe.yaml`` fills the settings from a file, dotted options override them, unknown keys fail. A verb's
modules are imported only when it runs, so that ``speechlm --help`` is quick. A verb of two words (``kmeans fit``)
belongs to a group, whose help lists its verbs.
"""

from __future__ import annotations

import codecs
import importlib
import json
import locale
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin

from speechlm_ext import __version__
from speechlm_ext.errors import ConfigError, SpeechLMError, foreign_errors
from speechlm_ext.utils.console import make_output_safe

#: Start of the help of a setting's old name.
OLD_NAME = "Old name of"


class Verb(NamedTuple):
    """A verb's settings and function."""

    module: str
    config: str
    function: str
    help: str


VERBS = {
    name: Verb(f"speechlm_ext.{module}", config, f"run_{name.split()[-1]}", text)
    for name, module, config, text in (
        ("doctor", "doctor", "DoctorConfig", "installed versions, compiled kernels and choices"),
        ("tokenize", "data.tokenize.command", "TokenizeConfig", "recordings and texts -> token shards"),
        ("plan", "training.plan", "PlanCommandConfig", "data, steps and memory of a training run, before it starts"),
        ("train", "training", "TrainConfig", "train a model on token shards, or resume a run"),
        ("generate", "generation.commands.generate", "GenerateConfig", "text or speech from a model"),
        ("evaluate", "evaluation.evaluate", "EvaluateConfig", "scores of a model, or of stored records"),
        ("kmeans fit", "units.fit", "FitConfig", "K-Means units from recordings or feature shards"),
        ("kmeans assign", "units.assign", "AssignConfig", "recordings or feature shards -> unit labels"),
        ("kmeans inspect", "units.inspect", "InspectConfig",
         "contents of a K-Means artifact, and the use of its units"),
        ("layout", "layout.diff", "LayoutConfig", "show a token layout, or the first difference of two"),
    )
}  # fmt: skip
#: First words of the verbs that have two.
GROUPS = {name.split()[0] for name in VERBS if " " in name}
_HELP = ("-h", "--help")


def usage(group: str | None = None) -> str:
    """The list of all verbs, or of a group's."""
    prefix = f"{group} " if group else ""
    verbs = [f"  {name:<15} {verb.help}" for name, verb in VERBS.items() if name.startswith(prefix)]
    head = f"usage: speechlm {prefix}VERB [--config FILE.yaml] [--option VALUE …]\n\nverbs:"
    return "\n".join([head, *verbs, "", f"'speechlm {prefix}VERB --help' explains a verb's settings."])


def _without_verb(argv: Sequence[str]) -> int:
    """Print the help, the version, or the error of a command line that names no verb; returns the exit code."""
    if argv[:1] == ["--version"]:
        print(f"speechlm_ext {__version__}")
        return 0
    group = argv[0] if argv and argv[0] in GROUPS else None
    words = argv[1:] if group else argv
    if words and words[0] in _HELP:
        print(usage(group))
        return 0
    named = " ".join([group or "", *words[:1]]).strip()
    problem = f"unknown verb {named!r}" if words else f"{named or 'speechlm'} needs a verb"
    print(f"speechlm: error: {problem}.\n{usage(group)}", file=sys.stderr)
    return 2


def build_parser(name: str) -> Any:
    """The argument parser of one verb."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    _use_strict_yaml()

    class Parser(ArgumentParser):
        """Reads configuration files as UTF-8 in every locale; an unusable setting is an error on one line."""

        def error(self, message: str, *_: Any) -> NoReturn:
            line = " ".join(str(message).split()).rstrip(".")
            end = f"'{self.prog} --help' explains the settings."
            print(f"speechlm: error: {line[:1000]}. {end}", file=sys.stderr)
            sys.exit(2)

        def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
            if codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8":
                return super().parse_path(path, *args, **kwargs)
            return self.parse_string(Path(path).read_text("utf-8"), str(path), *args, **kwargs)

    class Help(DefaultHelpFormatter):
        """Prints a module's ``EXAMPLES`` unwrapped."""

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


def _use_strict_yaml() -> None:
    """Refuse repeated keys in configuration files, and in options that are YAML or JSON."""
    import yaml
    from jsonargparse import get_loader, set_loader

    from speechlm_ext.utils.files.yaml_text import check_unique_keys

    load = get_loader("yaml")
    if getattr(load, "is_strict", False):
        return

    def strict(text: str) -> Any:
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            return text  # a file's name, or text in a locale that is not UTF-8; no YAML
        check_unique_keys(text)
        return load(text)

    strict.is_strict = True  # type: ignore[attr-defined]
    set_loader("yaml", strict, exceptions=(yaml.YAMLError,))


@dataclass(frozen=True)
class _Names:
    """Names of a verb's settings, and the form of their values on the command line."""

    known: frozenset[str]
    flags: frozenset[str]
    """Names of booleans; without a value they mean true."""
    lists: Mapping[str, Any]
    """Names of lists, with the type of their items; one plain value is a list of one."""
    output: str
    """Meaning of ``-o``: the output file if the verb writes one, else the output folder."""

    @classmethod
    def of(cls, parser: Any) -> _Names:
        """The names of a verb's parser."""
        actions = {a.dest: a for a in parser._actions}
        hints = {name: getattr(a, "_typehint", None) for name, a in actions.items()}
        lists = {name: _item_type(hint) for name, hint in hints.items() if not name.endswith(".help")}
        lists = {name: item for name, item in lists.items() if item is not None}
        is_file = "output" in actions and not (actions["output"].help or "").startswith(OLD_NAME)
        flags = frozenset(name for name, hint in hints.items() if hint is bool)
        return cls(frozenset(actions), flags, lists, "output" if is_file else "output_dir")

    def standard(self, name: str) -> str:
        """The verb's own name for an output folder; other names unchanged."""
        if name in ("output_dir", "out", "output") and name not in self.known:
            return next((own for own in ("output_dir", "run_dir") if own in self.known), name)
        return name


def _item_type(hint: Any) -> Any:
    """The X of ``list[X]`` and ``list[X] | None``; None for other types."""
    parts = [
        p
        for p in (get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint])
        if p is not type(None)
    ]
    return get_args(parts[0])[0] if len(parts) == 1 and get_origin(parts[0]) is list else None


def _as_list(value: str, item: Any) -> str:
    """The text of a list; one plain value becomes its item (of settings the first one, such as a task's name)."""
    if value.lstrip().startswith("[") or value in ("null", "None"):
        return value
    if is_dataclass(item) and not value.lstrip().startswith("{"):
        return json.dumps([{fields(item)[0].name: value}])
    return json.dumps([value]) if item in (str, Path) else f"[{value}]"


def _options(argv: Sequence[str], names: _Names) -> list[str]:
    """Options as the parser takes them: ``--top-k`` is ``--top_k``, ``-o`` the output, ``--tokens A`` a list."""
    options: list[str] = []
    awaited = None
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        name, equals, value = word.partition("=")
        if awaited is not None and not word.startswith("--"):
            word, awaited = _as_list(word, awaited), None
        elif word == "-o":
            word = f"--{names.standard(names.output)}"
        elif name.startswith("--"):
            name = names.standard(name[2:].replace("-", "_"))
            if name in names.lists:
                value = _as_list(value, names.lists[name]) if equals else value
                awaited = None if equals else names.lists[name]
            word = f"--{name}{equals}{value}"
            if name in names.flags and not equals and following.startswith("-"):
                word += "=true"
        options.append(word)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 2 a mistake that the message explains, 130 interrupted.

    Verbs have 1 for a negative result: some requests failed, two layouts differ.
    """
    make_output_safe()
    argv = list(sys.argv[1:] if argv is None else argv)
    num_words = 2 if argv and argv[0] in GROUPS else 1
    name, rest = " ".join(argv[:num_words]), argv[num_words:]
    if name not in VERBS:
        return _without_verb(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("speechlm_ext").setLevel(logging.INFO)
    verb = VERBS[name]
    try:
        from speechlm_ext.config import check_config_files, refuse_nan

        parser = build_parser(name)
        options = _options(rest, _Names.of(parser))
        check_config_files(options)
        hint = f"'speechlm {name} --help' explains them."
        with foreign_errors(ConfigError, "the settings cannot be read", hint):
            values = parser.parse_args(options)
        values.pop("config", None)
        refuse_nan(values)
        module, settings = importlib.import_module(verb.module), parser.instantiate(values)
        result = getattr(module, verb.function)(getattr(module, verb.config)(**vars(settings)))
    except SpeechLMError as error:
        print(f"speechlm: error: {error.for_command_line()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("speechlm: interrupted; rerun the same command to resume from what is saved.", file=sys.stderr)
        return 130
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


if __name__ == "__main__":
    sys.exit(main())
