"""Image files as pixels, kept and read ahead: Pillow's, or simplejpeg's where it gives the same."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import logging
import math
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from keras_resnet.data.bands import (
    COLOR_MODES,
    NPY,
    Bands,
    bands_of,
    checked_color_mode,
    eight_bit,
    in_bands,
    read_npy,
    samples,
    to_array,
)
from keras_resnet.data.in_flight import files_read, in_flight, most_pixels
from keras_resnet.data.items import Item, absolute, image_from_array, stamp_of
from keras_resnet.data.walk import FORMATS
from keras_resnet.system.errors import DataError, InputError, NotFoundError
from keras_resnet.system.files import beside, remove_leftovers

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels, more slowly
    simplejpeg = None


logger = logging.getLogger("keras_resnet")

PILLOW_MODES = {"rgb": "RGB", "grayscale": "L", "rgba": "RGBA"}

Source = str | os.PathLike | bytes | IO[bytes] | Image.Image | np.ndarray

# Of one file: an image of as many pixels as Pillow takes, with four channels of 16 bits, is less.
_MOST_BYTES = 2**31

ORIENTATION = 0x0112  # the EXIF tag

# Images of 90 to 180 million pixels are read, as torchvision reads them; Pillow's warning about
# each would tear the progress bar. A filter, because warnings.catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(source: Source, *, exif: bool = False, color_mode: str | int = "rgb") -> np.ndarray:
    """Decodes an image to the pixels of torchvision's `Image.open(f).convert("RGB")`.

    Returns:
        uint8, (height, width, 3), RGB; 1 channel for grayscale, 4 for rgba, n for n. Of an
        animation the first frame. 16 bits a value are kept but for RGB, as float32 in 0..255.

    Raises:
        DataError: the file is no image, or an unreadable one; the message names it and says why.
        NotFoundError: the path does not exist.
    """
    image = load(source, exif=exif, color_mode=color_mode)
    return image if isinstance(image, np.ndarray) else to_array(image)


@files_read
@in_flight
def load(
    source: Source, *, exif: bool = False, color_mode: str | int = "rgb"
) -> np.ndarray | Image.Image | Bands:
    """Decodes as `decode` does, but returns whichever form the decoder made, without a copy.

    Returns:
        A uint8 array (height, width, 3) from simplejpeg, a loaded Pillow image whose mode is that
        of `color_mode`, or `Bands`. Its pixels count as being in flight until the caller's own
        block of `in_flight` ends.
    """
    color_mode = checked_color_mode(color_mode)
    channels = COLOR_MODES.get(color_mode, color_mode)
    name, data = read(source)
    if isinstance(data, np.ndarray):
        in_flight.take(math.prod(data.shape[:2]) * max(1, channels // 4))
        data = image_from_array(data, channels)
    elif isinstance(data, Image.Image):
        in_flight.take(data.width * data.height)
    if isinstance(data, Image.Image | Bands):
        try:
            return converted(data, exif, color_mode)
        except Exception as error:  # as below: one that was opened may be cut off
            raise DataError(f"The image cannot be read: {error}") from error
    if not data:
        raise DataError(f"{name} cannot be read as an image: the file is empty (0 bytes).")
    if color_mode == "rgb":
        pixels = _decode_jpeg(data, exif)
        if pixels is not None:
            return pixels
    try:
        if data.startswith(NPY):
            in_flight.take(len(data) // 4)
            return converted(bands_of(read_npy(data, channels)), False, color_mode)
        if channels not in (1, 3):
            in_flight.take(len(data) // 4)
            if (found := samples(data, channels, 4 * most_pixels())) is not None:
                return found
        with open_image(io.BytesIO(data)) as image:
            # An icon of macOS holds an image of a size that it does not say.
            count = most_pixels() if image.format == "ICNS" else image.width * image.height
            in_flight.take(count)
            return converted(image, exif, color_mode)
    except Image.DecompressionBombError:
        raise DataError(
            f"{name} is not read: it has more than {most_pixels():,} pixels, twice PIL.Image."
            "MAX_IMAGE_PIXELS, and may be a decompression bomb. Make it smaller, or raise that."
        ) from None
    except UnidentifiedImageError:
        hint = ", or it has many channels: --channels N" if data[:2] in (b"II", b"MM") else ""
        raise DataError(
            f"{name} cannot be read as an image: its first bytes {data[:8]!r} belong to no "
            f"format that is read here{hint}."
        ) from None
    except DataError as error:  # of what is in it
        raise DataError(f"{name} cannot be read as an image: {error}.") from error
    except MemoryError:
        raise DataError(f"{name} cannot be read as an image: not enough memory.") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        said = " ".join(str(error).split())  # tifffile's have several lines
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise DataError(f"{name} cannot be read as an image: {reason}") from error


@files_read
def read(source: Source) -> tuple[str, Any]:
    """Returns how to call the image in a message, and its bytes; or itself, where it is decoded."""
    if isinstance(source, np.ndarray | Image.Image):
        return "", source
    if isinstance(source, bytes | bytearray | memoryview):
        return f"an image of {len(source)} bytes", bytes(source)
    if hasattr(source, "read"):
        named = isinstance(source, Item)
        data = source.read()
        files_read.take(len(data) if isinstance(data, bytes) else 0)
        return repr(source if named else getattr(source, "name", "a file object")), data
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"An image is given as a path, bytes or a binary file. "
            f"Received: {type(source).__name__}."
        )
    path = os.fspath(source)
    name = repr(path)  # file names may hold newlines; one message stays one line
    with open_file(path) as file:
        try:
            files_read.take(size := os.fstat(file.fileno()).st_size)
            return name, file.read(size or _MOST_BYTES) or b""  # Python makes room for so much
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}.") from error
        except MemoryError:
            raise DataError(f"{name} cannot be read: not enough memory.") from None


def open_file(path: str) -> IO[bytes]:
    """Opens a regular file, or what a link to one leads to: a pipe or a device may never end.

    Raises:
        NotFoundError: There is nothing there.
        DataError: It is something else, larger than any image, or cannot be opened.
    """
    name = repr(path)
    if isinstance(path, Item):
        data = path.read()
        if not isinstance(data, bytes):
            raise DataError(f"{name} is no image file: it is pixels.")
        return io.BytesIO(data)
    # Not waiting, should it have become a pipe since it was looked at.
    wait = getattr(os, "O_NONBLOCK", 0)
    try:
        state = os.stat(path)
        if stat.S_ISREG(state.st_mode) and state.st_size <= _MOST_BYTES:
            return open(path, "rb", opener=lambda file, flags: os.open(file, flags | wait))
    except FileNotFoundError:
        raise NotFoundError(f"{name} does not exist.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be opened: {error}") from error
    if stat.S_ISDIR(state.st_mode):
        raise DataError(f"{name} is a folder, not an image.")
    if stat.S_ISREG(state.st_mode):
        raise DataError(f"{name} has {state.st_size / 1e9:.1f} GB, more than any image has.")
    raise DataError(f"{name} is a pipe, a socket or a device, not an image.")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    if "HEIF" in FORMATS:
        with contextlib.suppress(Exception):  # a broken plug-in breaks its own kind alone
            importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


@in_flight
def open_image(file: IO[bytes]) -> Image.Image:
    """Opens an image of the formats that are read here, and no other, with Pillow.

    The only place that does: of Pillow's other readers some start programs. Pixels are decoded
    later, but for an icon of Windows, which Pillow decodes at once, whatever size it says.

    Raises:
        UnidentifiedImageError: It is none of them; Pillow raises other kinds for damaged files.
    """
    if file.read(4) == b"\0\0\1\0":
        in_flight.take(most_pixels())
    file.seek(0)
    return Image.open(file, formats=_formats())


def _decode_jpeg(data: bytes, exif: bool) -> np.ndarray | None:
    """Decodes an ordinary, complete JPEG with simplejpeg; None leaves it to Pillow.

    simplejpeg gives Pillow's pixels for YCbCr and gray files. Anything else (CMYK, a missing end
    marker, data that libjpeg has to mend, a turned or a huge image) goes to Pillow, so that a
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
            with open_image(io.BytesIO(data)) as image:
                if image.getexif().get(ORIENTATION, 1) != 1:
                    return None
        in_flight.take(height * width)
        return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)
    except Exception:  # Pillow decides, and words the error
        return None


