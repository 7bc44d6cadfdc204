"""What a recipe's augmentation does, to look at before it is trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet import plots
from keras_resnet.data.folders import Stream, generator
from keras_resnet.data.items import Source
from keras_resnet.data.reading import decode
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.system.errors import InputError, whole
from keras_resnet.training.prepare import prepare_data


def augment_sheet(
    directory: str | os.PathLike | Source,
    path: str | os.PathLike,
    *,
    recipe: str | Recipe = "finetune",
    images: int = 6,
    versions: int = 7,
    seed: int = 0,
    exclude: Any = None,
    **options: Any,
) -> Path:
    """Draws training images, a row each: as they are evaluated, and as the first epochs see them.

    A run with the same seed trains on just these (but with `sampler="balanced"` or `repeats`, where
    copies of an image are changed apart). What is done to whole batches, mixup and cutmix, is not
    shown; a run's `batch.png` has it.

    Args:
        directory: What is trained on, as `train` takes it.
        path: The image to write.
        recipe: A row of `RECIPES`, or its name.
        images: Rows, of all the classes in turn.
        versions: Epochs.
        seed: Of the augmentation.
        exclude: Images to leave out.
        **options: Fields of `Recipe` to change.

    Raises:
        InputError: An option that cannot work, or a recipe that changes nothing.
        DataError: Images that cannot be used.
        NotFoundError: The directory does not exist.
    """
    whole("images", images, 1)
    whole("versions", versions, 1)
    recipe = get_recipe(recipe).with_options(**options)
    data = prepare_data(directory, recipe, seed=seed, exclude=exclude, look=False).train
    augment, preprocess = data.augment, data.preprocess
    if augment is None:
        raise InputError(f"The recipe {recipe.name!r} changes no image: there is nothing to draw.")
    value = augment.erasing and augment.erasing.value_in(preprocess, "uint8")
    shown, titles = [], []
    for index in np.linspace(0, data.num_samples - 1, min(images, data.num_samples)).astype(int):
        source = data.file_paths[index]
        pixels = decode(source, exif=preprocess.exif, color_mode=preprocess.color_mode)
        shown.append(preprocess.pixels(source))
        titles.append(os.path.basename(str(source)))
        for epoch in range(versions):
            rng = generator(seed, Stream.IMAGE, epoch, int(index), 0)
            changed = augment(pixels, rng)
            if augment.erasing:
                where = augment.erasing.sample(*changed.shape[:2], rng)
                changed = augment.erasing.apply(changed, where, value)
            shown.append(changed)
            titles.append(f"epoch {epoch + 1}")
    return plots.picture_grid(shown, titles, path, columns=versions + 1)
