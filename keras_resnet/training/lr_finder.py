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
from keras_resnet.data.items import Source
from keras_resnet.models.files import model_input
from keras_resnet.models.image_model import as_functional
from keras_resnet.models.meaning import meaning_of
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.system.errors import InputError, between, whole
from keras_resnet.system.replicas import undistributed
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
# Standard deviations of the smoothed loss: one of 25 flat curves of 100 steps falls further.
_CHANCE = 4.0


@dataclasses.dataclass(frozen=True)
class LrFinderResult:
    """What `lr_find` saw; `print` it.

    Attributes:
        rates: The learning rate of every step, rising by a constant factor.
        losses: The loss of the batch before each step, nats.
        smoothed: Their bias-corrected moving average.
        suggestion: The rate in the longest valley of the smoothed loss, as fastai finds it;
            `None` where it never falls, or by no more than chance.
        diverged: Whether the sweep ended because the loss left.
        noise: Whether the loss falls by no more than it would by chance.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    diverged: bool
    noise: bool = False

    def __str__(self) -> str:
        lowest = int(np.argmin(self.smoothed))
        lines = [
            f"{len(self.rates)} steps from {self.rates[0]:.1e} to {self.rates[-1]:.1e}"
            f"{', where the loss diverged' if self.diverged else ''}.",
            f"Lowest loss: {self.smoothed[lowest]:.4f} at {self.rates[lowest]:.1e}.",
        ]
        if self.noise:
            lines.append(
                "The curve is noise: the loss falls by no more than it varies from batch to batch, "
                "so no suggestion. Try more steps, larger batches, or higher rates."
            )
        elif self.suggestion is None:
            lines.append("The loss never fell: no suggestion. Try other rates, or more steps.")
        else:
            lines.append(f"Suggested learning rate, in the longest valley: {self.suggestion:.1e}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> Path:
        """Draws the losses over the rates."""
        return plots.learning_rates(
            self.rates, self.losses, self.smoothed, self.suggestion, path, noise=self.noise
        )


def smooth(losses: np.ndarray, beta: float = 0.98) -> np.ndarray:
    """The exponential moving average of losses, corrected for its start at nothing."""
    average, out = 0.0, []
    for i, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        out.append(average / (1 - beta**i))
    return np.asarray(out)


def valley(losses: np.ndarray) -> tuple[int, int, int] | None:
    """The longest valley of a curve: where it begins and ends, and the place to train at.

    fastai's rule (`fastai.callback.schedule.valley`, 2.8): the longest strictly falling
    subsequence, and in it the middle of its second third.

    Returns:
        Three indices; `None` where the losses never fall.
    """
    length = np.ones(len(losses), int)  # of the longest such subsequence that ends there
    for i in range(1, len(losses)):
        length[i] = 1 + max(length[:i][losses[:i] > losses[i]], default=0)
    end = int(length.argmax())
    if length[end] == 1:
        return None
    start = end - int(length[end])  # as fastai has it: one before its first, where it has no gaps
    third = (end - start) / 3
    return max(0, start), end, max(0, start + int(third) + int(third / 2))


def suggest(rates: np.ndarray, smoothed: np.ndarray, steps: int | None = None) -> float | None:
    """The rate in the longest valley of the smoothed loss; see `valley`.

    Of the steps planned (where the sweep ended early) the first tenth and the last five are left
    out, as in fastai, where enough are left.
    """
    part = _looked_at(len(smoothed), steps)
    found = valley(smoothed[part])
    return None if found is None else float(rates[part][found[2]])


def _looked_at(count: int, steps: int | None) -> slice:
    cut = slice((steps or count) // 10, count - 5)
    return cut if cut.stop - cut.start >= 3 else slice(0, count)


def is_noise(losses: np.ndarray, smoothed: np.ndarray, beta: float, steps: int) -> bool:
    """Whether the loss falls by no more than the smoothed loss of a flat curve would by chance.

    How much losses vary is taken from the differences of neighbours, in which a slow fall has no
    part; smoothing leaves the fraction sqrt((1 - beta) / (1 + beta)) of it.
    """
    part = _looked_at(len(smoothed), steps)
    found = valley(smoothed[part])
    if found is None:
        return False
    start, end, _ = found
    fall = smoothed[part][start : end + 1].max() - smoothed[part][end]
    until = part.start + end + 1  # behind the valley losses vary for another reason
    steps_between = np.abs(np.diff(losses[:until]))
    deviation = 1.4826 * np.median(steps_between) / math.sqrt(2)
    return bool(fall < _CHANCE * deviation * math.sqrt((1 - beta) / (1 + beta)))


@undistributed()
def lr_find(
    directory: str | os.PathLike | Source,
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
    recipe = get_recipe(recipe).with_options(**options)
    if recipe.accumulate > 1:
        raise InputError("Gradients are not accumulated in the sweep: pass accumulate=1.")
    if recipe.batch_size == "auto":
        raise InputError(
            "The sweep needs the batch size that you train with, a number: train --dry-run says "
            "what 'auto' comes to."
        )
    data = prepare_data(directory, recipe, seed=seed, workers=workers, exclude=exclude)
    keras.utils.set_random_seed(seed)
    if model is None:
        model = build_model(recipe, data, say=lambda line: None)
        freeze(model, recipe.unfreeze, freeze_norms=recipe.freeze_norms)
    model = as_functional(model)
    meaning, count = meaning_of(model), model.output_shape[-1]
    if meaning.num_classes(count) != len(data.names):
        raise InputError(f"The model has {count} outputs, the folder {len(data.names)} classes.")
    if meaning.task != data.task:
        raise InputError(f"The sweep is for {data.task} models. Received: a {meaning.task} one.")
    data.train.preprocess, data.train.output = model_input(model, data.train.preprocess)
    # A second model over the same layers: the first one stays compiled as it is.
    sweep = keras.Model(model.input, model.output)
    rates = np.geomspace(start, stop, steps)
    optimizer = make_optimizer(recipe, float(rates[0]), head=model.layers[-1].name)
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    try:
        compile_model(sweep, optimizer, from_logits=not meaning.activated, **data.objective)
        losses, smoothed = _sweep(sweep, data.train, rates, beta)
    finally:
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
    tried = rates[: len(losses)]
    noise = is_noise(losses, smoothed, beta, steps)
    suggestion = None if noise else suggest(tried, smoothed, steps)
    return LrFinderResult(tried, losses, smoothed, suggestion, len(losses) < steps, noise)


def _sweep(model, dataset, rates, beta) -> tuple[np.ndarray, np.ndarray]:
    """Losses, raw and smoothed, up to where they leave."""
    losses: list[float] = []
    lowest = math.inf
    for rate, batch in zip(rates, _batches(dataset), strict=False):
        model.optimizer.learning_rate = float(rate)
        model.reset_metrics()  # the loss of this batch alone
        loss = float(model.train_on_batch(*batch, return_dict=True)["loss"])
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
