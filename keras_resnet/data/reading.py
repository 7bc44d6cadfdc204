"""An image file as pixels: Pillow's, or simplejpeg's where it gives the same."""

from __future__ import annotations

import io
import os
import warnings
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from keras_resnet.errors import DataError, InputError, NotFoundError

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels, more slowly
    simplejpeg = None


PILLOW_MODES = {"rgb": "RGB", "grayscale": "L", "rgba": "RGBA"}

Source = str | os.PathLike | bytes | IO[bytes]

_ORIENTATION = 0x0112  # the EXIF tag

# Pictures of 90 to 180 million pixels are read, as torchvision reads them; Pillow's warning about
# each would tear the progress bar. A filter, because warnings.catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(source: Source, *, exif: bool = False, color_mode: str = "rgb") -> np.ndarray:
    """Decodes a picture to the pixels of torchvision's `Image.open(f).convert("RGB")`.

    Args:
        source: a path, the file's bytes, or a binary file object.
        exif: turn the picture as its EXIF orientation says; torchvision does not.
        color_mode: `"rgb"`, `"grayscale"` or `"rgba"`.

    Returns:
        uint8, (height, width, 3), RGB; 1 channel for grayscale and 4 for rgba. Of an animation
        the first frame.

    Raises:
        DataError: the file is no picture, or an unreadable one; the message names it and says why.
        NotFoundError: the path does not exist.

    Examples:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.new("L", (3, 2), 7).save(file, "PNG")
        >>> decode(file.getvalue()).shape
        (2, 3, 3)
    """
    picture = load(source, exif=exif, color_mode=color_mode)
    return picture if isinstance(picture, np.ndarray) else _to_array(picture)


def load(
    source: Source, *, exif: bool = False, color_mode: str = "rgb"
) -> np.ndarray | Image.Image:
    """Decodes as `decode` does, but returns whichever form the decoder made, without a copy.

    Returns:
        A uint8 array (height, width, 3) from simplejpeg, or a loaded Pillow image whose mode is
        that of `color_mode`.
    """
    if color_mode not in PILLOW_MODES:
        raise InputError(f"color_mode must be one of {sorted(PILLOW_MODES)}, got {color_mode!r}.")
    name, data = _read(source)
    if not data:
        raise DataError(f"{name} cannot be read as a picture: the file is empty (0 bytes).")
    if color_mode == "rgb":
        pixels = _decode_jpeg(data, exif)
        if pixels is not None:
            return pixels
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _converted(picture, exif, color_mode)
    except UnidentifiedImageError:
        raise DataError(
            f"{name} cannot be read as a picture: its first bytes {data[:8]!r} belong to no "
            f"format that Pillow knows."
        ) from None
    except MemoryError:
        raise DataError(f"{name} cannot be read as a picture: not enough memory.") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise DataError(f"{name} cannot be read as a picture: {reason}") from error


def _read(source: Source) -> tuple[str, bytes]:
    """Returns how to call the picture in a message, and its bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"a picture of {len(source)} bytes", bytes(source)
    if hasattr(source, "read"):
        return repr(getattr(source, "name", "a file object")), source.read()
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"A picture is given as a path, bytes or a binary file, got {type(source).__name__}."
        )
    path = os.fspath(source)
    name = repr(path)  # file names may hold newlines; one message stays one line
    try:
        with open(path, "rb") as file:
            return name, file.read()
    except FileNotFoundError:
        raise NotFoundError(f"{name} does not exist.") from None
    except IsADirectoryError:
        raise DataError(f"{name} is a folder, not a picture.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be opened: {error}") from error


def _decode_jpeg(data: bytes, exif: bool) -> np.ndarray | None:
    """Decodes an ordinary, complete JPEG with simplejpeg; None leaves it to Pillow.

    simplejpeg gives Pillow's pixels for YCbCr and gray files. Anything else (CMYK, a missing end
    marker, data that libjpeg has to mend, a turned or a huge picture) goes to Pillow, so that a
    file is read, or refused, alike with and without simplejpeg.
    """
    if simplejpeg is None or data[:3] != b"\xff\xd8\xff" or data[-2:] != b"\xff\xd9":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        limit = Image.MAX_IMAGE_PIXELS
        if colorspace not in ("YCbCr", "Gray") or (limit and height * width > limit):
            return None
        if exif:
            with Image.open(io.BytesIO(data)) as picture:
                if picture.getexif().get(_ORIENTATION, 1) != 1:
                    return None
        return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)
    except Exception:  # Pillow decides, and words the error
        return None


def _converted(picture: Image.Image, exif: bool, color_mode: str = "rgb") -> Image.Image:
    if exif:
        picture = ImageOps.exif_transpose(picture)
    mode = PILLOW_MODES[color_mode]
    if (
        picture.mode == "P"
        and isinstance(picture.info.get("transparency"), bytes)
        and mode == "RGB"
    ):
        # The pixels are the same without it; with it Pillow warns about every such file.
        picture = picture.copy()
        del picture.info["transparency"]
    if mode == "L":  # by way of RGB, as a colour picture that is made gray later
        return picture.convert("RGB").convert("L")
    picture.load()
    return picture.convert(mode)


def _to_array(picture: Image.Image) -> np.ndarray:
    pixels = np.array(picture)  # a copy: what Pillow lends is read-only
    return pixels[..., None] if pixels.ndim == 2 else pixels
