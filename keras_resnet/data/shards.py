"""Tar archives of images, as WebDataset lays them out: read at random, after one look through each.

The look (headers alone are read) leaves a small index beside the archive, which counts as long as
the archive has the same size and time. Nothing is unpacked. An archive is somebody else's file, so
of each entry name, kind, place and size are checked, and once more when an image is read.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from keras_resnet.data.folders import listed, split_of
from keras_resnet.data.items import Source
from keras_resnet.data.labels import numbered
from keras_resnet.data.tar_entries import entries, read_at
from keras_resnet.data.walk import extension, is_litter, is_picture
from keras_resnet.system.errors import DataError, InputError, NotFoundError, meant_path
from keras_resnet.system.files import cache_home, replace_file
from keras_resnet.system.process import default_threads

INDEX = ".index"  # behind a shard's name
_MAGIC = b'{"keras_resnet": 2, '  # how an index begins; the number is that of its form
_LABEL = 2**16  # bytes of a label, at most

_MANY = 32  # shards without an index, from which on processes share the work: Python has one lock
_CHILD = """
import contextlib, json, sys
from keras_resnet.data.shards import open_shard
for path in json.load(sys.stdin.buffer):
    with contextlib.suppress(Exception):
        open_shard(path)
"""

_FIELDS = {"start": "<i8", "size": "<i4", "end": "<i4", "label": "<i4", "folder": "<i4"}


# --- names of shards -----------------------------------------------------------------------------


def is_shards(path: str) -> bool:
    """Whether a path is called as shards are (also a pattern), or is a folder of nothing else."""
    if not os.path.isdir(path):
        return path.lower().endswith(".tar")
    found = False
    with contextlib.suppress(OSError), os.scandir(path) as found_there:
        for entry in found_there:
            name = entry.name.lower()
            if name.endswith(".tar"):
                found = True
            elif not is_litter(name) and not name.endswith((INDEX, ".txt", ".json", ".md")):
                return False
    return found


def shard_paths(path: str) -> list[str]:
    """The shards that a name, a pattern (`*`, `{000..099}`, `{a,b}`) or a folder stands for.

    Raises:
        NotFoundError: One of them is not there.

    Examples:
        >>> _expanded("train-{08..10}.tar")
        ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.lower().endswith(".tar"))
        return [os.path.join(path, name) for name in names if not is_litter(name)]
    if os.path.exists(path):
        return [path]
    found = []
    for one in _expanded(path):
        matches = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        matches = [match for match in matches if os.path.exists(match)]
        if not matches:
            raise NotFoundError(f"There is no shard {one!r}.{meant_path(one)}")
        found += matches
    return found


def _expanded(pattern: str) -> list[str]:
    parts: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", text)
        if span:
            first, last = int(span[1]), int(span[2])
            if not 0 <= last - first < 100_000:
                raise InputError(f"A range of shards rises, by 100,000 at most. Received: {text!r}")
            parts.append([f"{i:0{len(span[1])}}" for i in range(first, last + 1)])
        else:
            several = text.startswith("{") and "," in text
            parts.append(text[1:-1].split(",") if several else [text])
    return ["".join(chosen) for chosen in itertools.islice(itertools.product(*parts), 100_000)]


# --- one shard -----------------------------------------------------------------------------------


class _Shard:
    """What is in one archive: an array a field of `_FIELDS`, and all names in one text."""

    def __init__(self, path: str, facts: dict[str, Any], names: bytes, table: dict[str, Any]):
        self.path, self.facts, self.names, self.table = path, facts, names, table

    def __len__(self) -> int:
        return len(self.table["start"])

    def name(self, index: int) -> str:
        ends = self.table["end"]
        first = int(ends[index - 1]) if index else 0
        return self.names[first : int(ends[index])].decode("utf-8", "surrogateescape")

    def find(self, name: str) -> int | None:
        """The number of an image by its name."""
        data, at = name.encode("utf-8", "surrogateescape"), -1
        while (at := self.names.find(data, at + 1)) >= 0:
            index = int(np.searchsorted(self.table["end"], at, "right"))
            if self.name(index) == name:
                return index
        return None

    def read(self, index: int) -> bytes:
        start, size = int(self.table["start"][index]), int(self.table["size"][index])
        shown = f"{self.path}/{self.name(index)}"
        with _open(self.path) as file:
            if _state(file) != self.facts["state"]:
                raise DataError(f"{shown!r} cannot be read: the archive has changed since.")
            try:
                data = read_at(file, start, size)
            except OSError as error:
                raise DataError(f"{shown!r} cannot be read: {error.strerror}.") from error
        if len(data) < size:
            raise DataError(f"{shown!r} cannot be read: the archive is cut off.")
        return data


