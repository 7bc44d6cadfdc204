"""Folders of images: what is in them, which class each belongs to, and how they are split."""

from __future__ import annotations

import enum
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_resnet.data.walk import (
    ENDINGS,
    entries,
    extension,
    has_image_ending,
    holds_picture,
    is_picture,
    left_out,
    unread,
    walk,
    walk_pictures,
)
from keras_resnet.system.errors import DataError, InputError, NotFoundError, meant_path


class Stream(enum.IntEnum):
    """What a random number is for; part of its seed, so that streams do not overlap."""

    ORDER, IMAGE, MIX, SPLIT = range(4)


UNREADABLE = "it cannot be read"  # of a folder, among what is not read


# --- finding the files ---------------------------------------------------------------------------


def find_pictures(
    directory: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    *,
    follow_links: bool = True,
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
    names, found = class_pictures(directory, class_names, follow_links=follow_links)
    excluded = left_out(directory, exclude)
    paths: list[str] = []
    labels: list[int] = []
    for label, folder, pictures in found:
        files = [os.path.join(folder, name) for name in pictures]
        if excluded:
            files = [path for path in files if os.path.abspath(path) not in excluded]
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise no_images(directory, names, {})
    return paths, np.asarray(labels, np.int32), names


def class_pictures(
    directory: str,
    class_names: Sequence[str] | None = None,
    *,
    follow_links: bool = True,
    others: Counter | None = None,
) -> tuple[list[str], Iterator[tuple[int, str, list[str]]]]:
    """The names of the classes, and of each folder a label, its path and the images in it.

    Arguments and errors are those of `find_pictures`; `others` gets the files that are not read, as
    `unread` counts them.
    """
    found = class_folders(directory)
    folder_of = _folders_by_name(directory, found)
    names = found if class_names is None else list(class_names)
    missing = [name for name in names if plain_name(name) not in folder_of]
    if missing or len(set(names)) != len(names) or not names:
        raise InputError(
            f"The `class_names` passed did not match the names of the subdirectories of "
            f"{directory!r}; they must be different ones of them. Not there: "
            f"{missing or 'none'}. Given: {names}. Found: {found}."
        )

    def visit() -> Iterator[tuple[int, str, list[str]]]:
        empty, rest, failed = [], Counter[tuple[str, str]](), list[str]()
        for label, name in enumerate(names):
            count = 0
            folder = os.path.join(directory, folder_of[plain_name(name)])
            for root, files in sorted(walk(folder, follow_links, failed)):
                pictures = [file for file in files if has_image_ending(file)]
                if len(pictures) < len(files):
                    rest.update(unread(file for file in files if not has_image_ending(file)))
                count += len(pictures)
                yield label, root, pictures
            if not count:
                empty.append(name)
        if len(empty) == len(names):
            raise no_images(directory, names, rest)
        if empty:
            raise DataError(
                f"{directory!r} has class folders without an image: {listed(empty)}. Fill or "
                f"delete them, or name the others with class_names. Images end in {ENDINGS}."
            )
        if others is not None:
            others.update(rest)
            others.update({("folder", UNREADABLE): len(failed)} if failed else {})
            loose = filter(is_picture, entries(directory)[0])
            others.update(unread(loose, "outside the class folders"))

    return names, visit()


def no_images(directory: str, names: Sequence[str], rest: Mapping[tuple[str, str], int]):
    """The error of class folders without images, which says what they hold."""
    counts = Counter[str]()
    for (ending, _), count in rest.items():
        counts[ending] += count
    return DataError(
        f"No images found in the class folders of {directory!r}, {listed(names)}. "
        f"They hold {_shown(counts)}; images end in {ENDINGS}."
    )


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
        raise DataError(
            f"{directory!r} has no class folder: it must hold one folder of images a class. "
            f"It holds {_extension_counts(entries(directory)[0])}.{_meant_folder(directory)}"
        )
    meant = _meant_folder(directory) if len(found) < least else ""
    if meant or (len(found) < least and _classes(directory)):
        raise DataError(
            f"{directory!r} has images of one class only ({listed(found)}); a classifier needs two "
            f"or more class folders.{meant}"
        )
    inside = [os.path.join(directory, name) for name in found]
    if least > 1 and all(map(_has_training, inside)):
        raise DataError(
            f"{directory!r} holds datasets, each with a training folder, and no classes: give one "
            f"of them, such as {inside[0]!r}."
        )
    return found


def _meant_folder(directory: str) -> str:
    """The end of a message: the folder of class folders above or below another folder."""
    below = [os.path.join(directory, name) for name in _subfolders(directory)]
    found = [path for path in below if _classes(path) > 1 or _has_training(path)]
    if found:
        return f" Did you mean {found[0]!r}?"
    above = os.path.dirname(os.path.abspath(directory))
    if not below and _classes(above) > 1:
        return f" It looks like one class of {above!r}: give that folder."
    return ""


def _has_training(directory: str) -> bool:
    return any(split_of(name) == "train" for name in _subfolders(directory))


def _classes(directory: str) -> int:
    """Folders in a folder that hold an image themselves."""
    folders = [os.path.join(directory, name) for name in _subfolders(directory)]
    return sum(any(map(is_picture, os.listdir(folder))) for folder in folders)


def plain_name(name: str) -> str:
    """A class's name in the form that it is compared in: macOS and others store accents apart.

    Examples:
        >>> plain_name("cafe\u0301") == plain_name("caf\u00e9")
        True
    """
    return unicodedata.normalize("NFC", name)


def _folders_by_name(directory: str, found: Sequence[str]) -> dict[str, str]:
    """Folders by the form of their names that is compared; DataError where two are the same."""
    by_name: dict[str, str] = {}
    for name in found:
        if by_name.setdefault(plain_name(name), name) != name:
            raise DataError(
                f"{directory!r} has two class folders with the same name {name!r}, once with "
                "composed and once with separate accents; move the images of one into the other."
            )
    return by_name


def flat_images(directory: str, follow_links: bool, exclude: Any) -> list[str]:
    """Lists the images anywhere below a folder, or raises DataError that says what is there."""
    directory = existing_folder(directory)
    files, other = walk_pictures(directory, follow_links)
    excluded = left_out(directory, exclude)
    files = [path for path in files if os.path.abspath(path) not in excluded]
    if not files:
        raise DataError(
            f"{directory!r} holds no image. It holds {_extension_counts(other)}; images end "
            f"in {ENDINGS}."
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


def _extension_counts(names: Iterable[str]) -> str:
    return _shown(Counter(map(extension, names)))


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {ext}" for ext, n in counts.most_common(8)) or "no file"


def listed(names: Sequence[str]) -> str:
    """Names in quotes for a message, the first ten of many; long ones lose their middle."""
    texts = [text if len(text := repr(name)) < 99 else text[:60] + "..." + text[-30:]
             for name in names[:10]]  # fmt: skip
    shown = ", ".join(texts)
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def stratified_split(
    labels: Sequence[int] | int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the positions of labels, or so many of one class, into a kept and a held-out part.

    Of a class with n images `round(n * share)` are held out, at least one and at most n - 1; a
    class with one image keeps it.

    Returns:
        Two sorted int arrays.
    """
    if isinstance(share, bool) or not 0 < share < 1:
        raise InputError(f"validation_split must lie between 0 and 1. Received: {share!r}.")
    labels = np.zeros(labels, np.int32) if isinstance(labels, int) else np.asarray(labels)
    labels = rarest(labels)
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


def part_of(whole: range, which: int, of: int) -> range:
    """Which images of a batch one of several processes takes; the first never takes the fewest.

    Examples:
        >>> [list(part_of(range(8, 13), i, 3)) for i in range(3)]
        [[8, 9], [10, 11], [12]]
    """
    return whole[-(-len(whole) * which // of) : -(-len(whole) * (which + 1) // of)]


def mixed_with(whole: range, first: int) -> list[int]:
    """What the first image of a part of a batch may be mixed with, nearest first: see `Mix`.

    Examples:
        >>> mixed_with(range(8, 13), 10)
        [9, 8, 12, 11, 10]
    """
    return [*range(first - 1, whole.start - 1, -1), *range(whole.stop - 1, first - 1, -1)]


# --- train, val and test -------------------------------------------------------------------------

_SPLITS = {
    "train": "train|training|trn",
    "val": "val|valid|validation|dev|development|eval|evaluation",
    "test": "test|testing|tst",
}
_SPLIT_SUFFIX = r"(set|data|dataset|split|images?|imgs?|pictures|photos)?\d*"


def split_of(name: str) -> str | None:
    """Which part of a dataset a folder's name says: `"train"`, `"val"`, `"test"` or None.

    Examples:
        >>> [split_of(name) for name in ("Training", "test_set", "dev", "trainer")]
        ['train', 'test', 'val', None]
    """
    plain = re.sub(r"[\W_]+", "", name).casefold()
    for split, names in _SPLITS.items():
        if re.fullmatch(rf"\d*({names}){_SPLIT_SUFFIX}", plain):
            return split
    return None


def split_folders(directory: str | os.PathLike) -> dict[str, str]:
    """The parts of a dataset: `train`, `val` and `test`, by whatever usual names they are called.

    A folder is a part only where its siblings are parts too: a class may be called `train`. What
    holds no image does not count, and neither does what lies beside a training and another part
    that have a class in common.

    Raises:
        DataError: Two folders for the same part.
    """
    directory = existing_folder(directory)
    kinds: dict[str, list[str]] = {}
    others = []
    for name in _subfolders(directory):
        kind = split_of(name)
        (others if kind is None else kinds.setdefault(kind, [])).append(name)
    classes = {
        kind: {c for name in names for c in _subfolders(os.path.join(directory, name))}
        for kind, names in kinds.items()
    }
    if any(holds_picture(os.path.join(directory, name)) for name in others):
        rest = classes.get("val", set()) | classes.get("test", set())
        if not classes.get("train", set()) & rest:
            return {}
    for kind, names in kinds.items():
        if len(names) > 1 and classes[kind]:
            raise DataError(
                f"{directory!r} has several folders for {kind}: {listed(names)}; move or rename "
                "all but one."
            )
        if len(names) > 1:  # classes called test1, test2 ...
            return {}
    order = [kind for kind in _SPLITS if kind in kinds]
    return {kind: os.path.join(directory, kinds[kind][0]) for kind in order}


def _subfolders(directory: str) -> list[str]:
    _, folders, links = entries(directory)
    return sorted(folders + links)


def layout(directory: str | os.PathLike, found: dict[str, str]) -> str:
    """One line on which folders `split_folders` took as what; empty where all are classes."""
    directory = os.fspath(directory)
    names = _subfolders(directory)
    if not found:
        alike = [name for name in names if split_of(name)]
        verb = "is a class" if len(alike) == 1 else "are classes"
        return f"{listed(alike)} {verb} here, as the folders beside it are." if alike else ""
    used = {kind: os.path.basename(path) for kind, path in found.items()}
    line = "Folders: " + ", ".join(f"{kind} from {name!r}" for kind, name in used.items())
    rest = [n for n in names if n not in used.values()]
    rest = [n for n in rest if holds_picture(os.path.join(directory, n))]
    return line + (f"; not used: {listed(rest)}." if rest else ".")


class Numbers(list[str]):
    """Names of classes that are nothing but the numbers that the labels were given as."""


def labels_by_name(
    labels: np.ndarray,
    found: Sequence[str],
    names: Sequence[str],
    what: str = "The data",
    who: str = "the model",
) -> np.ndarray:
    """Labels by one list of class names turned into those by another; -1 stays.

    Labels that are `Numbers`, of which none is the name of a class, are numbers of the classes.
    Tuples of labels stay tuples, and None stays None.

    Raises:
        InputError: A class of `found` is not among `names`.
    """
    position = {plain_name(name): i for i, name in enumerate(names)}
    unknown = sorted(name for name in found if plain_name(name) not in position)
    if isinstance(found, Numbers) and len(unknown) == len(found):
        position = {name: int(name) for name in found}
        largest = max((position[found[k]] for k in np.unique(flat(labels))), default=0)
        if largest >= len(names):
            raise InputError(
                f"{what} has the label {largest}, but {who} has {len(names)} classes, which are "
                f"numbered from 0: {listed(list(names))}."
            )
    elif unknown:
        raise InputError(
            f"{what} has classes that {who} does not have: "
            f"{', '.join(map(repr, unknown[:10]))}. There are {len(names)}: "
            f"{', '.join(map(repr, sorted(names)[:10]))}{' ...' if len(names) > 10 else ''}."
        )
    places = np.asarray([position[plain_name(name)] for name in found], np.int32)
    if labels.dtype == object:
        return np.fromiter((of and tuple(places[list(of)].tolist()) for of in labels), object)
    return np.where(labels < 0, np.int32(-1), places[labels])


def flat(labels: np.ndarray) -> np.ndarray:
    """All labels that there are, int32: one or none an image, or where they are tuples several.

    Examples:
        >>> flat(np.fromiter([(0, 2), (), None, (2,)], object)).tolist()
        [0, 2, 2]
    """
    if labels.dtype == object:
        return np.asarray([label for of in labels for label in of or ()], np.int32)
    return labels[labels >= 0]


def rarest(labels: np.ndarray) -> np.ndarray:
    """A label an image: of several the rarest, and of none one behind all others."""
    if labels.dtype != object:
        return labels
    counts = np.bincount(flat(labels))
    found = [min(of, key=lambda label: counts[label], default=len(counts)) for of in labels]
    return np.asarray(found, np.int32)


def unlabelled(labels: np.ndarray) -> np.ndarray:
    """Whether the label of each image is not known: -1, or where they are tuples None."""
    if labels.dtype == object:
        return np.asarray([of is None for of in labels], bool)
    return labels < 0
