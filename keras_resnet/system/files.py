"""Files that are whole or not there, and names that do no harm in a terminal."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from keras_resnet.system.errors import InputError, KerasResNetError, NotFoundError, meant_path


def cache_home() -> Path:
    """What is kept from one call to the next: `KERAS_RESNET_HOME`, or the user's cache folder."""
    home = os.environ.get("KERAS_RESNET_HOME")
    return Path(home).expanduser() if home else platformdirs.user_cache_path("keras_resnet")


def check_writable(path: str | os.PathLike) -> None:
    """Raises, before any work, why a file cannot be written: an empty one is, beside it."""
    path = Path(path).expanduser()
    _check_kind(path)
    if not path.parent.is_dir():
        raise NotFoundError(
            f"The folder {str(path.parent)!r} does not exist.{meant_path(path.parent)}"
        )
    _write_empty(path)


def check_apart(output: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> None:
    """Raises InputError where what shall be written is one of the files that are read."""
    output = Path(output).expanduser()
    for read in (Path(one).expanduser() for one in inputs):
        if output.is_file() and read.is_file() and output.samefile(read):
            raise InputError(
                f"{str(output)!r} would be written over what is read: give another name."
            )


def check_writable_folder(path: str | os.PathLike) -> None:
    """Raises InputError, before any work, where a folder is a file, or cannot be written to."""
    path = Path(path).expanduser()
    found = path
    while not os.path.lexists(found):
        found = found.parent
    if not found.is_dir():
        what = "The output" if found == path else f"Cannot write {str(path)!r}:"
        raise InputError(f"{what} {str(found)!r} is a file; a folder is needed.")
    _write_empty(found / (path.name or "a"))  # of "." and "/" the last name is none


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"The output {str(path)!r} is a folder; a file's name is needed.")
    if path.exists() and not path.is_file():
        raise InputError(f"The output {str(path)!r} is a device or a pipe; a file is needed.")


def _write_empty(path: Path) -> None:
    name = beside(path)
    try:
        with open(name, "xb"):
            pass
        os.unlink(name)
    except OSError as error:
        raise InputError(f"Cannot write {str(path)!r}: {error.strerror}.") from None


# Names of temporary files say which process made them. Its number is not enough: in a container
# it is the same every time.
_PROCESS = secrets.token_hex(2)
_TEMPORARY = re.compile(r"\..+-kr(\d+)\.([0-9a-f]{4})-\w{8}(\.[\w.]+)?")


def beside(path: Path) -> str:
    """The name of a temporary file beside another, of the same extension."""
    # Not tempfile.mkstemp: its files are the owner's alone, a saved one follows the umask.
    # Keras wants the whole double extension on its weights.
    suffix = ".weights.h5" if path.name.endswith(".weights.h5") else path.suffix
    name = temporary_prefix(path.name.removesuffix(suffix)) + secrets.token_hex(4) + suffix
    return str(path.with_name(name))


def temporary_prefix(stem: str) -> str:
    """What a temporary file or folder is called, up to eight random letters."""
    return f".{stem}-kr{os.getpid()}.{_PROCESS}-"


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed while they wrote."""
    for name in os.listdir(folder):
        match = _TEMPORARY.fullmatch(name)
        if match and _is_dead(int(match[1]), match[2]):
            with contextlib.suppress(OSError):
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_dead(number: int, process: str) -> bool:
    if number == os.getpid():
        return process != _PROCESS
    try:
        if os.name != "nt":  # there it would end the process
            os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # another user's
        pass
    return False


@contextlib.contextmanager
def named(path: str | os.PathLike, temporary: str | None = None) -> Iterator[None]:
    """Puts a file's name into what the system says of it: of a full disk it names none."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, temporary):  # else it has words of its own
            error.filename = os.fspath(path)
        raise


