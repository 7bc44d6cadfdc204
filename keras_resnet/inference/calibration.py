"""What is measured of a classifier: how right it is, how sure that is, and how sure it may be."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_resnet.system.errors import InputError, between, whole
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

if TYPE_CHECKING:  # reports are read without Keras, which takes seconds to import
    from keras_resnet.models.meaning import Meaning

UNKNOWN = "unknown"  # the answer where a model is not sure enough
_TEMPERATURES = 0.05, 20.0  # between which one is looked for
_ROWS, _WORST = 30, 10  # classes in a table; of more than that, so many of the worst


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """The result of `evaluate`; `print` it for the table.

    Attributes:
        loss: Mean cross-entropy, nats; of a multi-label model the mean binary one.
        top1: Fraction of images whose predicted class is the true one; of a multi-label model that
            of the images all of whose labels are right.
        top5: Fraction whose true class is among the five most probable; `None` for five classes or
            fewer, where it says nothing.
        count: Images evaluated.
        class_names: Names in the order of the model's outputs.
        per_class: A dict a class that occurs: `name`, `precision`, `recall`, `f1`, `count`; where
            `scores` are, also `average_precision`, `auc` and `threshold`.
        confusion: Counts, `(classes, classes)`, rows are true classes; `None` of several labels.
        rows: A dict an image: `path`, `true`, `predicted`, `probability` (of the predicted
            class), `true_probability`. Several labels have `|` between, none is `|`, and their
            probability is that of all yes and no together, the classes taken as independent.
        skipped: `(path, reason)` of images that could not be read.
        task: What the model says: `"single-label"`, `"binary"` or `"multi-label"`.
        scores: Of the two latter scikit-learn's `average_precision`, `auc` and `f1`: the means
            over the classes that occur, `micro_f1` and each label's `calibration_error`; and of a
            binary model those of its second class.
    """

    loss: float
    top1: float
    top5: float | None
    count: int
    class_names: list[str]
    per_class: list[dict[str, Any]]
    confusion: np.ndarray | None
    rows: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    task: str = "single-label"
    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def headline(self) -> tuple[str, float]:
        """What the task is measured by first, and the number."""
        if self.task == "multi-label":
            return "mean average precision", self.scores["average_precision"]
        return "top-1", self.top1

    @property
    def calibration_error(self) -> float:
        """How far probabilities are from how often answers, or each label, are right."""
        if "calibration_error" in self.scores:
            return self.scores["calibration_error"]
        return calibration(
            np.clip([row["probability"] for row in self.rows], 0, 1), self.right
        ).error

    @property
    def right(self) -> list[bool]:
        """Whether each of `rows` is predicted right."""
        return [row["true"] == row["predicted"] for row in self.rows]

    def _measures(self) -> str:
        word, value = self.headline
        parts = [f"{word} {value:.2%}"]
        parts += [] if self.top5 is None else [f"top-5 {self.top5:.2%}"]
        if self.task == "multi-label":
            parts += [f"F1 {self.scores['f1']:.3f}", f"all labels right {self.top1:.2%}"]
        elif self.scores:
            parts += [f"AUC {self.scores['auc']:.3f}", f"F1 {self.scores['f1']:.3f}"]
        return ", ".join([*parts, f"loss {self.loss:.4f}"])

    def _shown(self):
        skipped = f", {len(self.skipped):,} unreadable" if self.skipped else ""
        numbers = ("precision", "recall", "f1")
        rows = [
            [row["name"], *(f"{row[name]:.3f}" for name in numbers), f"{row['count']:,}"]
            for row in self.per_class
        ]
        line = f"{self.count:,} images, {self._measures()}{skipped}"
        return line, ("Class", "Precision", "Recall", "F1", "Count"), rows

    def __str__(self) -> str:
        lines = [f"{self.count:,} images: {self._measures()}", ""]
        shown = self.per_class
        if len(shown) > _ROWS:
            shown = sorted(shown, key=lambda row: row["f1"])[:_WORST]
        width = max([5, *(text_width(shortened(row["name"], 40)) for row in shown)])
        more = "  Av. precision     AUC  Threshold" if self.scores else ""
        lines.append(f"{'Class':{width}}  Precision  Recall      F1   Count{more}")
        lines += [
            f"{column(row['name'], width)}  {row['precision']:9.3f}  {row['recall']:6.3f}"
            f"  {row['f1']:6.3f}  {row['count']:6d}"
            + (f"  {row['average_precision']:13.3f}  {row['auc']:6.3f}  {row['threshold']:9.3f}"
               if more else "")
            for row in shown
        ]  # fmt: skip
        if len(shown) < len(self.per_class):
            lines.append(
                f"These {len(shown)} of {len(self.per_class):,} classes have the lowest F1; "
                "`per_class` and evaluation.json have all."
            )
            if self.confusion is not None:
                from keras_resnet.plots import frequent_mistakes  # matplotlib takes a second

                lines += ["", "The most frequent mistakes:"]
                lines += [
                    f"  {shortened(true, 40)} taken for {shortened(taken, 40)}: {n:,} ({part:.0%})"
                    for true, taken, n, part in frequent_mistakes(
                        self.confusion, self.class_names, 5
                    )
                ]
        if self.skipped:
            lines += ["", f"Skipped {len(self.skipped)} unreadable images:"]
            lines += [f"  {printable(reason)}" for _, reason in self.skipped[:10]]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single images, JSON-able."""
        names = "loss", "top1", "top5", "count", "class_names", "per_class", "confusion", "skipped"
        found = {name: getattr(self, name) for name in names}
        found["confusion"] = None if self.confusion is None else self.confusion.tolist()
        found["skipped"] = [list(item) for item in self.skipped]
        return found | ({"task": self.task, "scores": self.scores} if self.scores else {})

    def to_csv(self) -> str:
        """A line an image: path, true and predicted class, their probabilities."""
        numbers = ("probability", "true_probability")
        lines = [csv_line(["path", "true", "predicted", *numbers])]
        for row in self.rows:
            cells = [plain_path(row["path"]), row["true"], row["predicted"]]
            lines.append(csv_line([*cells, *(f"{row[name]:.6f}" for name in numbers)]))
        return "".join(lines)

    def save(self, folder: str | os.PathLike, prefix: str = "") -> None:
        """Writes `evaluation.json`, `predictions.csv` and `confusion_matrix.png` to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{prefix}evaluation.json", self.to_dict())
        write_text(folder / f"{prefix}predictions.csv", self.to_csv())
        figure = folder / f"{prefix}confusion_matrix.png"
        if self.confusion is not None:
            from keras_resnet.plots import confusion_matrix

            confusion_matrix(self.confusion, self.class_names, figure)
        else:
            figure.unlink(missing_ok=True)  # of what was measured here before


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in bins of equal width.

    Attributes:
        edges: `(bins + 1)` from 0 to 1; a bin holds what is above its lower edge, up to and with
            its upper one.
        counts: Predictions in each bin.
        confidence: Their mean confidence; NaN in an empty bin.
        accuracy: Fraction of them that is right; NaN in an empty bin.
        error: The expected calibration error: the mean gap between the two, weighted by count.
        largest: The largest gap of a bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float
    largest: float

    @property
    def bias(self) -> float:
        """Mean confidence less accuracy of all predictions: above 0 the model is overconfident."""
        filled = self.counts > 0
        gaps = self.confidence[filled] - self.accuracy[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())


def calibration(confidence, correct, bins: int = 15) -> Calibration:
    """Compares how sure a model was with how often it was right.

    The expected calibration error of Guo et al. 2017 (arXiv:1706.04599, equation 3), with their 15
    bins. Of few predictions it is not zero even where the model is perfectly calibrated.

    Args:
        confidence: The probability that the model gave to its prediction, `(n,)` in 0..1.
        correct: Whether the prediction was right, `(n,)`.
        bins: Number of bins.

    Raises:
        InputError: No predictions, lengths that differ, or values outside 0..1.

    Examples:
        >>> result = calibration([0.9, 0.9, 0.6, 0.6], [True, False, True, True], bins=10)
        >>> round(result.error, 3), round(result.bias, 3)
        (0.4, 0.0)
    """
    confidence = np.asarray(confidence, np.float64)
    correct = np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not confidence.size:
        raise InputError(
            "calibration takes two lists of equal length, not empty. Received shapes: "
            f"{confidence.shape} and {correct.shape}."
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise InputError("A confidence is a probability, from 0 to 1.")
    whole("bins", bins, 1)
    edges = np.linspace(0, 1, bins + 1)
    index = np.searchsorted(edges[1:-1], confidence)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, confidence, bins) / counts
        right = np.bincount(index, correct, bins) / counts
    gaps = np.abs(mean - right)[counts > 0]
    error = float((gaps * counts[counts > 0]).sum() / counts.sum())
    return Calibration(edges, counts, mean, right, error, float(gaps.max()))


def best_temperature(meaning: Meaning, logs: np.ndarray, hits: np.ndarray) -> float | None:
    """The temperature that makes answers as sure as they are right, by the lowest loss.

    Temperature scaling of Guo et al. 2017 (arXiv:1706.04599, section 4.2).

    Args:
        meaning: What the outputs say, at temperature 1.
        logs: Its log-probabilities, `(n, classes)`.
        hits: The classes of each image, bool `(n, classes)`.

    Returns:
        The temperature; `None` where none is best, as of answers that are all right.

    Examples:
        >>> from keras_resnet.models.meaning import Meaning
        >>> hits = np.eye(2, dtype=bool)[[0, 0, 0, 1]]
        >>> logs = np.log(np.full((4, 2), [0.9, 0.1]))  # as sure as 9 of 10, and right in 3 of 4
        >>> round(best_temperature(Meaning(), logs, hits), 3)
        2.0
    """
    from scipy.optimize import minimize_scalar  # a third of a second

    if (meaning.answers(logs) == hits).all():  # the surer, the better
        return None

    def loss(log_temperature: float) -> float:
        scaled = dataclasses.replace(meaning, temperature=math.exp(log_temperature))
        return float(scaled.losses(scaled.cooled(logs), hits).mean())

    low, high = map(math.log, _TEMPERATURES)
    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
    return math.exp(found) if low + 0.01 < found < high - 0.01 else None


def best_thresholds(probabilities: np.ndarray, hits: np.ndarray) -> list[float]:
    """The probability of each class from which on saying it gives the highest F1.

    It lies in the middle between two images, or is 0.5 where that is as good. A class without
    images, or that all images have, keeps 0.5. `hits` are the classes of each image, bool, of the
    same shape `(n, classes)`.
    """
    from sklearn.metrics import precision_recall_curve

    found = []
    for p, true in zip(probabilities.T, hits.T, strict=True):
        if not 0 < true.sum() < len(true):
            found.append(0.5)
            continue
        precision, recall, edges = precision_recall_curve(true, p)
        both = precision[:-1] + recall[:-1]
        f1 = 2 * precision[:-1] * recall[:-1] / np.where(both > 0, both, 1)
        highest = edges[np.flatnonzero(f1 >= f1.max() - 1e-12)]
        edge = highest[np.abs(highest - 0.5).argmin()]
        below = p[p < edge].max(initial=0.0)
        found.append(0.5 if below < 0.5 <= edge else float(below + edge) / 2)
    return found


def coverage_curve(confidence, correct) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How right a model is on the images that it is surest of.

    By the probability of each answer and whether it was right, `(n,)` both. Images of equal
    confidence come together.

    Returns:
        The fractions of images answered, from few to all, the accuracy on them, and the lowest
        confidence among them.
    """
    order = np.argsort(-np.asarray(confidence, np.float64), kind="stable")
    sure, right = np.asarray(confidence)[order], np.cumsum(np.asarray(correct)[order])
    last = np.append(sure[1:] != sure[:-1], True)  # of those that are equally sure
    count = np.arange(1, len(order) + 1)[last]
    return count / len(order), right[last] / count, sure[last]


