"""Every variant as one row: what distinguishes a ResNet-18 from a ResNeXt-101 is data, not code."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from keras_resnet.system.errors import InputError, did_you_mean, one_of

Shape = tuple[int, ...]
COUNTER = "num_batches_tracked"  # torch's own entry of a batch norm; it has no shape


def conv_output_size(size: int, kernel_size: int, strides: int = 1, padding: int = 0) -> int:
    """Side of a convolution's or a pooling's output: `floor((i - k + 2p) / s) + 1`.

    Args:
        size: Side of the input `i`, pixels.
        kernel_size: Side of the kernel or window `k`.
        strides: Stride `s`.
        padding: Zeros on each side `p`.

    Examples:
        >>> conv_output_size(224, 11, strides=4, padding=2)  # AlexNet's first convolution
        55
    """
    return (size - kernel_size + 2 * padding) // strides + 1


def layer_names(prefix: str, layout: str) -> tuple[list[str], list[str], list[str]]:
    """Names of a block's convolutions, norms and shortcut, as its reference implementation's."""
    one_of("layout", layout, ("torchvision", "sequential"))
    if layout == "torchvision":
        names = (
            [f"conv{i}" for i in (1, 2, 3)],
            [f"bn{i}" for i in (1, 2, 3)],
            ["downsample_0", "downsample_1", "downsample_2"],
        )
    else:
        names = (
            [f"longway_{i}" for i in (0, 3, 6)],
            [f"longway_{i}" for i in (1, 4, 7)],
            ["shortway_0", "shortway_1", "shortway_2"],
        )
    return tuple([f"{prefix}_{name}" for name in group] for group in names)


def _weight_and_bias(*shape: int, bias: bool = True) -> dict[str, Shape]:
    return {"weight": shape, "bias": shape[:1]} if bias else {"weight": shape}


def _norm(n: int, kind: str = "batch") -> dict[str, Shape]:
    if kind == "group":
        return dict.fromkeys(("weight", "bias"), (n,))
    names = ("weight", "bias", "running_mean", "running_var")
    return dict.fromkeys(names, (n,)) | {COUNTER: ()}


def squeezed(channels: int) -> int:
    """Channels between the two layers of squeeze and excitation: a 16th, in eights.

    timm/layers/squeeze_excite.py `SEModule`, layers/helpers.py `make_divisible`.
    """
    return max(8, int(channels / 16 + 4) // 8 * 8)


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """One ResNet variant.

    Attributes:
        name: The name in `create_model(name)`.
        blocks: Residual blocks in each stage.
        bottleneck: Three convolutions a block (1x1, 3x3, 1x1) instead of two 3x3.
        groups: Groups of a bottleneck's 3x3 convolution (ResNeXt's cardinality).
        width_per_group: Channels of a group in the first stage, torchvision's parameter.
        widths: Filters of each stage before the bottleneck's expansion by 4.
        stem: `"imagenet"` is 7x7 stride 2 and a 3x3 stride 2 max pooling, `"deep"` three 3x3 in
            place of the 7x7, `"tiered"` the same with fewer filters, `"cifar"` one 3x3.
        stride_on: Which convolution of a bottleneck strides: `"1x1"` (v1) or `"3x3"` (v1.5).
        shortcut: `"projection"` (1x1 and batch norm), `"pooled_projection"` (average pooling
            strides, then 1x1 and batch norm), `"zero_padding"` (He et al. option A) or
            `"bare_projection"` (a biased 1x1 without batch norm).
        project_first: A projection at the start of every stage, needed or not.
        use_bias: Biases on the convolutions; with `preactivation` on those that no norm follows.
        relu_before_add: A ReLU at the end of the residual branch, before the addition as well.
        squeeze: Squeeze and excitation at the end of the branch (Hu et al. 2017).
        norm: `"batch"`, or `"group"` for groups of channels in 32 (Wu and He 2018).
        preactivation: Norm and ReLU before each convolution, and behind the last stage (v2).
        of_keras: All stages but the last stride, in their last block, and the stem's max pooling
            is padded with zeros.
        stage_name: Prefix of the stages' names.
        layout: Module paths inside stem and blocks: `"torchvision"` or `"sequential"`.
        head: Name of the classification layer.
        init: Initialisation of the convolutions, see `blocks.initializers`.
        input_size: Height and width that the variant was designed for, pixels.
        num_classes: Classes of the data set that the variant was designed for.
        min_size: The smallest height and width that it takes, pixels.
        dropout: Rate of the dropout in the head.
        source: Where the variant is described.
        hidden: Only for those who know its name.
        family: The file in `models/` that builds it.
    """

    name: str
    blocks: tuple[int, ...]
    bottleneck: bool = False
    groups: int = 1
    width_per_group: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Literal["imagenet", "deep", "tiered", "cifar"] = "imagenet"
    stride_on: Literal["1x1", "3x3"] = "3x3"
    shortcut: Literal["projection", "pooled_projection", "zero_padding", "bare_projection"] = (
        "projection"
    )
    project_first: bool = False
    use_bias: bool = False
    relu_before_add: bool = False
    squeeze: bool = False
    norm: Literal["batch", "group"] = "batch"
    preactivation: bool = False
    of_keras: bool = False
    stage_name: str = "layer"
    layout: Literal["torchvision", "sequential"] = "torchvision"
    head: str = "fc"
    init: Literal["fan_out", "fan_in", "torch"] = "fan_out"
    input_size: int = 224
    num_classes: int = 1000
    min_size: int = 1
    dropout: float = 0.0
    source: str = "torchvision/models/resnet.py"
    hidden: bool = False
    family: ClassVar[str] = "resnet"

    def filters(self, stage: int) -> tuple[int, ...]:
        """Filters of the convolutions in a block of the stage (counted from 0)."""
        width = self.widths[stage]
        if not self.bottleneck:
            return (width, width)
        # torchvision/models/resnet.py, Bottleneck.__init__.
        inner = int(width * self.width_per_group / 64) * self.groups
        return (inner, inner, 4 * width)

    def strides(self, stage: int, block: int) -> int:
        """Stride of a block (both counted from 0)."""
        if self.of_keras:
            return 2 if block == self.blocks[stage] - 1 and stage < len(self.blocks) - 1 else 1
        return 2 if block == 0 and stage > 0 else 1

    @property
    def stem_filters(self) -> tuple[int, ...]:
        """Filters of the 3x3 convolutions of a deep stem before its last."""
        # timm/models/resnet.py, ResNet.__init__: stem_chs.
        half = self.widths[0] // 2
        return {"deep": (half, half), "tiered": (3 * (half // 4), half)}.get(self.stem, ())

    def weighted_layers(
        self, num_classes: int, channels: int = 3
    ) -> Iterator[tuple[str, dict[str, Shape], int]]:
        """The layers with weights, in torch's order: how a graph of this row must look.

        Gives a layer's name, its entries' shapes as torch has them, and the side of its output for
        an image of `input_size`: 1 for a fully connected layer, 0 for a batch norm, whose work is
        not counted.
        """
        kernel, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        first, last = ("conv1", "bn1") if self.layout == "torchvision" else ("conv1_0", "conv1_1")
        bias, width, side = self.use_bias, self.widths[0], self.input_size
        norm = functools.partial(_norm, kind=self.norm)
        for i, filters in enumerate(self.stem_filters):
            side = conv_output_size(side, 3, 1 if i else 2, 1)
            yield f"conv1_{3 * i}", _weight_and_bias(filters, channels, 3, 3, bias=bias), side
            yield f"conv1_{3 * i + 1}", norm(filters), 0
            channels, strides, first = filters, 1, "conv1_6"
        side = conv_output_size(side, kernel, strides, kernel // 2)
        yield first, _weight_and_bias(width, channels, kernel, kernel, bias=bias), side
        if not self.preactivation:
            yield last, norm(width), 0
        if self.stem != "cifar":
            side = conv_output_size(side, 3, 2, 1)  # the max pooling
        striding = 1 if self.bottleneck and self.stride_on == "3x3" else 0
        for stage, depth in enumerate(self.blocks):
            filters = self.filters(stage)
            kernels, groups = ((1, 3, 1), self.groups) if self.bottleneck else ((3, 3), 1)
            for block in range(depth):
                prefix = f"{self.stage_name}{stage + 1}_{block}"
                projects = block == 0 and (self.project_first or stage > 0 or width != filters[-1])
                if projects and self.layout == "sequential":
                    prefix += "_0"
                convs, norms, shortcut = layer_names(prefix, self.layout)
                fed = width
                for i, (out, kernel) in enumerate(zip(filters, kernels, strict=True)):
                    grouped = groups if i == 1 else 1
                    if i == striding:
                        step = self.strides(stage, block)
                        side = conv_output_size(side, kernel, step, kernel // 2)
                    if self.preactivation:
                        yield norms[i], norm(fed), 0
                    biased = bias and not (self.preactivation and i + 1 < len(filters))
                    weights = _weight_and_bias(out, fed // grouped, kernel, kernel, bias=biased)
                    yield convs[i], weights, side
                    if not self.preactivation:
                        yield norms[i], norm(out), 0
                    fed = out
                if self.squeeze:
                    inner = squeezed(fed)
                    yield f"{prefix}_se_fc1", _weight_and_bias(inner, fed, 1, 1), 1
                    yield f"{prefix}_se_fc2", _weight_and_bias(fed, inner, 1, 1), 1
                if projects and self.shortcut != "zero_padding":
                    bare = self.shortcut == "bare_projection"
                    weights = _weight_and_bias(filters[-1], width, 1, 1, bias=bias or bare)
                    at = 1 if self.shortcut == "pooled_projection" else 0  # behind the pooling
                    yield shortcut[at], weights, side
                    if not (bare or self.preactivation):
                        yield shortcut[at + 1], norm(filters[-1]), 0
                width = filters[-1]
        if self.preactivation:
            yield "bn", norm(width), 0
        yield self.head, _weight_and_bias(num_classes, width), 1


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution of an AlexNet, its ReLU, and the max pooling behind it, if any.

    Attributes:
        name: Layer name.
        filters: Output channels.
        kernel_size: Height and width of the kernel.
        strides: Stride in both directions.
        padding: Zeros added on every side.
        pool: `(window, stride)` of the max pooling, or `None`.
    """

    name: str
    filters: int
    kernel_size: int
    strides: int = 1
    padding: int = 0
    pool: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class AlexNetSpec:
    """One AlexNet variant.

    Attributes:
        name: The name in `create_model(name)`.
        convs: The convolutions.
        dense: Names of the three fully connected layers.
        dropout_before: Dropout before each hidden layer (torchvision) instead of behind it.
        adaptive: Average pooling to 6x6 in front of the head, so that any size can be fed.
        input_size: Height and width that the variant was designed for, pixels.
        num_classes: Classes of the data set that the variant was designed for.
        min_size: The smallest height and width that it takes, pixels.
        dropout: Rate of the dropout in the head.
        source: Where the variant is described.
        hidden: Only for those who know its name.
        family: The file in `models/` that builds it.
    """

    name: str
    convs: tuple[Conv, ...]
    dense: tuple[str, str, str]
    dropout_before: bool = False
    adaptive: bool = False
    input_size: int = 224
    num_classes: int = 1000
    min_size: int = 63
    dropout: float = 0.5
    source: str = "torchvision/models/alexnet.py"
    hidden: bool = False
    family: ClassVar[str] = "alexnet"

    @property
    def head(self) -> str:
        """Name of the classification layer."""
        return self.dense[-1]

    def weighted_layers(
        self, num_classes: int, channels: int = 3
    ) -> Iterator[tuple[str, dict[str, Shape], int]]:
        """The layers with weights; see `ResNetSpec.weighted_layers`."""
        side = self.input_size
        for row in self.convs:
            side = conv_output_size(side, row.kernel_size, row.strides, row.padding)
            weights = _weight_and_bias(row.filters, channels, row.kernel_size, row.kernel_size)
            yield row.name, weights, side
            side = conv_output_size(side, *row.pool) if row.pool else side
            channels = row.filters
        side = 6 if self.adaptive else side
        widths = (channels * side**2, 4096, 4096, num_classes)
        for name, fed, out in zip(self.dense, widths, widths[1:], strict=False):
            yield name, _weight_and_bias(out, fed), 1


