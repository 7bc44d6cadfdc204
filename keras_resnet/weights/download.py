"""Published weight files: fetched once, checked, kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.client
import json
import math
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, Any

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

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.system.errors import (
    CheckpointError,
    InputError,
    KerasResNetError,
    between,
    reason_of,
    require,
    whole,
)
from keras_resnet.system.files import cache_home
from keras_resnet.weights import published
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


# --- Hugging Face's hub -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HubFile:
    """Weights of a repository on the hub, and what its config.json says of them.

    Attributes:
        path: The file, in the hub's own cache.
        label: Repository and commit.
        variant: The network's name at timm, or `None`.
        images: Side, crop fraction, interpolation, mean and deviation; `None` where it does not
            say.
        test_side: A larger side at which images are not cropped, or `None`.
        class_names: In order, or `None`.
        strides: Where the bottlenecks stride, or `None`.
    """

    path: pathlib.Path
    label: str
    variant: str | None = None
    images: dict[str, Any] | None = None
    test_side: int | None = None
    class_names: list[str] | None = None
    strides: str | None = None

    def preprocess(self, side: int | None) -> Preprocess | None:
        """How images are prepared for a model of this side (its own by default).

        As timm's `transforms_imagenet_eval`: the crop's fraction stays, the size is the model's.
        """
        if self.images is None:
            return None
        options = dict(self.images)
        own, fraction = options.pop("side"), options.pop("crop_pct")
        side = side or own
        fraction = 1.0 if side == self.test_side else fraction
        return Preprocess(resize_size=math.floor(side / fraction), crop_size=side, **options)


def hub_file(text: str) -> HubFile:
    """Weights by their name on Hugging Face's hub, safetensors before pickles.

    huggingface_hub does the work, so its cache, `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_ENDPOINT`
    count.

    Args:
        text: `"timm/resnet50.a1_in1k"`, `"hf://ORG/NAME"`, `"hf://ORG/NAME@REVISION"`.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        CheckpointError: There is no such repository, revision or file, or no connection.
    """
    require("huggingface_hub", "hub", f"weights={text!r}")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    repo, revision = published.hub_name(text) or (text, None)
    fetch = functools.partial(huggingface_hub.hf_hub_download, repo)
    path, missing = None, None
    try:
        for name in ("model.safetensors", "pytorch_model.bin"):
            try:
                path = pathlib.Path(fetch(name, revision=revision))
                break
            except EntryNotFoundError as error:
                missing = error
        if path is None:
            why = reason_of(missing) if missing else ""
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                why = "the cache does not have it, and HF_HUB_OFFLINE is set"
            raise CheckpointError(
                f"Cannot fetch {text!r}: neither model.safetensors nor pytorch_model.bin: {why}"
            )
        commit = path.parent.name
        try:
            config = _read_config(pathlib.Path(fetch("config.json", revision=commit)))
        except EntryNotFoundError:
            config = {}
    except (OSError, ValueError) as error:
        if isinstance(error, KerasResNetError):
            raise
        raise CheckpointError(f"Cannot fetch {text!r}: {reason_of(error)}") from error
    return HubFile(path, f"{repo}@{commit[:12]}", **_told(config, repo))


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _CHUNK:
            raise ValueError("more than a megabyte")
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Its config.json cannot be read: {reason_of(error)}") from error


def _told(config: dict[str, Any], repo: str) -> dict[str, Any]:
    """What a config.json of timm or transformers says, as `HubFile` has it."""
    if config.get("model_args"):
        raise CheckpointError(
            f"{repo} was built with options of its own, {list(config['model_args'])[:5]}: timm's "
            "model of that name would answer differently."
        )
    cfg = config.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else config  # timm before 0.9
    told: dict[str, Any] = {"variant": config.get("architecture")}
    if "input_size" in cfg and cfg.get("crop_mode", "center") == "center":
        try:
            options = {name: cfg[name] for name in ("interpolation", "mean", "std")}
            side = whole("input_size", cfg["input_size"][-1], 1)
            fraction = between("crop_pct", cfg.get("crop_pct", 0.875), 0.1, 1)
            told["images"] = {"side": side, "crop_pct": fraction, **options}
            HubFile(pathlib.Path(), repo, images=told["images"]).preprocess(None)
            if cfg.get("test_input_size") and cfg.get("test_crop_pct") == 1:
                told["test_side"] = whole("test_input_size", cfg["test_input_size"][-1], 1)
        except (LookupError, TypeError, InputError) as error:
            raise CheckpointError(f"{repo}'s config.json: {reason_of(error)}") from error
    names = config.get("label_names") or cfg.get("label_names")
    labels = config.get("id2label")
    if isinstance(labels, dict):
        names = [labels.get(str(i)) for i in range(len(labels))]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        told["class_names"] = names
    elif repo.startswith("timm/") and repo.endswith("_in1k"):
        told["class_names"] = published.imagenet_class_names()
    if isinstance(told["variant"], str):
        told["strides"] = "3x3"
    elif config.get("model_type") == "resnet":  # of transformers
        told["strides"] = "1x1" if config.get("downsample_in_bottleneck") else "3x3"
    return told


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
