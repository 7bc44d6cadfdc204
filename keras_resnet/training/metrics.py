"""What training goes by: the loss, and the measures beside it."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

# The column of the history that the best epoch is best by, and its short name. Where few of many
# labels are true, no to all is accurate.
SCORES = {
    "single-label": ("accuracy", "acc"),
    "binary": ("accuracy", "acc"),
    "multi-label": ("average_precision", "ap"),
}


def _yes(labels: Any) -> Any:
    return ops.greater(labels, 0.5)  # what is mixed or smoothed counts as what it is nearest to


def _agreement(y_true: Any, y_pred: Any) -> Any:
    right = ops.equal(_yes(y_true), ops.greater(y_pred, 0))
    return ops.mean(ops.cast(right, "float32"), axis=-1)


@keras.saving.register_keras_serializable("keras_resnet")
class LabelAccuracy(keras.metrics.MeanMetricWrapper):
    """The fraction of labels whose logit is on the right side of 0."""

    def __init__(self, name: str = "accuracy", dtype: Any = None):
        super().__init__(_agreement, name=name, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable("keras_resnet")
class AveragePrecision(keras.metrics.AUC):
    """The mean over classes of the area under precision and recall of logits, 1,000 thresholds."""

    def __init__(self, num_labels: int, name: str = "average_precision", dtype: Any = None):
        several = {"multi_label": True, "num_labels": num_labels}
        super().__init__(curve="PR", num_thresholds=1000, name=name, dtype=dtype, **several)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        # Thresholds are spaced evenly. Rank alone counts, and a rare label's probabilities, all
        # near 0, would fall below the first: this spreads them.
        spread = (1 + ops.softsign(ops.cast(y_pred, "float32") / 4)) / 2
        super().update_state(ops.cast(_yes(y_true), "float32"), spread, sample_weight)

    def get_config(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels, "name": self.name, "dtype": self.dtype}
