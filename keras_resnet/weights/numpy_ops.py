"""The arithmetic of `reference`, in plain NumPy: arrays are NCHW and kernels OIHW, as torch's."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from keras_resnet.system.errors import InputError

_COLUMN_BYTES = 4 * 2**20  # of im2col at a time (or one row): what a core's cache holds


def relu(x: np.ndarray) -> np.ndarray:
    """In place: x must be an array that nobody else holds, such as a convolution's result."""
    return np.maximum(x, 0, out=x)


def conv2d(
    x: np.ndarray, kernel: np.ndarray, stride: int, padding: int, groups: int, where: str
) -> np.ndarray:
    """Cross-correlation, as torch computes it: NCHW by `(out, channels / groups, k, k)`.

    `padding` are zeros on each side; `where` is what an error calls this place.

    Raises:
        InputError: The image is smaller than the kernel.
    """
    (n, channels), k = x.shape[:2], kernel.shape[-1]
    height, width = (_output_size(s, k, stride, padding, where) for s in x.shape[2:])
    matrix = kernel.reshape(groups, len(kernel) // groups, -1)
    if k == 1:  # a pixel is its own column
        columns = x[:, :, ::stride, ::stride].reshape(n, groups, channels // groups, -1)
        return np.matmul(matrix, columns).reshape(n, len(kernel), height, width)

    # im2col: windows[c, :, :, n, i, j] views the k x k pixels under output pixel (i, j), and
    # one matrix product a group takes some images, or some rows of one, at a time.
    windows = sliding_window_view(_pad(x, padding, 0.0), (k, k), axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride].transpose(1, 4, 5, 0, 2, 3)
    rows = max(1, _COLUMN_BYTES // (channels * k * k * width * x.itemsize))
    images = max(1, rows // height)
    y = np.empty((n, len(kernel), height, width), x.dtype)
    for i in range(0, n, images):
        for top in range(0, height, rows):
            part = windows[..., i : i + images, top : top + rows, :]
            columns = part.reshape(groups, matrix.shape[2], -1)
            product = np.matmul(matrix, columns).reshape(len(kernel), *part.shape[3:])
            y[i : i + images, :, top : top + rows] = product.swapaxes(0, 1)
    return y


def max_pool(
    x: np.ndarray, window: int, stride: int, padding: int, where: str, around: float = -np.inf
) -> np.ndarray:
    """Maxima of windows, with minus infinity around, as torch pads."""
    height, width = (_output_size(s, window, stride, padding, where) for s in x.shape[2:])
    x = _pad(x, padding, around)
    y = np.full((*x.shape[:2], height, width), -np.inf, x.dtype)
    for i in range(window):
        for j in range(window):
            shifted = x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            np.maximum(y, shifted[:, :, :height, :width], out=y)
    return y


def average_pool(x: np.ndarray, size: int) -> np.ndarray:
    """Means of size x size windows; those at the far edges are of what there is (ceil_mode)."""
    rows, columns = (range(0, side, size) for side in x.shape[2:])
    sums = np.add.reduceat(np.add.reduceat(x, rows, axis=2), columns, axis=3)
    height, width = (np.minimum(size, n - np.arange(0, n, size)) for n in x.shape[2:])
    return sums / np.multiply.outer(height, width).astype(x.dtype)


def adaptive_average_pool(x: np.ndarray, size: int) -> np.ndarray:
    """Means over torch's bins: from floor(i * in / out) to ceil((i + 1) * in / out)."""

    def bins(length: int) -> list[slice]:
        return [slice(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]

    rows = [[x[:, :, r, c].mean(axis=(2, 3)) for c in bins(x.shape[3])] for r in bins(x.shape[2])]
    return np.moveaxis(np.asarray(rows), (0, 1), (2, 3))


def _pad(x: np.ndarray, padding: int, value: float) -> np.ndarray:
    sides = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    return np.pad(x, sides, constant_values=value) if padding else x


def _output_size(size: int, window: int, stride: int, padding: int, where: str) -> int:
    output = (size + 2 * padding - window) // stride + 1
    if output < 1:
        raise InputError(
            f"The images are too small: at {where} {size} pixels are left on a side and the "
            f"window takes {window - 2 * padding}. Feed larger ones."
        )
    return output
