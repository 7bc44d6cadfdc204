"""What images come from: a sequence of names, each of which knows how to read its image.

Whatever feeds, predicts, scans or shows images takes such a sequence. A folder's is a list of
paths: a path is its own address. All other sources are a `Source`, whose items are read by number.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from keras_resnet.data.bands import COLOR_MODES, Bands, bands_of
from keras_resnet.data.folders import labels_by_name, unlabelled
from keras_resnet.system.errors import InputError, NotFoundError


class Item(str):
    """The name of an image that is no file of its own, which reads it.

    Args:
        name: Whatever stands for its path.
        read: Gives the bytes of an image file, a uint8 array or a Pillow image.
        stamp: Gives what is another value when the image has changed; of its bytes by default.
    """

    read: Callable[[], Any]
    _stamp: Callable[[], Any] | None

    def __new__(cls, name: str, read: Callable[[], Any], stamp: Callable[[], Any] | None = None):
        """Makes the text, which cannot be changed afterwards."""
        made = super().__new__(cls, name)
        made.read, made._stamp = read, stamp
        return made

    def __getnewargs__(self) -> tuple:  # type: ignore[override]
        """What pickle and copy make it of."""
        return str(self), self.read, self._stamp

    def stamp(self) -> Any:
        """What is another value when the image has changed, as a file's size and time are."""
        if self._stamp is not None:
            return self._stamp()
        return content_hash(self.read()).hex()


def content_hash(content: Any) -> bytes:
    """SHA-256 of a file's bytes, or of pixels however they lie in memory."""
    data = content if isinstance(content, bytes) else np.ascontiguousarray(content)
    return hashlib.sha256(data).digest()


class Source(Sequence[str]):
    """Images in an order: their number, what each is called, its bytes or pixels, its label.

    What a subclass has to say is in `__len__`, `name` and `read`. It can be pickled.

    Attributes:
        labels: int32, one an image, -1 where it is not known; or where images have several, an
            array of tuples of them (`()` is none of the classes), None where they are not known.
            None where there are none.
        class_names: The name of each label.
        weights: float32, what each image counts in training; None where they count alike.
        splits: `"train"`, `"val"` or `"test"`, one an image; None where there is no split.
        notes: Lines about what was taken as what.
        place: What says in a run's record where the images come from, and which they are.
        asked: What `image_source` was asked for beside it, for the record: `directory`, `columns`
            and `label_regex` as the command line has them; empty where nothing was.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    weights: np.ndarray | None = None
    splits: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    place: str = "images"
    asked: Mapping[str, Any] = MappingProxyType({})

    def name(self, index: int) -> str:
        """What an image is called in messages and results; no two alike."""
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """The bytes of an image file, or a uint8 array `(height, width[, channels])`."""
        raise NotImplementedError

    def stamp(self, index: int) -> Any:
        """What is another value when the image has changed."""
        return Item(self.name(index), functools.partial(self.read, index)).stamp()

    def __getitem__(self, index):
        """An `Item`; several of a slice."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self._item(range(len(self))[index])

    def _item(self, index: int) -> str:
        ways = (functools.partial(way, index) for way in (self.read, self.stamp))
        return Item(self.name(index), *ways)

    def title(self) -> str:
        """What a run on these images is called."""
        return os.path.basename(self.place)

    def take(self, positions: np.ndarray) -> Source:
        """Some of the images."""
        return _Part(self, np.asarray(positions))

    def digest(self) -> str:
        """A hash of which images these are and of which classes: what a run goes on with."""
        whole = hashlib.sha256(self._which().encode())
        if self.labels is not None:
            kind = object if self.labels.dtype == object else np.int32
            labels = np.asarray(self.labels, kind)
            whole.update(repr(labels.tolist()).encode() if kind is object else labels.tobytes())
        if self.weights is not None:
            whole.update(self.weights.tobytes())
        whole.update(repr(self.class_names).encode())
        return whole.hexdigest()

    def _which(self) -> str:
        """A hash of which images these are; that of the files' absolute paths."""
        text = "\0".join(map(absolute, self))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def parts(self) -> dict[str, Source]:
        """The images of each split."""
        if self.splits is None:
            return {}
        known = ("train", "val", "test")
        found = {kind: np.flatnonzero(self.splits == kind) for kind in known}
        parts = {kind: self.take(those) for kind, those in found.items() if len(those)}
        for part in parts.values():
            part.splits = None  # it is one
            if part.labels is not None and unlabelled(part.labels).any():  # of test images
                part.labels = None
        return parts


class Files(Source):
    """Files in an order, wherever they lie, by their paths; with facts of a `Source`."""

    def __init__(self, paths: Sequence[str], **facts: Any):
        self._paths = paths
        self.__dict__.update(facts)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """Its path."""
        return self._paths[index]

    _item = name  # a path is its own address


