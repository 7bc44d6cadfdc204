"""The package's own errors: each is also the built-in error a caller would catch there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KerasResNetError(Exception):
    """Base of every error that the package raises on purpose.

    The message is one sentence or two: what was wrong, what was received, what to do. The
    command line prints it as one line and exits with code 2.
    """


class InputError(KerasResNetError, ValueError):
    """An argument, a name or a shape that cannot work."""


class DataError(KerasResNetError, ValueError):
    """A folder or a picture that cannot be used."""


class CheckpointError(KerasResNetError, ValueError):
    """A weight file that cannot be read, or that is refused."""


class NotFoundError(KerasResNetError, FileNotFoundError):
    """A path that does not exist."""


class MissingDependencyError(KerasResNetError, ImportError):
    """An optional package that this call needs and that is not installed."""


class VerificationError(KerasResNetError, ArithmeticError):
    """Numbers that should agree and do not.

    Attributes:
        report: What was compared; `print` it.
    """

    def __init__(self, message: str, report: object = None):
        super().__init__(message)
        self.report = report


def reason_of(error: BaseException) -> str:
    r"""The first line of another library's message that says something, or the error's kind.

    Examples:
        >>> reason_of(RuntimeError("Exception from src/core.cpp:84:\nCannot find a file\n"))
        'Cannot find a file'
    """
    empty = ("Exception encountered", "Exception from ", "Check '", "FrontEnd API failed")
    lines = [line.strip() for line in str(error).split("\n")]
    told = [line for line in lines if line and not line.startswith(empty)]
    return told[0] if told else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x' or 'y'?"`, or an empty string where nothing is near.

    Examples:
        >>> did_you_mean("resnet5O", ["resnet50", "alexnet"])
        " Did you mean 'resnet50'?"
    """
    near = difflib.get_close_matches(str(name).lower(), [str(k) for k in known], n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
