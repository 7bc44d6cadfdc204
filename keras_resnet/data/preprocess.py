"""Images to model input: decode, resize, crop and normalise with torchvision's results.

The order and the arithmetic are those of torchvision's evaluation presets
(torchvision/transforms/_presets.py `ImageClassification`, functional.py `resize` and
`center_crop`, datasets/folder.py `pil_loader`). Only NumPy and Pillow are needed. Where
simplejpeg is installed it decodes ordinary JPEGs in about half the time, and where numba is, many
of them are resized in a third of it, to the same pixels; everything else is left to Pillow.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
from PIL import Image

from keras_resnet.data.bands import COLOR_MODES, AnyPicture, bordered, checked_color_mode, to_array
from keras_resnet.data.items import image_from_array
from keras_resnet.data.reading import Source, converted, in_flight, load
from keras_resnet.system.errors import DataError, InputError, did_you_mean

logger = logging.getLogger("keras_resnet")

# torchvision/transforms/_presets.py, `ImageClassification`.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def imagenet_colors(channels: int) -> dict[str, tuple[float, ...]]:
    """ImageNet's mean and deviation for as many channels, as the weights are adapted to them.

    One gray channel has the mean of the three; of others the three are repeated.

    Examples:
        >>> [round(v, 3) for values in imagenet_colors(1).values() for v in values]
        [0.449, 0.226]
    """
    return {"mean": _repeated(IMAGENET_MEAN, channels), "std": _repeated(IMAGENET_STD, channels)}


def _repeated(values: tuple[float, ...] | None, channels: int) -> Any:
    checked_color_mode(channels)  # before there are as many
    if values is None or channels == 1:
        return values and (sum(values) / 3,)
    return tuple(values[i % 3] for i in range(channels))


# Of an image when it is prepared, and of all images that are predicted at a time.
MAX_PIXELS = 1 << 24

# Up to this side, in pixels, an image is its own crop, as CIFAR's are.
SMALL = 64

# torchvision.transforms.InterpolationMode names and what they mean for a Pillow image.
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise, equal to torchvision's evaluation presets.

    Calling it gives the model's input; `pixels` gives the uint8 image before normalisation,
    equal to torchvision's to the bit (Resize with antialias and CenterCrop on a Pillow image).

    Attributes:
        resize_size: an int for the short side (the long one becomes `int(size * long / short)`),
            (height, width) for both, or None for no resize; at most 4096 x 4096 pixels.
        crop_size: the centre crop, an int or (height, width), padded with black where the image
            is smaller; None for no crop.
        interpolation: `"bilinear"`, `"bicubic"`, `"nearest"`, `"box"`, `"hamming"`, `"lanczos"`;
            all but nearest with antialias, as Pillow resizes.
        mean: per channel, for pixels in 0..1; None subtracts nothing.
        std: per channel; None divides by nothing. With both None values are pixels / 255.
        exif: turn images as their EXIF orientation says; torchvision does not.
        color_mode: `"rgb"`, `"grayscale"` or `"rgba"`: 3, 1 or 4 channels; or another number of
            channels, of TIFF files and `.npy` arrays. Of all but RGB 16 bits a value are kept.
        crop_to_aspect_ratio: before a (height, width) resize cut the largest centred window of
            that shape, so that nothing is distorted.
        pad_to_aspect_ratio: resize to fit into (height, width), centred on black instead.

    Raises:
        InputError: an argument that cannot work.

    Examples:
        >>> preprocess = Preprocess(resize_size=256, crop_size=224)
        >>> image = np.zeros((300, 400, 3), np.uint8)
        >>> preprocess.pixels(image).shape, preprocess(image).dtype
        ((224, 224, 3), dtype('float32'))
        >>> Preprocess.from_config(preprocess.get_config()) == preprocess
        True
    """

    resize_size: int | tuple[int, int] | None = 256
    crop_size: int | tuple[int, int] | None = 224
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD
    exif: bool = False
    color_mode: str | int = "rgb"
    crop_to_aspect_ratio: bool = False
    pad_to_aspect_ratio: bool = False

    @classmethod
    def for_size(cls, size: int, resize: int | None = None, **options: Any) -> Preprocess:
        """How images are evaluated at a side: as torchvision's, resized to 256 for a crop of 224.

        Args:
            size: The side, pixels; up to 64 the image is resized to it, and nothing is cropped.
            resize: The short side before the crop, in place of 256/224 of the side.
            **options: Further attributes.

        Examples:
            >>> at = Preprocess.for_size(176)
            >>> at.resize_size, at.crop_size
            (201, (176, 176))
        """
        if size <= SMALL and resize is None:
            return cls((size, size), None, **options)
        return cls(resize or round(size * 256 / 224), size, **options)

    def for_channels(self, channels: int) -> Preprocess:
        """For as many channels, where this is for RGB: see `imagenet_colors`."""
        if self.color_mode != "rgb" or channels == 3:
            return self
        colors = {name: _repeated(getattr(self, name), channels) for name in ("mean", "std")}
        return replace(self, color_mode=channels, **colors)

    def __post_init__(self) -> None:
        store = object.__setattr__  # each in one form, so that equal means equal
        store(self, "color_mode", checked_color_mode(self.color_mode))
        store(self, "resize_size", _size("resize_size", self.resize_size))
        crop = _size("crop_size", self.crop_size)
        store(self, "crop_size", (crop, crop) if isinstance(crop, int) else crop)
        resample_filter(self.interpolation)
        for name in ("mean", "std"):
            store(self, name, self._per_channel(name, getattr(self, name)))
        if self.std is not None and np.min(np.float32(self.std)) <= 0:
            raise InputError(f"std must be positive. Received: {self.std}.")
        if self.crop_to_aspect_ratio and self.pad_to_aspect_ratio:
            raise InputError(
                "Only one of `pad_to_aspect_ratio`, `crop_to_aspect_ratio` can be `True`. "
                "Received: both."
            )
        for name in ("crop_to_aspect_ratio", "pad_to_aspect_ratio"):
            if getattr(self, name) and not isinstance(self.resize_size, tuple):
                raise InputError(
                    f"{name} needs resize_size=(height, width). Received: {self.resize_size!r}."
                )
            store(self, name, bool(getattr(self, name)))
        store(self, "exif", bool(self.exif))

    def _per_channel(self, name: str, value: Any) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            values = np.atleast_1d(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError, OverflowError):
            values = np.array([np.nan])
        if values.shape == (1,):
            values = np.repeat(values, self.channels)
        if values.shape != (self.channels,) or not (np.abs(values) < 1e30).all():
            raise InputError(
                f"{name} must be one finite number a channel ({self.channels} for color_mode="
                f"{self.color_mode!r}) or None. Received: {value!r}."
            )
        return tuple(float(v) for v in values)

    @property
    def channels(self) -> int:
        """Channels of the output: 3, or 1 for grayscale, or 4 for rgba, or another number."""
        return COLOR_MODES.get(self.color_mode, self.color_mode)

    @property
    def output_shape(self) -> tuple[int | None, int | None, int]:
        """(height, width, channels); None for a side that depends on the image."""
        size = self.crop_size or self.resize_size
        return (*(size if isinstance(size, tuple) else (None, None)), self.channels)

    def __call__(self, image: Source) -> np.ndarray:
        """Returns the model's input for one image.

        Args:
            image: a path, bytes, a Pillow image, or a uint8 array (height, width[, channels]).

        Returns:
            float32, (height, width, channels), normalised.

        Raises:
            DataError: the image cannot be read.
            InputError: an array of another type or shape.
        """
        return self.normalize(self.pixels(image))

    @in_flight
    def pixels(self, image: Source) -> np.ndarray:
        """Returns the resized and cropped image before normalisation.

        Returns:
            uint8, (height, width, channels), equal to torchvision's to the bit; of 16 bits a value
            float32 in 0..255, the same `/ 65535 * 255`.
        """
        loaded = load(image, exif=self.exif, color_mode=self.color_mode)
        if isinstance(loaded, np.ndarray):
            made = self._compiled(loaded)
            if made is not None:
                return made
            loaded = converted(image_from_array(loaded), False, self.color_mode)
        if self.crop_to_aspect_ratio:
            loaded = _crop_to_ratio(loaded, self.resize_size)
        if self.resize_size is not None:
            size = self.resize_size
            if self.pad_to_aspect_ratio:
                size = _fitted(loaded.size, size)
            loaded = resize_image(loaded, size, INTERPOLATIONS[self.interpolation])
        if self.pad_to_aspect_ratio:
            loaded = crop_centre(loaded, self.resize_size)
        if self.crop_size is not None:
            loaded = crop_centre(loaded, self.crop_size)
        return to_array(loaded)

    def _compiled(self, pixels: np.ndarray) -> np.ndarray | None:
        """All of `pixels` at once, without what the crop leaves out; None leaves it to Pillow."""
        if (
            self.resize_size is None
            or self.crop_to_aspect_ratio
            or self.pad_to_aspect_ratio
            or (kernels := compiled(pixels, INTERPOLATIONS[self.interpolation])) is None
        ):
            return None
        size = resized_size(pixels.shape[1], pixels.shape[0], self.resize_size)
        crop = self.crop_size or size
        if crop[0] > size[0] or crop[1] > size[1]:
            return None
        return kernels.resize(pixels, size, (*_centre(size, crop), *crop))

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Returns (pixels / 255 - mean) / std, in float32 as torch computes it.

        Args:
            pixels: uint8, (..., height, width, channels): one image or a batch. float32 values
                in 0..255 (a mixed batch) are taken as well.

        Returns:
            float32, of the same shape.
        """
        pixels = np.asarray(pixels)
        if pixels.ndim < 2 or pixels.shape[-1] != self.channels:
            raise InputError(
                f"normalize takes (..., height, width, {self.channels}). "
                f"Received: shape {pixels.shape}."
            )
        # One row of width * channels values at a time, as NumPy is slow where the last axis has 3,
        # and image by image, which stay in the processor's cache between the operations.
        rows = pixels.reshape(-1, *pixels.shape[-3:-2], pixels.shape[-2] * pixels.shape[-1])
        out = np.empty(rows.shape, np.float32)
        operations = [
            (operation, np.tile(np.asarray(values, np.float32), pixels.shape[-2]))
            for operation, values in ((np.subtract, self.mean), (np.divide, self.std))
            if values is not None
        ]
        for one, result in zip(rows, out, strict=True):
            np.divide(one, np.float32(255), dtype=np.float32, out=result)
            for operation, values in operations:
                operation(result, values, out=result)
        return out.reshape(pixels.shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments as plain JSON types; `from_config` takes them back."""
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if not self.pad_to_aspect_ratio:
            del config["pad_to_aspect_ratio"]  # caches and runs of 0.1 know it without
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocess:
        """Builds the object that `get_config` described.

        Raises:
            InputError: It describes none.
        """
        if not isinstance(config, dict):
            raise InputError(f"A Preprocess is described by a dict. Received: {config!r}.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(map(str, set(config) - set(known)))
        if unknown:
            raise InputError(
                f"Preprocess has no argument {', '.join(unknown)}; it takes {', '.join(known)}."
            )
        return cls(**config)

    def to_json(self) -> str:
        """Returns `get_config` as JSON text."""
        return json.dumps(self.get_config())


def resample_filter(name: str) -> int:
    """Pillow's filter of a name as torchvision has it, or InputError."""
    if name not in tuple(INTERPOLATIONS):
        raise InputError(
            f"interpolation must be one of {sorted(INTERPOLATIONS)}. Received: {name!r}."
            f"{did_you_mean(name, INTERPOLATIONS)}"
        )
    return INTERPOLATIONS[name]


def _size(name: str, value: Any) -> int | tuple[int, int] | None:
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, Sequence | np.ndarray) else (value,)
    positive = all(isinstance(s, int | np.integer) and s is not True and s > 0 for s in sides)
    if not positive or isinstance(value, str) or len(sides) not in (1, 2):
        raise InputError(
            f"{name} must be a positive int, a (height, width) pair or None. Received: {value!r}."
        )
    if int(sides[0]) * int(sides[-1]) > MAX_PIXELS:
        raise InputError(
            f"{name} must make an image of at most {MAX_PIXELS:,} pixels, such as 4096 x 4096. "
            f"Received: {value!r}."
        )
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


