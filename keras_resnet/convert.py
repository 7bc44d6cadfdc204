"""torch's state dicts <-> Keras models: by rule, both ways, with a report and a proof.

A layer is named after its module path in the reference implementation, `.` written `_`; its type
says which entries the module has and how their axes are turned (`_RULES`). That is the whole
mapping, so it holds for every row of the table and for networks built with `conv_block` and
`identity_block` alike. An import is planned whole, checked, and only then carried out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_resnet import hub, reference
from keras_resnet.blocks import layer_names
from keras_resnet.checkpoint import (
    PREFIXES,
    WRAPPERS,
    inspect_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from keras_resnet.errors import InputError
from keras_resnet.files import printable, write_text
from keras_resnet.specs import SPECS, AlexNetSpec, ResNetSpec, conv_output_size

__all__ = [
    "LoadReport",
    "VerifyReport",
    "expected_keys",
    "load_torchvision",
    "matching_variants",
    "save_torchvision",
    "spec_shapes",
    "to_torchvision",
    "verify",
]

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


# --- Reading a source ---------------------------------------------------------------------------


@dataclasses.dataclass
class _Source:
    """A state dict as arrays, and what is known about where it comes from."""

    label: str
    tensors: dict[str, np.ndarray]
    kind: str
    dtypes: dict[str, str]
    sha256: str | None = None
    key: str = ""
    prefix: str = ""
    strides: str | None = None
    strides_from: str = ""
    published: hub.TorchvisionWeights | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: tuple(array.shape) for key, array in self.tensors.items()}


def _read_source(source, key: str | None, expected: Iterable[str], variant: str | None) -> _Source:
    if isinstance(source, _Source):
        return source
    if isinstance(source, str) and hub.is_tag(source) and not os.path.exists(source):
        if variant is None:
            raise InputError(f"weights={source!r} needs a model made by kr.create_model.")
        source = hub.weights_path(hub.resolve_weights(variant, source))
    if isinstance(source, str | os.PathLike):
        if hub.is_quantised(Path(source).name):
            raise InputError(
                f"{Path(source).name} is one of torchvision's files quantised to 8 bits, which "
                "cannot be imported. Use the float weights, such as weights='DEFAULT'."
            )
        found = _from_file(Path(source).expanduser(), key)
    elif isinstance(source, Mapping):
        found = _from_mapping(source, key)
    elif callable(getattr(source, "state_dict", None)):
        found = _from_module(source)
    else:
        raise InputError(
            "Weights come from a path, a dict of arrays or a torch module. Received: "
            f"{type(source).__name__}."
        )
    if not found.tensors:
        raise InputError(f"{found.label} holds no tensors.")
    _strip_common_prefix(found, expected)
    return found


def _from_file(path: Path, key: str | None) -> _Source:
    about = inspect_checkpoint(path, key)
    tensors = read_checkpoint(path, key)
    sha256 = hub.file_sha256(path)
    published = hub.published_by_torchvision(sha256)
    strides, known_from = about.metadata.get("stride_on"), "the file's metadata"
    if published is not None:
        strides, known_from = "3x3", "torchvision published the file"
    return _Source(
        label=printable(path.name),
        tensors=tensors,
        kind=about.format,
        dtypes={k: dtype for k, (_, dtype) in about.tensors.items()},
        sha256=sha256,
        key=about.key,
        prefix=about.prefix,
        strides=strides if strides in ("1x1", "3x3") else None,
        strides_from=known_from,
        published=published,
    )


def _from_mapping(source: Mapping[str, Any], key: str | None) -> _Source:
    path = []
    for part in key.split(".") if key else ():
        if not isinstance(source, Mapping) or part not in source:
            raise InputError(f"The dict has no entry {key!r}; it holds {_few(map(str, source))}.")
        source = source[part]
        path.append(part)
    while not key and not any(_is_tensor(value) for value in source.values()):
        part = next((w for w in WRAPPERS if isinstance(source.get(w), Mapping)), None)
        if part is None:
            break
        source = source[part]
        path.append(part)
    if not isinstance(source, Mapping):
        raise InputError(f"The dict's entry {key!r} is a {type(source).__name__}, not a dict.")
    values = {str(k): v for k, v in source.items() if _is_tensor(v) and k != "n_averaged"}
    tensors = {k: _as_array(k, v) for k, v in values.items()}
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in values.items()}
    return _Source("a state dict", tensors, "dict", dtypes, key=".".join(path))


def _from_module(module) -> _Source:
    found = _from_mapping(module.state_dict(), None)
    found.label, found.kind = f"the module {type(module).__name__}", "module"
    convs = _convs_of_module(module) if hasattr(module, "named_modules") else {}
    found.strides, found.strides_from = _strides_of(convs), "the module's convolutions"
    return found


def _is_tensor(value) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _as_array(key: str, value) -> np.ndarray:
    """A NumPy array of another library's, from any device; not a copy where that can be."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            # NumPy has no bfloat16; float32 holds every one of its values.
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
            return value.numpy()
        return np.asarray(value)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{key!r} cannot be read as a plain array: {reason}") from error


