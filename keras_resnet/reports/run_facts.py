"""The one record of a run, and what follows from it; `run_files` reads it from a run folder."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet.data.items import Item, Source, absolute
from keras_resnet.data.labels import joined, multi_hot
from keras_resnet.data.opening import as_asked, find_parts
from keras_resnet.data.reading import head
from keras_resnet.data.shards import find_in_shard
from keras_resnet.inference.calibration import (
    Calibration,
    Evaluation,
    accuracy_interval,
    calibration,
    coverage_curve,
)
from keras_resnet.system.errors import DataError, InputError, KerasResNetError
from keras_resnet.system.process import system_name


@dataclass(frozen=True, kw_only=True)
class Results(Evaluation):
    """What was measured on one part of the data, `"validation"` or `"test"`, as files tell it.

    What they do not tell is `None`, or empty.
    """

    part: str

    @property
    def word(self) -> str:
        """What `top1` is called."""
        return "All labels right" if self.task == "multi-label" else "Accuracy"

    @property
    def headline(self) -> tuple[str, float]:
        """What the task is measured by first, and the number."""
        if self.task == "multi-label" and "average_precision" in self.scores:
            return "Mean average precision", self.scores["average_precision"]
        return self.word, self.top1

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return accuracy_interval(round(self.top1 * self.count), self.count)

    @property
    def baseline(self) -> tuple[str, float] | None:
        """The most frequent class, and how often it alone would be right."""
        if self.confusion is None or not self.confusion.sum():
            return None
        totals = self.confusion.sum(axis=1)
        return self.class_names[int(totals.argmax())], float(totals.max() / totals.sum())

    @property
    def chance_loss(self) -> float | None:
        """The loss of a model that knows nothing."""
        classes = 2 if self.task == "multi-label" else len(self.class_names)
        return math.log(classes) if classes > 1 else None

    @property
    def occurring(self) -> list[dict[str, Any]]:
        """The rows of `per_class` whose class has images."""
        return [row for row in self.per_class if row["count"]]

    @property
    def macro_f1(self) -> float | None:
        """The mean F1 of the classes that occur."""
        scores = [row["f1"] for row in self.occurring]
        return sum(scores) / len(scores) if scores else None

    @functools.cached_property
    def calibration(self) -> Calibration | None:
        """Confidence against accuracy."""
        if not self.rows:
            return None
        return calibration(np.clip([row["probability"] for row in self.rows], 0, 1), self.right)

    @property
    def coverage(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Of `coverage_curve`."""
        if not self.rows:
            return None
        return coverage_curve([row["probability"] for row in self.rows], self.right)

    def confusions(self, limit: int = 8) -> list[tuple[str, str, int, float]]:
        """The most frequent mistakes: true and predicted class, count, fraction of the class."""
        if self.confusion is None:
            return []
        from keras_resnet.plots import frequent_mistakes  # matplotlib takes a second

        return frequent_mistakes(self.confusion, self.class_names, limit)

    @property
    def mistakes(self) -> list[dict[str, Any]]:
        """The rows whose prediction is wrong, the surest first."""
        wrong = [row for row in self.rows if row["true"] != row["predicted"]]
        return sorted(wrong, key=lambda row: -row["probability"])

    def least_certain(self, but: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """The rows, right or wrong, without some of them; the least sure first."""
        paths = {row["path"] for row in but}
        rows = [row for row in self.rows if row["path"] not in paths]
        return sorted(rows, key=lambda row: row["probability"])


@dataclass
class RunFacts:
    """What is known of one run; whatever is not there is empty or `None`."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)  # without values of a wrong kind
    info: dict[str, Any] = field(default_factory=dict)  # what the best model says of itself
    history: dict[str, list[float]] = field(default_factory=dict)  # columns, all of one length
    results: dict[str, Results] = field(default_factory=dict)  # "test" before "validation"
    skipped: list[tuple[str, str]] = field(default_factory=list)  # path and reason
    files: dict[str, int] = field(default_factory=dict)  # name and bytes of the models
    missing: list[str] = field(default_factory=list)  # sentences: a finished run would have it
    begun: datetime | None = None  # by `train.log`, or where `config.json` says it
    ended: datetime | None = None
    images: str | Source | None = None  # what it was trained on, where somebody has said it
    trained: RunFacts | None = None  # the model's run, where this is what `evaluate` says of it

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def status(self) -> str:
        """`finished`, `interrupted`, `running`, or `unknown`."""
        return self.config.get("status", "unknown")

    @property
    def main(self) -> Results | None:
        """The results that count: of the test images where there are any."""
        return next(iter(self.results.values()), None)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's fields as they were used: `"auto"` is what it came to."""
        recipe = self.config.get("recipe", {})
        if recipe.get("batch_size") == "auto":
            recipe = {**recipe, "batch_size": self.config.get("batch_size", "auto")}
        if recipe.get("weights") == "auto" and self.config.get("start"):
            recipe = {**recipe, "weights": self.config["start"][0]}
        return recipe

    @property
    def why_random(self) -> str:
        """Why there were no published weights to start from; empty where nobody looked for any."""
        return str(([*self.config.get("start", ()), "", ""])[1])

    @property
    def model(self) -> dict[str, Any]:
        """What `config.json` says of the model: `parameters`, `weights` and so on."""
        return self.config.get("model", {})

    @property
    def versions(self) -> dict[str, Any]:
        """Versions of the libraries and the system, and the devices."""
        devices, found = self.config.get("devices"), dict(self.config.get("versions", {}))
        if "platform" in found:  # until 0.1 the whole name of the kernel
            found["platform"] = system_name(found["platform"])
        return found if devices is None else {**found, "Device": devices}

    @property
    def variant(self) -> str | None:
        """The model's name in the table."""
        said = self.model.get("variant"), self.info.get("variant"), self.recipe.get("model")
        return next((name for name in said if isinstance(name, str)), None)

    @property
    def preprocess(self) -> dict[str, Any]:
        """The pixel path's settings."""
        return self.config.get("preprocess") or _dict(self.info.get("preprocess"))

    @property
    def augmentation(self) -> list[str]:
        """Names of the augmentation's steps."""
        steps = self.config.get("augment", {}).get("steps")
        steps = steps if isinstance(steps, list) else []
        return [str(step.get("name")) for step in steps if isinstance(step, dict)]

    @property
    def weights(self) -> dict[str, Any]:
        """What the model says of the file that it started from: `source`, `sha256` and so on."""
        return _dict(self.info.get("weights") or self.model.get("weights"))

    @property
    def command(self) -> list[str]:
        """The words of the command line that trained it, behind the program's."""
        given = [str(word) for word in self.config.get("command", ())][1:]
        return given if given[:1] == ["train"] else []

    @property
    def class_counts(self) -> dict[str, dict[str, int]]:
        """Images of each class, by part."""
        counts = {}
        for part, given in self.config.get("class_counts", {}).items():
            kept = {str(k): v for k, v in _dict(given).items() if isinstance(v, int)}
            if kept:
                counts[{"train": "training", "val": "validation"}.get(part, part)] = kept
        for part, results in self.results.items():
            if part == "test" or part not in counts:
                counts[part] = {row["name"]: row["count"] for row in results.per_class}
        return counts

    @property
    def training_counts(self) -> dict[str, int]:
        """Training images of each class."""
        return self.class_counts.get("training", {})

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the model's outputs, as far as anything says them."""
        for results in self.results.values():
            if results.class_names:
                return results.class_names
        names = self.info.get("class_names")
        if isinstance(names, list):
            return [str(n) for n in names]
        return list(dict.fromkeys(n for counts in self.class_counts.values() for n in counts))

    @property
    def all_skipped(self) -> list[tuple[str, str]]:
        """`(path, reason)` of images that training or the evaluation could not read."""
        return sorted({*self.skipped, *(self.main.skipped if self.main else ())})

    @property
    def epochs(self) -> int:
        """Epochs that were run."""
        return max((len(v) for v in self.history.values()), default=0)

    @property
    def score(self) -> str:
        """The column of the history that the best epoch is best by."""
        several = "average_precision" in self.history
        return "average_precision" if several else "accuracy"

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best validation accuracy, from 1."""
        values = np.asarray(self.history.get(f"val_{self.score}", ()), float)
        return int(np.nanargmax(values)) + 1 if np.isfinite(values).any() else None

    @property
    def seconds(self) -> float | None:
        """Time of all epochs."""
        values = [v for v in self.history.get("seconds", ()) if math.isfinite(v)]
        return sum(values) if values else None

    def image(self, path: str) -> str | None:
        """Where an image of the results is now, or `None`.

        Paths are written as training was called with them, maybe from another working directory.
        """
        if os.path.isfile(path):
            return path
        if (item := find_in_shard(path) or self._items.get(path)) is not None:
            return item
        if "directory" in self.config:
            given = [self.images] if isinstance(self.images, str) else []
            parts = Path(path).parts
            for folder in (*given, self.config["directory"]):
                for i in range(1, len(parts)):
                    candidate = os.path.join(folder, *parts[i:])
                    if os.path.isfile(candidate):
                        return candidate
        return None

    @functools.cached_property
    def _source(self) -> str | Source | None:
        """What it was trained on, where somebody or its record says it and it is there."""
        said = {"directory": self.config.get("directory", ""), **self._asked}
        keys = ("directory", "columns", "label_regex")
        asked = {key: said[key] for key in keys if isinstance(said.get(key), str)}
        known = self.images is None and os.path.exists(asked.get("directory", ""))
        return as_asked(**asked) if known else self.images

    @property
    def _asked(self) -> dict[str, Any]:
        """What `train` was called with, and what it was told beside the images."""
        arguments = _dict(self.config.get("arguments"))
        return {**arguments, **_dict(arguments.get("source"))}

    @functools.cached_property
    def _items(self) -> dict[str, str]:
        """By name, the results' images that are no files: of archives, tables' rows, arrays."""
        wanted, found = {row["path"] for row in self._rows}, dict[str, str]()
        with contextlib.suppress(KerasResNetError):
            if not isinstance(source := self._source, Source):
                return found
            # The results are of few among many, and seldom of those to train on.
            for name in itertools.chain(*reversed(source.parts().values()), source):
                if isinstance(name, Item) and name in wanted:
                    found[name] = name
                if len(found) == len(wanted):
                    break
        return found

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return [row for results in self.results.values() for row in results.rows]

    def training_images(
        self, most: int, but: Set[str] = frozenset()
    ) -> tuple[list[str], list[str], bool]:
        """Images it was trained on but those of the results, labels, whether there are more.

        Args:
            most: How many; of more so many are drawn, always the same ones.
            but: Images to leave out even where all were evaluated, as `absolute` names them.

        Raises:
            KerasResNetError: They are not there, or it is not known which they are.
        """
        if self._source is None:
            raise InputError(
                "what it was trained on is not known, or not there any more: give --images."
            )
        found = find_parts(self._source, self._asked.get("exclude"))
        held_out = self.results.get("validation")
        if (
            "val" not in found.of
            and self.class_counts.get("validation")
            and not (held_out and held_out.rows)
        ):
            raise InputError("which images were held out is not known without predictions.csv.")
        paths, labels = found.of["train"]
        evaluated = {absolute(self.image(row["path"]) or row["path"]) for row in self._rows}
        order = np.random.default_rng(0).permutation(len(paths))
        for out in (evaluated | but, but):
            kept = (i for i in order if absolute(paths[i]) not in out)
            if drawn := sorted(itertools.islice(kept, most)):
                more = next(kept, None) is not None
                break
        else:
            raise DataError("there are no images but these that it was trained on.")
        hits = (multi_hot(labels[i : i + 1], len(found.names))[0] for i in drawn)
        return [paths[i] for i in drawn], [joined(one, found.names) for one in hits], more

    def image_sizes(self, limit: int = 2000) -> dict[str, tuple[int, int, int]] | None:
        """Smallest, median and largest width and height of the evaluated images, as stored.

        Only the headers are read.
        """
        sizes = []
        for row in self.main.rows[:limit] if self.main else ():
            path = self.image(row["path"])
            if path is None:
                continue
            # Pillow raises many kinds, and unreadable images are no news here.
            with contextlib.suppress(Exception), head(path) as image:
                sizes.append(image.size)
        if not sizes:
            return None
        found = {}
        for name, values in zip(("width", "height"), zip(*sizes, strict=True), strict=True):
            found[name] = (min(values), int(np.median(values)), max(values))
        return {**found, "count": (len(sizes),) * 3}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def same_images(runs: Sequence[RunFacts], part: str) -> bool:
    """Whether all runs were evaluated on the same images, by class folder and name."""
    seen = [{Path(row["path"]).parts[-2:] for row in run.results[part].rows} for run in runs]
    return bool(seen[0]) and all(other == seen[0] for other in seen[1:])
