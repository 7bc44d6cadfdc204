"""Random changes of training images with torchvision's semantics.

Every transform is two functions: `sample(height, width, rng)` draws its parameters from a NumPy
generator, `apply(image, parameters)` uses them. Given equal parameters, `apply` gives the pixels
that torchvision gives for a Pillow image (torchvision/transforms/functional.py, autoaugment.py,
v2/_augment.py); the distributions of the parameters are torchvision's too, its random stream is
not. `Augment` chains them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from keras_resnet.data.bands import fill_of, in_eight_bits, to_array
from keras_resnet.data.items import as_image
from keras_resnet.data.transforms import AnyImage, RandomErasing, Transform, enhanced
from keras_resnet.data.warps import affine, turning_filter
from keras_resnet.system.errors import InputError, between, one_of, whole

# --- the operations of TrivialAugment and RandAugment --------------------------------------------


def apply_operation(
    image: Image.Image, name: str, magnitude: float, resample: int, fill: float | None = None
) -> Image.Image:
    """Applies one named operation; torchvision/transforms/autoaugment.py `_apply_op`.

    Its magnitude is in the operation's own unit, sign included.
    """
    fill = fill_of(image, fill)
    # torchvision goes by degrees and back, and so do the last bits of the angle.
    angle = math.radians(math.degrees(math.atan(magnitude)))
    centre = (image.width * 0.5, image.height * 0.5)
    shift = int(magnitude)
    match name:
        case "Identity":
            return image
        case "ShearX":
            return affine(image, (0, 0), (angle, 0.0), (0, 0), resample, fill)
        case "ShearY":
            return affine(image, (0, 0), (0.0, angle), (0, 0), resample, fill)
        case "TranslateX":
            return affine(image, (shift, 0), (0.0, 0.0), centre, resample, fill)
        case "TranslateY":
            return affine(image, (0, shift), (0.0, 0.0), centre, resample, fill)
        case "Rotate":
            return image.rotate(magnitude, resample, fillcolor=fill)
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            return enhanced(image, name, 1.0 + magnitude)
        case "Posterize":
            return in_eight_bits(ImageOps.posterize)(image, int(magnitude))
        case "Solarize":
            return in_eight_bits(ImageOps.solarize)(image, magnitude)
        case "AutoContrast" | "Equalize" | "Invert":
            return in_eight_bits(getattr(ImageOps, name.lower()))(image)
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


class _Policy(Transform, registered=False):
    """Operations that are drawn, applied in order."""

    interpolation: str
    fill: float | None

    def apply(self, image: AnyImage, parameters: Iterable[tuple[str, float]]) -> Image.Image:
        image, resample = as_image(image), turning_filter(self.interpolation)
        for name, magnitude in parameters:
            image = apply_operation(image, name, magnitude, resample, self.fill)
        return image


@dataclass(frozen=True)
class TrivialAugmentWide(_Policy):
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
        self._store(num_magnitude_bins=whole("num_magnitude_bins", self.num_magnitude_bins, 2))
        turning_filter(self.interpolation)

    def space(self, height: int, width: int) -> dict[str, tuple[np.ndarray | None, bool]]:
        """Operations, their magnitudes, and whether their sign is drawn."""
        return _space(self.num_magnitude_bins, 0.99, (32.0, 32.0), 135.0, 0.99, 6)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Draws [(operation, magnitude)]."""
        return [_draw(self.space(height, width), None, rng)]


