"""Which engine runs a model: the one asked for, a file's own, or the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import statistics
import timeit
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models.files import load_model, model_preprocess
from keras_resnet.models.image_model import as_functional, require_finite_weights
from keras_resnet.models.meaning import meaning_of
from keras_resnet.models.summary import count_flops
from keras_resnet.runtimes import formats, kept, rows, writing
from keras_resnet.runtimes.kept import Kept
from keras_resnet.runtimes.rows import ENGINES, check_engine
from keras_resnet.runtimes.runner import FileRunner, KerasRunner, Runner, Trial, cores
from keras_resnet.system.device import devices, exact_float32
from keras_resnet.system.errors import (
    InputError,
    MissingDependencyError,
    NotFoundError,
    meant_path,
    reason_of,
)
from keras_resnet.system.process import tune_process
from keras_resnet.weights.verify import relative_difference

_OWN_RUNTIME = ("keras", "auto")


def runtime_of(name: str) -> type[FileRunner]:
    """What runs the files of a format.

    Raises:
        MissingDependencyError: It is not installed; the message has the pip line.
    """
    rows.require_runtime(name)
    return rows.FORMATS[name].runner


def _row(engine: str) -> rows.Format:
    """The format that an engine takes a Keras model in."""
    return next(row for row in rows.FORMATS.values() if row.runner.runtime == engine)


def open_file(
    path: str | os.PathLike,
    engine: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    many: bool = False,
) -> FileRunner:
    """Opens an exported file in its own runtime, or in another that reads it.

    A SavedModel is a program for TensorFlow, which can read and write files, and a `.pt2` file may
    hold pickles: open those of people you trust. The other formats hold a graph and numbers. Of the
    engines `"openvino"` reads `.onnx` as well; `"auto"` and `"keras"` take the file's own. The
    other arguments are `FileRunner`'s.

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
        known = ", ".join(row.suffix for row in rows.FORMATS.values() if row.suffix)
        raise InputError(f"{str(path)!r} is no exported model: {known} or a SavedModel folder.")
    runner = runtime_of(kind if engine in _OWN_RUNTIME else _row(engine).name)
    if kind not in runner.reads:
        raise InputError(
            f"The engine {engine!r} does not read {path.name!r}; without an engine's name the "
            f"file is run by {rows.FORMATS[kind].runner.runtime}."
        )
    return runner(path, precision, threads, many)


# --- which one -----------------------------------------------------------------------------------


def open_runner(
    model: keras.Model | Runner | str | os.PathLike,
    engine: str = "keras",
    precision: str | None = None,
    *,
    images: int | None = None,
    preprocess: Preprocess | None = None,
) -> Runner:
    """Makes a model ready to run.

    What another engine needs is made of a model file once: it is kept in the user's cache
    (`KERAS_RESNET_HOME`), with its comparison with the model, and made again for another model
    file, engine or version. A model in memory has no file, and is converted at each call.

    Args:
        model: A model, a `.keras` file, a run folder, or an exported file (`.onnx`, OpenVINO's
            `.xml`, a SavedModel folder, `.tflite`, `.pt2`); a `Runner` is given back as it is.
        engine: What runs it. `"keras"`: the backend, or an exported file's own runtime.
            `"onnxruntime"`, `"openvino"`, `"torch"` (without Keras): the model is exported for it.
            `"auto"`: of so many `images`, ONNX Runtime or OpenVINO where one is installed, there
            are images enough to pay for the conversion (see `images_that_pay`) or it was converted
            before, its outputs are the model's to 1e-4 of the largest and it was the faster; else
            the model itself. Where the number is not said: each engine that is installed and can
            be had on this backend is tried on eight images of noise, and the fastest taken.
        precision: `"float32"`, `"bfloat16"` or `"float16"`, where the engine has it; the model's
            own by default, and float32 in exported files.
        images: How many it will be asked for. `runner.why` says what `"auto"` made of it.
        preprocess: How they are prepared, where that is not the model's own way.

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
    unasked = engine == "auto" and images is not None and precision is None
    many, source = images is not None and images >= _MANY * cores(), None
    if not isinstance(model, keras.Model):
        if rows.format_of_file(Path(model).expanduser()) is not None:
            runner: Runner = open_file(model, engine, precision, many=many)
            runner.meaning()  # says before any work what is no classifier
            return runner
        if precision is None and (unasked or engine not in _OWN_RUNTIME):
            wanted = _UNASKED if unasked else (engine,)
            found = _from_kept(kept.source_of(model), wanted, preprocess, many, unasked)
            if found is not None:
                return found
        path, model = model, load_model(model)
        source = kept.source_of(path)
    model = as_functional(model)
    require_finite_weights(model)
    if engine == "keras":
        runner = KerasRunner(model, precision)
        runner.meaning()
        return runner
    meaning_of(model)  # before a file is written for the engine
    if unasked:
        return _weighed(model, source, images or 0, preprocess, many)
    if engine == "auto":
        return _fastest(model, precision)
    return _through_file(model, engine, precision, source, many)


def _from_kept(
    source: Path | None,
    engines: Sequence[str],
    preprocess: Preprocess | None,
    many: bool,
    unasked: bool,
) -> FileRunner | None:
    """The first of the engines for which the model's file is kept, without the model."""
    for engine in engines if source is not None else ():
        row = _row(engine)
        if importlib.util.find_spec(row.module) is None or (unasked and _no_device(engine)):
            continue
        found = kept.find(source, row)
        if found is None or found.path is None or (unasked and found.refused):
            continue
        with contextlib.suppress(InputError):  # it does not open any more: made again
            runner = row.runner(found.path, many=many)
            runner.meaning()
            if unasked and not runner.fits(preprocess):
                continue
            runner.why = f"converted before; {found}" if unasked else ""
            return runner
    return None


