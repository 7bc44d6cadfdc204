"""What `batch_size="auto"` comes to: the largest power of two whose training step fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from keras_resnet.recipes import RECIPES, Recipe
from keras_resnet.system.device import devices, in_data_format, release_memory
from keras_resnet.system.errors import no_memory, whole
from keras_resnet.system.process import free_memory, give_back_memory, peak_memory
from keras_resnet.training.freeze import freeze
from keras_resnet.training.prepare import Data, compile_model, make_optimizer, new_model

_LARGEST = 1024
_STEPS = 16  # of an epoch at least: few large steps learn little
_SAMPLE = 4  # images of the one step that is tried on a CPU


def settle_batch_size(
    recipe: Recipe, data: Data, known: int | None = None, processes: int = 1
) -> Recipe:
    """The recipe with a number for `batch_size="auto"`, which the datasets get as well.

    A run that goes on has begun with the one that is `known`; without one it is tried. Each of the
    processes has a part of a batch, and a device unless it is a CPU. The notes get a line.
    """
    if recipe.batch_size != "auto":
        return recipe
    row, count = RECIPES.get(recipe.name), data.train.num_samples
    own = int((row or Recipe).batch_size)
    if devices()[0] == "cpu":
        processes = 1  # their memory is one
        most, why = min(own, count), f"on a CPU the recipe's {own} at most"
    else:
        most = min(max(own, min(_LARGEST, count // _STEPS)), count)
        why = f"of {count:,} images a larger one leaves fewer than {_STEPS} steps an epoch"
        why = f"{_LARGEST} at most" if most == _LARGEST else why
    if known is not None:
        size, why = whole("batch_size in config.json", known, 1), "as the run began"
    else:
        size = processes * largest_batch(_trial(recipe, data), most // processes)
        release_memory()  # of the model that was tried
        if 2 * size <= most:
            why = "the largest power of two that fits into memory with an eighth to spare"
            if processes > 1:
                why = f"{size // processes} on each of {processes} devices, {why}"
    for part in filter(None, (data.train, data.val, data.test)):
        part.batch_size = size
    rate = f"the learning rate stays {recipe.learning_rate:g}"
    if row is not None and row.learning_rate == recipe.learning_rate:
        rate += f", the recipe's for {own}"
    data.notes.append(f"Batch size: {size} ({why}); {rate}")
    return dataclasses.replace(recipe, batch_size=size)


def largest_batch(step: Callable[[int], None], most: int) -> int:
    """The largest power of two up to `most` that leaves memory for an eighth more images.

    Raises:
        Exception: What a step raises for two images, or for another reason than memory.
    """
    size = 1
    while 2 * size <= most:
        try:
            step(2 * size + max(1, size // 4))
        except Exception as error:
            if size == 1 or not no_memory(error):
                raise
            break
        size *= 2
    return size


def _trial(recipe: Recipe, data: Data) -> Callable[[int], None]:
    """A training step of the recipe, with a model of its own.

    A CPU's memory is not tried but reckoned from a small step: the system ends a process that
    takes more than there is, without an error.
    """
    model, side = new_model(recipe, data), data.train_size
    freeze(model, None if recipe.gradual else recipe.unfreeze, freeze_norms=recipe.freeze_norms)
    optimizer = make_optimizer(recipe, recipe.learning_rate)
    compile_model(model, optimizer, **data.objective)
    label = (model.output_shape[-1],) if data.objective["soft_labels"] else ()

    def step(count: int) -> None:
        images = in_data_format(np.zeros((count, side, side, recipe.channels), np.uint8))
        model.train_on_batch(images, np.zeros((count, *label), "float32" if label else "int64"))

    if devices()[0] != "cpu":
        return step
    give_back_memory()
    free, before = free_memory(), peak_memory(anew=True)
    step(_SAMPLE)
    each = (peak_memory() - before) / _SAMPLE

    def reckon(count: int) -> None:
        if each * count > free:
            raise MemoryError(f"{each:,.0f} bytes an image, and {free:,.0f} are left")

    return reckon
