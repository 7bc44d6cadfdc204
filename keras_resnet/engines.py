"""What runs a model: pictures in, log-probabilities out, whichever library does the arithmetic.

`evaluate` and `predict` know a `Runner` and nothing of what is behind it: Keras, or the runtime of
an exported file.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet import formats
from keras_resnet.errors import (
    InputError,
    MissingDependencyError,
    NotFoundError,
    did_you_mean,
    reason_of,
)
from keras_resnet.formats import ends_in_softmax
from keras_resnet.graph import DirectGraph, graph_steps
from keras_resnet.inference import optimize_for_inference
from keras_resnet.process import available_cores, tune_process

# Of the engines that take a Keras model, and those that an exported file names by itself.
ENGINES = ("keras", "auto", "openvino", "onnxruntime", "torch")
_OWN_RUNTIME = ("keras", "auto")


class Runner(abc.ABC):
    """A classifier ready to run.

    Attributes:
        name: What runs it, such as `"keras/torch"`.
        model_name: What the model is called.
        info: What is known about the model, as `ImageModel.info`: `class_names`, `preprocess`,
            `options` and so on.
        num_classes: Number of outputs.
        gives_probabilities: Whether the model ends in a softmax, and gives no logits.
        trials: What `engine="auto"` measured to choose it.
    """

    name: str
    model_name: str
    info: dict[str, Any]
    num_classes: int
    gives_probabilities: bool = False
    trials: Sequence[Trial] = ()

    @abc.abstractmethod
    def outputs(self, images: np.ndarray) -> np.ndarray:
        """What the model answers: logits, or probabilities.

        Args:
            images: `(n, height, width, channels)`, the model's own input: uint8 pixels where it
                normalises them itself, float32 otherwise.

        Returns:
            Of a floating type, `(n, classes)`.
        """

    def __str__(self) -> str:
        tried = [
            f"{t.name} {t.seconds * 1000:.0f} ms" for t in self.trials if t.seconds is not None
        ]
        return f"{self.name} (eight pictures: {', '.join(tried)})" if tried else self.name

    def log_probabilities(self, images: np.ndarray) -> np.ndarray:
        """Natural logarithms of the class probabilities, float64 `(n, classes)`.

        Args:
            images: As `outputs` takes them.
        """
        return _logarithms(self.outputs(images), self.gives_probabilities)


class KerasRunner(Runner):
    """Runs a Keras model on the backend that Keras runs on.

    Args:
        model: With a classification head, not necessarily compiled.
        precision: What it computes in; its own dtype policy by default.
        optimize: Run a faster twin of the model in its place; without it, the model as it is.
    """

    def __init__(self, model: keras.Model, precision: str | None = None, optimize: bool = True):
        self.name = f"keras/{keras.backend.backend()}"
        self.model_name = model.name
        self.info = getattr(model, "info", {})
        self.num_classes = model.output_shape[-1]
        self.gives_probabilities = ends_in_softmax(model)
        self._model = _for_inference(model, precision) if optimize else model

    def outputs(self, images: np.ndarray) -> np.ndarray:  # noqa: D102 (of the base)
        if keras.config.image_data_format() == "channels_first":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return np.asarray(self._model.predict_on_batch(images))


def _for_inference(model: keras.Model, precision: str | None) -> keras.Model:
    """The model that gives the same answers, sooner: the one place that decides it."""
    if precision is None and keras.backend.backend() == "torch" and isinstance(model, DirectGraph):
        return model  # folds itself while it predicts
    if precision is None and graph_steps(model) is None:
        return model
    return optimize_for_inference(model, precision)


# --- exported files ------------------------------------------------------------------------------


class FileRunner(Runner):
    """Runs an exported file; a subclass a runtime.

    Args:
        path: The file, or SavedModel's folder.
        precision: What it computes in; float32 by default, whatever the runtime would choose.
        threads: How many; those that the process may use by default.

    Raises:
        InputError: A file that the runtime does not take, or a precision that it has not.
        MissingDependencyError: The runtime is not installed; the message has the pip line.
    """

    runtime: str  # its name
    module: str  # what is imported
    extra: str  # of this package, for pip
    precisions: tuple[str, ...] = ("float32",)

    def __init__(
        self,
        path: str | os.PathLike,
        precision: str | None = None,
        threads: int | None = None,
    ):
        path = Path(path)
        if precision not in (None, *self.precisions):
            raise InputError(
                f"{self.runtime} computes in {' or '.join(self.precisions)}. "
                f"Received: {precision!r}."
            )
        self.name = (
            self.runtime if precision in (None, "float32") else f"{self.runtime}, {precision}"
        )
        try:
            text, given, answer = self._open(path, precision or "float32", threads or cores())
        except NotFoundError:
            raise
        except Exception as error:  # each runtime raises kinds of its own
            raise InputError(
                f"{self.runtime} cannot open {str(path)!r}: {reason_of(error)}"
            ) from error
        about = formats.from_json(text, path)
        self.model_name = about.get("name") or path.stem
        self.info = about.get("info") or {}
        self.gives_probabilities = about.get("output") == "probabilities"
        self.input_shape, self.output_shape = given, answer
        self.num_classes = answer[-1]
        # A file that somebody else made does not say; few channels come first or last.
        layout = about.get("input", {}).get("layout")
        self._channels_first = layout == "NCHW" or (
            layout is None and given[1] in (1, 3) and given[-1] not in (1, 3)
        )

    @abc.abstractmethod
    def _open(
        self, path: Path, precision: str, threads: int
    ) -> tuple[str | None, tuple[int | None, ...], tuple[int | None, ...]]:
        """Opens the file; gives its description and the shapes of its input and output."""

    @abc.abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray:
        """The output for a batch of the file's own layout and dtype."""

    def outputs(self, images: np.ndarray) -> np.ndarray:  # noqa: D102 (of the base)
        images = np.asarray(images, np.float32)
        if self._channels_first:
            images = images.transpose(0, 3, 1, 2)
        images = np.ascontiguousarray(images)
        size = self.input_shape[0]
        if size is None:
            return self._run(images)
        # A file of one batch size: the last batch is filled up, and what is too much dropped.
        found = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), "f4")])
            found.append(self._run(filled)[: len(part)])
        return np.concatenate(found)


