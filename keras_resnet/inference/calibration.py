"""How far a classifier's confidence can be believed, and how sure its accuracy is."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from keras_resnet.system.errors import InputError, whole


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


def accuracy_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a fraction, by Wilson's score (1927): it holds for small counts as well.

    Args:
        right: Predictions that were right.
        count: All predictions, at least one.

    Examples:
        >>> [round(x, 3) for x in accuracy_interval(85, 153)]
        [0.476, 0.632]
    """
    z = 1.959963984540054  # the normal distribution's 97.5% point
    fraction, scale = right / count, 1 + z * z / count
    middle = (fraction + z * z / (2 * count)) / scale
    half = z * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_p_value(only_first: int, only_second: int) -> float:
    """How likely two equal models differ as much on the same images: McNemar's exact test.

    Args:
        only_first: Images that the first alone gets right.
        only_second: Images that the second alone gets right.

    Returns:
        The two-sided p-value, in 0..1.

    Examples:
        >>> round(paired_p_value(12, 4), 4)
        0.0768
    """
    count, few = only_first + only_second, min(only_first, only_second)
    if count == 0:
        return 1.0
    log_half = count * math.log(0.5)
    choose = math.lgamma(count + 1)
    tail = sum(
        math.exp(choose - math.lgamma(k + 1) - math.lgamma(count - k + 1) + log_half)
        for k in range(few + 1)
    )
    return min(1.0, 2 * tail)
