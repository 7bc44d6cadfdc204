"""What a classifier takes and what its outputs say: the one place that decides both.

A model's own description can be absent or wrong; its graph cannot. So the graph is asked first,
models in it included, then what `info["options"]` says, then the numbers that the model gives. What
stays unclear is refused, with the words that make it clear.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.layers.norm import Normalize
from keras_resnet.models.graph import nodes_of
from keras_resnet.models.image_model import as_functional
from keras_resnet.recipes import TASKS
from keras_resnet.system.errors import InputError, KerasResNetError, one_of, reason_of
from keras_resnet.system.files import printable, shortened
from keras_resnet.system.replicas import predicted

# --- what outputs say ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a classifier's outputs say.

    Of a `"single-label"` task it is one of the classes, and the probabilities sum to 1. A
    `"binary"` one has one output, which speaks for the second of two classes. Of a `"multi-label"`
    one each class is for itself, yes or no.

    Examples:
        >>> Meaning("binary", activated=True).probabilities(np.array([[0.75]]))
        array([[0.25, 0.75]])
    """

    task: str = "single-label"
    activated: bool = False  # outputs are probabilities; otherwise logits
    # What logits are divided by: above 1 the model is less sure of the same answer.
    temperature: float = dataclasses.field(default=1.0, repr=False)
    # Of several labels the probability that each is said from, of a binary model the one that its
    # second class is said from; 0.5 where there are none.
    thresholds: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Checks the task's name."""
        one_of("task", self.task, TASKS)

    def num_classes(self, outputs: int) -> int:
        """Classes that so many outputs speak of."""
        return 2 if self.task == "binary" else outputs

    def as_calibrated(self, info: dict[str, Any], classes: int) -> Meaning:
        """The same with the temperature and the thresholds that the `info` of a model has.

        Raises:
            InputError: Thresholds of another number of classes.
        """
        found = info.get("calibration") or {}
        temperature, thresholds = found.get("temperature"), tuple(found.get("thresholds") or ())
        wanted = {"single-label": 0, "binary": 1}.get(self.task, classes)
        if len(thresholds) not in (0, wanted):
            raise InputError(
                f"info['calibration']['thresholds'] has {len(thresholds)} numbers; a {self.task} "
                f"model of {classes} classes has {wanted}: take them out, calibrate --remove does."
            )
        temperature = 1.0 if temperature is None else temperature
        return dataclasses.replace(self, temperature=temperature, thresholds=thresholds)

    def log_probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Natural logarithms of the class probabilities, float64 `(n, classes)`."""
        return self.cooled(self._log_probabilities(outputs))

    def cooled(self, logs: np.ndarray) -> np.ndarray:
        """What log-probabilities at temperature 1 are at this one."""
        if self.temperature == 1:
            return logs
        if self.task == "multi-label":
            return -np.logaddexp(0, -(logs - _log_of_rest(logs)) / self.temperature)
        logs = logs / self.temperature
        return logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)

    def _log_probabilities(self, outputs: np.ndarray) -> np.ndarray:
        outputs = np.asarray(outputs, np.float64)
        if self.task == "binary":
            other = 1 - outputs if self.activated else -outputs
            outputs = np.concatenate([other, outputs], axis=1)
        if self.activated:
            most = 1 - 1e-12 if self.task == "multi-label" else 1.0
            return np.log(np.clip(outputs, 1e-12, most))
        if self.task == "single-label":
            shifted = outputs - outputs.max(axis=1, keepdims=True)
            return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return -np.logaddexp(0, -outputs)  # of a sigmoid

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """The class probabilities, float64 `(n, classes)`."""
        return np.exp(self.log_probabilities(outputs))

    def answers(self, logs: np.ndarray) -> np.ndarray:
        """Which classes the model says that each image shows, bool `(n, classes)`.

        That is the most probable one, but where there are thresholds and of several labels: those
        whose probability reaches the threshold, which may be none.
        """
        if self.task == "multi-label":
            return np.exp(logs) >= np.asarray(self.thresholds or (0.5,))
        chosen = logs.argmax(axis=1)
        if self.thresholds:
            chosen = (np.exp(logs[:, 1]) >= self.thresholds[0]).astype(int)
        return np.arange(logs.shape[1]) == chosen[:, None]

    def log_confidence(self, logs: np.ndarray, said: np.ndarray) -> np.ndarray:
        """The logarithm of the probability that answers are right as a whole, `(n,)`.

        Of several labels that is the product over all of them, said or not.
        """
        if self.task != "multi-label":
            return np.where(said, logs, 0).sum(axis=1)
        return np.where(said, logs, _log_of_rest(logs)).sum(axis=1)

    def losses(self, logs: np.ndarray, true: np.ndarray) -> np.ndarray:
        """The loss of each image, nats: cross-entropy; of several labels the binary one's mean.

        What is true is the class of each image, `(n,)`, or bool `(n, classes)`.
        """
        if np.ndim(true) == 1:
            true = np.arange(logs.shape[1]) == np.asarray(true)[:, None]
        labels = logs.shape[1] if self.task == "multi-label" else 1
        return -self.log_confidence(logs, true) / labels


def _log_of_rest(logs: np.ndarray) -> np.ndarray:
    """Of a probability's logarithm that of what it lacks of 1."""
    return np.log(np.clip(-np.expm1(logs), 1e-300, 1.0))


