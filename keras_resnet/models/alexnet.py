"""The three AlexNets: torchvision's, the paper's, and one for 32x32 images."""

from __future__ import annotations

import keras

from keras_resnet.layers.pool import MaxPooling2D
from keras_resnet.models.blocks import channel_axis, conv, dense
from keras_resnet.system.errors import InputError
from keras_resnet.variants import AlexNetSpec


def features(x, spec: AlexNetSpec):
    """The convolutions, each with its ReLU, and the max poolings."""
    for i, row in enumerate(spec.convs, start=1):
        x = conv(
            x, row.filters, row.kernel_size, strides=row.strides, pad=row.padding, use_bias=True,
            init="torch", name=row.name,
        )  # fmt: skip
        x = keras.layers.ReLU(name=f"relu{i}")(x)
        if row.pool:
            x = MaxPooling2D(row.pool[0], strides=row.pool[1], name=f"maxpool{i}")(x)
    return x


def head(x, spec: AlexNetSpec, num_classes: int, dropout: float, activation: str | None):
    """Features -> logits: three fully connected layers with dropout around the hidden ones."""
    if not spec.adaptive and None in x.shape[1:]:
        raise InputError(
            f"{spec.name} flattens its feature map, so its input needs a fixed size. "
            f"Received one that gives a map of {x.shape[1:]}."
        )
    if spec.adaptive:
        x = keras.layers.AdaptiveAveragePooling2D((6, 6), name="avgpool")(x)
    if channel_axis() == 3:
        # torch flattens channels first, and the first Linear's columns are in that order.
        x = keras.layers.Permute((3, 1, 2), name="channels_first")(x)
    # Not Flatten: under channels_first Keras' moves the channels last before it flattens.
    x = keras.layers.Reshape((-1,), name="flatten")(x)
    for i, name in enumerate(spec.dense[:-1], start=1):
        if spec.dropout_before:
            x = keras.layers.Dropout(dropout, name=f"dropout{i}")(x)
        x = dense(x, 4096, name, "relu")
        if not spec.dropout_before:
            x = keras.layers.Dropout(dropout, name=f"dropout{i}")(x)
    return dense(x, num_classes, spec.dense[-1], activation)
