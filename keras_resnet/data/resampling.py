"""Pillow's bilinear resize of arrays, compiled by numba: the same pixels in a third of the time.

Pillow's arithmetic (src/libImaging/Resample.c): weights of 22 bits, first along the rows, rounded
to 8 bits, then along the columns. Here both run over neighbouring bytes, which a processor does
eight at a time; for the rows, blocks of the image are turned for that. Imported by
`preprocess.compiled`, which knows when it pays; importing compiles, once a machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np
from numba import types
from PIL import Image

_BITS = 22  # Resample.c: PRECISION_BITS
_ROWS = 32  # that are turned at a time
_ANY = types.Array(types.uint8, 3, "A", readonly=True)
_FLAT = types.uint8[:, ::1]
_START, _WEIGHTS = types.int64[::1], types.int32[:, ::1]


def _jit(signature: object) -> Callable:
    """Compiles what needs no lock of Python's, and keeps it on the disk where that can be."""

    def jit(function: Callable) -> Callable:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no folder to keep it in
            return numba.njit(signature, nogil=True)(function)

    return jit


@_jit(types.Tuple((_START, _WEIGHTS))(types.int64, types.int64, types.int64, types.int64))
def _weights(before, after, first, count):
    """For `count` of the values after, from `first`: where each begins to read, and its weights."""
    scale = before / after
    reach = max(scale, 1.0)
    most = min(2 * math.ceil(reach) + 1, before)
    start, weights = np.empty(count, np.int64), np.zeros((count, most), np.int32)
    shares = np.empty(most)
    for i in range(count):
        centre = (first + i + 0.5) * scale
        low = max(int(centre - reach + 0.5), 0)
        number = min(int(centre + reach + 0.5), before) - low
        total = 0.0
        for x in range(number):
            distance = abs((x + low - centre + 0.5) * (1.0 / reach))
            shares[x] = 1.0 - distance if distance < 1.0 else 0.0
            total += shares[x]
        left = max(low + most - before, 0)  # all begin where `most` values follow
        start[i] = low - left
        for x in range(number):
            share = shares[x] / total if total != 0.0 else shares[x]
            weights[i, x + left] = int(0.5 + share * (1 << _BITS))
    return start, weights


@_jit(types.void(_FLAT, types.int64, types.int64, _WEIGHTS, types.int32[::1], types.uint8[::1]))
def _sum(lines, first, row, weights, sums, out):
    """Weighs some of the lines into one."""
    sums[:] = 1 << (_BITS - 1)
    for t in range(weights.shape[1]):
        weight, line = weights[row, t], lines[first + t]
        if weight:
            for i in range(sums.shape[0]):
                sums[i] += np.int32(line[i]) * weight
    for i in range(sums.shape[0]):
        out[i] = sums[i] >> _BITS


@_jit(types.void(_ANY, _FLAT))
def _turn(rows, columns):
    """(n, width, 3) to (width, 3n)."""
    for y in range(rows.shape[0]):
        row, at = rows[y], np.uintp(3 * y)  # numba looks whether a signed index counts from the end
        for x in range(np.uintp(rows.shape[1])):
            for c in range(np.uintp(3)):
                columns[x, at + c] = row[x, c]


@_jit(types.void(_FLAT, _FLAT))
def _turn_back(columns, rows):
    """(width, 3n) to (n, 3 width)."""
    for y in range(rows.shape[0]):
        row, at = rows[y], np.uintp(3 * y)
        for x in range(np.uintp(columns.shape[0])):
            for c in range(np.uintp(3)):
                row[np.uintp(3) * x + c] = columns[x, at + c]


@_jit(types.void(_ANY, types.int64, types.int64, types.int64, types.int64, _FLAT))
def _resize(pixels, height, width, top, left, out):
    rows, columns = out.shape[0], out.shape[1] // 3
    start_y, weights_y = _weights(pixels.shape[0], height, top, rows)
    start_x, weights_x = _weights(pixels.shape[1], width, left, columns)
    first, last = start_y[0], start_y[-1] + weights_y.shape[1]
    narrow = np.empty((last - first, 3 * columns), np.uint8)
    turned = np.empty((pixels.shape[1], 3 * _ROWS), np.uint8)
    summed = np.empty((columns, 3 * _ROWS), np.uint8)
    sums = np.empty(3 * _ROWS, np.int32)
    for y in range(0, last - first, _ROWS):
        several = narrow[y : y + _ROWS]
        _turn(pixels[first + y : first + y + several.shape[0]], turned)
        for x in range(columns):
            _sum(turned, start_x[x], x, weights_x, sums, summed[x])
        _turn_back(summed, several)
    sums = np.empty(3 * columns, np.int32)
    for y in range(rows):
        _sum(narrow, start_y[y] - first, y, weights_y, sums, out[y])


@_jit(types.void(_ANY, types.uint8[:, :, ::1]))
def _mirror(pixels, out):
    width = np.uintp(out.shape[1])
    for y in range(out.shape[0]):
        row, to = pixels[y], out[y]
        for x in range(width):
            for c in range(np.uintp(3)):
                to[x, c] = row[width - np.uintp(1) - x, c]


def resize(
    pixels: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Resizes uint8 (height, width, 3) to a (height, width), or makes a window of the result alone.

    The window is (top, left, height, width); the pixels may be a part of an image.
    """
    top, left, height, width = window or (0, 0, *size)
    out = np.empty((height, 3 * width), np.uint8)
    _resize(pixels, *size, top, left, out)
    return out.reshape(height, width, 3)


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3), left and right exchanged."""
    out = np.empty(pixels.shape, np.uint8)
    _mirror(pixels, out)
    return out


def agrees_with_pillow() -> bool:
    """Whether all this gives Pillow's pixels: another version of either might not."""
    rng = np.random.default_rng(0)
    for before, after in (((37, 61), (24, 24)), ((19, 9), (24, 31)), ((200, 3), (7, 24))):
        pixels = rng.integers(0, 256, (*before, 3), np.uint8)
        image = Image.fromarray(pixels).resize(after[::-1], Image.Resampling.BILINEAR)
        if not np.array_equal(resize(pixels, after), image):
            return False
    return True