@dataclass(frozen=True)
class RandAugment(_Policy):
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
        self._store(num_magnitude_bins=whole("num_magnitude_bins", self.num_magnitude_bins, 2))
        turning_filter(self.interpolation)
        between("magnitude", self.magnitude, 0, self.num_magnitude_bins - 1)

    def space(self, height: int, width: int) -> dict[str, tuple[np.ndarray | None, bool]]:
        """Operations, their magnitudes, and whether their sign is drawn."""
        shift = (150.0 / 331.0 * height, 150.0 / 331.0 * width)
        return _space(self.num_magnitude_bins, 0.3, shift, 30.0, 0.9, 4)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Draws [(operation, magnitude), ...]."""
        space = self.space(height, width)
        return [_draw(space, self.magnitude, rng) for _ in range(self.num_ops)]


# Sub-policies, two operations each: name, probability, step of ten (torchvision's table).
_POLICIES = {
    "imagenet": """
        Posterize 0.4 8 Rotate 0.6 9; Solarize 0.6 5 AutoContrast 0.6 -;
        Equalize 0.8 - Equalize 0.6 -; Posterize 0.6 7 Posterize 0.6 6;
        Equalize 0.4 - Solarize 0.2 4; Equalize 0.4 - Rotate 0.8 8; Solarize 0.6 3 Equalize 0.6 -;
        Posterize 0.8 5 Equalize 1 -; Rotate 0.2 3 Solarize 0.6 8; Equalize 0.6 - Posterize 0.4 6;
        Rotate 0.8 8 Color 0.4 0; Rotate 0.4 9 Equalize 0.6 -; Equalize 0 - Equalize 0.8 -;
        Invert 0.6 - Equalize 1 -; Color 0.6 4 Contrast 1 8; Rotate 0.8 8 Color 1 2;
        Color 0.8 8 Solarize 0.8 7; Sharpness 0.4 7 Invert 0.6 -; ShearX 0.6 5 Equalize 1 -;
        Color 0.4 0 Equalize 0.6 -; Equalize 0.4 - Solarize 0.2 4;
        Solarize 0.6 5 AutoContrast 0.6 -; Invert 0.6 - Equalize 1 -; Color 0.6 4 Contrast 1 8;
        Equalize 0.8 - Equalize 0.6 -""",
    "cifar10": """
        Invert 0.1 - Contrast 0.2 6; Rotate 0.7 2 TranslateX 0.3 9;
        Sharpness 0.8 1 Sharpness 0.9 3; ShearY 0.5 8 TranslateY 0.7 9;
        AutoContrast 0.5 - Equalize 0.9 -; ShearY 0.2 7 Posterize 0.3 7;
        Color 0.4 3 Brightness 0.6 7; Sharpness 0.3 9 Brightness 0.7 9;
        Equalize 0.6 - Equalize 0.5 -; Contrast 0.6 7 Sharpness 0.6 5;
        Color 0.7 7 TranslateX 0.5 8; Equalize 0.3 - AutoContrast 0.4 -;
        TranslateY 0.4 3 Sharpness 0.2 6; Brightness 0.9 6 Color 0.2 8; Solarize 0.5 2 Invert 0 -;
        Equalize 0.2 - AutoContrast 0.6 -; Equalize 0.2 - Equalize 0.6 -;
        Color 0.9 9 Equalize 0.6 -; AutoContrast 0.8 - Solarize 0.2 8;
        Brightness 0.1 3 Color 0.7 0; Solarize 0.4 5 AutoContrast 0.9 -;
        TranslateY 0.9 9 TranslateY 0.7 9; AutoContrast 0.9 - Solarize 0.8 3;
        Equalize 0.8 - Invert 0.1 -; TranslateY 0.7 9 AutoContrast 0.9 -""",
    "svhn": """
        ShearX 0.9 4 Invert 0.2 -; ShearY 0.9 8 Invert 0.7 -; Equalize 0.6 - Solarize 0.6 6;
        Invert 0.9 - Equalize 0.6 -; Equalize 0.6 - Rotate 0.9 3; ShearX 0.9 4 AutoContrast 0.8 -;
        ShearY 0.9 8 Invert 0.4 -; ShearY 0.9 5 Solarize 0.2 6; Invert 0.9 - AutoContrast 0.8 -;
        Equalize 0.6 - Rotate 0.9 3; ShearX 0.9 4 Solarize 0.3 3; ShearY 0.8 8 Invert 0.7 -;
        Equalize 0.9 - TranslateY 0.6 6; Invert 0.9 - Equalize 0.6 -; Contrast 0.3 3 Rotate 0.8 4;
        Invert 0.8 - TranslateY 0 2; ShearY 0.7 6 Solarize 0.4 8; Invert 0.6 - Rotate 0.8 4;
        ShearY 0.3 7 TranslateX 0.9 3; ShearX 0.1 6 Invert 0.6 -; Solarize 0.7 2 TranslateY 0.6 7;
        ShearY 0.8 4 Invert 0.8 -; ShearX 0.7 9 TranslateY 0.8 3; ShearY 0.8 5 AutoContrast 0.7 -;
        ShearX 0.7 2 Invert 0.1 -""",
}


@dataclass(frozen=True)
class AutoAugment(_Policy):
    """Two operations, together, out of a table that was learned (Cubuk et al. 2018, 1805.09501).

    Attributes:
        policy: `"imagenet"`, `"cifar10"` or `"svhn"`: what it was learned on.
        interpolation: of the geometric operations; torchvision's recipes use `"bilinear"`.
        fill: the value of pixels from outside the image; None is black.
    """

    policy: str = "imagenet"
    interpolation: str = "nearest"
    fill: float | None = None

    def __post_init__(self) -> None:
        one_of("policy", self.policy, tuple(_POLICIES))
        turning_filter(self.interpolation)

    def space(self, height: int, width: int) -> dict[str, tuple[np.ndarray | None, bool]]:
        """Operations, their magnitudes, and whether their sign is drawn."""
        shift = (150.0 / 331.0 * height, 150.0 / 331.0 * width)
        return {**_space(10, 0.3, shift, 30.0, 0.9, 4), "Invert": (None, False)}

    def sample(self, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Draws [(operation, magnitude), ...], none to two of them."""
        table, space = _POLICIES[self.policy].split(";"), self.space(height, width)
        words, found = table[rng.integers(len(table))].split(), []
        for name, chance, step in zip(words[::3], words[1::3], words[2::3], strict=True):
            drawn, negative = rng.random(), rng.integers(2) == 0
            if drawn <= float(chance):
                magnitudes, signed = space[name]
                magnitude = 0.0 if magnitudes is None else float(magnitudes[int(step)])
                found.append((name, -magnitude if signed and negative else magnitude))
        return found


