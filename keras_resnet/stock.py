"""A model's twin out of stock Keras layers, which loads where this package is not installed."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_resnet.errors import InputError
from keras_resnet.layers import (
    BatchNormalization,
    Conv2D,
    MaxPooling2D,
    Normalize,
    ZeroPaddedShortcut,
)

_OWN = (BatchNormalization, Conv2D, MaxPooling2D, Normalize, ZeroPaddedShortcut)


def to_stock(model: keras.Model, name: str | None = None) -> keras.Model:
    """The same network out of stock Keras layers, with the same weights.

    Its `.keras` file needs Keras alone. Weight files (`.weights.h5`) fit both ways: Keras addresses
    layers by class and order, and both are the model's. Outputs agree to rounding. In training the
    running variance then moves by Keras' rule (the batch's variance as it is), not by torch's.

    Args:
        model: A Functional model, of this package or with its layers in it. Layers of other kinds
            are copied with their weights.
        name: Name of the new model; the old one's by default.

    Returns:
        A `keras.Model` with the layers' names kept; padding, addition and activation that were
        part of a layer become layers of their own, named after it (`conv1_pad`, `bn1_relu`).

    Raises:
        InputError: The model is not Functional.

    Examples:
        >>> from keras_resnet.zoo import create_model
        >>> stock = to_stock(create_model("resnet20"))
        >>> {type(layer).__module__.split(".")[0] for layer in stock.layers}
        {'keras'}
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise InputError(
            f"to_stock takes a Functional model, a graph of layers. Received: {type(model)}."
        )
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
    same = tuple(
        (k - 1) * d / 2 for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    )
    if any(layer.pad) and layer.strides == (1, 1) and layer.pad == same:
        config["padding"] = "same"  # symmetric at stride 1
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
        x = ops.pad(x, _pad_by(layer, *layer.pad), constant_values=-math.inf)
    return once(layer.name, lambda: keras.layers.MaxPooling2D.from_config(config))(x)


def _pad_by(layer, height: int, width: int) -> list[tuple[int, int]]:
    sides = [(0, 0), (height, height), (width, width)]
    return [*sides, (0, 0)] if layer.data_format == "channels_last" else [(0, 0), *sides]


def _zero_padded_shortcut(layer: ZeroPaddedShortcut, x, once):
    (a, b), last = layer.strides, layer.data_format == "channels_last"
    axis = 3 if last else 1
    missing = layer.filters - x.shape[axis]
    paddings = [(0, 0)] * 4
    paddings[axis] = (missing // 2, missing - missing // 2)
    return ops.pad(x[:, ::a, ::b, :] if last else x[:, :, ::a, ::b], paddings)


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
