"""How good a model is: `evaluate` over a labelled folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_resnet.data.dataset import Batch, ImageDataset
from keras_resnet.data.folders import labels_by_name, unlabelled
from keras_resnet.data.items import Source, taken
from keras_resnet.data.labels import joined, multi_hot
from keras_resnet.data.opening import labelled
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.inference.calibration import Evaluation, calibration
from keras_resnet.models.files import images_at_a_time, model_class_names, model_input
from keras_resnet.models.meaning import Meaning
from keras_resnet.runtimes.averaged import Models, open_averaged
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system.errors import DataError, InputError
from keras_resnet.system.files import printable
from keras_resnet.system.group import Alone, sharers

logger = logging.getLogger("keras_resnet")


def evaluate(
    model: Models,
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
    tta: str | None = None,
) -> Evaluation:
    """Measures a model on labelled images.

    Args:
        model: A model, a `.keras` file or a run folder, or a `Runner`; or several in a list, as for
            `predict`.
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
        tta: As for `predict`.

    Returns:
        The `Evaluation`.

    Raises:
        InputError: The classes are not the model's, or it is unclear how its images are prepared
            or what its outputs say.
        DataError: A folder without images, or, if strict, an image that cannot be read.
        NotFoundError: A path does not exist.
    """
    answers = answers_of(
        model, data, batch_size, workers, split, preprocess, strict, engine, pixels, tta
    )

    def made() -> Evaluation:
        result = measured(*answers)
        if output is not None:
            result.save(output)
        return result

    return sharers().from_first(made)


def answers_of(
    model, data, batch_size, workers, split, preprocess, strict, engine, pixels, tta=None
):
    """What `measured` takes, in the first process; arguments are those of `evaluate`."""
    if isinstance(data, ImageDataset):
        paths, labels, found = data.file_paths, data.labels, data.class_names
        preprocess = data.preprocess
    else:
        paths, labels, found = labelled(data, split)
    runner = open_averaged(model, engine, tta, images=len(paths), preprocess=preprocess)
    logger.info("Engine: %s", runner)
    names, group = model_class_names(runner), sharers()
    mine = np.arange(len(paths))
    dataset: ImageDataset | None = None
    if isinstance(data, ImageDataset):
        dataset = data
        names, true = _by_name(runner, names, labels, found, "The dataset")
        _check_dataset(runner, dataset, pixels)
    else:
        names, true = _by_name(runner, names, labels, found, "The data")
        prepared, fed = model_input(runner, preprocess, pixels)
        batch_size = images_at_a_time(prepared, batch_size)
        mine = np.fromiter(group.share(mine, batch_size), mine.dtype)
        if len(mine):  # there may be fewer batches than processes
            dataset = ImageDataset(
                paths if len(mine) == len(paths) else taken(paths, mine),
                true[mine],
                names,
                shuffle=False,
                batch_size=batch_size,
                workers=workers,
                preprocess=prepared,
                output=runner.fed(prepared, fed),
                on_error="raise" if strict else "skip",
            )
    logs, kept, skipped = _run(runner, dataset, mine, group)

    made: list[tuple] = []

    def known() -> None:
        if not len(kept):
            raise DataError(f"None of the {len(paths)} images can be read: {skipped[0][1]}")
        read, hits = [paths[i] for i in kept], multi_hot(true[kept], len(names)) > 0
        meaning = runner.meaning()
        if meaning.task != "multi-label" and (hits.sum(axis=1) != 1).any():
            raise InputError(
                f"The images have several labels, and {printable(runner.model_name)!r} is a "
                f"{meaning.task} model, which says one an image."
            )
        made.append((meaning, logs, hits, read, names, skipped))

    group.from_first(known)  # the others have nothing, which none of them asks for
    return made[0] if made else ()


def _run(
    runner: Runner, dataset: ImageDataset | None, positions: np.ndarray, group: Alone
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Log-probabilities, of which images, and those that could not be read.

    Of all processes, for the first one; `positions` are those of this one's images among all.
    """
    made: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
    if dataset is not None:
        made = runner.in_turn(
            lambda batch: (positions[batch.indices], runner.log_probabilities(batch.images)),
            _readable(dataset),
            dataset.batch_size,
        )
    found = list(group.in_order(made))
    reasons = group.gather([] if dataset is None else dataset.skipped)
    skipped = sorted((str(path), why) for one in reasons for path, why in one)
    if not found:
        return np.zeros((0, 0)), np.zeros(0, int), skipped
    kept, logs = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(kept)  # a batch that nobody can read leaves none
    return logs[order], kept[order], skipped


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
    if labels is None or unlabelled(labels).any():
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


