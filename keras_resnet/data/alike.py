"""Which images are alike, by a few bits of each."""

from __future__ import annotations

import numpy as np
from PIL import Image


def difference_hash(image: Image.Image) -> np.ndarray:
    """128 bits: whether brightness rises to the right and downwards, on a grid of 9 x 9.

    The gradient hash of Krawetz ("Kind of Like That", hackerfactor.com, 2013), in both directions.
    """
    grid = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), np.int16)
    right = grid[:8, 1:] > grid[:8, :-1]
    down = grid[1:, :8] > grid[:-1, :8]
    return np.concatenate([right.ravel(), down.ravel()])


def near_pairs(bits: np.ndarray, threshold: int) -> list[tuple[int, int, int]]:
    """All pairs of rows that differ in at most `threshold` bits.

    Cut into threshold + 1 bands, two such rows agree in one band at least (pigeonhole), so only
    rows that share a band are compared: no pair is missed, and few are compared in vain.

    Args:
        bits: bool, (rows, bits).
        threshold: at least 0, less than the number of bits.

    Returns:
        (row, row, distance), sorted.
    """
    found: dict[tuple[int, int], int] = {}
    packed = np.packbits(bits, axis=1)
    ones = np.array([bin(i).count("1") for i in range(256)], np.uint8)
    for band in np.array_split(np.arange(bits.shape[1]), threshold + 1):
        keys = np.packbits(bits[:, band], axis=1)
        _, group = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        starts = np.flatnonzero(np.diff(group.ravel()[order], prepend=-1))
        for members in np.split(order, starts[1:]):
            for place, row in enumerate(members[:-1]):
                rest = members[place + 1 :]
                distance = ones[packed[rest] ^ packed[row]].sum(1, dtype=np.int64)
                for near in np.flatnonzero(distance <= threshold):
                    pair = (int(row), int(rest[near]))
                    found[min(pair), max(pair)] = int(distance[near])
    return sorted((a, b, distance) for (a, b), distance in found.items())
