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

from keras_resnet.system.errors import InputError, one_of
from keras_resnet.weights import dialects
from keras_resnet.weights.matching import COUNTER, Shape
from keras_resnet.weights.writing import write_checkpoint

Head = Literal["strict", "skip", "replace"]

# --- The rule -----------------------------------------------------------------------------------

# Keras class -> what a module's entry is called in torch, which attribute holds it here, and the
# order of axes that turns Keras' array into torch's: HWIO -> OIHW, (in, out) -> (out, in).
_SAME = (0,)
_BIAS = ("bias", "bias", _SAME)
_AFFINE = (("weight", "gamma", _SAME), ("bias", "beta", _SAME))
_STATISTICS = (("running_mean", "moving_mean", _SAME), ("running_var", "moving_variance", _SAME))
_RULES: dict[type, tuple[tuple[str, str, tuple[int, ...]], ...]] = {
    keras.layers.Conv2D: (("weight", "kernel", (3, 2, 0, 1)), _BIAS),
    keras.layers.Dense: (("weight", "kernel", (1, 0)), _BIAS),
    keras.layers.BatchNormalization: (*_AFFINE, *_STATISTICS),
    keras.layers.GroupNormalization: _AFFINE,
}
KINDS = {0: "a number", 1: "a vector", 2: "a fully connected layer's", 4: "a convolution's"}

