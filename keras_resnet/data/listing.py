"""The images of class folders as one sequence that stays small, and that is listed once.

A million paths as texts are 150 MB. Here each name lies once in one text, and its folder's apart.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet.data.folders import (
    UNREADABLE,
    class_pictures,
    existing_folder,
    no_images,
    split_folders,
)
from keras_resnet.data.items import Source, absolute
from keras_resnet.data.walk import IMG_EXTENSIONS, left_out
from keras_resnet.system.errors import DataError, InputError
from keras_resnet.system.files import cache_home, replace_file

_FORM = 1  # of a list that is kept
_MANY = 50_000  # images, from which on a list is kept
_MOUNTS = "/proc/self/mountinfo"
_SETTLED = 10.0  # seconds after which the times of a folder tell its changes: systems round them


class Listed(Source):
    """The images of class folders, class by class; arguments and errors as of `class_pictures`."""

    def __init__(self, directory: str, exclude: Any = None, others: Counter | None = None):
        directory = existing_folder(directory)
        self.place = os.path.abspath(directory)
        kept = _kept(directory)
        facts, self._names = kept or _listed(directory)
        if kept:  # shared disks may not tell every change
            count = sum(facts["counts"])
            made = f"by the list of {facts['made']}, which train --restart makes anew"
            self.notes = (f"{self.place}: {count:,} images, {made}.",)
        self._folders = [os.path.join(directory, path) for path in facts["folders"]]
        self._starts = np.cumsum([0, *facts["counts"]])  # of the folders
        self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)  # of the names
        self._at: np.ndarray | None = None  # which of them; all
        self.class_names = facts["classes"]
        self.labels = np.repeat(np.asarray(facts["labels"], np.int32), facts["counts"])
        if others is not None:
            others.update({(ending, why): count for ending, why, count in facts["others"]})
        if out := left_out(directory, exclude):
            kept = [i for i, path in enumerate(self) if os.path.abspath(path) not in out]
            if not kept:
                raise no_images(directory, self.class_names, {})
            self.__dict__.update(self.take(np.asarray(kept, np.int64)).__dict__)

    def __len__(self) -> int:
        return len(self._ends) if self._at is None else len(self._at)

    def name(self, index: int) -> str:
        """Its path."""
        at = index if self._at is None else int(self._at[index])
        folder = self._folders[int(np.searchsorted(self._starts, at, "right")) - 1]
        name = self._names[int(self._ends[at - 1]) + 1 if at else 0 : int(self._ends[at])]
        return os.path.join(folder, name.decode("utf-8", "surrogateescape"))

    _item = name  # a path is its own address

    def take(self, positions: np.ndarray) -> Source:
        """Some of the images."""
        part = copy.copy(self)
        part._at = np.asarray(positions) if self._at is None else self._at[positions]
        part.labels = self.labels[positions]
        return part

    def texts(self) -> Iterator[bytes]:
        """The absolute paths with a zero byte between, in pieces of any length."""
        at = np.arange(len(self)) if self._at is None else self._at
        folders = np.searchsorted(self._starts, at, "right") - 1
        # Neighbours in one folder are a piece.
        for number, some in enumerate(np.split(at, np.flatnonzero(np.diff(folders)) + 1)):
            folder = int(np.searchsorted(self._starts, some[0], "right")) - 1
            first, last = self._starts[folder : folder + 2].tolist()
            start = int(self._ends[first - 1]) + 1 if first else 0
            names = self._names[start : int(self._ends[last - 1])].split(b"\0")
            way = os.path.join(os.path.abspath(self._folders[folder]), "")
            before = b"\0" + way.encode("utf-8", "surrogateescape")
            yield b"".join([before + names[i] for i in (some - first).tolist()])[not number :]

    def _which(self) -> str:
        whole = hashlib.sha256()
        for piece in self.texts():
            whole.update(piece)
        return whole.hexdigest()


def _listed(directory: str) -> tuple[dict[str, Any], bytes]:
    """What is in class folders, and the names of the images, each with a zero byte behind it."""
    began, others = time.time(), Counter[tuple[str, str]]()
    classes, found = class_pictures(directory, others=others)
    facts: dict[str, Any] = {"folders": [], "counts": [], "labels": [], "classes": classes}
    pieces = []
    for label, folder, names in found:
        facts["folders"].append(os.path.relpath(folder, directory))
        facts["counts"].append(len(names))
        facts["labels"].append(label)
        pieces.append("".join([f"{name}\0" for name in names]).encode("utf-8", "surrogateescape"))
    facts["others"] = [[ending, why, count] for (ending, why), count in others.items()]
    text = b"".join(pieces)
    if sum(facts["counts"]) >= _MANY:
        with contextlib.suppress(OSError, InputError, DataError):
            facts["times"] = _times(directory, facts["folders"])
            settled = max(map(max, facts["times"])) < (began - _SETTLED) * 1e9
            # A folder that cannot be read for a moment has the same times when it can.
            if settled and all(why != UNREADABLE for _, why in others):
                _keep(os.path.abspath(directory), facts, text)
    return facts, text


def fingerprint(*lists: Sequence[str]) -> str:
    """A hash of which images these are: of files their absolute paths, as of a list of them."""
    whole = hashlib.sha256()
    for number, paths in enumerate(lists):
        whole.update(b"\n" if number else b"")
        if isinstance(paths, Listed):
            for piece in paths.texts():
                whole.update(piece)
        else:
            text = paths.digest() if isinstance(paths, Source) else "\0".join(map(absolute, paths))
            whole.update(text.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _times(directory: str, folders: list[str]) -> list[list[int]]:
    """When each folder, and the one above, was changed last: whatever is added to it or taken.

    Raises:
        OSError: One cannot be read, or lies where times need not tell it: buckets and others
            that FUSE mounts.
    """
    states = [os.stat(os.path.join(directory, folder)) for folder in ("", *folders)]
    if _by_fuse() & {state.st_dev for state in states}:
        raise OSError("its folders may keep their times")
    return [[state.st_mtime_ns, state.st_ctime_ns] for state in states]


def _by_fuse() -> set[int]:
    """The devices of what FUSE has mounted, on Linux."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(_MOUNTS).read_text(errors="replace").splitlines():
            before, _, kind = line.partition(" - ")  # proc(5): ... major:minor ... - type ...
            if kind.startswith("fuse"):
                found.add(os.makedev(*map(int, before.split()[2].split(":"))))
    return found


