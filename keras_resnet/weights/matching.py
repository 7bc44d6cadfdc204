"""What a row of the table holds and costs, and which row a state dict fits; needs no Keras."""

from __future__ import annotations

import math
from collections.abc import Mapping

from keras_resnet.variants import COUNTER, SPECS, AlexNetSpec, ResNetSpec, Shape


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
    return {
        f"{name.replace('_', '.')}.{suffix}": shape
        for name, entries, _ in spec.weighted_layers(num_classes, channels)
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
    return sum(
        side**2 * math.prod(entries["weight"])
        for _, entries, side in spec.weighted_layers(spec.num_classes, 3)
    )


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