def _strip_common_prefix(source: _Source, expected: Iterable[str]) -> None:
    """Takes away what all names begin with and the model's do not: `module.`, `model.`, ..."""
    expected = {key.partition(".")[0] for key in expected}
    while True:
        first = {key.partition(".")[0] for key in source.tensors}
        whole = all("." in key for key in source.tensors)
        if not whole or len(first) != 1 or (name := first.pop()) in expected:
            return
        known = f"{name}." in PREFIXES
        inner = {key.split(".")[1] for key in source.tensors}
        if not known and not inner & expected:
            return
        cut = len(name) + 1
        source.prefix += f"{name}."
        source.tensors = {key[cut:]: array for key, array in source.tensors.items()}
        source.dtypes = {key[cut:]: dtype for key, dtype in source.dtypes.items()}


# --- The report ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What an import did, or why it was not done; `print` it.

    Shapes are torch's.

    Attributes:
        model: The model's name.
        source: The file's name, `"a state dict"`, or the module's class.
        format: `"zip"`, `"stream"`, `"tar"`, `"safetensors"`, `"dict"` or `"module"`.
        sha256: Of the file, 64 hex digits; `None` where there is no file.
        key: The entry that was read, where a file nests several.
        prefix: What was taken away from the front of every name.
        head: As asked for.
        variants: Rows of the table that the source fits, with the number of classes.
        loaded: Key to shape.
        missing: Key to shape of what the model wants and the source lacks.
        unexpected: Key to shape of what the source has and the model does not want.
        mismatched: Key to (the source's shape, the model's shape, or a reason).
        skipped: Key to shape of the head's entries that were left out.
        cast: Key to (the source's dtype, the model's).
        done: Whether anything was assigned; if not, `loaded` is what would have fitted.
        verification: The proof, where it was asked for.
    """

    model: str
    source: str
    format: str
    sha256: str | None = None
    key: str = ""
    prefix: str = ""
    head: Head = "strict"
    variants: tuple[tuple[str, int | None], ...] = ()
    loaded: dict[str, Shape] = dataclasses.field(default_factory=dict)
    missing: dict[str, Shape] = dataclasses.field(default_factory=dict)
    unexpected: dict[str, Shape] = dataclasses.field(default_factory=dict)
    mismatched: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, Shape] = dataclasses.field(default_factory=dict)
    cast: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    done: bool = False
    verification: VerifyReport | None = None

    @property
    def ok(self) -> bool:
        """Every entry of either side has its counterpart, or was left out as asked."""
        return not (self.missing or self.unexpected or self.mismatched)

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The report as JSON text, written to `path` as well where one is given."""
        proof = self.verification and json.loads(self.verification.to_json())
        facts = {**dataclasses.asdict(self), "ok": self.ok, "verification": proof}
        return _to_json(facts, path)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [
            f"{self.source} -> {self.model}: {len(self.loaded)} of {total} entries "
            + ("loaded" if self.done else "fit, nothing was loaded")
        ]
        if self.done and self.head != "strict" and self.skipped:
            how = "drawn anew" if self.head == "replace" else "left as it was"
            lines[0] += f", the head {how}"
        facts = [self.format, f"sha256 {self.sha256[:8]}..." if self.sha256 else "",
                 f"entry {printable(self.key)!r}" if self.key else "",
                 f"prefix {printable(self.prefix)!r} removed" if self.prefix else ""]  # fmt: skip
        lines.append("  from         " + ", ".join(fact for fact in facts if fact))
        for (before, after), count in _counted(self.cast.values()):
            lines.append(f"  cast         {count} entries, {before} -> {after}")
        for name in ("missing", "unexpected", "skipped", "mismatched"):
            lines += _listed(name, getattr(self, name))
        if self.verification is not None:
            lines += str(self.verification).split("\n")
        return "\n".join(lines)