def gives_answers(meaning: Meaning, min_confidence: float = 0.0) -> bool:
    """Whether the most probable class is not all that a model answers."""
    sure = between("min_confidence", min_confidence, 0, 1) > 0
    return sure or meaning.task == "multi-label" or bool(meaning.thresholds)


def answer_of(
    meaning: Meaning, logs: np.ndarray, names: Sequence[str], min_confidence: float = 0.0
) -> list[str] | None:
    """What `Prediction.answer` is of an image.

    Args:
        meaning: What the outputs say.
        logs: Natural logarithms of the image's probabilities, `(classes,)`.
        names: Of all the classes.
        min_confidence: The lowest probability of an answer: of several labels that of all of
            them, said or not, together.

    Examples:
        >>> from keras_resnet.models.meaning import Meaning
        >>> answer_of(Meaning("multi-label"), np.log([0.9, 0.2, 0.7]), ["ant", "bee", "fly"])
        ['ant', 'fly']
        >>> answer_of(Meaning(), np.log([0.6, 0.4]), ["ant", "bee"], 0.8)
        ['unknown']
    """
    if not gives_answers(meaning, min_confidence):
        return None
    [said] = meaning.answers(logs[None])
    if np.exp(meaning.log_confidence(logs[None], said[None])[0]) < min_confidence:
        return [UNKNOWN]
    return [names[k] for k in np.flatnonzero(said)]


def accuracy_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a fraction by Wilson's score (1927), for small counts as well."""
    from scipy.stats import binomtest  # half a second

    found = binomtest(right, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def paired_p_value(only_first: int, only_second: int) -> float:
    """How likely two equal models differ as much on the same images: McNemar's exact test.

    Of the images that one of them alone gets right; the two-sided p-value.
    """
    from scipy.stats import binomtest

    count = only_first + only_second
    return float(binomtest(only_first, count).pvalue) if count else 1.0
