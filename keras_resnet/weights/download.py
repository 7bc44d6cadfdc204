"""Published weight files: fetched once, checked, kept."""

from __future__ import annotations

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
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from keras_resnet.system.errors import CheckpointError
from keras_resnet.system.files import cache_home
from keras_resnet.weights.published import TorchvisionWeights

_CHUNK = 1 << 20
_ATTEMPTS = 5


# --- Files on this machine ----------------------------------------------------------------------


def cache_folder() -> pathlib.Path:
    """Where downloaded weights lie: below `KERAS_RESNET_HOME`, else the platform's cache folder."""
    return cache_home() / "weights"


def _torch_cache() -> pathlib.Path:
    # torch/hub.py, _get_torch_home.
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return pathlib.Path(home).expanduser() / "hub" / "checkpoints"


def file_sha256(path: str | os.PathLike) -> str:
    """A file's sha256 in 64 hex digits; remembered until the file changes."""
    facts = os.stat(path)
    return _file_sha256(os.path.abspath(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)


@functools.lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, modified: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(
    entry: TorchvisionWeights, *, cache: str | os.PathLike | None = None
) -> pathlib.Path | None:
    """The file of some published weights where it is on this machine and whole; never fetched."""
    folder = pathlib.Path(cache).expanduser() if cache else cache_folder()
    for path in (folder / entry.file_name, _torch_cache() / entry.file_name):
        if path.is_file() and file_sha256(path).startswith(entry.sha256_prefix):
            return path
    return None


def weights_path(
    entry: TorchvisionWeights,
    *,
    cache: str | os.PathLike | None = None,
    url: str | None = None,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = _ATTEMPTS,
) -> pathlib.Path:
    """The file of some published weights, downloaded if it is not here yet.

    Looked for in the cache folder and in torch's; each time the sha256 is compared with the name.
    A download goes to a `.part` file, which a later call continues, and gets its final name when
    it is whole and right. Processes that want the same file wait for the one that fetches it.

    Args:
        entry: Out of `resolve_weights` or `registry`.
        cache: Folder to keep it in; by default `cache_folder()`.
        url: Where to fetch it instead of `entry.url`. The environment variable
            `KERAS_RESNET_WEIGHTS_URL` replaces the part before the file's name for all.
        progress: A progress bar on stderr, where that is a terminal.
        timeout: Seconds without a byte after which a connection counts as dead.
        attempts: Connections in a row that bring nothing, before it is given up.

    Raises:
        CheckpointError: The network failed (the message says what to fetch by hand, and where to
            put it), the bytes are not the published ones, or the disk refused.

    Examples:
        >>> weights_path(resolve_weights("resnet18"))  # doctest: +SKIP
        PosixPath('.../keras_resnet/weights/resnet18-f37072fd.pth')
    """
    folder = pathlib.Path(cache).expanduser() if cache else cache_folder()
    target = folder / entry.file_name
    found = local_path(entry, cache=folder)
    if found is not None:
        return found
    base = os.environ.get("KERAS_RESNET_WEIGHTS_URL")
    if url is None:
        url = f"{base.rstrip('/')}/{entry.file_name}" if base else entry.url
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f"{entry.file_name}.lock"):
            # Whoever held the lock before may have fetched it.
            if not (target.is_file() and file_sha256(target).startswith(entry.sha256_prefix)):
                _download(entry, url, target, progress, timeout, attempts)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {entry.file_name} into {folder}: {error.strerror or error}. Set "
            "KERAS_RESNET_HOME to a folder with room."
        ) from error
    return target


class _NetworkError(Exception):
    """A connection that could not be made, or that ended too early."""


def _download(
    entry: TorchvisionWeights,
    url: str,
    target: pathlib.Path,
    progress: bool,
    timeout: float,
    attempts: int,
) -> None:
    part = target.with_name(f"{target.name}.part")
    failures = 0
    columns = (
        TextColumn("{task.description}"), DownloadColumn(binary_units=True), BarColumn(20),
        TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task(entry.file_name, total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _fetch(url, part, show, timeout)
                break
            except _NetworkError as error:
                after = part.stat().st_size if part.exists() else 0
                # Tries that brought something do not count: a bad line gets there in the end.
                failures = failures + 1 if after <= before else 0
                code = getattr(error.__cause__, "code", 0)
                permanent = 400 <= code < 500 and code not in (408, 416, 429)
                if permanent or failures >= attempts:
                    raise CheckpointError(
                        f"Cannot download {url}: {error}. Fetch it by hand and put it at {target}."
                    ) from error
                time.sleep(min(0.1 * 2**failures, 2.0))
    found = file_sha256(part)
    if not found.startswith(entry.sha256_prefix):
        size = part.stat().st_size
        part.unlink()
        raise CheckpointError(
            f"{url} gave {size:,} bytes whose sha256 begins with {found[:8]}, not with "
            f"{entry.sha256_prefix}; they were deleted. Try again, or fetch the file from "
            f"{entry.url} by hand and put it at {target}."
        )
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)


def _fetch(url: str, part: pathlib.Path, show: Callable, timeout: float) -> None:
    """Appends to the part file what is missing, or starts afresh where the server cannot."""
    have = part.stat().st_size if part.exists() else 0
    response = _open(url, part, have, timeout)
    if response is None:
        return
    with response:
        resumed = have and _continues(response, have)
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
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


def _continues(response, have: int) -> bool:
    span = response.headers.get("Content-Range", "")
    return response.status == 206 and span.startswith(f"bytes {have}-")


def _copy(response, file: IO[bytes], show: Callable, done: int, total: int | None) -> None:
    while True:
        try:
            block = response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:  # the connection's, not the disk's
            raise _NetworkError(f"the connection broke at {done:,} bytes: {error}") from error
        if not block:
            break
        file.write(block)
        done += len(block)
        show(done, total)
    if total is not None and done < total:
        raise _NetworkError(f"the connection ended at {done:,} of {total:,} bytes")