def meaning_of(model: keras.Model) -> Meaning:
    """What a Keras model's outputs say.

    Raises:
        InputError: It is no classifier, or that stays unclear.
    """
    model = as_functional(model)
    info = getattr(model, "info", {})
    # Of a backbone that is only pooled.
    bare = type(model.layers[-1]).__name__ in _MEANS | _MAXIMA
    bare = bare and (info.get("options") or {}).get("include_top") is False
    check_head(model.name, [tuple(tensor.shape) for tensor in model.outputs], bare)
    if len(model.inputs) != 1:
        raise InputError(
            f"A classifier has one input, an image. {model.name!r} has {len(model.inputs)}."
        )
    count, end = model.outputs[0].shape[1], _end(model, model.outputs[0])
    if end in (_OPAQUE, _UNCLEAR):
        end = _end_by_numbers(model, strict=end == _UNCLEAR)
    if end not in ("logits", "softmax", "sigmoid"):
        raise InputError(
            f"The outputs of {model.name!r} are no probabilities and no logits ({end}): end it in "
            "a softmax, a sigmoid or a layer without an activation."
        )
    if end == "softmax" and count == 1:
        raise InputError(
            f"{model.name!r} ends in a softmax over one output, which is 1 for every image: "
            "train it with a sigmoid, or with an output for each class."
        )
    task = "single-label"
    if end == "sigmoid":
        task = "binary" if count == 1 else "multi-label"
    elif end == "logits":
        task = _task_of_logits(model.name, count, info)
    return Meaning(task, end != "logits").as_calibrated(info, count)


def _task_of_logits(name: str, count: int, info: dict[str, Any]) -> str:
    """What no graph tells: whether logits are for a softmax or for sigmoids."""
    task, names = (info.get("options") or {}).get("task"), info.get("class_names") or []
    if task is None and count == 1 and len(names) != 2:
        raise InputError(
            f"{name!r} has one output without an activation: is it the logit of two classes? Then "
            "say which, model.info['class_names'] = ['cat', 'dog'] (the second is the one that a "
            "high output means), or end the model in a sigmoid."
        )
    task = task or ("binary" if count == 1 else "single-label")
    if (task == "binary") != (count == 1):
        raise InputError(f"The task of {name!r} is {task!r}, but it has {count} outputs.")
    return task


def check_head(name: str, shapes: list[tuple[int | None, ...]], bare: bool = False) -> None:
    """Says where outputs of these shapes are no classifier's; `bare` are those without a head.

    Raises:
        InputError: Several outputs, or one that is not `(batch, classes)`.
    """
    if bare or len(shapes) != 1 or len(shapes[0]) != 2:
        shown = shapes[0] if len(shapes) == 1 else shapes
        raise InputError(f"The model {name!r} has no classification head: its output is {shown}.")


def meaning_of_numbers(outputs: np.ndarray) -> str | None:
    """How outputs for noise must have come about: `"softmax"`, `"sigmoid"`, `"logits"` or `None`.

    For models whose graph cannot be read: a file of somebody else's, a layer of one's own.
    """
    outputs = np.asarray(outputs, np.float64)
    outputs = outputs[np.isfinite(outputs).all(axis=1)]  # an exponential by hand overflows
    if len(outputs) < 2:
        return None
    inside = bool((outputs >= 0).all() and (outputs <= 1).all())
    if inside and outputs.shape[1] > 1 and np.abs(outputs.sum(axis=1) - 1).max() < 0.01:
        return "softmax"
    if not inside:
        return "logits"
    return "sigmoid" if (outputs.std(axis=0) > 0).any() or np.ptp(outputs) > 0 else None


def noise(*shape: int) -> np.ndarray:
    """Images of noise from faint to loud: what saturates in one of them does not in the others."""
    loud = np.repeat([255.0, 25.0, 2.5, 0.25], 2).reshape(-1, *[1] * len(shape))
    images = np.random.default_rng(0).uniform(-1, 1, (len(loud), *shape)) * loud
    return images.astype(np.float32)


# --- read off the graph --------------------------------------------------------------------------

_UNCLEAR = "what stands behind the last activation changes it"
_OPAQUE = "a layer of a kind that is not Keras'"

