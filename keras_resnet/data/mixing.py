"""Mixup, cutmix and smoothed labels: what is done to whole batches, as torchvision does it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_resnet.system.errors import InputError


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
    """
    return labels * np.float32(1.0 - smoothing) + np.float32(
        smoothing / (2 if each else labels.shape[-1])
    )
