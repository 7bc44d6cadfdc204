"""The backend room: the only place that knows how a backend runs a convolution or a batch norm.

Each class keeps the name of the stock Keras layer it extends, because Keras writes class names
into weight files: a file made with these layers loads into a model of stock ones and back.

Three things make them fast. Padding belongs to the convolution, so that no padded copy is made.
Batch norm, shortcut and ReLU are one layer, hence one fused kernel and in-place operations on what
that kernel made. On torch a call goes straight to `call` where Keras' own `__call__` would have
nothing to do (it costs about as much as fifty small tensor operations), and kernels lie in memory
as torch's channels-last convolution wants them.
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

    _TORCH_DTYPES = {
        name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")
    }
elif _BACKEND == "tensorflow":
    import tensorflow as tf
_LINEAR, _RELU = keras.activations.linear, keras.activations.relu


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _spatial_axes(data_format: str) -> tuple[int, int]:
    return (1, 2) if data_format == "channels_last" else (2, 3)


def _paddings(data_format: str, pad: tuple[int, int]) -> list[tuple[int, int]]:
    paddings = [(0, 0)] * 4
    for axis, size in zip(_spatial_axes(data_format), pad, strict=True):
        paddings[axis] = (size, size)
    return paddings


# Keras internals. Both are attributes read and never written; tests/test_layers.py fails where a
# Keras release stores them elsewhere.


def is_rematerialized(layer: keras.layers.Layer) -> bool:
    """Whether the layer was made in a `keras.RematScope`, so that Keras must wrap its call."""
    return layer._remat_mode is not None


def _mask_of(x):
    """The mask that an earlier layer (`Masking`, `Embedding`) has tied to a tensor."""
    return getattr(x, "_keras_mask", None)


def has_torch_hooks(layer: keras.layers.Layer) -> bool:
    """Whether torch would run hooks around a call of the layer."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def in_stateless_scope() -> bool:
    """Whether a `keras.StatelessScope` is active, in which no variable may be written."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        return scope.original_scope is not None


class _DirectCall:
    """On torch, skips `Layer.__call__` where it has nothing to do.

    What it does for a built layer called on tensors of its own dtype, of the right shape and
    without a mask comes to nothing, but takes 0.1 ms a layer. torch's hooks still run.
    """

    _takes_training = False

    def __call__(self, *args, **kwargs):
        if _BACKEND == "torch" and self._nothing_to_prepare(args, kwargs):
            if not self._takes_training:
                kwargs = {}
            return torch.nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args, **kwargs):
        """What `torch.nn.Module.__call__` runs between the hooks."""
        first = args[0] if args else None
        first = first[0] if type(first) in (list, tuple) else first
        if not isinstance(first, torch.Tensor) or is_rematerialized(self):
            return super().forward(*args, **kwargs)
        return self.call(*args, **kwargs)

    def _nothing_to_prepare(self, args, kwargs) -> bool:
        if not self.built or len(args) != 1 or self.activity_regularizer is not None:
            return False
        if kwargs:
            if len(kwargs) > 1 or type(kwargs.get("training")) is not bool:
                return False
        elif self._takes_training:  # inherited from the layer around this one, which Keras knows
            return False
        dtype = _TORCH_DTYPES.get(self.compute_dtype)
        for x in args[0] if type(args[0]) in (list, tuple) else args:
            if not (
                isinstance(x, torch.Tensor)
                and x.dtype is dtype
                and x.ndim == 4
                and self._fits(x.shape)
                and _mask_of(x) is None
            ):
                return False  # Keras converts it, refuses it with a good message, or warns
        return True

    def _fits(self, shape) -> bool:
        return True


def is_plain(x) -> bool:
    """Whether a tensor is one of memory, not one that a compiler or an exporter traces with."""
    return (
        type(x) is torch.Tensor
        and x.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def count_change(tensors) -> None:
    """Tells torch that tensors have changed in place, for kernels that do not tell it themselves.

    torch 2.13's fused optimizers do not, and who keeps something made of the tensors
    (`keras_resnet.graph`) would not notice.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def torch_value(variable, dtype):
    """A variable's (or a tensor's) tensor at `dtype`, with its memory layout kept."""
    value = getattr(variable, "value", variable)
    return value if value.dtype is dtype else value.to(dtype)


def _ohwi(initializer):
    """An initializer for `(height, width, in, out)` kernels that lie as OHWI in memory.

    Seen as torch's OIHW such a kernel is channels-last contiguous, and neither the convolution nor
    its gradient makes a copy. Variables are assigned in place, gradients and optimizer slots take
    their parameter's strides: the layout survives loading and training.
    """

    def initialize(shape, dtype=None):
        oihw = ops.convert_to_tensor(initializer(shape, dtype=dtype), dtype).permute(3, 2, 0, 1)
        kernel = torch.empty_like(oihw, memory_format=torch.channels_last)
        return kernel.copy_(oihw).permute(2, 3, 1, 0)

    return initialize


