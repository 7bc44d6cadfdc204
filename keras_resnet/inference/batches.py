"""A model for an engine that hands batches of a table to many processes, as Ray Data does."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_resnet.data.items import Files, Item
from keras_resnet.data.rows import content
from keras_resnet.data.tables import image_column
from keras_resnet.inference.calibration import gives_answers
from keras_resnet.inference.predict import iter_predictions
from keras_resnet.inference.prediction_files import columns, table_row
from keras_resnet.runtimes.runner import Runner
from keras_resnet.runtimes.select import open_runner


class BatchPredictor:
    """Opens a model once, and classifies batches of rows: a class for `map_batches` of Ray Data.

    A batch is a dict of columns, an array each, of which one holds the images: paths, files'
    bytes, arrays of 0..255, or dicts with `bytes` as Hugging Face's datasets have them. The answer
    has `class1`, `probability1`, ... (as `write_predictions`) and `error` in its place, a row an
    image; paths and all other columns stay. A row whose image cannot be read has its reason in
    `error`, empty names and `nan`. It is pickled as its arguments: each process opens the model.

    Args:
        model: As for `predict`.
        column: Of the images; by default the first that is called as such are (`image`, `bytes`,
            `jpg`, `path`, ...).
        engine: What runs the model: see `open_runner`.
        **options: `top`, `batch_size`, `workers`, `preprocess`, `pixels`, `min_confidence`, as for
            `predict`.

    Raises:
        InputError: As `predict`; or a batch has no such column.
        NotFoundError: There is no such model.

    Examples:
        >>> from keras_resnet import Preprocess, create_model
        >>> resnet = create_model("resnet20")
        >>> model = BatchPredictor(resnet, top=1, preprocess=Preprocess(32, 32))
        >>> answer = model({"image": np.zeros((2, 32, 32, 3), "uint8"), "key": np.array([7, 8])})
        >>> list(answer), answer["key"].tolist(), answer["error"].tolist()
        (['key', 'class1', 'probability1', 'error'], [7, 8], ['', ''])
    """

    def __init__(
        self,
        model: keras.Model | Runner | str | os.PathLike,
        *,
        column: str | None = None,
        engine: str = "keras",
        **options: Any,
    ):
        self._how = model, {"column": column, "engine": engine, **options}
        self._column, self._options = column, options
        self._runner = open_runner(model, engine, preprocess=options.get("preprocess"))
        iter_predictions(self._runner, np.zeros((1, 1), np.uint8), **options)  # wrong ones: now

    def __reduce__(self) -> tuple:
        """The arguments, of which another process makes its own."""
        model, options = self._how
        return functools.partial(type(self), **options), (model,)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Classifies the images of some rows.

        Args:
            batch: Columns by their names; NumPy arrays, as `batch_format="numpy"` gives them.

        Returns:
            The columns with the answers.
        """
        column = image_column(batch, self._column)
        rows = list(batch[column])
        images = [_image(value, f"row {i}") for i, value in enumerate(rows, 1)]
        found = list(iter_predictions(self._runner, Files(images), **self._options)) if rows else []
        top = min(self._options.get("top", 5), self._runner.num_classes)
        says = gives_answers(self._runner.meaning(), self._options.get("min_confidence", 0.0))
        named = any(isinstance(value, str) for value in rows)
        answer = {name: batch[name] for name in batch if name != column or named}
        table = [table_row(p, top, says) for p in found]
        for i, name in enumerate(columns(top, says)[1:], 1):
            kind, none = (float, np.nan) if name.startswith("probability") else (str, "")
            answer[name] = np.array([none if row[i] is None else row[i] for row in table], kind)
        return answer


def _image(value: Any, name: str) -> str:
    """A row's image as what predicts takes it."""
    if isinstance(value, str) and value:
        return str(value)
    missing = isinstance(value, (str, float))  # an empty cell, however a table has it
    return Item(name, functools.partial(content, None if missing else value, name))
