"""The residual blocks that every ResNet here is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np

from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization
from keras_resnet.layers.pool import MaxPooling2D, ZeroPaddedShortcut
from keras_resnet.system.errors import InputError, one_of
from keras_resnet.variants import layer_names, squeezed

# torchvision/models/resnet.py: kaiming_normal_(mode="fan_out", nonlinearity="relu"); He et al.
# 2015b (arXiv:1502.01852) use the fan in; torch's own default for Conv2d and Linear is
# uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is scale 1/3 in Keras' terms.
INITIALIZERS = {
    "fan_out": {"scale": 2.0, "mode": "fan_out", "distribution": "untruncated_normal"},
    "fan_in": {"scale": 2.0, "mode": "fan_in", "distribution": "untruncated_normal"},
    "torch": {"scale": 1 / 3, "mode": "fan_in", "distribution": "uniform"},
}


def kernel_initializer(name: str) -> keras.initializers.Initializer:
    """A fresh initializer by the name used in the table: `fan_out`, `fan_in` or `torch`."""
    return keras.initializers.VarianceScaling(**INITIALIZERS[name])


def bias_initializer(fan_in: int) -> keras.initializers.Initializer:
    """Torch's default for biases: uniform within 1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return keras.initializers.RandomUniform(-bound, bound)


class _DrawnByNumpy(keras.initializers.Initializer):
    """Draws what a stock initializer describes, from its seed, with NumPy's generator.

    The same seed gives the same weights on every backend; and jax, which compiles a program for
    every new shape, would need a minute for what NumPy does in a second.
    """

    def __init__(self, stock: keras.initializers.Initializer):
        self.stock = stock

    def __call__(self, shape, dtype=None):
        stock = self.stock
        rng = np.random.default_rng(stock.seed)
        if isinstance(stock, keras.initializers.RandomUniform):
            values = rng.uniform(stock.minval, stock.maxval, shape)
        else:
            fan = math.prod(shape[:-2]) * shape[-2 if stock.mode == "fan_in" else -1]
            if stock.distribution == "uniform":
                bound = math.sqrt(3 * stock.scale / fan)
                values = rng.uniform(-bound, bound, shape)
            else:
                values = rng.standard_normal(shape, np.float32)
                values *= math.sqrt(stock.scale / fan)
        return keras.ops.convert_to_tensor(values, dtype or keras.config.floatx())


def apply_drawn(layer: keras.layers.Layer, x):
    """Calls a new layer whose kernel, and bias if it is random, are drawn by NumPy.

    The layer's config keeps the stock initializers, so that a model file needs no class of ours
    to describe them.
    """
    stock = layer.kernel_initializer, layer.bias_initializer
    layer.kernel_initializer = _DrawnByNumpy(stock[0])
    if isinstance(stock[1], keras.initializers.RandomUniform):
        layer.bias_initializer = _DrawnByNumpy(stock[1])
    try:
        return layer(x)
    finally:
        layer.kernel_initializer, layer.bias_initializer = stock


def channel_axis() -> int:
    """Axis of the channels in a batch, by Keras' global data format: 3 or 1."""
    return 3 if keras.config.image_data_format() == "channels_last" else 1


def conv(
    x,
    filters: int,
    kernel_size: int,
    *,
    name: str,
    strides: int | Sequence[int] = 1,
    pad: int | None = None,
    groups: int = 1,
    use_bias: bool = False,
    init: str = "fan_out",
):
    """A convolution padded as in the papers: `kernel_size // 2` zeros on each side."""
    fan_in = kernel_size**2 * x.shape[channel_axis()] // groups
    layer = Conv2D(
        filters,
        kernel_size,
        strides=strides if isinstance(strides, int) else tuple(strides),
        pad=kernel_size // 2 if pad is None else pad,
        groups=groups,
        use_bias=use_bias,
        kernel_initializer=kernel_initializer(init),
        bias_initializer=bias_initializer(fan_in) if use_bias else "zeros",
        name=name,
    )
    return apply_drawn(layer, x)


