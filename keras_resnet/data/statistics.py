"""Mean and standard deviation of a dataset's pixels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from keras_resnet.data.dataset import ImageDataset
from keras_resnet.system.errors import DataError

_AT_ONCE = 4096
_VALUES = np.arange(256)


def dataset_statistics(dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel over all pixels of a dataset.

    Each pixel of each image counts once, as the dataset feeds them (resized, augmented), before
    normalisation; sums of 8 bits are whole numbers, so the result is exact to float64. Averaging
    the means of batches would weigh a smaller last batch wrongly, and averaging their standard
    deviations is wrong in itself.

    Returns:
        Two float64 arrays, one value a channel, for pixels in 0..1.
    """
    channels = dataset.preprocess.channels
    epoch, order = dataset._epoch_order()

    def sums(position: int) -> np.ndarray:
        """The number of values of each channel, their sum and that of their squares."""
        read = dataset._one(epoch, order, position)
        if read is None:
            return np.zeros((3, channels), np.int64)
        planes = read[0].reshape(-1, channels).T
        if planes.dtype != np.uint8:  # of 16 bits
            wide = planes.astype(np.float64)
            return np.stack([np.full(channels, wide.shape[1]), wide.sum(1), (wide**2).sum(1)])
        counts = np.stack([np.bincount(plane, minlength=256) for plane in planes])
        return np.stack([counts.sum(1), counts @ _VALUES, counts @ _VALUES**2])  # whole numbers

    with ThreadPoolExecutor(dataset.threads or 1) as pool:
        total = np.zeros((3, channels))
        for start in range(0, len(order), _AT_ONCE):  # the pool notes all that it is given
            total = total + sum(pool.map(sums, range(len(order))[start : start + _AT_ONCE]))
    total, first, second = total
    if not total.all():
        raise DataError(f"None of the {dataset.num_samples} images can be read.")
    mean = first / total / 255
    variance = second / total / 255**2 - mean**2
    return mean, np.sqrt(np.maximum(variance, 0))


def measured_on(training: ImageDataset, workers: int | None) -> dict[str, np.ndarray]:
    """Mean and deviation of the training images as they are, not augmented."""
    plain = ImageDataset(
        training.file_paths, None, preprocess=training.preprocess, shuffle=False, workers=workers
    )
    mean, std = dataset_statistics(plain)
    return {"mean": mean, "std": np.maximum(std, 1e-3)}
