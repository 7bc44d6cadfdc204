"""From what is given to `train`, `evaluate` and others to images: folders, or another `Source`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_resnet.data.folders import (
    class_folders,
    existing_folder,
    find_pictures,
    labels_by_name,
    layout,
    left_out,
    split_folder,
    split_folders,
    test_images,
)
from keras_resnet.data.items import Source
from keras_resnet.data.walk import unread_line
from keras_resnet.system.errors import DataError, InputError, NotFoundError


class Parts(NamedTuple):
    """The images of a dataset.

    Attributes:
        of: Images and labels of `"train"`, and of `"val"` and `"test"` where there are such; the
            labels of the last may be None.
        names: Of the classes.
        notes: Lines about what was taken as what, and what was not read.
    """

    of: dict[str, tuple[Sequence[str], np.ndarray]]
    names: list[str]
    notes: list[str]


def opened(data: Any) -> str | Source:
    """The path of a folder, which need not be there; or the source that something else is.

    Raises:
        InputError: It is nothing that holds images.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, os.PathLike)):
        return os.path.expanduser(os.fspath(data))
    raise InputError(
        f"Images are given as a folder or another source of them. Received: {type(data).__name__}."
    )


def place(data: str | Source) -> str:
    """What says in a run's record where its images come from; of a folder its absolute path."""
    return data.place if isinstance(data, Source) else os.path.abspath(data)


def check_images(data: Any, least: int = 0) -> None:
    """Says what is wrong with a folder or another source, before Keras is imported.

    Args:
        data: As `opened` takes it.
        least: Classes that training needs.

    Raises:
        NotFoundError: There is nothing there.
        DataError: It holds no images.
    """
    source = opened(data)
    if isinstance(source, Source):
        return
    existing_folder(source)
    if least:
        class_folders(split_folders(source).get("train", source), least)


def find_parts(data: str | Source, exclude: Any = None) -> Parts:
    """The images to train on, to validate with and to test on, as far as something says them.

    Args:
        data: As `opened` gives it.
        exclude: Images to leave out.

    Raises:
        NotFoundError: The folder does not exist.
        DataError: No images, one class only, an empty class, no labels.
        InputError: Classes that are not those of the training images.
    """
    if isinstance(data, Source):
        return _parts_of(data, exclude)
    folders = split_folders(data)
    if folders and "train" not in folders:
        raise DataError(f"{data!r} has {' and '.join(folders)} but no training folder.")
    notes, others = [layout(data, folders)], Counter[tuple[str, str]]()
    class_folders(folders.setdefault("train", data), least=2)
    paths, labels, names = find_pictures(folders["train"], exclude=exclude, others=others)
    parts = {"train": (paths, labels)}
    if "val" in folders:
        paths, labels, found = find_pictures(folders["val"], exclude=exclude, others=others)
        who = "The validation folder", "the training folder"
        parts["val"] = paths, labels_by_name(labels, found, names, *who)
    paths, test_labels, note = test_images(folders.get("test"), names)
    if paths:
        parts["test"] = paths, test_labels
    return Parts(parts, names, [line for line in (*notes, note, unread_line(others)) if line])


def _parts_of(source: Source, exclude: Any) -> Parts:
    source = _labelled(without(source, exclude))
    parts = source.parts() or {"train": source}
    if "train" not in parts:
        raise DataError(f"{source.place!r} has {' and '.join(parts)} but no training images.")
    found = {kind: (part, part.labels) for kind, part in parts.items()}
    return Parts(found, source.class_names or [], list(source.notes))


def _labelled(source: Source) -> Source:
    if source.labels is None or source.class_names is None:
        raise DataError(f"{source.place!r} says no labels: the images' classes are not known.")
    return source


def without(source: Source, exclude: Any) -> Source:
    """A source without the images that a list names."""
    out = left_out("", exclude)
    if not out:
        return source
    kept = [i for i in range(len(source)) if os.path.abspath(source.name(i)) not in out]
    return source.take(np.asarray(kept, np.int64))


def labelled_place(data: Any, split: str | None = None) -> str:
    """A line about where `labelled` looks, before anything is read.

    Raises:
        NotFoundError: There is nothing there, or not this split.
        DataError: No classes.
    """
    source = opened(data)
    if isinstance(source, Source):
        part = _part(source, split)
        return f"Images: {len(part):,} of {source.place}"
    folder = split_folder(source, split)
    class_folders(folder)
    return f"Folder: {folder}"


def labelled(data: Any, split: str | None = None) -> tuple[Sequence[str], np.ndarray, list[str]]:
    """Images, their labels and the names of the classes, to measure a model on.

    Args:
        data: As `opened` takes it.
        split: Which of `test`, `val`, `train`; the first that is there by default.

    Raises:
        NotFoundError: There is nothing there, or not this split.
        DataError: No images, or no labels.
    """
    source = opened(data)
    if not isinstance(source, Source):
        return find_pictures(split_folder(source, split))
    part = _part(source, split)
    return part, part.labels, part.class_names  # type: ignore[return-value]


def _part(source: Source, split: str | None) -> Source:
    parts = source.parts()
    if split is not None and split not in parts:
        raise NotFoundError(
            f"{source.place!r} has no {split!r} part; it has: {', '.join(parts) or 'none'}."
        )
    known = [split] if split else [name for name in ("test", "val", "train") if name in parts]
    return _labelled(parts[known[0]] if known else source)