def _open(path: str) -> IO[bytes]:
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise NotFoundError(f"{path!r} does not exist.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened: {error}") from error
    raise DataError(f"{path!r} is no file: a tar archive is needed.")


def _state(file: IO[bytes]) -> list[int]:
    state = os.fstat(file.fileno())
    return [state.st_size, state.st_mtime_ns]


def _looked_through(path: str) -> _Shard:
    """A shard by its headers."""
    skipped: Counter[str] = Counter()
    images: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    seen: set[str] = set()
    with _open(path) as file:
        state = _state(file)
        if read_at(file, 0, 2) == b"\x1f\x8b":
            raise DataError(f"{path!r} is compressed: unpack it with gunzip, and give the .tar.")
        try:
            for name, start, size in entries(file, state[0], skipped):
                base = name.rpartition("/")[2]
                if base.endswith(".cls"):
                    if size > _LABEL:
                        raise ValueError(f"{name!r} has {size:,} bytes, a label {_LABEL:,} at most")
                    text = read_at(file, start, size)
                    labels[name[:-4]] = text.decode("utf-8", "replace").strip()
                elif not is_picture(base):
                    skipped[extension(name)] += not is_litter(base)
                elif name in seen:
                    skipped["a name that is there twice"] += 1
                else:
                    seen.add(name)
                    images.append((name, start, size))
        except ValueError as error:
            raise DataError(f"The tar archive {path!r} cannot be read: {error}.") from error
    if labels:  # of a sample, 1.jpg has the label 1.cls; what is 1.mask.png has none
        kept = [one for one in images if not _is_further(one[0], labels)]
        skipped["a further image of a sample"] += len(images) - len(kept)
        images = kept
    names = [name.encode("utf-8", "surrogateescape") for name, _, _ in images]
    texts = [labels.get(name[: name.rfind(".")]) for name, _, _ in images]
    folders = [name.partition("/")[0] if "/" in name else None for name, _, _ in images]
    table = {
        "start": [start for _, start, _ in images],
        "size": [size for _, _, size in images],
        "end": np.cumsum([len(name) for name in names]),
    }
    facts: dict[str, Any] = {"state": state, "skipped": dict(+skipped)}
    for field, values in (("label", texts), ("folder", folders)):
        known = sorted({value for value in values if value})
        codes = {value: i for i, value in enumerate(known)}
        facts[field] = known
        table[field] = [codes.get(value, -1) for value in values]
    arrays = {field: np.asarray(table[field], kind) for field, kind in _FIELDS.items()}
    return _Shard(path, facts, b"".join(names), arrays)


def _is_further(name: str, labels: dict[str, str]) -> bool:
    folder, slash, base = name.rpartition("/")
    if base.count(".") < 2:
        return False
    first = folder + slash + base.partition(".")[0]
    return name[: name.rfind(".")] not in labels and first in labels


# --- the index -----------------------------------------------------------------------------------


def _index_paths(path: str) -> list[str]:
    name = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()
    return [path + INDEX, str(cache_home() / "shards" / (name[:32] + INDEX))]


