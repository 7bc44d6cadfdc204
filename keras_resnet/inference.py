"""The same model, sooner: batch norms folded into the convolutions, and lower precision."""

from __future__ import annotations

import copy
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.errors import InputError, did_you_mean
from keras_resnet.graph import Step, count_users, fold_norm, graph_steps
from keras_resnet.model import ImageModel

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
    folds itself while it predicts (see `keras_resnet.graph`), and gains nothing more by this.

    Args:
        model: A built Functional model with one input and one output. Its convolutions keep their
            names; norms that follow none, or one that others use too, stay.
        precision: `"bf16"` or `"fp16"` (or `"bfloat16"`, `"float16"`) stores the weights and
            computes in that type, apart from the normalisation of pixels and the last layer;
            `"fp32"` in float32. By default as in `model`.
        name: Name of the new model; the old one's by default.

    Returns:
        The new model; `info` is a copy, with `"optimized"` added.

    Raises:
        InputError: An unknown precision, or a graph of another kind.

    Examples:
        >>> from keras_resnet.zoo import create_model
        >>> model = optimize_for_inference(create_model("resnet20"))
        >>> any(isinstance(l, keras.layers.BatchNormalization) for l in model.layers)
        False
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(
            f"precision must be one of {', '.join(PRECISIONS)}, or None. Received: {precision!r}."
            f"{did_you_mean(str(precision), PRECISIONS)}"
        )
    steps = graph_steps(model) if getattr(model, "inputs", None) else None
    if steps is None:
        raise InputError(
            f"optimize_for_inference takes a built Functional model with one input and one output, "
            f"of layers called on tensors alone. Received: {model.name!r}, {type(model).__name__}."
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
                and maker.layer.activation is keras.activations.linear
                and users[maker.target] == 1
                and calls[id(maker.layer)] == calls[id(step.layer)] == 1
                and _channel_axis(maker.layer) == step.layer.axis % 4
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


def _channel_axis(conv) -> int:
    return 3 if conv.data_format == "channels_last" else 1