# Modules that the reference implementations register behind the branch that they bypass.
_SHORTCUTS = ("downsample", "shortway", "shortcut")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the state dict and the variable behind it (none: torch's batch counter)."""

    key: str
    shape: Shape  # as torch has it
    axes: tuple[int, ...] = ()
    variable: Any = None

    def to_keras(self, array: np.ndarray) -> np.ndarray:
        """A torch array with its axes as Keras has them, a view."""
        return array.transpose(np.argsort(self.axes))

    def to_torch(self) -> np.ndarray:
        """The variable's value as torch has it, a copy."""
        array = keras.ops.convert_to_numpy(self.variable.value)
        return np.ascontiguousarray(array.transpose(self.axes))


def module_path(layer: keras.layers.Layer) -> str:
    """The module's name in torch: the name is the mapping."""
    return layer.name.replace("_", ".")


def weighted_layers(model: keras.Model) -> Iterable[keras.layers.Layer]:
    """Layers with weights in the graph's order, those of models inside the model included."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from weighted_layers(layer)
        elif layer.weights:
            yield layer


def modules_of(model: keras.Model) -> dict[str, tuple[keras.layers.Layer, tuple[Entry, ...]]]:
    """Module path -> layer and entries, in the order of the reference implementation.

    Raises:
        InputError: A layer has weights for which there is no rule, or two share a name.
    """
    if not model.built:
        raise InputError(f"The model {model.name!r} has no weights yet: build it first.")
    modules = {}
    for layer in weighted_layers(model):
        path = module_path(layer)
        if path in modules and modules[path][0] is not layer:
            raise InputError(f"Two layers are called {layer.name!r}; give each its own name.")
        modules[path] = (layer, _entries(path, layer))
    return {path: modules[path] for path in _in_registration_order(modules)}


def _entries(path: str, layer: keras.layers.Layer) -> tuple[Entry, ...]:
    rule = next((names for kind, names in _RULES.items() if isinstance(layer, kind)), ())
    entries = []
    for suffix, attribute, axes in rule:
        variable = getattr(layer, attribute, None)
        if variable is not None:
            shape = tuple(int(variable.shape[axis]) for axis in axes)
            entries.append(Entry(f"{path}.{suffix}", shape, axes, variable))
    mapped = {id(entry.variable) for entry in entries}
    strange = [variable.name for variable in layer.weights if id(variable) not in mapped]
    if strange:
        raise InputError(
            f"Layer {layer.name!r} ({type(layer).__name__}) has weights without a counterpart in "
            f"torch: {', '.join(strange)}. Conv2D, Dense, BatchNormalization and "
            "GroupNormalization can be mapped."
        )
    if isinstance(layer, keras.layers.BatchNormalization):
        entries.append(Entry(f"{path}.{COUNTER}", ()))
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
        model: A built Keras model of Conv2D, Dense, norms of batches and groups, and layers without
            weights.

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
    return {e.key: e.shape for _, entries in modules_of(model).values() for e in entries}


def to_torchvision(model: keras.Model, to: str = "torchvision") -> dict[str, np.ndarray]:
    """The model's weights as a torch state dict.

    Args:
        model: A built Keras model; preprocessing layers and dropout are passed over.
        to: Whose names the entries get: `"torchvision"`, `"huggingface"`, `"sequential"`,
            `"detectron2"`, `"mmpretrain"` or `"timm"`.

    Returns:
        Key to C-contiguous array (a copy), in torch's order, of the variable's dtype. Keras counts
        no batches: `num_batches_tracked` is what an import found in the file, else 0.

    Raises:
        InputError: A layer has weights of an unknown kind, or those whose names are asked for have
            no such network.

    Examples:
        >>> x = keras.Input((8,))
        >>> state = to_torchvision(keras.Model(x, keras.layers.Dense(2, name="fc")(x)))
        >>> {key: array.shape for key, array in state.items()}
        {'fc.weight': (2, 8), 'fc.bias': (2,)}
    """
    counted, state = (info_of(model).get("weights") or {}).get(COUNTER) or 0, {}
    for path, (_, entries) in modules_of(model).items():
        for entry in entries:
            if entry.variable is None:
                count = counted.get(path, 0) if isinstance(counted, Mapping) else counted
                state[entry.key] = np.array(count, np.int64)
            else:
                state[entry.key] = entry.to_torch()
    return renamed(state, to)


def renamed(state: Mapping[str, np.ndarray], to: str) -> dict[str, np.ndarray]:
    """A state dict in torchvision's names, in those of another dialect."""
    one_of("to", to, dialects.WORDS)
    if to == "torchvision":
        return dict(state)
    shapes = {key: tuple(array.shape) for key, array in state.items()}
    dialect, names = dialects.names_in(to, shapes)
    out = {theirs: state[ours] for ours, theirs in names.items()}
    head = "head.fc.weight"
    return out | ({head: out[head][..., None, None]} if dialect.conv_head and head in out else {})


def save_torchvision(model: keras.Model, path: str | os.PathLike, to: str = "torchvision") -> None:
    """Writes the model's weights as a file that torch loads; torch is not needed.

    A `.pth` loads with `torch.load(path, weights_only=True)`, and either kind with
    `load_state_dict(strict=True)`. Variant and stride position stand in the file's metadata.

    Args:
        model: A built Keras model.
        path: Ends in `.pth`, `.pt`, `.th` or `.safetensors`; written whole or not at all.
        to: As for `to_torchvision`.

    Raises:
        InputError: As by `to_torchvision`.
        CheckpointError: Another ending, or the disk refused.
        NotFoundError: The folder does not exist.

    Examples:
        >>> import pathlib, tempfile
        >>> from keras_resnet import load_torchvision
        >>> x = keras.Input((8,))
        >>> model = keras.Model(x, keras.layers.Dense(2, name="fc")(x))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "head.pth"
        >>> save_torchvision(model, path)
        >>> load_torchvision(model, path).ok
        True
    """
    state = to_torchvision(model, to)
    metadata = {"format": "pt", "writer": "keras3-resnet"}
    if variant := info_of(model).get("variant"):
        metadata["variant"] = variant
    if strides := strides_of(convs_of(model)):
        metadata["stride_on"] = strides
    for warning in readers_differ(model.name, expected_keys(model), strides, to):
        warnings.warn(warning, stacklevel=2)
    write_checkpoint(path, state, metadata=metadata)


def readers_differ(
    label: str, shapes: Mapping[str, Shape], strides: str | None, to: str
) -> list[str]:
    """What those whose names are written take otherwise, unless they are told: in sentences."""
    dialect = None if to == "torchvision" else dialects.names_in(to, shapes)[0]
    known = dialect is not None or has_torchvisions_bottlenecks(shapes)
    usual, lines = dialect.strides if dialect else "3x3", []
    if strides and known and strides != usual:
        whose = dialect.of if dialect else "torchvision's model of these shapes"
        told = f" unless told otherwise ({dialect.told})" if dialect and dialect.told else ""
        lines.append(
            f"{label} strides on the {strides} convolutions. {whose} strides on the "
            f"{usual or 'other'} ones{told}: it will load the file without a word and answer "
            "differently."
        )
    if dialect and dialect.bgr:
        lines.append(
            f"{dialect.of} takes BGR pixels of 0..255 less {list(dialect.bgr)} unless told "
            "otherwise (INPUT.FORMAT, PIXEL_MEAN, PIXEL_STD in its config)."
        )
    return lines


def not_written(info: dict[str, Any]) -> list[str]:
    """What is known of a model and stands in no file of weights, in a sentence if there is any."""
    options, calibration = (info.get(key) or {} for key in ("options", "calibration"))
    knows = {
        "class names": info.get("class_names"),
        "how images are prepared": info.get("preprocess"),
        "that it normalises inside": options.get("include_preprocessing"),
        f"its task ({options.get('task')})": options.get("task"),
        "its temperature": calibration.get("temperature"),
        "its thresholds": calibration.get("thresholds"),
    }
    named = ", ".join(name for name, value in knows.items() if value)
    return [f"Not written, for a file of weights has no place for it: {named}."] if named else []


def info_of(model: keras.Model) -> dict[str, Any]:
    """A model's `info`; empty for one that is no `ImageModel`."""
    info = getattr(model, "info", None)
    return info if isinstance(info, dict) else {}


# --- Where a bottleneck strides: the one thing that no shape tells -------------------------------


def convs_of(model: keras.Model) -> dict[str, tuple[Shape, Shape]]:
    """Module path -> (kernel size, strides) of a Keras model's convolutions."""
    return {
        path: (tuple(layer.kernel_size), tuple(layer.strides))
        for path, (layer, _) in modules_of(model).items()
        if isinstance(layer, keras.layers.Conv2D)
    }


def convs_of_module(module) -> dict[str, tuple[Shape, Shape]]:
    """The same of a torch module."""
    return {
        path: (tuple(child.kernel_size), tuple(child.stride))
        for path, child in module.named_modules()
        if len(getattr(child, "kernel_size", ()) if hasattr(child, "out_channels") else ()) == 2
    }


def strides_of(convs: Mapping[str, tuple[Shape, Shape]]) -> str | None:
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


def has_torchvisions_bottlenecks(keys: Iterable[str]) -> bool:
    """Whether the names are those of torchvision's ResNet-50 and larger."""
    return "layer1.0.conv3.weight" in keys