def dense(x, units: int, name: str, activation: str | None, init: str = "torch"):
    """A fully connected layer."""
    layer = keras.layers.Dense(
        units,
        activation=activation,
        kernel_initializer=kernel_initializer(init),
        bias_initializer=bias_initializer(x.shape[-1]),
        name=name,
    )
    return apply_drawn(layer, x)


def norm(x, *, name: str, activation: str | None = None, kind: str = "batch"):
    """Batch or group norm; `[x, shortcut]` adds the shortcut before the activation."""
    if kind == "batch":
        return BatchNormalization(axis=channel_axis(), activation=activation, name=name)(x)
    one_of("norm_kind", kind, ("batch", "group"))
    x, *shortcut = x if isinstance(x, list) else [x]
    layer = keras.layers.GroupNormalization(32, axis=channel_axis(), epsilon=1e-5, name=name)
    x = layer(x)
    if shortcut:
        x = keras.layers.Add(name=f"{name}_add")([x, *shortcut])
    return keras.layers.ReLU(name=f"{name}_relu")(x) if activation == "relu" else x


def squeeze_and_excite(x, prefix: str, init: str):
    """Channels weighted by what their means say (Hu et al. 2017, figure 2); timm's `SEModule`."""
    channels = x.shape[channel_axis()]
    y = keras.layers.GlobalAveragePooling2D(keepdims=True, name=f"{prefix}_se_pool")(x)
    y = conv(y, squeezed(channels), 1, use_bias=True, init=init, name=f"{prefix}_se_fc1")
    y = keras.layers.ReLU(name=f"{prefix}_se_relu")(y)
    y = conv(y, channels, 1, use_bias=True, init=init, name=f"{prefix}_se_fc2")
    y = keras.layers.Activation("sigmoid", name=f"{prefix}_se_gate")(y)
    return keras.layers.Multiply(name=f"{prefix}_se_scale")([x, y])


def block_name(stage: int | str, block: int | str) -> str:
    """Module path of a block, `.` written `_`.

    An integer stage counts as in the papers' tables, where conv1 is the stem and conv2_x the first
    residual stage; torchvision calls that `layer1`. Blocks are letters, or numbers from 0. Text
    of any other kind is taken as it is.

    Examples:
        >>> block_name(stage=2, block="a"), block_name("stage1", 0)
        ('layer1_0', 'stage1_0')
    """
    if isinstance(stage, int):
        stage = f"layer{stage - 1}"
    if isinstance(block, str) and len(block) == 1 and block.isascii() and block.islower():
        block = ord(block) - ord("a")
    return f"{stage}_{block}"


def identity_block(
    x,
    kernel_size: int,
    filters: Sequence[int],
    stage: int | str,
    block: int | str,
    *,
    groups: int = 1,
    use_bias: bool = False,
    relu_before_add: bool = False,
    squeeze: bool = False,
    norm_kind: Literal["batch", "group"] = "batch",
    layout: Literal["torchvision", "sequential"] = "torchvision",
    init: str = "fan_out",
    name: str | None = None,
):
    """A residual block whose input and output have the same shape.

    Args:
        x: Input, `(batch, height, width, channels)`, or channels first where Keras is so set; its
            channels are the last of `filters`.
        kernel_size: Side of the spatial convolutions, 3 in every published ResNet.
        filters: Two numbers make a basic block, three a bottleneck (1x1, k x k, 1x1).
        stage: 2 to 5 as in He et al. table 1 (layers are then named `layer1` to `layer4`), or text.
        block: `"a"`, `"b"`, ... or 0, 1, ...
        groups: Groups of a bottleneck's middle convolution.
        use_bias: Biases on the convolutions.
        relu_before_add: A ReLU at the end of the branch, before the addition as well.
        squeeze: Squeeze and excitation at the end of the branch.
        norm_kind: `"batch"` or `"group"`.
        layout: Names of the layers: torchvision's (`conv1`, `bn1`, ...) or those of one
            `nn.Sequential` (`longway_0`, `longway_1`, ...).
        init: `"fan_out"` (torchvision's), `"fan_in"` (He's) or `"torch"` (its default).
        name: Prefix of the layers' names in place of stage and block.

    Returns:
        The output, of the shape of `x`.

    Raises:
        InputError: `filters` is not two or three numbers, or the last is not the input's channels.

    Examples:
        >>> x = keras.Input((56, 56, 256))
        >>> identity_block(x, 3, [64, 64, 256], stage=2, block="b").shape
        (None, 56, 56, 256)
    """
    prefix = name or block_name(stage, block)
    if x.shape[channel_axis()] != filters[-1]:
        raise InputError(
            f"identity_block {prefix!r} keeps the shape: the input has "
            f"{x.shape[channel_axis()]} channels, filters={list(filters)} end in {filters[-1]}. "
            "Use conv_block where the shape changes."
        )
    return _residual(
        x, x, kernel_size, filters, prefix, (1, 1), "3x3", groups, use_bias, relu_before_add,
        squeeze, norm_kind, layout, init,
    )  # fmt: skip