def _to_json(value: dict[str, Any], path) -> str:
    text = json.dumps(value, indent=2)
    if path is not None:
        write_text(path, text + "\n")
    return text


def _counted(values: Iterable) -> list[tuple[Any, int]]:
    values = list(values)
    return [(value, values.count(value)) for value in sorted(set(values))]


def _listed(name: str, entries: Mapping[str, Any], limit: int = 4) -> list[str]:
    if not entries:
        return []
    lines = []
    for key in sorted(entries)[:limit]:
        shown = entries[key]
        if name == "mismatched":
            shown = f"source {shown[0]}, model {shown[1]}"
        lines.append(f"  {name if not lines else '':<12} {printable(key)}  {shown}")
    if len(entries) > limit:
        lines.append(f"  {'':<12} and {len(entries) - limit} more {name}")
    return lines


def _few(names: Iterable[str], limit: int = 3) -> str:
    names = [printable(name) for name in sorted(names)]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- Import -------------------------------------------------------------------------------------


def load_torchvision(
    model: keras.Model,
    source: str | os.PathLike | Mapping[str, Any] | Any,
    *,
    head: Head = "strict",
    strict: bool = True,
    key: str | None = None,
    verify: bool = False,
    allow_other_strides: bool = False,
) -> LoadReport:
    """Loads a torch state dict into a Keras model, or leaves the model exactly as it was.

    Names, kinds and shapes are compared first, all of them; then everything is assigned.

    Args:
        model: A model of this package, one built with its blocks, or any Functional model of
            Conv2D, Dense and BatchNormalization whose layers are named after the modules.
        source: A checkpoint's path (see `read_checkpoint`), a state dict of NumPy arrays or torch
            tensors, a torch module, or one of torchvision's tags (`"DEFAULT"`) where the model
            comes from `create_model`.
        head: `"strict"` loads the last layer like any other. `"skip"` loads all but the head: the
            model's own last layer stays as it is, for a model with other classes or without a
            head. `"replace"` loads all but the head too, which the source must have, and draws the
            model's last layer anew from its initializers, even where the shapes agree.
        strict: With `False`, missing and unexpected entries are reported and no error. Entries of
            another shape always are.
        key: Which entry of a nested checkpoint to read, such as `"model_ema"`.
        verify: Run `verify` afterwards; where it fails the old weights come back.
        allow_other_strides: Load into a model whose bottlenecks stride elsewhere than the
            source's do, or seem to. torchvision's stride on the 3x3 (v1.5), and their weights
            give wrong answers in a v1 model, whose shapes are the same. Needed for weights of a
            v1 model whose origin does not show.

    Returns:
        What was loaded, missing, unexpected, skipped and cast. In a model of this package
        `info["weights"]` says the same in short, and a file that torchvision published brings its
        preprocessing and class names.

    Raises:
        InputError: The source does not fit (the error's `report` has every key), or a layer has
            weights of an unknown kind.
        CheckpointError: The file cannot be read, or is refused.
        NotFoundError: There is no such file.

    Examples:
        >>> x = keras.Input((8,))
        >>> model = keras.Model(x, keras.layers.Dense(2, name="fc")(x), name="tiny")
        >>> state = {"module.fc.weight": np.ones((2, 8)), "module.fc.bias": np.zeros(2)}
        >>> print(load_torchvision(model, state))
        a state dict -> tiny: 2 of 2 entries loaded
          from         dict, prefix 'module.' removed
          cast         2 entries, float64 -> float32
    """
    if head not in ("strict", "skip", "replace"):
        raise InputError(f"head must be 'strict', 'skip' or 'replace', not {head!r}.")
    modules = _modules(model)
    entries = {e.key: e for _, group in modules.values() for e in group}
    found = _read_source(source, key, entries, _info(model).get("variant"))
    own_head = _own_head(model)
    if head == "replace" and own_head is None:
        raise InputError(f"{model.name} has no fully connected layer whose head to replace.")
    report = _plan(model.name, found, entries, own_head, head)
    problem = _problem(report, found, own_head, entries, strict)
    if problem is None and not allow_other_strides:
        problem = _stride_problem(model, found)
    if problem is not None:
        error = InputError(problem)
        error.report = report
        raise error

    assignments = [
        (entries[k].variable, entries[k].to_keras(found.tensors[k]))
        for k in report.loaded
        if entries[k].variable is not None
    ]
    if head == "replace":
        assignments += _fresh(modules[own_head][0])
    old = []
    try:
        _assign(assignments, old)
        if verify:
            proof = _verify(model, found, head=head == "strict")
            report = dataclasses.replace(report, verification=proof)
            if not proof.passed:
                error = InputError(
                    f"{found.label} was loaded into {model.name}, but they answer differently "
                    f"from {proof.first_difference!r} on; the old weights were put back."
                )
                error.report = report
                raise error
    except BaseException:
        for variable, value in old:
            variable.assign(value)
        raise
    report = dataclasses.replace(report, done=True)
    _remember(model, report, found, modules)
    return report