@keras.saving.register_keras_serializable("keras_resnet")
class Conv2D(_DirectCall, keras.layers.Conv2D):
    """`keras.layers.Conv2D` that owns its symmetric zero padding.

    torch pads both sides alike; Keras' `padding="same"` pads the far side more at stride 2, so
    that outputs differ. Input and output are `(batch, height, width, channels)` or, under
    `channels_first`, `(batch, channels, height, width)`.

    Args:
        filters: Output channels.
        kernel_size: Height and width of the kernel.
        pad: Zeros added on each side: one number or `(vertical, horizontal)`.
        **kwargs: As `keras.layers.Conv2D`'s; `pad` wants `padding="valid"`, the default.

    Examples:
        >>> Conv2D(64, 7, strides=2, pad=3).compute_output_shape((None, 224, 224, 3))
        (None, 112, 112, 64)
    """

    def __init__(self, filters, kernel_size, *args, pad: int | tuple[int, int] = 0, **kwargs):
        super().__init__(filters, kernel_size, *args, **kwargs)
        self.pad = _pair(pad)
        if any(self.pad) and self.padding != "valid":
            raise ValueError(f"pad={pad} needs padding='valid'. Received: {self.padding!r}.")

    def build(self, input_shape):
        self._channel_axis = 3 if self.data_format == "channels_last" else 1
        self._channels = input_shape[self._channel_axis]
        super().build(input_shape)

    def add_weight(self, shape=None, initializer=None, *args, name=None, **kwargs):
        if _BACKEND == "torch":
            # `call` casts to the input's dtype itself, whatever policy the model around it has.
            kwargs["autocast"] = False
            if name == "kernel":
                initializer = _ohwi(keras.initializers.get(initializer))
        return super().add_weight(shape, initializer, *args, name=name, **kwargs)

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        for axis, size in zip(_spatial_axes(self.data_format), self.pad, strict=True):
            if shape[axis] is not None:
                shape[axis] += 2 * size
        return super().compute_output_shape(tuple(shape))

    def _fits(self, shape) -> bool:
        return shape[self._channel_axis] == self._channels

    def call(self, inputs):
        if _BACKEND != "torch":
            return super().call(inputs)
        # Views, not copies: NHWC memory under an NCHW name is torch's channels_last.
        if self.data_format == "channels_last":
            return self.torch_nchw(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.torch_nchw(inputs)

    def torch_nchw(self, x):
        """What `call` does on torch, on maps in torch's order whatever the data format."""
        if not x.is_floating_point():
            x = x.to(_TORCH_DTYPES[self.compute_dtype])
        dtype = x.dtype
        kernel = torch_value(self.kernel, dtype).permute(3, 2, 0, 1)
        bias = None if self.bias is None else torch_value(self.bias, dtype)
        pad = self.pad
        if self.padding == "same":
            x, pad = self._same(x)
        y = F.conv2d(x, kernel, bias, self.strides, pad, self.dilation_rate, self.groups)
        # In place: the convolution's gradient needs its inputs, not its output.
        return _activate(self.activation, y)

    def _same(self, x):
        """The input padded for Keras' `"same"`, and the padding left to the convolution."""
        total = []
        for size, kernel, stride, dilation in zip(
            x.shape[2:], self.kernel_size, self.strides, self.dilation_rate, strict=True
        ):
            reach = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1
            total.append(max(reach - size, 0))
        height, width = total
        if height % 2 == width % 2 == 0:
            return x, (height // 2, width // 2)
        sides = (width // 2, width - width // 2, height // 2, height - height // 2)
        return F.pad(x, sides), (0, 0)

    def convolution_op(self, inputs, kernel):
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


def _activate(activation, x):
    """The activation of a tensor that the calling layer made, so that ReLU may overwrite it."""
    if activation is None or activation is _LINEAR:
        return x
    if _BACKEND == "torch" and activation is _RELU:
        return torch.relu_(x)
    return activation(x)


@keras.saving.register_keras_serializable("keras_resnet")
class BatchNormalization(_DirectCall, keras.layers.BatchNormalization):
    """Batch norm with torch's defaults and variance rule, an optional shortcut and activation.

    Called on `x`, or on `[x, shortcut]`, it gives `activation(normalised(x) + shortcut)`: the end
    of a residual block in one layer. Both have the same shape. Half-precision inputs give
    half-precision outputs, with float32 arithmetic and statistics in between.

    Args:
        axis: The channels' axis.
        momentum: Share of the old running statistics kept at a step: torch's `momentum=0.1` is
            Keras' 0.9.
        epsilon: Added to the variance; torch's 1e-5.
        activation: Applied last, such as `"relu"`.
        unbiased_variance: Feed the running variance with n/(n-1) times the batch's variance,
            n = batch * height * width, as torch does; `False` is Keras' rule.
        **kwargs: As `keras.layers.BatchNormalization`'s, `renorm` apart. Masks are not supported:
            Keras warns where an input has one.

    Examples:
        >>> layer = BatchNormalization(activation="relu")
        >>> layer.compute_output_shape([(None, 8, 8, 4), (None, 8, 8, 4)])
        (None, 8, 8, 4)
    """

    _takes_training = True

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
        # Pictures have no masks; without this Keras would look for one at every call.
        self.supports_masking = False

    def build(self, input_shape):
        with_shortcut = isinstance(input_shape[0], (list, tuple))
        shape = input_shape[0] if with_shortcut else input_shape
        self._channels, self._rank = shape[self.axis], len(shape)
        # How often torch's kernel has moved the statistics: it does so without torch's own count,
        # which its gradient would take for an error. No state, hence not Keras' to track.
        object.__setattr__(self, "changes", [0])
        super().build(shape)
        # One tensor or two: Keras' specification can say only one of them, `_check` says both.
        self.input_spec = None

    def compute_output_shape(self, input_shape):
        with_shortcut = isinstance(input_shape[0], (list, tuple))
        shape = tuple(input_shape[0] if with_shortcut else input_shape)
        self._check(shape)
        return shape

    def _fits(self, shape) -> bool:
        return shape[self.axis] == self._channels

    def _check(self, shape):
        if self.built and not self._fits(shape):
            raise ValueError(
                f"{self.name} was built for {self._channels} channels on axis {self.axis}. "
                f"Received an input of shape {tuple(shape)}."
            )

    def call(self, inputs, training=None):
        with_shortcut = isinstance(inputs, (list, tuple))
        x, shortcut = inputs if with_shortcut else (inputs, None)
        self._check(x.shape)
        training = bool(training) and self.trainable
        if self._is_fusible(x, training):
            if _BACKEND == "torch":
                if self.axis == 1:
                    return self.torch_nchw(x, shortcut, training)
                shortcut = None if shortcut is None else shortcut.permute(0, 3, 1, 2)
                y = self.torch_nchw(x.permute(0, 3, 1, 2), shortcut, training)
                return y.permute(0, 2, 3, 1)
            y = self._tensorflow_call(x, training)
        else:
            y = self._portable_call(x, training)
        if shortcut is not None:
            y = ops.add(y, shortcut)
        return _activate(self.activation, y)

    @property
    def is_of_maps(self) -> bool:
        """Whether it was built for feature maps, and may use a kernel made for them."""
        return self.built and self._rank == 4 and not self.synchronized

    def _is_fusible(self, x, training: bool) -> bool:
        """Whether the backend has one kernel for this input."""
        if len(x.shape) != 4 or self.synchronized:
            return False
        if _BACKEND == "torch":
            # Of a single value torch knows no unbiased variance.
            return x.is_floating_point() and not (training and x.numel() == self._channels)
        # TensorFlow's kernel computes in float32, and on a CPU with the channels last.
        return (
            _BACKEND == "tensorflow"
            and self.axis in (-1, 3)
            and keras.backend.standardize_dtype(x.dtype) in ("float32", "bfloat16", "float16")
        )

    def torch_nchw(self, x, shortcut, training: bool):
        """What `call` does on torch, on maps in torch's order whatever the axis."""
        training = training and self.trainable
        if training and x.numel() == self._channels:
            return self._nchw_by_keras(x, shortcut)
        gamma = None if self.gamma is None else self.gamma.value
        beta = None if self.beta is None else self.beta.value
        mean, variance = self.moving_mean.value, self.moving_variance.value
        if not training:
            y = F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, self.epsilon)
        elif self.unbiased_variance and not in_stateless_scope():
            y = F.batch_norm(
                x, mean, variance, gamma, beta, True, 1.0 - self.momentum, self.epsilon
            )
            self.changes[0] += 1
        else:
            # Statistics that forget at once are the batch's own.
            mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
            y = F.batch_norm(x, mean, variance, gamma, beta, True, 1.0, self.epsilon)
            count = variance.new_tensor(x.numel() // self._channels)
            self._update_statistics(mean, variance * ((count - 1) / count), count)
        # In place: the norm's gradient needs its input, not its output, and nobody else has it.
        if shortcut is not None:
            y = y.add_(shortcut)
        return _activate(self.activation, y)

    def _nchw_by_keras(self, x, shortcut):
        orders = ((0, 2, 3, 1), (0, 3, 1, 2)) if self.axis in (-1, 3) else ((0, 1, 2, 3),) * 2
        y = self._portable_call(x.permute(orders[0]), True).permute(orders[1])
        return _activate(self.activation, y if shortcut is None else y + shortcut)

    def _tensorflow_call(self, x, training: bool):
        ones, zeros = tf.ones((self._channels,)), tf.zeros((self._channels,))
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=ones if self.gamma is None else tf.cast(self.gamma, "float32"),
            offset=zeros if self.beta is None else tf.cast(self.beta, "float32"),
            mean=zeros if training else tf.cast(self.moving_mean, "float32"),
            variance=ones if training else tf.cast(self.moving_variance, "float32"),
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            count = tf.cast(tf.size(x) // self._channels, "float32")
            # The kernel returns the unbiased variance, and 0 for a single value.
            self._update_statistics(mean, variance * ((count - 1) / count), count)
        return y

    def _portable_call(self, x, training: bool):
        # In float32 at least: half precision overflows in the variance.
        is_float64 = keras.backend.standardize_dtype(x.dtype) == "float64"
        dtype = "float64" if is_float64 else "float32"
        x = ops.cast(x, dtype)
        axes = self._reduction_axes
        if training:
            shape = ops.shape(x)
            count = ops.cast(math.prod(shape[axis] for axis in axes), dtype)
            mean, variance = ops.moments(x, axes=axes, synchronized=self.synchronized)
            self._update_statistics(mean, variance, count)
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

    def _update_statistics(self, mean, variance, count):
        """Moves the running statistics towards a batch's mean and biased variance."""
        if self.unbiased_variance:
            # Of one value there is no unbiased variance; the biased one is 0.
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
class MaxPooling2D(_DirectCall, keras.layers.MaxPooling2D):
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
        self.pad = _pair(pad)
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
            if self.data_format == "channels_last":
                return self.torch_nchw(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.torch_nchw(inputs)
        if any(self.pad):
            lowest = -math.inf
            inputs = ops.pad(inputs, _paddings(self.data_format, self.pad), constant_values=lowest)
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

    def torch_nchw(self, x):
        """What `call` does, on maps in torch's order whatever the data format."""
        a, b = self.strides
        missing = self.filters - x.shape[1]
        x = x[:, :, ::a, ::b]
        return F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))

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

    Examples:
        >>> layer = Normalize(mean=(0.5,), std=(0.5,))
        >>> float(layer(ops.ones((1, 1, 1, 1)) * 255)[0, 0, 0, 0])
        1.0
    """

    def __init__(self, mean, std, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.mean = tuple(float(v) for v in mean)
        self.std = tuple(float(v) for v in std)
        object.__setattr__(self, "_constants", {})  # no state, hence not Keras' to track
        self.data_format = data_format or keras.config.image_data_format()

    def build(self, input_shape):
        channels = input_shape[3 if self.data_format == "channels_last" else 1]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"mean and std need one value a channel: {channels} channels, "
                f"mean={list(self.mean)}, std={list(self.std)}."
            )

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def call(self, inputs):
        # In float32 whatever the policy: bfloat16 has 8 bits, a pixel needs them all.
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        mean, std = (
            self._constant(self.mean, inputs, dtype),
            self._constant(self.std, inputs, dtype),
        )
        return ops.cast((ops.cast(inputs, dtype) / 255 - mean) / std, self.compute_dtype)

    def _constant(self, values, inputs, dtype):
        if _BACKEND == "torch":
            # Filled on the device: to copy them there would wait for it.
            like = {"dtype": _TORCH_DTYPES[dtype], "device": inputs.device}
            constant = torch.stack([torch.full((), value, **like) for value in values])
        else:
            constant = ops.convert_to_tensor(values, dtype)
        return ops.reshape(constant, (-1,) if self.data_format == "channels_last" else (-1, 1, 1))

    def torch_nchw(self, x):
        """What `call` does on torch, on maps in torch's order whatever the data format."""
        dtype = _TORCH_DTYPES[keras.backend.result_type(self.compute_dtype, "float32")]
        key = dtype, x.device
        constants = self._constants.get(key)
        if constants is None:
            constants = tuple(
                torch.tensor(v, dtype=dtype, device=x.device)[:, None, None]
                for v in (self.mean, self.std)
            )
            # Once a device, for a copy to it would wait for it. An exporter's are none of memory,
            # and a tracer that looks twice must see the same both times.
            if is_plain(x):
                self._constants[key] = constants
        mean, std = constants
        y = torch.div(x.to(dtype), 255).sub_(mean).div_(std)
        return y.to(_TORCH_DTYPES[self.compute_dtype])

    def get_config(self):
        return {
            **super().get_config(),
            "mean": list(self.mean),
            "std": list(self.std),
            "data_format": self.data_format,
        }