def _through_file(
    model: keras.Model,
    engine: str,
    precision: str | None,
    source: Path | None = None,
    many: bool = False,
) -> FileRunner:
    """A Keras model in another engine that was asked for, compared before it is used."""
    # Both before the work of exporting.
    formats.check_backend(_row(engine).name)
    runtime_of(_row(engine).name)
    runner, found = _converted(model, engine, precision, source, many)
    # A wrong graph is off by its own size; half precision, by some hundredths.
    is_float32 = precision in (None, "float32") and _is_float32(model)
    tolerance = 1e-3 if is_float32 else 0.1
    if not found.difference <= tolerance:
        raise InputError(
            f"The engine {engine!r} does not give this model's outputs: they differ by "
            f"{found.difference:.2g} of the largest. Use engine='keras', and please report it."
        )
    return runner


def _converted(
    model: keras.Model,
    engine: str,
    precision: str | None,
    source: Path | None,
    many: bool,
    timed: bool = False,
) -> tuple[FileRunner, Kept]:
    """A model in another engine by way of a file, which is kept where the model has one."""
    row = _row(engine)
    with kept.workplace(source if precision is None else None) as (folder, keeps):
        path = folder / f"model{row.suffix}"
        writing.write(model, path, row.name)
        with exact_float32():
            runner = row.runner(path, precision, many=many)
            found = dataclasses.replace(_compared(model, runner, timed), path=path)
        if row.runner.accelerator() is not None:  # which may use TF32 from here on
            runner = row.runner(path, precision, many=many)
        if keeps:
            with contextlib.suppress(OSError):  # a full disk: it is run all the same
                found = kept.keep(source, row, found)
    return runner, found


def _compared(model: keras.Model, runner: Runner, timed: bool) -> Kept:
    given = KerasRunner(model)
    images = writing.sample_input(model, _TRIED if timed else 2)
    difference = relative_difference(runner.outputs(images), given.outputs(images))
    if not timed:
        return Kept(None, difference)
    seconds, model_seconds = (_median_seconds(one, images, 2) for one in (runner, given))
    return Kept(None, difference, seconds / _TRIED, model_seconds / _TRIED)


def _is_float32(model: keras.Model) -> bool:
    return writing.in_float32(model) is model


# --- whether another one pays --------------------------------------------------------------------

# Those that take the place of the model unasked, the fastest first: of ResNet-50 batch 16, 1048 ms
# and 1188 ms beside the model's 1164 (docs/speed.md).
_UNASKED = ("onnxruntime", "openvino")
_MANY = 4  # images a core, from which each thread may as well have its own
_TRIED = 8  # images of noise, to compare and to time
# Measured on two cores of an EPYC with AVX2, on torch 2.13 with ONNX Runtime 1.32: multiply-adds
# that a core does a second in a model (ResNet-50, 4.1e9 in 165 ms), the share of that time that
# the engine saves (12 % of ResNet-50, 14 % of ResNet-18, batch 8), and the seconds of writing
# and opening a file, for its start and for a weight (0.5 s of a tiny network, 2.2 of ResNet-18,
# 5.2 of ResNet-50; by tf2onnx, on TensorFlow, 0.6, 8.3 and 20.1).
_RATE, _SAVED, _WRITING = 25e9, 0.12, 0.5
_A_WEIGHT = {"torch": 0.2e-6, "tensorflow": 0.75e-6}
# To compare and to time: three batches by the engine, and as many by the model.
_FEWEST = math.ceil(6 * _TRIED / _SAVED)


