"""Published files: fetched once, checked, kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO

import filelock

from keras_resnet.system.errors import DataError, KerasResNetError
from keras_resnet.system.progress import byte_bar

_CHUNK = 1 << 20


def file_sha256(path: str | os.PathLike) -> str:
    """A file's sha256 in 64 hex digits; remembered until the file changes."""
    facts = os.stat(path)
    return _file_sha256(os.path.abspath(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)


@functools.lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, modified: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetched(
    url: str,
    target: pathlib.Path,
    sha256: str,
    *,
    home: str | None = None,
    error: type[KerasResNetError] = DataError,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 5,
) -> pathlib.Path:
    """A published file, downloaded if it is not here yet; its place.

    A download goes to a `.part` file, which a later call continues, and gets its final name when
    it is whole and right. Processes that want the same file wait for the one that fetches it.

    Its hash begins with the hexadecimal digits `sha256`, by hand it can be had from `home`. A
    connection counts as dead after `timeout` seconds without a byte; after so many `attempts` in a
    row that bring nothing it is given up.

    Raises:
        KerasResNetError: The network failed (the message says what to fetch by hand, and where to
            put it), the bytes are not the published ones, or the disk refused.
    """

    def there() -> bool:
        return target.is_file() and file_sha256(target).startswith(sha256)

    if there():
        return target
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if there():  # whoever held the lock before has fetched it
                return target
            with byte_bar(target.name) if progress else contextlib.nullcontext() as show:
                _download(url, part, show, timeout, attempts)
            found, size = file_sha256(part), part.stat().st_size
            if not found.startswith(sha256):
                part.unlink()
                raise error(
                    f"{url} gave {size:,} bytes whose sha256 begins with {found[:8]}, not with "
                    f"{sha256[:8]}; they were deleted. Try again, or fetch the file from "
                    f"{home or url} by hand and put it at {target}."
                )
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
    except _NetworkError as failure:
        raise error(
            f"Cannot download {url}: {failure}. Fetch it by hand and put it at {target}."
        ) from failure
    except OSError as failure:
        raise error(
            f"Cannot write {target.name} into {target.parent}: {failure.strerror or failure}. Set "
            "KERAS_RESNET_HOME to a folder with room."
        ) from failure
    return target


class _NetworkError(Exception):
    """A connection that could not be made, or that ended too early."""


def _download(
    url: str, part: pathlib.Path, show: Callable | None, timeout: float, attempts: int
) -> None:
    failures = 0
    while True:
        before = _size(part)
        try:
            return _fetch(url, part, show, timeout)
        except _NetworkError as failure:
            # Tries that brought something do not count: a bad line gets there in the end.
            failures = failures + 1 if _size(part) <= before else 0
            code = getattr(failure.__cause__, "code", 0)
            permanent = 400 <= code < 500 and code not in (408, 416, 429)
            if permanent or failures >= attempts:
                raise
            time.sleep(min(0.1 * 2**failures, 2.0))


def _size(part: pathlib.Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch(url: str, part: pathlib.Path, show: Callable | None, timeout: float) -> None:
    """Appends to the part file what is missing, or starts afresh where the server cannot."""
    have = _size(part)
    response = _open(url, part, have, timeout)
    if response is None:
        return
    with response:
        span = response.headers.get("Content-Range", "")
        resumed = have and response.status == 206 and span.startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = response.headers.get("Content-Length") or ""
        total = have + int(length) if length.isdecimal() else None
        with open(part, "ab" if resumed else "wb") as file:
            _copy(response, file, show, have, total)


def _open(url: str, part: pathlib.Path, have: int, timeout: float):
    """The server's answer, or None where the part file is whole already."""
    request = urllib.request.Request(url, headers={"User-Agent": "keras3-resnet"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing behind our last byte: whole, or not this file
            if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(have):
                return None
            part.unlink(missing_ok=True)
        raise _NetworkError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise _NetworkError(str(reason)) from error


def _copy(response, file: IO[bytes], show: Callable | None, done: int, total: int | None) -> None:
    while True:
        try:
            block = response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:  # the connection's, not the disk's
            raise _NetworkError(f"the connection broke at {done:,} bytes: {error}") from error
        if not block:
            break
        file.write(block)
        done += len(block)
        if show is not None:
            show(done, total)
    if total is not None and done < total:
        raise _NetworkError(f"the connection ended at {done:,} of {total:,} bytes")