def _cifar(depth: int) -> ResNetSpec:
    # He et al. 2015, section 4.2: 6n+2 layers, {16, 32, 64} filters, identity shortcuts in all
    # cases (option A). 20, 32, 44, 56, 110 are n = 3, 5, 7, 9, 18.
    return ResNetSpec(
        f"resnet{depth}",
        blocks=((depth - 2) // 6,) * 3,
        widths=(16, 32, 64),
        stem="cifar",
        shortcut="zero_padding",
        head="linear",
        init="fan_in",
        input_size=32,
        num_classes=10,
        source="He et al. 2015, arXiv:1512.03385, section 4.2",
    )


def _resnet_d(name: str, blocks: tuple[int, ...], **fields: Any) -> ResNetSpec:
    fields = {"bottleneck": True, "stem": "deep", **fields}
    source = "He et al. 2018, arXiv:1812.01187, figure 2 (ResNet-D); timm/models/resnet.py"
    return ResNetSpec(name, blocks, shortcut="pooled_projection", source=source, **fields)


def _v2(name: str, blocks: tuple[int, ...], **fields: Any) -> ResNetSpec:
    keras = {"use_bias": True, "of_keras": True} if "_v2" in name else {}
    source = "keras/src/applications/resnet.py" if keras else "timm/models/resnetv2.py"
    fields = {"bottleneck": True, "preactivation": True, **keras, **fields}
    return ResNetSpec(name, blocks, source=f"He et al. 2016, arXiv:1603.05027; {source}", **fields)


_SE = "Hu et al. 2017, arXiv:1709.01507; timm/models/resnet.py"
_GN = "Wu and He 2018, arXiv:1803.08494; timm/models/resnet.py"
_V1 = "He et al. 2015, arXiv:1512.03385, table 1 (stride on the first 1x1 of a bottleneck)"
_BOTTLENECK_50, _BOTTLENECK_101, _BOTTLENECK_152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)

