"""A row of the table made into a graph: stem, stages of blocks, head."""

from __future__ import annotations

import keras

from keras_resnet.layers.pool import MaxPooling2D
from keras_resnet.models.blocks import (
    channel_axis,
    conv,
    conv_block,
    dense,
    identity_block,
    norm,
    preactivated_block,
)
from keras_resnet.variants import ResNetSpec


def stem(x, spec: ResNetSpec):
    """Image -> features: 7x7 or three 3x3 and max pooling, or one 3x3 for 32x32 images."""
    first, second = ("conv1", "bn1") if spec.layout == "torchvision" else ("conv1_0", "conv1_1")
    kernel, strides = (7, 2) if spec.stem == "imagenet" else (3, 1)
    options = {"use_bias": spec.use_bias, "init": spec.init}
    for i, filters in enumerate(spec.stem_filters):
        # timm's names: conv1 is a Sequential, its last batch norm is bn1.
        x = conv(x, filters, 3, strides=1 if i else 2, name=f"conv1_{3 * i}", **options)
        x = norm(x, activation="relu", name=f"conv1_{3 * i + 1}", kind=spec.norm)
        first = "conv1_6"
    x = conv(x, spec.widths[0], kernel, strides=strides, name=first, **options)
    if not spec.preactivation:
        x = norm(x, activation="relu", name=second, kind=spec.norm)
    if spec.of_keras:
        x = keras.layers.ZeroPadding2D(1, name="maxpool_pad")(x)
    if spec.stem != "cifar":
        x = MaxPooling2D(3, strides=2, pad=0 if spec.of_keras else 1, name="maxpool")(x)
    return x


def features(x, spec: ResNetSpec):
    """Image -> the last feature map."""
    x = stages(stem(x, spec), spec)
    return norm(x, activation="relu", name="bn", kind=spec.norm) if spec.preactivation else x


def stages(x, spec: ResNetSpec):
    """The residual stages: one conv_block where the shape changes, then identity_blocks."""
    for stage, depth in enumerate(spec.blocks):
        filters = spec.filters(stage)
        strides = (1, 1) if stage == 0 else (2, 2)
        same_shape = strides == (1, 1) and x.shape[channel_axis()] == filters[-1]
        name = f"{spec.stage_name}{stage + 1}"
        if spec.preactivation:
            for block in range(depth):
                x = preactivated_block(
                    x, 3, filters, name, block, spec.strides(stage, block),
                    project=block == 0 and not same_shape, groups=spec.groups,
                    use_bias=spec.use_bias, norm_kind=spec.norm, init=spec.init,
                )  # fmt: skip
            continue
        shared = ("groups", "use_bias", "relu_before_add", "squeeze", "layout", "init")
        options = {"norm_kind": spec.norm, **{name: getattr(spec, name) for name in shared}}
        for block in range(depth):
            if block == 0 and (spec.project_first or not same_shape):
                # A tutorial's layout wraps the projecting block once more: layer1.0.0.longway.
                wrapped = f"{name}_0_0" if spec.layout == "sequential" else None
                x = conv_block(
                    x, 3, filters, name, block, strides,
                    stride_on=spec.stride_on, shortcut=spec.shortcut, name=wrapped, **options,
                )  # fmt: skip
            else:
                x = identity_block(x, 3, filters, name, block, **options)
    return x


def head(x, spec: ResNetSpec, num_classes: int, dropout: float, activation: str | None):
    """Features -> logits: the mean over the image, dropout, one fully connected layer."""
    x = keras.layers.GlobalAveragePooling2D(name="avgpool")(x)
    if dropout:
        x = keras.layers.Dropout(dropout, name="dropout")(x)
    init = "fan_in" if spec.init == "fan_in" else "torch"
    return dense(x, num_classes, spec.head, activation, init)
