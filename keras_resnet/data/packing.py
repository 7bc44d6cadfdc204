"""`pack`: images into tar shards, in WebDataset's layout."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from keras_resnet.data.bands import Bands
from keras_resnet.data.items import Source, as_image
from keras_resnet.data.looking import check_whole, file_head
from keras_resnet.data.opening import find_parts, opened, place
from keras_resnet.data.reading import in_flight, read
from keras_resnet.data.shards import open_shard
from keras_resnet.data.walk import FORMATS, IMG_EXTENSIONS, holds_picture
from keras_resnet.system.errors import DataError, InputError, NotFoundError, between, reason_of
from keras_resnet.system.files import printable, replace_file

logger = logging.getLogger("keras_resnet")


@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack` has written; `print` it.

    Attributes:
        folder: That holds the shards.
        shards: Their paths.
        count: Images in them.
        skipped: `(path, reason)` of files that could not be read.
    """

    folder: Path
    shards: list[Path]
    count: int
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        size = sum(path.stat().st_size for path in self.shards)
        lines = [
            f"Written: {self.count:,} images in {len(self.shards):,} "
            f"shard{'s' if len(self.shards) > 1 else ''} of {size / 1e6:,.1f} MB, "
            f"{printable(self.folder)}"
        ]
        if self.skipped:
            lines.append(f"Left out, as they cannot be read: {len(self.skipped):,}.")
        return "\n".join(lines)


def pack(
    data: Any, folder: str | os.PathLike, *, shard_mb: float = 256.0, exclude: Any = None
) -> Packed:
    """Writes images into tar archives that `train` and others read at random: see `image_source`.

    Files that begin and end as images do are copied, not decoded, in the order of the folder, so
    that training on the shards is training on the folder. `CLASS/NAME.jpg` and its label
    `CLASS/NAME.cls`, a number, stand one after the other; parts become `train-000000.tar`,
    `val-000000.tar` ..., what has none `images-000000.tar`. The same images give the same bytes.

    Args:
        data: As `train` takes it: a folder, a table, arrays.
        folder: Where the shards go; it is made.
        shard_mb: Megabytes of a shard, at most, unless one image has more.
        exclude: Images to leave out: paths, or a file as `scan` writes.

    Raises:
        InputError: There are shards or images in the folder, or it is part of what is packed.
        NotFoundError: The data does not exist.
        DataError: No images, no labels, or the shards cannot be written.
    """
    between("shard_mb", shard_mb, 0, ends="(]")
    target = Path(folder).expanduser()
    if target.is_dir() and any(target.glob("*.tar")):
        raise InputError(f"{str(target)!r} holds shards: give another folder, or delete them.")
    source = opened(data)
    read_from = Path(place(source)).resolve()
    inside = read_from.is_dir() and target.resolve().is_relative_to(read_from)
    if inside or (target.is_dir() and holds_picture(str(target))):
        what = "lies in the folder that is packed" if inside else "holds images"
        raise InputError(f"{str(target)!r} {what}: give a new folder beside it for the shards.")
    parts = find_parts(source, exclude)
    if isinstance(source, Source) and source.weights is not None:
        logger.warning("Shards hold no weights: training on them counts all images alike.")
    shards: list[Path] = []
    skipped: list[tuple[str, str]] = []
    count = 0
    try:
        for kind, (paths, labels) in parts.of.items():
            samples = _samples(paths, labels, parts.names, skipped)
            prefix = kind if len(parts.of) > 1 else "images"
            for number, shard in enumerate(_in_shards(samples, int(shard_mb * 1e6))):
                target.mkdir(parents=True, exist_ok=True)  # not where there is nothing to write
                path = target / f"{prefix}-{number:06}.tar"
                replace_file(path, lambda name, shard=shard: _write(name, shard))
                shards.append(path)
                count += len(open_shard(str(path)))
    except OSError as error:
        raise DataError(f"The shards cannot be written: {error.strerror or error}.") from error
    if not count:
        raise DataError(f"None of the images can be read; the first: {skipped[0][1]}")
    return Packed(target, shards, count, skipped)


# A sample: the names and contents of its files.
_Sample = list[tuple[str, bytes]]


def _samples(
    paths: Sequence[str],
    labels: np.ndarray | None,
    names: Sequence[str],
    skipped: list[tuple[str, str]],
) -> Iterator[_Sample]:
    taken: set[str] = set()
    for i, path in enumerate(paths):
        try:
            data, ending = _file(path)
        except (DataError, NotFoundError) as error:
            logger.warning("Left out: %s", error)
            skipped.append((path, str(error)))
            continue
        # WebDataset takes what is behind the first dot for the kind of file.
        stem = re.sub(r"[\0/\\.]", "_", _split_ending(os.path.basename(path))[0])
        label = None if labels is None else labels[i]
        if isinstance(label, tuple):  # several classes, none of which is its folder
            label = "".join(f"{names[k]}|" for k in label) or "|"
        elif label is not None:
            safe = re.sub(r"[\0/\\]", "_", names[label])
            stem = f"{safe if safe.strip('. ') else f'class-{label}'}/{stem}"
        name = stem
        for number in range(2, len(paths) + 2):
            if name not in taken:
                break
            name = f"{stem}-{number}"
        taken.add(name)
        sample = [(name + ending, data)]
        if label is not None:
            sample.append((f"{name}.cls", str(label).encode()))
        yield sample


def _split_ending(name: str) -> tuple[str, str]:
    """A name and the image's ending behind it; without one the whole name, as of `row 3.1`."""
    stem, ending = os.path.splitext(name)
    return (stem, ending.lower()) if ending.lower() in IMG_EXTENSIONS else (name, "")


@in_flight
def _file(path: str) -> tuple[bytes, str]:
    """An image's bytes and how its name ends, else what they are; of what is no file a PNG."""
    _, data = read(path)
    try:
        if isinstance(data, bytes):
            kind = file_head(data).format  # of every file: what is no image is left out
            check_whole(path, data, kind)
            return data, _split_ending(path)[1] or FORMATS[kind][0]
        image = data if isinstance(data, Image.Image) else as_image(data)
        stream = io.BytesIO()
        if isinstance(image, Bands):
            np.save(stream, np.asarray(image))
            return stream.getvalue(), ".npy"
        image.save(stream, "PNG")
        return stream.getvalue(), ".png"
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{path!r} is no image: its first bytes {data[:8]!r} belong to no format that is read "
            "here."
        ) from None
    except Exception as error:  # Pillow's readers and writers raise many kinds
        raise DataError(f"{path!r} cannot be packed: {reason_of(error)}") from error


def _in_shards(samples: Iterable[_Sample], most: int) -> Iterator[Iterator[_Sample]]:
    """Samples in groups, each of which is read to its end before the next."""
    samples = iter(samples)
    waiting = next(samples, None)

    def group() -> Iterator[_Sample]:
        nonlocal waiting
        size, first = 0, True
        while waiting is not None:
            size += sum(512 + -(-len(data) // 512) * 512 for _, data in waiting)
            if size > most and not first:
                return
            yield waiting
            first, waiting = False, next(samples, None)

    while waiting is not None:
        yield group()


def _write(path: str, samples: Iterable[_Sample]) -> None:
    # Neither owner nor time: the same images give the same bytes.
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for name, data in (file for sample in samples for file in sample):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
            tar.members = []  # it would keep them all
