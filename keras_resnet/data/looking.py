"""What an image file is, to people: its head, its pixels in RGB, and what those lose."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from keras_resnet.data.bands import NPY, Bands, eight_bit, of_any_channels
from keras_resnet.data.in_flight import in_flight, most_pixels
from keras_resnet.data.items import taken
from keras_resnet.data.reading import ORIENTATION, Source, head, load, open_image, read
from keras_resnet.data.walk import FORMATS
from keras_resnet.system.errors import DataError

_ENDINGS = tuple(e for kind in ("TIFF", "PNG", "PPM", "JPEG2000") for e in FORMATS[kind])
_SAMPLE = 2_000  # images whose heads are looked at before a training


@in_flight
def load_shown(source: Source) -> np.ndarray | Image.Image:
    """As `load` in RGB, for people: of other channels the first three, or the first."""
    try:
        return load(source)
    except DataError:
        _, data = read(source)
        found = None
        with contextlib.suppress(Exception):  # the first error says why
            found = of_any_channels(data, 4 * most_pixels())
        if found is None:
            raise
        bands = found.bands[: 3 if len(found.bands) >= 3 else 1]
        return eight_bit(Bands(bands), 3).convert("RGB")


class Head(NamedTuple):
    """What an image file says of itself: format and mode as Pillow has them, size, orientation."""

    format: str
    mode: str
    size: tuple[int, int]
    turn: int = 1


def file_head(data: bytes, orientation: bool = False) -> Head:
    """What the file of an image is; its pixels are not decoded.

    But for its orientation, the EXIF tag: for that Pillow decodes the whole of a PNG.

    Raises:
        UnidentifiedImageError: It is of no format that is read; Pillow raises others.
    """
    try:
        with open_image(io.BytesIO(data)) as image:
            turn = image.getexif().get(ORIENTATION, 1) if orientation else 1
            return Head(str(image.format), image.mode, image.size, turn)
    except UnidentifiedImageError:
        found = of_any_channels(data, 4 * most_pixels())
        if found is None:
            raise
        kind = "NPY" if data.startswith(NPY) else "TIFF"
        return Head(kind, f"{len(found.bands)} channels", found.size)


def constant_images(paths: Sequence[str], threads: int) -> list[tuple[str, str]]:
    """Images whose values differ, and are all one in 8 bits: 16-bit gray and floats get clipped.

    torchvision's loader gives the same, so they are read, and said: path and Pillow's mode of each.
    Of others the head is read.
    """
    with ThreadPoolExecutor(threads or 1, "keras_resnet-depth") as pool:
        modes = list(pool.map(_lost_mode, paths))
    return [(path, mode) for path, mode in zip(paths, modes, strict=True) if mode]


def constant_line(paths: Sequence[str], threads: int) -> str:
    """One line about such images; empty where there are none. Of many images some are looked at."""
    count = len(paths)
    some = taken(paths, np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int))
    asked = [path for path in some if path.lower().endswith(_ENDINGS)]
    found = constant_images(asked, threads)
    if not found:
        return ""
    path, mode = found[0]
    of = f" of {len(some):,} looked at" if len(some) < count else ""
    return (
        f"{len(found):,} images{of} of 16-bit gray or float values become one constant in 8 bits, "
        f"and teach nothing, such as {path!r} ({mode}): channels=1 (--channels 1) keeps 16 bits."
    )


@in_flight
def _lost_mode(path: str) -> str | None:
    try:
        with head(path) as image:
            if not image.mode.startswith(("I", "F")):
                return None
            in_flight.take(image.width * image.height)
            values, mode = np.asarray(image), image.mode
            seen = image.convert("RGB").getextrema()
    except Exception:  # what cannot be read is said by its reader
        return None
    lost = all(low == high for low, high in seen) and values.min() != values.max()
    return mode if lost else None


# How a whole file of a kind ends.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def check_whole(path: Source, data: bytes, kind: str) -> None:
    """Says of a file whose head is whole that the rest is not, without decoding what has its end.

    Args:
        path: Whose file it is.
        data: The file.
        kind: Its format, as `file_head` has it.

    Raises:
        DataError: It cannot be decoded, as training on it would find out.
    """
    end = _ENDS.get(kind)
    if end is None or not data.endswith(end):
        load_shown(path)
