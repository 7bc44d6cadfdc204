"""What a run folder says of itself, read as far as it is there: for reports of any run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keras_resnet.errors import InputError, NotFoundError, did_you_mean
from keras_resnet.inference.calibration import Calibration, accuracy_interval, calibration

# A folder with one of these is a run's, or what `evaluate --output` wrote.
_MARKS = ("config.json", "history.csv", "evaluation.json", "test_evaluation.json", "best.keras")
PARTS = {"test": "test_", "validation": ""}  # the part, and the prefix of its files


@dataclasses.dataclass
class Answers:
    """What a model answered about one part of the data.

    Attributes:
        part: `"validation"` or `"test"`.
        count: Pictures.
        top1: Share that is right.
        top5: Share whose true class is among the five most probable, or `None`.
        loss: Mean cross-entropy, nats, or `None`.
        class_names: In the order of `confusion`.
        per_class: As of `Evaluation`.
        confusion: Counts `(classes, classes)`, rows are true classes, or `None`.
        rows: A dict a picture: `path`, `true`, `predicted`, `probability`, `true_probability`.
        skipped: `(path, reason)`.
    """

    part: str
    count: int
    top1: float
    top5: float | None
    loss: float | None
    class_names: list[str]
    per_class: list[dict[str, Any]]
    confusion: np.ndarray | None
    rows: list[dict[str, Any]]
    skipped: list[tuple[str, str]]

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
    def macro_f1(self) -> float | None:
        """The mean F1 of the classes that occur."""
        scores = [row["f1"] for row in self.per_class if row["count"]]
        return sum(scores) / len(scores) if scores else None

    @property
    def calibration(self) -> Calibration | None:
        """Confidence against accuracy."""
        if not self.rows:
            return None
        return calibration(
            np.clip([row["probability"] for row in self.rows], 0, 1),
            [row["true"] == row["predicted"] for row in self.rows],
        )

    def confusions(self, limit: int = 8) -> list[tuple[str, str, int, float]]:
        """The most frequent mistakes: true class, predicted class, count, share of the class."""
        if self.confusion is None:
            return []
        totals = self.confusion.sum(axis=1)
        wrong = self.confusion * (1 - np.eye(len(self.confusion), dtype=int))
        order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
        pairs = [np.unravel_index(i, wrong.shape) for i in order]
        return [
            (self.class_names[i], self.class_names[j], int(wrong[i, j]), wrong[i, j] / totals[i])
            for i, j in pairs
            if wrong[i, j]
        ]

    def confident_mistakes(self, limit: int) -> list[dict[str, Any]]:
        """Wrong answers, the surest first."""
        wrong = [row for row in self.rows if row["true"] != row["predicted"]]
        return sorted(wrong, key=lambda row: -row["probability"])[:limit]

    def least_certain(self, limit: int, but: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Answers of any kind, the least sure first, without some paths."""
        but = set(but)
        rows = [row for row in self.rows if row["path"] not in but]
        return sorted(rows, key=lambda row: row["probability"])[:limit]


