"""Single transforms, their parameters drawn and applied as torchvision's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageEnhance

from keras_resnet.data.bands import AnyPicture, bordered, fill_of, in_eight_bits
from keras_resnet.data.items import as_image
from keras_resnet.data.preprocess import compiled, crop_centre, resample_filter, resize_image
from keras_resnet.system.errors import InputError, between, did_you_mean, whole

AnyImage = AnyPicture | np.ndarray


@dataclass(frozen=True)
class Transform:
    """A random change of one image: `sample` draws parameters, `apply` uses them."""

    by_name: ClassVar[dict[str, type[Transform]]] = {}

    def __init_subclass__(cls, registered: bool = True) -> None:
        """Every kind is found by its class name when a config is read back."""
        super().__init_subclass__()
        if registered:
            Transform.by_name[cls.__name__] = cls

    def sample(self, height: int, width: int, rng: np.random.Generator) -> Any:
        """Draws the parameters for an image of this size; where nothing is random, none."""

    def apply(self, image: AnyImage, parameters: Any) -> Image.Image:
        """Returns the changed image."""
        raise NotImplementedError

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> Image.Image:
        """Draws parameters and applies them."""
        return self.apply(image, self.sample(*_height_width(image), rng))

    def in_chain(self, image: AnyImage, rng: np.random.Generator) -> AnyImage:
        """The same for an `Augment`, which lets an array stay one where that is faster."""
        return self(image, rng)

    def get_config(self) -> dict[str, Any]:
        """Returns the name and the arguments as plain JSON types."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"name": type(self).__name__, **values}

    @staticmethod
    def from_config(config: dict[str, Any]) -> Transform:
        """Builds the transform that `get_config` described."""
        arguments = dict(config)
        name = arguments.pop("name", None)
        kind = Transform.by_name.get(name)
        if kind is None:
            raise InputError(
                f"There is no transform {name!r}; known: {', '.join(sorted(Transform.by_name))}."
                f"{did_you_mean(name, Transform.by_name)}"
            )
        known = [field.name for field in fields(kind)]
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise InputError(f"{name} has no argument {', '.join(unknown)}; it takes {known}.")
        return kind(**arguments)

    def _store(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Resize(Transform):
    """Resizes to (height, width), or the short side to an int; nothing is random."""

    size: int | tuple[int, int]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        self._store(size=self.size if isinstance(self.size, int) else _pair("size", self.size))
        resample_filter(self.interpolation)

    def apply(self, image: AnyImage, parameters: None = None) -> Image.Image:
        """Returns the image resized as `Preprocess` does."""
        return resize_image(as_image(image), self.size, resample_filter(self.interpolation))


@dataclass(frozen=True)
class CenterCrop(Transform):
    """Cuts the centre of a size out as `Preprocess` does, padded with black where it is smaller."""

    size: int | tuple[int, int]

    def __post_init__(self) -> None:
        self._store(size=_pair("size", self.size))

    def apply(self, image: AnyImage, parameters: None = None) -> Image.Image:
        """Returns the centre of the image."""
        return crop_centre(as_image(image), self.size)


@dataclass(frozen=True)
class RandomResizedCrop(Transform):
    """A random part of the image, resized to `size` (Szegedy et al. 2015, section 6).

    Attributes:
        size: of the result, an int or (height, width).
        scale: limits of the part's share of the area.
        ratio: limits of its width / height.
        interpolation: as in `Preprocess`.

    Examples:
        >>> crop = RandomResizedCrop(224)
        >>> image = Image.new("RGB", (500, 400))
        >>> crop(image, np.random.default_rng(0)).size
        (224, 224)
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        self._store(
            size=_pair("size", self.size),
            scale=_limits("scale", self.scale, 0, 1),
            ratio=_limits("ratio", self.ratio, 1e-6, math.inf),
        )
        resample_filter(self.interpolation)

    def sample(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draws (top, left, height, width); torchvision `RandomResizedCrop.get_params`."""
        area = height * width
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            target = area * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            w = round(math.sqrt(target * ratio))
            h = round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        # Ten misses: the largest centred window with an allowed shape.
        h, w = height, width
        if width / height < min(self.ratio):
            h = round(width / min(self.ratio))
        elif width / height > max(self.ratio):
            w = round(height * max(self.ratio))
        return (height - h) // 2, (width - w) // 2, h, w

    def apply(self, image: AnyImage, parameters: tuple[int, int, int, int]) -> Image.Image:
        """Cuts (top, left, height, width) out and resizes it."""
        top, left, height, width = parameters
        if isinstance(image, np.ndarray):  # only what is used is handed to Pillow
            part = as_image(image[top : top + height, left : left + width])
        else:
            part = image.crop((left, top, left + width, top + height))
        return resize_image(part, self.size, resample_filter(self.interpolation))

    def in_chain(self, image: AnyImage, rng: np.random.Generator) -> AnyImage:
        """Cuts out and resizes an array by the compiled resize."""
        parameters = top, left, height, width = self.sample(*_height_width(image), rng)
        if isinstance(image, np.ndarray):
            kernels = compiled(image, resample_filter(self.interpolation))
            if kernels is not None:
                return kernels.resize(image[top : top + height, left : left + width], self.size)
        return self.apply(image, parameters)


@dataclass(frozen=True)
class ByChance(Transform, registered=False):
    """A change that is made with probability `p`, and has no other parameter."""

    p: float = 0.5

    def __post_init__(self) -> None:
        between("p", self.p, 0, 1)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> bool:
        """Draws whether to make it."""
        return bool(rng.random() < self.p)


@dataclass(frozen=True)
class RandomHorizontalFlip(ByChance):
    """Mirrors left and right with probability `p`."""

    def apply(self, image: AnyImage, parameters: bool) -> Image.Image:
        """Mirrors the image if told so."""
        image = as_image(image)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if parameters else image

    def in_chain(self, image: AnyImage, rng: np.random.Generator) -> AnyImage:
        """Mirrors an array without a detour by Pillow."""
        parameters = self.sample(*_height_width(image), rng)
        if isinstance(image, np.ndarray):
            kernels = compiled(image, Image.Resampling.BILINEAR)
            if kernels is not None:
                return kernels.mirrored(image) if parameters else image
        return self.apply(image, parameters)


@dataclass(frozen=True)
class RandomCrop(Transform):
    """A random window of `size` out of the padded image (He et al. 2015, section 4.2).

    Attributes:
        size: of the window, an int or (height, width).
        padding: black (`fill`) pixels on every side first: 4 for CIFAR.
        pad_if_needed: pad smaller images up to `size` instead of refusing them.
        fill: the value of the padding.
    """

    size: int | tuple[int, int]
    padding: int = 0
    pad_if_needed: bool = False
    fill: int = 0

    def __post_init__(self) -> None:
        self._store(size=_pair("size", self.size), padding=whole("padding", self.padding, 0))

    def _border(self, height: int, width: int) -> tuple[int, int, int]:
        """Pixels added at both sides by `padding`, then above and below, then left and right."""
        more = [0, 0]
        if self.pad_if_needed:
            sides = (height + 2 * self.padding, width + 2 * self.padding)
            more = [max(want - have, 0) for want, have in zip(self.size, sides, strict=True)]
        return self.padding, more[0], more[1]

    def sample(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draws (top, left) in the padded image."""
        padding, more_height, more_width = self._border(height, width)
        rows = height + 2 * (padding + more_height) - self.size[0]
        columns = width + 2 * (padding + more_width) - self.size[1]
        if rows < 0 or columns < 0:
            raise InputError(
                f"RandomCrop of {self.size} (height, width) from an image of {(height, width)} "
                f"with padding {padding}: resize first, or give pad_if_needed=True."
            )
        return int(rng.integers(rows + 1)), int(rng.integers(columns + 1))

    def apply(self, image: AnyImage, parameters: tuple[int, int]) -> Image.Image:
        """Pads, and cuts the window at (top, left)."""
        image = as_image(image)
        padding, more_height, more_width = self._border(image.height, image.width)
        border = (padding + more_width, padding + more_height)
        if any(border):
            image = bordered(image, border, fill_of(image, self.fill))
        top, left = parameters
        return image.crop((left, top, left + self.size[1], top + self.size[0]))


@dataclass(frozen=True)
class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue, in random order.

    Attributes:
        brightness: a factor from 1 - x to 1 + x, or from limits (low, high); so are the next two.
        contrast: see brightness.
        saturation: see brightness.
        hue: a shift from -x to x (at most 0.5), or from limits.
    """

    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0
    hue: float | tuple[float, float] = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            value, centre = getattr(self, name), 0.0 if name == "hue" else 1.0
            low, high = (-0.5, 0.5) if name == "hue" else (0.0, math.inf)
            if isinstance(value, int | float):
                between(name, value, 0)
                value = (centre - value, centre + value)
                value = (max(value[0], 0.0), value[1]) if centre else value
            self._store(**{name: _limits(name, value, low, high)})

    def sample(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Draws the order (0 brightness, 1 contrast, 2 saturation, 3 hue) and the four values."""
        order = tuple(int(i) for i in rng.permutation(4))
        limits = (self.brightness, self.contrast, self.saturation, self.hue)
        return order, tuple(float(rng.uniform(*pair)) for pair in limits)

    def apply(
        self, image: AnyImage, parameters: tuple[Sequence[int], Sequence[float]]
    ) -> Image.Image:
        """Applies the four changes in the order drawn."""
        image = as_image(image)
        limits = (self.brightness, self.contrast, self.saturation, self.hue)
        order, values = parameters
        for i in order:
            if i == 3 and limits[i] != (0.0, 0.0):
                image = _hue(image, values[i])
            elif i < 3 and limits[i] != (1.0, 1.0):
                image = enhanced(image, ("Brightness", "Contrast", "Color")[i], values[i])
        return image


@in_eight_bits
def enhanced(image: Image.Image, name: str, factor: float) -> Image.Image:
    """An image by one of Pillow's `ImageEnhance`: 1 leaves it as it is, 0 has nothing of it."""
    return getattr(ImageEnhance, name)(image).enhance(factor)


@in_eight_bits
def _hue(image: Image.Image, shift: float) -> Image.Image:
    """torchvision/transforms/_functional_pil.py `adjust_hue`: the hue byte wraps around."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue) + np.int32(shift * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert(image.mode)


@dataclass(frozen=True)
class RandomErasing(Transform):
    """Overwrites a random rectangle (Zhong et al. 2017, arXiv 1708.04896).

    It acts after normalisation, on arrays: in an `Augment` it stands last, and the dataset applies
    it. Where a dataset gives uint8 pixels, `value` is rounded to the pixel value it stands for.

    Attributes:
        p: probability.
        scale: limits of the rectangle's share of the area.
        ratio: limits of its height / width.
        value: written into it, in normalised units: 0 is the mean colour.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: float = 0.0

    def __post_init__(self) -> None:
        between("p", self.p, 0, 1)
        self._store(
            scale=_limits("scale", self.scale, 0, 1),
            ratio=_limits("ratio", self.ratio, 1e-6, math.inf),
        )

    def sample(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int] | None:
        """Draws (top, left, height, width), or None; torchvision `RandomErasing.get_params`."""
        if rng.random() >= self.p:
            return None
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            target = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if h < height and w < width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        return None

    def apply(
        self, image: np.ndarray, parameters: tuple[int, int, int, int] | None, value: Any = None
    ) -> np.ndarray:
        """Returns a copy of the array (height, width, channels) with the rectangle overwritten."""
        image = np.array(image)
        if parameters is not None:
            top, left, height, width = parameters
            image[top : top + height, left : left + width] = self.value if value is None else value
        return image

    def value_in(self, preprocess: Any, output: str) -> np.ndarray:
        """What erased pixels hold: in normalised units, as `value` is, for an output of float32."""
        if output == "float32":
            return np.full(preprocess.channels, self.value, np.float32)
        mean = 0.0 if preprocess.mean is None else preprocess.mean
        std = 1.0 if preprocess.std is None else np.asarray(preprocess.std)
        pixels = np.clip(np.round((self.value * std + mean) * 255), 0, 255)
        return np.broadcast_to(pixels, preprocess.channels).astype(np.uint8)


def _height_width(image: AnyImage) -> tuple[int, int]:
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.height, image.width


def _pair(name: str, value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise InputError(f"{name} must be a positive int or (height, width). Received: {value!r}.")
    return sides


def _limits(name: str, value: Any, least: float, most: float) -> tuple[float, float]:
    try:
        low, high = map(float, value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not least <= low <= high <= most:
        raise InputError(
            f"{name} must be (low, high) with {least} <= low <= high <= {most}. "
            f"Received: {value!r}."
        )
    return low, high
