"""`train`, `lr-find` and `demo`."""

from __future__ import annotations

import functools
from typing import Any

import keras_resnet as kr
from keras_resnet.cli import checks
from keras_resnet.cli.parser import RECIPE_FIELDS
from keras_resnet.cli.pipes import say_backend
from keras_resnet.data.cifar import not_here
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.system.errors import between


def _recipe(name: str, options: dict[str, Any]) -> Recipe:
    """The recipe with the options that were given; several numbers become a tuple in them too."""
    given = {field: options[field] for field in RECIPE_FIELDS if field in options}
    options |= {field: tuple(value) for field, value in given.items() if isinstance(value, list)}
    return get_recipe(name).with_options(**{field: options[field] for field in given})


def train(
    directory: str, recipe: str, show: bool, columns: str | None, label_regex: str | None,
    config: str | None, folds: int | None, **options: Any,
) -> int:  # fmt: skip
    """Fits a model; 130 where it was interrupted."""
    changed = _recipe(recipe, options)
    if show:
        print(changed)
        return 0
    images: Any = directory
    if not (options["dry_run"] and not_here(directory)):
        images = checks.training(directory, changed, columns, label_regex)
    fit = kr.train if folds is None else functools.partial(kr.cross_validate, folds=folds)
    return 130 if fit(images, recipe=recipe, **options).interrupted else 0


def lr_find(
    directory: str, recipe: str, plot: str, columns: str | None, label_regex: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Draws the loss over the learning rate."""
    images = checks.training(directory, _recipe(recipe, options), columns, label_regex)
    between("stop", options["stop"], options["start"], ends="(]")
    say_backend()
    result = kr.lr_find(images, recipe=recipe, **options)
    print(f"{result}\nWritten: {result.plot(plot)}")


def augment(
    directory: str, recipe: str, sheet: str, columns: str | None, label_regex: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Draws images as a recipe changes them."""
    images = checks.training(directory, _recipe(recipe, options), columns, label_regex)
    print(f"Written: {kr.augment_sheet(images, sheet, recipe=recipe, **options)}")


def demo(output: str, epochs: int | None) -> int:
    """Trains, evaluates and predicts on data that needs no network; 130 where interrupted."""
    from keras_resnet.cli.demo import run_demo

    return 130 if run_demo(output, epochs=epochs).interrupted else 0