def _own_head(model: keras.Model) -> str | None:
    """Module path of the last fully connected layer in the graph."""
    dense = [x for x in _weighted_layers(model) if isinstance(x, keras.layers.Dense)]
    return _module_path(dense[-1]) if dense else None


def _plan(name, found: _Source, entries: Mapping[str, _Entry], own_head, head) -> LoadReport:
    loaded, missing, unexpected, mismatched, skipped, cast = ({} for _ in range(6))
    shapes = found.shapes
    for key, entry in entries.items():
        module = key.rpartition(".")[0]
        if module == own_head and (head == "skip" or (head == "replace" and key in shapes)):
            skipped[key] = shapes.get(key, entry.shape)
        elif key not in shapes:
            if entry.variable is not None:  # files before torch 0.4.1 count no batches
                missing[key] = entry.shape
        elif shapes[key] != entry.shape:
            mismatched[key] = (_described(shapes[key], entry.shape),
                               _described(entry.shape, shapes[key]))  # fmt: skip
        elif entry.variable is None:
            loaded[key] = entry.shape
        elif not keras.backend.is_float_dtype(found.dtypes[key]):
            mismatched[key] = (found.dtypes[key], str(entry.variable.dtype))
        else:
            loaded[key] = entry.shape
            if found.dtypes[key] != str(entry.variable.dtype):
                cast[key] = (found.dtypes[key], str(entry.variable.dtype))
    linear = {k.rpartition(".")[0] for k, v in shapes.items()
              if k.endswith(".weight") and len(v) == 2}  # fmt: skip
    for key in sorted(set(shapes) - set(entries)):
        module, _, suffix = key.rpartition(".")
        if head == "skip" and module in linear:
            skipped[key] = shapes[key]
        elif suffix != _COUNTER:
            unexpected[key] = shapes[key]
    return LoadReport(
        name, found.label, found.kind, found.sha256, found.key, found.prefix, head,
        tuple(matching_variants(shapes)), loaded, missing, unexpected, mismatched, skipped, cast,
    )  # fmt: skip


