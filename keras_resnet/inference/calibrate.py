"""What a model's probabilities are worth is measured, and kept in the model: `calibrate`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import keras
import numpy as np

from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.items import Source
from keras_resnet.data.opening import first_split
from keras_resnet.inference.calibration import Evaluation, best_temperature, best_thresholds
from keras_resnet.inference.evaluate import answers_of, measured
from keras_resnet.models.files import load_model
from keras_resnet.system.errors import InputError
from keras_resnet.system.files import printable
from keras_resnet.weights.keras_files import find_keras_file, write_info


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What `calibrate` measured; `print` it.

    Attributes:
        temperature: What the logits are divided by from now on, or `None`.
        thresholds: The probability that each class is said from, or `None`; of a binary model that
            of its second class.
        before: The model as it was, on the images.
        after: And as it is.
        notes: What could not be measured.
    """

    temperature: float | None
    thresholds: list[float] | None
    before: Evaluation
    after: Evaluation
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.before.count:,} images:"]
        for word, result in (("before", self.before), ("after", self.after)):
            f1 = f", F1 {result.scores['f1']:.3f}" if result.scores else ""
            lines.append(
                f"  {word:6} loss {result.loss:.4f}, calibration error "
                f"{result.calibration_error:.4f}, all right {result.top1:.2%}{f1}"
            )
        if self.temperature is not None:
            lines.append(f"Temperature: {self.temperature:.4f}")
        if self.thresholds is not None:
            names = self.before.class_names[-len(self.thresholds) :]
            pairs = zip(names, self.thresholds, strict=True)
            shown = [f"{printable(name)} {value:.3f}" for name, value in pairs]
            more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
            lines.append(f"Thresholds: {', '.join(shown[:8])}{more}")
        return "\n".join([*lines, *self.notes])


def calibrate(
    model: keras.Model | str | os.PathLike,
    data: str | os.PathLike | Source | ImageDataset,
    *,
    output: str | os.PathLike | None = None,
    temperature: bool = True,
    split: str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    pixels: str | None = None,
) -> Calibrated:
    """Makes a model as sure as it is right, and chooses from when on it says a class.

    The temperature is that of the lowest loss; the thresholds of a binary or multi-label model
    give each class its highest F1. Both stand in `model.info["calibration"]` from then on, which
    `predict`, `evaluate`, `serve` and exported files follow; without that entry the model is as
    before. Measure it afterwards on other images than these.

    Args:
        model: A model, whose `info` is changed; or a `.keras` file or a run folder, whose file is.
        data: Labelled images that it was not trained on, as for `evaluate`.
        output: A `.keras` file to write in place of the model's own.
        temperature: Measure the temperature; otherwise the thresholds alone.
        split: Which of `val`, `test`, `train`; the first that is there by default.
        batch_size: Images at a time.
        workers: Threads that read images.
        pixels: As for `predict`.

    Raises:
        InputError: As of `evaluate`; or there is nothing to measure, or nowhere to keep it.
    """
    file = None if isinstance(model, keras.Model) else find_keras_file(model)
    given = model if file is None else load_model(file)
    info = getattr(given, "info", None)
    if info is None or (file is None and output is not None):
        raise InputError(
            "What is measured is kept in a kr.ImageModel's info, or a .keras file's: give the "
            f"file, or leave out output. Received: {type(given).__name__}, output={output!r}."
        )
    if split is None and not isinstance(data, ImageDataset):
        split = first_split(data, ("val", "test", "train"))
    before = info.pop("calibration", None)
    try:
        meaning, logs, hits, *rest = answers_of(
            given, data, batch_size, workers, split, None, False, "keras", pixels
        )
        found: dict[str, Any] = {}
        notes = []
        if temperature:
            found["temperature"] = best_temperature(meaning, logs, hits)
            if found["temperature"] is None:
                notes.append("Temperature: none, for no loss is lowest between 0.05 and 20.")
        if meaning.task != "single-label":
            scaled = meaning.as_calibrated({"calibration": found}, len(hits[0]))
            p, own = np.exp(scaled.cooled(logs)), slice(-1 if meaning.task == "binary" else 0, None)
            found["thresholds"] = best_thresholds(p[:, own], hits[:, own])
        if not found:
            raise InputError("A single-label model has no thresholds: measure its temperature.")
        info["calibration"] = found
        after = meaning.as_calibrated(info, len(hits[0]))
    except BaseException:
        info.update({} if before is None else {"calibration": before})
        raise
    if file is not None:
        write_info(file, "calibration", found, output)
    first = measured(meaning, logs, hits, *rest)
    second = measured(after, after.cooled(logs), hits, *rest)
    return Calibrated(
        found.get("temperature"), found.get("thresholds"), first, second, tuple(notes)
    )