def conv_block(
    x,
    kernel_size: int,
    filters: Sequence[int],
    stage: int | str,
    block: int | str,
    strides: int | Sequence[int] = (2, 2),
    *,
    groups: int = 1,
    stride_on: Literal["1x1", "3x3"] = "1x1",
    shortcut: Literal[
        "projection", "pooled_projection", "zero_padding", "bare_projection"
    ] = "projection",
    use_bias: bool = False,
    relu_before_add: bool = False,
    squeeze: bool = False,
    norm_kind: Literal["batch", "group"] = "batch",
    layout: Literal["torchvision", "sequential"] = "torchvision",
    init: str = "fan_out",
    name: str | None = None,
):
    """A residual block that changes the shape: its shortcut strides and changes the channels.

    Args:
        x: Input, `(batch, height, width, channels)`, or channels first where Keras is so set.
        kernel_size: Side of the spatial convolutions, 3 in every published ResNet.
        filters: Two numbers make a basic block, three a bottleneck (1x1, k x k, 1x1).
        stage: 2 to 5 as in He et al. table 1 (layers are then named `layer1` to `layer4`), or text.
        block: `"a"`, `"b"`, ... or 0, 1, ...
        strides: Stride of the block; (2, 2) halves height and width.
        groups: Groups of a bottleneck's middle convolution.
        stride_on: Where a bottleneck strides: on the first 1x1 as in the paper (v1, and the
            `conv_block` of most tutorials), or on the k x k (`"3x3"`: v1.5, torchvision's; its
            pretrained weights need it). A basic block strides on its first convolution.
        shortcut: `"projection"` (1x1 and batch norm, option B), `"pooled_projection"` (average
            pooling strides, then the same without a stride: ResNet-D), `"zero_padding"`
            (option A) or `"bare_projection"` (a biased 1x1 alone).
        use_bias: Biases on the convolutions.
        relu_before_add: A ReLU at the end of the branch, before the addition as well.
        squeeze: Squeeze and excitation at the end of the branch.
        norm_kind: `"batch"` or `"group"`.
        layout: Names of the layers: torchvision's (`conv1`, `bn1`, `downsample_0`, ...) or those
            of one `nn.Sequential` (`longway_0`, ..., `shortway_0`).
        init: `"fan_out"` (torchvision's), `"fan_in"` (He's) or `"torch"` (its default).
        name: Prefix of the layers' names in place of stage and block.

    Returns:
        The output, `(batch, ceil(height / stride), ceil(width / stride), filters[-1])`.

    Raises:
        InputError: `filters` is not two or three numbers, or an option is unknown.

    Examples:
        >>> x = keras.Input((56, 56, 256))
        >>> conv_block(x, 3, [128, 128, 512], stage=3, block="a").shape
        (None, 28, 28, 512)
    """
    prefix = name or block_name(stage, block)
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    _, _, (first, second, third) = layer_names(prefix, layout)
    kinds = ("projection", "pooled_projection", "zero_padding", "bare_projection")
    one_of("shortcut", shortcut, kinds)
    if shortcut == "pooled_projection":
        # Where nothing strides, timm's module downsample.0 is an identity.
        pooling = keras.layers.AveragePooling2D(strides, padding="same", name=first)
        side = pooling(x) if max(strides) > 1 else x
        side = conv(side, filters[-1], 1, use_bias=use_bias, init=init, name=second)
        side = norm(side, name=third, kind=norm_kind)
    elif shortcut == "projection":
        side = conv(x, filters[-1], 1, strides=strides, use_bias=use_bias, init=init, name=first)
        side = norm(side, name=second, kind=norm_kind)
    elif shortcut == "zero_padding":
        side = ZeroPaddedShortcut(filters[-1], strides, name=f"{prefix}_shortcut")(x)
    else:  # "bare_projection"
        side = conv(x, filters[-1], 1, strides=strides, use_bias=True, init=init, name=first)
    return _residual(
        x, side, kernel_size, filters, prefix, strides, stride_on, groups, use_bias,
        relu_before_add, squeeze, norm_kind, layout, init,
    )  # fmt: skip


