"""Files, folders and patterns as one sequence of images that never lies in memory whole."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator

from keras_resnet.data.folders import flat_images, picture_folders, pictures_in
from keras_resnet.errors import NotFoundError, meant_path
from keras_resnet.system.files import printable, text_width

Sources = str | os.PathLike | Iterable[str | os.PathLike]


class Images:
    """Files out of files, folders (searched through, sorted) and shell patterns.

    It can be iterated more than once. Of a folder nothing but the folders in it is kept; file
    names are read again, a folder at a time, so memory does not grow with their number.

    Args:
        sources: One or several of them.

    Raises:
        NotFoundError: A path does not exist, or a pattern matches nothing.
        DataError: A folder holds no image.
    """

    def __init__(self, sources: Sources):
        if isinstance(sources, (str, os.PathLike)):
            sources = [sources]
        self._parts: list[list[str] | _Folders] = []
        for source in sources:
            self._add(os.path.expanduser(os.fspath(source)))
        self._count: int | None = None
        self._width = 0

    def _add(self, text: str) -> None:
        if os.path.isdir(text):
            folders = picture_folders(text)
            if not folders:
                # Not an image in it: the error says what there is.
                flat_images(text, follow_links=False, exclude=None)
            self._parts.append(_Folders(folders))
        elif os.path.exists(text):
            self._add_files([text])
        elif glob.has_magic(text) and "://" not in text:
            matches = sorted(p for p in glob.glob(text, recursive=True) if os.path.isfile(p))
            if not matches:
                raise NotFoundError(f"No file matches {text!r}.")
            self._add_files(matches)
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
            for name in pictures_in(folder):
                yield os.path.join(folder, name)


def image_paths(sources: Sources) -> list[str]:
    """The paths that `Images` finds, as a list.

    Raises:
        NotFoundError: A path does not exist, or a pattern matches nothing.
        DataError: A folder holds no image.
    """
    return list(Images(sources))
