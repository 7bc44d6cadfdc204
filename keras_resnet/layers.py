"""The backend room: the only place that knows how a backend runs a convolution or a batch norm.

Each class keeps the name of the stock Keras layer it extends, because Keras writes class names
into weight files: a file made with these layers loads into a model of stock ones and back.
"""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_resnet.specs import conv_output_size

_BACKEND = keras.backend.backend()
if _BACKEND == "torch":
    import torch
    import torch.nn.functional as F


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _spatial_axes(data_format: str) -> tuple[int, int]:
    return (1, 2) if data_format == "channels_last" else (2, 3)


def _paddings(data_format: str, pad: tuple[int, int]) -> list[tuple[int, int]]:
    paddings = [(0, 0)] * 4
    for axis, size in zip(_spatial_axes(data_format), pad, strict=True):
        paddings[axis] = (size, size)
    return paddings


def _value(variable):
    """The backend's own tensor behind a Keras variable (or what already is a tensor)."""
    return getattr(variable, "value", variable)


@keras.saving.register_keras_serializable("keras_resnet")
class Conv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` that owns its symmetric zero padding.

    torch pads both sides alike; Keras' `padding="same"` pads the far side more at stride 2, so
    that outputs differ. Input and output are `(batch, height, width, channels)` or, under
    `channels_first`, `(batch, channels, height, width)`.

    Args:
        filters: Output channels.
        kernel_size: Height and width of the kernel.
        pad: Zeros added on each side: one number or `(vertical, horizontal)`.
        **kwargs: As `keras.layers.Conv2D`'s; `pad` wants `padding="valid"`, the default.

    Example:
        >>> Conv2D(64, 7, strides=2, pad=3).compute_output_shape((None, 224, 224, 3))
        (None, 112, 112, 64)
    """

    def __init__(self, filters, kernel_size, *args, pad: int | tuple[int, int] = 0, **kwargs):
        super().__init__(filters, kernel_size, *args, **kwargs)
        self.pad = _pair(pad)
        if any(self.pad) and self.padding != "valid":
            raise ValueError(f"pad={pad} needs padding='valid'. Received: {self.padding!r}.")

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        for axis, size in zip(_spatial_axes(self.data_format), self.pad, strict=True):
            if shape[axis] is not None:
                shape[axis] += 2 * size
        return super().compute_output_shape(tuple(shape))

    def convolution_op(self, inputs, kernel):
        if _BACKEND == "torch" and self.padding == "valid":
            x, kernel = inputs, _value(kernel).permute(3, 2, 0, 1)
            last = self.data_format == "channels_last"
            # Views, not copies: NHWC memory under an NCHW name is torch's channels_last.
            x = x.permute(0, 3, 1, 2) if last else x
            y = F.conv2d(x, kernel, None, self.strides, self.pad, self.dilation_rate, self.groups)
            return y.permute(0, 2, 3, 1) if last else y
        if not any(self.pad):
            return super().convolution_op(inputs, kernel)
        same = tuple((k - 1) * d / 2 for k, d in zip(self.kernel_size, self.dilation_rate,
                                                     strict=True))  # fmt: skip
        if self.strides == (1, 1) and self.pad == same:
            # At stride 1 "same" is symmetric, and saves a pass over memory.
            return ops.conv(
                inputs,
                kernel,
                strides=1,
                padding="same",
                dilation_rate=self.dilation_rate,
                data_format=self.data_format,
            )
        return super().convolution_op(
            ops.pad(inputs, _paddings(self.data_format, self.pad)), kernel
        )

    def get_config(self):
        return {**super().get_config(), "pad": self.pad}


@keras.saving.register_keras_serializable("keras_resnet")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch norm with torch's defaults and variance rule, an optional shortcut and activation.

    Called on `x`, or on `[x, shortcut]`, it gives `activation(normalised(x) + shortcut)`: the end
    of a residual block in one layer. All shapes are equal, rank 4.

    Args:
        axis: The channels' axis.
        momentum: Share of the old running statistics kept at a step: torch's `momentum=0.1` is
            Keras' 0.9.
        epsilon: Added to the variance; torch's 1e-5.
        activation: Applied last, such as `"relu"`.
        unbiased_variance: Feed the running variance with n/(n-1) times the batch's variance,
            n = batch * height * width, as torch does; `False` is Keras' rule.
        **kwargs: As `keras.layers.BatchNormalization`'s.

    Example:
        >>> layer = BatchNormalization(activation="relu")
        >>> layer.compute_output_shape([(None, 8, 8, 4), (None, 8, 8, 4)])
        (None, 8, 8, 4)
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        *,
        activation=None,
        unbiased_variance: bool = True,
        **kwargs,
    ):
        super().__init__(axis=axis, momentum=momentum, epsilon=epsilon, **kwargs)
        self.activation = keras.activations.get(activation)
        self.unbiased_variance = unbiased_variance
        if self.renorm:
            raise ValueError("renorm=True is not supported; use keras.layers.BatchNormalization.")

    def build(self, input_shape):
        with_shortcut = isinstance(input_shape[0], (list, tuple))
        super().build(input_shape[0] if with_shortcut else input_shape)
        if with_shortcut:
            self.input_spec = None

    def compute_output_shape(self, input_shape):
        with_shortcut = isinstance(input_shape[0], (list, tuple))
        return tuple(input_shape[0] if with_shortcut else input_shape)

    def call(self, inputs, training=None, mask=None):
        with_shortcut = isinstance(inputs, (list, tuple))
        x, shortcut = inputs if with_shortcut else (inputs, None)
        y = self._normalized(x, bool(training) and self.trainable)
        if shortcut is not None:
            y = ops.add(y, shortcut)
        return y if self.activation is None else self.activation(y)

    def _normalized(self, x, training: bool):
        # Statistics in float32 at least: half precision overflows in the variance.
        dtype = keras.backend.result_type(keras.backend.standardize_dtype(x.dtype), "float32")
        x = ops.cast(x, dtype)
        if training:
            mean, variance = ops.moments(
                x, axes=self._reduction_axes, synchronized=self.synchronized
            )
            self._update_statistics(x, mean, variance)
        else:
            mean = ops.cast(self.moving_mean, dtype)
            variance = ops.cast(self.moving_variance, dtype)
        y = ops.batch_normalization(
            x,
            mean,
            variance,
            axis=self.axis,
            offset=None if self.beta is None else ops.cast(self.beta, dtype),
            scale=None if self.gamma is None else ops.cast(self.gamma, dtype),
            epsilon=self.epsilon,
        )
        return ops.cast(y, self.compute_dtype)

    def _update_statistics(self, x, mean, variance):
        if self.unbiased_variance:
            shape = ops.shape(x)
            count = ops.cast(math.prod(shape[a] for a in self._reduction_axes), variance.dtype)
            variance = variance * (count / ops.maximum(count - 1, 1))
        keep = self.momentum
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = ops.cast(moving, batch.dtype)
            moving.assign(old * keep + batch * (1.0 - keep))

    def get_config(self):
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "unbiased_variance": self.unbiased_variance,
        }


@keras.saving.register_keras_serializable("keras_resnet")
class MaxPooling2D(keras.layers.MaxPooling2D):
    """`keras.layers.MaxPooling2D` that owns its symmetric padding, by minus infinity as torch's.

    Args:
        pool_size: Height and width of the window.
        strides: Defaults to the window's size.
        pad: Rows and columns added on each side: one number or `(vertical, horizontal)`.
        **kwargs: As `keras.layers.MaxPooling2D`'s; `pad` wants `padding="valid"`, the default.

    Example:
        >>> MaxPooling2D(3, strides=2, pad=1).compute_output_shape((None, 112, 112, 64))
        (None, 56, 56, 64)
    """

    def __init__(self, pool_size=2, strides=None, *args, pad: int | tuple[int, int] = 0, **kwargs):
        super().__init__(pool_size, strides, *args, **kwargs)
        self.pad = _pair(pad)
        if any(self.pad) and self.padding != "valid":
            raise ValueError(f"pad={pad} needs padding='valid'. Received: {self.padding!r}.")

    def compute_output_shape(self, input_shape):
        if self.padding != "valid":
            return super().compute_output_shape(input_shape)
        shape = list(input_shape)
        for i, axis in enumerate(_spatial_axes(self.data_format)):
            if shape[axis] is not None:
                shape[axis] = conv_output_size(
                    shape[axis], self.pool_size[i], self.strides[i], self.pad[i]
                )
        if self.data_format == "channels_last":
            return (shape[0], shape[1], shape[2], shape[3])
        return tuple(shape)

    def call(self, inputs):
        if _BACKEND == "torch" and self.padding == "valid":
            last = self.data_format == "channels_last"
            x = inputs.permute(0, 3, 1, 2) if last else inputs
            y = F.max_pool2d(x, self.pool_size, self.strides, self.pad)
            return y.permute(0, 2, 3, 1) if last else y
        if any(self.pad):
            lowest = -math.inf
            inputs = ops.pad(
                inputs, _paddings(self.data_format, self.pad), constant_values=lowest
            )
        return super().call(inputs)

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

    Example:
        >>> ZeroPaddedShortcut(32, strides=2).compute_output_shape((None, 32, 32, 16))
        (None, 16, 16, 32)
    """

    def __init__(self, filters, strides=1, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.filters = int(filters)
        self.strides = _pair(strides)
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
        for axis, stride in zip(_spatial_axes(self.data_format), self.strides, strict=True):
            if shape[axis] is not None:
                shape[axis] = conv_output_size(shape[axis], 1, stride)
        return tuple(shape)

    def call(self, inputs):
        (a, b), last = self.strides, self.data_format == "channels_last"
        x = inputs[:, ::a, ::b, :] if last else inputs[:, :, ::a, ::b]
        missing = self.filters - inputs.shape[self._channel_axis]
        paddings = [(0, 0)] * 4
        paddings[self._channel_axis] = (missing // 2, missing - missing // 2)
        return ops.pad(x, paddings)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "strides": self.strides,
            "data_format": self.data_format,
        }


@keras.saving.register_keras_serializable("keras_resnet")
class Normalize(keras.layers.Layer):
    """Turns pixel values 0..255 into `(x / 255 - mean) / std`, channel by channel.

    Args:
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
        data_format: `"channels_last"` or `"channels_first"`; Keras' global setting by default.

    Example:
        >>> layer = Normalize(mean=(0.5,), std=(0.5,))
        >>> float(layer(ops.ones((1, 1, 1, 1)) * 255)[0, 0, 0, 0])
        1.0
    """

    def __init__(self, mean, std, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.mean = [float(v) for v in mean]
        self.std = [float(v) for v in std]
        self.data_format = data_format or keras.config.image_data_format()

    def build(self, input_shape):
        channels = input_shape[3 if self.data_format == "channels_last" else 1]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"mean and std need one value a channel: {channels} channels, "
                f"mean={self.mean}, std={self.std}."
            )

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def call(self, inputs):
        shape = (1, 1, 1, -1) if self.data_format == "channels_last" else (1, -1, 1, 1)
        # In float32 whatever the policy: bfloat16 has 8 bits, a pixel needs them all.
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        mean = ops.reshape(ops.convert_to_tensor(self.mean, dtype), shape)
        std = ops.reshape(ops.convert_to_tensor(self.std, dtype), shape)
        return ops.cast((ops.cast(inputs, dtype) / 255 - mean) / std, self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "mean": self.mean,
            "std": self.std,
            "data_format": self.data_format,
        }