def preactivated_block(
    x, kernel_size, filters, stage, block, strides=1, *, project=False, groups=1,
    use_bias=False, norm_kind="batch", init="fan_out",
):  # fmt: skip
    """A block of ResNet v2 (He et al. 2016, figure 4e): norm and ReLU before each convolution.

    Nothing comes behind the addition; with `project` the shortcut is a 1x1 convolution of what the
    first norm gives (timm's and Keras'), else every pixel or every second one of the input. Names
    are as in the other blocks.
    """
    prefix = block_name(stage, block)
    convs, norms, (projection, *_) = layer_names(prefix, "torchvision")
    y = first = norm(x, activation="relu", name=norms[0], kind=norm_kind)
    options = {"init": init, "use_bias": use_bias}
    if project:
        x = conv(first, filters[-1], 1, strides=strides, name=projection, **options)
    elif strides > 1:
        x = MaxPooling2D(1, strides=strides, name=f"{prefix}_shortcut")(x)
    kernels = (1, kernel_size, 1) if len(filters) == 3 else (kernel_size, kernel_size)
    striding, last = len(filters) - 2, len(filters) - 1
    for i, (width, kernel) in enumerate(zip(filters, kernels, strict=True)):
        if i:
            y = norm(y, activation="relu", name=norms[i], kind=norm_kind)
        y = conv(
            y, width, kernel, name=convs[i], init=init, use_bias=use_bias and i == last,
            strides=strides if i == striding else 1,
            groups=groups if i == 1 == striding else 1,
        )  # fmt: skip
    return keras.layers.Add(name=f"{prefix}_add")([y, x])


def _residual(
    x, shortcut, kernel_size, filters, prefix, strides, stride_on, groups, use_bias,
    relu_before_add, squeeze, norm_kind, layout, init,
):  # fmt: skip
    """The branch, the addition, and the ReLU behind it."""
    if len(filters) not in (2, 3):
        raise InputError(
            "filters must be two numbers (basic block) or three (bottleneck). "
            f"Received: {list(filters)}."
        )
    one_of("stride_on", stride_on, ("1x1", "3x3"))
    if len(filters) == 2:
        kernels, striding = (kernel_size, kernel_size), 0
    else:
        kernels, striding = (1, kernel_size, 1), 0 if stride_on == "1x1" else 1
    convs, norms, _ = layer_names(prefix, layout)
    last = len(filters) - 1
    y = x
    for i, (width, kernel) in enumerate(zip(filters, kernels, strict=True)):
        y = conv(
            y,
            width,
            kernel,
            strides=strides if i == striding else (1, 1),
            groups=groups if len(filters) == 3 and i == 1 else 1,
            use_bias=use_bias,
            init=init,
            name=convs[i],
        )
        if i < last:
            y = norm(y, activation="relu", name=norms[i], kind=norm_kind)
    if relu_before_add or squeeze:
        last_relu = "relu" if relu_before_add else None
        y = norm(y, activation=last_relu, name=norms[last], kind=norm_kind)
        y = squeeze_and_excite(y, prefix, init) if squeeze else y
        y = keras.layers.Add(name=f"{prefix}_add")([y, shortcut])
        return keras.layers.ReLU(name=f"{prefix}_relu")(y)
    # Normalise, add the shortcut, ReLU: one layer, so that a backend can do it in one pass.
    return norm([y, shortcut], activation="relu", name=norms[last], kind=norm_kind)
