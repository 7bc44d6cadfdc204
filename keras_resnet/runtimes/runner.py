"""What runs a model: images in, log-probabilities out, whichever library does the arithmetic.

`evaluate` and `predict` know a `Runner` and nothing of what is behind it: Keras, or the runtime of
an exported file.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np

from keras_resnet.errors import InputError, NotFoundError, one_of, reason_of
from keras_resnet.models.graph import graph_steps
from keras_resnet.models.rebuild import optimize_for_inference
from keras_resnet.models.torch_graph import DirectGraph
from keras_resnet.runtimes import formats
from keras_resnet.runtimes.formats import ends_in_softmax
from keras_resnet.system.device import in_data_format
from keras_resnet.system.process import available_cores


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
        """The outputs of the model: logits, or probabilities.

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
        return f"{self.name} (eight images: {', '.join(tried)})" if tried else self.name

    def log_probabilities(self, images: np.ndarray) -> np.ndarray:
        """Natural logarithms of the class probabilities, float64 `(n, classes)`.

        Args:
            images: As `outputs` takes them.
        """
        return logarithms(self.outputs(images), self.gives_probabilities)


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
        return np.asarray(self._model.predict_on_batch(in_data_format(images)))


def _for_inference(model: keras.Model, precision: str | None) -> keras.Model:
    """The model that gives the same outputs, sooner: the one place that decides it."""
    if precision is None and keras.backend.backend() == "torch" and isinstance(model, DirectGraph):
        return model  # folds itself while it predicts
    if precision is None and graph_steps(model) is None:
        return model
    return optimize_for_inference(model, precision)


# --- exported files ------------------------------------------------------------------------------


class FileRunner(Runner):
    """Finishes and runs the files of a format: all that is known of it but its row of `FORMATS`.

    Args:
        path: The file, or SavedModel's folder.
        precision: What it computes in; float32 by default, whatever the runtime would choose.
        threads: How many; those that the process may use by default.

    Raises:
        InputError: A file that the runtime does not take, or a precision that it has not.
        MissingDependencyError: The runtime is not installed; the message has the pip line.
    """

    runtime: str  # its name
    precisions: tuple[str, ...] = ("float32",)
    reads: tuple[str, ...]  # the formats
    fixes_batch: bool = False  # `finish` does; the exporter leaves the batch free
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
    def files(path: Path) -> list[Path]:
        """All that belongs to an exported model, the file that is opened last."""
        return [path]

    def __init__(
        self,
        path: str | os.PathLike,
        precision: str | None = None,
        threads: int | None = None,
    ):
        path = Path(path)
        one_of(f"The precision of {self.runtime}", precision, (None, *self.precisions))
        self.name = (
            self.runtime if precision in (None, "float32") else f"{self.runtime}, {precision}"
        )
        try:
            text, given, output = self._open(path, precision or "float32", threads or cores())
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
        self.input_shape, self.output_shape = given, output
        self.num_classes = output[-1]
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


def sizes(shape: Sequence[Any]) -> tuple[int | None, ...]:
    """A shape with `None` for what is no number."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def cores() -> int:
    """Threads for the arithmetic: `OMP_NUM_THREADS`, or the cores that the process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return available_cores()


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
        seconds: Median of a batch of eight images; `None` where it could not be tried.
        reason: Why it could not.
    """

    name: str
    seconds: float | None
    reason: str | None = None


def logarithms(outputs: np.ndarray, probabilities: bool) -> np.ndarray:
    """Natural logarithms of class probabilities, float64, from logits or from probabilities."""
    outputs = np.asarray(outputs, np.float64)
    if probabilities:
        return np.log(np.clip(outputs, 1e-12, 1.0))
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