class OnnxRunner(FileRunner):
    """ONNX Runtime on an `.onnx` file."""

    runtime, module, extra = "onnxruntime", "onnxruntime", "onnx"

    def _open(self, path, precision, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
        given, answer = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._input = given.name
        text = self._session.get_modelmeta().custom_metadata_map.get(formats.METADATA)
        return text, _sizes(given.shape), _sizes(answer.shape)

    def _run(self, images):
        return self._session.run(None, {self._input: images})[0]


class OpenVinoRunner(FileRunner):
    """OpenVINO on an `.xml` file and the `.bin` beside it, or on an `.onnx` file."""

    runtime, module, extra = "openvino", "openvino", "openvino"
    precisions = ("float32", "bfloat16", "float16")

    def _open(self, path, precision, threads):
        import openvino as ov

        weights = path.with_suffix(".bin")
        if path.suffix == ".xml" and not weights.is_file():
            raise NotFoundError(f"{str(weights)!r} is missing: it belongs to {path.name!r}.")
        core = ov.Core()
        model = core.read_model(path)
        hints = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        # Left alone, it computes in bfloat16 where the processor can.
        options = {
            "INFERENCE_PRECISION_HINT": hints[precision],
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._model = core.compile_model(model, "CPU", options)
        self._request = self._model.create_infer_request()
        text = None
        for keys in ([formats.METADATA], ["framework", formats.METADATA]):  # .xml, .onnx
            if model.has_rt_info(keys):
                text = str(model.get_rt_info(keys).value)
                break
        shapes = [
            tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
            for port in (model.inputs[0], model.outputs[0])
        ]
        return text, *shapes

    def _run(self, images):
        # A copy: the request's own buffer is written over by the next batch.
        return np.array(self._request.infer([images], share_inputs=True)[0])


class SavedModelRunner(FileRunner):
    """TensorFlow on a SavedModel folder."""

    runtime, module, extra = "tensorflow", "tensorflow", "tensorflow"

    def _open(self, path, precision, threads):
        import tensorflow as tf

        self._loaded = tf.saved_model.load(os.fspath(path))
        function = self._loaded.signatures["serving_default"]
        (given,) = function.structured_input_signature[1].values()
        (answer,) = function.structured_outputs.values()
        self._function, self._input = function, given.name
        about = path / "assets.extra" / formats.METADATA_FILE
        text = about.read_text(encoding="utf-8") if about.is_file() else None
        return text, tuple(given.shape), tuple(answer.shape)

    def _run(self, images):
        import tensorflow as tf

        (answer,) = self._function(**{self._input: tf.constant(images)}).values()
        return answer.numpy()


class LiteRtRunner(FileRunner):
    """LiteRT on a `.tflite` file."""

    runtime, module, extra = "litert", "ai_edge_litert", "litert"

    def _open(self, path, precision, threads):
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(os.fspath(path), num_threads=threads)
        self._interpreter.allocate_tensors()
        text = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if formats.METADATA_FILE in archive.namelist():
                    text = archive.read(formats.METADATA_FILE).decode("utf-8")
        shapes = [
            tuple(None if size == -1 else int(size) for size in ports[0]["shape_signature"])
            for ports in (
                self._interpreter.get_input_details(),
                self._interpreter.get_output_details(),
            )
        ]
        return text, *shapes

    def _run(self, images):
        port = self._interpreter.get_input_details()[0]
        if tuple(port["shape"]) != images.shape:
            self._interpreter.resize_tensor_input(port["index"], images.shape)
            self._interpreter.allocate_tensors()
        self._interpreter.set_tensor(port["index"], images)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._interpreter.get_output_details()[0]["index"])


class TorchRunner(FileRunner):
    """torch on an exported program, a `.pt2` file; Keras is not asked."""

    runtime, module, extra = "torch", "torch", "torch"

    def _open(self, path, precision, threads):
        import torch

        about = {formats.METADATA_FILE: ""}
        program = torch.export.load(path, extra_files=about)
        self._module = program.module()
        nodes = {node.name: node for node in program.graph.nodes}
        names = program.graph_signature.user_inputs[0], program.graph_signature.user_outputs[0]
        shapes = [
            tuple(size if isinstance(size, int) else None for size in nodes[name].meta["val"].shape)
            for name in names
        ]
        return about[formats.METADATA_FILE], *shapes

    def _run(self, images):
        import torch

        with torch.inference_mode():
            return self._module(torch.from_numpy(images)).numpy()


_RUNNERS: dict[str, type[FileRunner]] = {
    one.runtime: one
    for one in (OnnxRunner, OpenVinoRunner, SavedModelRunner, LiteRtRunner, TorchRunner)
}
# What an engine can open besides its own format.
_READS = {"openvino": ("openvino", "onnx")}


def _sizes(shape) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape)


