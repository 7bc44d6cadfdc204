"""Files, folders and patterns as one sequence of images that never lies in memory whole."""

from __future__ import annotations

import functools
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from PIL import Image

from keras_resnet.data.arrays import as_array, is_array, is_picture, whole_pixels
from keras_resnet.data.folders import flat_images
from keras_resnet.data.items import Item, Source
from keras_resnet.data.opening import is_source, no_columns, opened
from keras_resnet.data.shards import find_in_shard
from keras_resnet.data.walk import entries, images_of, is_picture as is_image_name, picture_folders
from keras_resnet.system.errors import InputError, NotFoundError, meant_path
from keras_resnet.system.files import printable, text_width

One = str | os.PathLike | bytes | IO[bytes] | Image.Image | np.ndarray
Sources = One | Source | Iterable[One | Source]


def _given(content: Any) -> Any:
    return content


class Images:
    """Files out of files, folders (searched through, sorted) and shell patterns; images in memory.

    It can be iterated more than once. Of a folder nothing but the folders in it is kept; file
    names are read again, a folder at a time, so memory does not grow with their number.

    Args:
        sources: One or several of them. Images in memory are arrays `(height, width)` or `(height,
            width, 1, 3 or 4)` of 0..255, batches of such, Pillow images, the bytes of a file or an
            open one; in place of a path they have a name, `"image 1"`.

    Attributes:
        given: Paths among the sources, and where others say that they come from.
        unread: Files in the folders that are no images, counted by extension and reason.
    """

    def __init__(self, sources: Sources):
        one = isinstance(sources, (str, os.PathLike, Source)) or not isinstance(sources, Iterable)
        if one or is_picture(sources) or is_array(sources):
            sources = [sources]  # type: ignore[list-item]
        self._parts: list[list[str] | _Folders | Source] = []
        self.given: list[str] = []
        self.unread: Counter = Counter()
        self.in_memory = 0  # how many
        for source in sources:  # type: ignore[union-attr]
            if isinstance(source, Source):
                self._parts.append(source)
                self.given.append(source.place)
            elif isinstance(source, Item):
                self._add_files([source])
            elif is_picture(source) or is_array(source):
                self._add_image(source)
            elif isinstance(source, (str, os.PathLike)):
                self._add(os.path.expanduser(os.fspath(source)))
            else:
                raise InputError(
                    "An image is given as a path, an array, a Pillow image, the bytes of a file or "
                    f"an open one. Received: {type(source).__name__}."
                )
        self._count: int | None = None
        self._width = 0

    def _add_image(self, image: Any) -> None:
        if is_array(image):
            image = whole_pixels(as_array(image))
        for one in image if getattr(image, "ndim", 0) == 4 else [image]:
            self.in_memory += 1
            path = getattr(one, "filename", None) or getattr(one, "name", None)
            name = path if path and isinstance(path, str) else f"image {self.in_memory}"
            content = one.read() if hasattr(one, "read") else one
            self._add_files([Item(name, functools.partial(_given, content))])

    def _add(self, text: str) -> None:
        self.given.append(text)
        if is_source(text):
            alone = no_columns(text, "label", "split", "weight")
            self._parts.append(opened(text, alone))  # type: ignore[arg-type]
        elif os.path.isdir(text):
            folders, others = picture_folders(text)
            self.unread += others
            if folders:
                self._parts.append(_Folders(folders))
            elif is_image_name(os.path.basename(text)):
                self._add_files([text])  # its row says that it is a folder
            else:  # the error says what there is
                flat_images(text, follow_links=True, exclude=None)
        elif os.path.lexists(text):  # its row says where a link leads nowhere
            self._add_files([text])
        elif glob.has_magic(text) and "://" not in text:
            found = sorted(glob.glob(text, recursive=True))
            matches = [
                p for p in found if not os.path.isdir(p) or is_image_name(os.path.basename(p))
            ]
            if not matches:
                raise NotFoundError(f"No file matches {text!r}.")
            self._add_files(matches)
        elif (item := find_in_shard(text)) is not None:
            self._add_files([item])
        else:
            raise NotFoundError(f"No file or folder at {text!r}.{meant_path(text)}")

    def _add_files(self, paths: list[str]) -> None:
        if self._parts and isinstance(self._parts[-1], list):
            self._parts[-1] += paths
        else:
            self._parts.append(paths)

    def __iter__(self) -> Iterator[str]:
        """Gives the paths, in order."""
        for part in self._parts:
            yield from part

    def __len__(self) -> int:
        """Images; the first time, all names are read for it."""
        if self._count is None:
            self._count = 0
            for path in self:
                self._count += 1
                self._width = max(self._width, text_width(printable(path)))
        return self._count

    @property
    def width(self) -> int:
        """Letters of the longest path, as it is printed."""
        return self._width if len(self) else 0


class _Folders:
    """The images of some folders, without those of the folders in them."""

    def __init__(self, folders: list[str]):
        self._folders = folders

    def __iter__(self) -> Iterator[str]:
        for folder in self._folders:
            for name in images_of(entries(folder)[0]):
                yield os.path.join(folder, name)
