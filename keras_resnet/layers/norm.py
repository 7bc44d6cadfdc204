"""Batch norm with its shortcut and ReLU, and the normalisation of pixels."""

from __future__ import annotations

import functools
import math

import keras
from keras import ops

from keras_resnet.layers.torch_call import (
    BACKEND,
    TORCH_DTYPES,
    DirectCall,
    activate,
    in_stateless_scope,
    is_plain,
    stored,
    value_of,
)
from keras_resnet.system import group  # as a whole: it may be what imports Keras, half there

if BACKEND == "torch":
    import torch
    import torch.nn.functional as F

    from keras_resnet.layers.sync_norm import sync_batch_norm
elif BACKEND == "tensorflow":
    import tensorflow as tf


def _itself(values):
    return values


@keras.saving.register_keras_serializable("keras_resnet")
class BatchNormalization(DirectCall, keras.layers.BatchNormalization):
    """Batch norm with torch's defaults and variance rule, an optional shortcut and activation.

    Called on `x`, or on `[x, shortcut]`, it gives `activation(normalised(x) + shortcut)`: the end
    of a residual block in one layer. Both have the same shape. Half-precision inputs give
    half-precision outputs, with float32 arithmetic and statistics in between.

    Args:
        axis: The channels' axis.
        momentum: Fraction of the old running statistics kept at a step: torch's `momentum=0.1` is
            Keras' 0.9.
        epsilon: Added to the variance; torch's 1e-5.
        activation: Applied last, such as `"relu"`.
        unbiased_variance: Feed the running variance with n/(n-1) times the batch's variance,
            n = batch * height * width, as torch does; `False` is Keras' rule.
        **kwargs: As `keras.layers.BatchNormalization`'s. With `renorm` Keras computes, whose
            running variance is the biased one.

    Values that a mask leaves out count neither for the mean nor for the variance, as in Keras.

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

    def build(self, input_shape):
        with_shortcut = isinstance(input_shape[0], (list, tuple))
        shape = input_shape[0] if with_shortcut else input_shape
        self._channels, self._rank = shape[self.axis], len(shape)
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

    def call(self, inputs, training=None, mask=None):
        with_shortcut = isinstance(inputs, (list, tuple))
        x, shortcut = inputs if with_shortcut else (inputs, None)
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        self._check(x.shape)
        training = bool(training) and self.trainable
        if training and self.renorm:
            y = super().call(x, training=True, mask=mask)
        elif mask is None and self._is_fusible(x, training):
            if BACKEND == "torch":
                if self.axis % 4 == 1:
                    return self.torch_nchw(x, shortcut, training)
                shortcut = None if shortcut is None else shortcut.permute(0, 3, 1, 2)
                y = self.torch_nchw(x.permute(0, 3, 1, 2), shortcut, training)
                return y.permute(0, 2, 3, 1)
            y = self._tensorflow_call(x, training)
        else:
            y = self._portable_call(x, training, mask)
        if shortcut is not None:
            y = ops.add(y, shortcut)
        return activate(self.activation, y)

    @property
    def is_of_maps(self) -> bool:
        """Whether it was built for feature maps, and may use a kernel made for them."""
        is_fusible = self.axis % 4 in (1, 3) and not (self.synchronized or self.renorm)
        return self.built and self._rank == 4 and is_fusible

    def _is_fusible(self, x, training: bool) -> bool:
        """Whether the backend has one kernel for this input."""
        if len(x.shape) != 4 or self.axis % 4 not in (1, 3) or self.synchronized:
            return False
        if training and BACKEND == "tensorflow" and group.current().norms_together:
            return False
        if BACKEND == "torch":
            # Of a single value torch knows no unbiased variance.
            return x.is_floating_point() and not (training and x.numel() == self._channels)
        # TensorFlow's kernel computes in float32.
        dtype = keras.backend.standardize_dtype(x.dtype)
        return BACKEND == "tensorflow" and dtype in ("float32", "bfloat16", "float16")

    def torch_nchw(self, x, shortcut, training: bool, read=value_of):
        """What `call` does on torch, on maps in torch's order whatever the axis."""
        training = training and self.trainable
        together = training and group.current().norms_together and is_plain(x)
        if training and not together and x.numel() == self._channels:
            return self._nchw_by_keras(x, shortcut)
        gamma = None if self.gamma is None else read(self.gamma)
        beta = None if self.beta is None else read(self.beta)
        mean, variance = read(self.moving_mean), read(self.moving_variance)
        if not training:
            y = F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, self.epsilon)
        elif self.unbiased_variance and (read is stored or not in_stateless_scope()):
            normalize = sync_batch_norm if together else F.batch_norm
            y = normalize(x, mean, variance, gamma, beta, True, 1.0 - self.momentum, self.epsilon)
        else:
            # Statistics that forget at once are the batch's own.
            mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
            y = F.batch_norm(x, mean, variance, gamma, beta, True, 1.0, self.epsilon)
            count = variance.new_tensor(x.numel() // self._channels)
            self._update_statistics(mean, variance * ((count - 1) / count), count)
        # In place: the norm's gradient needs its input, not its output, and nobody else has it.
        if shortcut is not None:
            y = y.add_(shortcut)
        return activate(self.activation, y)

    def _nchw_by_keras(self, x, shortcut):
        orders = ((0, 2, 3, 1), (0, 3, 1, 2)) if self.axis in (-1, 3) else ((0, 1, 2, 3),) * 2
        y = self._portable_call(x.permute(orders[0]), True).permute(orders[1])
        return activate(self.activation, y if shortcut is None else y + shortcut)

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
            data_format="NHWC" if self.axis % 4 == 3 else "NCHW",
        )
        if training:
            count = tf.cast(tf.size(x) // self._channels, "float32")
            # The kernel returns the unbiased variance, and 0 for a single value.
            self._update_statistics(mean, variance * ((count - 1) / count), count)
        return y

    def _portable_call(self, x, training: bool, mask=None):
        # In float32 at least: half precision overflows in the variance.
        is_float64 = keras.backend.standardize_dtype(x.dtype) == "float64"
        dtype = "float64" if is_float64 else "float32"
        x = ops.cast(x, dtype)
        if training:
            mean, variance, count = self._moments_and_count(x, mask)
            self._update_statistics(mean, variance, count)
        else:
            mean = ops.cast(self.moving_mean, dtype)
            variance = ops.cast(self.moving_variance, dtype)
        beta, gamma = (v if v is None else ops.cast(v, dtype) for v in (self.beta, self.gamma))
        y = ops.batch_normalization(x, mean, variance, self.axis, beta, gamma, self.epsilon)
        return ops.cast(y, self.compute_dtype)

    def _moments_and_count(self, x, mask):
        """A batch's mean, biased variance and number of values, all for each channel."""
        shape, axes = ops.shape(x), self._reduction_axes
        together = BACKEND == "tensorflow" and (self.synchronized or group.current().norms_together)
        replica = tf.distribute.get_replica_context() if together else None
        if mask is None:
            count = ops.cast(math.prod(shape[axis] for axis in axes), x.dtype)
            if replica is None:
                return *ops.moments(x, axes=axes, synchronized=self.synchronized), count
            counted = _itself
        elif len(mask.shape) != len(shape) - 1:
            raise ValueError(
                f"The mask provided should be one dimension less than the inputs. "
                f"Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(x.shape)}."
            )
        else:
            kept = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), shape)
            count = ops.sum(ops.cast(kept, x.dtype), axes, keepdims=True)

            def counted(values):
                return ops.where(kept, values, 0)

        # The parts of a batch may differ in size: means of their means would be wrong.
        add_up = _itself if replica is None else functools.partial(replica.all_reduce, "SUM")
        count, total = add_up([count, ops.sum(counted(x), axes, keepdims=True)])
        least_one = ops.maximum(count, 1)
        mean = total / least_one
        squares = ops.square(counted(x - mean))
        variance = add_up(ops.sum(squares, axes, keepdims=True)) / least_one
        return tuple(ops.reshape(value, (-1,)) for value in (mean, variance, count))

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
        mean, std = (self._constant(values, inputs, dtype) for values in (self.mean, self.std))
        return ops.cast((ops.cast(inputs, dtype) / 255 - mean) / std, self.compute_dtype)

    def _constant(self, values, inputs, dtype):
        if BACKEND == "torch":
            # Filled on the device: to copy them there would wait for it.
            like = {"dtype": TORCH_DTYPES[dtype], "device": inputs.device}
            constant = torch.stack([torch.full((), value, **like) for value in values])
        else:
            constant = ops.convert_to_tensor(values, dtype)
        return ops.reshape(constant, (-1,) if self.data_format == "channels_last" else (-1, 1, 1))

    def torch_nchw(self, x):
        """What `call` does on torch, on maps in torch's order whatever the data format."""
        dtype = TORCH_DTYPES[keras.backend.result_type(self.compute_dtype, "float32")]
        key = dtype, x.device, self.mean, self.std
        constants = self._constants.get(key)
        if constants is None:
            with torch.inference_mode(False):  # gradients may be wanted of later inputs
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
        return y.to(TORCH_DTYPES[self.compute_dtype])

    def get_config(self):
        return {
            **super().get_config(),
            "mean": list(self.mean),
            "std": list(self.std),
            "data_format": self.data_format,
        }
