"""Labels of images: checked, and in the form that a loss wants."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_resnet.data.folders import Numbers, flat, listed, plain_name
from keras_resnet.system.errors import DataError, InputError, did_you_mean
from keras_resnet.system.files import printable

# What people call a column of labels, or of several an image; the first that is there is taken.
LABEL_COLUMNS = (
    "label class target category class_name label_name y labels classes tags species breed "
    "fine_label"
)


def checked_labels(
    labels: Sequence[int] | None, class_names: Sequence[str] | None, count: int
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels as int32 `(count,)`, and the name of each; numbers where no names are given.

    Without labels the names are those given, or None.

    Raises:
        InputError: Another number of labels, no ints, or one that has no name.
    """
    names = None if class_names is None else [str(name) for name in class_names]
    if labels is None:
        return None, names
    labels = np.asarray(labels)
    several = labels.dtype == object and all(isinstance(of, tuple) for of in labels)
    if labels.shape != (count,) or not (several or np.issubdtype(labels.dtype, np.integer)):
        raise InputError(
            f"labels must be one int an image ({count}), or a tuple of such. Received: "
            f"{labels.dtype} of shape {labels.shape}."
        )
    least, most = (f(flat(labels), initial=0) for f in (np.min, np.max))
    if not names:
        names = [str(i) for i in range(int(most) + 1)]
    if least < 0 or most >= len(names):
        raise InputError(
            f"labels must lie in 0..{len(names) - 1} (classes {listed(names)}). "
            f"Received: {least}..{most}."
        )
    return labels if several else labels.astype(np.int32), names