def measured(meaning: Meaning, logs, hits, paths, names, skipped) -> Evaluation:
    """Compares answers with the classes that images have, bool `(n, classes)`."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes, several = np.arange(len(names)), meaning.task == "multi-label"
    said = meaning.answers(logs)
    true, predicted = (hits, said) if several else (hits.argmax(axis=1), said.argmax(axis=1))
    *of_class, count = precision_recall_fscore_support(
        true, predicted, labels=classes, zero_division=0.0
    )
    top5 = None
    if len(names) > 5 and not several:
        best = np.argpartition(-logs, 5, axis=1)[:, :5]
        top5 = float((best == true[:, None]).any(axis=1).mean())
    both = [np.exp(meaning.log_confidence(logs, of)).tolist() for of in (said, hits)]
    rows = [
        {
            "path": path,
            "true": joined(t, names),
            "predicted": joined(p, names),
            "probability": probability,
            "true_probability": of_true,
        }
        for path, t, p, probability, of_true in zip(paths, hits, said, *both, strict=True)
    ]
    columns = [*of_class, count.astype(int)]
    table = zip(names, *(of.tolist() for of in columns), strict=True)
    per_class = [
        dict(zip(("name", "precision", "recall", "f1", "count"), row, strict=True)) for row in table
    ]
    scores = {} if meaning.task == "single-label" else _scores(meaning, logs, hits, per_class)
    return Evaluation(
        loss=float(meaning.losses(logs, hits).mean()),
        top1=float((hits == said).all(axis=1).mean()),
        top5=top5,
        count=len(true),
        class_names=list(names),
        per_class=[row for i, row in enumerate(per_class) if row["count"] or said[:, i].any()],
        confusion=None if several else confusion_matrix(true, predicted, labels=classes),
        rows=rows,
        skipped=skipped,
        task=meaning.task,
        scores=scores,
    )


def _scores(meaning: Meaning, logs, hits, per_class: list[dict[str, Any]]) -> dict[str, float]:
    """scikit-learn's measures of each class for itself, added to its row, and of all of them."""
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    binary = meaning.task == "binary"
    thresholds = meaning.thresholds or (0.5,) * (1 if binary else len(per_class))
    if binary:
        thresholds = 1 - thresholds[0], thresholds[0]
    for i, row in enumerate(per_class):
        true, both = hits[:, i], 0 < hits[:, i].sum() < len(hits)
        row["average_precision"] = float(average_precision_score(true, logs[:, i]) if true.any()
                                         else np.nan)  # fmt: skip
        row["auc"] = float(roc_auc_score(true, logs[:, i])) if both else np.nan
        row["threshold"] = float(thresholds[i])
    if binary:
        return {name: per_class[1][name] for name in ("average_precision", "auc", "f1")}
    found = {}
    for name in ("average_precision", "auc", "f1"):
        values = [row[name] for row in per_class if row["count"] and np.isfinite(row[name])]
        found[name] = float(np.mean(values)) if values else np.nan
    found["calibration_error"] = calibration(np.exp(logs).ravel(), hits.ravel()).error
    said = meaning.answers(logs)
    return found | {"micro_f1": float(f1_score(hits, said, average="micro", zero_division=0.0))}
