"""Predictions that are all there as a table, as JSON, or as a sheet of the images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_resnet.data.looking import load_shown
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.inference.prediction_files import Prediction, csv_lines
from keras_resnet.system.errors import DataError, InputError
from keras_resnet.system.files import to_json, write_text


def predictions_text(predictions: Sequence[Prediction], kind: str) -> str:
    """Predictions as the text of a `.csv` file, a line an image, or of a `.json` file."""
    if kind == ".json":
        return to_json([p.to_dict() for p in predictions], indent=2) + "\n"
    top = max([1, *(len(p.classes) for p in predictions)])
    return "".join(csv_lines(predictions, top, any(p.answer is not None for p in predictions)))


def save_predictions(predictions: Sequence[Prediction], path: str | os.PathLike) -> None:
    """Writes predictions as `.csv` (a line an image), `.json`, or an image sheet (`.png`, ...).

    Raises:
        InputError: The extension names no known form.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".json"):
        write_text(path, predictions_text(predictions, path.suffix.lower()))
    elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        # All of them short-sided to 256, so that one grid holds portraits and landscapes.
        square = Preprocess(256, 256)
        readable = [p for p in predictions if p.classes][:24]
        if not readable:
            raise DataError("There is no readable image to draw.")
        titles = [p.said for p in readable]
        from keras_resnet import plots  # matplotlib takes half a second

        plots.picture_grid(
            np.stack([square.pixels(load_shown(p.path)) for p in readable]), titles, path
        )
    else:
        raise InputError(
            f"Predictions are written as .csv, .json or .png. Received: {path.name!r}."
        )
