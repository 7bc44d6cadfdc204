"""Images that no 8-bit mode of Pillow holds: 16 bits a value, and any number of channels."""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from keras_resnet.system.errors import DataError, InputError, reason_of

# Channels of a `color_mode`; another number of channels is its own.
COLOR_MODES = {"grayscale": 1, "rgb": 3, "rgba": 4}
MOST_CHANNELS = 1024

NPY = b"\x93NUMPY"  # what a file of `np.save` begins with
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def checked_color_mode(value: Any) -> str | int:
    """A `color_mode` in its one form, or InputError: channels that have a name become that."""
    if isinstance(value, str) and value in COLOR_MODES:
        return value
    if isinstance(value, int | np.integer) and 1 <= value <= MOST_CHANNELS and value is not True:
        return next((name for name, n in COLOR_MODES.items() if n == value), int(value))
    raise InputError(
        f"`color_mode` must be one of {sorted(COLOR_MODES)}, or a number of channels up to "
        f"{MOST_CHANNELS}. Received: {value!r}."
    )


def _of_each(name: str) -> Callable[..., Bands]:
    """Pillow's method of each band; it turns no 16 bits between the pixels: that floats do."""

    def changed(band: Image.Image, *args: Any, **options: Any) -> Image.Image:
        if band.mode == "L" or name not in ("transform", "rotate"):
            return getattr(band, name)(*args, **options)
        floats = getattr(Image.fromarray(np.asarray(band, np.float32)), name)(*args, **options)
        return Image.fromarray(np.clip(np.rint(floats), 0, 65535).astype(np.uint16))

    return lambda bands, *args, **options: bands.each(lambda one: changed(one, *args, **options))


class Bands:
    """An image of one Pillow image a channel, all of mode `"L"` or `"I;16"`, which change alike.

    It has what is used here of a Pillow image.
    """

    def __init__(self, bands: Sequence[Image.Image]):
        self.bands = list(bands)
        self.mode, self.size = self.bands[0].mode, self.bands[0].size
        self.width, self.height = self.size

    def each(self, change: Callable[[Image.Image], Image.Image]) -> Bands:
        """Each band changed."""
        return Bands([change(band) for band in self.bands])

    crop, resize, transpose, transform, rotate = map(
        _of_each, ("crop", "resize", "transpose", "transform", "rotate")
    )

    def getbands(self) -> tuple[str, ...]:
        """One: what fills one band fills all."""
        return ("L",)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """uint8 or uint16, (height, width, channels)."""
        return np.stack([np.asarray(band) for band in self.bands], axis=-1).astype(
            dtype or (np.uint8 if self.mode == "L" else np.uint16), copy=False
        )


AnyPicture = Image.Image | Bands


def in_eight_bits(change: Callable[..., Image.Image]) -> Callable[..., Any]:
    """A change of colours for all images: Pillow has them for RGB and L alone.

    Bands are changed as gray images, 16 bits rounded to 8 before; alpha stays as it is.
    """

    @functools.wraps(change)
    def changed(image: Any, *args: Any) -> Any:
        if isinstance(image, Bands):
            return image.each(lambda band: changed(_rounded(band), *args))
        if image.mode == "RGBA":
            colours = change(image.convert("RGB"), *args)
            colours.putalpha(image.getchannel("A"))
            return colours
        return change(image, *args)

    return changed


def _rounded(band: Image.Image) -> Image.Image:
    if band.mode == "L":
        return band
    return Image.fromarray(np.rint(np.asarray(band) / 257).astype(np.uint8))


def bordered(image: Any, border: tuple[int, ...], fill: Any) -> Any:
    """`ImageOps.expand`."""
    if isinstance(image, Bands):
        return image.each(lambda band: ImageOps.expand(band, border=border, fill=fill))
    return ImageOps.expand(image, border=border, fill=fill)


def fill_of(image: Any, value: float | None) -> Any:
    """What fills an image with a value of 0..255."""
    value = int(value or 0)
    if isinstance(image, Bands):
        return value if image.mode == "L" else 257 * value
    count = len(image.getbands())
    return value if count == 1 else (value,) * count


def to_array(image: Any) -> np.ndarray:
    """An image as an array (height, width, channels) of its own.

    Returns:
        uint8; of 16 bits float32 in 0..255, `values / 65535 * 255`.
    """
    pixels = np.array(image)  # a copy: what Pillow lends is read-only
    if pixels.dtype == np.uint16:
        pixels = pixels / np.float32(257)
    return pixels[..., None] if pixels.ndim == 2 else pixels


