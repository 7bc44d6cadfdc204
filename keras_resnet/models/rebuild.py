"""The same model, sooner: batch norms folded into the convolutions, and lower precision."""

from __future__ import annotations

import collections
import copy
import math

import keras
import numpy as np
from keras import ops

from keras_resnet.layers.conv import Conv2D, paddings
from keras_resnet.layers.norm import BatchNormalization, Normalize
from keras_resnet.layers.pool import MaxPooling2D, ZeroPaddedShortcut
from keras_resnet.models.graph import Step, can_take_over, count_users, fold_norm, graph_steps
from keras_resnet.models.image_model import ImageModel, as_functional
from keras_resnet.system.errors import InputError, one_of

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PRECISIONS = {**_SHORT, **{name: name for name in _SHORT.values()}}


def optimize_for_inference(
    model: keras.Model, precision: str | None = None, name: str | None = None
) -> ImageModel:
    """The model without its batch norms: each is folded into the convolution before it.

    Outputs agree to 1e-5 of the largest; `model` stays as it is, and nothing is shared with it. The
    result is a Functional model like any other: save it, export it, run it. It is meant for
    inference: trained on, it would train without batch norm. On torch, a model of this package
    folds itself while it predicts (see `keras_resnet.models.graph`), and gains nothing more by
    this.

    Args:
        model: A built Functional or Sequential model with one input and one output. Its
            convolutions keep their names; norms that follow none, or one that others use too, stay.
        precision: `"bf16"` or `"fp16"` (or `"bfloat16"`, `"float16"`) stores the weights and
            computes in that type, apart from the normalisation of pixels and the last layer;
            `"fp32"` in float32. By default as in `model`.
        name: Name of the new model; the old one's by default.

    Returns:
        The new model; `info` is a copy, with `"optimized"` added.

    Raises:
        InputError: An unknown precision, or a graph of another kind.

    Examples:
        >>> from keras_resnet import create_model
        >>> model = optimize_for_inference(create_model("resnet20"))
        >>> any(isinstance(l, keras.layers.BatchNormalization) for l in model.layers)
        False
    """
    one_of("precision", precision, (None, *PRECISIONS))
    model = as_functional(model)
    steps = graph_steps(model)
    if steps is None:
        raise InputError(
            "optimize_for_inference takes a model with one input and one output, of layers called "
            f"on tensors alone. Received: {model.name!r}, {type(model).__name__}."
        )
    dtype = {} if precision is None else {"dtype": PRECISIONS[precision]}
    norms = _folding(steps)
    folded, made = {norm.layer for norm in norms.values()}, {}

    def call(layer, x, *args, **kwargs):
        if layer in folded:  # the convolution has done the rest
            if not isinstance(x, (list, tuple)):
                return x
            y = keras.layers.Add(name=f"{layer.name}_add", **dtype)(x)
            return keras.layers.Activation(layer.activation, name=layer.name, **dtype)(y)
        if layer not in made:
            # Logits in bfloat16 would have two decimal digits.
            policy = {"dtype": "float32"} if dtype and layer is steps[-1].layer else dtype
            made[layer] = _for_inference(layer, norms.get(layer), policy)
        return made[layer](x, *args, **kwargs)

    bare = keras.Model(model.input, model.output)
    twin = keras.models.clone_model(bare, clone_function=lambda layer: layer, call_function=call)
    for layer, copied in made.items():
        if layer in norms:
            scale, bias = fold_norm(norms[layer].layer, layer.bias)
            kernel = np.asarray(ops.convert_to_numpy(ops.cast(layer.kernel, "float32")), np.float64)
            copied.set_weights([kernel * scale, bias])
        elif copied.weights:
            copied.set_weights(layer.get_weights())
    info = copy.deepcopy(getattr(model, "info", {}))
    info["optimized"] = {"folded_norms": len(norms), "precision": precision}
    return ImageModel(inputs=twin.input, outputs=twin.output, name=name or model.name, info=info)


def _folding(steps: list[Step]) -> dict[keras.layers.Layer, Step]:
    """Convolutions, each with the step of the batch norm that it takes over."""
    users, calls = count_users(steps), collections.Counter(step.layer for step in steps)
    makers, found = {step.target: step for step in steps}, {}
    for step in steps:
        maker, norm = makers.get(step.sources[0]), step.layer
        if (
            isinstance(norm, keras.layers.BatchNormalization)
            and maker is not None
            and type(maker.layer).__name__ == "Conv2D"
            and isinstance(maker.layer, keras.layers.Conv2D)
            and users[maker.target] == 1
            and calls[maker.layer] == calls[norm] == 1
            and can_take_over(maker.layer, norm)
        ):
            found[maker.layer] = step
    return found


def _for_inference(layer, norm: Step | None, policy: dict[str, str]) -> keras.layers.Layer:
    """A copy of a layer, which where there is a norm takes it over."""
    if isinstance(layer, keras.Model):
        return keras.models.clone_model(layer)
    config = {**layer.get_config(), **policy}
    if norm is not None:
        # Both are set afterwards: to draw a kernel would take seconds.
        config |= {"use_bias": True, "kernel_initializer": "zeros"}
        if len(norm.sources) == 1:
            activation = getattr(norm.layer, "activation", keras.activations.linear)
            config["activation"] = keras.activations.serialize(activation)
    return type(layer).from_config(config)


_OWN = (BatchNormalization, Conv2D, MaxPooling2D, Normalize, ZeroPaddedShortcut)