@dataclasses.dataclass
class RunFacts:
    """What is known of one run; whatever is not there is empty or `None`.

    Attributes:
        folder: Where it is.
        config: What `config.json` holds.
        info: What the best model says of itself: `ImageModel.info`.
        history: Columns of `history.csv`.
        answers: By part, `"test"` before `"validation"`.
        skipped: `(path, reason)` of pictures that could not be read.
        files: Name and bytes of the model files.
        missing: Sentences on what a finished run would have and this one lacks.
        begun: The first time in `train.log`, or where `config.json` says it.
        ended: The last time.
    """

    folder: Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    answers: dict[str, Answers] = dataclasses.field(default_factory=dict)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    begun: datetime | None = None
    ended: datetime | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def status(self) -> str:
        """`finished`, `interrupted`, `running`, or `unknown`."""
        status = self.config.get("status")
        return status if isinstance(status, str) else "unknown"

    @property
    def main(self) -> Answers | None:
        """The answers that count: of the test pictures where there are any."""
        return next(iter(self.answers.values()), None)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's fields as they were used."""
        return _dict(self.config.get("recipe"))

    @property
    def model(self) -> dict[str, Any]:
        """What `config.json` says of the model: `parameters`, `weights` and so on."""
        return _dict(self.config.get("model"))

    @property
    def variant(self) -> str | None:
        """The model's name in the table."""
        for known in (self.model, self.info):
            if isinstance(known.get("variant"), str):
                return known["variant"]
        return self.recipe.get("model")

    @property
    def class_counts(self) -> dict[str, dict[str, int]]:
        """Pictures of each class, by part."""
        counts = {}
        for part, given in _dict(self.config.get("class_counts")).items():
            kept = {str(k): v for k, v in _dict(given).items() if isinstance(v, int)}
            if kept:
                counts[{"train": "training", "val": "validation"}.get(part, part)] = kept
        test = self.answers.get("test")
        if test is not None:
            counts["test"] = {row["name"]: row["count"] for row in test.per_class}
        if "validation" not in counts and "validation" in self.answers:
            rows = self.answers["validation"].per_class
            counts["validation"] = {row["name"]: row["count"] for row in rows}
        return counts

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the model's outputs, as far as anything says them."""
        for answers in self.answers.values():
            if answers.class_names:
                return answers.class_names
        names = self.info.get("class_names")
        if isinstance(names, list):
            return [str(n) for n in names]
        return list(next(iter(self.class_counts.values()), {}))

    @property
    def epochs(self) -> int:
        """Epochs that were run."""
        return max((len(v) for v in self.history.values()), default=0)

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best validation accuracy, from 1."""
        values = np.asarray(self.history.get("val_accuracy", ()), float)
        return int(np.nanargmax(values)) + 1 if np.isfinite(values).any() else None

    @property
    def seconds(self) -> float | None:
        """Time of all epochs."""
        values = [v for v in self.history.get("seconds", ()) if math.isfinite(v)]
        return sum(values) if values else None

    def picture(self, path: str) -> str | None:
        """Where a picture of the answers is now, or `None`.

        Paths are written as training was called with them, maybe from another working directory.
        """
        if os.path.isfile(path):
            return path
        directory = self.config.get("directory")
        if isinstance(directory, str):
            parts = Path(path).parts
            for i in range(1, len(parts)):
                candidate = os.path.join(directory, *parts[i:])
                if os.path.isfile(candidate):
                    return candidate
        return None

    def picture_sizes(self, limit: int = 2000) -> dict[str, tuple[int, int, int]] | None:
        """Smallest, median and largest width and height of the evaluated pictures, as stored.

        Only the headers are read.
        """
        if self.main is None:
            return None
        sizes = []
        for row in self.main.rows[:limit]:
            path = self.picture(row["path"])
            if path is None:
                continue
            # Pillow raises many kinds, and unreadable pictures are no news here.
            with contextlib.suppress(Exception), Image.open(path) as picture:
                sizes.append(picture.size)
        if not sizes:
            return None
        found = {}
        for name, values in zip(("width", "height"), zip(*sizes, strict=True), strict=True):
            found[name] = (min(values), int(np.median(values)), max(values))
        return {**found, "count": (len(sizes),) * 3}


def read_run(folder: str | os.PathLike) -> RunFacts:
    """Reads a run folder; what is missing or damaged is left out and said in `missing`.

    Args:
        folder: As `train` writes it, finished or not; or as `evaluate --output` does.

    Raises:
        NotFoundError: There is no such folder; a near name is suggested.
        InputError: It is a file, or no run folder.
    """
    folder = Path(folder).expanduser()
    _check(folder)
    facts = RunFacts(folder)
    facts.config = _dict(_json(folder / "config.json", facts.missing))
    facts.info = _model_info(folder)
    facts.history = _history(folder / "history.csv", facts.missing)
    for part, prefix in PARTS.items():
        answers = _answers(folder, part, prefix, facts.missing)
        if answers is not None:
            facts.answers[part] = answers
    if not facts.answers:
        facts.missing.append("no evaluation: no evaluation.json")
    facts.skipped = _pairs(folder / "skipped.csv")
    facts.files = {
        p.name: p.stat().st_size for p in sorted(folder.glob("*.keras")) if p.name[0] != "."
    }
    if not facts.files:
        facts.missing.append("no model file: neither best.keras nor last.keras")
    facts.begun, facts.ended = _times(folder / "train.log")
    facts.begun = _time(facts.config.get("begun")) or facts.begun
    facts.ended = _time(facts.config.get("ended")) or facts.ended
    return facts


def _check(folder: Path) -> None:
    if not folder.exists():
        near = os.listdir(folder.parent) if folder.parent.is_dir() else []
        raise NotFoundError(f"No run folder at {str(folder)!r}.{did_you_mean(folder.name, near)}")
    if not folder.is_dir():
        inside = any((folder.parent / name).exists() for name in _MARKS)
        hint = f" Its folder is one: {str(folder.parent)!r}." if inside else ""
        raise InputError(f"{str(folder)!r} is a file; a run folder is needed.{hint}")
    if not any((folder / name).exists() for name in _MARKS):
        below = sorted(
            p for p in folder.iterdir() if p.is_dir() and any((p / n).exists() for n in _MARKS)
        )
        hint = " It has none of: " + ", ".join(_MARKS) + "."
        if below:
            listed = ", ".join(repr(str(p)) for p in below[:6])
            hint = f" There are run folders in it: {listed}{' ...' if len(below) > 6 else ''}."
        raise InputError(f"{str(folder)!r} is no run folder.{hint}")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(path: Path, missing: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError:
        if path.name == "config.json":
            missing.append("no config.json: how it was trained is not known")
    except (OSError, ValueError):
        missing.append(f"{path.name} cannot be read")
    return None


def _model_info(folder: Path) -> dict[str, Any]:
    """`ImageModel.info` out of the model file, without loading the model."""
    for name in ("best.keras", "last.keras"):
        try:
            with zipfile.ZipFile(folder / name) as file:
                found = json.loads(file.read("config.json"))
            return _dict(_dict(_dict(found).get("config")).get("info"))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            continue
    return {}


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _history(path: Path, missing: list[str]) -> dict[str, list[float]]:
    try:
        rows = _table(path)
    except FileNotFoundError:
        missing.append("no history.csv: not one epoch is through")
        return {}
    except (OSError, csv.Error):
        missing.append("history.csv cannot be read")
        return {}
    names = [name for name in (rows[0] if rows else ()) if name and name != "epoch"]
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _answers(folder: Path, part: str, prefix: str, missing: list[str]) -> Answers | None:
    found = _dict(_json(folder / f"{prefix}evaluation.json", missing))
    count, top1 = found.get("count"), found.get("top1")
    if not isinstance(count, int) or count < 1 or not isinstance(top1, float | int):
        return None
    names = [str(name) for name in found.get("class_names") or ()]
    per_class = [
        {
            "name": str(row["name"]),
            "count": int(row.get("count") or 0),
            **{k: _number(row.get(k)) for k in ("precision", "recall", "f1")},
        }
        for row in found.get("per_class") or ()
        if isinstance(row, dict) and "name" in row
    ]
    try:
        confusion = np.asarray(found.get("confusion"), int)
    except (TypeError, ValueError):
        confusion = np.zeros(0, int)
    try:
        rows = [
            {**row, **{k: _number(row[k]) for k in ("probability", "true_probability")}}
            for row in _table(folder / f"{prefix}predictions.csv")
        ]
        rows = [row for row in rows if math.isfinite(row["probability"])]
    except (OSError, KeyError, csv.Error):
        missing.append(f"no {prefix}predictions.csv: single pictures and confidence are left out")
        rows = []
    top5, loss = _number(found.get("top5")), _number(found.get("loss"))
    return Answers(
        part,
        count,
        float(top1),
        top5 if math.isfinite(top5) else None,
        None if math.isnan(loss) else loss,
        names,
        per_class,
        confusion if names and confusion.shape == (len(names),) * 2 else None,
        rows,
        [tuple(map(str, pair)) for pair in found.get("skipped") or () if len(pair) == 2],
    )


def _pairs(path: Path) -> list[tuple[str, str]]:
    try:
        return [(row["path"], row["reason"]) for row in _table(path)]
    except (OSError, KeyError, csv.Error):
        return []


def _time(text: Any) -> datetime | None:
    """A time of `config.json`, as the clock on the wall showed it."""
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(text).replace(tzinfo=None)
    return None


def _times(path: Path) -> tuple[datetime | None, datetime | None]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None
    found = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ", text, re.MULTILINE)
    if not found:
        return None, None
    try:
        return tuple(datetime.fromisoformat(found[i]) for i in (0, -1))
    except ValueError:
        return None, None


def same_pictures(runs: Sequence[RunFacts], part: str) -> bool:
    """Whether all runs were evaluated on the same pictures, by class folder and name."""
    seen = [{tuple(Path(row["path"]).parts[-2:]) for row in run.answers[part].rows} for run in runs]
    return bool(seen[0]) and all(other == seen[0] for other in seen[1:])
