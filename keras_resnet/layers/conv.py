"""The convolution that pads for itself."""

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
    is_plain,
    torch_value,
    value_of,
)
from keras_resnet.variants import conv_output_size

if BACKEND == "torch":
    import torch
    import torch.nn.functional as F
elif BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A number for both directions, or two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def spatial_axes(data_format: str) -> tuple[int, int]:
    """Axes of height and width in a batch."""
    return (1, 2) if data_format == "channels_last" else (2, 3)


def paddings(data_format: str, pad: tuple[int, int]) -> list[tuple[int, int]]:
    """What `ops.pad` is told for a batch whose height and width are padded on both sides."""
    result = [(0, 0)] * 4
    for axis, size in zip(spatial_axes(data_format), pad, strict=True):
        result[axis] = (size, size)
    return result


if BACKEND == "torch":

    class _Transposed(torch.autograd.Function):
        """A matrix's transpose in new memory, and its gradient's, of which autograd makes a view.

        torch copies a transposed matrix block by block, but four axes element by element.
        """

        generate_vmap_rule = True

        @staticmethod
        def forward(matrix):
            return matrix.t().contiguous()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient.t().contiguous()


def torch_kernel(variable, dtype):
    """A kernel `(height, width, in, out)` as torch names it, OIHW, and lies it best, channels-last.

    Variables are contiguous as they are, which much of torch asks of parameters (`LBFGS`,
    `parameters_to_vector`, safetensors): what the convolution wants is a copy, made at each call.
    """
    kernel = getattr(variable, "value", variable)
    if not is_plain(kernel):  # an exporter or a compiler copies as it likes
        return torch_value(kernel, dtype).permute(3, 2, 0, 1)
    if kernel.device.type != "cpu":
        # A GPU copies any order fast, and waits where the processor takes long to start its
        # kernels: one copy does all here, and its gradient is another.
        return kernel.permute(3, 2, 0, 1).to(dtype, memory_format=torch.channels_last)
    kernel = torch_value(kernel, dtype)
    height, width, channels, filters = kernel.shape
    matrix = kernel.reshape(height * width * channels, filters)
    transposed = _Transposed.apply(matrix) if matrix.requires_grad else matrix.t().contiguous()
    return transposed.view(filters, height, width, channels).permute(0, 3, 1, 2)