def to_stock(model: keras.Model, name: str | None = None) -> keras.Model:
    """The same network out of stock Keras layers, with the same weights.

    Its `.keras` file needs Keras alone. Weight files (`.weights.h5`) fit both ways: Keras addresses
    layers by class and order, and both are the model's. Outputs agree to rounding. In training the
    running variance then moves by Keras' rule (the batch's variance as it is), not by torch's.

    Args:
        model: A Functional or Sequential model, of this package or with its layers in it. Layers
            of other kinds are copied with their weights.
        name: Name of the new model; the old one's by default.

    Returns:
        A `keras.Model` with the layers' names kept; padding, addition and activation that were
        part of a layer become layers of their own, named after it (`conv1_pad`, `bn1_relu`).

    Raises:
        InputError: The model has no graph of layers, or is not built.

    Examples:
        >>> from keras_resnet import create_model
        >>> stock = to_stock(create_model("resnet20"))
        >>> {type(layer).__module__.split(".")[0] for layer in stock.layers}
        {'keras'}
    """
    model = as_functional(model)
    made: dict[str, keras.layers.Layer] = {}  # a layer called twice has one twin

    def once(name, make):
        if name not in made:
            made[name] = make()
        return made[name]

    def call(layer, *args, **kwargs):
        rule = next((rule for own, rule in _RULES.items() if isinstance(layer, own)), None)
        return layer(*args, **kwargs) if rule is None else rule(layer, args[0], once)

    clone = keras.models.clone_model(
        # A bare Functional model: the twin must not need the class of this one.
        keras.Model(model.input, model.output, name=name or model.name),
        # Our own layers stay, as descriptions of what is to be made in their place.
        clone_function=lambda layer: layer if isinstance(layer, _OWN) else _copy(layer),
        call_function=call,
    )
    for layer in model.layers:
        if layer.weights:
            clone.get_layer(layer.name).set_weights(layer.get_weights())
    return clone


def _copy(layer: keras.layers.Layer) -> keras.layers.Layer:
    if isinstance(layer, keras.Model):
        return to_stock(layer)
    return type(layer).from_config(layer.get_config())


def _config(layer: keras.layers.Layer, *own: str) -> dict:
    """The layer's configuration without the arguments that stock Keras does not know."""
    return {key: value for key, value in layer.get_config().items() if key not in own}


def _common(layer: keras.layers.Layer, suffix: str) -> dict:
    # The policy's name: Keras' Identity cannot save the policy itself.
    return {"name": f"{layer.name}_{suffix}", "dtype": layer.dtype_policy.name}


def _conv(layer: Conv2D, x, once):
    config = _config(layer, "pad")
    if layer.pads_as_same:
        config["padding"] = "same"
    elif any(layer.pad):
        common = {"data_format": layer.data_format, **_common(layer, "pad")}
        x = once(common["name"], lambda: keras.layers.ZeroPadding2D(layer.pad, **common))(x)
    return once(layer.name, lambda: keras.layers.Conv2D.from_config(config))(x)


def _norm(layer: BatchNormalization, x, once):
    x, shortcut = x if isinstance(x, (list, tuple)) else (x, None)
    config = _config(layer, "activation", "unbiased_variance")
    y = once(layer.name, lambda: keras.layers.BatchNormalization.from_config(config))(x)
    if shortcut is not None:
        common = _common(layer, "add")
        add = once(common["name"], lambda: keras.layers.Add(**common))
        y = add([y, _in_order(layer, shortcut, once)])
    activation = keras.activations.serialize(layer.activation)
    if activation == "linear":
        return y
    common = _common(layer, activation if isinstance(activation, str) else "activation")
    return once(common["name"], lambda: keras.layers.Activation(layer.activation, **common))(y)


def _in_order(layer: BatchNormalization, shortcut, once):
    """The shortcut, one layer longer where it ends in a batch norm of its own.

    Keras orders layers by their distance from the output and numbers them in weight files in that
    order. With the addition a layer of its own, the two norms in front of it would be equally far,
    and change places.
    """
    if not isinstance(shortcut._keras_history.operation, keras.layers.BatchNormalization):
        return shortcut
    common = _common(layer, "shortcut")
    return once(common["name"], lambda: keras.layers.Identity(**common))(shortcut)


def _pool(layer: MaxPooling2D, x, once):
    config = _config(layer, "pad")
    if any(layer.pad):
        x = ops.pad(x, paddings(layer.data_format, layer.pad), constant_values=-math.inf)
    return once(layer.name, lambda: keras.layers.MaxPooling2D.from_config(config))(x)


def _normalize(layer: Normalize, x, once):
    axis = -1 if layer.data_format == "channels_last" else 1
    # float32 at least under every policy, as in Normalize: the next layer casts.
    dtype = "float64" if layer.compute_dtype == "float64" else "float32"
    name, first = layer.name, f"{layer.name}_rescaling"
    mean, variance = list(layer.mean), [std**2 for std in layer.std]
    unit = once(first, lambda: keras.layers.Rescaling(1 / 255, name=first, dtype=dtype))
    kind = keras.layers.Normalization
    return once(name, lambda: kind(axis, mean, variance, name=name, dtype=dtype))(unit(x))


_RULES = {
    Conv2D: _conv,
    BatchNormalization: _norm,
    MaxPooling2D: _pool,
    ZeroPaddedShortcut: lambda layer, x, once: layer.call(x),  # of operations alone
    Normalize: _normalize,
}