SPECS: dict[str, ResNetSpec | AlexNetSpec] = {
    spec.name: spec
    for spec in (
        ResNetSpec("resnet18", (2, 2, 2, 2)),
        ResNetSpec("resnet34", (3, 4, 6, 3)),
        ResNetSpec("resnet50", _BOTTLENECK_50, bottleneck=True),
        ResNetSpec("resnet101", _BOTTLENECK_101, bottleneck=True),
        ResNetSpec("resnet152", _BOTTLENECK_152, bottleneck=True),
        ResNetSpec("resnext50_32x4d", _BOTTLENECK_50, True, groups=32, width_per_group=4),
        ResNetSpec("resnext101_32x8d", _BOTTLENECK_101, True, groups=32, width_per_group=8),
        ResNetSpec("resnext101_64x4d", _BOTTLENECK_101, True, groups=64, width_per_group=4),
        ResNetSpec("wide_resnet50_2", _BOTTLENECK_50, bottleneck=True, width_per_group=128),
        ResNetSpec("wide_resnet101_2", _BOTTLENECK_101, bottleneck=True, width_per_group=128),
        _resnet_d("resnet50d", _BOTTLENECK_50),
        _resnet_d("resnet18d", (2, 2, 2, 2), bottleneck=False),
        _resnet_d("resnet34d", (3, 4, 6, 3), bottleneck=False),
        _resnet_d("resnet26d", (2, 2, 2, 2)),
        _resnet_d("resnet101d", _BOTTLENECK_101),
        _resnet_d("resnet152d", _BOTTLENECK_152),
        _resnet_d("resnet10t", (1, 1, 1, 1), bottleneck=False, stem="tiered"),
        _resnet_d("resnet14t", (1, 1, 1, 1), stem="tiered"),
        _resnet_d("resnet26t", (2, 2, 2, 2), stem="tiered"),
        ResNetSpec("seresnet50", _BOTTLENECK_50, bottleneck=True, squeeze=True, source=_SE),
        ResNetSpec("seresnext50_32x4d", _BOTTLENECK_50, True, 32, 4, squeeze=True, source=_SE),
        ResNetSpec("resnet50_gn", _BOTTLENECK_50, True, norm="group", source=_GN),
        _v2("resnetv2_18", (2, 2, 2, 2), bottleneck=False),
        _v2("resnetv2_34", (3, 4, 6, 3), bottleneck=False),
        _v2("resnetv2_50", _BOTTLENECK_50),
        _v2("resnetv2_101", _BOTTLENECK_101),
        _v2("resnetv2_152", _BOTTLENECK_152),
        _v2("resnet50_v2", _BOTTLENECK_50),
        _v2("resnet101_v2", _BOTTLENECK_101),
        _v2("resnet152_v2", _BOTTLENECK_152),
        ResNetSpec("resnet50_v1", _BOTTLENECK_50, True, stride_on="1x1", source=_V1),
        ResNetSpec("resnet101_v1", _BOTTLENECK_101, True, stride_on="1x1", source=_V1),
        ResNetSpec("resnet152_v1", _BOTTLENECK_152, True, stride_on="1x1", source=_V1),
        ResNetSpec(
            "resnet50_v1_relu",
            _BOTTLENECK_50,
            bottleneck=True,
            stride_on="1x1",
            relu_before_add=True,
            stage_name="stage",
            init="torch",
            source="a common tutorial's ResNet-50: as v1, with a ReLU before the addition as well",
        ),
        _cifar(20),
        _cifar(32),
        _cifar(44),
        _cifar(56),
        _cifar(110),
        ResNetSpec(
            "resnet_tiny",
            blocks=(1, 1),
            widths=(8, 16),
            stem="cifar",
            input_size=16,
            num_classes=10,
            source="for tests: torchvision's names and blocks, 5,266 weights",
            hidden=True,
        ),
        ResNetSpec(
            "resnet34_cifar10",
            blocks=(3, 4, 6, 3),
            shortcut="bare_projection",
            project_first=True,
            use_bias=True,
            relu_before_add=True,
            layout="sequential",
            input_size=32,
            num_classes=10,
            source="a common tutorial's ResNet-34 for CIFAR-10, ImageNet stem and biases",
        ),
        AlexNetSpec(
            "alexnet",
            convs=(
                Conv("features_0", 64, 11, strides=4, padding=2, pool=(3, 2)),
                Conv("features_3", 192, 5, padding=2, pool=(3, 2)),
                Conv("features_6", 384, 3, padding=1),
                Conv("features_8", 256, 3, padding=1),
                Conv("features_10", 256, 3, padding=1, pool=(3, 2)),
            ),
            dense=("classifier_1", "classifier_4", "classifier_6"),
            dropout_before=True,
            adaptive=True,
        ),
        AlexNetSpec(
            "alexnet_paper",
            convs=(
                Conv("conv1_0", 96, 11, strides=4, padding=2, pool=(3, 2)),
                Conv("conv2_0", 256, 5, padding=2, pool=(3, 2)),
                Conv("conv3_0", 384, 3, padding=1),
                Conv("conv4_0", 384, 3, padding=1),
                Conv("conv5_0", 256, 3, padding=1, pool=(3, 2)),
            ),
            dense=("fc1_1", "fc2_0", "fc3_0"),
            source="Krizhevsky et al. 2012, section 3.5, without the split over two GPUs",
        ),
        AlexNetSpec(
            "alexnet_cifar10",
            convs=(
                Conv("conv1_0", 64, 3, padding=1, pool=(2, 2)),
                Conv("conv2_0", 256, 3, padding=1, pool=(2, 2)),
                Conv("conv3_0", 384, 3, padding=1),
                Conv("conv4_0", 256, 3, padding=1),
                Conv("conv5_0", 256, 3, padding=1, pool=(2, 2)),
            ),
            dense=("fc1_1", "fc2_0", "fc3_0"),
            input_size=32,
            num_classes=10,
            min_size=8,
            source="a common tutorial's AlexNet for CIFAR-10",
        ),
    )
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the variants that match a shell pattern, in the table's order.

    `"resnet_tiny"`, which is for tests, is listed where exactly that is asked for.

    Args:
        pattern: As in a shell: `*` and `?`; without either, a part of the name.

    Examples:
        >>> list_models("wide*")
        ['wide_resnet50_2', 'wide_resnet101_2']
    """
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    found = [name for name in SPECS if fnmatch.fnmatchcase(name, pattern.lower())]
    return [name for name in found if not SPECS[name].hidden or pattern == f"*{name}*"]


def get_spec(name: str) -> ResNetSpec | AlexNetSpec:
    """The row of a variant.

    Raises:
        InputError: The name is unknown; the message names near ones.
    """
    spec = SPECS.get(str(name).lower())
    if spec is None:
        hint = did_you_mean(name, SPECS) or " See kr.list_models() or `keras-resnet models`."
        raise InputError(f"Unknown model {name!r}.{hint}")
    return spec
