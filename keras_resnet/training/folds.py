"""K models, each validated on another part of the images: how sure an accuracy is."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet.data.cifar import not_here
from keras_resnet.data.folders import rarest
from keras_resnet.data.items import Files, Joined, Source
from keras_resnet.data.listing import fingerprint
from keras_resnet.data.opening import find_parts, opened, place, title_of
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.system.errors import InputError, whole
from keras_resnet.system.files import printable, write_json
from keras_resnet.system.process import several
from keras_resnet.system.shown import Shown
from keras_resnet.training.run_folder import Run, results_of
from keras_resnet.training.train import identity_of, plain_list, train


@dataclasses.dataclass(frozen=True, repr=False)
class FoldsResult(Shown):
    """What `cross_validate` leaves behind; `print` it.

    Attributes:
        folder: Holds `folds.json`, and the run folders `fold-1`, `fold-2`, ...
        rows: The results of each fold that is through: `fold`, `val_accuracy`, `val_loss`, ...
        summary: Of each of them `(mean, half of the mean's 95 % interval)`.
        interrupted: Not all folds are through; the same call goes on with the next.
    """

    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, tuple[float, float]]
    interrupted: bool = False

    def _shown(self):
        both = [f"{mean:.4f} ± {half:.4f}" for mean, half in self.summary.values()]
        rows = [[f"{row['fold']}", *(f"{row[k]:.4f}" for k in self.summary)] for row in self.rows]
        parts = [f"{k} {value}" for k, value in zip(self.summary, both, strict=True)]
        line = ", ".join([str(self.folder), f"{len(rows)} folds", *parts])
        return line, ["fold", *self.summary], [*rows, ["mean", *both]]

    def __str__(self) -> str:
        _, names, rows = self._shown()
        table = ["".join(f"{cell:>19}" for cell in row) for row in (names, *rows)]
        return "\n".join([*table, f"Folder: {printable(self.folder)}"])


def cross_validate(
    directory: str | os.PathLike | Source,
    folds: int = 5,
    *,
    recipe: str | Recipe = "finetune",
    output: str | os.PathLike = "runs",
    name: str | None = None,
    seed: int = 0,
    exclude: Any = None,
    restart: bool = False,
    dry_run: bool = False,
    verbose: bool = True,
    **options: Any,
) -> FoldsResult:
    """Trains a model a fold, each validated on other images, and says their mean accuracy.

    The training images, and those that a `val/` holds, are dealt out class by class (scikit-learn's
    `StratifiedKFold`); those of a `test/` stay what they are. The interval is Student's. The folds
    share training images, so that it is rather too narrow than too wide.

    Args:
        directory: As for `train`.
        folds: How many.
        recipe: As for `train`.
        output: Where the folder is made.
        name: Of the folder; `-folds` is put behind it.
        seed: Of the folds, and of each training.
        exclude: As for `train`.
        restart: Start anew even where an unfinished one could go on.
        dry_run: Say what the next fold would do, and do nothing.
        verbose: Print the progress.
        **options: As `train` takes them.

    Raises:
        InputError: A class has fewer images than there are folds; or as `train`.
    """
    if several():
        raise InputError("Folds train one after the other, in one process: leave out torchrun.")
    if dry_run and (first := not_here(directory)):
        print(first)
        return FoldsResult(Path(output), [], {})
    data = opened(directory)
    fields = {field.name for field in dataclasses.fields(Recipe)} & options.keys()
    recipe = get_recipe(recipe).with_options(**{field: options.pop(field) for field in fields})
    images = _images(data, exclude)
    parts = list(_parts(images, whole("folds", folds, 2), seed))
    exif = options.get("exif", False)
    arguments = {"directory": place(data), "seed": seed, "exif": exif, "exclude": exclude}
    called = f"{name or f'{recipe.model}-{title_of(data)}'}-folds"
    run = Run.find(output, called, {**identity_of(recipe, arguments), "folds": folds}, restart)
    common = {"recipe": recipe, "seed": seed, "output": run.folder, "verbose": verbose, **options}
    if dry_run:
        left = [i for i in range(folds) if results_of(run.path(f"fold-{i + 1}")) is None] or [0]
        train(parts[left[0]], name=f"fold-{left[0] + 1}", dry_run=True, **common)
        return FoldsResult(run.folder, [], {})
    files = fingerprint(images)
    run.check_files(run.config.get("files"), files)
    run.open()
    say = run.say if verbose else run.log
    rows: list[dict[str, Any]] = []
    try:
        plain = json.loads(json.dumps({**options, **arguments, "folds": folds}, default=str))
        run.write_config(arguments=plain, files=files, status="running")
        for number, part in enumerate(parts, 1):
            folder = run.path(f"fold-{number}")
            if results_of(folder) is None:
                say(f"\nFold {number} of {folds}")
                train(part, name=folder.name, **common)
            found = results_of(folder)
            if found is None:  # it was interrupted, or could not be evaluated
                break
            rows.append({"fold": number, **found})
        interrupted = len(rows) < folds
        result = FoldsResult(run.folder, rows, _summary(rows), interrupted)
        facts = {"folds": rows, "summary": result.summary}
        run.guard(write_json, run.path("folds.json"), facts)
        run.write_config(status="interrupted" if interrupted else "finished")
        say(f"\n{result}")
        return result
    finally:  # a folder without a fold goes again
        run.close(failed=not any(run.folder.glob("fold-*")))


def _images(data: str | Source, exclude: Any) -> Source:
    """All images as one source, with the split of each."""
    found, parts = find_parts(data, exclude), {}
    for kind, (paths, labels) in found.of.items():
        facts = {"labels": labels, "class_names": found.names, "place": place(data)}
        parts[kind] = paths if isinstance(paths, Source) else Files(paths, **facts)
    images = Joined(parts)
    images.place, asked = place(data), getattr(data, "asked", {})
    # What each fold's record says of them is all that a later report of it has.
    images.asked = asked if exclude is None else {**asked, "exclude": plain_list(exclude)}
    return images


def _parts(images: Source, folds: int, seed: int) -> Iterator[Source]:
    """The images once a fold, each time with other ones to validate on."""
    from sklearn.model_selection import StratifiedKFold

    pool = np.flatnonzero(images.splits != "test")
    labels = images.labels[pool]
    groups = rarest(labels)
    counts = np.bincount(groups)
    if labels.dtype == object:
        counts = counts[[counts.argmax()]]  # of several labels an image a rare one may be missing
    if counts.min() < folds:
        raise InputError(
            f"Each fold needs an image of each class to validate on, and {counts.min()} are all of "
            f"{images.class_names[counts.argmin()]!r}. Received: folds={folds}."
        )
    dealt = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rare labels
        found = list(dealt.split(pool, groups))
    for _, held in found:
        part = images.take(np.arange(len(images)))
        part.splits = np.where(images.splits == "test", "test", "train")
        part.splits[pool[held]] = "val"
        part.asked = images.asked
        yield part


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """The mean of each figure that all folds have, and half of its interval by Student's t."""
    from scipy.stats import t

    names = [name for name in (rows[0] if rows else ()) if name not in ("fold", "skipped")]
    found = {name: [row.get(name) for row in rows] for name in names}
    wide = t.ppf(0.975, max(len(rows) - 1, 1)) / np.sqrt(max(len(rows), 1))
    return {
        name: (float(np.mean(values)), float(wide * np.std(values, ddof=1)))
        for name, values in found.items()
        if len(rows) > 1 and None not in values
    }
