"""What a model costs: output shape, parameters, multiply-adds and memory, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import keras

from keras_resnet.models.blocks import channel_axis
from keras_resnet.models.image_model import as_functional
from keras_resnet.system.errors import InputError
from keras_resnet.system.files import printable

_MIB = 1024**2


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer: its name, class, output shape without the batch, parameters, multiply-adds."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    params: int
    flops: int


@dataclasses.dataclass(frozen=True)
class ModelSummary:
    """A model's layers and totals, for one image; `print` it for the table.

    Attributes:
        name: The model's name.
        input_shape: Shape of an image.
        rows: The layers in order.
        trainable_params: Weights that an optimizer changes.
        non_trainable_params: Frozen weights and batch-norm statistics.
        bytes_per_value: Size of a number in the model's compute type.
    """

    name: str
    input_shape: tuple[int, ...]
    rows: tuple[LayerRow, ...]
    trainable_params: int
    non_trainable_params: int
    bytes_per_value: int

    @property
    def flops(self) -> int:
        """Multiply-adds of one image."""
        return sum(row.flops for row in self.rows)

    @property
    def input_mib(self) -> float:
        """Memory of the input, MiB."""
        return math.prod(self.input_shape) * self.bytes_per_value / _MIB

    @property
    def features_mib(self) -> float:
        """Memory of every layer's output and of its gradient, MiB."""
        values = sum(math.prod(row.output_shape) for row in self.rows)
        return 2 * values * self.bytes_per_value / _MIB

    @property
    def params_mib(self) -> float:
        """Memory of all weights, in float32, MiB."""
        return (self.trainable_params + self.non_trainable_params) * 4 / _MIB

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        kind = max(len(row.kind) for row in self.rows)
        shapes = [str(list(row.output_shape)) for row in self.rows]
        shape = max(12, *map(len, shapes))
        title = (
            f"{'Layer':{width}}  {'Type':{kind}}  {'Output shape':>{shape}}  "
            f"{'Params':>11}  {'M mult-adds':>11}  {'MiB':>7}"
        )
        lines = [f"{self.name}, input {list(self.input_shape)}", "-" * len(title), title]
        lines.append("=" * len(title))
        for row, text in zip(self.rows, shapes, strict=True):
            mib = math.prod(row.output_shape) * self.bytes_per_value / _MIB
            lines.append(
                f"{row.name:{width}}  {row.kind:{kind}}  {text:>{shape}}  {row.params:>11,}  "
                f"{row.flops / 1e6:>11,.1f}  {mib:>7.2f}"
            )
        sizes = {"Input": self.input_mib, "Forward/backward pass": self.features_mib,
                 "Params": self.params_mib}  # fmt: skip
        lines += [
            "=" * len(title),
            f"Total params: {self.trainable_params + self.non_trainable_params:,}",
            f"Trainable params: {self.trainable_params:,}",
            f"Non-trainable params: {self.non_trainable_params:,}",
            f"Multiply-adds: {self.flops / 1e9:.3f} G",
            "-" * len(title),
            *(f"{what} size (MiB): {mib:.2f}" for what, mib in sizes.items()),
            f"Estimated total size (MiB): {sum(sizes.values()):.2f}",
        ]
        return "\n".join(lines)


def summary(model: keras.Model, input_size: int | Sequence[int] | None = None) -> ModelSummary:
    """Lists a model's layers with output shapes, parameters, multiply-adds and memory.

    Args:
        model: A Functional or Sequential model whose layers each have one output.
        input_size: Side, or height and width, in pixels; by default the model's own.

    Returns:
        The summary; `str()` of it is a table for a batch of one.

    Raises:
        InputError: The model takes any size and `input_size` is not given.

    Examples:
        >>> from keras_resnet import create_model
        >>> summary(create_model("resnet18")).trainable_params
        11689512
    """
    model = as_functional(model)
    shape = _input_shape(model, input_size)
    return ModelSummary(
        printable(model.name),
        shape[1:],
        tuple(_rows(model, shape)),
        sum(math.prod(w.shape) for w in model.trainable_weights),
        sum(math.prod(w.shape) for w in model.non_trainable_weights if "seed" not in w.path),
        2 if "16" in model.dtype_policy.compute_dtype else 4,
    )


def _rows(model: keras.Model, shape: tuple) -> list[LayerRow]:
    """The layers in order; those of a model inside stand in its place."""
    shapes: dict[int, tuple] = {}  # by the tensor
    rows: list[LayerRow] = []
    counted: set[int] = set()  # a layer called twice has its weights once
    place = {id(layer): i for i, layer in enumerate(model.layers)}
    for depth in sorted(model._nodes_by_depth, reverse=True):
        nodes = model._nodes_by_depth[depth]
        for node in sorted(nodes, key=lambda n: place.get(id(n.operation), len(place))):
            layer = node.operation
            if node.is_input:
                shapes[id(node.outputs[0])] = shape
                continue
            given = [shapes[id(tensor)] for tensor in node.input_tensors]
            out = _output_shape(node, shapes)
            shapes[id(node.outputs[0])] = out
            inner = as_functional(layer, strict=False) if isinstance(layer, keras.Model) else None
            if inner is not None:
                rows += _rows(inner, given[0])
            elif isinstance(layer, keras.Layer):
                params = 0 if id(layer) in counted else layer.count_params()
                name, kind = printable(layer.name), type(layer).__name__
                rows.append(LayerRow(name, kind, out[1:], params, _flops(layer, out)))
            counted.add(id(layer))
    return rows


def _output_shape(node, shapes: dict[int, tuple]) -> tuple[int, ...]:
    """The shape that a layer or operation gives for these."""
    given = [shapes[id(tensor)] for tensor in node.input_tensors]
    if isinstance(node.operation, keras.Layer):
        return tuple(node.operation.compute_output_shape(given[0] if len(given) == 1 else given))

    def sized(value):
        known = isinstance(value, keras.KerasTensor)
        return keras.KerasTensor(shapes[id(value)], value.dtype) if known else value

    args, kwargs = keras.tree.map_structure(sized, (node.arguments.args, node.arguments.kwargs))
    return tuple(node.operation.compute_output_spec(*args, **kwargs).shape)


def _input_shape(model: keras.Model, input_size) -> tuple[int, ...]:
    shape = [1, *model.input_shape[1:]]
    if input_size is not None:
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        shape[slice(1, 3) if channel_axis() == 3 else slice(2, 4)] = size
    if None in shape:
        raise InputError(f"{model.name} takes images of any size: say which, input_size=224.")
    return tuple(shape)


def _flops(layer: keras.layers.Layer, output_shape) -> int:
    if isinstance(layer, keras.layers.Conv2D):
        return math.prod(output_shape[1:]) * math.prod(layer.kernel.shape[:3])
    if isinstance(layer, keras.layers.Dense):
        return math.prod(output_shape[1:]) * layer.kernel.shape[0]
    return 0


def count_flops(model: keras.Model, input_size: int | Sequence[int] | None = None) -> int:
    """Multiply-adds of one image's forward pass, in convolutions and dense layers.

    This is what torchvision's table and the papers call FLOPs: half the arithmetic operations.

    Args:
        model: A model of this package, or any Functional or Sequential one of such layers.
        input_size: Side, or height and width, in pixels; needed where the model's are `None`.

    Returns:
        The number of multiply-adds for a batch of one.

    Raises:
        InputError: The model takes any size and `input_size` is not given.

    Examples:
        >>> from keras_resnet import create_model
        >>> round(count_flops(create_model("resnet18")) / 1e9, 3)
        1.814
    """
    return summary(model, input_size).flops
