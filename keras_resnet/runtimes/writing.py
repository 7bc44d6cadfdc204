"""Writes a model in a format."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.models.image_model import ImageModel
from keras_resnet.runtimes.formats import INPUT, check_backend, describe, input_size, pixels_held
from keras_resnet.runtimes.rows import FORMATS
from keras_resnet.system.device import devices, without_source_paths
from keras_resnet.system.errors import InputError, reason_of
from keras_resnet.system.files import check_room


def write(
    model: keras.Model, path: str | os.PathLike, name: str, batch_size: int | None = None
) -> dict[str, Any]:
    """Writes a model in a format, unchecked; `export` is what users call.

    Returns:
        The description that went along.

    Raises:
        InputError: A model that cannot be written, or a backend that cannot.
        MissingDependencyError: A package is missing.
    """
    check_backend(name)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise InputError(
            f"A model with one input and one output can be exported; {model.name!r} has "
            f"{len(model.inputs)} and {len(model.outputs)}."
        )
    description = describe(model, batch_size)
    row, kind = FORMATS[name], FORMATS[name].runner
    batch = None if kind.fixes_batch else batch_size
    signature = keras.InputSpec(shape=(batch, *description["input"]["shape"][1:]), dtype="float32")
    signature.name = INPUT
    # A program that torch traces on a GPU takes no other batches than the kernels of that GPU.
    apart = keras.backend.backend() == "torch" and devices()[0] != "cpu"
    place = keras.device("cpu") if apart else contextlib.nullcontext()
    try:
        with _quiet(), without_source_paths(), place:
            model = kind.prepare(in_float32(model, copied=apart))
            if kind.needs_room:
                check_room(path, 3 * sum(v.value.nbytes for v in model.variables) + 2**20)
            model.export(
                os.fspath(path),
                format=row.keras_name,
                verbose=False,
                input_signature=[signature],
                **kind.options(batch),
            )
            kind.finish(Path(path), description)
    except OSError:  # a full disk, say
        raise
    except Exception as error:  # of converters, each with kinds of its own
        check_room(path, 2**20)
        raise InputError(
            f"Keras on {keras.backend.backend()} could not write {model.name!r} as {name}: "
            f"{reason_of(error)}"
        ) from error
    return description


def in_float32(model: keras.Model, copied: bool = False) -> keras.Model:
    """The same network with every layer in float32; the model itself where it is so already.

    What runs exported files chooses its own precision, and Keras' ONNX exporter wants float32. What
    is `copied` is so in any case, and lies on the device on which Keras now computes.
    """
    if not copied and all(x.dtype_policy.name == "float32" for x in all_layers(model)):
        return model

    def recast(layer):
        if isinstance(layer, keras.Model):
            return in_float32(layer, copied)
        return type(layer).from_config({**layer.get_config(), "dtype": "float32"})

    return clone(model, recast)


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model and of the models in it."""
    found = []
    for layer in model.layers:
        found += all_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def clone(
    model: keras.Model, make: Callable[[keras.layers.Layer], keras.layers.Layer]
) -> keras.Model:
    """The same network with the same weights, out of the layers that `make` gives for its own."""
    # A bare Functional model, so that any class of model can be cloned.
    plain = keras.Model(model.input, model.output, name=model.name)
    copy = keras.models.clone_model(plain, clone_function=make)
    copy = ImageModel(copy.input, copy.output, name=model.name, info=getattr(model, "info", {}))
    copy.set_weights(model.get_weights())
    return copy


@contextlib.contextmanager
def _quiet():
    """Without the tracers' warnings, of which there are dozens and none is for the user."""
    loggers = [logging.getLogger(name) for name in ("tf2onnx", "tensorflow", "torch.onnx")]
    levels = [one.level for one in loggers]
    # torch prints a whole graph where it cannot convert it.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def size_of(path: Path, name: str) -> int:
    """Bytes on disk."""
    total = 0
    for one in FORMATS[name].runner.files(path):
        inside = [p for p in one.rglob("*") if p.is_file()] if one.is_dir() else [one]
        total += sum(p.stat().st_size for p in inside)
    return total


def sample_input(model: keras.Model, count: int, seed: int = 0) -> np.ndarray:
    """Noise of the shape and the range that a model takes, `(count, height, width, channels)`."""
    shape = input_size(model)
    rng = np.random.default_rng(seed)
    if pixels_held(model) == "0..255":
        return rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return rng.standard_normal((count, *shape), dtype=np.float32)
