"""torchvision's published files: which there are, and how one gets onto this machine, whole."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

import platformdirs

from keras_resnet.errors import CheckpointError, InputError, did_you_mean
from keras_resnet.preprocess import Preprocess

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

__all__ = [
    "TorchvisionWeights",
    "cache_folder",
    "file_sha256",
    "imagenet_class_names",
    "is_quantised",
    "is_tag",
    "published_by_torchvision",
    "registry",
    "resolve_weights",
    "weights_path",
]

_HERE = pathlib.Path(__file__).parent
_CHUNK = 1 << 20
_ATTEMPTS = 5
_TAG = re.compile(r"(default|imagenet|imagenet1k\w*)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class TorchvisionWeights:
    """One of torchvision's weight files.

    Attributes:
        model: The variant's name.
        tag: `"IMAGENET1K_V1"` or `"IMAGENET1K_V2"`.
        is_default: What `"DEFAULT"` means for the variant.
        url: Where torchvision publishes the file.
        file_name: Its name, which ends in the first eight hex digits of its sha256.
        sha256_prefix: Those digits.
        acc1: Published top-1 accuracy on ImageNet's validation set, per cent.
        acc5: Published top-5 accuracy, per cent.
        resize_size: Short side before the crop, pixels.
        crop_size: Side of the centre crop, pixels.
        interpolation: How pictures are resized.
        mean: Means that are subtracted, in 0..1.
        std: Standard deviations that are divided by, in 0..1.
        num_params: Parameters.
        gflops: Multiply-adds of one picture at `crop_size`, in units of 1e9.
        file_size_mb: Size, MiB.
        recipe: Name of the training recipe.
        num_classes: Classes, ImageNet's 1000.
    """

    model: str
    tag: str
    is_default: bool
    url: str
    file_name: str
    sha256_prefix: str
    acc1: float
    acc5: float
    resize_size: int
    crop_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_params: int
    gflops: float
    file_size_mb: float
    recipe: str
    num_classes: int = 1000

    @property
    def preprocess(self) -> Preprocess:
        """The evaluation preset that the accuracies were measured with."""
        return Preprocess(
            resize_size=self.resize_size,
            crop_size=self.crop_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads((_HERE / "torchvision.json").read_text(encoding="utf-8"))


@functools.cache
def registry() -> tuple[TorchvisionWeights, ...]:
    """The files that torchvision publishes for the variants of this package, 18 of them.

    Examples:
        >>> [w.tag for w in registry() if w.model == "resnet50"]
        ['IMAGENET1K_V1', 'IMAGENET1K_V2']
    """
    names = {field.name for field in dataclasses.fields(TorchvisionWeights)}
    return tuple(
        TorchvisionWeights(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in row.items()
                if name in names
            }
        )
        for row in _data()["weights"]
    )


@functools.cache
def _imagenet_class_names() -> tuple[str, ...]:
    return tuple(json.loads((_HERE / "imagenet_classes.json").read_text(encoding="utf-8")))


def imagenet_class_names() -> list[str]:
    """The names of ImageNet's 1000 classes, in the order of torchvision's outputs.

    Examples:
        >>> imagenet_class_names()[281:283]
        ['tabby', 'tiger cat']
    """
    return list(_imagenet_class_names())


def is_tag(text: str) -> bool:
    """Whether a text is meant as a tag (`"DEFAULT"`, `"IMAGENET1K_V2"`) and not as a path.

    Raises:
        InputError: It is neither: no tag, no file, and without the extension of one.
    """
    if _TAG.fullmatch(text):
        return True
    if not os.path.splitext(text)[1] and not os.path.exists(os.path.expanduser(text)):
        raise InputError(
            f"weights={text!r} is neither a file nor one of DEFAULT, IMAGENET1K_V1 and "
            f"IMAGENET1K_V2.{did_you_mean(text, ['default', 'imagenet1k_v1', 'imagenet1k_v2'])}"
        )
    return False


def resolve_weights(variant: str, tag: str = "DEFAULT") -> TorchvisionWeights:
    """The published file of a variant by its tag.

    Args:
        variant: A name out of `list_models()`.
        tag: `"IMAGENET1K_V1"`, `"IMAGENET1K_V2"`, or `"DEFAULT"` (`"imagenet"` is the same) for
            the one that torchvision recommends. Upper and lower case are the same.

    Raises:
        InputError: There is no such file for the variant, or it is a quantised one.

    Examples:
        >>> resolve_weights("resnet50").file_name
        'resnet50-11ad3fa6.pth'
    """
    wanted = str(tag).upper()
    rows = {row.tag: row for row in registry() if row.model == variant}
    if is_quantised(tag):
        raise InputError(
            f"{tag!r} is quantised to 8 bits and cannot be imported. "
            f"Use {' or '.join(rows) or 'other weights'}."
        )
    if not rows:
        known = dict.fromkeys(row.model for row in registry())
        raise InputError(
            f"torchvision publishes no weights for {variant!r}.{did_you_mean(variant, known)} "
            f"There are files for {', '.join(known)}."
        )
    if wanted in ("DEFAULT", "IMAGENET"):
        return next(row for row in rows.values() if row.is_default)
    if wanted not in rows:
        near = did_you_mean(tag, ["default", *(name.lower() for name in rows)])
        raise InputError(
            f"{variant} has no weights {tag!r}.{near} There are: {', '.join(rows)}, DEFAULT."
        )
    return rows[wanted]


def published_by_torchvision(sha256: str) -> TorchvisionWeights | None:
    """The published file with this sha256, whatever it is called here.

    torchvision writes the first eight digits into the name. Its older files of the same models
    hold the same weights in older formats, and count as the V1 they became.

    Args:
        sha256: 64 hex digits, or at least the first eight.
    """
    for row in registry():
        if sha256.startswith(row.sha256_prefix):
            return row
    for model, name in _data()["older_file_names_still_in_caches"].items():
        if sha256.startswith(pathlib.Path(name).stem.rpartition("-")[2]):
            return resolve_weights(model, "IMAGENET1K_V1")
    return None


def is_quantised(name: str) -> bool:
    """Whether a file name is that of one of torchvision's 8-bit files, which cannot be imported."""
    return name in _data()["quantized_not_importable"] or "fbgemm" in name.lower()


