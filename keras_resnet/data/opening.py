"""From what is given to `train`, `evaluate` and others to images: folders, or another `Source`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_resnet.data import cifar, shards, tables
from keras_resnet.data.arrays import Arrays, is_array
from keras_resnet.data.folders import (
    class_folders,
    existing_folder,
    find_pictures,
    flat_images,
    labels_by_name,
    layout,
    listed,
    plain_name,
    split_folders,
    split_of,
    unlabelled,
)
from keras_resnet.data.items import Files, Joined, Source
from keras_resnet.data.labels import numbered
from keras_resnet.data.listing import Listed
from keras_resnet.data.rows import Rows, is_rows
from keras_resnet.data.walk import left_out, unread_line, walk_pictures
from keras_resnet.system.errors import DataError, InputError, NotFoundError


class Parts(NamedTuple):
    """The images of a dataset."""

    # Images and labels of "train", and of "val" and "test" where there are such; the labels of the
    # last may be None.
    of: dict[str, tuple[Sequence[str], np.ndarray]]
    names: list[str]  # of the classes
    notes: list[str]  # lines about what was taken as what, and what was not read


def is_source(path: str) -> bool:
    """Whether a path is called as a table or shards are, or is a folder of shards."""
    return shards.is_shards(path) or cifar.is_cifar(path) or _is_table(path)


def _is_table(path: str) -> bool:
    return path.lower().endswith(tables.ENDINGS) and not os.path.isdir(path)


def no_columns(data: Any, *parts: str) -> dict[str, str]:
    """Columns that say that a table has none of these: what is not needed need not be right."""
    table = isinstance(data, (str, os.PathLike)) and _is_table(os.fspath(data))
    return dict.fromkeys(parts, "") if table else {}


def opened(data: Any, columns: Mapping[str, str] | None = None) -> str | Source:
    """The path of a folder, which need not be there; or the source that something else is.

    Args:
        data: A folder; a table; tar shards; CIFAR's archive; a `datasets.Dataset`; `(images,
            labels)` or `(images, labels, class_names)` as arrays, or two such, to train and to test
            on; a dict of `"train"`, `"val"` and `"test"`; or a `Source`.
        columns: Of a table: what its columns are called.

    Raises:
        InputError: It is nothing that holds images, or columns are given and it is no table.
        NotFoundError: There is no such table.
        DataError: It cannot be read.
    """
    path = os.path.expanduser(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else None
    if columns and (path is None or not _is_table(path)):
        what = type(data).__name__ if path is None else repr(path)
        raise InputError(f"columns are those of a table. Received: {what}, which is none.")
    if isinstance(data, Source):
        return data
    if path is not None:
        kinds = os.path.isfile(path), os.path.isdir(path), not os.path.exists(path)
        if is_source(path) and not any(kinds):  # it may never end
            raise DataError(f"{path!r} is a pipe, a socket or a device: a file is needed.")
        if cifar.is_cifar(path):
            return cifar.open_cifar(path)
        if shards.is_shards(path):
            return shards.Shards(shards.shard_paths(path), os.path.abspath(path))
        return tables.open_table(path, columns) if _is_table(path) else path
    if is_rows(data):
        return Rows(data)
    if isinstance(data, Mapping) and data:
        kinds = {split_of(str(name)): part for name, part in data.items()}
        order = [kind for kind in ("train", "val", "test") if kind in kinds]
        if len(order) == len(data):
            return Joined({kind: _part_of(kinds[kind], kind) for kind in order})
        raise InputError(
            "A dict of images has the keys 'train', 'val' and 'test', each once at most. Received: "
            f"{listed(list(map(str, data)))}."
        )
    if isinstance(data, (tuple, list)) and len(data) in (2, 3):
        if all(isinstance(part, (tuple, list)) and is_array(part[0]) for part in data):
            return opened(dict(zip(("train", "test"), data, strict=True)))
        if is_array(data[0]):
            return Arrays(*data)
    raise InputError(
        "Images are given as a folder, a table, tar shards, (images, labels) as arrays, or a dict "
        f"of such for 'train', 'val' and 'test'. Received: {type(data).__name__}."
    )


def _part_of(data: Any, kind: str) -> Source:
    if isinstance(data, (tuple, list)) and len(data) in (2, 3) and is_array(data[0]):
        return Arrays(*data, name=f"{kind} image {{}}")
    if is_rows(data):
        return Rows(data, f"{kind} row {{}}")
    if isinstance(data, (str, os.PathLike)) and os.path.isdir(data) and split_folders(data):
        data = _split_folder(data, kind)
    source = image_source(data)
    return source if source.splits is None else _part(source, kind)


def image_source(
    data: Any, *, columns: Mapping[str, str] | None = None, label_regex: str | None = None
) -> Source:
    r"""Images and their labels out of a folder, a table or arrays, for `train` and others.

    They take the same by themselves; this is for what has to be said beside it.

    Args:
        data: A folder; a table (`.csv`, `.tsv`, `.jsonl`, `.parquet`); tar shards (one, a pattern,
            a folder of them); CIFAR's archive, as it is published; a `datasets.Dataset` of Hugging
            Face; arrays, `(images, labels)` or `(images, labels, class_names)`, or two
            such, to train and to test on; or a dict of `"train"`, `"val"` and `"test"`, each any of
            these.
        columns: What a table's columns `"path"`, `"label"` and `"split"` are called.
        label_regex: Finds the label in each file's name, as its first group.

    Raises:
        NotFoundError: There is nothing there.
        DataError: It holds no images, or a file's name has no label.
        InputError: An argument that cannot work.

    Examples:
        >>> import numpy as np
        >>> pixels = np.zeros((2, 8, 8, 3), np.uint8)
        >>> source = image_source((pixels, ["ant", "bee"]))
        >>> len(source), source[1], source.class_names
        (2, 'image 2', ['ant', 'bee'])
    """
    source = _source(data, columns, label_regex)
    if isinstance(data, str | os.PathLike) and (columns or label_regex):
        text = ",".join(f"{key}={value}" for key, value in (columns or {}).items())
        asked = {"directory": os.path.abspath(data), "columns": text, "label_regex": label_regex}
        source.asked = {key: value for key, value in asked.items() if value}
    return source


def as_asked(
    directory: str,
    columns: str | None = None,
    label_regex: str | None = None,
    unused: Sequence[str] = (),
) -> str | Source:
    """What a source is, with what was said of it, and the columns that are not needed."""
    names = no_columns(directory, *unused)
    # What separates labels may be the comma that stands between the columns.
    for pair in re.findall(r"separator=,|[^,]+", columns or ""):
        part, equals, name = pair.partition("=")
        if not equals:
            raise InputError(f"Columns are given as path=NAME,label=NAME. Received: {columns!r}.")
        names[part.strip()] = name.strip() or name
    if label_regex is None:
        return opened(directory, names)
    return image_source(directory, columns=names, label_regex=label_regex)


def _source(data: Any, columns: Mapping[str, str] | None, label_regex: str | None) -> Source:
    unused = () if label_regex is None else ("label",)
    source = opened(data, no_columns(data, *unused) | dict(columns or {}))
    if not isinstance(source, Source):
        if label_regex is None:
            return Listed(source)
        folders = split_folders(source) or {"": source}
        found = {kind: flat_images(path, True, None) for kind, path in folders.items()}
        splits = [kind for kind, paths in found.items() for _ in paths]
        source = Files([path for paths in found.values() for path in paths], place=place(source))
        if "train" in found:
            source.splits = np.asarray(splits)
    return source if label_regex is None else _relabelled(source, label_regex)


def _relabelled(source: Source, pattern: str) -> Source:
    """A source with the labels that file names hold."""
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise InputError(
            f"label_regex is no regular expression: {error}. Received: {pattern!r}."
        ) from None
    found = [search(os.path.basename(source.name(i))) for i in range(len(source))]
    labels = [match and (match[1] if match.re.groups else match[0]) for match in found]
    if missing := [i for i, label in enumerate(labels) if not label]:
        raise DataError(
            f"label_regex {pattern!r} finds no label in {len(missing):,} of {len(labels):,} file "
            f"names, such as {os.path.basename(source.name(missing[0]))!r}."
        )
    source = source.take(np.arange(len(source)))
    source.labels, source.class_names = numbered(labels)
    source.place += f" by {pattern}"
    return source


def place(data: str | Source) -> str:
    """What says in a run's record where its images come from; of a folder its absolute path."""
    return data.place if isinstance(data, Source) else os.path.abspath(data)


def title_of(data: str | Source) -> str:
    """What a run on these images is called after; of a folder its name."""
    return data.title() if isinstance(data, Source) else os.path.basename(place(data))


def check_images(path: str) -> None:
    """Raises, before anything is read, why a path is no folder, and no other source."""
    path = os.path.expanduser(path)
    if shards.is_shards(path):
        shards.shard_paths(path)
    elif path not in cifar.PUBLISHED and not (is_source(path) and os.path.exists(path)):
        existing_folder(path)


def check_training(source: str | Source) -> None:
    """Raises, before anything is read, why it cannot be trained on, as far as names say it."""
    if isinstance(source, Source):
        _labelled(source)
    else:
        class_folders(split_folders(source).get("train", source), least=2)


def find_parts(data: str | Source, exclude: Any = None) -> Parts:
    """The images to train on, to validate with and to test on, as far as something says them.

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
    training = Listed(folders["train"], exclude, others)
    notes += training.notes
    names = training.class_names or []
    parts: dict[str, tuple[Sequence[str], Any]] = {"train": (training, training.labels)}
    if "val" in folders:
        held_out = Listed(folders["val"], exclude, others)
        notes += held_out.notes
        who = "The validation folder", "the training folder"
        labels = labels_by_name(held_out.labels, held_out.class_names, names, *who)
        parts["val"] = held_out, labels
    paths, test_labels, note = _test_images(folders.get("test"), names)
    if paths:
        parts["test"] = paths, test_labels
    return Parts(parts, names, [line for line in (*notes, note, unread_line(others)) if line])


def _parts_of(source: Source, exclude: Any) -> Parts:
    source = without(source, exclude)
    parts = source.parts() or {"train": source}
    for kind in {"train", "val"} & set(parts):
        _labelled(parts[kind])
    if "train" not in parts:
        raise DataError(f"{source.place!r} has {' and '.join(parts)} but no training images.")
    found = {kind: (part, part.labels) for kind, part in parts.items()}
    return Parts(found, source.class_names or [], list(source.notes))


def _labelled(source: Source) -> Source:
    labels = source.labels
    missing = [] if labels is None else np.flatnonzero(unlabelled(labels))
    if labels is None or source.class_names is None or len(missing) == len(labels):
        raise DataError(f"{source.place!r} says no labels: the images' classes are not known.")
    if len(missing):
        raise DataError(
            f"{source.place!r} says no label of {len(missing):,} of its {len(labels):,} images, "
            f"such as {source.name(missing[0])!r}."
        )
    return source


def without(source: Source, exclude: Any) -> Source:
    """A source without the images that a list names."""
    out = left_out("", exclude)
    if not out:
        return source
    kept = [i for i in range(len(source)) if os.path.abspath(source.name(i)) not in out]
    return source.take(np.asarray(kept, np.int64))


def labelled_place(data: Any, split: str | None = None) -> str:
    """A line about where `labelled` looks, before anything is read; raises what that raises."""
    source = opened(data, no_columns(data, "weight"))
    if isinstance(source, Source):
        part = _labelled(_part(source, split))
        return f"Images: {len(part):,} of {source.place}"
    folder = _split_folder(source, split)
    class_folders(folder)
    return f"Folder: {folder}"


def labelled(data: Any, split: str | None = None) -> tuple[Sequence[str], np.ndarray, list[str]]:
    """Images, their labels and the names of the classes, to measure a model on.

    Those of the split that was asked for, else of `test`, `val` or `train`, the first there is.

    Raises:
        NotFoundError: There is nothing there, or not this split.
        DataError: No images, or no labels.
    """
    source = opened(data, no_columns(data, "weight"))
    if not isinstance(source, Source):
        return find_pictures(_split_folder(source, split))
    part = _labelled(_part(source, split))
    return part, part.labels, part.class_names  # type: ignore[return-value]


def first_split(data: Any, order: Sequence[str]) -> str | None:
    """The first of several parts that there is; `None` where there are no parts."""
    source = opened(data, no_columns(data, "label", "weight"))
    there = source.parts() if isinstance(source, Source) else split_folders(source)
    return next((kind for kind in order if kind in there), None)


def _part(source: Source, split: str | None) -> Source:
    return _chosen(source.parts(), split, source, f"{source.place!r} has no {split!r} part")


def _split_folder(directory: str | os.PathLike, split: str | None = None) -> str:
    directory = existing_folder(directory)
    no_such = f"{directory!r} has no {split!r} folder"
    return _chosen(split_folders(directory), split, directory, no_such)


def _chosen(parts: Mapping[str, Any], split: str | None, whole: Any, no_such: str) -> Any:
    """The split that was asked for; else `test`, `val`, `train` or all, the first there is."""
    if split is not None and split not in parts:
        raise NotFoundError(f"{no_such}; it has: {', '.join(parts) or 'none'}.")
    kinds = ("test", "val", "train") if split is None else (split,)
    return next((parts[kind] for kind in kinds if kind in parts), whole)


def _test_images(
    folder: str | None, names: Sequence[str]
) -> tuple[list[str], np.ndarray | None, str]:
    """Images to test a classifier on, labelled where the folders that they lie in are its classes.

    Returns:
        Paths; their labels, or `None` where the folders say none; a line about what was found,
        which may be empty.
    """
    if folder is None:
        return [], None, ""
    paths, _ = walk_pictures(folder)
    if not paths:
        return [], None, f"{folder!r} holds no image: nothing to test on."
    below = [os.path.relpath(path, folder).split(os.sep) for path in paths]
    inside = [i for i, parts in enumerate(below) if len(parts) > 1]
    found = sorted({below[i][0] for i in inside})
    known = {plain_name(name) for name in names}
    foreign = [name for name in found if plain_name(name) not in known]
    if foreign or not inside:
        why = f"its folders are no classes: {listed(foreign)}" if foreign else "no class folders"
        note = f"{folder!r} holds {len(paths):,} images without labels ({why})"
        return paths, None, f"{note}: they get predictions."
    labels = labels_by_name(np.asarray([found.index(below[i][0]) for i in inside]), found, names)
    loose = len(paths) - len(inside)
    note = f"Not read: {loose:,} images of {folder!r} outside its class folders." if loose else ""
    return [paths[i] for i in inside], labels, note
