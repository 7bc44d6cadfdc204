"""The table of commands as an argparse parser whose errors are one line.

Why argparse: tyro 1.0 and Typer 0.29 were tried, and neither keeps in less code what users rely on.
Both draw their errors as boxes of several lines and take no abbreviated option (`--learning-r`).
Typer's options take one value (`--milestones 0.5 0.75` has two), and tyro knows no difference
between an option that is not given and `none`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import inspect
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keras_resnet.cli.words import command_hint, is_other, option_hint, spelled
from keras_resnet.recipes import RECIPES, Recipe, get_recipe
from keras_resnet.system.errors import (
    InputError,
    NotFoundError,
    between,
    did_you_mean,
    meant_path,
    reason_of,
    whole,
)
from keras_resnet.system.files import read_json

_KINDS = {"N": int, "PIXELS": int, "X": float}  # by metavar; all others are text
RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe)[3:])

# Where a recipe's fields stand in the help; `--help` shows the first three groups.
_GROUPS = {
    "Data": "val_split",
    "Model": "model weights image_size unfreeze",
    "Training": "epochs batch_size learning_rate weight_decay optimizer schedule patience "
    "precision",
    "Sizes and crops": "channels crop crop_scale eval_size eval_resize resize_exact interpolation "
    "normalization",
    "Augmentation": "flip vertical_flip rotation policy color_jitter grayscale blur random_erasing "
    "mixup cutmix label_smoothing repeats",
    "What outputs say": "task calibrate",
    "Uneven classes": "class_weights sampler focal",
    "Optimizer": "momentum nesterov norm_decay bias_decay clip_norm accumulate",
    "Schedule": "schedule_per step_size milestones gamma warmup_epochs warmup_decay",
    "Fine-tuning": "key gradual backbone_rate freeze_norms dropout",
    "Average of the weights": "ema ema_steps ema_decay",
}


class Argument(typing.NamedTuple):
    """What `add_argument` takes, a check that needs no Keras, and a place in the help."""

    name: str
    options: dict[str, Any]
    check: Callable[[Any], Any] | None
    group: str = "Options"
    rare: bool = False

    @property
    def dest(self) -> str:
        """The parameter that gets the value."""
        return self.options.get("dest", self.name.lstrip("-").replace("-", "_"))


def _number(kind: Callable[[str], Any], text: str) -> Any:
    """The number that a word is; the word itself where it is none."""
    try:
        return kind(text)
    except ValueError:
        return text


def arg(
    spec: str,  # its name, what stands for its value (`N` is an int, `X` a float), the default
    help: str | None = None,
    check: Callable[[Any], Any] | None = None,  # of a value, one by one where there are several
    least: int | None = None,  # the smallest whole number that is taken
    above: float | None = None,  # every number that is larger is taken
    group: str = "Options",  # heading in the help
    rare: bool = False,  # `--help` leaves it to `--help-all`
    **options: Any,  # of `add_argument`
) -> Argument:
    """An argument, written as the help shows it: `"--seed N=0"`, or `"--strict"` for a flag."""
    name, _, rest = spec.partition(" ")
    metavar, _, default = rest.partition("=")
    if metavar:
        options |= {"metavar": metavar, "type": _KINDS.get(metavar, str)}
        options.setdefault("default", default or None)
    elif "choices" not in options:
        options.setdefault("action", "store_true")

    words = name.lstrip("-").replace("-", "_")
    if least is not None or above is not None:  # whose check says it where it is no number
        options["type"] = functools.partial(_number, options["type"])
    if least is not None:
        check = functools.partial(whole, words, least=least)
    if above is not None:
        check = functools.partial(between, words, low=above, ends="(]")
    return Argument(name, options | {"help": help}, check, group, rare)


class Command(typing.NamedTuple):
    """A row of the table of commands."""

    run: Callable[..., int | None]  # called with the arguments, after every check; gives a code
    help: str
    arguments: list[Argument]
    recipe: bool = False  # every field of `Recipe` is an option too
    keras: bool = True  # it computes with Keras, so a backend is needed
    # Called first, with the command and the arguments: are those in their right order?
    order: Callable[[str, dict[str, Any]], None] | None = None


class _HelpAll(argparse._HelpAction):
    def __call__(self, parser, namespace, values, option_string=None):
        parser._print_message(parser.format_help(full=True), sys.stdout)
        parser.exit()


class _Lines(argparse.HelpFormatter):
    """A line an option where it fits, with its default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=25)

    def _get_help_string(self, action):
        plain = action.default in (None, False, True, argparse.SUPPRESS) or action.default == []
        return (action.help or "") + ("" if plain else " (%(default)s)")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of `train` alone fills a screen."""

    def __init__(self, **options: Any):
        super().__init__(**options, formatter_class=_Lines, add_help=False)
        self._positionals.title = "Arguments"
        self._optionals.title = "Options"
        self.rare: set[str] = set()
        self.add_argument("-h", "--help", action="help", help="show this, and stop")

    def error(self, message: str) -> typing.NoReturn:
        """Prints the line, and exits with 2."""
        command = self.prog.removeprefix("keras-resnet").strip()
        where = f"{command}: " if command else ""
        stop = "" if message.endswith(("?", ".")) else "."
        self.exit(2, f"keras-resnet: {where}{message}{stop} See {self.prog} --help.\n")

    def parse_args(self, args=None, namespace=None):
        """Parses, and says what is likely meant by a word that is none of the command's."""
        words, commands = list(args), self.commands()
        if words and words[0].startswith("-") and words[0] not in self._option_string_actions:
            self.error(f"the command comes first, not {words[0]!r}: keras-resnet COMMAND ...")
        if words and words[0] in commands:
            parser = commands[words[0]]
            words[1:] = spelled(words[1:], parser._option_string_actions)
            # argparse would take --freeze for --freeze-norms.
            for word in words[1:]:
                if is_other(word, parser._option_string_actions):
                    parser.refuse(word)
            parser.take_config(words[1:])
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            found.parser.refuse(unknown[0])
        return found

    def take_config(self, words: list[str]) -> None:
        """What a run's `config.json` says is the default of every option that is not given."""
        if "--config" not in self._option_string_actions:
            return
        first = argparse.ArgumentParser(add_help=False)  # abbreviations are taken as elsewhere
        first.add_argument("--config", nargs="?")
        first.add_argument("--recipe", nargs="?")
        given = first.parse_known_args(words)[0]
        if given.config is not None:
            if given.recipe is not None:
                self.error("the record of a run has its recipe: give --config or --recipe")
            known = run_options(given.config)
            own = {action.dest: action for action in self._actions}
            said = {n: _as_typed(own[n], known[n], given.config) for n in own.keys() & known.keys()}
            told = {n: v for n, v in said.items() if v is not None or n in RECIPE_FIELDS}
            self.set_defaults(**told)
            if "directory" in told:
                own["directory"].nargs, own["directory"].required = "?", False

    def refuse(self, word: str) -> typing.NoReturn:
        """Says that a word is none of the command's, and what is likely meant."""
        usage = self.format_usage().strip().removeprefix("usage: ")
        hint = option_hint(word, list(self._option_string_actions), usage)
        self.error(f"unknown argument {word.partition('=')[0]!r}.{hint}")

    def commands(self) -> dict[str, Parser]:
        """The parsers of the commands, by name."""
        return next(a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction))

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            command = isinstance(action, argparse._SubParsersAction)
            known = f" There are: {', '.join(action.choices)}."
            hint = command_hint(value, action.choices) if command else None
            hint = hint or did_you_mean(value, action.choices) or known
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}.{hint}")

    def format_help(self, full: bool = False) -> str:
        """The help by groups, without what is rare."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        left_out = 0
        for group in self._action_groups:
            shown = [a for a in group._group_actions if full or a.dest not in self.rare]
            left_out += len(group._group_actions) - len(shown)
            if shown:
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(shown)
                formatter.end_section()
        formatter.add_text(self.epilog)
        if left_out:
            formatter.add_text(f"{left_out} further options: {self.prog} --help-all")
        return formatter.format_help()


def make_parser(commands: Mapping[str, Command], version: str) -> Parser:
    """The parser of a table of commands; it gives `command`, `parser` and the arguments."""
    parser = Parser(
        prog="keras-resnet",
        usage="%(prog)s COMMAND ...",
        description="ResNets and AlexNets for Keras 3. The backend is chosen by KERAS_BACKEND "
        "(torch, tensorflow or jax).",
        epilog="To begin: keras-resnet train FOLDER, where FOLDER holds one folder of images a "
        "class; then keras-resnet predict runs/... IMAGE.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"keras-resnet {version}",
                        help="show the version, and stop")  # fmt: skip
    table = parser.add_subparsers(
        metavar="COMMAND", required=True, title="Commands", prog=parser.prog
    )
    for name, command in commands.items():
        text = command.help
        given = [a.options for a in command.arguments if not a.name.startswith("-")]
        shape = {"+": "{} ...", "?": "[{}]"}
        words = " ".join(shape.get(o.get("nargs"), "{}").format(o["metavar"]) for o in given)
        one = table.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            usage=f"keras-resnet {name} {words}".rstrip() + " [options]",
        )
        one.set_defaults(command=command, parser=one)
        _add(one, [*command.arguments, *(_recipe_arguments() if command.recipe else ())])
    return parser


def run_options(path: str) -> dict[str, Any]:
    """The options of the command that a run was made by, of its `config.json` or its folder."""
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.exists():
        raise NotFoundError(f"{path!r} does not exist, or holds no config.json.{meant_path(path)}")
    try:
        config = read_json(file)
        recipe, arguments = dict(config["recipe"]), dict(config["arguments"])
        name = recipe.get("name") if recipe.get("name") in RECIPES else "finetune"
        fields = {field: recipe[field] for field in RECIPE_FIELDS if field in recipe}
        if RECIPES[name].warmup_epochs >= fields.get("epochs", 1) > fields.get("warmup_epochs", 1):
            del fields["warmup_epochs"]  # cut for a short run: see `Recipe`
        if config.get("tf32") is False:
            fields["tf32"] = False
        return {**fields, **arguments, **(arguments.get("source") or {}), "recipe": name}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{str(file)!r} is no record of a run, as train writes config.json: {reason_of(error)}"
        ) from error


def _as_typed(action: argparse.Action, value: Any, record: str) -> Any:
    """What a record says of an option as it would be typed: text, which the option's type reads.

    Raises:
        InputError: It is of a kind that no text means.
    """
    several = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    several = several or (action.dest == "exclude" and isinstance(value, list))
    values = value if several and isinstance(value, list) else [value]
    kinds: set[type] = {str} if action.type in (None, str) else {str, int, float}
    kinds = {bool} if action.nargs == 0 else kinds
    if value is None or (action.dest == "class_weights" and isinstance(value, dict)):
        return value
    if several != isinstance(value, list) or not {type(one) for one in values} <= kinds:
        raise InputError(f"{record!r} says {action.dest} = {reprlib.repr(value)}: that cannot be.")
    return value if several or kinds == {bool} else str(value)


def _add(parser: Parser, arguments: list[Argument]) -> None:
    """Adds arguments by their groups, those with rare ones alone last."""
    groups = {"Options": parser._optionals}
    sizes = collections.Counter(a.group for a in arguments)
    for argument in sorted(arguments, key=lambda a: a.rare):
        if not argument.name.startswith("-"):
            parser.add_argument(argument.name, **argument.options)
            continue
        title = argument.group if sizes[argument.group] > 1 else "Options"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        added = groups[title].add_argument(argument.name, **argument.options)
        if argument.rare:
            parser.rare.add(added.dest)
    if parser.rare:
        parser.add_argument("--help-all", action=_HelpAll, help="show every option, and stop")
    parser._action_groups.append(parser._action_groups.pop(1))  # the plain options last
    if parser.rare:  # and behind them what is rare
        some = [
            g for g in parser._action_groups if {a.dest for a in g._group_actions} <= parser.rare
        ]
        for group in some:
            parser._action_groups.remove(group)
            parser._action_groups.append(group)


def _recipe_arguments() -> list[Argument]:
    """An argument a field of a recipe: it changes the recipe where it is given."""
    hints, texts = typing.get_type_hints(Recipe), _attribute_texts(Recipe)
    usual = get_recipe("finetune")
    groups = {field: title for title, names in _GROUPS.items() for field in names.split()}
    made = []
    for field in sorted(RECIPE_FIELDS, key=lambda f: list(groups).index(f) if f in groups else 99):
        value = getattr(usual, field)
        shown = "" if value is None or value is False or value == () else f" ({_shown(value)})"
        options = {"help": texts[field] + shown, "default": argparse.SUPPRESS}
        options |= _kind(hints[field])
        group = groups.get(field, "Further")
        name = f"--{field.replace('_', '-')}"
        made.append(
            Argument(name, options, None, group, group not in ("Data", "Model", "Training"))
        )
    return made


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" for v in value)
    if isinstance(value, bool):
        return "yes"
    return value if isinstance(value, str) else f"{value:g}"


def _attribute_texts(cls: type) -> dict[str, str]:
    """What the section `Attributes:` of a class's docstring says, by name."""
    doc = inspect.cleandoc(cls.__doc__).replace("`", "").replace('"', "").replace("%", "%%")
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", doc, re.MULTILINE)
    texts = {name: " ".join(text.split()).rstrip(".") for name, text in found}
    return {n: t if t[1].isdigit() else t[0].lower() + t[1:] for n, t in texts.items()}


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"type": float, "nargs": "+", "metavar": "X"}
    kinds = typing.get_args(hint) or (hint,)
    kind = next(t for t in kinds if isinstance(t, type) and t is not types.NoneType)
    words = {"none": None} if types.NoneType in kinds else {}
    literals = [t for t in kinds if typing.get_origin(t) is typing.Literal]
    words |= {word: word for t in literals for word in typing.get_args(t)}

    def parse(text: str):
        return words[text.lower()] if text.lower() in words else kind(text)

    parse.__name__ = " or ".join([kind.__name__, *filter(None, words.values())])  # where it is none
    return {"type": parse, "metavar": {str: "NAME", int: "N"}.get(kind, "X")}
