"""The learning-rate range test: one sweep over the rates, and which of them to train with."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet import plots
from keras_resnet.errors import InputError, between, whole
from keras_resnet.models.files import dataset_output
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.training.freeze import freeze
from keras_resnet.training.prepare import (
    build_model,
    compile_model,
    make_optimizer,
    prepare_data,
    readable_batch,
)

# A loss so many times the lowest has left for good (fastai's rule).
_DIVERGED = 4.0


@dataclasses.dataclass(frozen=True)
class LrFinderResult:
    """What `lr_find` saw; `print` it.

    Attributes:
        rates: The learning rate of every step, rising by a constant factor.
        losses: The loss of the batch before each step, nats.
        smoothed: Their bias-corrected moving average.
        suggestion: The rate where the smoothed loss falls fastest per decade; `None` where it
            never falls.
        diverged: Whether the sweep ended because the loss left.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    diverged: bool

    def __str__(self) -> str:
        lowest = int(np.argmin(self.smoothed))
        lines = [
            f"{len(self.rates)} steps from {self.rates[0]:.1e} to {self.rates[-1]:.1e}"
            f"{', where the loss diverged' if self.diverged else ''}.",
            f"Lowest loss: {self.smoothed[lowest]:.4f} at {self.rates[lowest]:.1e}.",
        ]
        if self.suggestion is None:
            lines.append("The loss never fell: no suggestion. Try other rates, or more steps.")
        else:
            lines.append(f"Suggested learning rate, at the steepest descent: {self.suggestion:.1e}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> Path:
        """Draws the losses over the rates."""
        return plots.learning_rates(self.rates, self.losses, self.smoothed, self.suggestion, path)


def smooth(losses: np.ndarray, beta: float = 0.98) -> np.ndarray:
    """The exponential moving average of losses, corrected for its start at nothing.

    Examples:
        >>> smooth(np.array([1.0, 1.0, 1.0])).round(6).tolist()
        [1.0, 1.0, 1.0]
    """
    average, out = 0.0, []
    for i, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        out.append(average / (1 - beta**i))
    return np.asarray(out)


def suggest(rates: np.ndarray, smoothed: np.ndarray) -> float | None:
    """The rate at which the loss falls fastest per decade, before its minimum.

    Examples:
        >>> rates = np.logspace(-5, 0, 51)
        >>> losses = 1 / (1 + (rates / 1e-2) ** 2)  # steepest, over log(rate), at 1e-2
        >>> round(suggest(rates, losses), 6)
        0.01
    """
    lowest = int(np.argmin(smoothed))
    if lowest < 2:
        return None
    # Over all of them: cut at the minimum first, its own slope would be one-sided, and never flat.
    slopes = np.gradient(smoothed, np.log10(rates))[: lowest + 1]
    steepest = int(np.argmin(slopes))
    return float(rates[steepest]) if slopes[steepest] < 0 else None


def lr_find(
    directory: str | os.PathLike,
    *,
    recipe: str | Recipe = "finetune",
    model: str | keras.Model | None = None,
    start: float = 1e-6,
    stop: float = 10.0,
    steps: int = 100,
    beta: float = 0.9,
    seed: int = 0,
    workers: int | None = None,
    exclude: Any = None,
    **options: Any,
) -> LrFinderResult:
    """Trains for a few steps at rising learning rates, and says which rate is a good one.

    Smith 2017 (arXiv:1506.01186, section 3.3), with the rates rising exponentially: each step is
    one batch of the recipe's training images at a rate that is a constant factor higher than the
    last. It stops where the smoothed loss is four times its lowest, or no number.

    Args:
        directory: Class folders, or `train/` with class folders in it.
        recipe: A row of `RECIPES`, or its name: model, optimizer, images, batch size.
        model: A variant's name in place of the recipe's; or a model, with a class an output, whose
            weights are put back afterwards.
        start: First rate.
        stop: Last rate.
        steps: Batches.
        beta: Of the moving average: 0 smooths nothing.
        seed: Of the order, the augmentation and the first weights.
        workers: Threads that read images.
        exclude: Images to leave out.
        **options: Fields of `Recipe` to change.

    Returns:
        The `LrFinderResult`.

    Raises:
        InputError: An option that cannot work.
        DataError: Images that cannot be used.
        NotFoundError: The directory does not exist.
    """
    if not 0 < start < stop or not math.isfinite(stop):
        raise InputError(f"The rates go from a low to a high one. Received: {start:g}, {stop:g}.")
    whole("steps", steps, 3)
    between("beta", beta, 0, 1, ends="[)")
    if isinstance(model, str):
        options["model"], model = model, None
    recipe = (recipe if isinstance(recipe, Recipe) else get_recipe(recipe)).with_options(**options)
    if recipe.accumulate > 1:
        raise InputError("Gradients are not accumulated in the sweep: pass accumulate=1.")
    data = prepare_data(directory, recipe, seed=seed, workers=workers, exclude=exclude)
    keras.utils.set_random_seed(seed)
    if model is None:
        model = build_model(recipe, data, say=lambda line: None)
        freeze(model, recipe.unfreeze, freeze_norms=recipe.freeze_norms)
    elif model.output_shape[-1] != len(data.names):
        raise InputError(
            f"The model has {model.output_shape[-1]} outputs, the folder {len(data.names)} classes."
        )
    data.train.output = dataset_output(model)
    # A second model over the same layers: the first one stays compiled as it is.
    sweep = keras.Model(model.input, model.output)
    rates = np.geomspace(start, stop, steps)
    optimizer = make_optimizer(recipe, float(rates[0]), head=model.layers[-1].name)
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    try:
        compile_model(sweep, optimizer, data.soft_labels)
        losses, smoothed = _sweep(sweep, data.train, rates, beta)
    finally:
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
    tried = rates[: len(losses)]
    suggestion = suggest(tried, smoothed)
    return LrFinderResult(tried, losses, smoothed, suggestion, diverged=len(losses) < steps)


def _sweep(model, dataset, rates, beta) -> tuple[np.ndarray, np.ndarray]:
    """Losses, raw and smoothed, up to where they leave."""
    losses: list[float] = []
    lowest = math.inf
    for rate, (images, labels) in zip(rates, _batches(dataset), strict=False):
        model.optimizer.learning_rate = float(rate)
        model.reset_metrics()  # the loss of this batch alone
        loss = float(model.train_on_batch(images, labels, return_dict=True)["loss"])
        if not math.isfinite(loss):
            break
        losses.append(loss)
        now = smooth(np.asarray(losses), beta)[-1]
        if now > _DIVERGED * lowest:
            break
        lowest = min(lowest, now)
    if not losses:
        raise InputError(f"The loss is no number at the first rate already ({rates[0]:g}).")
    values = np.asarray(losses)
    return values, smooth(values, beta)


def _batches(dataset):
    for epoch in itertools.count():
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            yield readable_batch(dataset, index)