def _described(shape: Shape, other: Shape) -> Shape | str:
    """The shape, with its kind where that differs too."""
    if len(shape) == len(other):
        return shape
    return f"{shape}, {_KINDS.get(len(shape), 'of another kind')}"


def _problem(report: LoadReport, found: _Source, own_head, entries, strict: bool) -> str | None:
    """One line that says why the source does not fit, or None."""
    if not report.mismatched and (not strict or report.ok):
        if report.loaded:
            return None
        return f"{found.label} and {report.model} have no entry in common: {_few(found.tensors)}."
    head_alone = set(report.mismatched) <= {f"{own_head}.weight", f"{own_head}.bias"}
    if head_alone and not report.missing and not report.unexpected and own_head:
        theirs, own = found.shapes[f"{own_head}.weight"], entries[f"{own_head}.weight"].shape
        if len(theirs) == 2 and theirs[0] != own[0] and theirs[1] == own[1]:
            return (
                f"{found.label} has {theirs[0]} classes, {report.model} has {own[0]}: "
                'load_torchvision(model, source, head="skip") loads all but the last layer.'
            )
    sides = []
    for name in ("missing", "unexpected"):
        if keys := getattr(report, name):
            sides.append(f"{len(keys)} {name} ({_few(keys)})")
    if report.mismatched:
        first = sorted(report.mismatched)[0]
        theirs, own = report.mismatched[first]
        sides.append(
            f"{len(report.mismatched)} of another shape or kind ({printable(first)}: source "
            f"{theirs}, model {own})"
        )
    hint = ""
    if not report.mismatched and not report.missing and own_head is None:
        hint = ' head="skip" leaves out the head.'
    return (
        f"{found.label} does not fit {report.model}: {_fit(found.shapes)}. "
        f"Entries: {', '.join(sides)}.{hint}"
    )


def _stride_problem(model: keras.Model, found: _Source) -> str | None:
    own = _strides_of(_convs_of(model))
    if own is None or own == found.strides:
        return None
    if found.strides is not None:
        said = f"strides on the {found.strides} convolutions ({found.strides_from})"
    elif own == "3x3" or not _has_torchvisions_bottlenecks(found.tensors):
        return None
    else:
        said = "looks like torchvision's, whose bottlenecks stride on the 3x3 convolutions (v1.5)"
    fits = [n for n, _ in matching_variants(found.shapes)
            if getattr(SPECS[n], "stride_on", None) == (found.strides or "3x3")]  # fmt: skip
    use = f"use {' or '.join(fits)}" if fits else "use a model with the same strides"
    return (
        f"{found.label} {said}, {model.name} strides on the {own}: the shapes are the same, the "
        f"answers would be wrong. Either {use}, or pass allow_other_strides=True if the weights "
        "were trained in a model like this one."
    )


def _fresh(layer: keras.layers.Dense) -> list[tuple[Any, Any]]:
    """New values for a head, from its own initializers."""
    pairs = [(layer.kernel, layer.kernel_initializer), (layer.bias, layer.bias_initializer)]
    return [
        (variable, keras.ops.convert_to_numpy(_reseeded(draw)(variable.shape, variable.dtype)))
        for variable, draw in pairs
        if variable is not None
    ]


def _reseeded(initializer):
    """An initializer gives the same numbers at every call; its copy has a seed of its own."""
    return type(initializer).from_config(initializer.get_config())


def _assign(assignments: list[tuple[Any, np.ndarray]], old: list[tuple[Any, np.ndarray]]) -> None:
    """Assigns each value, having put the variable's own onto `old` first."""
    for variable, value in assignments:
        old.append((variable, keras.ops.convert_to_numpy(variable.value)))
        variable.assign(value)