# --- Files on this machine ----------------------------------------------------------------------


def cache_folder() -> pathlib.Path:
    """Where downloaded weights lie: below `KERAS_RESNET_HOME`, else the platform's cache folder."""
    home = os.environ.get("KERAS_RESNET_HOME")
    home = pathlib.Path(home).expanduser() if home else platformdirs.user_cache_path("keras_resnet")
    return pathlib.Path(home) / "weights"


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
        with _locked(folder / f"{entry.file_name}.lock"):
            # Whoever held the lock before may have fetched it.
            if not (target.is_file() and file_sha256(target).startswith(entry.sha256_prefix)):
                _download(entry, url, target, progress, timeout)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {entry.file_name} into {folder}: {error.strerror or error}. Set "
            "KERAS_RESNET_HOME to a folder with room."
        ) from error
    return target


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock that the system takes back when the process dies."""
    with open(path, "a+b") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            file.seek(0)
            while True:  # LK_LOCK gives up after ten seconds
                with contextlib.suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        yield  # closing the file gives the lock back


class _NetworkError(Exception):
    """A connection that could not be made, or that ended too early."""


def _download(
    entry: TorchvisionWeights, url: str, target: pathlib.Path, progress: bool, timeout: float
) -> None:
    part = target.with_name(f"{target.name}.part")
    bar = _Bar(entry.file_name, progress and sys.stderr.isatty())
    failures = 0
    try:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _fetch(url, part, bar, timeout)
                break
            except _NetworkError as error:
                after = part.stat().st_size if part.exists() else 0
                # Tries that brought something do not count: a bad line gets there in the end.
                failures = failures + 1 if after <= before else 0
                code = getattr(error.__cause__, "code", 0)
                permanent = 400 <= code < 500 and code not in (408, 416, 429)
                if permanent or failures >= _ATTEMPTS:
                    raise CheckpointError(
                        f"Cannot download {url}: {error}. Fetch it by hand and put it at {target}."
                    ) from error
                time.sleep(min(0.1 * 2**failures, 2.0))
    finally:
        bar.close()
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


def _fetch(url: str, part: pathlib.Path, bar: _Bar, timeout: float) -> None:
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
            _copy(response, file, bar, have, total)


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


def _copy(response, file: IO[bytes], bar: _Bar, done: int, total: int | None) -> None:
    while True:
        try:
            block = response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:  # the connection's, not the disk's
            raise _NetworkError(f"the connection broke at {done:,} bytes: {error}") from error
        if not block:
            break
        file.write(block)
        done += len(block)
        bar.show(done, total)
    if total is not None and done < total:
        raise _NetworkError(f"the connection ended at {done:,} of {total:,} bytes")


class _Bar:
    """A progress bar of one line."""

    def __init__(self, name: str, visible: bool):
        self.name, self.visible, self.drawn = name, visible, False
        self.started, self.first, self.last = time.monotonic(), None, 0.0

    def show(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done  # what a former call fetched says nothing about the speed
        if not self.visible or (now - self.last < 0.1 and done != total):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.started, 1e-3)
        text = f"{self.name}  {done / 2**20:.1f}"
        if total:
            filled = "#" * int(20 * done / total)
            left = (total - done) / rate if rate else 0
            text += f"/{total / 2**20:.1f} MiB  [{filled:<20}] {done / total:4.0%}  {left:.0f} s"
        else:
            text += " MiB"
        width = shutil.get_terminal_size().columns - 1
        text = f"{text}  {rate / 2**20:.1f} MiB/s"
        sys.stderr.write(f"\r{text[:width]:<{width}}")
        sys.stderr.flush()
        self.drawn = True

    def close(self) -> None:
        if self.drawn:
            sys.stderr.write("\n")
