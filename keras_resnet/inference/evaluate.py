"""How good a model is: `evaluate` over a labelled folder."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet import plots
from keras_resnet.data.dataset import Batch, ImageDataset
from keras_resnet.data.folders import labels_by_name
from keras_resnet.data.items import Source
from keras_resnet.data.opening import labelled
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models.files import images_at_a_time, model_class_names, model_input
from keras_resnet.models.meaning import Meaning
from keras_resnet.runtimes.runner import Runner
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.errors import DataError, InputError
from keras_resnet.system.files import (
    column,
    csv_line,
    plain_path,
    printable,
    shortened,
    text_width,
    write_json,
    write_text,
)
from keras_resnet.system.shown import Shown

logger = logging.getLogger("keras_resnet")

_ROWS, _WORST = 30, 10  # classes in the table; of more than that, so many of the worst


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """The result of `evaluate`; `print` it for the table.

    Attributes:
        loss: Mean cross-entropy, nats; of a multi-label model the mean binary one.
        top1: Fraction of images whose predicted class is the true one.
        top5: Fraction whose true class is among the five most probable; `None` for five classes or
            fewer, where it says nothing.
        count: Images evaluated.
        class_names: Names in the order of the model's outputs.
        per_class: A dict a class that occurs: `name`, `precision`, `recall`, `f1`, `count`.
        confusion: Counts, `(classes, classes)`, rows are true classes.
        rows: A dict an image: `path`, `true`, `predicted`, `probability` (of the predicted
            class), `true_probability`.
        skipped: `(path, reason)` of images that could not be read.
    """

    loss: float
    top1: float
    top5: float | None
    count: int
    class_names: list[str]
    per_class: list[dict[str, Any]]
    confusion: np.ndarray
    rows: list[dict[str, Any]]
    skipped: list[tuple[str, str]]

    def _shown(self):
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        skipped = f", {len(self.skipped):,} unreadable" if self.skipped else ""
        numbers = ("precision", "recall", "f1")
        rows = [
            [row["name"], *(f"{row[name]:.3f}" for name in numbers), f"{row['count']:,}"]
            for row in self.per_class
        ]
        return (
            f"{self.count:,} images, top-1 {self.top1:.2%}{top5}, loss {self.loss:.4f}{skipped}",
            ("Class", "Precision", "Recall", "F1", "Count"),
            rows,
        )

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        lines = [f"{self.count:,} images: top-1 {self.top1:.2%}{top5}, loss {self.loss:.4f}", ""]
        shown = self.per_class
        if len(shown) > _ROWS:
            shown = sorted(shown, key=lambda row: row["f1"])[:_WORST]
        width = max([5, *(text_width(shortened(row["name"], 40)) for row in shown)])
        lines.append(f"{'Class':{width}}  Precision  Recall      F1   Count")
        lines += [
            f"{column(row['name'], width)}  {row['precision']:9.3f}  {row['recall']:6.3f}"
            f"  {row['f1']:6.3f}  {row['count']:6d}"
            for row in shown
        ]
        if len(shown) < len(self.per_class):
            lines += [
                f"These {len(shown)} of {len(self.per_class):,} classes have the lowest F1; "
                "`per_class` and evaluation.json have all.",
                "",
                "The most frequent mistakes:",
            ]
            lines += [
                f"  {shortened(true, 40)} taken for {shortened(taken, 40)}: {n:,} ({part:.0%})"
                for true, taken, n, part in plots.frequent_mistakes(
                    self.confusion, self.class_names, 5
                )
            ]
        if self.skipped:
            lines += ["", f"Skipped {len(self.skipped)} unreadable images:"]
            lines += [f"  {printable(reason)}" for _, reason in self.skipped[:10]]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single images, JSON-able."""
        return {
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "count": self.count,
            "class_names": self.class_names,
            "per_class": self.per_class,
            "confusion": self.confusion.tolist(),
            "skipped": [list(item) for item in self.skipped],
        }

    def to_csv(self) -> str:
        """A line an image: path, true and predicted class, their probabilities."""
        numbers = ("probability", "true_probability")
        lines = [csv_line(["path", "true", "predicted", *numbers])]
        lines += [
            csv_line(
                [plain_path(row["path"]), row["true"], row["predicted"]]
                + [f"{row[name]:.6f}" for name in numbers]
            )
            for row in self.rows
        ]
        return "".join(lines)

    def save(self, folder: str | os.PathLike, prefix: str = "") -> None:
        """Writes `evaluation.json`, `predictions.csv` and `confusion_matrix.png` to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{prefix}evaluation.json", self.to_dict())
        write_text(folder / f"{prefix}predictions.csv", self.to_csv())
        plots.confusion_matrix(
            self.confusion, self.class_names, folder / f"{prefix}confusion_matrix.png"
        )


def evaluate(
    model: keras.Model | Runner | str | os.PathLike,
    data: str | os.PathLike | Source | ImageDataset,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    split: str | None = None,
    preprocess: Preprocess | None = None,
    strict: bool = False,
    output: str | os.PathLike | None = None,
    engine: str = "auto",
    pixels: str | None = None,
) -> Evaluation:
    """Measures a model on labelled images.

    Args:
        model: A model, a `.keras` file or a run folder, or a `Runner`.
        data: A folder with a folder a class, or one that holds such folders as `test`, `val` and
            `train`; or an unshuffled `ImageDataset`; or a table, shards or arrays. Classes go by
            their names: the folder may lack some of the model's, but has none that the model does
            not know. Labels that are whole numbers from 0 on, without names, are the numbers of
            the model's classes. Those of a model without names are the folder's, where there are
            as many.
        batch_size: Images at a time, fewer where they are large; the result does not depend on it.
        workers: Threads that read images.
        split: Which of `test`, `val`, `train`; the first that is there by default.
        preprocess: In place of the model's own.
        strict: Stop at an image that cannot be read, instead of skipping it.
        output: A folder for `evaluation.json`, `predictions.csv` and `confusion_matrix.png`.
        engine: What runs the model, as for `predict`.
        pixels: As for `predict`.

    Returns:
        The `Evaluation`.

    Raises:
        InputError: The classes are not the model's, or it is unclear how its images are prepared
            or what its outputs say.
        DataError: A folder without images, or, if strict, an image that cannot be read.
        NotFoundError: A path does not exist.
    """
    if isinstance(data, ImageDataset):
        paths, labels, found = data.file_paths, data.labels, data.class_names
        preprocess = data.preprocess
    else:
        paths, labels, found = labelled(data, split)
    runner = open_runner(model, engine, images=len(paths), preprocess=preprocess)
    logger.info("Engine: %s", runner)
    names = model_class_names(runner)
    if isinstance(data, ImageDataset):
        dataset = data
        names, true = _by_name(runner, names, labels, found, "The dataset")
        _check_dataset(runner, dataset, pixels)
    else:
        names, true = _by_name(runner, names, labels, found, "The data")
        prepared, fed = model_input(runner, preprocess, pixels)
        dataset = ImageDataset(
            paths,
            true,
            names,
            shuffle=False,
            batch_size=images_at_a_time(prepared, batch_size),
            workers=workers,
            preprocess=prepared,
            output=runner.fed(prepared, fed),
            on_error="raise" if strict else "skip",
        )
    logs, kept = [], []
    for indices, found_logs in runner.in_turn(
        lambda batch: (batch.indices, runner.log_probabilities(batch.images)),
        _readable(dataset),
        dataset.batch_size,
    ):
        logs.append(found_logs)
        kept.append(indices)
    if not kept:
        reason = dataset.skipped[0][1]
        raise DataError(f"None of the {dataset.num_samples} images can be read: {reason}")
    logs, kept = np.concatenate(logs), np.concatenate(kept)
    paths = [dataset.file_paths[i] for i in kept]
    result = _measure(runner.meaning(), logs, true[kept], paths, names, dataset.skipped)
    if output is not None:
        result.save(output)
    return result


def _readable(dataset: ImageDataset) -> Iterator[Batch]:
    for index in range(len(dataset)):
        try:
            yield dataset.read_batch(index)
        except DataError:  # nothing of this batch can be read
            if dataset.on_error == "raise":
                raise


def _by_name(
    runner: Runner, names: list[str], labels, found: list[str], what: str
) -> tuple[list[str], np.ndarray]:
    """The names of the model's classes, and labels by them."""
    if labels is None:
        raise InputError("evaluate needs labels: the dataset has none.")
    if not runner.info.get("class_names") and len(found) == len(names):
        return list(found), np.asarray(labels)  # trained on a folder's classes, in their order
    return names, labels_by_name(labels, found, names, what)


