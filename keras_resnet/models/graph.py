"""Functional graphs as lists of steps, and what can be folded in them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization
from keras_resnet.layers.torch_call import without_empty_masks

LINEAR, RELU = keras.activations.linear, keras.activations.relu


class Step(NamedTuple):
    """One call of a layer in a graph whose values are numbered; 0 is the model's input."""

    layer: keras.layers.Layer
    takes_training: bool  # its call has an argument `training`
    sources: tuple[int, ...]  # numbers of its inputs
    listed: bool  # it takes them as a list
    target: int  # number of its output
    freed: tuple[int, ...]  # numbers of the values that no later step needs
    shape: tuple[int | None, ...] = ()  # of its output


def nodes_of(model: keras.Model) -> list[Any]:
    """The nodes of a Functional model's graph, each behind those that it takes from."""
    # `_nodes_by_depth` is Keras' own; tests/models/test_graph.py fails where it is gone.
    found = model._nodes_by_depth
    return [node for depth in sorted(found, reverse=True) for node in found[depth]]


def graph_steps(model: keras.Model) -> list[Step] | None:
    """A Functional model as steps in order; the last one's output is the model's.

    `None` where the graph is not a single-input, single-output one of layers, each called on a
    tensor or a list of them.
    """
    nodes = [node for node in nodes_of(model) if not node.is_input]
    if len(model.inputs) != 1 or len(model.outputs) != 1 or not nodes:
        return None
    index, steps = {id(model.inputs[0]): 0}, []
    for node in nodes:
        layer, (args, kwargs) = node.operation, (node.arguments.args, node.arguments.kwargs)
        given = args[0] if len(args) == 1 else None
        listed = isinstance(given, (list, tuple))
        tensors = list(given) if listed else [given]
        known = all(id(tensor) in index for tensor in tensors)
        # Dropout's default, which Keras notes at its node and overrides when the model is called.
        kwargs = without_empty_masks(kwargs)
        kwargs = {k: v for k, v in kwargs.items() if v is not None and (k != "training" or v)}
        if kwargs or not known or len(node.outputs) != 1 or not isinstance(layer, keras.Layer):
            return None
        target = len(steps) + 1
        index[id(node.outputs[0])] = target
        takes_training = "training" in inspect.signature(layer.call).parameters
        sources = tuple(index[id(tensor)] for tensor in tensors)
        shape = tuple(node.outputs[0].shape)
        steps.append(Step(layer, takes_training, sources, listed, target, (), shape))
    if index[id(model.outputs[0])] != len(steps):
        return None
    return _with_freed(steps)


def _with_freed(steps: Sequence[Any]) -> list[Any]:
    """The steps with `freed` set, as their order now is."""
    last_use = {source: i for i, step in enumerate(steps) for source in step.sources}
    return [
        step._replace(freed=tuple(s for s in dict.fromkeys(step.sources) if last_use[s] == i))
        for i, step in enumerate(steps)
    ]


def is_relu(layer: keras.layers.Layer) -> bool:
    """Whether a stock layer is a ReLU and nothing else."""
    if type(layer) is keras.layers.Activation:
        return layer.activation is RELU
    plain = type(layer) is keras.layers.ReLU and layer.max_value is None
    return plain and not layer.negative_slope and not layer.threshold


def count_users(steps: Sequence[Any]) -> dict[int, int]:
    """How many steps take each value; the model's output counts as taken once more."""
    users = {steps[-1].target: 1}
    for step in steps:
        for source in step.sources:
            users[source] = users.get(source, 0) + 1
    return users


# --- the list for inference ----------------------------------------------------------------------


class Fused(NamedTuple):
    """A convolution with what follows it: `relu(norm(conv(x)) + shortcut)`."""

    conv: keras.layers.Layer
    norm: keras.layers.Layer | None  # the batch norm whose one input it is
    relu: bool  # a ReLU comes last
    sources: tuple[int, ...]  # the number of its input, and of the shortcut if there is one
    target: int
    freed: tuple[int, ...] = ()


def fuse(steps: list[Step]) -> list[Step | Fused]:
    """The steps with every convolution joined with the norm, addition and ReLU that follow it.

    Each joined step stands where the last of its layers stood; dropouts are gone.
    """
    users = count_users(steps)
    takers: dict[int, Step] = {}  # the step that is a value's only user
    for step in steps:
        takers.update({source: step for source in step.sources if users[source] == 1})
    joined: dict[int, Fused | None] = {}  # by the number of the step's output
    shapes = {step.target: step.shape for step in steps}
    for step in steps:
        if step.target not in joined and _is_fusible(step.layer):
            fused = _follow(step, takers, joined, shapes)
            joined[fused.target] = fused
    result, same = [], {}
    for step in steps:
        step = joined.get(step.target, step)
        if step is None:
            continue
        step = step._replace(sources=tuple(same.get(s, s) for s in step.sources))
        if isinstance(step, Step) and type(step.layer) is keras.layers.Dropout:
            same[step.target] = step.sources[0]
        else:
            result.append(step)
    if same.get(steps[-1].target) is not None:  # a dropout at the very end
        return _with_freed(steps)
    return _with_freed(result)


def _is_fusible(layer) -> bool:
    return type(layer) is Conv2D and layer.padding == "valid" and layer.activation in (
        LINEAR, RELU
    )  # fmt: skip


def _follow(
    step: Step,
    takers: dict[int, Step],
    joined: dict[int, Fused | None],
    shapes: dict[int, tuple[int | None, ...]],
) -> Fused:
    """Joins a convolution with the steps after it, which are then `None` in `joined`."""
    conv, norm, shortcut = step.layer, None, ()
    relu = conv.activation is RELU
    last = step
    while not relu:
        after = takers.get(last.target)
        if after is None or after.target in joined:
            break
        layer, sources = after.layer, after.sources
        if type(layer) is BatchNormalization and norm is None and not shortcut:
            if sources[0] != last.target or not can_take_over(conv, layer):
                break
            if layer.activation not in (LINEAR, RELU) or not layer.is_of_maps:
                break
            norm, shortcut, relu = layer, sources[1:], layer.activation is RELU
        elif type(layer) is keras.layers.Add and len(sources) == 2 and not shortcut:
            shortcut = tuple(s for s in sources if s != last.target)
            if len(shortcut) != 1 or any(shapes.get(s) != after.shape for s in sources):
                shortcut = ()  # one of the two is spread over the other
                break
        elif is_relu(layer):
            relu = True
        else:
            break
        joined[last.target] = None
        last = after
    return Fused(conv, norm, relu, (*step.sources, *shortcut), last.target)


def can_take_over(conv, norm: keras.layers.BatchNormalization) -> bool:
    """Whether the norm's channels are the convolution's, with nothing in between."""
    axis = 3 if conv.data_format == "channels_last" else 1
    return conv.activation is LINEAR and norm.axis % 4 == axis


def fold_norm(norm: keras.layers.BatchNormalization, bias) -> tuple[np.ndarray, np.ndarray]:
    """What a convolution with that bias takes over from the batch norm after it.

    Returns:
        float64, one value a channel each: what the kernel is multiplied with, and the new bias.
    """

    def wide(variable, otherwise):
        if variable is None:
            return otherwise
        return np.asarray(ops.convert_to_numpy(variable), np.float64)

    scale = wide(norm.gamma, 1.0) / np.sqrt(wide(norm.moving_variance, 1.0) + norm.epsilon)
    shift = (wide(bias, 0.0) - wide(norm.moving_mean, 0.0)) * scale
    return scale, shift + wide(norm.beta, 0.0)