@dataclass(frozen=True)
class AugMix(_Policy):
    """An image mixed with several changed copies of itself (Hendrycks et al. 2019, 1912.02781).

    Operations are those of the other policies, on Pillow images; torchvision's AugMix turns the
    image into a tensor first, whose operations give slightly other pixels.

    Attributes:
        severity: the strongest step of the operations, of ten.
        mixture_width: changed copies.
        chain_depth: operations a copy; -1 draws one to three.
        alpha: of the Dirichlet distributions of the shares.
        all_ops: also those that ImageNet-C contains: brightness, colour, contrast, sharpness.
        interpolation: of the geometric operations.
        fill: the value of pixels from outside the image; None is black.
    """

    severity: int = 3
    mixture_width: int = 3
    chain_depth: int = -1
    alpha: float = 1.0
    all_ops: bool = True
    interpolation: str = "bilinear"
    fill: float | None = None

    def __post_init__(self) -> None:
        between("severity", self.severity, 1, 10)
        self._store(mixture_width=whole("mixture_width", self.mixture_width, 1))
        self._store(chain_depth=whole("chain_depth", self.chain_depth, -1))
        between("alpha", self.alpha, 0, ends="(]")
        turning_filter(self.interpolation)

    def space(self, height: int, width: int) -> dict[str, tuple[np.ndarray | None, bool]]:
        """Operations, their magnitudes, and whether their sign is drawn."""
        space = dict(_space(10, 0.3, (height / 3.0, width / 3.0), 30.0, 0.9, 4))
        bits = 4 - np.round(np.arange(10) / (9 / 4))
        left_out = () if self.all_ops else ("Brightness", "Color", "Contrast", "Sharpness")
        space = {n: v for n, v in space.items() if n not in ("Identity", *left_out)}
        return {**space, "Posterize": (bits, False)}

    def sample(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[list[float], list[list[tuple[str, float]]]]:
        """Draws the shares of the image and its copies, and each copy's operations."""
        own, changed = rng.dirichlet([self.alpha] * 2)
        shares = changed * rng.dirichlet([self.alpha] * self.mixture_width)
        space, chains = self.space(height, width), []
        for _ in range(self.mixture_width):
            depth = self.chain_depth if self.chain_depth > 0 else rng.integers(1, 4)
            chains.append([_draw(space, None, rng, self.severity) for _ in range(int(depth))])
        return [float(own), *map(float, shares)], chains

    def apply(
        self, image: AnyImage, parameters: tuple[Sequence[float], Sequence[Iterable]]
    ) -> Image.Image:
        """Mixes the image and its changed copies, in float32, and cuts the fraction off."""
        image = in_eight_bits(lambda one: one)(as_image(image))
        (own, *shares), chains = parameters
        mixed = np.float32(own) * np.asarray(image, np.float32)
        for share, chain in zip(shares, chains, strict=True):
            mixed += np.float32(share) * np.asarray(super().apply(image, chain), np.float32)
        return as_image(np.clip(mixed, 0, 255).astype(np.uint8))


def _draw(
    space: dict[str, tuple[np.ndarray | None, bool]],
    strength: int | None,
    rng: np.random.Generator,
    strengths: int | None = None,
) -> tuple[str, float]:
    name = list(space)[rng.integers(len(space))]
    magnitudes, signed = space[name]
    if magnitudes is None:
        return name, 0.0
    if strength is None:
        strength = rng.integers(strengths or len(magnitudes))
    magnitude = float(magnitudes[strength])
    return name, -magnitude if signed and rng.integers(2) else magnitude


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
        """Returns the changed image, (height, width, channels), as `Preprocess.pixels` does."""
        for step in self.steps:
            image = step.in_chain(image, rng)
        return to_array(image)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of the result where the steps fix it."""
        sizes = [s.size for s in self.steps if isinstance(getattr(s, "size", None), tuple)]
        return sizes[-1] if sizes else None

    @property
    def _all(self) -> list[Transform]:
        return [*self.steps, *([self.erasing] if self.erasing else [])]

    def get_config(self) -> dict[str, Any]:
        """Returns all steps as plain JSON types."""
        return {"steps": [step.get_config() for step in self._all]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Augment:
        """Builds the chain that `get_config` described."""
        return cls(config["steps"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Augment) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((self.steps, self.erasing))

    def __repr__(self) -> str:
        return f"Augment({self._all})"
