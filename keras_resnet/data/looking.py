"""What an image file is, to people: its head, and its pixels in RGB."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from keras_resnet.data.bands import NPY, Bands, eight_bit, of_any_channels
from keras_resnet.data.in_flight import in_flight, most_pixels
from keras_resnet.data.reading import ORIENTATION, Source, load, open_image, read
from keras_resnet.system.errors import DataError


@in_flight
def load_shown(source: Source) -> np.ndarray | Image.Image:
    """As `load` in RGB, for people: of other channels the first three, or the first.

    Raises:
        DataError: It cannot be read at all.
    """
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
            head = Head(str(image.format), image.mode, image.size)
            if orientation:
                head = head._replace(turn=image.getexif().get(ORIENTATION, 1))
            return head
    except UnidentifiedImageError:
        found = of_any_channels(data, 4 * most_pixels())
        if found is None:
            raise
        kind = "NPY" if data.startswith(NPY) else "TIFF"
        return Head(kind, f"{len(found.bands)} channels", found.size)
