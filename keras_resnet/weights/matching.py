"""What a row of the table holds and costs, and which row a state dict fits; needs no Keras."""

from __future__ import annotations

import math
from collections.abc import Mapping

from keras_resnet.variants import SPECS, AlexNetSpec, ResNetSpec, conv_output_size, layer_names

Shape = tuple[int, ...]
COUNTER = "num_batches_tracked"


def spec_shapes(
    spec: ResNetSpec | AlexNetSpec, num_classes: int | None = None, channels: int = 3
) -> dict[str, Shape]:
    """The state dict of a row of the table: keys and shapes, in torch's order, without a model.

    Args:
        spec: The row.
        num_classes: Width of the last layer; by default that of the variant's data set.
        channels: Channels of the images.

    Examples:
        >>> shapes = spec_shapes(SPECS["resnet50"])
        >>> len(shapes), shapes["layer1.0.conv3.weight"]
        (320, (256, 64, 1, 1))
    """
    num_classes = num_classes or spec.num_classes
    rows = _alexnet_shapes if isinstance(spec, AlexNetSpec) else _resnet_shapes
    return {
        f"{name.replace('_', '.')}.{suffix}": shape
        for name, entries, _ in rows(spec, num_classes, channels)
        for suffix, shape in entries.items()
    }


def parameter_count(spec: ResNetSpec | AlexNetSpec) -> int:
    """Trainable parameters of a row of the table, with its data set's number of classes.

    Examples:
        >>> parameter_count(SPECS["resnet18"])
        11689512
    """
    trained = (s for k, s in spec_shapes(spec).items() if k.endswith((".weight", ".bias")))
    return sum(map(math.prod, trained))


def multiply_adds(spec: ResNetSpec | AlexNetSpec) -> int:
    """Multiply-adds of one image at a row's own size; what `count_flops` counts in a built model.

    Examples:
        >>> multiply_adds(SPECS["resnet18"])
        1814073344
    """
    rows = _alexnet_shapes if isinstance(spec, AlexNetSpec) else _resnet_shapes
    return sum(
        side**2 * math.prod(entries["weight"])
        for _, entries, side in rows(spec, spec.num_classes, 3)
    )


def _weight_and_bias(*shape: int, bias: bool = True) -> dict[str, Shape]:
    return {"weight": shape, "bias": shape[:1]} if bias else {"weight": shape}


def _norm(n: int) -> dict[str, Shape]:
    names = ("weight", "bias", "running_mean", "running_var")
    return dict.fromkeys(names, (n,)) | {COUNTER: ()}


# Both give a layer's name, its entries, and the side of its output: 1 for a fully connected layer,
# 0 for a batch norm, whose work is not counted.


def _resnet_shapes(spec: ResNetSpec, num_classes: int, channels: int):
    kernel, strides = (7, 2) if spec.stem == "imagenet" else (3, 1)
    side, bias = conv_output_size(spec.input_size, kernel, strides, kernel // 2), spec.use_bias
    conv, norm = ("conv1", "bn1") if spec.layout == "torchvision" else ("conv1_0", "conv1_1")
    width = spec.widths[0]
    yield conv, _weight_and_bias(width, channels, kernel, kernel, bias=bias), side
    yield norm, _norm(width), 0
    if spec.stem == "imagenet":
        side = conv_output_size(side, 3, 2, 1)  # the max pooling
    striding = 1 if spec.bottleneck and spec.stride_on == "3x3" else 0
    for stage, depth in enumerate(spec.blocks):
        filters = spec.filters(stage)
        kernels, groups = ((1, 3, 1), spec.groups) if spec.bottleneck else ((3, 3), 1)
        for block in range(depth):
            prefix = f"{spec.stage_name}{stage + 1}_{block}"
            projects = block == 0 and (spec.project_first or stage > 0 or width != filters[-1])
            if projects and spec.layout == "sequential":
                prefix += "_0"
            convs, norms, shortcut = layer_names(prefix, spec.layout)
            fed = width
            for i, (out, kernel) in enumerate(zip(filters, kernels, strict=True)):
                grouped = groups if i == 1 else 1
                if i == striding and stage > 0 and block == 0:
                    side = conv_output_size(side, kernel, 2, kernel // 2)
                weights = _weight_and_bias(out, fed // grouped, kernel, kernel, bias=bias)
                yield convs[i], weights, side
                yield norms[i], _norm(out), 0
                fed = out
            if projects and spec.shortcut != "zero_padding":
                bare = spec.shortcut == "bare_projection"
                weights = _weight_and_bias(filters[-1], width, 1, 1, bias=bias or bare)
                yield shortcut[0], weights, side
                if not bare:
                    yield shortcut[1], _norm(filters[-1]), 0
            width = filters[-1]
    yield spec.head, _weight_and_bias(num_classes, width), 1


def _alexnet_shapes(spec: AlexNetSpec, num_classes: int, channels: int):
    side = spec.input_size
    for row in spec.convs:
        side = conv_output_size(side, row.kernel_size, row.strides, row.padding)
        weights = _weight_and_bias(row.filters, channels, row.kernel_size, row.kernel_size)
        yield row.name, weights, side
        side = conv_output_size(side, *row.pool) if row.pool else side
        channels = row.filters
    side = 6 if spec.adaptive else side
    widths = (channels * side**2, 4096, 4096, num_classes)
    for name, fed, out in zip(spec.dense, widths, widths[1:], strict=False):
        yield name, _weight_and_bias(out, fed), 1


def matching_variants(shapes: Mapping[str, Shape]) -> list[tuple[str, int | None]]:
    """The rows of the table that a state dict fits, by its keys and shapes.

    The number of classes and of input channels is free, a head may be absent, and
    `num_batches_tracked` does not count. Rows that differ in strides alone are all listed.

    Args:
        shapes: Key to shape as torch has it.

    Returns:
        `(variant, number of classes)`, the number `None` without a head, in the table's order.

    Examples:
        >>> matching_variants(spec_shapes(SPECS["resnet50"], num_classes=5))
        [('resnet50', 5), ('resnet50_v1', 5)]
    """
    shapes = {k: tuple(v) for k, v in shapes.items() if not k.endswith(COUNTER)}
    found = []
    for spec in SPECS.values():
        head = f"{spec.head.replace('_', '.')}"
        weight = shapes.get(f"{head}.weight")
        stem = next(iter(spec_shapes(spec)))
        if len(shapes.get(stem, ())) != 4 or (weight is not None and len(weight) != 2):
            continue
        rows = spec_shapes(spec, weight[0] if weight else None, shapes[stem][1])
        rows = {k: v for k, v in rows.items() if not k.endswith(COUNTER)}
        if weight is None:
            dense = [n.replace("_", ".") for n in getattr(spec, "dense", (spec.head,))]
            rows = {k: v for k, v in rows.items() if k.rpartition(".")[0] not in dense}
        if rows == shapes:
            found.append((spec.name, weight[0] if weight else None))
    return found


def fit(shapes: Mapping[str, Shape]) -> str:
    """What a state dict fits, for a message."""
    found = matching_variants(shapes)
    if not found:
        return "it fits no model of kr.list_models()"
    classes = f"{found[0][1]} classes" if found[0][1] else "without a head"
    return f"it fits {' and '.join(name for name, _ in found)} ({classes})"