def numbered(
    values: Sequence[Any], class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels of any kind as int32, and the names of the classes.

    Whole numbers from 0 on are labels, and their names are given or the numbers. Others are names:
    the classes are sorted, as folders are; whole numbers by their size. None is no label: -1.
    Several of an image, a list of them or a text with `|` between, are a tuple; then all are.

    Raises:
        InputError: A number or name that `class_names` does not have.

    Examples:
        >>> numbered(["bee", "ant", "bee"])
        (array([1, 0, 1], dtype=int32), ['ant', 'bee'])
        >>> numbered(["0", "2"], ["ant", "bee", "cat"])
        (array([0, 2], dtype=int32), ['ant', 'bee', 'cat'])
        >>> numbered(["bee|ant", "bee", "|"])
        (array([(0, 1), (1,), ()], dtype=object), ['ant', 'bee'])
    """
    lists = [value for value in values if isinstance(value, (list, tuple))]
    known = [value for value in values if value is not None]
    if lists and len(lists) == len(known) and all(len(value) == 1 for value in lists):
        values = [value and value[0] for value in values]
    elif lists or any("|" in str(value) for value in known):
        sets = [None if value is None else _several(value) for value in values]
        each, names = numbered([one for of in sets for one in of or ()], class_names)
        left = iter(each.tolist())
        tuples = (of if of is None else tuple(sorted({next(left) for _ in of})) for of in sets)
        return np.fromiter(tuples, object), names
    texts = {value: str(value).strip() for value in values if value is not None}
    whole = bool(texts) and all(re.fullmatch(r"\d{1,9}", text) for text in texts.values())
    named: Any = list
    if whole:
        named = list if class_names is not None else Numbers
        numbers = {value: int(text) for value, text in texts.items()}
        found = sorted(set(numbers.values()))
        if class_names is not None or (found[0] == 0 and found[-1] < 10 * len(found) + 100):
            names = [str(i) for i in range(found[-1] + 1)] if class_names is None else class_names
            if found[-1] >= len(names):
                raise InputError(
                    f"labels must lie in 0..{len(names) - 1} (classes {listed(list(names))}). "
                    f"Received: {found[-1]}."
                )
            labels = [-1 if value is None else numbers[value] for value in values]
            return np.asarray(labels, np.int32), named(map(str, names))
        class_names = list(map(str, found))
    names = sorted(set(texts.values())) if class_names is None else list(map(str, class_names))
    position = {plain_name(name): i for i, name in enumerate(names)}
    if unknown := sorted(text for text in texts.values() if plain_name(text) not in position):
        raise InputError(f"There is no class {unknown[0]!r}; there are: {listed(names)}.")
    places = {value: position[plain_name(text)] for value, text in texts.items()} | {None: -1}
    return np.asarray([places[value] for value in values], np.int32), named(names)


def _several(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        value = [text.strip() for text in str(value).split("|")]
    return [one for one in value if one is not None and str(one).strip()]


def checked_mode(
    mode: str | None,
    names: Sequence[str] | None,
    soft: bool,
    sampler: str | None = None,
    labels: np.ndarray | None = None,
) -> str | None:
    """The form of the labels, or InputError; mixed and smoothed ones (`soft`) are floats."""
    if (soft or sampler) and names is None:
        raise InputError("mixup, cutmix, label_smoothing and sampler need labels.")
    if labels is not None and labels.dtype == object and mode is not None:
        if mode in ("categorical", "binary"):
            raise InputError(f"label_mode={mode!r} is for one label an image; there are several.")
        return "multi_hot"
    if mode == "binary" and names is not None and len(names) != 2:
        raise InputError(
            f"With label_mode='binary' there must be exactly 2 classes. Received: {len(names)}: "
            f"{listed(names)}."
        )
    return "categorical" if soft and mode in ("int", None) else mode


def multi_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels, one an image or a tuple of several, as float32 0 and 1, `(n, classes)`.

    Examples:
        >>> multi_hot(np.fromiter([(0, 2), ()], object), 3).tolist()
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    hot = np.zeros((len(labels), classes), np.float32)
    several = labels.dtype == object
    counts = np.asarray([len(of) for of in labels], int) if several else 1
    hot[np.repeat(np.arange(len(labels)), counts), flat(labels)] = 1
    return hot


def joined(hits: np.ndarray, names: Sequence[str]) -> str:
    """The classes of an image as a table's cell has them: `a|b`, and `|` for none."""
    return "|".join(names[k] for k in np.flatnonzero(hits)) or "|"


def encoded(labels: np.ndarray, mode: str, classes: int) -> np.ndarray:
    """Labels as `"int"`, or float32: `"binary"` `(n, 1)`, `"categorical"` and `"multi_hot"`."""
    if mode in ("categorical", "multi_hot"):
        return multi_hot(labels, classes)
    if mode == "binary":
        return labels.astype(np.float32)[:, None]
    return labels


def class_weights(
    given: str | Mapping[str, float] | None, counts: Mapping[str, int]
) -> list[float] | None:
    """How much each class counts in the loss; `None` where all count alike.

    Args:
        given: `"balanced"`, scikit-learn's `n / (classes * count)`; or numbers by name.
        counts: Training images of each class, in the order of the labels.

    Raises:
        InputError: A class that there is not.
    """
    if given is None:
        return None
    if given == "balanced":
        present = [count for count in counts.values() if count]
        return [sum(present) / (len(present) * count or 1) for count in counts.values()]
    named = {plain_name(name): weight for name, weight in dict(given).items()}
    if unknown := sorted(set(named) - set(map(plain_name, counts))):
        raise InputError(
            f"class_weights has {unknown[0]!r}, and the classes are {listed(list(counts))}."
            f"{did_you_mean(unknown[0], counts)}"
        )
    return [named.get(plain_name(name), 1.0) for name in counts]


def described(dataset: Any) -> tuple[str, Sequence[str], list[tuple[str, int]]]:
    """What a prompt and a notebook show of an `ImageDataset`: a line, and the classes' images."""
    line = (
        f"{dataset.num_samples:,} images, {len(dataset.class_names or ())} classes, "
        f"{len(dataset):,} batches of {dataset.batch_size}, {dataset.output}"
    )
    return line, ("Class", "Images"), list(dataset.class_counts.items())


def printed(dataset: Any) -> str:
    """What `print` shows of an `ImageDataset`: counts, root, transform, as torchvision's."""
    paths, labels = dataset.file_paths, dataset.labels
    root = os.path.dirname(paths[0])
    with contextlib.suppress(ValueError):  # relative and absolute ones have nothing in common
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    if labels is not None and len(set(labels)) == 1:
        root = os.path.dirname(root)
    counts = [f"{printable(name)} {count:,}" for name, count in dataset.class_counts.items()]
    lines = [f"Dataset {type(dataset).__name__}", f"Number of images: {dataset.num_samples:,}"]
    lines += [f"Root location: {printable(root)}"]
    if counts:
        lines.append(f"Classes: {len(counts)} ({', '.join(counts[:8])}"
                     f"{f' and {len(counts) - 8} more' if len(counts) > 8 else ''})")  # fmt: skip
    lines += [] if dataset.augment is None else [f"Augmentation: {dataset.augment}"]
    lines += [f"Transform: {dataset.preprocess}"]
    return "\n    ".join(lines)


def check_classes(class_counts: Mapping[str, int], where: str = "The dataset") -> None:
    """Raises DataError unless there are images of two classes at least."""
    present = [name for name, count in class_counts.items() if count]
    if len(present) < 2:
        raise DataError(
            f"{where} has images of one class only ({listed(present)}); a classifier needs two "
            f"or more class folders."
        )