def open_shard(path: str) -> _Shard:
    """A shard by its index, which is made where there is none that counts."""
    with _open(path) as file:
        state = _state(file)
    places = _index_paths(path)
    for place in places:
        try:
            return _from_index(path, place, state)
        except Exception:  # whatever it is, an index can be made anew
            continue
    shard = _looked_through(path)

    def write(name: str) -> None:
        with open(name, "wb") as file:
            facts = json.dumps({"count": len(shard), **shard.facts})
            file.write(_MAGIC + facts.encode()[1:] + b"\n")
            for array in shard.table.values():
                file.write(array.tobytes())
            file.write(shard.names)

    for place in places:
        with contextlib.suppress(OSError, InputError, DataError):
            if not _may_replace(place):  # somebody else's file
                continue
            if place == places[1]:
                os.makedirs(os.path.dirname(place), exist_ok=True)
            replace_file(place, write)
            break
    return shard


def _index_beside(paths: Sequence[str]) -> None:
    """Has processes beside this one make the indexes that are missing, where those are many.

    What they cannot make is made, or said, by `open_shard`.
    """
    new = [path for path in paths if not any(map(os.path.exists, _index_paths(path)))]
    count = default_threads()
    if len(new) < _MANY or count < 2 or not sys.executable:
        return
    ways = os.pathsep.join(way or os.getcwd() for way in sys.path)

    def index(some: list[str]) -> None:
        words, env = [sys.executable, "-c", _CHILD], {**os.environ, "PYTHONPATH": ways}
        subprocess.run(words, input=json.dumps(some).encode(), capture_output=True, env=env)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(index, (new[i::count] for i in range(count))))


def _may_replace(place: str) -> bool:
    if not os.path.lexists(place):
        return True
    with _open(place) as file:
        begins = file.read(len(_MAGIC))
    return not begins or begins.startswith(_MAGIC.partition(b":")[0])


def _from_index(path: str, place: str, state: list[int]) -> _Shard:
    """A shard by an index, of which nothing is taken on trust; ValueError where it is none."""
    with _open(place) as raw, io.BufferedReader(raw) as file:  # type: ignore[arg-type]
        line = file.readline(2**24)
        if not line.startswith(_MAGIC):
            raise ValueError
        facts = json.loads(line)
        del facts["keras_resnet"]
        if facts["state"] != state:
            raise ValueError
        count, table = int(facts.pop("count")), {}
        for field, kind in _FIELDS.items():
            size = count * np.dtype(kind).itemsize
            if not 0 <= size <= state[0]:
                raise ValueError
            table[field] = np.frombuffer(file.read(size), kind)
        names = file.read()
    ends, starts, sizes = table["end"], table["start"], table["size"]
    right = all(len(array) == count for array in table.values())
    if count and right:
        right = bool(
            (np.diff(ends, prepend=0) > 0).all() and ends[-1] == len(names)
            and starts.min() >= 512 and sizes.min() >= 0 and (starts + sizes).max() <= state[0]
        )  # fmt: skip
    for field in ("label", "folder"):
        right = right and all(isinstance(text, str) for text in facts[field])
        right = right and bool((table[field] < len(facts[field])).all())
        right = right and bool((table[field] >= -1).all())
    skipped = facts["skipped"]
    if not right or not all(isinstance(n, int) for n in skipped.values()):
        raise ValueError
    return _Shard(path, facts, names, table)


# --- all of them ---------------------------------------------------------------------------------


