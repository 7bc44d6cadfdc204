"""What the page and the endpoint for programs say of uploads, apart from how it is shown."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image, UnidentifiedImageError

from keras_resnet.data.looking import file_head
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.walk import FORMATS
from keras_resnet.inference.calibration import answer_of
from keras_resnet.inference.explain import overlay
from keras_resnet.inference.grad_cam import grad_cam
from keras_resnet.inference.prediction_files import most_probable
from keras_resnet.models.files import load_model, model_class_names, model_input
from keras_resnet.plots import displayed, enlarged
from keras_resnet.runtimes.rows import format_of_file
from keras_resnet.runtimes.runner import Runner
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.device import backend_line, in_data_format
from keras_resnet.system.errors import DataError, InputError, KerasResNetError, between, reason_of
from keras_resnet.system.files import valid_text

logger = logging.getLogger("keras_resnet")

TOP = 5
_KINDS = [kind for kind in FORMATS if kind != "MPO"]  # which the reader of JPEG opens


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an upload may be at most.

    Attributes:
        megabytes: Of one image's file.
        megapixels: Of one image, before and after it is resized.
        pictures: Images at a time.

    Raises:
        InputError: A limit that lets nothing through.
    """

    megabytes: float = 20
    megapixels: float = 50
    pictures: int = 16

    def __post_init__(self) -> None:
        """Checks that each is positive."""
        for field in dataclasses.fields(self):
            between(field.name, getattr(self, field.name), 0, ends="(]")

    @property
    def request_bytes(self) -> int:
        """Bytes of a whole request."""
        return int(self.pictures * self.megabytes * 2**20) + 2**20

    @property
    def kept_bytes(self) -> int:
        """Bytes of all uploads together: those under way, and those that lie on the disk."""
        return 4 * self.request_bytes

    @property
    def kept_files(self) -> int:
        """Uploads that lie on the disk."""
        return int(64 * self.pictures)

    def __str__(self) -> str:
        images = "1 image" if self.pictures == 1 else f"{self.pictures} images"
        return (
            f"At most {images} at a time, {self.megabytes:g} MB and {self.megapixels:g} "
            "megapixels each."
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What the page says of one upload; the fields it shares with a `Prediction` are as there."""

    name: str
    classes: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    error: str | None = None
    note: str | None = None  # something to know about the file
    pixels: np.ndarray | None = None  # uint8, the image as the model saw it
    heat: np.ndarray | None = None  # uint8, the same under its heat map
    answer: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the endpoint gives it."""
        classes = [{"name": name, "probability": p} for name, p in self.classes]
        answer = {} if self.answer is None else {"answer": self.answer}
        return {
            "name": self.name, "classes": classes, "error": self.error, "note": self.note, **answer
        }  # fmt: skip


def check_image(data: bytes, name: str, limits: Limits, preprocess: Preprocess) -> str | None:
    """Looks at a file's head before anything of it is decoded.

    Returns:
        Something to know about the file, or `None`.

    Raises:
        DataError: A sentence about what is wrong with it.
    """
    if not data:
        raise DataError("The file is empty.")
    if len(data) > limits.megabytes * 2**20:
        size = len(data) / 2**20
        raise DataError(f"The file has {size:.1f} MB; at most {limits.megabytes:g} are taken.")
    try:
        kind, _, (width, height), _ = file_head(data)
    except UnidentifiedImageError:
        raise DataError(
            f"This is no image of a kind that is read here ({', '.join(_KINDS)})."
        ) from None
    except Image.DecompressionBombError:
        raise DataError(
            f"The image is far too large; at most {limits.megapixels:g} megapixels are taken."
        ) from None
    except Exception as error:  # a damaged head: OSError, SyntaxError, struct.error ...
        raise DataError(f"The file is damaged: {reason_of(error).rstrip('.')}.") from error
    pixels = width * height / 1e6
    if pixels > limits.megapixels:
        raise DataError(
            f"The image has {pixels:,.0f} megapixels ({width} x {height}); at most "
            f"{limits.megapixels:g} are taken."
        )
    side = preprocess.resize_size
    if isinstance(side, int):
        resized = side**2 * max(width, height) / min(width, height) / 1e6
        if resized > limits.megapixels:
            raise DataError(
                f"The image is too narrow ({width} x {height}): resized, it would have "
                f"{resized:,.0f} megapixels; at most {limits.megapixels:g} are taken."
            )
    extension = os.path.splitext(name)[1].lower()
    if extension and extension not in FORMATS[kind]:
        frame = ", of which the first frame is used" if kind == "GIF" else ""
        return f"The file is a {kind}{frame}, whatever its name says."
    return None


class Service:
    """A model, and everything that is asked of it, one request at a time.

    Args:
        runner: Classifies.
        model: Says where it looked; `None` where there is no Keras model to ask for gradients.
        limits: What an upload may be at most.
        why_blind: Why there is no `model`.
        pixels: As for `predict`.
    """

    def __init__(
        self,
        runner: Runner,
        model: keras.Model | None,
        limits: Limits,
        why_blind: str | None,
        pixels: str | None = None,
        min_confidence: float = 0.0,
    ):
        self.runner, self.model, self.limits, self.why_blind = runner, model, limits, why_blind
        self.name = str(runner.info.get("variant") or runner.model_name)
        self.names = model_class_names(runner)
        self.preprocess, self._fed = model_input(runner, pixels=pixels)
        self._least = between("min_confidence", min_confidence, 0, 1)
        self._lock = threading.Lock()

    def results(
        self, uploads: Iterable[tuple[str, Callable[[], bytes]]], heat: bool
    ) -> list[Result]:
        """Classifies uploads (name, reader), in order; those beyond the limit get a sentence."""
        most = self.limits.pictures
        left_out = f"Left out: at most {most} images are taken at a time."
        return [
            self._result(name, read, heat) if number < most else Result(name, error=left_out)
            for number, (name, read) in enumerate(uploads)
        ]

    def _result(self, name: str, read: Callable[[], bytes], heat: bool) -> Result:
        name = valid_text(name)
        try:
            data = read()
            note = check_image(data, name, self.limits, self.preprocess)
            try:
                pixels = self.preprocess.pixels(data)
            except DataError as error:
                # Its message begins with what it was given, which has no name here.
                reason = str(error).split(": ")[-1].rstrip(".")
                raise DataError(f"The file is damaged or cut off: {reason}.") from error
            hot = None
            with self._lock:
                logs = self.runner.log_probabilities(self._input(pixels))[0]
                if heat and self.model is not None:
                    hot = self._heat(pixels, int(logs.argmax()))
            classes = most_probable(logs, self.names, TOP)
            answer = answer_of(self.runner.meaning(), logs, self.names, self._least)
            return Result(name, classes, None, note, _shown(pixels), hot, answer)
        except KerasResNetError as error:
            return Result(name, error=str(error))
        except Exception:  # a fault of ours: said to the person, told to whoever runs this
            logger.exception("An image could not be classified.")
            return Result(name, error="The server failed at this image; its log says why.")

    def _input(self, pixels: np.ndarray) -> np.ndarray:
        return (pixels if self._fed == "uint8" else self.preprocess.normalize(pixels))[None]

    def _heat(self, pixels: np.ndarray, best: int) -> np.ndarray:
        images = in_data_format(self._input(pixels))
        return overlay(_shown(pixels), grad_cam(self.model, images, best)[0])

    def to_dict(self, results: list[Result]) -> dict[str, Any]:
        """As the endpoint gives it."""
        return {"model": self.name, "pictures": [result.to_dict() for result in results]}

    def facts(self) -> list[tuple[str, str]]:
        """What is known about the model: label and value."""
        info = self.runner.info
        weights, training = info.get("weights") or {}, info.get("training") or {}
        facts = [("Model", self.name)]
        if self.model is not None:
            facts.append(("Parameters", f"{self.model.count_params():,}"))
        facts.append(("Weights", _weights_text(weights, training)))
        if "val_accuracy" in training:
            count = training.get("val_pictures")
            of = f" of {count:,} images" if count else ""
            facts.append(("Validation accuracy", f"{training['val_accuracy']:.2%}{of}"))
        facts.append(("Preprocessing", preprocess_text(self.preprocess)))
        by_keras = self.runner.name.startswith("keras/")
        facts.append(("Runs on", backend_line() if by_keras else str(self.runner)))
        return facts


def open_service(
    model: keras.Model | Runner | str | os.PathLike,
    engine: str,
    limits: Limits,
    pixels: str | None = None,
    min_confidence: float = 0.0,
) -> Service:
    """A model's service; the model of a run folder or `.keras` file is opened for its gradients."""
    found, blind = None, None
    if isinstance(model, keras.Model):
        found = model
    elif not isinstance(model, Runner) and format_of_file(Path(model).expanduser()) is None:
        found = load_model(model)
    if found is None:
        blind = "An exported model has no gradients: there are no heat maps of where it looked."
    runner = open_runner(model if found is None else found, engine)
    height, width, channels = model_input(runner, pixels=pixels)[0].output_shape
    blank = np.zeros((1, height or 224, width or 224, channels), np.float32)
    runner.finite_outputs(blank)  # what would answer nothing is not served
    if found is not None:
        try:  # once, before anybody waits for it
            grad_cam(found, in_data_format(blank))
        except InputError as error:
            found, blind = None, f"No heat maps: {error}"
    return Service(runner, found, limits, blind, pixels, min_confidence)


def _shown(pixels: np.ndarray) -> np.ndarray:
    """The image as it is shown: three channels, and large enough to see something."""
    shown = displayed(pixels)
    return enlarged(np.repeat(shown, 3, axis=-1) if shown.shape[-1] == 1 else shown, 224)


def _weights_text(weights: dict[str, Any], training: dict[str, Any]) -> str:
    origin = weights.get("published_as") or weights.get("source")
    if weights.get("published_as"):
        origin = f"torchvision's {origin}"
    if origin and weights.get("sha256"):
        origin = f"{origin} (sha256 {str(weights['sha256'])[:8]}...)"
    if not training:
        return str(origin or "of unknown origin")
    recipe, epoch = training.get("recipe"), training.get("epoch")
    text = f"epoch {epoch} of {training.get('epochs')} by the recipe {recipe}"
    return f"{text}, begun from {origin}" if origin else text


def preprocess_text(preprocess: Preprocess) -> str:
    """How images are prepared, in words.

    Examples:
        >>> preprocess_text(Preprocess())
        'short side resized to 256 (bilinear), 224 x 224 cut from the centre, rgb'
    """
    parts = []
    size, crop = preprocess.resize_size, preprocess.crop_size
    if isinstance(size, int):
        parts.append(f"short side resized to {size} ({preprocess.interpolation})")
    elif size is not None:
        cut = ", cut to its shape first" if preprocess.crop_to_aspect_ratio else ""
        verb = "resized to fit into" if preprocess.pad_to_aspect_ratio else "resized to"
        parts.append(f"{verb} {size[0]} x {size[1]} ({preprocess.interpolation}{cut})")
    if crop is not None:
        parts.append(f"{crop[0]} x {crop[1]} cut from the centre")
    if preprocess.exif:
        parts.append("turned by EXIF")
    mode = preprocess.color_mode
    return ", ".join([*parts, mode if isinstance(mode, str) else f"{mode} channels"])
