"""The max pooling that pads for itself, and the shortcut of He et al.'s CIFAR networks."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_resnet.layers.conv import paddings, pair, spatial_axes
from keras_resnet.layers.torch_call import BACKEND, DirectCall
from keras_resnet.variants import conv_output_size

if BACKEND == "torch":
    import torch.nn.functional as F


@keras.saving.register_keras_serializable("keras_resnet")
class MaxPooling2D(DirectCall, keras.layers.MaxPooling2D):
    """`keras.layers.MaxPooling2D` that owns its symmetric padding, by minus infinity as torch's.

    Args:
        pool_size: Height and width of the window.
        strides: Defaults to the window's size.
        pad: Rows and columns added on each side, at most half the window: one number or
            `(vertical, horizontal)`.
        **kwargs: As `keras.layers.MaxPooling2D`'s; `pad` wants `padding="valid"`, the default.

    Examples:
        >>> MaxPooling2D(3, strides=2, pad=1).compute_output_shape((None, 112, 112, 64))
        (None, 56, 56, 64)
    """

    def __init__(self, pool_size=2, strides=None, *args, pad: int | tuple[int, int] = 0, **kwargs):
        super().__init__(pool_size, strides, *args, **kwargs)
        self.pad = pair(pad)
        if any(self.pad) and self.padding != "valid":
            raise ValueError(f"pad={pad} needs padding='valid'. Received: {self.padding!r}.")
        if any(2 * p > size for p, size in zip(self.pad, self.pool_size, strict=True)):
            # A window all of padding would give minus infinity.
            raise ValueError(
                f"pad must be at most half of pool_size={self.pool_size}. Received: {pad}."
            )

    def compute_output_shape(self, input_shape):
        if self.padding != "valid":
            return super().compute_output_shape(input_shape)
        shape = list(input_shape)
        for i, axis in enumerate(spatial_axes(self.data_format)):
            if shape[axis] is not None:
                shape[axis] = conv_output_size(
                    shape[axis], self.pool_size[i], self.strides[i], self.pad[i]
                )
        return tuple(shape)

    def call(self, inputs):
        if BACKEND == "torch" and self.padding == "valid":
            if self.data_format == "channels_last":
                return self.torch_nchw(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.torch_nchw(inputs)
        if any(self.pad):
            lowest = -math.inf
            inputs = ops.pad(inputs, paddings(self.data_format, self.pad), constant_values=lowest)
        return super().call(inputs)

    def torch_nchw(self, x):
        """What `call` does on torch, on maps in torch's order whatever the data format."""
        return F.max_pool2d(x, self.pool_size, self.strides, self.pad)

    def get_config(self):
        return {**super().get_config(), "pad": self.pad}


@keras.saving.register_keras_serializable("keras_resnet")
class ZeroPaddedShortcut(keras.layers.Layer):
    """The parameter-free shortcut of He et al. 2015, option A.

    Takes every `strides`-th row and column and adds zero channels, half on each side.

    Args:
        filters: Output channels, at least as many as the input has.
        strides: Stride in both directions.
        data_format: `"channels_last"` or `"channels_first"`; Keras' global setting by default.

    Examples:
        >>> ZeroPaddedShortcut(32, strides=2).compute_output_shape((None, 32, 32, 16))
        (None, 16, 16, 32)
    """

    def __init__(self, filters, strides=1, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.filters = int(filters)
        self.strides = pair(strides)
        self.data_format = data_format or keras.config.image_data_format()

    @property
    def _channel_axis(self) -> int:
        return 3 if self.data_format == "channels_last" else 1

    def build(self, input_shape):
        if input_shape[self._channel_axis] > self.filters:
            raise ValueError(
                f"A shortcut cannot drop channels: {input_shape[self._channel_axis]} in, "
                f"{self.filters} out."
            )

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        shape[self._channel_axis] = self.filters
        for axis, stride in zip(spatial_axes(self.data_format), self.strides, strict=True):
            if shape[axis] is not None:
                shape[axis] = conv_output_size(shape[axis], 1, stride)
        return tuple(shape)

    def call(self, inputs):
        return self._shortened(inputs, self._channel_axis)

    def torch_nchw(self, x):
        """What `call` does, on maps in torch's order whatever the data format."""
        return self._shortened(x, 1)

    def _shortened(self, x, axis: int):
        (a, b), missing, sides = self.strides, self.filters - x.shape[axis], [(0, 0)] * 4
        sides[axis] = (missing // 2, missing - missing // 2)
        return ops.pad(x[:, ::a, ::b] if axis == 3 else x[:, :, ::a, ::b], sides)

    def get_config(self):
        own = {name: getattr(self, name) for name in ("filters", "strides", "data_format")}
        return {**super().get_config(), **own}
