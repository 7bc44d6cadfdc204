"""The command line: parse, one public call, print. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from keras_resnet import __version__
from keras_resnet.cli.checks import apart
from keras_resnet.cli.commands import COMMANDS
from keras_resnet.cli.launch import launch
from keras_resnet.cli.parser import Command, make_parser
from keras_resnet.system.errors import InputError, KerasResNetError, OtherProcessError, no_memory
from keras_resnet.system.files import named, printable
from keras_resnet.system.process import (
    choose_backend,
    keep_keras_alone,
    meeting_place,
    reported,
    settled_code,
    several,
    speaks,
    tune_process,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code: 0, 1 (disagreement), 2 (bad input), 130 (Ctrl-C)."""
    settled = settled_code(meeting_place())
    return reported(_main(argv)) if settled is None else settled


def _main(argv: Sequence[str] | None) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in ([], ["help"]):
        argv = [*(word for word in argv[1:2] if word != "help"), "--help"]
    elif argv[0] == "version":
        argv = ["--version"]
    try:
        code = _run(argv, **vars(build_parser().parse_args(argv)))
        with named("<stdout>"):  # here, not as Python ends, where it would be a traceback
            sys.stdout.flush()
        return code
    except OtherProcessError:
        return 1
    except KerasResNetError as error:
        if speaks(type(error).__name__):
            print(f"keras-resnet: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `keras-resnet models | head`
        _drop_stdout()
        return 0
    except Exception as error:
        if no_memory(error):
            text = (
                "Not enough memory: lower the batch size (train finds one by --batch-size auto), "
                "the image size or the number of workers. "
                "With more memory the same train, or predict --output, goes on where it was."
            )
        elif isinstance(error, OSError):  # an output that cannot be written, a full disk
            where = f"{error.filename!r}: " if error.filename else ""
            text = f"{where}{os.strerror(error.errno) if error.errno else error}"
            if error.filename == "<stdout>":
                _drop_stdout()
        else:
            raise
        print(f"keras-resnet: {printable(text)}", file=sys.stderr)
        return 2


def _drop_stdout() -> None:
    """What could not be written is not tried again as Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The parser of `keras-resnet`; the reference of the command line is written from it."""
    return make_parser(COMMANDS, __version__)


def _run(
    words: Sequence[str], command: Command, parser: argparse.ArgumentParser, **arguments
) -> int:
    """Checks what can be checked without Keras, then runs: importing a backend takes seconds."""
    if command.order is not None:
        command.order(parser.prog.split()[-1], arguments)
    apart(command, arguments)
    for argument in command.arguments:
        value = arguments[argument.dest]
        if argument.check is not None and value is not None:
            for one in value if isinstance(value, list) else [value]:
                argument.check(one)
    if several() and "devices" not in arguments:
        raise InputError("This command is for one process: give it without torchrun.")
    tf32 = arguments.pop("tf32", None)
    devices, restarts = arguments.pop("devices", None), arguments.pop("max_restarts", 0)
    if command.keras:
        choose_backend()
        if not arguments.get("show"):
            compiles, dry = bool(arguments.get("compile")), bool(arguments.get("dry_run"))
            code = launch(words, devices, restarts, compiles, dry)
            if code is not None:
                return code
        tune_process()
        keep_keras_alone(compiler=bool(arguments.get("compile")))
    if tf32 is not None:
        from keras_resnet.system.device import set_tf32

        set_tf32(tf32)
    return command.run(**arguments) or 0