def _check_dataset(runner: Runner, dataset: ImageDataset, pixels: str | None) -> None:
    """A dataset must be in a fixed order, and give what the model takes."""
    if dataset.shuffle:
        raise InputError("evaluate needs a dataset in a fixed order: build it shuffle=False.")
    prepared, fed = model_input(runner, dataset.preprocess, pixels)
    if dataset.output != fed or prepared != dataset.preprocess:
        raise InputError(
            f"The model {runner.model_name!r} takes images as preprocess={prepared}, "
            f"output={fed!r} give them. Received: a dataset of output={dataset.output!r}."
        )


def _measure(meaning: Meaning, logs, true, paths, names, skipped) -> Evaluation:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes = np.arange(len(names))
    predicted = logs.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=classes, zero_division=0.0
    )
    top5 = None
    if len(names) > 5:
        best = np.argpartition(-logs, 5, axis=1)[:, :5]
        top5 = float((best == true[:, None]).any(axis=1).mean())
    rows = [
        {
            "path": path,
            "true": names[t],
            "predicted": names[p],
            "probability": float(np.exp(log[p])),
            "true_probability": float(np.exp(log[t])),
        }
        for path, t, p, log in zip(paths, true, predicted, logs, strict=True)
    ]
    occurring = [i for i in classes if support[i] or (predicted == i).any()]
    return Evaluation(
        loss=float(meaning.losses(logs, true).mean()),
        top1=float((predicted == true).mean()),
        top5=top5,
        count=len(true),
        class_names=list(names),
        per_class=[
            {
                "name": names[i],
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "count": int(support[i]),
            }
            for i in occurring
        ],
        confusion=confusion_matrix(true, predicted, labels=classes),
        rows=rows,
        skipped=skipped,
    )
