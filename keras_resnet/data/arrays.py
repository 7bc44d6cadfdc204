"""Images in memory: arrays of pixels with their labels, as `keras.datasets` gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from keras_resnet.data.folders import Numbers
from keras_resnet.data.items import Source
from keras_resnet.data.labels import numbered
from keras_resnet.system.errors import InputError


def is_picture(source: Any) -> bool:
    """Whether a source is a Pillow image, the bytes of a file or an open one."""
    kinds = (bytes, bytearray, memoryview, Image.Image)
    return isinstance(source, kinds) or hasattr(source, "read")


def as_array(source: Any) -> np.ndarray:
    """Numbers as an array of NumPy's; torch's may lie on a GPU, or keep their gradient's graph."""
    detach = getattr(source, "detach", None)
    return np.asarray(source if detach is None else detach().cpu())


def is_array(source: Any) -> bool:
    """Whether a source is an array or tensor of numbers, and not of paths."""
    is_one = hasattr(source, "__array__") and not is_picture(source)
    return is_one and as_array(source).dtype.kind not in "OSU"


def whole_pixels(image: np.ndarray) -> np.ndarray:
    """An array of pixel values as uint8, or uint16 where such a one needs 16 bits.

    Raises:
        InputError: Its numbers are not whole ones of 0..255: nobody knows what they are.
    """
    if image.dtype == np.uint8 or (image.dtype == np.uint16 and image.size and image.max() > 255):
        return image
    known = image.dtype.kind in "iuf" and image.size > 0
    # 0 and 1 alone may be black and white of 0..1.
    if known and 1 < image.max() <= 255 and image.min() >= 0 and (image == np.round(image)).all():
        return image.astype(np.uint8)
    shown = f", {image.min():.3g} to {image.max():.3g}" if known else ""
    raise InputError(
        "An image given as an array holds whole pixel values 0 to 255, as uint8 has them: "
        f"(image * 255).round().astype('uint8') of 0 to 1. Received: {image.dtype}{shown}."
    )


class Arrays(Source):
    """Images of one size in memory.

    They are `(n, height, width)` or `(n, height, width, channels)` of whole numbers 0..255, or
    uint16; `(n, 3, height, width)` is turned. Labels are a number or a name an image, or rows of 0
    and 1, which is one for each class that the image shows; or lists of numbers or names.

    Raises:
        InputError: Other numbers or another shape, or labels that do not fit.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        class_names: Sequence[str] | None = None,
        *,
        name: str = "image {}",  # with its number from 1
        place: str | None = None,  # made of the contents by default
    ):
        images = as_array(images)
        if images.ndim and not len(images):
            raise InputError(f"There are no images. Received: an array of shape {images.shape}.")
        images = whole_pixels(images)
        if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3, 4):
            images = images.transpose(0, 2, 3, 1)
        if images.ndim not in (3, 4):
            raise InputError(
                "Images in an array are (n, height, width) or (n, height, width, 1, 3 or 4). "
                f"Received: shape {images.shape}."
            )
        self._images, self._name = images, name
        if labels is not None:
            values, columns = _values(labels, len(images))
            if columns and class_names is None:
                class_names = Numbers(map(str, range(columns)))
            self.labels, self.class_names = numbered(values, class_names)
            if isinstance(class_names, Numbers):
                self.class_names = class_names
        if place is None:
            marks = hashlib.sha256(np.ascontiguousarray(images))
            marks.update(b"" if labels is None else str(values).encode())
            place = f"arrays-{marks.hexdigest()[:12]}"
        self.place = place

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Its number, in words."""
        return self._name.format(index + 1)

    def read(self, index: int) -> np.ndarray:
        """Its pixels."""
        return self._images[index]


def _values(labels: Any, count: int) -> tuple[list[Any], int]:
    """The label or labels of each image, and how many columns of 0 and 1 they stood in."""
    try:
        found = as_array(labels)
    except ValueError:  # lists of several lengths
        found = np.fromiter(labels, object)
    rows = found.ndim == 2 and found.shape[1] > 1
    ones = rows and len(found) == count and found.dtype.kind in "biuf"
    if ones and ((found == 0) | (found == 1)).all():
        one = (found.sum(1) == 1).all()
        hot = [np.flatnonzero(row).tolist() for row in found]
        return (found.argmax(1).tolist() if one else hot), found.shape[1]
    several = rows and not hasattr(labels, "__array__")  # lists of numbers or names, all as long
    if len(found) != count or not (several or found.size == count):
        raise InputError(
            f"There must be one label an image ({count}), several in a list, or a row of 0 and 1. "
            f"Received: labels of shape {found.shape}."
        )
    return (found if several else found.reshape(-1)).tolist(), 0
