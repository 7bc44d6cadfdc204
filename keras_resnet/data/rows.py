"""Images in the rows of a dataset: Hugging Face's `datasets`, and Parquet files of images."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_resnet.data.items import Source
from keras_resnet.data.labels import LABEL_COLUMNS, numbered
from keras_resnet.data.reading import open_file
from keras_resnet.system.errors import DataError, InputError


def is_rows(data: Any) -> bool:
    """Whether an object is a `datasets.Dataset`, or has all that is needed of one."""
    return hasattr(data, "features") and hasattr(data, "column_names")


class Rows(Source):
    """The images of a `datasets.Dataset`, in its order; each has a name with its number from 1."""

    def __init__(self, data: Any, name: str = "row {}"):
        if not hasattr(data, "__len__"):
            raise InputError(
                "A dataset that is streamed cannot be read in another order: load it without "
                f"streaming=True. Received: {type(data).__name__}."
            )
        if hasattr(data, "with_format"):  # tensors, or what a transform makes of the images
            data = data.with_format(None)
        kinds = {column: type(feature).__name__ for column, feature in data.features.items()}
        images = [column for column, kind in kinds.items() if kind == "Image"]
        if not images:
            raise InputError(f"The dataset has no column of images. It has: {kinds}.")
        self._column, self._name = images[0], name
        names = {column: _class_names(feature) for column, feature in data.features.items()}
        labels = [column for column, known in names.items() if known]
        labels += [column for column in LABEL_COLUMNS.split() if column in kinds]
        if labels:
            values = [None if value == -1 else value for value in data[labels[0]]]
            self.labels, self.class_names = numbered(values, names.get(labels[0]))
            self.notes = (f"Columns: image from {images[0]!r}, label from {labels[0]!r}.",)
        feature = data.features[images[0]]
        if hasattr(data, "cast_column") and getattr(feature, "decode", False):
            # The bytes of the file, which are decoded here as those of any other.
            data = data.cast_column(images[0], type(feature)(decode=False))
        self._data = data
        self.place = f"dataset-{getattr(data, '_fingerprint', len(data))}"

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """Its number, in words."""
        return self._name.format(index + 1)

    def read(self, index: int) -> Any:
        """The file's bytes, or what the dataset has decoded."""
        return content(self._data[index][self._column], self.name(index))


def _class_names(feature: Any) -> list[str] | None:
    """What a `ClassLabel` calls the classes, or a list of such."""
    if isinstance(feature, (list, tuple)):  # [ClassLabel(...)], as a list of them was once written
        feature = feature[0]
    return getattr(getattr(feature, "feature", feature), "names", None)


def content(value: Any, name: str) -> Any:
    """The image of a row: a dict of bytes or a path, bytes, an array or a Pillow image."""
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path and isinstance(path, str):  # a number would be an open file
            with open_file(path) as file:
                return file.read()
    known = isinstance(value, (bytes, bytearray, memoryview)) or hasattr(value, "size")
    if not known:  # the latter are arrays and Pillow's images
        raise DataError(f"{name!r} cannot be read: the row has no image.")
    return value


class ParquetImages(Source):
    """The images that lie in a Parquet file itself, as Hugging Face's datasets are published.

    Their column is of bytes, or a struct that has `bytes`.
    """

    def __init__(self, path: str, column: str, rows: Sequence[int]):
        self._path, self._column = path, column
        self._starts = np.cumsum([0, *rows])  # of the groups of rows

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        """The file's path, and the number of the row."""
        return f"{self._path}/{index + 1}"

    def read(self, index: int) -> Any:
        """The file's bytes."""
        group = int(np.searchsorted(self._starts, index, "right")) - 1
        state = os.stat(self._path)
        values = _group(self._path, state.st_size, state.st_mtime_ns, group, self._column)
        return content(values[index - int(self._starts[group])].as_py(), self.name(index))

    def stamp(self, index: int) -> Any:
        """The file's size and time, and the row."""
        state = os.stat(self._path)
        return state.st_size, state.st_mtime_ns, index


_ROOM = 2**30  # bytes that a Parquet file's columns may have when they are read; or
_RATIO = 64  # times those of the file, if that is more


def unpacked(path: str, file: Any, columns: Sequence[str], **which: Any) -> Any:
    """Columns of a `ParquetFile` as a table; `which` are further arguments of `iter_batches`.

    Raises:
        DataError: They would unpack to far more than the file has.
    """
    import pyarrow

    batches, left = [], max(_ROOM, _RATIO * os.path.getsize(path))
    for batch in file.iter_batches(256, columns=list(columns), **which):
        batches.append(batch)
        left -= batch.nbytes
        if left < 0:
            raise DataError(f"{path!r} unpacks to more than 1 GB and {_RATIO} times its size.")
    return pyarrow.Table.from_batches(batches) if batches else file.schema_arrow.empty_table()


@functools.lru_cache(8)
def _group(path: str, size: int, modified: int, group: int, column: str) -> Any:
    """A column of a group of rows, the last few of which are kept."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        table = unpacked(path, file, [column], row_groups=[group])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path!r} cannot be read: {str(error).splitlines()[0]}") from error
    return table.column(column)
