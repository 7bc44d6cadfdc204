"""torch's state dicts <-> Keras models: by rule, both ways, with a report and a proof.

A layer is named after its module path in the reference implementation, `.` written `_`; its type
says which entries the module has and how their axes are turned (`_RULES`). That is the whole
mapping, so it holds for every row of the table and for networks built with `conv_block` and
`identity_block` alike. An import is planned whole, checked, and only then carried out.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import keras
import numpy as np

from keras_resnet.errors import InputError
from keras_resnet.models.blocks import layer_names
from keras_resnet.variants import SPECS, AlexNetSpec, ResNetSpec, conv_output_size
from keras_resnet.weights.writing import write_checkpoint

Shape = tuple[int, ...]
Head = Literal["strict", "skip", "replace"]

# --- The rule -----------------------------------------------------------------------------------

# Keras class -> what a module's entry is called in torch, which attribute holds it here, and the
# order of axes that turns Keras' array into torch's: HWIO -> OIHW, (in, out) -> (out, in).
_RULES: tuple[tuple[type, str, tuple[tuple[str, str, tuple[int, ...]], ...]], ...] = (
    (
        keras.layers.Conv2D,
        "convolution",
        (("weight", "kernel", (3, 2, 0, 1)), ("bias", "bias", (0,))),
    ),
    (
        keras.layers.Dense,
        "fully connected layer",
        (("weight", "kernel", (1, 0)), ("bias", "bias", (0,))),
    ),
    (
        keras.layers.BatchNormalization,
        "batch norm",
        (
            ("weight", "gamma", (0,)),
            ("bias", "beta", (0,)),
            ("running_mean", "moving_mean", (0,)),
            ("running_var", "moving_variance", (0,)),
        ),
    ),
)
_COUNTER = "num_batches_tracked"
_KINDS = {0: "a number", 1: "a vector", 2: "a fully connected layer's", 4: "a convolution's"}

# Modules that the reference implementations register behind the branch that they bypass.
_SHORTCUTS = ("downsample", "shortway", "shortcut")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One entry of the state dict and the variable behind it (none: torch's batch counter)."""

    key: str
    shape: Shape  # as torch has it
    axes: tuple[int, ...] = ()
    variable: Any = None

    def to_keras(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(np.argsort(self.axes))

    def to_torch(self) -> np.ndarray:
        array = keras.ops.convert_to_numpy(self.variable.value)
        return np.ascontiguousarray(array.transpose(self.axes))


def _module_path(layer: keras.layers.Layer) -> str:
    return layer.name.replace("_", ".")


def _weighted_layers(model: keras.Model) -> Iterable[keras.layers.Layer]:
    """Layers with weights in the graph's order, those of models inside the model included."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _weighted_layers(layer)
        elif layer.weights:
            yield layer


def _modules(model: keras.Model) -> dict[str, tuple[keras.layers.Layer, tuple[_Entry, ...]]]:
    """Module path -> layer and entries, in the order of the reference implementation.

    Raises:
        InputError: A layer has weights for which there is no rule, or two share a name.
    """
    if not model.built:
        raise InputError(f"The model {model.name!r} has no weights yet: build it first.")
    modules = {}
    for layer in _weighted_layers(model):
        path = _module_path(layer)
        if path in modules and modules[path][0] is not layer:
            raise InputError(f"Two layers are called {layer.name!r}; give each its own name.")
        modules[path] = (layer, _entries(path, layer))
    return {path: modules[path] for path in _in_registration_order(modules)}


def _entries(path: str, layer: keras.layers.Layer) -> tuple[_Entry, ...]:
    rule = next((names for kind, _, names in _RULES if isinstance(layer, kind)), None)
    entries = []
    for suffix, attribute, axes in rule or ():
        variable = getattr(layer, attribute, None)
        if variable is not None:
            shape = tuple(int(variable.shape[axis]) for axis in axes)
            entries.append(_Entry(f"{path}.{suffix}", shape, axes, variable))
    mapped = {id(entry.variable) for entry in entries}
    strange = [variable.name for variable in layer.weights if id(variable) not in mapped]
    if strange:
        raise InputError(
            f"Layer {layer.name!r} ({type(layer).__name__}) has weights without a counterpart in "
            f"torch: {', '.join(strange)}. Conv2D, Dense and BatchNormalization can be mapped."
        )
    if isinstance(layer, keras.layers.BatchNormalization):
        entries.append(_Entry(f"{path}.{_COUNTER}", ()))
    return tuple(entries)


def _in_registration_order(paths: Iterable[str]) -> list[str]:
    """Sorts module paths as torch registers them: siblings together, shortcuts behind branches."""
    first: dict[tuple[str, ...], int] = {}
    for number, path in enumerate(paths):
        parts = tuple(path.split("."))
        for depth in range(len(parts)):
            first.setdefault(parts[: depth + 1], number)

    def rank(path: str):
        parts = tuple(path.split("."))
        return [(p in _SHORTCUTS, first[parts[: i + 1]]) for i, p in enumerate(parts)]

    return sorted(paths, key=rank)


def expected_keys(model: keras.Model) -> dict[str, Shape]:
    """The state dict that belongs to a model: keys and shapes, in torch's order.

    Args:
        model: A built Keras model of Conv2D, Dense, BatchNormalization and layers without weights.

    Returns:
        Key to shape as torch has it: kernels (out, in / groups, height, width), Linear (out, in).

    Raises:
        InputError: A layer has weights of an unknown kind, or two layers share a name.

    Examples:
        >>> x = keras.Input((8, 8, 3))
        >>> model = keras.Model(x, keras.layers.Conv2D(4, 3, name="stem_conv")(x))
        >>> expected_keys(model)
        {'stem.conv.weight': (4, 3, 3, 3), 'stem.conv.bias': (4,)}
    """
    return {e.key: e.shape for _, entries in _modules(model).values() for e in entries}


def to_torchvision(model: keras.Model) -> dict[str, np.ndarray]:
    """The model's weights as a torch state dict.

    Args:
        model: A built Keras model; preprocessing layers and dropout are passed over.

    Returns:
        Key to C-contiguous array (a copy), in torch's order, of the variable's dtype. Keras counts
        no batches: `num_batches_tracked` is what an import found in the file, else 0.

    Raises:
        InputError: A layer has weights of an unknown kind.

    Examples:
        >>> x = keras.Input((8,))
        >>> state = to_torchvision(keras.Model(x, keras.layers.Dense(2, name="fc")(x)))
        >>> {key: array.shape for key, array in state.items()}
        {'fc.weight': (2, 8), 'fc.bias': (2,)}
    """
    counted = _info(model).get("weights", {}).get(_COUNTER) or 0
    state = {}
    for path, (_, entries) in _modules(model).items():
        for entry in entries:
            if entry.variable is None:
                count = counted.get(path, 0) if isinstance(counted, Mapping) else counted
                state[entry.key] = np.array(count, np.int64)
            else:
                state[entry.key] = entry.to_torch()
    return state


def save_torchvision(model: keras.Model, path: str | os.PathLike) -> None:
    """Writes the model's weights as a file that torch loads; torch is not needed.

    A `.pth` loads with `torch.load(path, weights_only=True)`, and either kind with
    `load_state_dict(strict=True)`. Variant and stride position stand in the file's metadata.

    Args:
        model: A built Keras model.
        path: Ends in `.pth`, `.pt`, `.th` or `.safetensors`; written whole or not at all.

    Raises:
        InputError: A layer has weights of an unknown kind.
        CheckpointError: Another ending, or the disk refused.
        NotFoundError: The folder does not exist.

    Examples:
        >>> import tempfile
        >>> x = keras.Input((8,))
        >>> model = keras.Model(x, keras.layers.Dense(2, name="fc")(x))
        >>> path = Path(tempfile.mkdtemp()) / "head.pth"
        >>> save_torchvision(model, path)
        >>> load_torchvision(model, path).ok
        True
    """
    state = to_torchvision(model)
    metadata = {"format": "pt", "writer": "keras3-resnet"}
    if variant := _info(model).get("variant"):
        metadata["variant"] = variant
    if strides := _strides_of(_convs_of(model)):
        metadata["stride_on"] = strides
    if strides == "1x1" and _has_torchvisions_bottlenecks(state):
        warnings.warn(
            f"{model.name} strides on the 1x1 convolutions (v1). torchvision's model of these "
            "shapes strides on the 3x3 ones: it will load the file without a word and answer "
            "differently.",
            stacklevel=2,
        )
    write_checkpoint(path, state, metadata=metadata)


def _info(model: keras.Model) -> dict[str, Any]:
    info = getattr(model, "info", None)
    return info if isinstance(info, dict) else {}


# --- Where a bottleneck strides: the one thing that no shape tells -------------------------------


def _convs_of(model: keras.Model) -> dict[str, tuple[Shape, Shape]]:
    """Module path -> (kernel size, strides) of a Keras model's convolutions."""
    return {
        path: (tuple(layer.kernel_size), tuple(layer.strides))
        for path, (layer, _) in _modules(model).items()
        if isinstance(layer, keras.layers.Conv2D)
    }


def _convs_of_module(module) -> dict[str, tuple[Shape, Shape]]:
    """The same of a torch module."""
    return {
        path: (tuple(child.kernel_size), tuple(child.stride))
        for path, child in module.named_modules()
        if len(getattr(child, "kernel_size", ()) if hasattr(child, "out_channels") else ()) == 2
    }


def _strides_of(convs: Mapping[str, tuple[Shape, Shape]]) -> str | None:
    """`"1x1"` or `"3x3"`, by the bottlenecks that stride; both joined, or `None` without any."""
    branches: dict[str, list[tuple[Shape, Shape]]] = {}
    for path, conv in convs.items():
        branches.setdefault(path.rpartition(".")[0], []).append(conv)
    found = set()
    for branch in branches.values():
        kernels = [max(kernel) for kernel, _ in branch]
        if len(branch) == 3 and kernels[0] == kernels[2] == 1 < kernels[1]:
            for (_, strides), where in zip(branch, ("1x1", "3x3", "1x1"), strict=True):
                if max(strides) > 1:
                    found.add(where)
    return "+".join(sorted(found)) or None


def _has_torchvisions_bottlenecks(keys: Iterable[str]) -> bool:
    return "layer1.0.conv3.weight" in keys


# --- Which row of the table a state dict belongs to ----------------------------------------------


def spec_shapes(
    spec: ResNetSpec | AlexNetSpec, num_classes: int | None = None, channels: int = 3
) -> dict[str, Shape]:
    """The state dict of a row of the table: keys and shapes, in torch's order, without a model.

    Args:
        spec: The row.
        num_classes: Width of the last layer; by default that of the variant's data set.
        channels: Channels of the pictures.

    Examples:
        >>> shapes = spec_shapes(SPECS["resnet50"])
        >>> len(shapes), shapes["layer1.0.conv3.weight"]
        (320, (256, 64, 1, 1))
    """
    num_classes = num_classes or spec.num_classes
    rows = _alexnet_shapes if isinstance(spec, AlexNetSpec) else _resnet_shapes
    return {
        f"{name.replace('_', '.')}.{suffix}": shape
        for name, entries in rows(spec, num_classes, channels)
        for suffix, shape in entries.items()
    }


def _weight_and_bias(*shape: int, bias: bool = True) -> dict[str, Shape]:
    return {"weight": shape, "bias": shape[:1]} if bias else {"weight": shape}


def _norm(n: int) -> dict[str, Shape]:
    names = ("weight", "bias", "running_mean", "running_var")
    return dict.fromkeys(names, (n,)) | {_COUNTER: ()}


def _resnet_shapes(spec: ResNetSpec, num_classes: int, channels: int):
    side, bias = (7 if spec.stem == "imagenet" else 3), spec.use_bias
    conv, norm = ("conv1", "bn1") if spec.layout == "torchvision" else ("conv1_0", "conv1_1")
    width = spec.widths[0]
    yield conv, _weight_and_bias(width, channels, side, side, bias=bias)
    yield norm, _norm(width)
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
                yield convs[i], _weight_and_bias(out, fed // grouped, kernel, kernel, bias=bias)
                yield norms[i], _norm(out)
                fed = out
            if projects and spec.shortcut != "zero_padding":
                bare = spec.shortcut == "bare_projection"
                yield shortcut[0], _weight_and_bias(filters[-1], width, 1, 1, bias=bias or bare)
                if not bare:
                    yield shortcut[1], _norm(filters[-1])
            width = filters[-1]
    yield spec.head, _weight_and_bias(num_classes, width)


def _alexnet_shapes(spec: AlexNetSpec, num_classes: int, channels: int):
    side = spec.input_size
    for row in spec.convs:
        yield row.name, _weight_and_bias(row.filters, channels, row.kernel_size, row.kernel_size)
        side = conv_output_size(side, row.kernel_size, row.strides, row.padding)
        side = conv_output_size(side, *row.pool) if row.pool else side
        channels = row.filters
    side = 6 if spec.adaptive else side
    widths = (channels * side**2, 4096, 4096, num_classes)
    for name, fed, out in zip(spec.dense, widths, widths[1:], strict=False):
        yield name, _weight_and_bias(out, fed)


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
    shapes = {k: tuple(v) for k, v in shapes.items() if not k.endswith(_COUNTER)}
    found = []
    for spec in SPECS.values():
        head = f"{spec.head.replace('_', '.')}"
        weight = shapes.get(f"{head}.weight")
        stem = next(iter(spec_shapes(spec)))
        if len(shapes.get(stem, ())) != 4 or (weight is not None and len(weight) != 2):
            continue
        rows = spec_shapes(spec, weight[0] if weight else None, shapes[stem][1])
        rows = {k: v for k, v in rows.items() if not k.endswith(_COUNTER)}
        if weight is None:
            dense = [n.replace("_", ".") for n in getattr(spec, "dense", (spec.head,))]
            rows = {k: v for k, v in rows.items() if k.rpartition(".")[0] not in dense}
        if rows == shapes:
            found.append((spec.name, weight[0] if weight else None))
    return found


def _fit(shapes: Mapping[str, Shape]) -> str:
    found = matching_variants(shapes)
    if not found:
        return "it fits no model of kr.list_models()"
    classes = f"{found[0][1]} classes" if found[0][1] else "without a head"
    return f"it fits {' and '.join(name for name, _ in found)} ({classes})"
