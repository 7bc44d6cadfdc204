"""What runs a model: images in, log-probabilities out, whichever library does the arithmetic.

`evaluate` and `predict` know a `Runner` and nothing of what is behind it: Keras, or the runtime of
an exported file.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import keras
import numpy as np
from keras import ops

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.layers.norm import Normalize
from keras_resnet.models.files import model_preprocess
from keras_resnet.models.graph import graph_steps
from keras_resnet.models.image_model import (
    OTHER_WEIGHTS,
    as_functional,
    check_info,
    weights_not_finite,
)
from keras_resnet.models.meaning import (
    Meaning,
    check_head,
    meaning_of,
    meaning_of_numbers,
    noise,
    one_line_of,
    pixels_in,
    pixels_of,
)
from keras_resnet.models.rebuild import optimize_for_inference
from keras_resnet.models.torch_graph import DirectGraph, going_on
from keras_resnet.runtimes import formats
from keras_resnet.system.device import Sender, devices, fetch, in_data_format
from keras_resnet.system.errors import InputError, NotFoundError, one_of, reason_of
from keras_resnet.system.files import printable
from keras_resnet.system.process import available_cores
from keras_resnet.system.replicas import predicted

T, R = TypeVar("T"), TypeVar("R")


class Runner(abc.ABC):
    """A classifier ready to run.

    Attributes:
        name: What runs it, such as `"keras/torch"`.
        model_name: What the model is called.
        info: What is known about the model, as `ImageModel.info`: `class_names`, `preprocess`,
            `options` and so on.
        num_classes: Number of classes: of outputs, but where one output speaks for two classes.
        gives_probabilities: Whether the model gives probabilities, and no logits.
        task: `"single-label"`, `"binary"` (one output) or `"multi-label"`.
        trials: What `engine="auto"` measured to choose it.
        why: Why `engine="auto"` chose it.
    """

    name: str
    model_name: str
    info: dict[str, Any]
    num_classes: int
    gives_probabilities: bool = False
    task: str = "single-label"
    trials: Sequence[Trial] = ()
    why: str = ""
    _unclear: InputError | None = None  # why it is unknown what the outputs say

    def meaning(self) -> Meaning:
        """What the outputs say.

        Raises:
            InputError: It is no classifier, or that is unclear.
        """
        if self._unclear is not None:
            raise self._unclear
        return Meaning(self.task, self.gives_probabilities).as_calibrated(
            self.info, self.num_classes
        )

    @property
    def pixels(self) -> str:
        """Which pixels it takes: `"0..255"`, `"0..1"` or `"normalized"`.

        Raises:
            InputError: That is unclear.
        """
        return pixels_in(self.info) or "normalized"

    def _find_meaning(self, outputs: int | None, find: Callable[[], Meaning]) -> None:
        try:
            meaning = find()
        except InputError as error:  # said when it is needed: outputs alone can be had
            self._unclear, self.num_classes = error, outputs or 0
            return
        self.task, self.gives_probabilities = meaning.task, meaning.activated
        self.num_classes = meaning.num_classes(outputs or 0)

    @abc.abstractmethod
    def outputs(self, images: np.ndarray) -> np.ndarray:
        """The outputs of the model: logits, or probabilities.

        Args:
            images: `(n, height, width, channels)`, the model's own input: uint8 pixels where it
                normalises them itself, float32 otherwise.

        Returns:
            Of a floating type, `(n, classes)`.
        """

    def fed(self, preprocess: Preprocess, fed: str) -> str:
        """What it wants where the model takes this: it may normalise pixels for the model."""
        return fed

    def finite_outputs(self, images: np.ndarray) -> np.ndarray:
        """As `outputs`, where they say something; a logit of minus infinity rules a class out.

        Raises:
            InputError: The outputs for some image are `nan` or infinite, or there are none, as of
                images of a size that the model does not take.
        """
        with one_line_of(self.model_name, images):
            outputs = self.outputs(images)
        largest = np.asarray(outputs, np.float64).reshape(len(outputs), -1).max(axis=1)
        wrong = int((~np.isfinite(largest)).sum())
        if wrong:
            raise InputError(
                f"The outputs of {printable(self.model_name)!r} are nan or infinite for {wrong} of "
                f"{len(outputs)} images: {self._why_not_finite()}"
            )
        return outputs

    def _why_not_finite(self) -> str:
        return "look at its weights, its precision and its preprocessing."

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name

    def at_once(self, batch_size: int) -> int:
        """Batches that it has use for at the same time."""
        return 1

    def in_turn(self, work: Callable[[T], R], batches: Iterable[T], batch_size: int) -> Iterator[R]:
        """`map(work, batches)`, ahead of its reader by as many batches as run at once."""
        count = self.at_once(batch_size)
        if count == 1:
            yield from map(work, batches)
            return
        pool, waiting = ThreadPoolExecutor(count, "keras_resnet-run"), deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(work, batch))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also where the reader of this generator stops early
            pool.shutdown(wait=False, cancel_futures=True)

    def log_probabilities(self, images: np.ndarray) -> np.ndarray:
        """Natural logarithms of the class probabilities, float64 `(n, classes)`.

        Args:
            images: As `outputs` takes them.
        """
        return self.meaning().log_probabilities(self.finite_outputs(images))


class KerasRunner(Runner):
    """Runs a Keras model with a classification head, `given`, on the backend that Keras runs on.

    Args:
        model: Not necessarily compiled.
        precision: What it computes in; its own dtype policy by default.
        optimize: Run a faster twin of the model in its place; without it, the model as it is.
    """

    def __init__(self, model: keras.Model, precision: str | None = None, optimize: bool = True):
        self.name = f"keras/{keras.backend.backend()}"
        model = as_functional(model)
        self.model_name = model.name
        self.info = getattr(model, "info", {})
        self._find_meaning(model.outputs[0].shape[-1], lambda: meaning_of(model))
        self.given, self._call = model, object()
        self._model = _for_inference(model, precision) if optimize else model
        self._apart, self._normal = devices()[0] != "cpu", None
        self._send, self._turn = Sender(), threading.Lock()

    @property
    def pixels(self) -> str:
        return pixels_of(self.given)

    def fed(self, preprocess: Preprocess, fed: str) -> str:
        self._normal = None
        if not self._apart or fed == "uint8" or preprocess.color_mode != "rgb":
            return fed  # of other channels values may have 16 bits
        channels = preprocess.channels
        mean, std = preprocess.mean or (0.0,) * channels, preprocess.std or (1.0,) * channels
        self._normal = Normalize(mean, std, dtype="float32")
        return "uint8"  # a quarter of the bytes to send

    def at_once(self, batch_size: int) -> int:
        return 2 if self._apart else 1  # one is computed, while the other gets there

    def outputs(self, images: np.ndarray) -> np.ndarray:
        images = in_data_format(images)
        if self._apart:  # bytes as bytes: floats are made of them there
            [images] = self._send((images,))
        if self._send.device is None:
            images = ops.convert_to_tensor(images) if self._apart else images
            with self._turn:
                return np.asarray(self._begin(images))
        # Of what cuDNN found out about each convolution every thread keeps its own: one alone.
        return _launcher().submit(self._begin, images).result()()

    def _begin(self, images: Any) -> Any:
        """The outputs; on torch's CUDA device a function that waits for them."""
        place = self._send.device  # a thread does not know what `keras.device` said in another
        # The weights as they are at the first batch, as in the folded twin of other backends.
        with keras.device(str(place)) if place else contextlib.nullcontext(), going_on(self._call):
            if self._normal and keras.backend.standardize_dtype(images.dtype) == "uint8":
                images = self._normal(images)
            if place is None:
                return predicted(self._model, images)
            self._send.wait()  # this thread's kernels
            self._model.make_predict_function()
            return fetch(self._model.predict_function([(images,)]))

    def _why_not_finite(self) -> str:
        wrong = weights_not_finite(self._model)
        return super()._why_not_finite() if wrong is None else f"{wrong} {OTHER_WEIGHTS}"


