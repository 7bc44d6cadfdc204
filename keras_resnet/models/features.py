"""Feature maps of a network, for a detector or a U-Net; and the vector behind them."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import keras

from keras_resnet.models.image_model import ImageModel, as_functional
from keras_resnet.models.meaning import node_of, weighs
from keras_resnet.system.errors import InputError


def _feature_maps(model: keras.Model) -> dict[int, str]:
    """Stride -> name of the last layer whose feature map everything behind it goes through.

    The first 1x1 convolution of a strided block has its stage's stride too, but the shortcut goes
    past it: the stage's output is the last layer with no way around.
    """
    sources = {
        layer.name: []
        if isinstance(layer, keras.layers.InputLayer)
        else [t._keras_history[0].name for t in keras.tree.flatten(layer.input)]
        for layer in model.layers
    }
    waiting = collections.Counter(name for names in sources.values() for name in names)
    strides: dict[str, int] = {}
    found: dict[int, str] = {}
    still_read: set[str] = set()
    for layer in model.layers:
        before = sources[layer.name]
        waiting.subtract(before)
        still_read = {name for name in still_read if waiting[name]}
        if waiting[layer.name]:
            still_read.add(layer.name)
        is_map = len(layer.output.shape) == 4 and all(name in strides for name in before)
        if not is_map or isinstance(layer, _NO_MAPS):
            continue
        step = layer.strides[0] if hasattr(layer, "strides") else 1
        # Both ways into a residual addition have strided already.
        strides[layer.name] = step * max((strides[name] for name in before), default=1)
        padding = isinstance(layer, keras.layers.ZeroPadding2D)  # no map, but of the next layer
        if still_read <= {layer.name} and not padding:
            found[strides[layer.name]] = layer.name
    return found


# What follows the last feature map: pooled to a fixed size, or turned for the flattening.
_NO_MAPS = (keras.layers.AdaptiveAveragePooling2D, keras.layers.Permute)


def embedding_model(model: keras.Model) -> keras.Model:
    """A model that gives what the head sees of an image: `(batch, features)`, weights shared.

    Of one without a head it is the output, pooled where that is a feature map.
    """
    model = as_functional(model)
    output = tensor = model.outputs[0]
    node = node_of(model, tensor)
    while not node.is_input and not weighs(node.operation):
        tensor = node.input_tensors[0]
        node = node_of(model, tensor)
    if isinstance(node.operation, keras.layers.Dense):
        output = node.input_tensors[0]
    elif isinstance(node.operation, keras.Model):  # the head may be in there
        output = embedding_model(node.operation)(node.input_tensors[0])
    if len(output.shape) == 4:
        output = keras.layers.GlobalAveragePooling2D()(output)
    elif len(output.shape) != 2:
        output = keras.layers.Flatten()(output)
    info = getattr(model, "info", {})
    return ImageModel(model.inputs[0], output, name=f"{model.name}_embedding", info=info)


def feature_extractor(model: keras.Model, strides: Sequence[int] = (4, 8, 16, 32)) -> keras.Model:
    """A model that gives the last feature map at each stride, as detectors and U-Nets want them.

    Weights are shared with `model`.

    Args:
        model: A model of this package.
        strides: Pixels of the input to one of the feature map, ascending.

    Returns:
        A Functional model with one output a stride, `(batch, height/stride, width/stride,
        channels)`.

    Raises:
        InputError: No feature map has that stride; the message lists those there are.

    Examples:
        >>> from keras_resnet import create_model
        >>> model = create_model("resnet18", input_shape=(64, 64, 3))
        >>> [y.shape for y in feature_extractor(model).outputs]
        [(None, 16, 16, 64), (None, 8, 8, 128), (None, 4, 4, 256), (None, 2, 2, 512)]
    """
    model = as_functional(model)
    last = _feature_maps(model)
    missing = [s for s in strides if s not in last]
    if missing:
        raise InputError(
            f"{model.name} has no feature map at stride {', '.join(map(str, missing))}. "
            f"There are: {', '.join(map(str, sorted(last)))}."
        )
    outputs = [model.get_layer(last[s]).output for s in strides]
    return keras.Model(model.input, outputs, name=f"{model.name}_features")