def _remember(model: keras.Model, report: LoadReport, found: _Source, modules) -> None:
    """Writes the weights' origin into the model's info, where it has one."""
    if not isinstance(getattr(model, "info", None), dict):
        return
    counts = {
        path: int(found.tensors[f"{path}.{_COUNTER}"])
        for path in modules
        if f"{path}.{_COUNTER}" in report.loaded
    }
    same = len(set(counts.values())) == 1 and all(
        f"{path}.{_COUNTER}" in report.loaded
        for path, (layer, _) in modules.items()
        if isinstance(layer, keras.layers.BatchNormalization)
    )
    published = found.published
    model.info["weights"] = {
        "source": found.label,
        "sha256": found.sha256,
        "format": found.kind,
        "key": found.key,
        "prefix": found.prefix,
        "head": report.head,
        "loaded": len(report.loaded),
        "missing": sorted(report.missing),
        "unexpected": sorted(report.unexpected),
        "cast": {f"{a} -> {b}": n for (a, b), n in _counted(report.cast.values())},
        "published_as": published and f"{published.model} {published.tag}".strip(),
        _COUNTER: (next(iter(counts.values())) if same else counts) if counts else None,
    }
    if published is None:
        return
    model.info["preprocess"] = published.preprocess.get_config()
    if report.head == "strict" and _own_head(model) is not None:
        model.info["class_names"] = hub.imagenet_class_names()


