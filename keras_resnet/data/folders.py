"""Folders of images: what is in them, which class each belongs to, and how they are split."""

from __future__ import annotations

import enum
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from keras_resnet.errors import DataError, InputError, NotFoundError, meant_path

# torchvision/datasets/folder.py IMG_EXTENSIONS, and GIF, of which the first frame is read.
IMG_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif",
)  # fmt: skip


class Stream(enum.IntEnum):
    """What a random number is for; part of its seed, so that streams do not overlap."""

    ORDER, IMAGE, MIX, SPLIT = range(4)


# --- finding the files ---------------------------------------------------------------------------


def find_pictures(
    directory: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    *,
    follow_links: bool = False,
    exclude: str | os.PathLike | Iterable[str] | None = None,
) -> tuple[list[str], np.ndarray, list[str]]:
    """Lists the images of a folder that has one subfolder a class.

    Classes are the sorted folder names, files are in the order of torchvision's `ImageFolder`.

    Returns:
        Paths, their labels (int32), the class names.

    Raises:
        NotFoundError: the folder does not exist.
        DataError: it is a file, or has no class folder, an empty one, or no image.
        InputError: class_names that are not there.
    """
    directory = existing_folder(directory)
    found = class_folders(directory)
    if class_names is None:
        class_names = found
    else:
        class_names = list(class_names)
        missing = [name for name in class_names if name not in found]
        if missing or len(set(class_names)) != len(class_names) or not class_names:
            raise InputError(
                f"class_names must be different folders of {directory!r}. Not there: "
                f"{missing or 'none'}. Given: {class_names}. Found: {found}."
            )
    excluded = _excluded(directory, exclude)
    paths, labels, empty, other = [], [], [], []
    for label, name in enumerate(class_names):
        files, rest = walk_pictures(os.path.join(directory, name), follow_links)
        other += rest
        if not files:
            empty.append(name)
        files = [path for path in files if os.path.abspath(path) not in excluded]
        paths += files
        labels += [label] * len(files)
    if not paths or len(empty) == len(class_names):
        raise DataError(
            f"{directory!r} holds no image in its class folders {listed(class_names)}. "
            f"They hold {_extension_counts(other)}; images end in {', '.join(IMG_EXTENSIONS)}."
        )
    if empty:
        raise DataError(
            f"{directory!r} has class folders without an image: {listed(empty)}. Fill or delete "
            f"them, or name the others with class_names. Images end in "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    return paths, np.asarray(labels, np.int32), list(class_names)


def class_folders(directory: str | os.PathLike, least: int = 1) -> list[str]:
    """Names of the class folders in a folder, sorted, without a look at the images in them.

    Raises:
        NotFoundError: The folder does not exist.
        DataError: It is a file, or has fewer class folders than `least`; the message names the
            folder that is likely meant.
    """
    directory = existing_folder(directory)
    found = _subfolders(directory)
    if not found:
        here = [entry.name for entry in os.scandir(directory) if entry.is_file()]
        raise DataError(
            f"{directory!r} has no class folder: it must hold one folder of images a class. "
            f"It holds {_extension_counts(here)}.{_meant_folder(directory)}"
        )
    meant = _meant_folder(directory) if len(found) < least else ""
    if meant or (len(found) < least and _classes(directory)):
        raise DataError(
            f"{directory!r} has images of one class only ({listed(found)}); a classifier needs two "
            f"or more class folders.{meant}"
        )
    inside = [os.path.join(directory, name) for name in found]
    if least > 1 and all("train" in split_folders(folder) for folder in inside):
        raise DataError(
            f"{directory!r} holds datasets, each with a training folder, and no classes: give one "
            f"of them, such as {inside[0]!r}."
        )
    return found


def _meant_folder(directory: str) -> str:
    """The end of a message: the folder of class folders above or below another folder."""
    below = [os.path.join(directory, name) for name in _subfolders(directory)]
    found = [path for path in below if _classes(path) > 1 or "train" in split_folders(path)]
    if found:
        return f" Did you mean {found[0]!r}?"
    above = os.path.dirname(os.path.abspath(directory))
    if not below and _classes(above) > 1:
        return f" It looks like one class of {above!r}: give that folder."
    return ""


def _classes(directory: str) -> int:
    """Folders in a folder that hold an image themselves."""
    folders = [os.path.join(directory, name) for name in _subfolders(directory)]
    return sum(any(map(is_picture, os.listdir(folder))) for folder in folders)


def _subfolders(directory: str) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def flat_images(directory: str, follow_links: bool, exclude: Any) -> list[str]:
    """Lists the images anywhere below a folder, or raises DataError that says what is there."""
    directory = existing_folder(directory)
    files, other = walk_pictures(directory, follow_links)
    excluded = _excluded(directory, exclude)
    files = [path for path in files if os.path.abspath(path) not in excluded]
    if not files:
        raise DataError(
            f"{directory!r} holds no image. It holds {_extension_counts(other)}; images end "
            f"in {', '.join(IMG_EXTENSIONS)}."
        )
    return files


def existing_folder(directory: str | os.PathLike) -> str:
    """Returns the folder's path, or raises NotFoundError or DataError that say what is there."""
    directory = os.path.expanduser(os.fspath(directory))
    if os.path.isdir(directory):
        return directory
    if os.path.exists(directory):
        raise DataError(f"{directory!r} is a file; a folder with one folder a class is needed.")
    raise NotFoundError(f"{directory!r} does not exist.{meant_path(directory)}")


def walk_pictures(folder: str, follow_links: bool) -> tuple[list[str], list[str]]:
    """Images and other files below a folder, in torchvision's order, without hidden ones."""
    pictures, other = [], []
    for root, _, names in sorted(os.walk(folder, followlinks=follow_links)):
        if _hidden(folder, root):
            continue
        for name in sorted(names):
            if not name.startswith("."):
                (pictures if is_picture(name) else other).append(os.path.join(root, name))
    return pictures, other


def picture_folders(folder: str) -> list[str]:
    """The folders below a folder that hold images themselves, in the order of `walk_pictures`.

    File names are looked at and forgotten: memory grows with folders, not with files.
    """
    return sorted(
        root
        for root, _, names in os.walk(folder)
        if not _hidden(folder, root) and any(map(is_picture, names))
    )


def pictures_in(folder: str) -> list[str]:
    """Names of the images in a folder itself, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if is_picture(e.name) and not e.is_dir())


def is_picture(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS)


def _hidden(folder: str, root: str) -> bool:
    return any(part.startswith(".") for part in root[len(folder) :].split(os.sep))


def _extension_counts(names: Iterable[str]) -> str:
    counts = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in names)
    return ", ".join(f"{n} {ext}" for ext, n in counts.most_common(8)) or "no file"


def listed(names: Sequence[str]) -> str:
    """Names in quotes for a message, the first ten of many."""
    shown = ", ".join(repr(name) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _excluded(directory: str, exclude: Any) -> set[str]:
    """Absolute paths to leave out; relative ones count from the directory.

    A file has one path a line, `#` before a comment, and a JSON string where a name holds a
    newline or begins with `#` or `"`.
    """
    if exclude is None:
        return set()
    if isinstance(exclude, str | os.PathLike):
        try:
            with open(exclude, encoding="utf-8", errors="surrogateescape") as file:
                lines = [line.rstrip("\r\n") for line in file]
        except OSError as error:
            raise NotFoundError(
                f"The exclude list {os.fspath(exclude)!r} cannot be read: {error.strerror}."
            ) from None
        exclude = [
            json.loads(line) if line.startswith('"') else line
            for line in lines
            if line.strip() and not line.startswith("#")
        ]
    return {os.path.abspath(os.path.join(directory, os.fspath(path))) for path in exclude}


def stratified_split(
    labels: Sequence[int] | int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits positions into a kept and a held-out part, class by class.

    Of a class with n images `round(n * share)` are held out, at least one and at most n - 1; a
    class with one image keeps it.

    Args:
        labels: one int an image, or a number of images without labels.
        share: to hold out, between 0 and 1.
        seed: of the choice.

    Returns:
        Two sorted int arrays.
    """
    if isinstance(share, bool) or not 0 < share < 1:
        raise InputError(f"validation_split must lie between 0 and 1. Received: {share!r}.")
    labels = np.zeros(labels, np.int32) if isinstance(labels, int) else np.asarray(labels)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        order = generator(seed, Stream.SPLIT, int(label)).permutation(len(members))
        held[members[order[:count]]] = True
    if not held.any():
        raise DataError(
            f"validation_split={share} leaves nothing to validate on: every class has one image."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def generator(*key: int) -> np.random.Generator:
    """A stream of random numbers of its own for every key."""
    # PCG64 and SeedSequence are fixed across NumPy versions and platforms.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def split_folder(directory: str | os.PathLike, split: str | None = None) -> str:
    """The folder of class folders inside a dataset: `test`, `val` or `train` where it has them.

    Raises:
        NotFoundError: The split that was asked for is not there.
    """
    directory = os.path.expanduser(os.fspath(directory))
    found = split_folders(directory)
    if split is not None:
        if split not in found:
            raise NotFoundError(
                f"{directory!r} has no {split!r} folder; it has: {', '.join(found) or 'none'}."
            )
        return found[split]
    for name in ("test", "val", "train"):
        if name in found and "train" in found:
            return found[name]
    return directory


def split_folders(directory: str | os.PathLike) -> dict[str, str]:
    """Folders named as parts of a dataset: `train`, `val` (or `valid`, `validation`), `test`."""
    aliases = {
        "train": ("train", "training"),
        "val": ("val", "valid", "validation"),
        "test": ("test",),
    }
    found = {}
    for split, names in aliases.items():
        for name in names:
            path = os.path.join(os.fspath(directory), name)
            if os.path.isdir(path):
                found.setdefault(split, path)
    return found


def labels_by_name(
    labels: np.ndarray,
    found: Sequence[str],
    names: Sequence[str],
    what: str = "The folder",
    who: str = "the model",
) -> np.ndarray:
    """Labels by one list of class names turned into those by another.

    Raises:
        InputError: A class of `found` is not among `names`.
    """
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise InputError(
            f"{what} has classes that {who} does not have: "
            f"{', '.join(map(repr, unknown[:10]))}. There are {len(names)}: "
            f"{', '.join(map(repr, sorted(names)[:10]))}{' ...' if len(names) > 10 else ''}."
        )
    positions = np.asarray([names.index(name) for name in found], np.int32)
    return positions[labels]