def converted(
    image: Image.Image | Bands, exif: bool, color_mode: str | int = "rgb"
) -> Image.Image | Bands:
    """An image turned as EXIF says, if wanted, and in the mode of `color_mode`.

    The image itself where it is so already, for a copy would cost as much memory again.

    Raises:
        DataError: It has another number of channels; the message is the reason alone.
    """
    mode = PILLOW_MODES.get(str(color_mode))
    if isinstance(image, Image.Image):
        image.load()
        if exif and image.getexif().get(ORIENTATION) in range(2, 9):
            image = ImageOps.exif_transpose(image)
        if image.mode == mode:
            return image
        if mode != "RGB":
            image = in_bands(image, COLOR_MODES.get(color_mode, color_mode))
    if isinstance(image, Bands):
        if len(image.bands) == COLOR_MODES.get(color_mode, color_mode) and mode != "RGB":
            return image
        image = eight_bit(image, COLOR_MODES.get(color_mode, color_mode))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes) and mode == "RGB":
        # The pixels are the same without it; with it Pillow warns about every such file.
        image = image.copy()
        del image.info["transparency"]
    if mode == "L":  # by way of RGB, as a colour image that is made gray later
        return image.convert("RGB").convert("L")
    return image.convert(mode)


@contextlib.contextmanager
def head(path: str) -> Iterator[Image.Image]:
    """An image, of whose file no more than the head has been read."""
    if not isinstance(path, Item):
        with open_file(path) as file, open_image(file) as image:
            yield image
        return
    _, data = read(path)
    if isinstance(data, bytes):
        data = open_image(io.BytesIO(data))
    yield data if isinstance(data, Image.Image) else image_from_array(data)


