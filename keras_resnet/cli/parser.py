"""The table of commands as an argparse parser whose errors are one line.

Why argparse: tyro 1.0 and Typer 0.29 were tried, and neither keeps in less code what users rely on.
Both draw their errors as boxes of several lines and take no abbreviated option (`--learning-r`).
Typer's options take one value (`--milestones 0.5 0.75` has two), and tyro knows no difference
between an option that is not given and `none`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from keras_resnet.errors import did_you_mean, whole
from keras_resnet.recipes import Recipe

_KINDS = {"N": int, "PIXELS": int, "X": float}  # by metavar; all others are text
RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe)[3:])


class Argument(typing.NamedTuple):
    """What `add_argument` takes, and a check of the value that needs no Keras."""

    name: str
    options: dict[str, Any]
    check: Callable[[Any], Any] | None

    @property
    def dest(self) -> str:
        """The parameter that gets the value."""
        return self.options.get("dest", self.name.lstrip("-").replace("-", "_"))


def arg(
    spec: str,
    help: str | None = None,
    check: Callable[[Any], Any] | None = None,
    least: int | None = None,
    **options: Any,
) -> Argument:
    """An argument, written as the help shows it: `"--seed N=0"`, or `"--strict"` for a flag.

    Args:
        spec: Its name, what stands for its value (`N` is an int, `X` a float) and the default.
        help: What it is for.
        check: Called with a value that was given, one by one where there are several.
        least: The smallest number that is taken.
        **options: Further ones of `add_argument`.
    """
    name, _, rest = spec.partition(" ")
    metavar, _, default = rest.partition("=")
    if metavar:
        options |= {"metavar": metavar, "type": _KINDS.get(metavar, str)}
        options.setdefault("default", default or None)
    elif "choices" not in options:
        options.setdefault("action", "store_true")

    if least is not None:
        check = functools.partial(whole, name.lstrip("-").replace("-", "_"), least=least)
    return Argument(name, options | {"help": help}, check)


class Command(typing.NamedTuple):
    """A row of the table of commands.

    Attributes:
        run: Called with the arguments by name, after every check; it may give an exit code.
        help: What it does.
        arguments: In the order of the help.
        recipe: Every field of `Recipe` is an option too, and an argument where it is given.
        keras: It computes with Keras, so a backend is needed.
    """

    run: Callable[..., int | None]
    help: str
    arguments: list[Argument]
    recipe: bool = False
    keras: bool = True


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of `train` alone fills a screen."""

    def error(self, message: str) -> typing.NoReturn:
        """Prints the line, and exits with 2."""
        command = self.prog.removeprefix("keras-resnet").strip()
        where = f"{command}: " if command else ""
        stop = "" if message.endswith(("?", ".")) else "."
        self.exit(2, f"keras-resnet: {where}{message}{stop} See {self.prog} --help.\n")

    def parse_args(self, args=None, namespace=None):
        """Parses, and names an unknown option with those that are near."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in found.parser._actions for option in action.option_strings]
            name = unknown[0].partition("=")[0]
            near = did_you_mean(name, known) if name.startswith("-") else ""
            found.parser.error(f"unknown argument {name!r}.{near}")
        return found

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            known = f" There are: {', '.join(action.choices)}."
            near = did_you_mean(value, action.choices) or known
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}.{near}")


def make_parser(commands: Mapping[str, Command]) -> Parser:
    """The parser of a table of commands; it gives `command`, `parser` and the arguments."""
    parser = Parser(
        prog="keras-resnet",
        description="ResNets and AlexNets for Keras 3. The backend is chosen by KERAS_BACKEND "
        "(torch, tensorflow or jax).",
    )
    table = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in commands.items():
        text = command.help
        one = table.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        one.set_defaults(command=command, parser=one)
        for argument in command.arguments:
            one.add_argument(argument.name, **argument.options)
        if command.recipe:
            group = one.add_argument_group("what a recipe holds; each option overrides it")
            hints, texts = typing.get_type_hints(Recipe), _attribute_texts(Recipe)
            for field in RECIPE_FIELDS:
                options = {"help": texts[field], "default": argparse.SUPPRESS}
                group.add_argument(f"--{field.replace('_', '-')}", **options, **_kind(hints[field]))
    return parser


def _attribute_texts(cls: type) -> dict[str, str]:
    """What the section `Attributes:` of a class's docstring says, by name."""
    doc = inspect.cleandoc(cls.__doc__).replace("`", "").replace("%", "%%")
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in found}


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"type": float, "nargs": "+", "metavar": "X"}
    optional = isinstance(hint, types.UnionType)
    kind = next(t for t in typing.get_args(hint) if t is not types.NoneType) if optional else hint

    def parse(text: str):
        return None if optional and text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse says it where the text is none
    return {"type": parse, "metavar": {str: "NAME", int: "N"}.get(kind, "X")}
