"""The forward pass of a torch state dict in plain NumPy: an independent check of every import.

Nothing here is shared with the layers, the blocks or the conversion: names and shapes are read
from the state dict alone, arrays stay NCHW and OIHW as torch keeps them, and a convolution is
im2col and one matrix product. Where this file and a Keras model agree, neither copied the other's
mistake. Sources: torchvision/models/resnet.py and alexnet.py; He et al. 2015 (arXiv:1512.03385),
section 4.2, option A for the CIFAR networks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from keras_resnet.system.errors import InputError
from keras_resnet.weights.numpy_ops import (
    adaptive_average_pool,
    average_pool,
    conv2d,
    max_pool,
    relu,
)
from keras_resnet.weights.reference_check import NORM_ENTRIES, check, shape_of

_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default, which every network here keeps
_BLOCK_KEY = re.compile(r"(layer|stage)([1-9]\d{0,5})\.(\d{1,6})\.")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a state dict's names and shapes say about its network.

    The family is `"resnet"` (torchvision's names), `"resnet_cifar"` (the same with a 3x3 stem),
    `"resnet_d"` (timm's names: three 3x3 in the stem, a pooled shortcut), any of these with squeeze
    and excitation (`se`) or group norms, `"resnet_v2"` (norms before convolutions;
    `"resnet_v2_keras"`: some biased), `"resnet_stage"` (stages named `stage1` ..., a ReLU before
    the addition as well), `"resnet_sequential"` (`longway`, `shortway`, biased convolutions),
    `"alexnet"` (torchvision's), `"alexnet_paper"` or `"alexnet_cifar10"`.
    """

    family: str
    block: Literal["basic", "bottleneck"] | None  # `None` for an AlexNet
    blocks: tuple[int, ...]  # residual blocks in each stage; empty for an AlexNet
    groups: int  # of the 3x3 convolutions (ResNeXt's cardinality)
    # Input channels of one group of the first stage's last 3x3 convolution: 64, 4 for `32x4d`, 128
    # for a wide ResNet-50-2, 16 for CIFAR; an AlexNet's first filters.
    width: int
    num_classes: int  # rows of the last fully connected layer
    in_channels: int  # of the images


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution, and what belongs to it: a bias, a batch norm, a max pooling behind it."""

    name: str
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = False
    norm: str | None = None
    pool: tuple[int, int, int] | None = None  # window, stride, padding
    around: float = -np.inf  # what is put around it for that
    before: str | None = None  # a norm, with a ReLU, of what it takes


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block."""

    branch: tuple[Conv, ...]
    shortcut: Conv | Literal["zero_padding"] | None  # `None`: an identity
    relu_before_add: bool
    pooled: int = 1  # stride of an average pooling before the shortcut's convolution
    squeeze: tuple[Conv, ...] = ()  # the two layers of squeeze and excitation


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network to run: convolutions in a row, then stages of blocks, then linear layers."""

    convs: tuple[Conv, ...]
    stages: dict[str, tuple[Block, ...]]
    linears: tuple[str, ...]
    norm_groups: int = 0  # of group norms; 0 is batch norm
    last_norm: str | None = None  # of the last stage's output, with a ReLU

    def every_conv(self) -> Iterator[Conv]:
        """All convolutions, those of the shortcuts behind their branches."""
        yield from self.convs
        for block in (block for stage in self.stages.values() for block in stage):
            yield from (*block.branch, *block.squeeze)
            if isinstance(block.shortcut, Conv):
                yield block.shortcut


def architecture(state: Mapping[str, np.ndarray]) -> Architecture:
    """Reads the architecture off a state dict's names, which may start with `module.`, and shapes.

    v1 and v1.5 (the stride on a bottleneck's 1x1 or 3x3) have the same shapes and are not told
    apart.

    Raises:
        InputError: The names are no ResNet's and no AlexNet's, an entry that the description
            needs is missing, or its rank is wrong.
    """
    return _describe(_entries(state))


def forward(
    state: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    stride_on: Literal["1x1", "3x3"] | None = None,
    dtype: type | np.dtype = np.float32,
) -> dict[str, np.ndarray]:
    """Runs the network of a state dict on images, in inference mode.

    Args:
        state: As `state_dict()` gives it. `num_batches_tracked` may be missing; half and bfloat16
            entries are widened.
        images: Floats `(n, channels, height, width)`, already normalised.
        stride_on: Which convolution of a bottleneck strides, which no shape tells: `"3x3"` (v1.5,
            torchvision) or `"1x1"` (v1); by default `"1x1"` for `"resnet_stage"`, else `"3x3"`.
        dtype: `np.float32`, or `np.float64` for a reference in double precision.

    Returns:
        Outputs in the order they are computed, by the module's name. ResNets: `"stem"` (after
        the max pooling, where there is one), the stages (`"layer1"` or `"stage1"` ...), `"pool"`
        `(n, channels)`, `"logits"` `(n, classes)`. AlexNets: `"features"`, `"pool"` (after the
        average pooling to 6x6, torchvision's only), `"logits"`.

    Raises:
        InputError: Keys are missing or unexpected, shapes do not fit each other, or the images
            have another rank, dtype or number of channels, or too few pixels.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise InputError(f"dtype must be np.float32 or np.float64. Received: {dtype.name}.")
    if stride_on not in ("1x1", "3x3", None):
        raise InputError(f"stride_on must be '1x1' (v1) or '3x3' (v1.5). Received: {stride_on!r}.")
    entries = _entries(state)
    found = _describe(entries)
    plan = _alexnet(found) if found.block is None else _resnet(found, entries, stride_on)
    check(plan, found, entries)
    x = _check_images(images, found).astype(dtype, copy=False)

    def weight(name: str) -> np.ndarray:
        return entries[name].astype(dtype, copy=False)

    def run(x: np.ndarray, conv: Conv) -> np.ndarray:
        return _conv_norm(x, conv, weight, plan.norm_groups)

    outputs = {}
    for conv in plan.convs:
        x = run(x, conv) if plan.last_norm else relu(run(x, conv))
        if conv.pool:
            x = max_pool(x, *conv.pool, where=f"{conv.name}'s pooling", around=conv.around)
    outputs["stem" if plan.stages else "features"] = x
    for name, blocks in plan.stages.items():
        for block in blocks:
            x = _residual(x, block, run)
        outputs[name] = x
    if plan.last_norm:
        x = relu(_normed(x.copy(), plan.last_norm, weight, plan.norm_groups))
    if plan.stages:
        x = outputs["pool"] = x.mean(axis=(2, 3))
    elif found.family == "alexnet":
        x = outputs["pool"] = adaptive_average_pool(x, 6)
    x = x.reshape(len(x), -1)
    for i, name in enumerate(plan.linears):
        if x.shape[1] != entries[f"{name}.weight"].shape[1]:
            raise InputError(
                f"{name!r} takes {entries[f'{name}.weight'].shape[1]} features and received "
                f"{x.shape[1]}: {found.family} has one image size (224, for CIFAR 32). Received: "
                f"{images.shape[2]}x{images.shape[3]}."
            )
        x = x @ weight(f"{name}.weight").T + weight(f"{name}.bias")
        if i < len(plan.linears) - 1:
            x = relu(x)
    outputs["logits"] = x
    return outputs


# --- Reading the architecture -------------------------------------------------------------------


def _entries(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict as arrays, without the prefixes of DataParallel and torch.compile."""
    entries = {str(name): np.asarray(value) for name, value in state.items()}
    for prefix in ("module.", "_orig_mod.", "module."):
        if entries and all(name.startswith(prefix) for name in entries):
            entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


def _describe(entries: dict[str, np.ndarray]) -> Architecture:
    if "features.0.weight" in entries:
        return _describe_alexnet(entries, "alexnet", "features.0", "classifier.6")
    if "conv2.0.weight" in entries or "fc1.1.weight" in entries:
        kernel = shape_of(entries, "conv1.0.weight", 4)[2]
        family = "alexnet_cifar10" if kernel == 3 else "alexnet_paper"
        return _describe_alexnet(entries, family, "conv1.0", "fc3.0")

    depths: dict[int, int] = {}
    found = [match for match in map(_BLOCK_KEY.match, entries) if match]
    for match in found:
        depths[int(match[2])] = max(depths.get(int(match[2]), 0), int(match[3]) + 1)
    # More blocks or stages than entries: a stray number in a name, not a network.
    if not found or max(*depths, *depths.values()) > len(entries):
        some = ", ".join(map(repr, sorted(entries)[:3])) or "nothing"
        raise InputError(
            "The names are no ResNet's ('layer1.0.conv1.weight') and no AlexNet's "
            f"('features.0.weight'). Received: {some} ..."
        )
    prefix = found[0][1]
    deep = "conv1.3.weight" in entries
    sequential = "conv1.0.weight" in entries and not deep
    stem = shape_of(entries, "conv1.0.weight" if sequential or deep else "conv1.weight", 4)
    if sequential:
        family, bottleneck = "resnet_sequential", False
        first, second = "layer1.0.0.longway.0.weight", "layer1.0.0.longway.3.weight"
    else:
        family = "resnet_stage" if prefix == "stage" else "resnet"
        family = "resnet_cifar" if stem[2] == 3 and prefix == "layer" else family
        family = "resnet_d" if deep else family
        if "bn.weight" in entries and "bn1.weight" not in entries:
            family = "resnet_v2_keras" if "conv1.bias" in entries else "resnet_v2"
        bottleneck = any(m.string[m.end() :] == "conv3.weight" for m in found)
        first, second = f"{prefix}1.0.conv1.weight", f"{prefix}1.0.conv2.weight"
    inner, width = shape_of(entries, first, 4)[0], shape_of(entries, second, 4)[1]
    return Architecture(
        family=family,
        block="bottleneck" if bottleneck else "basic",
        blocks=tuple(depths.get(stage, 1) for stage in range(1, max(depths) + 1)),
        groups=max(inner // width, 1),
        width=width,
        num_classes=shape_of(entries, f"{_head(entries)}.weight", 2)[0],
        in_channels=stem[1],
    )


def _describe_alexnet(entries, family: str, first: str, last: str) -> Architecture:
    filters, channels, _, _ = shape_of(entries, f"{first}.weight", 4)
    classes = shape_of(entries, f"{last}.weight", 2)[0]
    return Architecture(family, None, (), 1, filters, classes, channels)


def _head(entries: dict[str, np.ndarray]) -> str:
    return "linear" if "linear.weight" in entries else "fc"


# --- The plan: which convolutions, in which order, with which strides ----------------------------


def _alexnet(found: Architecture) -> Plan:
    if found.family == "alexnet":
        names = ("features.0", "features.3", "features.6", "features.8", "features.10")
        linears = ("classifier.1", "classifier.4", "classifier.6")
    else:
        names = ("conv1.0", "conv2.0", "conv3.0", "conv4.0", "conv5.0")
        linears = ("fc1.1", "fc2.0", "fc3.0")
    if found.family == "alexnet_cifar10":
        first, second, pool = (3, 1, 1), (3, 1, 1), (2, 2, 0)
    else:
        first, second, pool = (11, 4, 2), (5, 1, 2), (3, 2, 0)
    rows = (first, second, (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
    pools = (pool, pool, None, None, pool)
    layers = zip(names, rows, pools, strict=True)
    return Plan(tuple(Conv(n, *row, bias=True, pool=p) for n, row, p in layers), {}, linears)


def _resnet(found: Architecture, entries: dict[str, np.ndarray], stride_on: str | None) -> Plan:
    sequential = found.family == "resnet_sequential"
    v2, keras = found.family.startswith("resnet_v2"), found.family == "resnet_v2_keras"
    conv, norm = ("conv1.0", "conv1.1") if sequential else ("conv1", None if v2 else "bn1")
    if found.family == "resnet_d":
        stem = (
            Conv("conv1.0", 3, 2, 1, norm="conv1.1"),
            Conv("conv1.3", 3, 1, 1, norm="conv1.4"),
            Conv("conv1.6", 3, 1, 1, norm="bn1", pool=(3, 2, 1)),
        )
    elif entries[f"{conv}.weight"].shape[2] == 3:
        stem = (Conv(conv, 3, 1, 1, bias=sequential, norm=norm),)
    else:
        stem = (
            Conv(conv, 7, 2, 3, 1, sequential or keras, norm, (3, 2, 1), 0.0 if keras else -np.inf),
        )

    prefix = "stage" if found.family == "resnet_stage" else "layer"
    on_first = (stride_on or ("1x1" if prefix == "stage" else "3x3")) == "1x1"
    stages = {}
    for i, depth in enumerate(found.blocks):
        name, stride = f"{prefix}{i + 1}", 1 if i == 0 else 2
        striding = depth - 1 if keras else 0
        if keras:  # the last stage strides nowhere
            stride = 1 if i + 1 == len(found.blocks) else 2
        stages[name] = tuple(
            _sequential_block(name, j, stride)
            if sequential
            else _block(f"{name}.{j}", stride if j == striding else 1, found, entries, on_first)
            for j in range(depth)
        )
    # Of 32 groups, torch's and timm's default: the entries do not tell.
    groups = 0 if any(key.endswith(".running_mean") for key in entries) else 32
    return Plan(stem, stages, (_head(entries),), groups, "bn" if v2 else None)


def _block(name, stride: int, found: Architecture, entries, stride_on_first: bool) -> Block:
    """A block as torchvision names it: `conv1`, `bn1`, ..., `downsample.0`, `downsample.1`."""
    if found.family.startswith("resnet_v2"):
        return _v2_block(name, stride, found, entries)
    if found.block == "bottleneck":
        strides = (stride, 1, 1) if stride_on_first else (1, stride, 1)
        rows = zip((1, 3, 1), strides, (1, found.groups, 1), strict=True)
    else:
        rows = ((3, stride, 1), (3, 1, found.groups))
    branch = tuple(
        Conv(f"{name}.conv{k}", kernel, s, kernel // 2, groups, norm=f"{name}.bn{k}")
        for k, (kernel, s, groups) in enumerate(rows, start=1)
    )
    shortcut: Conv | str | None = None
    # The channels change where the last convolution writes others than the first one reads; a
    # convolution that is missing or of a wrong rank is reported by check.
    squeeze: tuple[Conv, ...] = ()
    if f"{name}.se.fc1.weight" in entries:
        squeeze = tuple(Conv(f"{name}.se.fc{i}", 1, bias=True) for i in (1, 2))
    first, last = (entries.get(f"{conv.name}.weight") for conv in (branch[0], branch[-1]))
    whole = first is not None and last is not None and first.ndim == last.ndim == 4
    if stride > 1 or (whole and first.shape[1] != last.shape[0]):
        projected = any(".downsample." in key for key in entries)
        if found.family == "resnet_cifar" and not projected:
            shortcut = "zero_padding"
        elif found.family == "resnet_d":  # downsample.0 is the pooling, or an identity
            shortcut = Conv(f"{name}.downsample.1", 1, norm=f"{name}.downsample.2")
            return Block(branch, shortcut, False, pooled=stride, squeeze=squeeze)
        else:
            shortcut = Conv(f"{name}.downsample.0", 1, stride, norm=f"{name}.downsample.1")
    return Block(branch, shortcut, found.family == "resnet_stage", squeeze=squeeze)


def _v2_block(name: str, stride: int, found: Architecture, entries) -> Block:
    """A block of He et al. 2016 (arXiv:1603.05027): norm, ReLU, convolution."""
    bottleneck, keras = found.block == "bottleneck", found.family == "resnet_v2_keras"
    rows = ((1, 1), (3, stride), (1, 1)) if bottleneck else ((3, stride), (3, 1))
    branch = tuple(
        Conv(f"{name}.conv{k}", kernel, s, kernel // 2, found.groups if k == 2 else 1,
             bias=keras and k == len(rows), before=f"{name}.bn{k}")
        for k, (kernel, s) in enumerate(rows, start=1)
    )  # fmt: skip
    first, last = (entries.get(f"{conv.name}.weight") for conv in (branch[0], branch[-1]))
    shortcut: Conv | str | None = "zero_padding" if stride > 1 else None  # every second pixel
    if getattr(first, "shape", (0, 0))[1] != getattr(last, "shape", (0,))[0]:
        shortcut = Conv(f"{name}.downsample.0", 1, stride, bias=keras, before=f"{name}.bn1")
    return Block(branch, shortcut, False)


def _sequential_block(stage: str, index: int, stride: int) -> Block:
    """A block whose modules stand in `longway` and `shortway`; a stage's first is wrapped once."""
    first = index == 0
    name = f"{stage}.0.0" if first else f"{stage}.{index}"
    strides = (stride if first else 1, 1)
    branch = tuple(
        Conv(f"{name}.longway.{i}", 3, s, 1, bias=True, norm=f"{name}.longway.{i + 1}")
        for i, s in zip((0, 3), strides, strict=True)
    )
    shortcut = Conv(f"{name}.shortway.0", 1, stride, bias=True) if first else None
    return Block(branch, shortcut, relu_before_add=True)


def _check_images(images: np.ndarray, found: Architecture) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1] != found.in_channels or len(images) == 0:
        raise InputError(
            f"images must have shape (n, {found.in_channels}, height, width), n at least 1. "
            f"Received: {images.shape}."
        )
    if images.dtype.kind != "f":
        raise InputError(
            f"images must be floating point and normalised. Received: {images.dtype.name}."
        )
    return images


# --- Arithmetic ----------------------------------------------------------------------------------


def _residual(x: np.ndarray, block: Block, run) -> np.ndarray:
    y, preactivated = x, block.branch[0].before is not None
    for i, conv in enumerate(block.branch):
        y = run(y, conv)
        if not preactivated and (i < len(block.branch) - 1 or block.relu_before_add):
            y = relu(y)
    if block.squeeze:
        first, second = block.squeeze
        gate = run(relu(run(y.mean(axis=(2, 3), keepdims=True), first)), second)
        y = y / (1 + np.exp(-gate))
    if isinstance(block.shortcut, Conv):
        x = average_pool(x, block.pooled) if block.pooled > 1 else x
        x = run(x, block.shortcut)
    elif block.shortcut == "zero_padding":
        # Every second pixel, and zero channels on both sides of the old ones (option A).
        side = (y.shape[1] - x.shape[1]) // 2
        x = np.pad(x[:, :, ::2, ::2], ((0, 0), (side, side), (0, 0), (0, 0)))
    y += x
    return y if preactivated else relu(y)


def _conv_norm(x: np.ndarray, conv: Conv, weight, norm_groups: int) -> np.ndarray:
    if conv.before:
        x = relu(_normed(x.copy(), conv.before, weight, norm_groups))
    kernel = weight(f"{conv.name}.weight")
    y = conv2d(x, kernel, conv.stride, conv.padding, conv.groups, conv.name)
    if conv.bias:
        y += weight(f"{conv.name}.bias")[:, None, None]
    return _normed(y, conv.norm, weight, norm_groups) if conv.norm else y


def _normed(y: np.ndarray, norm: str, weight, norm_groups: int) -> np.ndarray:
    """The norm of an array, which may be overwritten."""
    if norm_groups:
        gamma, beta = (weight(f"{norm}.{e}")[:, None, None] for e in NORM_ENTRIES[:2])
        parts = y.reshape(len(y), norm_groups, -1)
        mean, variance = (f(axis=2, keepdims=True) for f in (parts.mean, parts.var))
        parts = (parts - mean) / np.sqrt(variance + np.asarray(_EPSILON, y.dtype))
        return parts.reshape(y.shape) * gamma + beta
    gamma, beta, mean, variance = (weight(f"{norm}.{e}") for e in NORM_ENTRIES)
    scale = gamma / np.sqrt(variance + np.asarray(_EPSILON, variance.dtype))
    y *= scale[:, None, None]
    y += (beta - mean * scale)[:, None, None]
    return y
