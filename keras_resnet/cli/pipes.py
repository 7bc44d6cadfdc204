"""Answers for another program, on a standard output that holds nothing else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from keras_resnet.system.errors import InputError
from keras_resnet.system.files import write_text

STDOUT = "-"


@contextlib.contextmanager
def piped(*paths: str | None) -> Iterator[TextIO | None]:
    """The standard output where one of the paths is `-`; what is printed then goes to stderr.

    Yields:
        Where to write the answer, or `None`: it is to be printed for people.

    Raises:
        InputError: More than one of them is.
    """
    if paths.count(STDOUT) > 1:
        raise InputError("Only one answer can go to the standard output: give the other a file.")
    if STDOUT not in paths or sys.stdout is None:  # that of any but the first of processes
        yield None
        return
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout
    stdout.flush()


def say(answer: object, stdout: TextIO | None) -> None:
    """Prints an answer for people, unless it goes to the standard output for a program."""
    if stdout is None:
        print(answer)


def write_answer(path: str, text: str, stdout: TextIO | None) -> None:
    """Writes a text to a file, or to the standard output that `piped` gave."""
    if path == STDOUT and stdout is not None:
        stdout.write(text)
    else:
        write_text(path, text)
        print(f"Written: {path}")
