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


def loss_and_metrics(
    model: keras.Model, soft_labels: bool, from_logits: bool, task: str, focal: float
) -> tuple[keras.losses.Loss, list[Any]]:
    """What a model is compiled with.

    Args:
        model: Which gets compiled.
        soft_labels: Labels are vectors, not numbers.
        from_logits: The model gives logits.
        task: What its outputs say.
        focal: Gamma of the focal loss of Lin et al. 2017 (arXiv:1708.02002), which needs labels
            that are vectors; 0 for the cross-entropy.
    """
    losses, given = keras.losses, {"from_logits": from_logits}
    if task == "single-label":
        if focal:  # alpha of all classes alike, so that gamma 0 is the cross-entropy
            loss = losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=focal, **given)
        elif soft_labels:
            loss = losses.CategoricalCrossentropy(**given)
        else:
            loss = losses.SparseCategoricalCrossentropy(**given)
        return loss, ["accuracy"]
    loss = losses.BinaryCrossentropy(**given)
    if focal:
        loss = losses.BinaryFocalCrossentropy(gamma=focal, **given)
    several = [AveragePrecision(model.output_shape[-1])] if task == "multi-label" else []
    return loss, [LabelAccuracy(), *several]


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
        """What Keras saves of it."""
        return {"name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable("keras_resnet")
class AveragePrecision(keras.metrics.AUC):
    """The mean over classes of the area under precision and recall of logits, at 1,000 thresholds.

    Args:
        num_labels: Number of classes.
        name: In the history.
        dtype: Of its numbers.
    """

    def __init__(self, num_labels: int, name: str = "average_precision", dtype: Any = None):
        super().__init__(
            curve="PR",
            multi_label=True,
            num_labels=num_labels,
            num_thresholds=1000,
            name=name,
            dtype=dtype,
        )

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts a batch."""
        # Thresholds are spaced evenly. Rank alone counts, and a rare label's probabilities, all
        # near 0, would fall below the first: this spreads them.
        spread = (1 + ops.softsign(ops.cast(y_pred, "float32") / 4)) / 2
        super().update_state(ops.cast(_yes(y_true), "float32"), spread, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """What Keras saves of it."""
        return {"num_labels": self.num_labels, "name": self.name, "dtype": self.dtype}