@functools.cache
def _launcher() -> ThreadPoolExecutor:
    """The thread that starts the kernels on torch's CUDA device."""
    return ThreadPoolExecutor(1, "keras_resnet-launch")


def _for_inference(model: keras.Model, precision: str | None) -> keras.Model:
    """The model that gives the same outputs, sooner: the one place that decides it."""
    if precision is None and keras.backend.backend() == "torch" and isinstance(model, DirectGraph):
        return model  # folds itself while it predicts
    steps = graph_steps(model)
    norms = [s for s in steps or () if isinstance(s.layer, keras.layers.BatchNormalization)]
    if precision is None and not norms:
        return model
    try:
        return optimize_for_inference(model, precision)
    except (NotImplementedError, TypeError, ValueError):
        if precision is not None:
            raise
        return model  # a layer of one's own that cannot be copied: it is as right, and slower


# --- exported files ------------------------------------------------------------------------------


class FileRunner(Runner):
    """Finishes and runs the files of a format: all that is known of it but its row of `FORMATS`.

    It computes in float32 by default, whatever the runtime would choose, with the threads that the
    process may use. For `many` images each thread computes images of its own, where the runtime
    can. Threads that compute an image together wait for each other, busily, and take the cores from
    those that read images: on two cores ResNet-18 took 55 ms of their time an image and 51 so
    (batch 16; alone, each image waits longer).

    Raises:
        InputError: A file that the runtime does not take, or a precision that it has not.
        MissingDependencyError: The runtime is not installed; the message has the pip line.
    """

    runtime: str  # its name
    precisions: tuple[str, ...] = ("float32",)
    reads: tuple[str, ...]  # the formats
    fixes_batch: bool = False  # `finish` does; the exporter leaves the batch free
    needs_room: bool = False  # the writer ends the whole process on a full disk
    splits: bool = False  # `_run` can be called by `_parts` threads at once
    _parts = 1
    quantizers: ClassVar[dict[str, str]] = {}  # what int8 needs, import name to extra

    @staticmethod
    def prepare(model: keras.Model) -> keras.Model:
        """The same network as the exporter can read it."""
        return model

    @staticmethod
    def options(batch_size: int | None) -> dict[str, Any]:
        """Options of Keras' exporter, besides the signature."""
        return {}

    @staticmethod
    @abc.abstractmethod
    def finish(path: Path, description: dict[str, Any]) -> None:
        """Names input and output of what Keras wrote, and writes the description into it."""

    @staticmethod
    def quantize(path: Path, description: dict[str, Any], batches: list[np.ndarray]) -> None:
        """Turns a file into one of int8, in its place, with ranges taken from the batches."""
        raise NotImplementedError

    @staticmethod
    def accelerator() -> str | None:
        """What the runtime would run a model on in place of the CPU."""
        return None

    @staticmethod
    def files(path: Path) -> list[Path]:
        """All that belongs to an exported model, the file that is opened last."""
        return [path]

    def __init__(
        self,
        path: str | os.PathLike,
        precision: str | None = None,
        threads: int | None = None,
        many: bool = False,
    ):
        path, threads = Path(path), threads or cores()
        one_of(f"The precision of {self.runtime}", precision, (None, *self.precisions))
        half = "" if precision in (None, "float32") else f", {precision}"
        self.name = f"{self.runtime}{half}"
        if many and self.splits and self.accelerator() is None:
            self._parts = threads
        self._pool = ThreadPoolExecutor(self._parts, "keras_resnet-engine")
        try:
            text, given, output = self._open(path, precision or "float32", threads)
        except NotFoundError:
            raise
        except Exception as error:  # each runtime raises kinds of its own
            raise InputError(
                f"{self.runtime} cannot open {str(path)!r}: {reason_of(error)}"
            ) from error
        about = formats.from_json(text, path)
        self.model_name = about.get("name") or path.stem
        self.info = about.get("info") or {}
        check_info(self.model_name, self.info)
        self.input_shape, self.output_shape = given, output
        # A file that somebody else made does not say; few channels come first or last.
        layout = about.get("input", {}).get("layout")
        self._channels_first = layout == "NCHW" or (
            layout is None and given[1] in (1, 3) and given[-1] not in (1, 3)
        )
        holds = about.get("input", {}).get("holds")
        self._pixels = next((p for p, text in formats.HOLDS.items() if text == holds), None)
        self._find_meaning(output[-1], lambda: self._meaning_of(about))

    @property
    def pixels(self) -> str:
        return self._pixels or super().pixels

    def _meaning_of(self, about: dict[str, Any]) -> Meaning:
        """What the outputs say, by the file's description, else by what they are for noise."""
        check_head(self.model_name, [self.output_shape])
        said = about.get("output")
        if said in ("logits", "probabilities"):
            return Meaning(about.get("task", "single-label"), said == "probabilities")
        found = None
        if said is None:  # a file of somebody else's
            shape = [size or 224 for size in self.input_shape[1:]]
            if self._channels_first:
                shape = [*shape[1:], shape[0]]
            found = meaning_of_numbers(self.outputs(noise(*shape)))
        count = self.output_shape[1]
        if found is None or (found == "logits" and count == 1):
            raise InputError(
                f"It cannot be told what the outputs of {self.model_name!r} say: a file that "
                "export writes of a model that ends in a softmax or a sigmoid says it."
            )
        task = "single-label" if found != "sigmoid" else "binary" if count == 1 else "multi-label"
        return Meaning(task, found != "logits")

    @abc.abstractmethod
    def _open(
        self, path: Path, precision: str, threads: int
    ) -> tuple[str | None, tuple[int | None, ...], tuple[int | None, ...]]:
        """Opens the file; gives its description and the shapes of its input and output."""

    @abc.abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray:
        """The output for a batch of the file's own layout and dtype."""

    def outputs(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images, np.float32)
        if self._channels_first:
            images = images.transpose(0, 3, 1, 2)
        size, count = self.input_shape[0], len(images)
        if size is None:
            parts = np.array_split(images, min(count, self._parts)) if count > 1 else [images]
        else:  # of one batch size: the last batch is filled up, and what is too much dropped
            filled = np.zeros((-count % size, *images.shape[1:]), "f4")
            parts = np.split(np.concatenate([images, filled]), -(-count // size))
        parts = [np.ascontiguousarray(part) for part in parts]
        run = map if self._parts == 1 else self._pool.map
        return np.concatenate(list(run(self._run, parts)))[:count]

    def at_once(self, batch_size: int) -> int:
        if self._parts == 1:
            return 1
        # While the last part of a batch is computed, the next batch has the other threads.
        size = self.input_shape[0]
        parts = min(batch_size, self._parts) if size is None else math.ceil(batch_size / size)
        return 1 + math.ceil(self._parts / parts)

    def fits(self, preprocess: Preprocess | None) -> bool:
        """Whether it takes images as they are prepared; its model may take those of any size."""
        height, width, channels = (preprocess or model_preprocess(self)).output_shape
        shape = (channels, height, width) if self._channels_first else (height, width, channels)
        return all(a in (None, b) for a, b in zip(self.input_shape[1:], shape, strict=True))


def sizes(shape: Sequence[Any]) -> tuple[int | None, ...]:
    """A shape with `None` for what is no number."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def cores() -> int:
    """Threads for the arithmetic: `OMP_NUM_THREADS`, or the cores that the process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return available_cores()


@dataclasses.dataclass(frozen=True)
class Trial:
    """What `engine="auto"` measured of one engine."""

    name: str  # the runner's
    seconds: float | None  # median of a batch of eight images; `None` where it could not be tried
    reason: str | None = None  # why it could not
