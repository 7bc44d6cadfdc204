"""Random changes of training images with torchvision's semantics.

Every transform is two functions: `sample(height, width, rng)` draws its parameters from a NumPy
generator, `apply(image, parameters)` uses them. Given equal parameters, `apply` gives the pixels
that torchvision gives for a Pillow image (torchvision/transforms/functional.py, autoaugment.py,
v2/_augment.py); the distributions of the parameters are torchvision's too, its random stream is
not. `Augment` chains them; `Mix` (mixup and cutmix) works on whole batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from keras_resnet.data.transforms import (
    AnyImage,
    RandomErasing,
    Transform,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    as_image,
    resample_filter,
)
from keras_resnet.system.errors import InputError

# --- the operations of TrivialAugment and RandAugment --------------------------------------------


def _affine(
    image: Image.Image,
    translate: tuple[float, float],
    shear: tuple[float, float],
    center: tuple[float, float],
    resample: int,
    fill: Any,
) -> Image.Image:
    """torchvision/transforms/functional.py `_get_inverse_affine_matrix` at angle 0, scale 1.

    The products of cosines stay: leaving out what is 1 in exact arithmetic changes last bits, and
    with them pixels under nearest interpolation.
    """
    sx, sy = shear
    a = math.cos(-sy) / math.cos(sy)
    b = -math.cos(-sy) * math.tan(sx) / math.cos(sy) - math.sin(0.0)
    c = math.sin(-sy) / math.cos(sy)
    d = -math.sin(-sy) * math.tan(sx) / math.cos(sy) + math.cos(0.0)
    cx, cy = center
    tx, ty = translate
    matrix = [d, -b, 0.0, -c, a, 0.0]
    matrix[2] += matrix[0] * (-cx - tx) + matrix[1] * (-cy - ty)
    matrix[5] += matrix[3] * (-cx - tx) + matrix[4] * (-cy - ty)
    matrix[2] += cx
    matrix[5] += cy
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def apply_operation(
    image: Image.Image, name: str, magnitude: float, resample: int, fill: float | None = None
) -> Image.Image:
    """Applies one named operation; torchvision/transforms/autoaugment.py `_apply_op`.

    Args:
        image: a Pillow image of mode RGB or L.
        name: `"ShearX"`, `"TranslateY"`, `"Rotate"`, `"Posterize"`, ...
        magnitude: in the operation's own unit, sign included.
        resample: a Pillow resampling filter for the geometric operations.
        fill: the value of pixels from outside the image; None is 0.
    """
    bands = len(image.getbands())
    value = int(fill or 0)
    fill = value if bands == 1 else (value,) * bands
    # torchvision goes by degrees and back, and so do the last bits of the angle.
    angle = math.radians(math.degrees(math.atan(magnitude)))
    centre = (image.width * 0.5, image.height * 0.5)
    shift = int(magnitude)
    match name:
        case "Identity":
            return image
        case "ShearX":
            return _affine(image, (0, 0), (angle, 0.0), (0, 0), resample, fill)
        case "ShearY":
            return _affine(image, (0, 0), (0.0, angle), (0, 0), resample, fill)
        case "TranslateX":
            return _affine(image, (shift, 0), (0.0, 0.0), centre, resample, fill)
        case "TranslateY":
            return _affine(image, (0, shift), (0.0, 0.0), centre, resample, fill)
        case "Rotate":
            return image.rotate(magnitude, resample, fillcolor=fill)
        case "Brightness":
            return adjust_brightness(image, 1.0 + magnitude)
        case "Color":
            return adjust_saturation(image, 1.0 + magnitude)
        case "Contrast":
            return adjust_contrast(image, 1.0 + magnitude)
        case "Sharpness":
            return adjust_sharpness(image, 1.0 + magnitude)
        case "Posterize":
            return ImageOps.posterize(image, int(magnitude))
        case "Solarize":
            return ImageOps.solarize(image, magnitude)
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
    raise InputError(f"There is no operation {name!r}.")


@functools.lru_cache(maxsize=64)  # images of one size share it; it is only read
def _space(
    bins: int, shear: float, shift: tuple[float, float], degrees: float, colour: float, bits: int
) -> dict[str, tuple[np.ndarray | None, bool]]:
    """Magnitudes of each operation, and whether their sign is drawn."""
    return {
        "Identity": (None, False),
        "ShearX": (_linspace(0.0, shear, bins), True),
        "ShearY": (_linspace(0.0, shear, bins), True),
        "TranslateX": (_linspace(0.0, shift[1], bins), True),
        "TranslateY": (_linspace(0.0, shift[0], bins), True),
        "Rotate": (_linspace(0.0, degrees, bins), True),
        "Brightness": (_linspace(0.0, colour, bins), True),
        "Color": (_linspace(0.0, colour, bins), True),
        "Contrast": (_linspace(0.0, colour, bins), True),
        "Sharpness": (_linspace(0.0, colour, bins), True),
        "Posterize": (8 - np.round(np.arange(bins) / ((bins - 1) / bits)), False),
        "Solarize": (_linspace(255.0, 0.0, bins), False),
        "AutoContrast": (None, False),
        "Equalize": (None, False),
    }


def _linspace(start: float, stop: float, bins: int) -> np.ndarray:
    """torch.linspace in float32: from both ends to the middle, product and sum rounded once."""
    start, stop = np.float32(start), np.float32(stop)
    step = np.float64((stop - start) / np.float32(bins - 1))
    i = np.arange(bins)
    values = np.where(i < bins // 2, start + step * i, stop - step * (bins - 1 - i))
    return values.astype(np.float32)


@dataclass(frozen=True)
class TrivialAugmentWide(Transform):
    """One random operation at a random strength (Mueller and Hutter 2021, arXiv 2103.10158).

    Attributes:
        num_magnitude_bins: strengths an operation can have.
        interpolation: of the geometric operations; torchvision's recipes use `"bilinear"`.
        fill: the value of pixels from outside the image; None is black.
    """

    num_magnitude_bins: int = 31
    interpolation: str = "nearest"
    fill: float | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _bins(self.num_magnitude_bins)
        resample_filter(self.interpolation)

    def space(self, height: int, width: int) -> dict[str, tuple[np.ndarray | None, bool]]:
        """Operations, their magnitudes, and whether their sign is drawn."""
        return _space(self.num_magnitude_bins, 0.99, (32.0, 32.0), 135.0, 0.99, 6)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Draws [(operation, magnitude)]."""
        return [_draw(self.space(height, width), None, rng)]

    def apply(self, image: AnyImage, parameters: Iterable[tuple[str, float]]) -> Image.Image:
        """Applies the operations in order."""
        return _apply_all(self, image, parameters)


