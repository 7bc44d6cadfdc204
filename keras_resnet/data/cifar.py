"""CIFAR-10 and CIFAR-100 as their author publishes them: an archive or its folder, either form."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import pickletools
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet.data.arrays import Arrays
from keras_resnet.data.items import Joined, Source
from keras_resnet.data.tar_entries import entries
from keras_resnet.system.download import fetched
from keras_resnet.system.errors import DataError, NotFoundError
from keras_resnet.system.files import cache_home

# Names, the archives that they stand for, and the SHA-256 of those (keras/src/datasets/cifar10.py,
# cifar100.py).
PUBLISHED = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
}
_HOME = "https://www.cs.toronto.edu/~kriz"  # KERAS_RESNET_DATA_URL replaces it
_MOST = 2**28  # bytes of the unpacked archive: it has 186 million
_NAME = re.compile(r"cifar-(10|100)-(python|binary|batches-py|batches-bin)(\.tar\.gz|\.tgz)?")
_FILES = re.compile(
    r"data_batch_\d|test_batch|train|test|(data_batch_\d|test_batch|train|test)\.bin"
    r"|meta|batches\.meta|batches\.meta\.txt|fine_label_names\.txt"
)


def is_cifar(path: str) -> bool:
    """Whether a path is called as the published archives, or the folders in them, are.

    So is `cifar10` or `cifar100` where there is nothing of that name here.

    Examples:
        >>> is_cifar("data/cifar-10-python.tar.gz"), is_cifar("cifar10_small")
        (True, False)
    """
    if path in PUBLISHED:
        return not os.path.exists(path)
    if _NAME.fullmatch(os.path.basename(path.rstrip("/\\"))) is None:
        return False
    # A folder of that name may as well hold folders of images.
    known = "batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt"
    return not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, n)) for n in known)


def open_cifar(path: str) -> Source:
    """The images of the training and the test batches, and the names of the (fine) classes.

    The name `cifar10` is the archive in the user's cache, downloaded where it is not there yet.
    """
    if path in PUBLISHED and not os.path.exists(path):
        url, target = _published(path)
        home = f"{_HOME}/{target.name}"
        path = str(fetched(url, target, PUBLISHED[path][1], home=home))
    if not os.path.exists(path):
        raise NotFoundError(f"{path!r} does not exist.")
    try:
        files = _files(path)
        return _source(path, files)
    except KeyError as error:
        raise DataError(f"{path!r} lacks {error.args[0]!r}, which CIFAR has.") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path!r} cannot be read: {error}.") from error


def _published(name: str) -> tuple[str, Path]:
    """Where an archive is fetched, and where it is put."""
    base = os.environ.get("KERAS_RESNET_DATA_URL", _HOME).rstrip("/")
    return f"{base}/{PUBLISHED[name][0]}", cache_home() / "data" / PUBLISHED[name][0]


def not_here(data: Any) -> str | None:
    """What a dry run, which fetches nothing, says of an archive that would be fetched first."""
    if not isinstance(data, str) or data not in PUBLISHED or os.path.exists(data):
        return None
    url, target = _published(data)
    if target.is_file():
        return None
    return f"Would be downloaded first: {url} to {target}. More can be said when it is there."


def _files(path: str) -> dict[str, bytes]:
    if os.path.isdir(path):
        files = [Path(path, name) for name in sorted(os.listdir(path)) if _FILES.fullmatch(name)]
        known = [file for file in files if file.is_file() and file.stat().st_size < _MOST]
        return {file.name: file.read_bytes() for file in known}
    with gzip.open(path) as packed:
        data = packed.read(_MOST + 1)
    if len(data) > _MOST:
        raise ValueError(f"it unpacks to more than {_MOST:,} bytes")
    there = ((os.path.basename(name), start, start + size)
             for name, start, size in entries(io.BytesIO(data), len(data), Counter()))  # fmt: skip
    return {name: data[start:end] for name, start, end in there if _FILES.fullmatch(name)}


def _source(path: str, files: dict[str, bytes]) -> Source:
    binary = any(name.endswith(".bin") for name in files)
    hundred = "train" in files or "train.bin" in files
    ending = ".bin" if binary else ""
    training = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    read = _binary if binary else _pickled
    if binary:
        text = files["fine_label_names.txt" if hundred else "batches.meta.txt"]
        names = text.decode("ascii").split()
    else:
        meta = _unpickled(files["meta" if hundred else "batches.meta"])
        names = _texts(meta["fine_label_names" if hundred else "label_names"])
    parts: dict[str, Source] = {}
    for kind, batches in (("train", training), ("test", ["test" if hundred else "test_batch"])):
        found = [read(files[name + ending], hundred) for name in batches]
        images, labels = (np.concatenate(part) for part in zip(*found, strict=True))
        if not len(images) or labels.min() < 0 or labels.max() >= len(names):
            raise ValueError(f"its labels are not those of {len(names)} classes")
        name = f"{os.path.basename(path)}/{kind}/{{}}"
        place = os.path.abspath(path)
        parts[kind] = Arrays(images, labels, names, name=name, place=place)
    counts = ", ".join(f"{len(part):,} images for {kind}" for kind, part in parts.items())
    return Joined(parts, [f"CIFAR-{'100' if hundred else '10'}: {counts}."])


def _pixels(rows: np.ndarray) -> np.ndarray:
    # A row is 1,024 red values, then the green and the blue ones, from top left.
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _binary(data: bytes, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(data, np.uint8)
    width = 3072 + (2 if hundred else 1)
    if rows.size % width:
        raise ValueError(f"a batch of {rows.size:,} bytes is cut off")
    rows = rows.reshape(-1, width)
    return _pixels(rows[:, -3072:]), rows[:, -3073].astype(np.int32)


def _pickled(data: bytes, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickled(data)
    array, labels = batch["data"], batch["fine_labels" if hundred else "labels"]
    state = getattr(array, "state", None)
    pixels = state[4] if isinstance(state, tuple) and len(state) == 5 else None
    if isinstance(pixels, str):
        pixels = pixels.encode("latin-1")
    if not isinstance(pixels, bytes) or not isinstance(labels, list) or state[3] is not False:
        raise ValueError("a batch holds no pixels and labels")
    if not all(type(label) is int and 0 <= label < 100 for label in labels):
        raise ValueError("its labels are no numbers of classes")
    if len(pixels) != 3072 * len(labels):
        raise ValueError(f"it has {len(labels):,} labels for {len(pixels) / 3072:,.1f} images")
    return _pixels(np.frombuffer(pixels, np.uint8)), np.asarray(labels, np.int32)


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("the names of the classes are no texts")
    return values


# --- its pickles ---------------------------------------------------------------------------------

# What the batches need: dicts and lists of numbers and texts, and one array. Nothing else is run.
_OPCODES = {
    "PROTO", "EMPTY_DICT", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE",
    "SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES",
    "BININT", "BININT1", "BININT2", "GLOBAL", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE",
    "REDUCE", "BUILD", "NEWFALSE", "NEWTRUE", "EMPTY_LIST", "APPENDS", "APPEND", "SETITEMS",
    "SETITEM", "STOP",
}  # fmt: skip


class _Made:
    """Stands for whatever a pickle makes; it is told the state, and does nothing."""

    state: Any = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """No name is looked up: each is a stand-in."""
        return _text if name == "encode" else _Made


def _text(text: Any, *_: Any) -> Any:
    return text  # the bytes of an array, as Python 3 writes them for Python 2


def _unpickled(data: bytes) -> dict[str, Any]:
    """What a pickle of CIFAR's describes, of plain values and stand-ins; others: ValueError."""
    known = {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "_codecs encode"}
    known.add("numpy._core.multiarray _reconstruct")
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES or (opcode.name == "GLOBAL" and argument not in known):
            shown = argument if opcode.name == "GLOBAL" else opcode.name
            raise ValueError(f"its pickle asks for {str(shown)[:60]!r}, which CIFAR's do not")
        if opcode.name == "LONG_BINPUT" and argument > len(data):
            raise ValueError("its pickle is damaged")
    try:
        found = _Unpickler(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:  # whatever a damaged one leads to
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise ValueError("its pickle is no dict")
    return found
