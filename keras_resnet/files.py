"""Files that are whole or not there, and names that do no harm in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """Writes a file so that at any instant the old or the new one is there, whole.

    Args:
        path: Where the file shall be.
        write: Called with the name of a temporary file beside it, of the same extension.

    Raises:
        OSError: What `write` or the file system raised; the old file is as it was.
    """
    path = Path(path)
    # Not tempfile.mkstemp: its files are the owner's alone, a saved one follows the umask.
    name = str(path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}"))
    try:
        write(name)
        with open(name, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself must survive a power cut; Windows cannot open folders, and needs not.
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""

    def write(name: str) -> None:
        with open(name, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            stream.write(text)

    replace_file(path, write)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=True, default=str) + "\n")


def printable(text: Any) -> str:
    r"""Text with control characters and those that turn the writing direction made visible.

    Example:
        >>> printable("a\x1b[31m\nb")
        'a\\x1b[31m\\nb'
    """
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else
        c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(text)
    )  # fmt: skip