# --- Proof --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """How far a model is from the NumPy witness of its weights; `print` it.

    Attributes:
        model: The model's name.
        source: Where the weights come from.
        backend: Keras' backend that ran.
        images: Shape of the pictures that the model was given.
        stages: `(name, shape as torch has it, error)` in the network's order; the error is the
            largest difference over the witness's largest magnitude.
        tolerance: The largest error that passes.
        first_difference: The first stage above it, or `None`.
        head_compared: Whether the logits are among the stages.
        strides: Where the witness's bottlenecks stride, and how that is known.
        seconds: Time that the witness took.
    """

    model: str
    source: str
    backend: str
    images: Shape
    stages: tuple[tuple[str, Shape, float], ...]
    tolerance: float
    first_difference: str | None
    head_compared: bool
    strides: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Every stage agrees."""
        return bool(self.stages) and self.first_difference is None

    @property
    def error(self) -> float:
        """The largest of the stages' errors (NaN where any is)."""
        return float(np.max([error for _, _, error in self.stages]))

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The report as JSON text, written to `path` as well where one is given."""
        facts = {**dataclasses.asdict(self), "passed": self.passed}
        facts["stages"] = [
            # JSON knows neither NaN nor infinity.
            {"name": n, "shape": s, "error": e if np.isfinite(e) else str(e)}
            for n, s, e in self.stages
        ]
        return _to_json(facts, path)

    def __str__(self) -> str:
        verdict = (
            f"agrees to {self.error:.1e}"
            if self.passed
            else f"DIFFERS from {self.first_difference!r} on"
        )
        lines = [
            f"{self.model} on {self.backend} and {self.source} in NumPy: {verdict} (largest "
            f"relative difference, tolerance {self.tolerance:.0e})"
        ]
        width = max(len(str(shape)) for _, shape, _ in self.stages)
        for name, shape, error in self.stages:
            mark = "" if error <= self.tolerance else "  <-- differs"
            lines.append(f"  {name:<12} {shape!s:<{width}}  {error:.1e}{mark}")
        if not self.head_compared:
            lines.append("  logits       not compared: the model has no head, or one of its own")
        if self.strides:
            lines.append(f"  strides      {self.strides}")
        return "\n".join(lines)


def verify(
    model: keras.Model,
    source: str | os.PathLike | Mapping[str, Any] | Any,
    *,
    image_size: int | tuple[int, int] | None = None,
    images: np.ndarray | None = None,
    tolerance: float = 1e-4,
    key: str | None = None,
    stride_on: Literal["1x1", "3x3"] | None = None,
) -> VerifyReport:
    """Compares a model with the forward pass of a state dict in plain NumPy, stage by stage.

    The witness (`keras_resnet.reference`) reads the network off the state dict and shares no code
    with the layers, the blocks or the conversion.

    Args:
        model: A model of this package's architectures, on any backend, with any head.
        source: As for `load_torchvision`.
        image_size: Side of the random pictures, or (height, width), where the model leaves it
            open; by default the variant's.
        images: Pictures to use in place of random ones, as the model takes them.
        tolerance: Largest difference over largest magnitude that passes.
        key: Which entry of a nested checkpoint to read.
        stride_on: Where the source's bottlenecks stride. By default what is known of the source:
            torchvision's files `"3x3"`, a file written here says it, a module shows it; of
            unknown ones the model's own is taken, and the report says so.

    Returns:
        The stages' errors; `passed`, and where they first part.

    Raises:
        InputError: The state dict is of no known architecture, or pictures do not fit.
        CheckpointError: The file cannot be read, or is refused.

    Examples:
        >>> from keras_resnet.zoo import create_model
        >>> model = create_model("resnet20")
        >>> verify(model, to_torchvision(model)).passed
        True
    """
    if stride_on not in (None, "1x1", "3x3"):
        raise InputError(f"stride_on must be '1x1' or '3x3', not {stride_on!r}.")
    found = _read_source(source, key, expected_keys(model), _info(model).get("variant"))
    if stride_on is not None:
        found.strides, found.strides_from = stride_on, "as asked"
    own_head = _info(model).get("weights", {}).get("head", "strict") != "strict"
    return _verify(
        model, found, head=not own_head, image_size=image_size, images=images, tolerance=tolerance
    )


def _verify(
    model, found: _Source, *, head: bool, image_size=None, images=None, tolerance=1e-4
) -> VerifyReport:
    name, model = model.name, _network(model)
    tensors = _stage_tensors(model)
    network_input = tensors.pop("input")
    raw = network_input is not model.inputs[0]
    images = _test_images(model, image_size, raw) if images is None else np.asarray(images)
    own_head = _own_head(model)
    if not head or found.shapes.get(f"{own_head}.weight") != expected_keys(model).get(
        f"{own_head}.weight"
    ):
        tensors.pop("logits", None)
    inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
    taps = keras.Model(inputs, [*tensors.values(), *([network_input] if raw else [])])
    # One run alone: jax compiles a whole network faster than its single operations, TensorFlow
    # runs them sooner than it traces the whole.
    eager = keras.backend.backend() == "tensorflow"
    outputs = taps(images, training=False) if eager else taps.predict_on_batch(images)
    outputs = keras.tree.flatten(outputs)
    outputs = [_as_torch_has_it(model, output) for output in outputs]
    fed = outputs.pop() if raw else _as_torch_has_it(model, images)

    own = _strides_of(_convs_of(model))
    strides, why = found.strides, found.strides_from
    if own is None:
        strides, why = None, ""
    elif strides is None:
        strides, why = own, "the model's; the source does not say"
    started = time.perf_counter()
    state = _witness_state(found, model, tensors)
    known = strides if strides in ("1x1", "3x3") else None
    witness = reference.forward(state, fed, stride_on=known)
    seconds = time.perf_counter() - started
    if "logits" in tensors:
        activation = getattr(_modules(model)[own_head][0], "activation", None)
        if activation not in (None, keras.activations.linear):
            logits = keras.ops.convert_to_tensor(witness["logits"])
            witness["logits"] = keras.ops.convert_to_numpy(activation(logits))

    stages = tuple(
        (stage, tuple(witness[stage].shape), _relative_error(output, witness[stage]))
        for stage, output in zip(tensors, outputs, strict=True)
        if stage in witness and (stage != "pool" or output.ndim == witness[stage].ndim)
    )
    if not stages:
        raise InputError(f"{name} has no stage that the witness computes too.")
    return VerifyReport(
        model=name,
        source=found.label,
        backend=keras.backend.backend(),
        images=tuple(images.shape),
        stages=stages,
        tolerance=float(tolerance),
        # Not `error > tolerance`: a NaN must not pass.
        first_difference=next((n for n, _, e in stages if not e <= tolerance), None),
        head_compared=any(stage == "logits" for stage, _, _ in stages),
        strides=f"on the {strides} ({why})" if strides else "",
        seconds=round(seconds, 3),
    )


def _network(model: keras.Model) -> keras.Model:
    """The model itself, or the one inside it (a backbone under a new head) that convolves."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            return _network(layer)
        if layer.weights:
            break
    return model


