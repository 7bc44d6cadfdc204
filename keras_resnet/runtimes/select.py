"""Which engine runs a model: the one asked for, a file's own, or the fastest."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

from keras_resnet.models.files import load_model
from keras_resnet.models.image_model import as_functional
from keras_resnet.models.meaning import meaning_of
from keras_resnet.runtimes import formats, rows, writing
from keras_resnet.runtimes.rows import ENGINES, check_engine
from keras_resnet.runtimes.runner import (
    FileRunner,
    KerasRunner,
    Runner,
    Trial,
    relative_difference,
    require_finite_weights,
)
from keras_resnet.system.device import devices, tf32_allowed
from keras_resnet.system.errors import (
    InputError,
    MissingDependencyError,
    NotFoundError,
    meant_path,
    reason_of,
)
from keras_resnet.system.process import tune_process

_OWN_RUNTIME = ("keras", "auto")


def runtime_of(name: str) -> type[FileRunner]:
    """What runs the files of a format.

    Raises:
        MissingDependencyError: It is not installed; the message has the pip line.
    """
    rows.require_runtime(name)
    return rows.FORMATS[name].runner


def _format_of_engine(engine: str) -> str:
    """The format that an engine takes a Keras model in."""
    return next(name for name, row in rows.FORMATS.items() if row.runner.runtime == engine)


def open_file(
    path: str | os.PathLike,
    engine: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
) -> FileRunner:
    """Opens an exported file in its own runtime, or in another that reads it.

    A SavedModel is a program for TensorFlow, which can read and write files, and a `.pt2` file may
    hold pickles: open those of people you trust. The other formats hold a graph and numbers.

    Args:
        path: An `.onnx`, `.xml`, `.tflite` or `.pt2` file, or a SavedModel folder.
        engine: `"openvino"` reads `.onnx` as well; `"auto"` and `"keras"` take the file's own.
        precision: What it computes in; float32 by default.
        threads: How many; those that the process may use by default.

    Raises:
        NotFoundError: There is no such file.
        InputError: No exported file, or one that the engine does not read.
        MissingDependencyError: The runtime is not installed.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotFoundError(f"No model file at {str(path)!r}.{meant_path(path)}")
    kind = rows.format_of_file(path)
    if kind is None:
        raise InputError(f"{str(path)!r} is no exported model: {_suffixes()}.")
    runner = runtime_of(kind if engine in _OWN_RUNTIME else _format_of_engine(engine))
    if kind not in runner.reads:
        raise InputError(
            f"The engine {engine!r} does not read {path.name!r}; without an engine's name the "
            f"file is run by {rows.FORMATS[kind].runner.runtime}."
        )
    return runner(path, precision, threads)


def _suffixes() -> str:
    known = [row.suffix for row in rows.FORMATS.values() if row.suffix]
    return f"{', '.join(known)} or a SavedModel folder"


# --- which one -----------------------------------------------------------------------------------


def open_runner(
    model: keras.Model | Runner | str | os.PathLike,
    engine: str = "keras",
    precision: str | None = None,
) -> Runner:
    """Makes a model ready to run.

    Args:
        model: A model, a `.keras` file, a run folder, or an exported file (`.onnx`, OpenVINO's
            `.xml`, a SavedModel folder, `.tflite`, `.pt2`); a `Runner` is given back as it is.
        engine: What runs it. `"keras"`: the backend, or an exported file's own runtime.
            `"onnxruntime"`, `"openvino"`, `"torch"` (without Keras): the model is exported to a
            temporary file for it. `"auto"`: each of these that is installed and can be had on this
            backend is tried on eight images of noise, and the fastest taken.
        precision: `"float32"`, `"bfloat16"` or `"float16"`, where the engine has it; the model's
            own by default, and float32 in exported files.

    Raises:
        InputError: An unknown engine, one that cannot be had here, a model without a
            classification head, or weights that are not finite.
        MissingDependencyError: The engine is not installed; the message has the pip line.
        NotFoundError: There is no such file.

    Examples:
        >>> from keras_resnet import create_model
        >>> runner = open_runner(create_model("resnet20"))
        >>> runner.log_probabilities(np.zeros((2, 32, 32, 3), "float32")).shape
        (2, 10)
    """
    check_engine(engine)
    if isinstance(model, Runner):
        return model
    tune_process()
    if not isinstance(model, keras.Model):
        if rows.format_of_file(Path(model).expanduser()) is not None:
            runner = open_file(model, engine, precision)
            runner.meaning()  # says before any work what is no classifier
            return runner
        model = load_model(model)
    model = as_functional(model)
    require_finite_weights(model)
    if engine == "keras":
        runner = KerasRunner(model, precision)
        runner.meaning()
        return runner
    meaning_of(model)  # before a file is written for the engine
    if engine == "auto":
        return _fastest(model, precision)
    return _through_file(model, engine, precision)


def _through_file(model: keras.Model, engine: str, precision: str | None) -> FileRunner:
    """A Keras model in another engine, by way of a temporary file, compared before it is used."""
    name = _format_of_engine(engine)
    # Both before the work of exporting.
    formats.check_backend(name)
    kind = runtime_of(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / f"model{rows.FORMATS[name].suffix}"
        writing.write(model, path, name)
        runner = kind(path, precision)
    images = writing.sample_input(model, 2)
    difference = relative_difference(runner.outputs(images), KerasRunner(model).outputs(images))
    # A wrong graph is off by its own size; half precision and TF32, by some hundredths.
    exact = devices() == ["cpu"] or not tf32_allowed()
    is_float32 = precision in (None, "float32") and _is_float32(model)
    tolerance = 1e-3 if exact and is_float32 else 0.1
    if not difference <= tolerance:
        raise InputError(
            f"The engine {engine!r} does not give this model's outputs: they differ by "
            f"{difference:.2g} of the largest. Use engine='keras', and please report it."
        )
    return runner


def _is_float32(model: keras.Model) -> bool:
    return writing.in_float32(model) is model


def _fastest(model: keras.Model, precision: str | None) -> Runner:
    images = writing.sample_input(model, 8)
    trials: list[Trial] = []
    best = None
    for engine in (one for one in ENGINES if one != "auto"):
        try:
            if engine == "keras":
                runner: Runner = KerasRunner(model, precision)
            else:
                runner = _through_file(model, engine, precision)
            runner.outputs(images)  # the first call builds and compiles
            seconds = _median_seconds(runner, images)
        except Exception as error:  # each engine raises kinds of its own; another one may do
            known = isinstance(error, (InputError, MissingDependencyError))
            trials.append(Trial(engine, None, str(error) if known else reason_of(error)))
            continue
        if best is None or seconds < min(t.seconds for t in trials if t.seconds is not None):
            best = runner
        trials.append(Trial(runner.name, seconds))
    if best is None:
        failed = "; ".join(f"{trial.name}: {trial.reason}" for trial in trials)
        raise InputError(f"No engine can run it: {failed}")
    best.trials = trials
    return best


def _median_seconds(runner: Runner, images: np.ndarray, count: int = 5) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        runner.outputs(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
