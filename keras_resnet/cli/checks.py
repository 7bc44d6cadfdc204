"""What can be said of an argument before Keras is imported, which takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from keras_resnet.data.folders import existing_folder
from keras_resnet.errors import InputError, NotFoundError, did_you_mean
from keras_resnet.recipes import Recipe
from keras_resnet.runtimes.rows import format_of_file
from keras_resnet.variants import get_spec
from keras_resnet.weights.keras_files import find_keras_file
from keras_resnet.weights.published import is_tag, resolve_weights


def existing(path: str | os.PathLike) -> None:
    """There is a file or folder."""
    found = Path(path).expanduser()
    if not found.exists():
        near = os.listdir(found.parent) if found.parent.is_dir() else []
        raise NotFoundError(f"{str(found)!r} does not exist.{did_you_mean(found.name, near)}")


def parent(path: str) -> None:
    """The folder in which something shall be written is there."""
    existing(Path(path).expanduser().parent)


def output_file(path: str) -> None:
    """A file can be written there."""
    parent(path)
    if os.path.isdir(path):
        raise InputError(f"The output {path!r} is a folder; a file's name is needed.")


def output_folder(path: str) -> None:
    """It is a folder, or can become one."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"The output {path!r} is a file; a folder is needed.")


def ends_in(option: str, path: str | None, *endings: str) -> None:
    """A file's name says a kind that can be written."""
    if path is not None and Path(path).suffix.lower() not in endings:
        raise InputError(f"--{option} wants a name that ends in {endings[0]}, not {path!r}.")


def model(path: str) -> None:
    """It is a `.keras` file, a run folder, or an exported file."""
    found = Path(path).expanduser()
    if not found.exists() or format_of_file(found) is None:
        find_keras_file(path)


def weight_file(path: str) -> None:
    """It is a `.keras` file, or some other file."""
    (find_keras_file if path.endswith(".keras") else existing)(path)


def training(directory: str, recipe: Recipe) -> None:
    """There is a folder to train on, and the weights that training starts from can be had."""
    existing_folder(directory)
    weights = recipe.weights
    if weights is not None and not os.path.exists(weights):
        if is_tag(weights):
            resolve_weights(get_spec(recipe.model).name, weights)
        else:
            existing(weights)