def _path(place: str) -> Path:
    name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_home() / "folders" / f"{name[:32]}.list"


def _keep(place: str, facts: dict[str, Any], text: bytes) -> None:
    path = _path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"form": _FORM, "place": place, "size": len(text), "kinds": list(IMG_EXTENSIONS)}
    head = json.dumps({**about, "made": time.strftime("%Y-%m-%d %H:%M"), **facts}).encode()
    content = head + b"\n" + zlib.compress(text, 1)
    replace_file(path, lambda name: Path(name).write_bytes(content))


def forget(directory: str | os.PathLike) -> None:
    """Has a folder of images, or of parts, listed anew."""
    directory = os.path.expanduser(os.fspath(directory))
    parts = split_folders(directory) if os.path.isdir(directory) else {}
    for folder in (directory, *parts.values()):
        with contextlib.suppress(OSError):
            _path(os.path.abspath(folder)).unlink()


def _kept(directory: str) -> tuple[dict[str, Any], bytes] | None:
    """The list of a folder that is still right: none of its folders has changed since."""
    place = os.path.abspath(directory)
    try:
        with open(_path(place), "rb") as file:
            facts = json.loads(file.readline())
            if (facts["form"], facts["place"]) != (_FORM, place):
                return None
            # With another plug-in or version there are more kinds of images.
            if facts["kinds"] != list(IMG_EXTENSIONS) or not isinstance(facts["made"], str):
                return None
            if facts["times"] != _times(directory, facts["folders"]):
                return None
            text = zlib.decompress(file.read())
        right = len(text) == facts["size"] and text.count(b"\0") == sum(facts["counts"])
        return (facts, text) if right else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, zlib.error):  # made anew
        return None