def images_that_pay(model: keras.Model) -> int:
    """How many images it takes until another engine has saved what its file has cost.

    The file is written once, and compared and timed on `6 * _TRIED` images; then each image saves
    `_SAVED` of its time. So a network needs the more images the less it computes: some 1,000 of
    224x224 for a ResNet-18 or a ResNet-50 on two cores and torch, 6,000 of 32x32 for a ResNet-20.

    Raises:
        InputError: Its arithmetic cannot be counted.
    """
    flops = count_flops(model, formats.input_size(model)[:2])
    if not flops:
        raise InputError(f"The model {model.name!r} does no arithmetic that is counted.")
    seconds = flops / (_RATE * cores())
    a_weight = _A_WEIGHT.get(keras.backend.backend(), 0.0)  # the others write none
    cost = _WRITING + a_weight * model.count_params()
    return _FEWEST + math.ceil(cost / (_SAVED * seconds))


def _weighed(
    model: keras.Model, source: Path | None, images: int, preprocess: Preprocess | None, many: bool
) -> Runner:
    """Another engine where that pays, or the model itself; `why` says which of it."""
    lacking = {engine: _no_device(engine) or _no_writer(engine) for engine in _UNASKED}
    able = [engine for engine, reason in lacking.items() if not reason]
    reasons = [reason for reason in lacking.values() if reason]
    if able:
        reason = _not_worth(model, images, preprocess)
        reasons = [reason] if reason else []
        for engine in able if not reason else ():
            found = kept.find(source, _row(engine)) if source is not None else None
            try:
                if found is None or found.seconds is None or not found.refused:
                    runner, found = _converted(model, engine, None, source, many, timed=True)
                    if not found.refused:
                        runner.why = f"{images:,} images; {found}"
                        return runner
                reasons.append(f"{engine} {found.refused}")
            except Exception as error:  # each engine raises kinds of its own; the model can do
                reasons.append(f"{engine} failed: {reason_of(error)}")
    runner = KerasRunner(model)
    runner.why = "; ".join(reasons)
    return runner


def _no_device(engine: str) -> str:
    """Why an engine has nothing to run on that is as good as what the model has."""
    row = _row(engine)
    if importlib.util.find_spec(row.module) is None:
        return f"{engine} is not installed"
    # ONNX Runtime on the CPU is no match for torch on a GPU.
    if devices() != ["cpu"] and row.runner.accelerator() is None:
        return f"{engine} has no GPU here"
    return ""


def _no_writer(engine: str) -> str:
    row, backend = _row(engine), keras.backend.backend()
    if backend not in row.needs:
        return f"Keras on {backend} cannot write {row.name}"
    missing = [one for one in row.needs[backend] if importlib.util.find_spec(one) is None]
    return f"{missing[0]} is not installed" if missing else ""


def _not_worth(model: keras.Model, images: int, preprocess: Preprocess | None) -> str:
    """Why a model is not converted for so many images; empty where it is."""
    if images < _FEWEST:
        return f"{images:,} images; a conversion pays from {_FEWEST:,} at the earliest"
    if not _is_float32(model):
        return "a file computes in float32, and the model in less"
    try:
        needed, size = images_that_pay(model), formats.input_size(model)
    except Exception as error:  # layers of one's own
        return reason_of(error)
    if (preprocess or model_preprocess(model)).output_shape != size:
        return "a file takes images of one size"
    if images < needed:
        return f"{images:,} images; a conversion pays from {needed:,}"
    return ""


# --- the fastest ---------------------------------------------------------------------------------


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
    tried = [f"{t.name} {t.seconds * 1000:.0f} ms" for t in trials if t.seconds is not None]
    best.why = f"eight images: {', '.join(tried)}"
    return best


def _median_seconds(runner: Runner, images: np.ndarray, count: int = 5) -> float:
    return statistics.median(timeit.repeat(lambda: runner.outputs(images), number=1, repeat=count))