# The compiled resize costs half a second to load, and on a machine's first time three to compile:
# it pays from so many images on.
_AFTER = 1000
_images = itertools.count(1)
_kernels: ModuleType | Literal[False] | None = None


def compiled(pixels: np.ndarray, resample: int) -> ModuleType | None:
    """The module that resizes such an array as Pillow does, once it pays and where it can."""
    global _kernels
    if resample != Image.Resampling.BILINEAR or pixels.dtype != np.uint8:
        return None
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        return None
    if _kernels is None and next(_images) == _AFTER:  # one thread loads, the others go on
        try:
            from keras_resnet.data import resampling

            _kernels = resampling if resampling.agrees_with_pillow() else False
        except Exception as error:  # not installed, or not for this NumPy
            logger.debug("Images are resized by Pillow alone: %s", error)
            _kernels = False
    return _kernels or None


def resized_size(width: int, height: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) after a resize to that, or of the short side to an int, the long truncated.

    The arithmetic of torchvision/transforms/functional.py `_compute_resized_output_size`.

    Raises:
        DataError: an image so narrow that the result would be a decompression bomb.
    """
    if isinstance(size, tuple):
        new_height, new_width = size
    elif width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    limit = Image.MAX_IMAGE_PIXELS
    if limit and new_width * new_height > 2 * limit:
        raise DataError(
            f"An image of {width} x {height} would become {new_width} x {new_height} pixels at "
            f"resize_size={size}; give resize_size=(height, width), or leave the image out."
        )
    return new_height, new_width


def resize_image(image: AnyPicture, size: int | tuple[int, int], resample: int) -> AnyPicture:
    """Resizes to `resized_size`."""
    height, width = resized_size(*image.size, size)
    return image if (width, height) == image.size else image.resize((width, height), resample)


def _centre(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of a centre crop: torchvision rounds it, half to even."""
    return round((size[0] - crop[0]) / 2.0), round((size[1] - crop[1]) / 2.0)


