"""The backend room: the only place that knows how a backend runs a convolution or a batch norm.

Each class keeps the name of the stock Keras layer it extends, because Keras writes class names
into weight files: a file made with these layers loads into a model of stock ones and back.

Three things make them fast. Padding belongs to the convolution, so that no padded copy is made.
Batch norm, shortcut and ReLU are one layer, hence one fused kernel and in-place operations on what
that kernel made. On torch a call goes straight to `call` where Keras' own `__call__` would have
nothing to do (it costs about as much as fifty small tensor operations).
"""

import keras  # noqa: F401 (first: see _registration.py)

from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization, Normalize
from keras_resnet.layers.pool import MaxPooling2D, ZeroPaddedShortcut

__all__ = ["BatchNormalization", "Conv2D", "MaxPooling2D", "Normalize", "ZeroPaddedShortcut"]