class _Part(Source):
    """Some images of another source."""

    def __init__(self, whole: Source, positions: np.ndarray):
        self._whole, self._positions = whole, positions
        self._take_facts(whole, positions)

    def _take_facts(self, of: Source, positions: np.ndarray) -> None:
        self.class_names, self.notes, self.place = of.class_names, of.notes, of.place
        self.splits = None if of.splits is None else of.splits[positions]
        self.labels = None if of.labels is None else of.labels[positions]
        self.weights = None if of.weights is None else of.weights[positions]

    def __len__(self) -> int:
        return len(self._positions)

    def name(self, index: int) -> str:
        return self._whole.name(int(self._positions[index]))

    def _item(self, index: int) -> str:
        return self._whole._item(int(self._positions[index]))

    def take(self, positions: np.ndarray) -> Source:
        part = _Part(self._whole, self._positions[positions])
        part._take_facts(self, positions)  # it may say other labels than the whole does
        return part

    def _which(self) -> str:
        return hashlib.sha256(self._whole._which().encode() + self._positions.tobytes()).hexdigest()


class Joined(Source):
    """Several sources, `"train"` first, as the parts of one; its classes are those of the first."""

    def __init__(self, parts: Mapping[str, Source], notes: Sequence[str] = ()):
        self._parts = list(parts.values())
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.splits = np.repeat(list(parts), [len(part) for part in self._parts])
        self.class_names = names = self._parts[0].class_names
        labels = []
        for kind, part in parts.items():
            if part.labels is None or part.class_names is None or names is None:
                labels.append(np.full(len(part), -1, np.int32))
            else:
                who = f"The part {kind!r}", "the first"
                labels.append(labels_by_name(part.labels, part.class_names, names, *who))
        if any(of.dtype == object for of in labels):  # of images with one a tuple of one
            labels = [of if of.dtype == object else _as_tuples(of) for of in labels]
        self.labels = None if names is None else np.concatenate(labels)
        weights = [part.weights for part in parts.values()]
        if any(of is not None for of in weights):
            every = zip(self._parts, weights, strict=True)
            alike = [np.ones(len(part), np.float32) if of is None else of for part, of in every]
            self.weights = np.concatenate(alike)
        self.notes = (*notes, *(line for part in self._parts for line in part.notes))
        self.place = ", ".join(dict.fromkeys(part.place for part in self._parts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def title(self) -> str:
        """That of the training images."""
        return self._parts[0].title()

    def _at(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._parts[part], index - int(self._starts[part])

    def name(self, index: int) -> str:
        """As the part calls it."""
        part, inside = self._at(index)
        return part.name(inside)

    def _item(self, index: int) -> str:
        part, inside = self._at(index)
        return part._item(inside)


def _as_tuples(labels: np.ndarray) -> np.ndarray:
    return np.fromiter((None if label < 0 else (int(label),) for label in labels), object)


def taken(paths: Sequence[str], positions: Sequence[int] | np.ndarray) -> Sequence[str]:
    """Some of the images of a source, or of a list of paths."""
    if isinstance(paths, Source):
        return paths.take(np.asarray(positions, np.int64))
    return [paths[i] for i in positions]


def absolute(path: str) -> str:
    """How an image is called wherever the process works: an absolute path, if it lies in a file."""
    inside = os.path.dirname(path) or not isinstance(path, Item)
    return os.path.abspath(path) if inside else str(path)


def stamp_of(path: str) -> tuple:
    """What is another value when an image has changed: a file's size and time; or NotFoundError."""
    if isinstance(path, Item):
        return (path.stamp(),)
    try:
        state = os.stat(path)
    except OSError:
        raise NotFoundError(f"{path!r} does not exist.") from None
    return state.st_size, state.st_mtime_ns


def image_from_array(pixels: np.ndarray, channels: int = 3) -> Image.Image | Bands:
    """Returns a Pillow image of a uint8 array (height, width), or with 1, 3 or 4 channels.

    Of uint16, and of as many other `channels`, it is `Bands`.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"An image given as an array must be uint8 with values 0 to 255, or uint16. "
            f"Received: {pixels.dtype}."
        )
    named = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in COLOR_MODES.values())
    if 0 in pixels.shape or not (named or (pixels.ndim == 3 and pixels.shape[-1] == channels)):
        more = "" if channels in COLOR_MODES.values() else f", or with {channels} channels"
        raise InputError(
            f"An image given as an array is (height, width) or (height, width, 1, 3 or 4){more}. "
            f"Received: shape {pixels.shape}."
        )
    if pixels.dtype == np.uint16 or not named:
        return bands_of(pixels)
    if pixels.shape[-1] == 1 and pixels.ndim == 3:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def as_image(image: Image.Image | Bands | np.ndarray) -> Image.Image | Bands:
    """A Pillow image, or `Bands`, of what may be an array of any channels."""
    if isinstance(image, np.ndarray):
        return image_from_array(image, image.shape[-1] if image.ndim == 3 else 3)
    return image