@dataclass(frozen=True)
class RandAugment(Transform):
    """Random operations at one strength (Cubuk et al. 2019, arXiv 1909.13719).

    Attributes:
        num_ops: operations an image.
        magnitude: their strength, 0 to num_magnitude_bins - 1.
        num_magnitude_bins: strengths an operation can have.
        interpolation: of the geometric operations; torchvision's recipes use `"bilinear"`.
        fill: the value of pixels from outside the image; None is black.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    interpolation: str = "nearest"
    fill: float | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _bins(self.num_magnitude_bins)
        resample_filter(self.interpolation)
        if not 0 <= self.magnitude < self.num_magnitude_bins:
            raise InputError(
                f"magnitude must lie in 0..{self.num_magnitude_bins - 1}. "
                f"Received: {self.magnitude!r}."
            )

    def space(self, height: int, width: int) -> dict[str, tuple[np.ndarray | None, bool]]:
        """Operations, their magnitudes, and whether their sign is drawn."""
        shift = (150.0 / 331.0 * height, 150.0 / 331.0 * width)
        return _space(self.num_magnitude_bins, 0.3, shift, 30.0, 0.9, 4)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Draws [(operation, magnitude), ...]."""
        space = self.space(height, width)
        return [_draw(space, self.magnitude, rng) for _ in range(self.num_ops)]

    def apply(self, image: AnyImage, parameters: Iterable[tuple[str, float]]) -> Image.Image:
        """Applies the operations in order."""
        return _apply_all(self, image, parameters)