@keras.saving.register_keras_serializable("keras_resnet")
class Conv2D(DirectCall, keras.layers.Conv2D):
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
        self.pad = pair(pad)
        if any(self.pad) and self.padding != "valid":
            raise ValueError(f"pad={pad} needs padding='valid'. Received: {self.padding!r}.")

    def build(self, input_shape):
        self._channel_axis = 3 if self.data_format == "channels_last" else 1
        self._channels = input_shape[self._channel_axis]
        super().build(input_shape)

    def add_weight(self, *args, name=None, **kwargs):
        if BACKEND == "torch" and self.is_own and name in ("kernel", "bias"):
            # `call` casts to the input's dtype itself, whatever policy the model around it has.
            kwargs["autocast"] = False
        return super().add_weight(*args, name=name, **kwargs)

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        for axis, size in zip(spatial_axes(self.data_format), self.pad, strict=True):
            if shape[axis] is not None:
                shape[axis] += 2 * size
        return super().compute_output_shape(tuple(shape))

    def _fits(self, shape) -> bool:
        return shape[self._channel_axis] == self._channels

    def call(self, inputs):
        if BACKEND != "torch" or type(self).convolution_op is not Conv2D.convolution_op:
            return super().call(inputs)
        # Views, not copies: NHWC memory under an NCHW name is torch's channels_last.
        if self.data_format == "channels_last":
            return self.torch_nchw(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.torch_nchw(inputs)

    def torch_nchw(self, x, read=value_of):
        """What `call` does on torch, on maps in torch's order whatever the data format."""
        if not x.is_floating_point():
            x = x.to(TORCH_DTYPES[self.compute_dtype])
        dtype = x.dtype
        kernel, bias = read(self.kernel), self.bias
        bias = None if bias is None else torch_value(read(bias), dtype)
        pad = self.pad
        if self.padding == "same":
            x, pad = self._same(x)
        patches = self._patches(x, pad)
        if patches is None:
            kernel = torch_kernel(kernel, dtype)
            y = F.conv2d(x, kernel, bias, self.strides, pad, self.dilation_rate, self.groups)
        else:
            kernel = torch_value(kernel, dtype).reshape(-1, self.filters)
            y = patches.flatten(3).flatten(0, 2) @ kernel
            y = y if bias is None else y + bias
            y = y.view(*patches.shape[:3], self.filters).permute(0, 3, 1, 2)
        # In place: the convolution's gradient needs its inputs, not its output.
        return activate(self.activation, y)

    def _patches(self, x, pad):
        """What the kernel meets, `(n, height, width, *kernel.shape[:3])`, where that is little.

        With fewer positions than filters, as for a single image, copying patches costs less than
        transposing the kernel; a product of matrices then takes the kernel as it lies.
        """
        if x.device.type != "cpu" or not is_plain(x) or self.groups != 1:
            return None
        sizes = [
            conv_output_size(size, kernel, stride, padding)
            for size, kernel, stride, padding in zip(
                x.shape[2:], self.kernel_size, self.strides, pad, strict=True
            )
        ]
        few = min(sizes) > 0 and 0 < x.shape[0] * math.prod(sizes) < self.filters
        if not few or self.dilation_rate != (1, 1):
            return None
        x = x.permute(0, 2, 3, 1)
        if any(pad):
            x = F.pad(x, (0, 0, pad[1], pad[1], pad[0], pad[0]))
        for axis in (0, 1):
            x = x.unfold(1 + axis, self.kernel_size[axis], self.strides[axis])
        return x.permute(0, 1, 2, 4, 5, 3)

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

    @property
    def pads_as_same(self) -> bool:
        """Whether `pad` is Keras' `"same"`, which is symmetric at stride 1."""
        same = tuple(
            (k - 1) * d / 2 for k, d in zip(self.kernel_size, self.dilation_rate, strict=True)
        )
        return any(self.pad) and self.strides == (1, 1) and self.pad == same

    def convolution_op(self, inputs, kernel):
        if BACKEND == "jax" and self._is_product():
            return self._product(inputs, kernel)
        if not any(self.pad):
            return super().convolution_op(inputs, kernel)
        # TensorFlow has no gradients of dilated kernels on a CPU, but Keras knows a way.
        if BACKEND == "torch" or (BACKEND == "tensorflow" and self.dilation_rate != (1, 1)):
            inputs = ops.pad(inputs, paddings(self.data_format, self.pad))
            return super().convolution_op(inputs, kernel)
        self.compute_output_shape(inputs.shape)  # Keras' error where nothing would be left
        convolution = functools.partial(self.padding_convolution, inputs, kernel)
        if BACKEND == "tensorflow" and self.groups > 1:  # of which, as in Keras, XLA has gradients
            convolution = tf.function(convolution, jit_compile=True)
        return convolution()

    def padding_convolution(self, inputs, kernel):
        """TensorFlow's or jax' own operator, which pads without a padded copy."""
        order = "NHWC" if self.data_format == "channels_last" else "NCHW"
        kernel = ops.convert_to_tensor(kernel)
        sides = paddings(self.data_format, self.pad)
        if BACKEND == "jax":
            return jax.lax.conv_general_dilated(
                inputs,
                kernel,
                self.strides,
                [sides[axis] for axis in spatial_axes(self.data_format)],
                rhs_dilation=self.dilation_rate,
                dimension_numbers=(order, "HWIO", order),
                feature_group_count=self.groups,
            )
        if not any(self.pad):
            sides = self.padding.upper()
        return tf.nn.conv2d(inputs, kernel, self.strides, sides, order, self.dilation_rate)

    def _is_product(self) -> bool:
        """Whether a product takes its place: XLA finds its gradients 3 to 6 times as fast."""
        one = self.kernel_size == (1, 1) and self.groups == 1 and not any(self.pad)
        return one and jax.default_backend() == "cpu"

    def _product(self, inputs, kernel):
        (a, b), axis = self.strides, self._channel_axis
        x = inputs[:, ::a, ::b] if axis == 3 else inputs[:, :, ::a, ::b]
        return ops.moveaxis(ops.tensordot(x, kernel[0, 0], ((axis,), (0,))), -1, axis)

    def get_config(self):
        return {**super().get_config(), "pad": self.pad}
