"""How far a classifier's confidence can be believed, and how sure its accuracy is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_resnet.system.errors import InputError, between, whole

if TYPE_CHECKING:  # reports are read without Keras, which takes seconds to import
    from keras_resnet.models.meaning import Meaning

UNKNOWN = "unknown"  # the answer where a model is not sure enough
_TEMPERATURES = 0.05, 20.0  # between which one is looked for


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
    return Calibration(
        edges,
        counts,
        mean,
        right,
        float((gaps * counts[counts > 0]).sum() / counts.sum()),
        float(gaps.max()),
    )


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
    images, or that all images have, keeps 0.5.

    Args:
        probabilities: `(n, classes)`.
        hits: The classes of each image, bool `(n, classes)`.

    Examples:
        >>> best_thresholds(np.array([[0.1], [0.2], [0.3], [0.4]]), np.array([[0], [0], [1], [1]]))
        [0.25]
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

    Images of equal confidence come together.

    Args:
        confidence: The probability that the model gave to its answer, `(n,)`.
        correct: Whether the answer was right, `(n,)`.

    Returns:
        The fractions of images answered, from few to all, the accuracy on them, and the lowest
        confidence among them.

    Examples:
        >>> coverage, accuracy, least = coverage_curve([0.6, 0.9, 0.8], [False, True, True])
        >>> accuracy.round(3).tolist()
        [1.0, 1.0, 0.667]
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
    """The 95% interval of a fraction, by Wilson's score (1927): it holds for small counts as well.

    Examples:
        >>> [round(x, 3) for x in accuracy_interval(85, 153)]
        [0.476, 0.632]
    """
    from scipy.stats import binomtest  # half a second

    found = binomtest(right, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def paired_p_value(only_first: int, only_second: int) -> float:
    """How likely two equal models differ as much on the same images: McNemar's exact test.

    Of the images that one of them alone gets right; the two-sided p-value.

    Examples:
        >>> round(paired_p_value(12, 4), 4)
        0.0768
    """
    from scipy.stats import binomtest

    count = only_first + only_second
    return float(binomtest(only_first, count).pvalue) if count else 1.0