def _draw(
    space: dict[str, tuple[np.ndarray | None, bool]], strength: int | None, rng: np.random.Generator
) -> tuple[str, float]:
    name = list(space)[rng.integers(len(space))]
    magnitudes, signed = space[name]
    if magnitudes is None:
        return name, 0.0
    magnitude = float(magnitudes[rng.integers(len(magnitudes)) if strength is None else strength])
    return name, -magnitude if signed and rng.integers(2) else magnitude


def _apply_all(
    transform: TrivialAugmentWide | RandAugment,
    image: AnyImage,
    operations: Iterable[tuple[str, float]],
) -> Image.Image:
    image = as_image(image)
    resample = resample_filter(transform.interpolation)
    for name, magnitude in operations:
        image = apply_operation(image, name, magnitude, resample, transform.fill)
    return image


class Augment:
    """A chain of transforms: (image, generator) to uint8 pixels.

    Args:
        steps: transforms, or their configs, in order. A `RandomErasing` stands last; the dataset
            applies it after normalisation.

    Attributes:
        steps: those that change the image itself.
        erasing: the `RandomErasing`, or None.

    Examples:
        >>> from keras_resnet import RandomHorizontalFlip, RandomResizedCrop
        >>> augment = Augment([RandomResizedCrop(32), RandomHorizontalFlip()])
        >>> augment(np.zeros((60, 80, 3), np.uint8), np.random.default_rng(0)).shape
        (32, 32, 3)
        >>> Augment.from_config(augment.get_config()) == augment
        True
    """

    def __init__(self, steps: Sequence[Transform | dict[str, Any]]) -> None:
        """Checks the steps."""
        built = [Transform.from_config(s) if isinstance(s, dict) else s for s in steps]
        wrong = [s for s in built if not isinstance(s, Transform)]
        if wrong:
            raise InputError(f"Augment takes transforms. Received: {wrong[0]!r}.")
        erasing = [s for s in built if isinstance(s, RandomErasing)]
        if erasing and (len(erasing) > 1 or built[-1] is not erasing[0]):
            raise InputError("RandomErasing acts after normalisation: give one, as the last step.")
        self.erasing = erasing[0] if erasing else None
        self.steps = tuple(built[: len(built) - len(erasing)])

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Returns the changed image, uint8 (height, width, channels), without the erasing."""
        for step in self.steps:
            image = step.in_chain(image, rng)
        pixels = np.asarray(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of the result where the steps fix it."""
        sizes = [s.size for s in self.steps if isinstance(getattr(s, "size", None), tuple)]
        return sizes[-1] if sizes else None

    def get_config(self) -> dict[str, Any]:
        """Returns all steps as plain JSON types."""
        steps = [*self.steps, *([self.erasing] if self.erasing else [])]
        return {"steps": [step.get_config() for step in steps]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Augment:
        """Builds the chain that `get_config` described."""
        return cls(config["steps"])

    def __eq__(self, other: object) -> bool:
        """Equal steps in equal order."""
        return isinstance(other, Augment) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        """Of the steps."""
        return hash((self.steps, self.erasing))

    def __repr__(self) -> str:
        """Shows the steps as they are written."""
        steps = [*self.steps, *([self.erasing] if self.erasing else [])]
        return f"Augment([{', '.join(map(repr, steps))}])"


# --- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """mixup or cutmix of a batch with itself turned by one, as torchvision's v2 transforms.

    Attributes:
        mixup: alpha of Beta(alpha, alpha) for mixup (Zhang et al. 2017, arXiv 1710.09412); 0: none.
        cutmix: the same for cutmix (Yun et al. 2019, arXiv 1905.04899). With both, each batch gets
            one of the two, with equal chances, as in torchvision's references.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if min(self.mixup, self.cutmix) < 0 or max(self.mixup, self.cutmix) == 0:
            raise InputError(
                f"mixup and cutmix are alphas of at least 0, one of them positive. Received: "
                f"{self.mixup!r} and {self.cutmix!r}."
            )

    def sample(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[str, float, tuple[int, int, int, int] | None]:
        """Draws ("mixup", share, None) or ("cutmix", share, (left, top, right, bottom)).

        The fraction is that of the image that stays; for cutmix it is that of the actual box.
        """
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(rng.beta(alpha, alpha))
        if not cut:
            return "mixup", share, None
        x, y = int(rng.integers(width)), int(rng.integers(height))
        half = 0.5 * math.sqrt(1.0 - share)
        half_width, half_height = int(half * width), int(half * height)
        left, right = max(x - half_width, 0), min(x + half_width, width)
        top, bottom = max(y - half_height, 0), min(y + half_height, height)
        share = 1.0 - (right - left) * (bottom - top) / (width * height)
        return "cutmix", share, (left, top, right, bottom)

    def apply(
        self, images: np.ndarray, labels: np.ndarray, parameters: tuple[str, float, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mixes images (n, height, width, channels) and one-hot labels (n, classes).

        uint8 images stay uint8: mixup rounds to the nearest pixel value.
        """
        kind, share, box = parameters
        if kind == "cutmix":
            left, top, right, bottom = box
            mixed = images.copy()
            mixed[:, top:bottom, left:right] = np.roll(images[:, top:bottom, left:right], 1, axis=0)
        else:
            mixed = _blend(images.astype(np.float32, copy=False), share)
            if images.dtype == np.uint8:
                mixed = np.rint(mixed).astype(np.uint8)
        return mixed, _blend(labels.astype(np.float32, copy=False), share)

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws parameters and applies them."""
        return self.apply(images, labels, self.sample(*images.shape[1:3], rng))

    def weighed(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray | None,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The same of images that count differently: the loss of each stays weighed with its own.

        What is blended is weight times label; the weight of a mixed image is the blended weight.
        """
        if weights is None:
            return *self(images, labels, rng), None
        both = np.concatenate([labels * weights[:, None], weights[:, None]], axis=1)
        images, both = self(images, both, rng)
        labels, weights = both[:, :-1], both[:, -1]
        return images, labels / np.maximum(weights, np.finfo(np.float32).tiny)[:, None], weights


def _blend(values: np.ndarray, share: float) -> np.ndarray:
    turned = np.roll(values, 1, axis=0)
    turned *= np.float32(1.0 - share)
    turned += values * np.float32(share)
    return turned


def smooth_labels(labels: np.ndarray, smoothing: float, each: bool = False) -> np.ndarray:
    """Moves `smoothing` of each row of one-hot or mixed labels to all classes alike.

    As torch.nn.CrossEntropyLoss(label_smoothing=...): (1 - s) * y + s / classes. Where each label
    is a yes or no for itself (`each`) it is halved between them, as
    keras.losses.BinaryCrossentropy does.

    Examples:
        >>> smooth_labels(np.array([[0.0, 1.0]], np.float32), 0.1).round(3).tolist()
        [[0.05000000074505806, 0.949999988079071]]
    """
    return labels * np.float32(1.0 - smoothing) + np.float32(
        smoothing / (2 if each else labels.shape[-1])
    )


def _bins(count: int) -> None:
    if not isinstance(count, int) or count < 2:
        raise InputError(f"num_magnitude_bins must be an int of at least 2. Received: {count!r}.")
