"""Turned, sheared, blurred and gray images, with the pixels of torchvision on Pillow images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from keras_resnet.data.bands import Bands, fill_of, in_eight_bits
from keras_resnet.data.items import as_image
from keras_resnet.data.preprocess import resample_filter
from keras_resnet.data.transforms import AnyImage, ByChance, Transform, _limits
from keras_resnet.system.errors import InputError, between, whole

TURNING = ("nearest", "bilinear", "bicubic")


def turning_filter(name: str) -> int:
    """The same for what turns or shears an image, or InputError: Pillow has three for that."""
    if name not in TURNING:
        resample_filter(name)  # which names what there is
        raise InputError(
            "An image is turned with interpolation 'nearest', 'bilinear' or 'bicubic'. "
            f"Received: {name!r}."
        )
    return resample_filter(name)


def affine(
    image: Image.Image,
    translate: tuple[float, float],  # pixels to the right and down
    shear: tuple[float, float],  # radians along both axes
    center: tuple[float, float],  # of the rotation and the shear
    resample: int,
    fill: Any,
    angle: float = 0.0,  # radians, clockwise
    scale: float = 1.0,  # above 1 enlarges
) -> Image.Image:
    """torchvision/transforms/functional.py `_get_inverse_affine_matrix`, applied by Pillow.

    The products of cosines stay where the angle is 0: leaving out what is 1 in exact arithmetic
    changes last bits, and with them pixels under nearest interpolation.
    """
    sx, sy = shear
    a = math.cos(angle - sy) / math.cos(sy)
    b = -math.cos(angle - sy) * math.tan(sx) / math.cos(sy) - math.sin(angle)
    c = math.sin(angle - sy) / math.cos(sy)
    d = -math.sin(angle - sy) * math.tan(sx) / math.cos(sy) + math.cos(angle)
    cx, cy = center
    tx, ty = translate
    matrix = [value / scale for value in (d, -b, 0.0, -c, a, 0.0)]
    matrix[2] += matrix[0] * (-cx - tx) + matrix[1] * (-cy - ty)
    matrix[5] += matrix[3] * (-cx - tx) + matrix[4] * (-cy - ty)
    matrix[2] += cx
    matrix[5] += cy
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


@dataclass(frozen=True)
class RandomVerticalFlip(ByChance):
    """Exchanges top and bottom with probability `p`."""

    def apply(self, image: AnyImage, parameters: bool) -> Image.Image:
        """Turns the image over if told so."""
        image = as_image(image)
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if parameters else image

    def in_chain(self, image: AnyImage, rng: np.random.Generator) -> AnyImage:
        """Turns an array over without a detour by Pillow."""
        if not isinstance(image, np.ndarray):
            return self(image, rng)
        return np.ascontiguousarray(image[::-1]) if self.sample(*image.shape[:2], rng) else image


@dataclass(frozen=True)
class RandomRotation(Transform):
    """Turns the image about its centre; its size stays.

    Attributes:
        degrees: so far either way; or (lowest, highest), counter-clockwise.
        interpolation: as in `Preprocess`.
        fill: the value of pixels from outside the image; None is black.
    """

    degrees: float | tuple[float, float]
    interpolation: str = "nearest"
    fill: float | None = None

    def __post_init__(self) -> None:
        self._store(degrees=_both_ways("degrees", self.degrees))
        turning_filter(self.interpolation)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> float:
        """Draws the angle."""
        return float(rng.uniform(*self.degrees))

    def apply(self, image: AnyImage, parameters: float) -> Image.Image:
        """Turns it by so many degrees."""
        image = as_image(image)
        resample = turning_filter(self.interpolation)
        return image.rotate(parameters, resample, fillcolor=fill_of(image, self.fill))


@dataclass(frozen=True)
class RandomAffine(Transform):
    """Turns, shifts, scales and shears the image about its centre; its size stays.

    Attributes:
        degrees: of the rotation, so far either way; or (lowest, highest).
        translate: largest shift to either side, as parts of width and height.
        scale: lowest and highest factor; None is 1.
        shear: degrees along x, so far either way; or (lowest, highest); or four numbers, of which
            the last two are along y.
        interpolation: as in `Preprocess`.
        fill: the value of pixels from outside the image; None is black.
    """

    degrees: float | tuple[float, float] = 0.0
    translate: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None
    shear: float | tuple[float, ...] | None = None
    interpolation: str = "nearest"
    fill: float | None = None

    def __post_init__(self) -> None:
        self._store(degrees=_both_ways("degrees", self.degrees))
        if self.translate is not None:
            shift = tuple(float(part) for part in self.translate)
            if len(shift) != 2 or not all(0 <= part <= 1 for part in shift):
                raise InputError(
                    f"translate must be two fractions from 0 to 1. Received: {self.translate!r}."
                )
            self._store(translate=shift)
        if self.scale is not None:
            self._store(scale=_limits("scale", self.scale, 1e-6, math.inf))
        if self.shear is not None:
            given = self.shear
            both = isinstance(given, list | tuple) and len(given) == 4
            pairs = (given[:2], given[2:]) if both else (given,)
            self._store(shear=tuple(v for pair in pairs for v in _both_ways("shear", pair)))
        turning_filter(self.interpolation)

    def sample(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[float, tuple[int, int], float, tuple[float, float]]:
        """Draws (angle, (right, down), scale, shear); torchvision `RandomAffine.get_params`."""
        angle, shift, scale, shear = float(rng.uniform(*self.degrees)), (0, 0), 1.0, (0.0, 0.0)
        if self.translate is not None:
            most = self.translate[0] * width, self.translate[1] * height
            shift = round(rng.uniform(-most[0], most[0])), round(rng.uniform(-most[1], most[1]))
        if self.scale is not None:
            scale = float(rng.uniform(*self.scale))
        if self.shear is not None:
            x = float(rng.uniform(*self.shear[:2]))
            shear = x, float(rng.uniform(*self.shear[2:])) if self.shear[2:] else 0.0
        return angle, shift, scale, shear

    def apply(self, image: AnyImage, parameters: Any) -> Image.Image:
        """Maps the image by (angle, shift, scale, shear), angles in degrees."""
        image = as_image(image)
        angle, shift, scale, shear = parameters
        return affine(
            image,
            shift,
            tuple(map(math.radians, shear)),
            (image.width * 0.5, image.height * 0.5),
            turning_filter(self.interpolation),
            fill_of(image, self.fill),
            math.radians(angle),
            scale,
        )


@dataclass(frozen=True)
class GaussianBlur(Transform):
    """Smooths the image.

    torchvision sums in float32, and this in float64: where a sum lies at the middle of two whole
    numbers, one of them rounds up and the other down (some pixels of a million).

    Attributes:
        kernel_size: pixels, odd.
        sigma: lowest and highest standard deviation, pixels; or one.
        p: probability, as torchvision's `RandomApply` around it.
    """

    kernel_size: int
    sigma: float | tuple[float, float] = (0.1, 2.0)
    p: float = 1.0

    def __post_init__(self) -> None:
        whole("kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd. Received: {self.kernel_size}.")
        limits = (self.sigma,) * 2 if isinstance(self.sigma, int | float) else self.sigma
        self._store(sigma=_limits("sigma", limits, 1e-6, math.inf))
        between("p", self.p, 0, 1)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> float | None:
        """Draws the standard deviation; None is no blur."""
        return float(rng.uniform(*self.sigma)) if rng.random() < self.p else None

    def apply(self, image: AnyImage, parameters: float | None) -> Image.Image:
        """Smooths it by so many pixels; beyond its edge the image is mirrored."""
        image = as_image(image)
        if parameters is None:
            return image
        from scipy.ndimage import correlate1d  # a sixth of a second

        half = (self.kernel_size - 1) * 0.5
        steps = np.linspace(-half, half, self.kernel_size, dtype=np.float32)
        weights = np.exp(np.float32(-0.5) * (steps / np.float32(parameters)) ** 2)
        weights = (weights / weights.sum()).astype(np.float64)
        pixels = np.asarray(image, np.float64)
        for axis in (0, 1):
            pixels = correlate1d(pixels, weights, axis, mode="mirror")
        return as_image(np.round(pixels).astype(np.asarray(image).dtype))


@dataclass(frozen=True)
class RandomGrayscale(ByChance):
    """Takes the colour away with probability `p`; the number of channels stays."""

    p: float = 0.1

    def apply(self, image: AnyImage, parameters: bool) -> Image.Image:
        """Makes it gray if told so."""
        image = as_image(image)
        if not parameters or isinstance(image, Bands):  # whose channels are no colours
            return image
        return in_eight_bits(lambda one: one.convert("L").convert(one.mode))(image)


def _both_ways(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, int | float):
        return -between(name, value, 0), float(value)
    return _limits(name, value, -math.inf, math.inf)
