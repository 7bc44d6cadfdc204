"""What the page and the programs' address answer, apart from how it is shown."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from PIL import Image, UnidentifiedImageError

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.scan import EXTENSIONS_OF
from keras_resnet.errors import DataError, InputError, KerasResNetError
from keras_resnet.inference.explain import overlay
from keras_resnet.inference.grad_cam import grad_cam
from keras_resnet.models.files import dataset_output, model_class_names, model_preprocess
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system.device import backend_line
from keras_resnet.system.files import printable

logger = logging.getLogger("keras_resnet")

TOP = 5
_KINDS = [kind for kind in EXTENSIONS_OF if kind != "MPO"]  # which the reader of JPEG opens


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an upload may be at most.

    Attributes:
        megabytes: Of one picture's file.
        megapixels: Of one picture, before and after it is resized.
        pictures: At a time.

    Raises:
        InputError: A limit that lets nothing through.
    """

    megabytes: float = 20
    megapixels: float = 50
    pictures: int = 16

    def __post_init__(self) -> None:
        """Checks that each is positive."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise InputError(f"{field.name} must be more than 0. Received: {value!r}.")

    @property
    def request_bytes(self) -> int:
        """Bytes of a whole request."""
        return int(self.pictures * self.megabytes * 2**20) + 2**20

    def __str__(self) -> str:
        pictures = "1 picture" if self.pictures == 1 else f"{self.pictures} pictures"
        return (
            f"At most {pictures} at a time, {self.megabytes:g} MB and {self.megapixels:g} "
            "megapixels each."
        )


# --- one picture ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the page says of one upload.

    Attributes:
        name: The file's.
        classes: `(class name, probability)`, most probable first.
        error: Why there is none, or `None`.
        note: Something to know about the file, or `None`.
        pixels: uint8, the picture as the model saw it, or `None`.
        heat: uint8, the same under its heat map, or `None`.
    """

    name: str
    classes: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    error: str | None = None
    note: str | None = None
    pixels: np.ndarray | None = None
    heat: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the endpoint gives it."""
        classes = [{"name": name, "probability": share} for name, share in self.classes]
        return {"name": self.name, "classes": classes, "error": self.error, "note": self.note}


def check_picture(data: bytes, name: str, limits: Limits, preprocess: Preprocess) -> str | None:
    """Looks at a file's head before anything of it is decoded.

    Args:
        data: The file.
        name: Its name.
        limits: What it may be at most.
        preprocess: How it will be resized.

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
        # These kinds and no other: some of Pillow's readers start programs.
        with Image.open(io.BytesIO(data), formats=_KINDS) as picture:
            kind, (width, height) = picture.format, picture.size
    except UnidentifiedImageError:
        raise DataError(
            f"This is no picture of a kind that is read here ({', '.join(_KINDS)})."
        ) from None
    except Image.DecompressionBombError:
        raise DataError(
            f"The picture is far too large; at most {limits.megapixels:g} megapixels are taken."
        ) from None
    except Exception as error:  # a damaged head: OSError, SyntaxError, struct.error ...
        raise DataError(f"The file is damaged: {_reason(error)}.") from error
    pixels = width * height / 1e6
    if pixels > limits.megapixels:
        raise DataError(
            f"The picture has {pixels:,.0f} megapixels ({width} x {height}); at most "
            f"{limits.megapixels:g} are taken."
        )
    side = preprocess.resize_size
    if isinstance(side, int):
        resized = side**2 * max(width, height) / min(width, height) / 1e6
        if resized > limits.megapixels:
            raise DataError(
                f"The picture is too narrow ({width} x {height}): resized, it would have "
                f"{resized:,.0f} megapixels; at most {limits.megapixels:g} are taken."
            )
    extension = os.path.splitext(name)[1].lower()
    if extension and extension not in EXTENSIONS_OF[kind]:
        frame = ", of which the first frame is used" if kind == "GIF" else ""
        return f"The file is a {kind}{frame}, whatever its name says."
    return None


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