def stacked(
    pixels: Sequence[np.ndarray], paths: Sequence[str], empty: Callable[..., np.ndarray] = np.empty
) -> np.ndarray:
    """The images of a batch, of one size, as an array that `empty` makes: uint8 or float32."""
    shape = pixels[0].shape
    for one, path in zip(pixels, paths, strict=True):
        if one.shape != shape:
            raise InputError(
                f"Images of one batch have different sizes: {one.shape} of {path!r} and {shape} "
                f"before it. Give image_size, or a Preprocess with a crop_size."
            )
    batch = empty((len(pixels), *shape), np.result_type(*{one.dtype for one in pixels}))
    return np.stack(pixels, out=batch, casting="unsafe")


class ImageCache:
    """Decoded images that are kept: in memory, in a folder, or not at all.

    A file in the folder is named after the image's path, size and time and how it was made, so
    that a changed image or another way to prepare it makes a new one.

    Args:
        place: None, `"ram"` or a folder, which is made if it is missing.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, place: str | None):
        self._kept: dict[str, np.ndarray] = {}
        self._place = place
        self._failed = threading.Event()
        if place not in (None, "ram"):
            try:
                os.makedirs(place, exist_ok=True)
                remove_leftovers(Path(place))
            except OSError as error:
                raise DataError(f"The cache folder cannot be made: {error}") from error

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self._place is not None

    def get(self, path: str, make: Callable[[str], np.ndarray], how: str) -> np.ndarray:
        """What `make(path)` gives, made once; `how` says in what way it is made."""
        if self._place is None:
            return make(path)
        if self._place == "ram":
            if path not in self._kept:
                self._kept[path] = make(path)
            return self._kept[path]
        file = os.path.join(self._place, self._key(path, how) + ".npy")
        try:
            return _kept(file)
        except (OSError, ValueError):  # not there, or cut off while it was written
            pixels = make(path)
        partial = beside(Path(file))
        try:
            with open(partial, "wb") as stream:
                np.save(stream, pixels)
            os.replace(partial, file)
        except OSError as error:  # a full disk costs the cache, not the run
            if not self._failed.is_set():
                self._failed.set()
                logger.warning("The cache %r takes no more images: %s", self._place, error)
            with contextlib.suppress(OSError):
                os.remove(partial)
        return pixels

    @staticmethod
    def _key(path: str, how: str) -> str:
        key = (absolute(path), *stamp_of(path), how)
        return hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()


_header = functools.lru_cache(lambda text: np.lib.format.read_array_header_1_0(io.BytesIO(text)))


def _kept(file: str) -> np.ndarray:
    """What np.load gives of pixels, in a third of its time: one read, a header once a shape."""
    data = Path(file).read_bytes()
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, turned, kind = _header(data[8:start])
    return np.frombuffer(data, kind, offset=start).reshape(shape, order="F" if turned else "C")


class ReadAhead:
    """Numbered batches made by threads before they are asked for, while they come in order.

    Args:
        threads: How many; 0 makes each batch in the caller's thread, when it is asked for.
    """

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, "keras_resnet-data") if threads else None
        self._lock = threading.Lock()
        self.waiting: dict[tuple[Any, int], Future] = {}
        self._last: tuple[Any, int] | None = None

    def get(
        self,
        epoch: Any,  # batches of another one are thrown away
        index: int,  # where it follows the last one, more are begun
        parts: Callable[[int], Sequence[Callable[[], list]]],  # the pieces of a batch's work
        join: Callable[[int, list], Any],  # makes a batch of its number and all their lists in one
        *,
        count: int,  # batches in the epoch
        depth: int,  # how many may wait
    ) -> Any:
        """Batch `index`, from those that wait or made now; or raises what its first piece did."""
        if self._pool is None:
            return join(index, [item for work in parts(index) for item in work()])
        with self._lock:
            for key in [key for key in self.waiting if key[0] != epoch]:
                self.waiting.pop(key).cancel()
            batch = self.waiting.pop((epoch, index), None) or self._begin(index, parts, join)
            if index == 0 or self._last == (epoch, index - 1):  # asked for in order
                for following in range(index + 1, min(index + 1 + depth, count)):
                    key = (epoch, following)
                    if key not in self.waiting and len(self.waiting) < depth:
                        self.waiting[key] = self._begin(following, parts, join)
            self._last = (epoch, index)
        return batch.result()

    def _begin(self, index: int, parts: Callable, join: Callable) -> Future:
        """Hands a batch to the threads, which put it together as they finish its last part."""
        pieces = parts(index)
        made: list[list | Exception] = [[] for _ in pieces]
        batch, missing, lock = Future(), len(pieces), threading.Lock()

        def work(number: int) -> None:
            nonlocal missing
            if not batch.cancelled():
                try:
                    made[number] = pieces[number]()
                except Exception as error:
                    made[number] = error
            with lock:
                missing -= 1
                last = missing == 0
            if last and batch.set_running_or_notify_cancel():
                try:
                    for part in made:  # of several errors that of the first image
                        if isinstance(part, Exception):
                            raise part
                    batch.set_result(join(index, [item for part in made for item in part]))
                except Exception as error:
                    batch.set_exception(error)

        for number in range(len(pieces)):
            self._pool.submit(work, number)
        return batch
