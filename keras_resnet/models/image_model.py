"""The model class, and what every architecture here has in common: its input and its head."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from typing import Any, overload

import keras
import numpy as np
from keras import ops

from keras_resnet.data.preprocess import imagenet_colors
from keras_resnet.layers.norm import Normalize
from keras_resnet.models.blocks import channel_axis
from keras_resnet.models.torch_step import DirectStep
from keras_resnet.system import device  # as a whole: it may be what imports Keras, half there
from keras_resnet.system.errors import InputError
from keras_resnet.system.files import printable, shortened
from keras_resnet.variants import COUNTER


@keras.saving.register_keras_serializable("keras_resnet")
class ImageModel(DirectStep, keras.Model):
    """A Functional Keras model that carries what is known about it in `info`.

    `info` is a JSON-able dict and part of the `.keras` file: the variant and its options, class
    names, preprocessing, where the weights came from and how they were trained. A model file is
    thus enough to predict.
    """

    def __init__(self, *args, info: dict[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # A plain attribute would be wrapped by Keras' tracker.
        object.__setattr__(self, "_info", copy.deepcopy(info) if info else {})

    @property
    def info(self) -> dict[str, Any]:
        """What is known about the model; change it in place, it is saved with the model."""
        return self._info

    def get_config(self):
        return {**super().get_config(), "info": copy.deepcopy(self._info)}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not abs(value) >= 2**63  # a nan is written as one


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


# What the parts of `info` are that this package writes and reads; each may be missing or None.
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(["options", "preprocess", "weights", "training", "calibration"], _is(dict)),
    "calibration.temperature": lambda v: _is_number(v) and 1e-3 <= v <= 1e3,
    "calibration.thresholds": lambda v: isinstance(v, list) and all(map(_is_number, v)),
    **dict.fromkeys(["variant", "options.task", "training.recipe"], _is(str)),
    **dict.fromkeys(["weights.source", "weights.published_as", "weights.sha256"], _is(str)),
    **dict.fromkeys(["training.epoch", "training.epochs"], _is_number),
    **dict.fromkeys(["training.val_accuracy", "training.val_pictures"], _is_number),
    f"weights.{COUNTER}": lambda v: all(map(_is_number, v.values() if _is(dict)(v) else [v])),
    "class_names": lambda v: isinstance(v, (list, tuple)) and all(map(_is(str), v)),
}


def check_info(name: str, info: Any) -> None:
    """Checks what a model says of itself, which anybody can have written.

    Raises:
        InputError: A part is of another kind than this package writes.
    """
    if not isinstance(info, dict):
        raise InputError(f"The info of {name!r} must be a dict. Received: {_brief(info)}.")
    for path, fits in _KINDS.items():
        part, _, key = path.partition(".")
        value = info.get(part) if not key else (info.get(part) or {}).get(key)
        if value is not None and not fits(value):
            raise InputError(
                f"info[{part!r}]{f'[{key!r}]' if key else ''} of {name!r} is not what it must be: "
                f"correct it, and save the model again. Received: {_brief(value)}."
            )


def _brief(value: Any) -> str:
    return shortened(repr(value)[:1000], 80)


@overload
def as_functional(model: keras.Model) -> keras.Model: ...
@overload
def as_functional(model: keras.Model, strict: bool) -> keras.Model | None: ...
def as_functional(model, strict=True):
    """A model as a graph of layers: itself, or what a `keras.Sequential` holds, with its `info`.

    Raises:
        InputError: A class of one's own without a graph, or a model that is not built; where it is
            not `strict`, `None` stands for them.
    """
    check_info(getattr(model, "name", "?"), getattr(model, "info", {}))
    if hasattr(model, "_nodes_by_depth"):
        return model
    outputs = getattr(model, "outputs", None) if isinstance(model, keras.Sequential) else None
    if not outputs:
        if not strict:
            return None
        if isinstance(model, keras.Sequential):
            raise InputError(
                f"The model {model.name!r} has no shapes yet: begin it with keras.Input((224, 224, "
                "3)), or build it, model.build((None, 224, 224, 3))."
            )
        raise InputError(
            "A Functional or Sequential model is needed, a graph of layers; wrap one of another "
            "class: x = keras.Input((224, 224, 3)); model = keras.Model(x, model(x)). Received: "
            f"{getattr(model, 'name', model)!r}, {type(model).__name__}."
        )
    kept = model.__dict__.get("_as_functional")
    if kept is None or kept.outputs[0] is not outputs[0]:  # layers may have been added
        inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
        kept = ImageModel(inputs=inputs, outputs=outputs[0], name=model.name)
        object.__setattr__(model, "_as_functional", kept)  # no state, hence not Keras' to track
    object.__setattr__(kept, "_info", getattr(model, "info", {}))
    return kept


OTHER_WEIGHTS = "Load other weights, or train again at a lower learning rate."


def weights_not_finite(model: keras.Model) -> str | None:
    """Which of the weights are `nan` or infinite, as a sentence; `None` where all are numbers."""
    found = {}
    for variable in model.weights:
        values = np.asarray(ops.convert_to_numpy(variable))
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):  # in a third of the time
                continue
        wrong = int((~np.isfinite(values)).sum())
        if wrong:
            found[variable.path] = f"{wrong:,} of {values.size:,} values"
    if not found:
        return None
    path, count = next(iter(found.items()))
    more = f", and {len(found) - 1} more weights" if len(found) > 1 else ""
    return f"{count} of the weight {printable(path)!r} are not finite{more}."


def require_finite_weights(model: keras.Model) -> None:
    """Checks weights that are to be written or served.

    Raises:
        InputError: One holds `nan` or an infinity.
    """
    wrong = weights_not_finite(model)
    if wrong is not None:
        raise InputError(f"{printable(model.name)!r}: {wrong} {OTHER_WEIGHTS}")


def check_input_shape(name: str, input_shape, min_size: int) -> tuple[int | None, ...]:
    """`(height, width, channels)` in the data format's order, checked against the network.

    Raises:
        InputError: Not three numbers, or a side below what the network can take.
    """
    shape = tuple(input_shape)
    if len(shape) != 3 or any(v is not None and (not isinstance(v, int) or v < 1) for v in shape):
        raise InputError(
            f"input_shape must be three positive sizes, such as (224, 224, 3); a side may be "
            f"None. Received: {input_shape!r}."
        )
    axis, other = channel_axis() - 1, 2 - (channel_axis() - 1)
    if shape[other] in (1, 3, 4) and shape[axis] not in (1, 2, 3, 4):
        turned = (*shape[1:], shape[0]) if axis == 2 else (shape[2], *shape[:2])
        raise InputError(
            f"input_shape is (height, width, channels) in the data format channels_last, "
            f"(channels, height, width) in channels_first; Keras is set to "
            f"{keras.config.image_data_format()}: give input_shape={turned}, or call "
            f"keras.config.set_image_data_format first. Received: {input_shape!r}."
        )
    if shape[axis] is None:
        raise InputError(f"input_shape needs a number of channels. Received: {input_shape!r}.")
    sides = [v for i, v in enumerate(shape) if i != axis]
    if any(side is not None and side < min_size for side in sides):
        raise InputError(
            f"{name} needs images of at least {min_size}x{min_size} pixels. "
            f"Received: {sides[0]}x{sides[1]}."
        )
    return shape


def image_input(
    spec, input_shape, input_tensor, include_preprocessing, mean=None, std=None
) -> tuple[Any, Any]:
    """The model's input and what the first layer of the network gets."""
    size = spec.input_size
    if input_tensor is not None:
        inputs = input_tensor
        check_input_shape(spec.name, inputs.shape[1:], spec.min_size)
    else:
        if input_shape is None:
            input_shape = device.image_shape(size, size, 3)
        inputs = keras.Input(check_input_shape(spec.name, input_shape, spec.min_size))
    if not include_preprocessing:
        return inputs, inputs
    channels = inputs.shape[channel_axis()]
    colors = imagenet_colors(channels)
    mean = _per_channel("mean", colors["mean"] if mean is None else mean, channels)
    std = _per_channel("std", colors["std"] if std is None else std, channels)
    return inputs, Normalize(mean, std, name="preprocessing")(inputs)


def _per_channel(name: str, values, channels: int) -> list[float]:
    values = [float(v) for v in values]
    if len(values) != channels:
        raise InputError(f"{name} has {len(values)} values for {channels} channels: {values}.")
    return values