class Service:
    """A model, and everything that is asked of it, one request at a time.

    Args:
        runner: Answers.
        model: Says where it looked; `None` where there is no Keras model to ask for gradients.
        limits: What an upload may be at most.
        why_blind: Why there is no `model`.
    """

    def __init__(
        self, runner: Runner, model: keras.Model | None, limits: Limits, why_blind: str | None
    ):
        self.runner, self.model, self.limits, self.why_blind = runner, model, limits, why_blind
        self.names = model_class_names(runner)
        self.preprocess = model_preprocess(runner)
        self._lock = threading.Lock()

    def answer(self, uploads: Iterable[tuple[str, Callable[[], bytes]]], heat: bool) -> list:
        """Answers uploads, in order; those beyond the limit get a sentence."""
        answers = []
        for number, (name, read) in enumerate(uploads):
            if number >= self.limits.pictures:
                sentence = f"Left out: at most {self.limits.pictures} pictures are taken at a time."
                answers.append(Answer(name, error=sentence))
                continue
            answers.append(self._answer(name, read, heat))
        return answers

    def _answer(self, name: str, read: Callable[[], bytes], heat: bool) -> Answer:
        try:
            data = read()
            note = check_picture(data, name, self.limits, self.preprocess)
            try:
                pixels = self.preprocess.pixels(data)
            except DataError as error:
                # Its message begins with what it was given, which has no name here.
                reason = str(error).split(": ")[-1].rstrip(".")
                raise DataError(f"The file is damaged or cut off: {reason}.") from error
            with self._lock:
                classes, best = self._classes(pixels)
                seen = self._seen(pixels)
                hot = self._heat(pixels, best) if heat and self.model is not None else None
            return Answer(name, classes, None, note, seen, hot)
        except KerasResNetError as error:
            return Answer(name, error=str(error))
        except Exception:  # a fault of ours: said to the person, told to whoever runs this
            logger.exception("A picture could not be answered.")
            return Answer(name, error="The server failed at this picture; its log says why.")

    def _input(self, pixels: np.ndarray) -> np.ndarray:
        raw = dataset_output(self.runner) == "uint8"
        return (pixels if raw else self.preprocess.normalize(pixels))[None]

    def _classes(self, pixels: np.ndarray) -> tuple[list[tuple[str, float]], int]:
        logs = self.runner.log_probabilities(self._input(pixels))[0]
        order = np.argsort(-logs, kind="stable")[:TOP]
        return [(self.names[i], float(np.exp(logs[i]))) for i in order], int(order[0])

    def _seen(self, pixels: np.ndarray) -> np.ndarray:
        """The picture as it is shown: three channels, and large enough to see something."""
        rgb = pixels[..., :3] if pixels.shape[-1] > 1 else np.repeat(pixels, 3, axis=-1)
        times = max(1, -(-224 // min(rgb.shape[:2])))
        return rgb.repeat(times, axis=0).repeat(times, axis=1)

    def _heat(self, pixels: np.ndarray, best: int) -> np.ndarray:
        images = self._input(pixels)
        if keras.config.image_data_format() == "channels_first":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return overlay(self._seen(pixels), grad_cam(self.model, images, best)[0])

    def facts(self) -> list[tuple[str, str]]:
        """What is known about the model: label and value."""
        info = self.runner.info
        weights, training = info.get("weights") or {}, info.get("training") or {}
        facts = [("Model", str(info.get("variant") or self.runner.model_name))]
        if self.model is not None:
            facts.append(("Parameters", f"{self.model.count_params():,}"))
        facts.append(("Weights", _weights_text(weights, training)))
        if "val_accuracy" in training:
            pictures = training.get("val_pictures")
            of = f" of {pictures:,} pictures" if pictures else ""
            facts.append(("Validation accuracy", f"{training['val_accuracy']:.2%}{of}"))
        facts.append(("Preprocessing", preprocess_text(self.preprocess)))
        by_keras = self.runner.name.startswith("keras/")
        facts.append(("Runs on", backend_line() if by_keras else str(self.runner)))
        return facts


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
    """How pictures are prepared, in words.

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
        parts.append(f"resized to {size[0]} x {size[1]} ({preprocess.interpolation}{cut})")
    if crop is not None:
        parts.append(f"{crop[0]} x {crop[1]} cut from the centre")
    if preprocess.exif:
        parts.append("turned by EXIF")
    return ", ".join([*parts, preprocess.color_mode])


# --- what the page shows -------------------------------------------------------------------------


def _text(value: Any) -> str:
    """Text for HTML: nothing in it is markup, and nothing turns the writing direction."""
    return html.escape(printable(value), quote=True)


def _data_uri(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    if len(np.unique(pixels.reshape(-1, 3)[:4096], axis=0)) < 64:
        picture.save(stream, "PNG")  # enlarged pixels: a JPEG would smear them
        kind = "png"
    else:
        picture.save(stream, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
