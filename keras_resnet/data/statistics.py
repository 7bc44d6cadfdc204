"""Mean and standard deviation of a dataset's pixels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from keras_resnet.data.dataset import ImageDataset
from keras_resnet.system.errors import DataError

_AT_ONCE = 4096


def dataset_statistics(dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel over all pixels of a dataset.

    Each pixel of each image counts once, as the dataset feeds them (resized, augmented), before
    normalisation; the sums are whole numbers, so the result is exact to float64. Averaging the
    means of batches would weigh a smaller last batch wrongly, and averaging their standard
    deviations is wrong in itself.

    Returns:
        Two float64 arrays, one value a channel, for pixels in 0..1.
    """
    channels = dataset.preprocess.channels
    epoch, order = dataset._epoch_order()

    def histogram(position: int) -> np.ndarray | None:
        read = dataset._one(epoch, order, position)
        if read is None:
            return None
        planes = read[0].reshape(-1, channels).T
        return np.stack([np.bincount(plane, minlength=256) for plane in planes])

    # Counts of the 256 values of each channel hold all that is needed, in integers.
    counts = np.zeros((channels, 256), np.int64)
    with ThreadPoolExecutor(dataset.threads or 1) as pool:
        for first in range(0, len(order), _AT_ONCE):  # the pool notes all that it is given
            for one in pool.map(histogram, range(len(order))[first : first + _AT_ONCE]):
                counts += 0 if one is None else one
    total = counts.sum(1)
    if not total.all():
        raise DataError(f"None of the {dataset.num_samples} images can be read.")
    values = np.arange(256)
    mean = (counts @ values) / total / 255
    variance = (counts @ values**2) / total / 255**2 - mean**2
    return mean, np.sqrt(np.maximum(variance, 0))


def measured_on(training: ImageDataset, workers: int | None) -> dict[str, np.ndarray]:
    """Mean and deviation of the training images as they are, not augmented."""
    plain = ImageDataset(
        training.file_paths, None, preprocess=training.preprocess, shuffle=False, workers=workers
    )
    mean, std = dataset_statistics(plain)
    return {"mean": mean, "std": np.maximum(std, 1e-3)}