def replace_file(path: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """Writes a file so that at any instant the old or the new one is there, whole.

    `write` is called with the name of a temporary file beside it, of the same extension.

    Raises:
        InputError: There is a folder, a device or a pipe of that name.
        OSError: What `write` or the file system raised, with the file's name; the old file is as
            it was.
    """
    path = Path(path).expanduser()
    _check_kind(path)
    name = beside(path)
    with named(path, name):
        remove_leftovers(path.parent)
        try:
            write(name)
            with open(name, "rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException as error:
            known = isinstance(error, KerasResNetError) or getattr(error, "errno", None)
            if isinstance(error, Exception) and not known:
                check_room(path, _SOME)  # while what there is of it still takes its place
            raise
        finally:
            with contextlib.suppress(OSError):  # it is not there any more where all went well
                os.unlink(name)
    _sync_folder(path.parent)


_SOME = 2**20  # bytes


def check_room(path: str | os.PathLike, size: int) -> None:
    """Writes so many bytes beside a file that is to be written, or that could not be.

    Libraries in C++ end the whole process where the disk is full, or say it in words of their own.

    Raises:
        OSError: The system refuses; with its words, and no name: `named` gives one.
    """
    name = beside(Path(path))
    try:
        with open(name, "wb") as file:
            for start in range(0, size, _SOME):
                file.write(bytes(min(_SOME, size - start)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = None
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _sync_folder(folder: Path) -> None:
    # The rename itself must survive a power cut; Windows cannot open folders, and needs not.
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def take_lock(path: str | os.PathLike) -> filelock.BaseFileLock | None:
    """Takes a lock that other processes see; `None` where one of them holds it.

    Its file is for the lock alone. A process that is killed gives the lock back, not the file.
    """
    lock = filelock.FileLock(path, thread_local=False)
    try:
        # Not in no time: a file whose holder is about to remove it is no lock, and tried again.
        lock.acquire(timeout=0.5, poll_interval=0.05)
    except filelock.Timeout:
        return None
    return lock


def drop_lock(lock: filelock.BaseFileLock) -> None:
    """Gives a lock back, and removes its file.

    In this order: were the file removed after the lock is given back, it might be the next
    holder's, and a third process would make a new one. filelock takes no lock on a removed file.
    """
    with contextlib.suppress(OSError):  # Windows removes no open file
        os.unlink(lock.lock_file)
    lock.release()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""

    def write(name: str) -> None:
        with open(name, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            stream.write(text)

    replace_file(path, write)


def to_json(value: Any, **options: Any) -> str:
    """JSON text, which every reader takes: what is no finite number becomes `null` (RFC 8259)."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A list of numbers of indented JSON. Within a text a line break is written as an escape.
_NUMBERS = re.compile(r"\[\n\s*([-+.\w]+(?:,\n\s*[-+.\w]+)*)\n\s*\]")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON, whole or not at all: indented, but a list of numbers is one line."""
    text = to_json(value, indent=2, ensure_ascii=True, default=str) + "\n"
    # A confusion matrix of 1,000 classes is 2 MB so, and 11 MB with a line a number.
    write_text(path, _NUMBERS.sub(lambda m: "[" + re.sub(r"\s+", "", m[1]) + "]", text))


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; bytes that are no UTF-8 stay what they are, as in file names.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or a pipe or a device, which might never end.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError(f"{str(path)!r} is no regular file")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def printable(text: Any) -> str:
    r"""Text with control characters and those that turn the writing direction made visible.

    Examples:
        >>> printable("a\x1b[31m\nb")
        'a\\x1b[31m\\nb'
    """
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else
        c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(text)
    )  # fmt: skip


# How a path begins that says where on a machine it is: absolute here or on Windows, of somebody's
# home folder, or upwards.
_WAY = r"(?:(?:file:/*)?/|~(?=\w)|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\)"
# The whole text, or all behind an option's "="; in quotes, maybe with blanks; up to a blank.
_PLACES = re.compile(
    rf"(?P<option>\A(?:-[\w-]+=)?){_WAY}(?s:.*)"
    rf"|(?P<quote>['\"]){_WAY}.*?(?=(?P=quote))"
    rf"|(?<![^\s(\[,;=]){_WAY}[^\s'\",;)\]]*[/\\][^\s'\",;)\]]+"
)


def shown_path(text: Any) -> str:
    """A path, or a message with paths in it, as it is fit for pages that go to other people.

    Below the home folder it begins with `~`; of every other place the last name is left. A relative
    path stays. All that is written to be shown goes through here.

    Examples:
        >>> shown_path(os.path.expanduser("~/flowers")), shown_path("--cache=/mnt/jane/flowers")
        ('~/flowers', '--cache=.../flowers')
        >>> shown_path("'/home/joe/my photos/1.png' cannot be read"), shown_path("photos/1.png")
        ("'.../1.png' cannot be read", 'photos/1.png')
    """
    text, home = str(text), os.path.expanduser("~")
    for folder in {home, os.path.realpath(home)} - {os.sep, "~"}:
        text = re.sub(rf"(?<![\w.~/\\-]){re.escape(folder)}(?![\w.-])", "~", text)

    def last_name(match: re.Match) -> str:
        name = re.split(r"[/\\]", match[0].rstrip("/\\"))[-1]
        return f"{match['option'] or match['quote'] or ''}.../{name}"

    return _PLACES.sub(last_name, text)


def shortened(text: Any, width: int) -> str:
    """A name as one printable line of at most so many columns; a long one loses its middle.

    Letters are cut, not words: names that begin alike often end otherwise. A Chinese, Japanese or
    Korean letter and an emoji take two columns, an accent none.

    Examples:
        >>> shortened("Chevrolet Silverado 1500 Hybrid Crew Cab 2012", 24)
        'Chevrolet Silv...ab 2012'
        >>> shortened("a" * 200, 10), shortened("\u732b" * 9, 10)
        ('aaaaa...aa', '\u732b\u732b...\u732b')
    """
    text = " ".join(printable(text).split())
    if text_width(text) <= width:
        return text
    room = max(0, width - 3)
    tail = _fitting(text[::-1], room // 3)[::-1]
    while tail and text_width(tail[0]) == 0:  # an accent whose letter is cut
        tail = tail[1:]
    return f"{_fitting(text, room - text_width(tail))}...{tail}"


def column(text: Any, width: int) -> str:
    """A name as a cell of a table: `shortened`, and filled with blanks.

    Examples:
        >>> column("\u732b", 4) + "|", column("golden retriever", 8) + "|"
        ('\u732b  |', 'gold...r|')
    """
    text = shortened(text, width)
    return text + " " * (width - text_width(text))


def text_width(text: str) -> int:
    """Columns that a text takes in a terminal, as Unicode's East Asian Width has it."""
    narrow = sum(not unicodedata.combining(c) and unicodedata.category(c) != "Mn" for c in text)
    return narrow + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def _fitting(text: str, width: int) -> str:
    """As much of the beginning as fits into so many columns, and at least one letter."""
    widths = itertools.accumulate(map(text_width, text))
    return text[: max(1, sum(w <= width for w in widths))]


# What makes a spreadsheet take a cell for a formula, its full-width forms included (OWASP, "CSV
# Injection"); a plain number is none.
_FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
_QUOTED = re.compile(r'[",;\t\r\n]|^\s|\s$')


def csv_line(cells: Iterable[Any]) -> str:
    r"""One line of a CSV file (RFC 4180), harmless in a spreadsheet and always valid UTF-8.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, which
    `csv_value` takes away; give paths by way of `plain_path`, which stay paths. Bytes
    of a file name that are no UTF-8 are written as escapes. Semicolons and tabs are quoted as
    commas are: a spreadsheet may split at them.

    Examples:
        >>> csv_line(["a, b", "=HYPERLINK(1)", "-1", 0.5, None]).rstrip()
        '"a, b",\'=HYPERLINK(1),-1,0.5,'
    """
    return ",".join(map(_csv_cell, cells)) + "\n"


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    text = valid_text(value)
    if isinstance(value, str) and _is_formula(text.lstrip("'")):
        text = f"'{text}"  # also where it has one of its own: the way back must be clear
    return '"' + text.replace('"', '""') + '"' if _QUOTED.search(text) else text


def csv_value(text: str) -> str:
    r"""The text that `csv_line` wrote as this cell: without the apostrophe, with a name's bytes.

    Examples:
        >>> csv_value("'=1+1"), csv_value("'tis"), csv_value("-1")
        ('=1+1', "'tis", '-1')
    """
    if text[:1] == "'" and _is_formula(text.lstrip("'")):
        text = text[1:]
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda m: chr(0xDC00 + int(m[1], 16)), text)


def _is_formula(text: str) -> bool:
    return bool(_FORMULA.match(text)) and not _NUMBER.fullmatch(text)


def plain_path(path: str | os.PathLike) -> str:
    """The same file's path, with `./` before it where it would begin as a formula does.

    Examples:
        >>> plain_path("=1+1.png"), plain_path("photos/=1+1.png")
        ('./=1+1.png', 'photos/=1+1.png')
    """
    path = os.fspath(path)
    return f"./{path}" if _is_formula(path) else path


def valid_text(value: Any) -> str:
    r"""Text that can be written as UTF-8: bytes of a file name that are none become escapes.

    Examples:
        >>> valid_text(os.fsdecode(b"caf\xe9.png"))
        'caf\\udce9.png'
    """
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
