"""A folder of images in, a trained model out."""

import keras  # noqa: F401 (first: see _registration.py)

from keras_resnet.training import ema, optimizers, schedules

__all__ = ["ema", "optimizers", "schedules"]
