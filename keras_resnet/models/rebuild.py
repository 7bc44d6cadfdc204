"""The same model, sooner: batch norms folded into the convolutions, and lower precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.layers.conv import Conv2D, paddings
from keras_resnet.layers.norm import BatchNormalization, Normalize
from keras_resnet.layers.pool import MaxPooling2D, ZeroPaddedShortcut
from keras_resnet.models.graph import Step, can_take_over, count_users, fold_norm, graph_steps
from keras_resnet.models.image_model import ImageModel, as_functional
from keras_resnet.system.errors import InputError, one_of

PRECISIONS = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


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
    dtype = None if precision is None else PRECISIONS[precision]
    builder = _Builder(steps, dtype)
    inputs = keras.Input(batch_shape=model.inputs[0].shape, dtype=model.inputs[0].dtype,
                         name=model.inputs[0].name)  # fmt: skip
    outputs = builder.build(inputs)
    info = copy.deepcopy(getattr(model, "info", {}))
    info["optimized"] = {"folded_norms": builder.folded, "precision": precision}
    return ImageModel(inputs=inputs, outputs=outputs, name=name or model.name, info=info)


class _Builder:
    """Makes the new graph step by step."""

    def __init__(self, steps: list[Step], dtype: str | None):
        self.steps, self.dtype = steps, dtype
        self.folded = 0
        users = count_users(steps)
        calls: dict[int, int] = {}
        for step in steps:
            calls[id(step.layer)] = calls.get(id(step.layer), 0) + 1
        makers = {step.target: step for step in steps}
        # By the number of a convolution's output: the step of the norm that it takes over.
        self.norms: dict[int, Step] = {}
        for step in steps:
            maker = makers.get(step.sources[0])
            if (
                isinstance(step.layer, keras.layers.BatchNormalization)
                and maker is not None
                and type(maker.layer).__name__ == "Conv2D"
                and isinstance(maker.layer, keras.layers.Conv2D)
                and users[maker.target] == 1
                and calls[id(maker.layer)] == calls[id(step.layer)] == 1
                and can_take_over(maker.layer, step.layer)
            ):
                self.norms[maker.target] = step
        self.copies: dict[int, keras.layers.Layer] = {}

    def build(self, inputs):
        """The output of the new graph over the input."""
        values: dict[int, Any] = {0: inputs}
        taken_over = {norm.target: target for target, norm in self.norms.items()}
        pending: dict[int, tuple[Step, Any]] = {}
        for step in self.steps:
            given = [values.get(source) for source in step.sources]
            if step.target in self.norms:
                pending[step.target] = step, given[0]
            elif step.target in taken_over:
                conv, x = pending.pop(taken_over[step.target])
                values[step.target] = self._folded(conv.layer, step.layer, x, given[1:])
            else:
                values[step.target] = self._copied(step)(given if step.listed else given[0])
        for step in self.steps:
            copied = self.copies.get(id(step.layer))
            if copied is not None and copied.weights:
                copied.set_weights(step.layer.get_weights())
        return values[self.steps[-1].target]

    def _folded(self, conv, norm, x, shortcut):
        activation = getattr(norm, "activation", keras.activations.linear)
        config = self._config(conv)
        config["use_bias"] = True
        config["kernel_initializer"] = "zeros"  # set below: drawing it would take seconds
        if not shortcut:
            config["activation"] = keras.activations.serialize(activation)
        layer = type(conv).from_config(config)
        y = layer(x)
        scale, bias = fold_norm(norm, conv.bias)
        kernel = np.asarray(ops.convert_to_numpy(ops.cast(conv.kernel, "float32")), np.float64)
        layer.set_weights([kernel * scale, bias])
        self.folded += 1
        if shortcut:
            dtype = {} if self.dtype is None else {"dtype": self.dtype}
            y = keras.layers.Add(name=f"{norm.name}_add", **dtype)([y, *shortcut])
            y = keras.layers.Activation(activation, name=norm.name, **dtype)(y)
        return y

    def _copied(self, step: Step) -> keras.layers.Layer:
        layer = step.layer
        if id(layer) not in self.copies:
            if isinstance(layer, keras.Model):
                copied = keras.models.clone_model(layer)
            else:
                copied = type(layer).from_config(self._config(layer, last=step is self.steps[-1]))
            self.copies[id(layer)] = copied
        return self.copies[id(layer)]

    def _config(self, layer, last: bool = False) -> dict[str, Any]:
        config = layer.get_config()
        if self.dtype is not None:
            # Logits in bfloat16 would have two decimal digits.
            config["dtype"] = "float32" if last else self.dtype
        return config


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
        pad = once(
            f"{layer.name}_pad",
            lambda: keras.layers.ZeroPadding2D(
                layer.pad, data_format=layer.data_format, **_common(layer, "pad")
            ),
        )
        x = pad(x)
    return once(layer.name, lambda: keras.layers.Conv2D.from_config(config))(x)


def _norm(layer: BatchNormalization, x, once):
    x, shortcut = x if isinstance(x, (list, tuple)) else (x, None)
    config = _config(layer, "activation", "unbiased_variance")
    y = once(layer.name, lambda: keras.layers.BatchNormalization.from_config(config))(x)
    if shortcut is not None:
        y = once(f"{layer.name}_add", lambda: keras.layers.Add(**_common(layer, "add")))(
            [y, _in_order(layer, shortcut, once)]
        )
    activation = keras.activations.serialize(layer.activation)
    if activation == "linear":
        return y
    suffix = activation if isinstance(activation, str) else "activation"
    return once(
        f"{layer.name}_{suffix}",
        lambda: keras.layers.Activation(layer.activation, **_common(layer, suffix)),
    )(y)


def _in_order(layer: BatchNormalization, shortcut, once):
    """The shortcut, one layer longer where it ends in a batch norm of its own.

    Keras orders layers by their distance from the output and numbers them in weight files in that
    order. With the addition a layer of its own, the two norms in front of it would be equally far,
    and change places.
    """
    if not isinstance(shortcut._keras_history.operation, keras.layers.BatchNormalization):
        return shortcut
    return once(
        f"{layer.name}_shortcut", lambda: keras.layers.Identity(**_common(layer, "shortcut"))
    )(shortcut)


def _pool(layer: MaxPooling2D, x, once):
    config = _config(layer, "pad")
    if any(layer.pad):
        x = ops.pad(x, paddings(layer.data_format, layer.pad), constant_values=-math.inf)
    return once(layer.name, lambda: keras.layers.MaxPooling2D.from_config(config))(x)


def _zero_padded_shortcut(layer: ZeroPaddedShortcut, x, once):
    return layer.call(x)  # of operations alone


def _normalize(layer: Normalize, x, once):
    axis = -1 if layer.data_format == "channels_last" else 1
    # float32 under every policy, as in Normalize: the next layer casts.
    unit = once(
        f"{layer.name}_rescaling",
        lambda: keras.layers.Rescaling(
            1 / 255, name=f"{layer.name}_rescaling", dtype=_at_least_float32(layer)
        ),
    )
    normal = once(
        layer.name,
        lambda: keras.layers.Normalization(
            axis=axis,
            mean=list(layer.mean),
            variance=[std**2 for std in layer.std],
            name=layer.name,
            dtype=_at_least_float32(layer),
        ),
    )
    return normal(unit(x))


def _at_least_float32(layer: keras.layers.Layer) -> str:
    return "float64" if layer.compute_dtype == "float64" else "float32"


_RULES = {
    Conv2D: _conv,
    BatchNormalization: _norm,
    MaxPooling2D: _pool,
    ZeroPaddedShortcut: _zero_padded_shortcut,
    Normalize: _normalize,
}
