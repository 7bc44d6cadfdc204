"""Proves an import numerically, stage by stage."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np

from keras_resnet.system.device import exact_float32
from keras_resnet.system.errors import InputError, one_of
from keras_resnet.system.replicas import predicted
from keras_resnet.variants import SPECS
from keras_resnet.weights import reference
from keras_resnet.weights.mapping import (
    convs_of,
    expected_keys,
    info_of,
    modules_of,
    strides_of,
    weighted_layers,
)
from keras_resnet.weights.matching import Shape, head_modules
from keras_resnet.weights.sources import Source, own_head_of, read_source, to_json_text


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """How far a model is from the NumPy reference of its weights; `print` it.

    Attributes:
        model: The model's name.
        source: Where the weights come from.
        backend: Keras' backend that ran.
        images: Shape of the images that the model was given.
        stages: `(name, shape as torch has it, error)` in the network's order; the error is the
            largest difference over the reference's largest magnitude.
        tolerance: The largest error that passes.
        first_difference: The first stage above it, or `None`.
        head_compared: Whether the logits are among the stages.
        strides: Where the reference's bottlenecks stride, and how that is known.
        seconds: Time that the reference took.
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
        return to_json_text(facts, path)

    def __str__(self) -> str:
        verdict = f"DIFFERS from {self.first_difference!r} on"
        verdict = f"agrees to {self.error:.1e}" if self.passed else verdict
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

    The reference (`weights.reference`) reads the network off the state dict and shares no code
    with the layers, the blocks or the conversion.

    Args:
        model: A model of this package's architectures, on any backend, with any head.
        source: As for `load_torchvision`.
        image_size: Side of the random images, or (height, width), where the model leaves it
            open; by default the variant's.
        images: Images to use in place of random ones, as the model takes them.
        tolerance: Largest difference over largest magnitude that passes.
        key: Which entry of a nested checkpoint to read.
        stride_on: Where the source's bottlenecks stride. By default what is known of the source:
            torchvision's files `"3x3"`, a file written here says it, a module shows it; of
            unknown ones the model's own is taken, and the report says so.

    Returns:
        The stages' errors; `passed`, and where they first part.

    Raises:
        InputError: The state dict is of no known architecture, or images do not fit.
        CheckpointError: The file cannot be read, or is refused.

    Examples:
        >>> from keras_resnet import create_model, to_torchvision
        >>> model = create_model("resnet20")
        >>> verify(model, to_torchvision(model)).passed
        True
    """
    one_of("stride_on", stride_on, (None, "1x1", "3x3"))
    wanted, variant = expected_keys(model), info_of(model).get("variant")
    found = read_source(source, key, wanted, own_head_of(model), variant)
    if stride_on is not None:
        found.strides, found.strides_from = stride_on, "as asked"
    own_head = (info_of(model).get("weights") or {}).get("head", "strict") != "strict"
    return verify_source(
        model, found, head=not own_head, image_size=image_size, images=images, tolerance=tolerance
    )


@exact_float32()
def verify_source(
    model, found: Source, *, head: bool, image_size=None, images=None, tolerance=1e-4
) -> VerifyReport:
    """`verify` of what `read_source` gave; without the head, logits are not compared."""
    name, model = model.name, _network(model)
    tensors = _stage_tensors(model)
    network_input = tensors.pop("input")
    raw = network_input is not model.inputs[0]
    images = _test_images(model, image_size, raw) if images is None else np.asarray(images)
    own_head = own_head_of(model)
    last = f"{own_head}.weight"
    if not head or found.shapes.get(last) != expected_keys(model).get(last):
        tensors.pop("logits", None)
    inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
    taps = keras.Model(inputs, [*tensors.values(), *([network_input] if raw else [])])
    # One run alone: jax compiles a whole network faster than its single operations, TensorFlow
    # runs them sooner than it traces the whole.
    eager = keras.backend.backend() == "tensorflow"
    outputs = taps(images, training=False) if eager else predicted(taps, images)
    outputs = keras.tree.flatten(outputs)
    outputs = [_as_torch_has_it(model, output) for output in outputs]
    fed = outputs.pop() if raw else _as_torch_has_it(model, images)

    own = strides_of(convs_of(model))
    strides, why = found.strides, found.strides_from
    if own is None:
        strides, why = None, ""
    elif strides is None:
        strides, why = own, "the model's; the source does not say"
    started = time.perf_counter()
    state = _reference_state(found, model, tensors)
    known = strides if strides in ("1x1", "3x3") else None
    expected = reference.forward(state, fed, stride_on=known)
    seconds = time.perf_counter() - started
    if "logits" in tensors:
        activation = getattr(modules_of(model)[own_head][0], "activation", None)
        if activation not in (None, keras.activations.linear):
            logits = keras.ops.convert_to_tensor(expected["logits"])
            expected["logits"] = keras.ops.convert_to_numpy(activation(logits))

    stages = tuple(
        (stage, tuple(expected[stage].shape), relative_difference(output, expected[stage]))
        for stage, output in zip(tensors, outputs, strict=True)
        if stage in expected and (stage != "pool" or output.ndim == expected[stage].ndim)
    )
    if not stages:
        raise InputError(f"{name} has no stage that the reference computes too.")
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
    """What the reference computes too, by its names, and the network's `input`."""
    tensors = {"input": next(iter(weighted_layers(model))).input}
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
    if own_head_of(model) is not None:
        tensors["logits"] = model.outputs[0]
    return tensors


def _channels_last(model: keras.Model) -> bool:
    first = next(iter(weighted_layers(model)))
    return getattr(first, "data_format", "channels_last") == "channels_last"


def _as_torch_has_it(model: keras.Model, value) -> np.ndarray:
    array = np.asarray(keras.ops.convert_to_numpy(value), np.float32)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 and _channels_last(model) else array


def _test_images(model: keras.Model, image_size, raw: bool) -> np.ndarray:
    """Random images: pixel values where the model prepares them, else normal deviates."""
    last = _channels_last(model)
    sides = list(model.input_shape[1:3] if last else model.input_shape[2:4])
    spec = SPECS.get(info_of(model).get("variant"))
    asked = (image_size, image_size) if isinstance(image_size, int) else image_size
    for i, side in enumerate(sides):
        wanted = asked[i] if asked else side or (spec.input_size if spec else 224)
        if side not in (None, wanted):
            raise InputError(f"{model.name} takes images of {sides}, not of {asked}.")
        sides[i] = wanted
    channels = model.input_shape[3 if last else 1]
    shape = (1, *sides, channels) if last else (1, channels, *sides)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, shape) if raw else random.standard_normal(shape)
    return pixels.astype(np.float32)


def _reference_state(found: Source, model: keras.Model, tensors) -> dict[str, np.ndarray]:
    """The source's entries that the model has too, with a head, which the reference insists on."""
    expected, own_head = expected_keys(model), own_head_of(model)
    heads = {k.rpartition(".")[0] for k, v in found.shapes.items()
             if len(v) == 2 and k.endswith(".weight")} & {own_head, *head_modules()}  # fmt: skip
    known = found.tensors.items()
    state = {k: v for k, v in known if k in expected or k.rpartition(".")[0] in heads}
    if not heads and "stem" in tensors:
        stages = [t for name, t in tensors.items() if re.match(r"layer|stage", name)]
        width = stages[-1].shape[3 if _channels_last(model) else 1]
        name = own_head if own_head in ("fc", "linear") else "fc"
        state[f"{name}.weight"] = np.zeros((1, width), np.float32)
        state[f"{name}.bias"] = np.zeros(1, np.float32)
    return state


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two outputs over the largest output; `nan` if any is none."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
