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


def answer(shown: object, path: str | None, text: str, stdout: TextIO | None) -> None:
    """Prints an answer for people, or writes its text to the standard output that `piped` gave.

    Where there is another path, the text is written to it as well.
    """
    if stdout is None:
        print(shown)
    else:
        stdout.write(f"{text}\n")
    if path not in (None, STDOUT):
        write_text(path, f"{text}\n")
        print(f"Written: {path}")


def say_backend() -> None:
    """Says what computes, and on which device."""
    from keras_resnet.system.device import backend_line

    print(f"Backend: {backend_line()}", flush=True)
