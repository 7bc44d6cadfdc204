"""What a model answers: `evaluate` over a labelled folder, `predict` over any pictures."""

from __future__ import annotations

import csv
import dataclasses
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet import plots
from keras_resnet.data import ImageDataset, find_pictures, image_dataset_from_directory
from keras_resnet.engines import Runner, load_model, log_probabilities, open_runner
from keras_resnet.errors import DataError, InputError, NotFoundError, did_you_mean
from keras_resnet.files import printable, write_json, write_text
from keras_resnet.preprocess import Preprocess

__all__ = [
    "Evaluation", "Prediction", "PredictionTable", "dataset_output", "evaluate",
    "iter_predictions", "labels_by_name", "load_model", "log_probabilities", "model_class_names",
    "model_preprocess", "picture_paths", "predict", "save_predictions", "split_folder",
    "split_folders",
]  # fmt: skip


def model_preprocess(model: keras.Model | Runner) -> Preprocess:
    """The `Preprocess` that a model was trained or imported with.

    Raises:
        InputError: The model names none.
    """
    config = getattr(model, "info", {}).get("preprocess")
    if config is None:
        name = model.model_name if isinstance(model, Runner) else model.name
        raise InputError(
            f"The model {name!r} does not say how its pictures are prepared: pass "
            "preprocess=kr.Preprocess(...), or set model.info['preprocess'] and save it."
        )
    return Preprocess.from_config(config)


def model_class_names(model: keras.Model | Runner) -> list[str]:
    """Names of a model's classes; their numbers where it knows none."""
    names = getattr(model, "info", {}).get("class_names")
    if names:
        return list(names)
    count = model.num_classes if isinstance(model, Runner) else model.output_shape[-1]
    return [str(i) for i in range(count)]