def cores() -> int:
    """Threads for the arithmetic: `OMP_NUM_THREADS`, or the cores that the process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return available_cores()


def runtime_of(name: str) -> type[FileRunner]:
    """What runs the files of a format.

    Raises:
        MissingDependencyError: It is not installed; the message has the pip line.
    """
    kind = _RUNNERS[formats.get_format(name).runtime]
    if importlib.util.find_spec(kind.module) is None:
        raise MissingDependencyError(
            f"Running {name} files needs the package {kind.module!r}: "
            f'pip install "keras3-resnet[{kind.extra}]".'
        )
    return kind


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
        near = os.listdir(path.parent) if path.parent.is_dir() else []
        raise NotFoundError(f"No model file at {str(path)!r}.{did_you_mean(path.name, near)}")
    kind = formats.format_of_file(path)
    if kind is None:
        raise InputError(f"{str(path)!r} is no exported model: {_suffixes()}.")
    if engine in _OWN_RUNTIME:
        engine = formats.FORMATS[kind].runtime
    runtime_of(next(row.name for row in formats.FORMATS.values() if row.runtime == engine))
    reads = [row.name for row in formats.FORMATS.values() if row.runtime == engine]
    if kind not in _READS.get(engine, reads):
        raise InputError(
            f"The engine {engine!r} does not read {path.name!r}; without an engine's name the "
            f"file is run by {formats.FORMATS[kind].runtime}."
        )
    return _RUNNERS[engine](path, precision, threads)


def _suffixes() -> str:
    known = [row.suffix for row in formats.FORMATS.values() if row.suffix]
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
            backend is tried on eight pictures of noise, and the fastest taken.
        precision: `"float32"`, `"bfloat16"` or `"float16"`, where the engine has it; the model's
            own by default, and float32 in exported files.

    Raises:
        InputError: An unknown engine, one that cannot be had here, or a model without a
            classification head.
        MissingDependencyError: The engine is not installed; the message has the pip line.
        NotFoundError: There is no such file.

    Examples:
        >>> from keras_resnet.zoo import create_model
        >>> runner = open_runner(create_model("resnet20"))
        >>> runner.log_probabilities(np.zeros((2, 32, 32, 3), "float32")).shape
        (2, 10)
    """
    if engine not in ENGINES:
        hint = did_you_mean(engine, ENGINES) or f" There are: {', '.join(ENGINES)}."
        raise InputError(f"Unknown engine {engine!r}.{hint}")
    if isinstance(model, Runner):
        return model
    tune_process()
    if not isinstance(model, keras.Model):
        if formats.format_of_file(Path(model).expanduser()) is not None:
            runner = open_file(model, engine, precision)
            _check_head(runner.model_name, runner.output_shape)
            return runner
        model = load_model(model)
    _check_head(model.name, model.output_shape)
    if engine == "keras":
        return KerasRunner(model, precision)
    if engine == "auto":
        return _fastest(model, precision)
    return _through_file(model, engine, precision)


