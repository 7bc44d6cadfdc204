"""The package's own errors: each is also the built-in error a caller would catch there."""

from __future__ import annotations

import difflib
import importlib.util
import math
import operator
import os
import re
from collections.abc import Iterable
from typing import Any


class KerasResNetError(Exception):
    """Base of every error that the package raises on purpose.

    The message is one sentence or two: what was wrong, what was received, what to do. The
    command line prints it as one line and exits with code 2.
    """


class OtherProcessError(KerasResNetError, RuntimeError):
    """Another process of a run on several devices has ended, and with it the run."""


class InputError(KerasResNetError, ValueError):
    """An argument, a name or a shape that cannot work."""


class DataError(KerasResNetError, ValueError):
    """A folder or an image that cannot be used."""


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
    r"""Another library's message on one line, of at most 300 characters, or the error's kind.

    Examples:
        >>> reason_of(RuntimeError("Exception from src/core.cpp:84:\nCannot find a file\n"))
        'Cannot find a file'
        >>> reason_of(ValueError("A layer could not be loaded:\n\n  expected 2 variables"))
        'A layer could not be loaded: expected 2 variables'
    """
    empty = ("Exception encountered", "Exception from ", "Check '", "FrontEnd API failed",
             "A total of ")  # fmt: skip
    lines = [line.strip() for line in str(error).split("\n")]
    told = [line for line in lines if line and not line.startswith(empty)]
    text = " ".join(" ".join(told).split())
    if len(text) > 300:
        text = f"{text[:300].rpartition(' ')[0] or text[:300]} ..."
    return text or type(error).__name__


_NO_MEMORY = re.compile(
    r"(allocate|out of|not enough) memory|OOM when allocating|RESOURCE_EXHAUSTED|bad_alloc"
    r"|failed to map segment|can't start new thread"
    r"|ALLOC_FAILED|failed to allocate|Dst tensor is not initialized",  # cuDNN, XLA, TensorFlow
    re.IGNORECASE,
)


def no_memory(error: BaseException) -> bool:
    """Whether memory has run out: each library says it in its own way.

    Examples:
        >>> no_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    said = getattr(error, "strerror", None) or str(error)  # a file's name may say anything
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(said))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x' or 'y'?"`, or an empty string where nothing is near.

    Examples:
        >>> did_you_mean("resnet5O", ["resnet50", "alexnet"])
        " Did you mean 'resnet50'?"
    """
    near = difflib.get_close_matches(str(name).lower(), [str(k) for k in known], n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def meant_path(path: str | os.PathLike) -> str:
    """What is likely meant by a path that does not exist: the end of a message, or nothing.

    Examples:
        >>> meant_path("https://example.org/resnet18.pth")
        ' It is an address: download it, and give the path of the file.'
    """
    text = os.fspath(path)
    if re.match(r"[a-z][a-z0-9+.-]+:/", text, re.IGNORECASE):
        return " It is an address: download it, and give the path of the file."
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(text)))
    if os.path.isdir(folder):
        return did_you_mean(name, os.listdir(folder))
    while not os.path.isdir(os.path.dirname(folder)):
        folder = os.path.dirname(folder)
    near = did_you_mean(os.path.basename(folder), os.listdir(os.path.dirname(folder)))
    return f" There is no folder {folder!r}.{near}"


def require(package: str, extra: str, purpose: str) -> None:
    """Raises MissingDependencyError, with an extra's pip line, where a package is not there.

    The purpose is what needs it: the beginning of a sentence.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f'{purpose} needs the package {package!r}: pip install "keras3-resnet[{extra}]".'
        )


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises InputError, which names near ones, where an argument is none of a few values.

    Examples:
        >>> one_of("pooling", 7, (None, "avg", "max"))
        Traceback (most recent call last):
        ...
        keras_resnet.system.errors.InputError: pooling must be None, 'avg' or 'max'. Received: 7.
    """
    allowed = list(allowed)
    # By identity but for text: 1 is no True, and an array equals nothing as a whole.
    if not (value in allowed if isinstance(value, str) else any(value is a for a in allowed)):
        near = did_you_mean(value, (a for a in allowed if isinstance(a, str)))
        *others, last = map(repr, allowed)
        rule = f"{', '.join(others)} or {last}" if others else last
        raise _refused(name, rule, value, near)


def whole(name: str, value: Any, least: int) -> int:
    """An argument as an `int`; raises InputError where it is no whole number, or below `least`.

    Examples:
        >>> whole("n", 0, least=1)
        Traceback (most recent call last):
        ...
        keras_resnet.system.errors.InputError: n must be a whole number of at least 1. Received: 0.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise _refused(name, f"a whole number of at least {least}", value)
    return number


def between(
    name: str, value: Any, low: float, high: float = math.inf, *, ends: str = "[]"
) -> float:
    """An argument as a `float`; raises InputError where it is no number, or out of bounds.

    `ends` are as in mathematics: `"["` and `"]"` where a bound itself is allowed, `"("` and `")"`
    where it is not.

    Examples:
        >>> between("rate", 1.0, 0, 1, ends="[)")
        Traceback (most recent call last):
        ...
        keras_resnet.system.errors.InputError: rate must be at least 0 and below 1. Received: 1.0.
    """
    try:  # a nan is within no bounds
        above = low < value if ends[0] == "(" else low <= value
        fits = above and (value < high if ends[1] == ")" else value <= high)
    except (TypeError, ValueError):  # no number, or several
        fits = False
    if not fits:
        rule = f"{'at least' if ends[0] == '[' else 'above'} {low}"
        if high != math.inf:
            rule += f" and {'at most' if ends[1] == ']' else 'below'} {high}"
        raise _refused(name, rule, value)
    return float(value)


def _refused(name: str, rule: str, value: Any, hint: str = "") -> InputError:
    return InputError(f"{name} must be {rule}. Received: {value!r}.{hint}")
