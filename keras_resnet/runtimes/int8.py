"""Exported files in eight-bit integers, with ranges taken from images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.folders import labels_by_name
from keras_resnet.data.labels import multi_hot
from keras_resnet.data.opening import labelled
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.sources import Images
from keras_resnet.models.files import model_class_names, model_input
from keras_resnet.runtimes.rows import FORMATS
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system.device import in_data_format
from keras_resnet.system.errors import DataError, InputError, require

# Images that ranges are taken from, and that the result is measured on.
_CALIBRATED, _MEASURED = 300, 2000


def check(name: str) -> None:
    """Says before any work that a format cannot be quantised here.

    Raises:
        InputError: Nothing quantises that format.
        MissingDependencyError: A package is missing; the message has the pip line.
    """
    able = {row.name: row.runner.quantizers for row in FORMATS.values() if row.runner.quantizers}
    if name not in able:
        raise InputError(f"int8 can be had in {' or '.join(able)}. Received: {name!r}.")
    for package, extra in able[name].items():
        require(package, extra, f"int8 in {name}")


def quantize(
    path: Path, name: str, description: dict[str, Any], batches: list[np.ndarray], source: str
) -> None:
    """Turns an exported float32 file into one of eight-bit weights and activations, in its place.

    Ranges are taken from the batches, NHWC float32; they and their source are noted in it.
    """
    batches = [in_data_format(batch) for batch in batches]
    size = description["input"]["shape"][0]
    if size is not None:  # a file of one batch size
        batches = [np.repeat(batch, size, axis=0) for batch in batches]
    description = {
        **description,
        "precision": "int8",
        "calibration": {"pictures": len(batches), "folder": source},
    }
    FORMATS[name].runner.quantize(path, description, batches)


@dataclasses.dataclass(frozen=True)
class Int8Report:
    """What calibration to int8 changed."""

    calibrated: int  # images that the ranges were taken from
    count: int  # images that it was measured on
    apart: bool  # whether those are others than the ones it was calibrated with
    before: float | None  # fraction that the model predicts rightly; `None` without labels
    after: float | None  # fraction that the int8 file predicts rightly
    agreement: float  # fraction for which both predict the same class
    size_before: int  # bytes of the file in float32

    def __str__(self) -> str:
        where = "others" if self.apart else "the same images"
        lines = [
            f"int8: calibrated with {self.calibrated} images, measured on {self.count} {where}"
        ]
        if self.before is not None:
            lines.append(
                f"  top-1 {self.before:.2%} before, {self.after:.2%} after "
                f"({100 * (self.after - self.before):+.2f} points)"
            )
        lines.append(f"  the same prediction as the model for {self.agreement:.2%}")
        return "\n".join(lines)


def spread(items: Sequence, count: int) -> list:
    """At most `count` items, evenly taken."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


class Int8Images:
    """Images to calibrate with, out of a folder, and others, or the rest of it, to measure on."""

    def __init__(self, model: keras.Model, prepared: Preprocess, folder, images=None):
        self.folder = Path(folder).expanduser()
        self._prepared, self._output = model_input(model, prepared)
        self._names = model_class_names(model)
        paths, labels = self._labelled(self.folder)
        chosen = set(spread(range(len(paths)), _CALIBRATED))
        self._calibrate = [paths[i] for i in sorted(chosen)]
        rest = [i for i in range(len(paths)) if i not in chosen]
        self._apart = True
        if images is not None and not isinstance(images, np.ndarray):
            paths, labels = self._labelled(images)
            rest = range(len(paths))
        elif len(rest) < len(chosen) // 4:  # too few to say anything
            rest, self._apart = range(len(paths)), False
        measured = spread(rest, _MEASURED)
        self._measured = [paths[i] for i in measured]
        self._labels = None if labels is None else labels[measured]

    def _labelled(self, source) -> tuple[list[str], np.ndarray | None]:
        """Images with their labels, where the folder's class folders are the model's."""
        if isinstance(source, (str, os.PathLike)):
            try:
                paths, labels, found = labelled(source)
                return list(paths), labels_by_name(labels, found, self._names)
            except (DataError, InputError):
                pass
        return list(Images(source)), None

    def batches(self) -> list[np.ndarray]:
        """float32 inputs `(1, height, width, channels)`."""
        found = [
            image[None].astype(np.float32)
            for images, _ in self._readable(self._calibrate)
            for image in images
        ]
        if not found:
            raise DataError(f"None of the images in {str(self.folder)!r} can be read.")
        return found

    def _readable(self, paths: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of the images that can be read, with their numbers."""
        labels = np.zeros(len(paths), np.int32)
        dataset = ImageDataset(
            paths, labels, self._names, shuffle=False, preprocess=self._prepared,
            output=self._output,
        )  # fmt: skip
        for index in range(len(dataset)):
            try:
                batch = dataset.read_batch(index)
            except DataError:  # nothing of this batch
                continue
            yield batch.images, batch.indices

    def measure(self, reference: Runner, runner: Runner, size_before: int) -> Int8Report:
        """Compares both on the same images."""
        meaning = reference.meaning()
        found = []
        for images, indices in self._readable(self._measured):
            said = (meaning.answers(one.log_probabilities(images)) for one in (reference, runner))
            found.append((indices, *said))
        if not found:
            raise DataError(f"None of the {len(self._measured)} images to measure can be read.")
        indices, before, after = map(np.concatenate, zip(*found, strict=True))
        true = None
        if self._labels is not None:
            true = multi_hot(self._labels[indices], before.shape[1]) > 0
        return Int8Report(
            calibrated=len(self._calibrate),
            count=len(indices),
            apart=self._apart,
            before=None if true is None else _same(before, true),
            after=None if true is None else _same(after, true),
            agreement=_same(before, after),
            size_before=size_before,
        )


def _same(one: np.ndarray, other: np.ndarray) -> float:
    """The fraction of images with the same answer."""
    return float((one == other).all(axis=1).mean())
