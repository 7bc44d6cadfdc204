"""The order of an epoch: positions of its images, by a generator of random numbers alone."""

from __future__ import annotations

import numpy as np

from keras_resnet.data.folders import rarest


def epoch_order(
    count: int,
    labels: np.ndarray | None,
    rng: np.random.Generator,
    *,
    shuffle: bool = True,
    sampler: str | None = None,
    repeats: int = 1,
) -> np.ndarray:
    """The positions of an epoch's images, in the order in which they are fed: see `Recipe`."""
    positions = rng.permutation(count) if shuffle else np.arange(count)
    if sampler is not None and labels is not None:
        positions = balanced_order(labels, rng)
    return repeated_augmentation(positions, repeats) if repeats > 1 else positions


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of an epoch of unchanged length, in which each class comes equally often.

    No image comes again before all others of its class have come as often: of a large class an
    epoch has a part, of a small one copies.
    """
    labels = rarest(labels)
    present = rng.permutation(np.unique(labels))
    share, rest = divmod(len(labels), len(present))
    drawn: list[np.ndarray] = []
    for place, label in enumerate(present):
        members, wanted = np.flatnonzero(labels == label), share + (place < rest)
        rounds = [rng.permutation(members) for _ in range(-(-wanted // len(members)))]
        drawn.append(np.concatenate([members[:0], *rounds])[:wanted])
    return rng.permutation(np.concatenate(drawn))


def repeated_augmentation(order: np.ndarray, repeats: int = 3) -> np.ndarray:
    """The positions of an epoch with repeated augmentation (Hoffer et al. 2019, arXiv 1901.09335).

    As torchvision's references/classification/sampler.py `RASampler` on one device: every position
    of a shuffled epoch `repeats` times in a row, cut to its length rounded down to a multiple of
    256. Below 256 positions nothing is rounded, so that the epoch is not empty.
    """
    return np.repeat(order, repeats)[: len(order) // 256 * 256 or len(order)]