def _stage_tensors(model: keras.Model) -> dict[str, Any]:
    """What the witness computes too, by its names, and the network's `input`."""
    tensors = {"input": next(iter(_weighted_layers(model))).input}
    for layer in model.layers:
        stage = re.match(r"((?:layer|stage)\d+)_", layer.name)
        if stage and "stem" not in tensors:
            tensors["stem"] = layer.input
        if stage:
            tensors[stage[1]] = layer.output
    if "stem" not in tensors:
        pools = [x for x in model.layers if isinstance(x, keras.layers.MaxPooling2D)]
        if pools:
            tensors["features"] = pools[-1].output
    for layer in model.layers:
        if layer.name == "avgpool":
            tensors["pool"] = layer.output
    if _own_head(model) is not None:
        tensors["logits"] = model.outputs[0]
    return tensors


def _channels_last(model: keras.Model) -> bool:
    first = next(iter(_weighted_layers(model)))
    return getattr(first, "data_format", "channels_last") == "channels_last"


def _as_torch_has_it(model: keras.Model, value) -> np.ndarray:
    array = np.asarray(keras.ops.convert_to_numpy(value), np.float32)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 and _channels_last(model) else array


def _test_images(model: keras.Model, image_size, raw: bool) -> np.ndarray:
    """Random pictures: pixel values where the model prepares them, else normal deviates."""
    last = _channels_last(model)
    sides = list(model.input_shape[1:3] if last else model.input_shape[2:4])
    spec = SPECS.get(_info(model).get("variant"))
    asked = (image_size, image_size) if isinstance(image_size, int) else image_size
    for i, side in enumerate(sides):
        wanted = asked[i] if asked else side or (spec.input_size if spec else 224)
        if side not in (None, wanted):
            raise InputError(f"{model.name} takes pictures of {sides}, not of {asked}.")
        sides[i] = wanted
    channels = model.input_shape[3 if last else 1]
    shape = (1, *sides, channels) if last else (1, channels, *sides)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, shape) if raw else random.standard_normal(shape)
    return pixels.astype(np.float32)


def _witness_state(found: _Source, model: keras.Model, tensors) -> dict[str, np.ndarray]:
    """The source's entries that the model has too, with a head, which the witness insists on."""
    expected, own_head = expected_keys(model), _own_head(model)
    linear = [k for k, v in found.shapes.items() if len(v) == 2 and k.endswith(".weight")]
    heads = {k.rpartition(".")[0] for k in linear}
    state = {
        k: v for k, v in found.tensors.items() if k in expected or k.rpartition(".")[0] in heads
    }
    if not linear and "stem" in tensors:
        stages = [t for name, t in tensors.items() if re.match(r"layer|stage", name)]
        width = stages[-1].shape[3 if _channels_last(model) else 1]
        name = own_head if own_head in ("fc", "linear") else "fc"
        state[f"{name}.weight"] = np.zeros((1, width), np.float32)
        state[f"{name}.bias"] = np.zeros(1, np.float32)
    return state


def _relative_error(ours: np.ndarray, witness: np.ndarray) -> float:
    if ours.shape != witness.shape:
        return float("inf")
    difference, size = float(np.max(np.abs(ours - witness))), float(np.max(np.abs(witness)))
    if difference == 0:
        return 0.0
    return difference / size if size else float("inf")