def dataset_output(model: keras.Model | Runner) -> str:
    """What the model wants: raw pixels where it normalises itself."""
    inside = getattr(model, "info", {}).get("options", {}).get("include_preprocessing")
    return "uint8" if inside else "float32"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`; `print` it for the table.

    Attributes:
        loss: Mean cross-entropy, nats.
        top1: Share of pictures whose most probable class is the true one.
        top5: Share whose true class is among the five most probable; `None` for five classes or
            fewer, where it says nothing.
        count: Pictures evaluated.
        class_names: Names in the order of the model's outputs.
        per_class: A dict a class that occurs: `name`, `precision`, `recall`, `f1`, `count`.
        confusion: Counts, `(classes, classes)`, rows are true classes.
        rows: A dict a picture: `path`, `true`, `predicted`, `probability` (of the predicted
            class), `true_probability`.
        skipped: `(path, reason)` of pictures that could not be read.
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

    def __str__(self) -> str:
        width = max([5, *(len(printable(row["name"])) for row in self.per_class)])
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        lines = [
            f"{self.count:,} pictures: top-1 {self.top1:.2%}{top5}, loss {self.loss:.4f}",
            "",
            f"{'Class':{width}}  Precision  Recall      F1   Count",
        ]
        lines += [
            f"{printable(row['name']):{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}"
            f"  {row['f1']:6.3f}  {row['count']:6d}"
            for row in self.per_class
        ]
        if self.skipped:
            lines += ["", f"Skipped {len(self.skipped)} unreadable pictures:"]
            lines += [f"  {printable(reason)}" for _, reason in self.skipped[:10]]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single pictures, JSON-able."""
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
        """A line a picture: path, true and predicted class, their probabilities."""
        text = io.StringIO()
        names = ["path", "true", "predicted", "probability", "true_probability"]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow(
                {**row, **{k: f"{row[k]:.6f}" for k in ("probability", "true_probability")}}
            )
        return text.getvalue()

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
    data: str | os.PathLike | ImageDataset,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    split: str | None = None,
    preprocess: Preprocess | None = None,
    strict: bool = False,
    output: str | os.PathLike | None = None,
    engine: str = "keras",
) -> Evaluation:
    """Measures a model on labelled pictures.

    Args:
        model: A model, a `.keras` file or a run folder, or a `Runner`.
        data: A folder with a folder a class, or one that holds such folders as `test`, `val` and
            `train`; or an unshuffled `ImageDataset`. Classes go by their names: the folder may
            lack some of the model's, but has none that the model does not know.
        batch_size: Pictures at a time; the result does not depend on it.
        workers: Threads that read pictures.
        split: Which of `test`, `val`, `train`; the first that is there by default.
        preprocess: In place of the model's own.
        strict: Stop at a picture that cannot be read, instead of skipping it.
        output: A folder for `evaluation.json`, `predictions.csv` and `confusion_matrix.png`.
        engine: What runs the model: see `engines.open_runner`.

    Returns:
        The `Evaluation`.

    Raises:
        InputError: The classes are not the model's, or the model names no preprocessing.
        DataError: A folder without pictures, or, if strict, a picture that cannot be read.
        NotFoundError: A path does not exist.
    """
    runner = open_runner(model, engine)
    names = model_class_names(runner)
    if isinstance(data, ImageDataset):
        dataset = data
        if dataset.shuffle:
            raise InputError("evaluate needs a dataset in a fixed order: build it shuffle=False.")
    else:
        paths, labels, found = find_pictures(split_folder(data, split))
        labels = labels_by_name(labels, found, names)
        dataset = ImageDataset(
            paths,
            labels,
            names,
            shuffle=False,
            batch_size=batch_size,
            workers=workers,
            preprocess=preprocess or model_preprocess(runner),
            output=dataset_output(runner),
            on_error="raise" if strict else "skip",
        )
    logs, kept = [], []
    for index in range(len(dataset)):
        try:
            batch = dataset.read_batch(index)
        except DataError:  # nothing of this batch can be read
            if dataset.on_error == "raise":
                raise
            continue
        logs.append(runner.log_probabilities(batch.images))
        kept.append(batch.indices)
    if not kept:
        reason = dataset.skipped[0][1]
        raise DataError(f"None of the {dataset.num_samples} pictures can be read: {reason}")
    logs, kept = np.concatenate(logs), np.concatenate(kept)
    true = np.asarray(dataset.labels)[kept]
    result = _measure(logs, true, [dataset.file_paths[i] for i in kept], names, dataset.skipped)
    if output is not None:
        result.save(output)
    return result


def split_folder(directory: str | os.PathLike, split: str | None = None) -> str:
    """The folder of class folders inside a dataset: `test`, `val` or `train` where it has them.

    Raises:
        NotFoundError: The split that was asked for is not there.
    """
    directory = os.path.expanduser(os.fspath(directory))
    found = split_folders(directory)
    if split is not None:
        if split not in found:
            raise NotFoundError(
                f"{directory!r} has no {split!r} folder; it has: {', '.join(found) or 'none'}."
            )
        return found[split]
    for name in ("test", "val", "train"):
        if name in found and "train" in found:
            return found[name]
    return directory


def split_folders(directory: str | os.PathLike) -> dict[str, str]:
    """Folders named as parts of a dataset: `train`, `val` (or `valid`, `validation`), `test`."""
    aliases = {
        "train": ("train", "training"),
        "val": ("val", "valid", "validation"),
        "test": ("test",),
    }
    found = {}
    for split, names in aliases.items():
        for name in names:
            path = os.path.join(os.fspath(directory), name)
            if os.path.isdir(path):
                found.setdefault(split, path)
    return found


def labels_by_name(
    labels: np.ndarray,
    found: Sequence[str],
    names: Sequence[str],
    what: str = "The folder",
    who: str = "the model",
) -> np.ndarray:
    """Labels by one list of class names turned into those by another.

    Raises:
        InputError: A class of `found` is not among `names`.
    """
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise InputError(
            f"{what} has classes that {who} does not have: "
            f"{', '.join(map(repr, unknown[:10]))}. There are {len(names)}: "
            f"{', '.join(map(repr, sorted(names)[:10]))}{' ...' if len(names) > 10 else ''}."
        )
    positions = np.asarray([names.index(name) for name in found], np.int32)
    return positions[labels]


def _measure(logs, true, paths, names, skipped) -> Evaluation:
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
    picked = logs[np.arange(len(true)), true]
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
        loss=float(-picked.mean()),
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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        path: The picture.
        classes: `(class name, probability)`, most probable first; empty where it cannot be read.
        error: Why it cannot be read, or `None`.
    """

    path: str
    classes: list[tuple[str, float]]
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return printable(self.error)
        answers = ", ".join(f"{printable(name)} {p:.1%}" for name, p in self.classes)
        return f"{printable(self.path)}: {answers}"


class PredictionTable:
    """Predictions as lines of a table whose columns stay in place, for a terminal.

    Args:
        paths: Of all the pictures.
        class_names: Of all the classes.
        top: Classes a picture.

    Example:
        >>> table = PredictionTable(["a.png", "bees/1.png"], ["ant", "bee"], top=2)
        >>> print(table.header)
        Picture     Class       Class
        >>> print(table.line(Prediction("a.png", [("bee", 0.75), ("ant", 0.25)])))
        a.png       bee  75.0%  ant  25.0%
    """

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], top: int):
        self._path = min(60, max(7, *(len(printable(p)) for p in [*paths, ""])))
        self._name = min(30, max(len(printable(n)) for n in class_names))
        self._top = min(top, len(class_names))

    @property
    def header(self) -> str:
        """The names of the columns."""
        cell = f"{'Class':{self._name + 7}}"
        return f"{'Picture':{self._path}}  {'  '.join([cell] * self._top)}".rstrip()

    def line(self, prediction: Prediction) -> str:
        """One picture; a path too long for its column loses its beginning."""
        path = printable(prediction.path)
        if len(path) > self._path:
            path = f"...{path[3 - self._path :]}"
        if prediction.error is not None:
            return f"{path:{self._path}}  {printable(prediction.error)}"
        cells = [
            f"{printable(name)[: self._name]:{self._name}} {share:6.1%}"
            for name, share in prediction.classes
        ]
        return f"{path:{self._path}}  {'  '.join(cells)}"


def picture_paths(sources: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    """Files out of files, folders (searched through, sorted) and shell patterns.

    Raises:
        NotFoundError: A path does not exist, or a pattern matches nothing.
        DataError: A folder holds no picture.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    paths: list[str] = []
    for source in sources:
        text = os.path.expanduser(os.fspath(source))
        if os.path.isdir(text):
            paths += image_dataset_from_directory(text, labels=None, shuffle=False).file_paths
        elif os.path.exists(text):
            paths.append(text)
        elif glob.has_magic(text):
            matches = sorted(p for p in glob.glob(text, recursive=True) if os.path.isfile(p))
            if not matches:
                raise NotFoundError(f"No file matches {text!r}.")
            paths += matches
        else:
            parent, name = os.path.split(text)
            near = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
            raise NotFoundError(f"No file or folder at {text!r}.{did_you_mean(name, near)}")
    return paths


def iter_predictions(
    model: keras.Model | Runner | str | os.PathLike,
    sources: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    top: int = 5,
    batch_size: int = 32,
    workers: int | None = None,
    preprocess: Preprocess | None = None,
    engine: str = "keras",
) -> Iterator[Prediction]:
    """As `predict`, one `Prediction` at a time in the order of the files, in flat memory."""
    if top < 1:
        raise InputError(f"top must be at least 1. Received: {top}.")
    runner = open_runner(model, engine)
    names = model_class_names(runner)
    paths = picture_paths(sources)
    dataset = ImageDataset(
        paths,
        label_mode=None,
        shuffle=False,
        batch_size=batch_size,
        workers=workers,
        preprocess=preprocess or model_preprocess(runner),
        output=dataset_output(runner),
    )
    for index in range(len(dataset)):
        asked = dataset.batch_indices(index)
        answers: dict[int, Prediction] = {}
        try:
            batch = dataset.read_batch(index)
        except DataError:
            if not dataset.skipped:
                raise
        else:
            logs = runner.log_probabilities(batch.images)
            for sample, log in zip(batch.indices, logs, strict=True):
                order = np.argsort(-log, kind="stable")[:top]
                answers[int(sample)] = Prediction(
                    paths[sample], [(names[i], float(np.exp(log[i]))) for i in order]
                )
        reasons = dict(dataset.skipped)
        for sample in asked:
            yield answers.get(int(sample)) or Prediction(
                paths[sample], [], reasons.get(paths[sample], "cannot be read")
            )


def predict(
    model: keras.Model | Runner | str | os.PathLike,
    sources: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    top: int = 5,
    batch_size: int = 32,
    workers: int | None = None,
    preprocess: Preprocess | None = None,
    engine: str = "keras",
) -> list[Prediction]:
    """Classifies pictures.

    Args:
        model: A model, a `.keras` file or a run folder, or a `Runner`; the file is all that is
            needed.
        sources: A picture, a folder (searched through), a shell pattern, or several of these.
        top: Classes to give a picture, most probable first.
        batch_size: Pictures at a time; the result does not depend on it.
        workers: Threads that read pictures.
        preprocess: In place of the model's own.
        engine: What runs the model: see `engines.open_runner`.

    Returns:
        A `Prediction` a picture, in order; those of unreadable pictures hold an error.

    Raises:
        InputError: The model has no head, or names no preprocessing.
        NotFoundError: A path does not exist.
        DataError: A folder holds no picture.
    """
    return list(
        iter_predictions(
            model,
            sources,
            top=top,
            batch_size=batch_size,
            workers=workers,
            preprocess=preprocess,
            engine=engine,
        )
    )


def save_predictions(predictions: Sequence[Prediction], path: str | os.PathLike) -> None:
    """Writes predictions as `.csv` (a line a picture), `.json`, or a picture sheet (`.png`, ...).

    Raises:
        InputError: The extension names no known form.
    """
    path = Path(path)
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        top = max([1, *(len(p.classes) for p in predictions)])
        ranks = range(1, top + 1)
        writer.writerow(["path", *(f"{n}{i}" for i in ranks for n in ("class", "probability"))])
        for p in predictions:
            cells = [c for name, share in p.classes for c in (name, f"{share:.6f}")]
            writer.writerow([p.path, *cells])
        write_text(path, text.getvalue())
    elif path.suffix == ".json":
        write_text(path, json.dumps([dataclasses.asdict(p) for p in predictions], indent=2) + "\n")
    elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        # All of them short-sided to 256, so that one grid holds portraits and landscapes.
        square = Preprocess(256, 256)
        readable = [p for p in predictions if p.classes][:24]
        if not readable:
            raise DataError("There is no readable picture to draw.")
        titles = [f"{p.classes[0][0]} {p.classes[0][1]:.1%}" for p in readable]
        plots.picture_grid(np.stack([square.pixels(p.path) for p in readable]), titles, path)
    else:
        raise InputError(f"Predictions are written as .csv, .json or .png, not {path.suffix!r}.")
