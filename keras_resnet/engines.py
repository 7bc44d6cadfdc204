"""What runs a model: pictures in, log-probabilities out, whichever library does the arithmetic.

`evaluate` and `predict` know a `Runner` and nothing of what is behind it.
"""

from __future__ import annotations

import abc
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.errors import InputError, NotFoundError, did_you_mean

ENGINES = ("keras", "auto")


class Runner(abc.ABC):
    """A classifier ready to run.

    Attributes:
        name: What runs it, such as `"keras/torch"`.
        model_name: What the model is called.
        info: What is known about the model, as `ImageModel.info`: `class_names`, `preprocess`,
            `options` and so on.
        num_classes: Number of outputs.
        gives_probabilities: Whether the model ends in a softmax, and gives no logits.
    """

    name: str
    model_name: str
    info: dict[str, Any]
    num_classes: int
    gives_probabilities: bool = False

    @abc.abstractmethod
    def outputs(self, images: np.ndarray) -> np.ndarray:
        """What the model answers: logits, or probabilities.

        Args:
            images: `(n, height, width, channels)`, the model's own input: uint8 pixels where it
                normalises them itself, float32 otherwise.

        Returns:
            Of a floating type, `(n, classes)`.
        """

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
    """

    def __init__(self, model: keras.Model, precision: str | None = None):
        self.name = f"keras/{keras.backend.backend()}"
        self.model_name = model.name
        self.info = getattr(model, "info", {})
        self.num_classes = model.output_shape[-1]
        self.gives_probabilities = ends_in_softmax(model)
        self._model = _for_inference(model, precision)

    def outputs(self, images: np.ndarray) -> np.ndarray:  # noqa: D102 (of the base)
        if keras.config.image_data_format() == "channels_first":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return np.asarray(self._model.predict_on_batch(images))


def _for_inference(model: keras.Model, precision: str | None) -> keras.Model:
    """The model that gives the same answers, sooner: the one place that decides it."""
    if precision is not None:
        raise InputError(
            f"The keras engine computes in the model's own precision. Received: {precision!r}."
        )
    return model


def open_runner(
    model: keras.Model | Runner | str | os.PathLike,
    engine: str = "keras",
    precision: str | None = None,
) -> Runner:
    """Makes a model ready to run.

    Args:
        model: A model, a `.keras` file or a run folder; a `Runner` is given back as it is.
        engine: What runs it: `"keras"`, or `"auto"` for the fastest that is installed.
        precision: What it computes in; the model's own by default.

    Raises:
        InputError: An unknown engine, or a model without a classification head.
        NotFoundError: There is no such file.

    Example:
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
    if not isinstance(model, keras.Model):
        model = load_model(model)
    if len(model.output_shape) != 2:
        raise InputError(
            f"The model {model.name!r} has no classification head: its output is "
            f"{model.output_shape}."
        )
    return KerasRunner(model, precision)


def load_model(path: str | os.PathLike) -> keras.Model:
    """Loads a `.keras` file, compiled or not, without compiling it.

    Args:
        path: A file that `train` or `model.save` wrote, or a run folder (its `best.keras`).

    Raises:
        NotFoundError: There is no such file; a near name is suggested.
        InputError: The file is no Keras model.

    Example:
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
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises a dozen kinds for a damaged file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{str(path)!r} cannot be loaded as a Keras model: {reason}") from error


def ends_in_softmax(model: keras.Model) -> bool:
    """Whether a model gives probabilities already."""
    activation = getattr(model.layers[-1], "activation", None)
    return activation is not None and activation is keras.activations.softmax


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