# Layers and operations by their names. Some give on what they get, but for its shape.
_SAME = {
    "ActivityRegularization", "AlphaDropout", "Cast", "Copy", "Dropout", "ExpandDims", "Flatten",
    "GaussianDropout", "GaussianNoise", "Identity", "Permute", "Reshape", "SpatialDropout2D",
    "Squeeze", "StopGradient", "Transpose",
}  # fmt: skip
_MEANS = {
    "AdaptiveAveragePooling2D", "AveragePooling2D", "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
}  # fmt: skip
_MAXIMA = {"AdaptiveMaxPooling2D", "GlobalMaxPooling1D", "GlobalMaxPooling2D", "MaxPooling2D"}
# Which of several probabilities they make probabilities again.
_KEEPS = {
    **dict.fromkeys(_SAME | _MEANS | {"Average"}, ("softmax", "sigmoid")),
    **dict.fromkeys(_MAXIMA | {"Concatenate", "GetItem", "Maximum"}, ("sigmoid",)),
}
# What makes logits of logits.
_LINEAR = {
    "Add", "Divide", "Mean", "Multiply", "Negative", "Rescaling", "Subtract", "Sum", "TrueDivide",
    *_KEEPS,
}  # fmt: skip
_FOREIGN = {"FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper"}
_ACTIVATIONS = {
    "linear": "linear", "softmax": "softmax", "sigmoid": "sigmoid", "hardsigmoid": "sigmoid",
    "logsoftmax": "logits",  # a softmax of it gives the probabilities, as of any logits
}  # fmt: skip
_KNOWN = {name.lower().replace("_", "") for name in dir(keras.activations)}


def is_of_keras(thing: Any) -> bool:
    """Whether a layer, an operation or a function is Keras' own or this package's, to be known."""
    home = str(getattr(thing, "__module__", "")).split(".")[0]
    return home in ("keras", "keras_resnet", "keras_hub") and type(thing).__name__ not in _FOREIGN


def node_of(model: keras.Model, tensor: Any) -> Any:
    """The node of a Functional model's graph that makes a tensor."""
    return next(n for n in nodes_of(model) if any(t is tensor for t in n.outputs))


def gives_on(operation: Any) -> bool:
    """Whether an operation leaves what it gets as it is, but for its shape."""
    if isinstance(operation, keras.layers.Activation):
        return activation_of(operation) == "linear"
    return is_of_keras(operation) and type(operation).__name__ in _SAME


def activation_of(operation: Any) -> str | None:
    """What a layer or operation ends in: `"linear"`, `"softmax"`, `"sigmoid"`, `"logits"`.

    `"logits"` are logarithms of a softmax; another activation is given by its name, and one that
    is not Keras' as `None`.
    """
    function = getattr(operation, "activation", operation)
    if not is_of_keras(function):
        return None
    name = str(getattr(function, "__name__", type(function).__name__))
    if name == "Softmax" and getattr(function, "axis", -1) not in (-1, 1):
        return "softmax over another axis"
    name = name.lower().replace("_", "")
    return _ACTIVATIONS.get(name, name)


def _end(model: keras.Model, tensor: Any) -> str:
    """How a tensor of a graph came about: `"logits"`, `"softmax"`, `"sigmoid"`, or what else."""
    node = node_of(model, tensor)
    layer = node.operation
    if node.is_input:
        return "its input as it is"
    if isinstance(layer, keras.Model):
        inner = as_functional(layer, strict=False)
        index = next(i for i, t in enumerate(node.outputs) if t is tensor)
        return _OPAQUE if inner is None else _end(inner, inner.outputs[index])
    if not is_of_keras(layer) and not isinstance(layer, (keras.layers.Dense, keras.layers.Conv2D)):
        return _OPAQUE
    name = type(layer).__name__
    if not gives_on(layer) and (hasattr(layer, "activation") or name.lower() in _KNOWN):
        activation = activation_of(layer)
        return _OPAQUE if activation is None else {"linear": "logits"}.get(activation, activation)
    if getattr(layer, "weights", None):  # a norm, say: it makes numbers of its own
        return "logits"
    kinds = {_end(model, source) for source in node.input_tensors}
    kind = kinds.pop() if len(kinds) == 1 else _UNCLEAR
    if kind == _OPAQUE or kind in _KEEPS.get(name, ()) or gives_on(layer):
        return kind
    if name in _MEANS | _MAXIMA and kind not in ("softmax", "sigmoid", _UNCLEAR):
        return "logits"  # SqueezeNet's are means behind a ReLU
    return "logits" if kind == "logits" and name in _LINEAR else _UNCLEAR