def _check_head(name: str, shape: tuple[int | None, ...]) -> None:
    if len(shape) != 2:
        raise InputError(f"The model {name!r} has no classification head: its output is {shape}.")


def _through_file(model: keras.Model, engine: str, precision: str | None) -> FileRunner:
    """A Keras model in another engine, by way of a temporary file, compared before it is used."""
    row = next(row for row in formats.FORMATS.values() if row.runtime == engine)
    # Both before the work of exporting.
    formats.check_backend(row.name)
    kind = runtime_of(row.name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / f"model{row.suffix}"
        formats.write(model, path, row.name)
        runner = kind(path, precision)
    images = formats.sample_input(model, 2)
    difference = relative_difference(runner.outputs(images), KerasRunner(model).outputs(images))
    # A wrong graph is off by its own size; half precision, by some hundredths.
    tolerance = 1e-3 if precision in (None, "float32") and _is_float32(model) else 0.1
    if not difference <= tolerance:
        raise InputError(
            f"The engine {engine!r} does not give this model's answers: they differ by "
            f"{difference:.2g} of the largest. Use engine='keras', and please report it."
        )
    return runner


def _is_float32(model: keras.Model) -> bool:
    return formats.in_float32(model) is model


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two outputs over the largest output; `nan` if any is none.

    Examples:
        >>> relative_difference(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
        0.5
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


@dataclasses.dataclass(frozen=True)
class Trial:
    """What `engine="auto"` measured of one engine.

    Attributes:
        name: The runner's.
        seconds: Median of a batch of eight pictures; `None` where it could not be tried.
        reason: Why it could not.
    """

    name: str
    seconds: float | None
    reason: str | None = None


def _fastest(model: keras.Model, precision: str | None) -> Runner:
    images = formats.sample_input(model, 8)
    trials, best = [], None
    for engine in ("keras", "openvino", "onnxruntime", "torch"):
        try:
            if engine == "keras":
                runner: Runner = KerasRunner(model, precision)
            else:
                runner = _through_file(model, engine, precision)
        except (InputError, MissingDependencyError) as error:
            trials.append(Trial(engine, None, str(error)))
            continue
        runner.outputs(images)  # the first call builds and compiles
        seconds = _median_seconds(runner, images)
        if best is None or seconds < min(t.seconds for t in trials if t.seconds is not None):
            best = runner
        trials.append(Trial(runner.name, seconds))
    if best is None:
        raise InputError(f"No engine can run it: {trials[0].reason}")
    best.trials = trials
    return best


def _median_seconds(runner: Runner, images: np.ndarray, count: int = 5) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        runner.outputs(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def load_model(path: str | os.PathLike) -> keras.Model:
    """Loads a `.keras` file, compiled or not, without compiling it.

    Args:
        path: A file that `train` or `model.save` wrote, or a run folder (its `best.keras`).

    Raises:
        NotFoundError: There is no such file; a near name is suggested.
        InputError: The file is no Keras model.

    Examples:
        >>> load_model("no-such.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.errors.NotFoundError: No model file at 'no-such.keras'.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in ("best.keras", "last.keras") if (path / name).is_file()]
        if not found:
            raise NotFoundError(f"No best.keras or last.keras in the folder {str(path)!r}.")
        path = found[0]
    if not path.exists():
        near = os.listdir(path.parent) if path.parent.is_dir() else []
        raise NotFoundError(f"No model file at {str(path)!r}.{did_you_mean(path.name, near)}")
    if path.suffix != ".keras":
        raise InputError(
            f"{str(path)!r} is not a .keras file. A checkpoint of torch becomes one with: "
            f"keras-resnet convert {path.name} {path.stem}.keras"
        )
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{str(path)!r} is no whole .keras file ({path.stat().st_size:,} bytes, not a zip "
            "archive): it was cut off or is something else; copy or save it again."
        )
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises a dozen kinds for a damaged file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{str(path)!r} cannot be loaded as a Keras model: {reason}") from error


def log_probabilities(model: keras.Model, outputs: np.ndarray) -> np.ndarray:
    """Natural logarithms of the class probabilities, float64 `(n, classes)`, from outputs.

    Logits go through a log-softmax; a model that ends in softmax gives probabilities already.
    """
    return _logarithms(outputs, ends_in_softmax(model))


def _logarithms(outputs: np.ndarray, probabilities: bool) -> np.ndarray:
    outputs = np.asarray(outputs, np.float64)
    if probabilities:
        return np.log(np.clip(outputs, 1e-12, 1.0))
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