class Shards(Source):
    """The images of tar archives, one archive after the other, in the order of their entries.

    A label is a `.cls` file of the same name (a number from 0 on, or a class), else the first
    folder of the image's name. Where there are both, the folders name the numbers. Archives that
    are called `train-...`, `val-...` or `test-...` are that part.
    """

    def __init__(self, paths: Sequence[str], place: str):
        _index_beside(paths)
        self._shards = [open_shard(path) for path in paths]
        self._starts = list(itertools.accumulate(map(len, self._shards), initial=0))
        self.place = place
        skipped: Counter[str] = Counter()
        for shard in self._shards:
            skipped.update(shard.facts["skipped"])
        if not len(self):
            there = ", ".join(f"{n:,} {what}" for what, n in skipped.most_common(5)) or "nothing"
            names = [os.path.basename(path) for path in paths]
            who = "It holds" if names == [os.path.basename(place)] else f"In {listed(names)}"
            raise DataError(f"{place!r} holds no image. {who}: {there}.")
        kinds = [split_of(re.match(r"[^\W\d_]*", os.path.basename(path))[0]) for path in paths]  # type: ignore[index]
        if all(kinds):
            self.splits = np.repeat(kinds, [len(shard) for shard in self._shards])
        said = self._label()
        note = f"Shards: {len(paths):,}, of {len(self):,} images; {said}."
        rest = ", ".join(f"{n:,} {what}" for what, n in skipped.most_common(8))
        self.notes = (note, *([f"Not read of the shards: {rest}."] if rest else []))

    def _label(self) -> str:
        """Finds the labels and what the classes are called; says how, in words."""
        texts, labels = self._codes("label")
        names, folders = self._codes("folder")
        # Images to test on may have none.
        needed = np.ones(len(self), bool) if self.splits is None else self.splits != "test"
        needed = needed if needed.any() else ~needed
        if texts and (labels[needed] >= 0).all():
            numbers, self.class_names = numbered(texts)
            several = numbers.dtype == object
            self.labels = np.append(numbers, [None] if several else np.int32(-1))[labels]
            if several:
                return "several labels an image, from .cls files"
            both = self.labels.astype(np.int64) * (len(names) + 1) + folders + 1
            codes = np.unique(both[labels >= 0])
            pairs = np.stack([codes // (len(names) + 1), codes % (len(names) + 1) - 1], axis=1)
            whole = all(text.isdigit() for text in texts) and (pairs >= 0).all()
            if not whole or not len(pairs) == len(set(pairs[:, 1])) == len(texts):
                return "labels from .cls files"
            self.class_names = list(self.class_names)  # no mere numbers any more
            for number, folder in pairs:
                self.class_names[number] = names[folder]
            return "labels from .cls files, classes from folders"
        if names and (folders[needed] >= 0).all():
            self.labels, self.class_names = folders, names
            return "labels from folders"
        codes = (labels if texts else folders)[needed]
        return "no labels" + (
            f", for {(codes < 0).sum():,} have none" if len(set(codes)) > 1 else ""
        )

    def _codes(self, field: str) -> tuple[list[str], np.ndarray]:
        """Every text of a field, sorted, and of each image its number or -1."""
        texts = sorted({text for shard in self._shards for text in shard.facts[field]})
        number = {text: i for i, text in enumerate(texts)}
        codes = []
        for shard in self._shards:
            own = [number[text] for text in shard.facts[field]]
            codes.append(np.asarray([*own, -1], np.int32)[shard.table[field]])
        return texts, np.concatenate(codes)

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> tuple[_Shard, int]:
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._shards[shard], index - self._starts[shard]

    def name(self, index: int) -> str:
        """The archive's path, and the name in it."""
        shard, inside = self._at(index)
        return f"{shard.path}/{shard.name(inside)}"

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        shard, inside = self._at(index)
        return shard.read(inside)

    def stamp(self, index: int) -> Any:
        """The archive's size and time, and the place in it."""
        shard, inside = self._at(index)
        return *shard.facts["state"], int(shard.table["start"][inside])

    def _which(self) -> str:
        """A hash of the archives' paths and the names in them."""
        whole = hashlib.sha256()
        for shard in self._shards:
            whole.update(os.path.abspath(shard.path).encode("utf-8", "surrogateescape"))
            whole.update(shard.table["end"].tobytes() + shard.names)
        return whole.hexdigest()


@functools.lru_cache(4)
def _known_shard(path: str, size: int, modified: int) -> Shards | None:
    with contextlib.suppress(DataError):
        return Shards([path], path)
    return None


def find_in_shard(path: str) -> str | None:
    """The `Item` that a name of an image in a shard stands for, or None."""
    at = path.lower().find(".tar/")
    shard = path[: at + 4]
    if at < 0 or not os.path.isfile(shard):
        return None
    state = os.stat(shard)
    found = _known_shard(shard, state.st_size, state.st_mtime_ns)
    index = None if found is None else found._shards[0].find(path[at + 5 :])
    return None if found is None or index is None else found[index]