def crop_centre(image: AnyPicture, size: tuple[int, int]) -> AnyPicture:
    """torchvision/transforms/functional.py `center_crop`: the offset is rounded, half to even."""
    crop_height, crop_width = size
    width, height = image.size
    if crop_width > width or crop_height > height:
        wide, high = max(crop_width - width, 0), max(crop_height - height, 0)
        border = (wide // 2, high // 2, (wide + 1) // 2, (high + 1) // 2)
        image = bordered(image, border, 0)
        width, height = image.size
        if (width, height) == (crop_width, crop_height):
            return image
    top, left = _centre((height, width), size)
    return image.crop((left, top, left + crop_width, top + crop_height))


def _fitted(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image of (width, height) made as large as fits into a size."""
    (width, height), (most_high, most_wide) = image, size
    if width * most_high >= height * most_wide:
        return max(1, height * most_wide // width), most_wide
    return most_high, max(1, width * most_high // height)


def _crop_to_ratio(image: AnyPicture, size: tuple[int, int]) -> AnyPicture:
    """The largest centred window with the shape of (height, width), as Keras cuts it."""
    width, height = image.size
    crop_height = max(1, min(height, int(width * size[0] / size[1])))
    crop_width = max(1, min(width, int(height * size[1] / size[0])))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))