@contextlib.contextmanager
def one_line_of(name: str, images: np.ndarray) -> Iterator[None]:
    """Around a model's run on images: each backend and runtime raises kinds of its own.

    Raises:
        InputError: It failed.
    """
    try:
        yield
    except KerasResNetError:
        raise
    except Exception as error:
        raise InputError(
            f"{printable(name)!r} fails on images of the shape {images.shape[1:]}: "
            f"{shortened(reason_of(error), 200)}"
        ) from error


def _end_by_numbers(model: keras.Model, strict: bool) -> str:
    """The same of a graph that cannot be read, from what the model gives for noise."""
    shape = [size or 64 for size in model.inputs[0].shape[1:]]
    images = noise(*shape)
    with one_line_of(model.name, images):
        found = np.asarray(ops.convert_to_numpy(predicted(model, images)))
    kind = meaning_of_numbers(found)
    if strict and kind != "softmax":
        return _UNCLEAR
    if kind == "logits" and found.shape[1] == 1:
        return f"one output of {found.ravel().tolist()[0]:.3g} for noise"
    return kind or "the same number for every image and class"


# --- what a model takes --------------------------------------------------------------------------

PIXELS = ("0..255", "0..1", "normalized")


def pixels_of(model: keras.Model) -> str:
    """Which pixels a Keras model takes: `"0..255"`, `"0..1"`, or `"normalized"` by mean and std.

    What stands in front of the first layer with a kernel, in models inside the model as well, is
    run on black and on white: whatever brings 0..255 near 1 is a normalisation, a `Rescaling` as
    well as a function of one's own.

    Raises:
        InputError: That stays unclear.
    """
    model = as_functional(model)
    if isinstance(model.layers[min(1, len(model.layers) - 1)], Normalize):
        return "0..255"  # however little 16-bit images differ, and it divides by
    front, known = _front(model)
    found = _range_of(model, front) if front else ("normalized" if known else None)
    if found is None or (found == "normalized" and not known):
        found = pixels_in(getattr(model, "info", {}))
    if found is None:
        raise InputError(
            f"It cannot be told whether {model.name!r} normalises pixels itself: say "
            "pixels='0..255' (it does) or pixels='normalized' (it does not); model.info['options'] "
            "= {'include_preprocessing': True} or False says it for good."
        )
    return found


def pixels_in(info: dict[str, Any]) -> str | None:
    """What a model's `info` says of the pixels that it takes."""
    inside = (info.get("options") or {}).get("include_preprocessing")
    return None if inside is None else "0..255" if inside else "normalized"


def _front(model: keras.Model) -> tuple[list[Callable], bool]:
    """What leads to the first layer with a kernel, and whether that layer is of a known kind."""
    target, front, known = model.outputs[0], [], True
    for node in (node for node in nodes_of(model) if not node.is_input):
        layer = node.operation
        if not _has_kernel(layer):
            continue
        target = node.input_tensors[0]
        if isinstance(layer, keras.Model):
            inner = as_functional(layer, strict=False)
            front, known = ([], False) if inner is None else _front(inner)
        else:
            stock = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
            known = is_of_keras(layer) or isinstance(layer, stock)
        break
    if target is not model.inputs[0]:
        front = [keras.Model(model.inputs[0], target), *front]
    return front, known


def _has_kernel(layer: Any) -> bool:
    """Whether an operation weighs, and does more than to shift and scale."""
    if isinstance(layer, keras.Model):
        inner = as_functional(layer, strict=False)
        return bool(layer.weights) and (inner is None or any(map(_has_kernel, inner.layers)))
    if isinstance(layer, (keras.layers.Normalization, keras.layers.BatchNormalization)):
        return False
    if type(layer).__name__ in _FOREIGN - {"Lambda"}:
        return True
    return weighs(layer)


def weighs(operation: Any) -> bool:
    """Whether it has weights; a dropout's and an augmentation's are the state of their numbers."""
    return any("seed" not in weight.path for weight in getattr(operation, "weights", ()))


def _range_of(model: keras.Model, front: list[Callable]) -> str | None:
    """What the layers in front take, by what they make of black and white; `None` if unclear."""
    given = model.inputs[0]
    ends = []
    try:
        for value in (0, 255):
            x = ops.full([size or 64 for size in (1, *given.shape[1:])], value, dtype=given.dtype)
            for stage in front:
                x = stage(x, training=False)
            ends.append(np.asarray(ops.convert_to_numpy(ops.cast(x, "float32"))))
    except Exception:  # a layer of somebody's that takes no such image
        return None
    black, white = ends
    scale, shift = float(np.abs(white - black).max() / 255), float(np.abs(black).max())
    if abs(scale - 1) < 0.01 and shift < 0.01:
        return "normalized"  # nothing happens there
    # Nobody takes a hundred off what is normalised already: those are means of 0..255.
    if scale <= 0.1 or shift > 10:
        return "0..255"
    # 1/std and more for 0..1; in between it may be a second normalisation of what is normalised.
    return "0..1" if scale > 1.6 else None