# --- read -----------------------------------------------------------------------------------------


def bands_of(pixels: np.ndarray) -> Bands:
    """uint8 or uint16 pixels, (height, width[, channels])."""
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    return Bands([Image.fromarray(np.ascontiguousarray(plane)) for plane in np.rollaxis(planes, 2)])


def deep(image: Image.Image) -> Bands | None:
    """A gray Pillow image of more than 8 bits, with 16; None of any other.

    Raises:
        DataError: Whole numbers above 65535, or floats outside of 0..1: nobody knows what they are.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    return bands_of(_sixteen_bits(np.asarray(image)))


def _sixteen_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8 or not values.size:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = values.min(), values.max()
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return values.astype(np.uint16)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 65535.0).astype(np.uint16)
    raise DataError(
        f"values from {low:.6g} to {high:.6g} ({values.dtype}): whole numbers of 0..65535 or "
        "floats of 0..1 are read"
    )


def read_npy(data: bytes, channels: int) -> np.ndarray:
    """The array of a file of `np.save`, as uint8 or uint16 (height, width[, channels]).

    Raises:
        DataError: It holds no image of so many channels; its message is the reason alone.
    """
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, TypeError) as error:
        raise DataError(f"a damaged .npy file: {reason_of(error)}") from error
    if values.ndim == 3 and values.shape[0] == channels != values.shape[2]:
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or not values.size or values.dtype.kind not in "biuf":
        raise DataError(f"an array of shape {values.shape} and type {values.dtype} is no image")
    if values.dtype.kind == "i" and values.min() >= 0 and values.max() <= 255:
        return values.astype(np.uint8)  # NumPy's own type of whole numbers
    return _sixteen_bits(values)


def pages(image: Image.Image, channels: int) -> Bands | None:
    """The pages of a TIFF as channels, where it has so many of one band each."""
    count = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or count != channels or len(image.getbands()) != 1:
        return None
    found = []
    for page in range(count):
        image.seek(page)
        found.append(np.array(image))
        if found[0].shape != found[-1].shape:
            raise DataError(f"its pages differ in size: {found[0].shape} and {found[-1].shape}")
    return bands_of(_sixteen_bits(np.stack(found, axis=-1)))


def samples(data: bytes, channels: int | None, most: int) -> Bands | None:
    """The channels of a TIFF that has more than Pillow reads, where tifffile is installed.

    So many of them (None is any number), of so many values at most.
    """
    if not data.startswith(_TIFF) or importlib.util.find_spec("tifffile") is None:
        return None
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        if channels not in (None, page.samplesperpixel) or page.size > most or page.ndim != 3:
            return None
        # RGBA and CMYK are Pillow's; of RGB and a fourth band, such as infrared, it reads three.
        if channels == 4 and (page.photometric == 5 or {1, 2} & {*(page.extrasamples or ())}):
            return None
        values = page.asarray(maxworkers=1)
    return bands_of(_sixteen_bits(np.moveaxis(values, page.axes.index("S"), 2)))


def of_any_channels(data: bytes, most: int) -> Bands | None:
    """What Pillow reads nothing of: an array, or a TIFF of many channels."""
    return bands_of(read_npy(data, 0)) if data.startswith(NPY) else samples(data, None, most)


def in_bands(image: Image.Image, channels: int) -> AnyPicture:
    """A Pillow image that is to have 1, 4 or an unnamed number of channels as `Bands`.

    Itself, where `Image.convert` can do what is wanted.

    Raises:
        DataError: It has more than Pillow reads.
    """
    if getattr(image, "tag_v2", {}).get(277, 0) > len(image.getbands()) and channels > 3:
        raise DataError("a TIFF of many channels needs: pip install tifffile")
    found = pages(image, channels) or deep(image)
    if found is None and (channels not in COLOR_MODES.values() or image.mode == "RGBX"):
        found = Bands(image.split())
    return found or image


def eight_bit(image: Bands, channels: int) -> Image.Image:
    """Bands as one Pillow image that can be converted to so many channels, or DataError."""
    count = len(image.bands)
    if channels not in COLOR_MODES.values() or count not in (1, 3, channels):
        raise DataError(
            f"it has {count} channel{'s' * (count > 1)}, not {channels}; channels={count} "
            f"(--channels {count}) reads it"
        )
    bands = [_rounded(band) for band in image.bands]
    return bands[0] if count == 1 else Image.merge("RGBA"[:count], bands)
