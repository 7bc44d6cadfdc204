"""What can be said of an argument before Keras is imported, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_resnet.cli.parser import Command
from keras_resnet.cli.pipes import STDOUT
from keras_resnet.data.items import Source
from keras_resnet.data.opening import as_asked as images, check_training
from keras_resnet.data.sources import Images
from keras_resnet.data.walk import is_picture
from keras_resnet.recipes import Recipe
from keras_resnet.runtimes.rows import FORMATS, format_of_file, require_runtime
from keras_resnet.system.errors import (
    InputError,
    MissingDependencyError,
    NotFoundError,
    meant_path,
    one_of,
    require,
)
from keras_resnet.system.files import check_apart, check_writable, check_writable_folder
from keras_resnet.variants import SPECS, get_spec
from keras_resnet.weights.keras_files import find_keras_file, run_models
from keras_resnet.weights.published import hub_name, is_tag, named_variant, resolve_weights


def existing(path: str | os.PathLike) -> None:
    """There is a file or folder."""
    if not Path(path).expanduser().exists():
        raise NotFoundError(f"{os.fspath(path)!r} does not exist.{meant_path(path)}")


def source_first(command: str, arguments: dict[str, Any]) -> None:
    """What `convert` reads is there, and not what it shall write."""
    source, target = arguments["source"], arguments["target"]
    if os.path.exists(target) and not os.path.exists(source):
        raise InputError(f"The source comes first: keras-resnet {command} {target} {source}")
    check_apart(target, [source])


def one_after_the_other(command: str, arguments: dict[str, Any]) -> None:
    """Folds are trained in one process."""
    devices = arguments["devices"]
    if arguments["folds"] and (devices not in (None, "1") or arguments["max_restarts"]):
        raise InputError(
            "--folds trains one model after the other on one device: leave out --devices and "
            f"--max-restarts. Received: --folds {arguments['folds']} --devices {devices or 1}."
        )


def apart(command: Command, arguments: dict[str, Any]) -> None:
    """No option would write over a file that the command reads, or an image in such a folder."""
    read: list[str] = []
    for argument in command.arguments:
        value = arguments[argument.dest]
        if not argument.name.startswith("-") and value is not None:
            read += value if isinstance(value, list) else [value]
    for name in ("output", "csv", "json", "plot", "sheet", "exclude_list"):
        target = arguments.get(name)
        if not isinstance(target, str):
            continue
        check_apart(target, read)
        if os.path.isdir(target):
            for result in ("evaluation.json", "predictions.csv", "confusion_matrix.png"):
                check_apart(os.path.join(target, result), read)
        for folder in map(Path, filter(os.path.isdir, read)):
            file = Path(target).resolve()
            if file.is_file() and is_picture(file.name) and folder.resolve() in file.parents:
                raise InputError(f"{target!r} is an image in {str(folder)!r}: give another name.")


def existing_file(path: str | os.PathLike) -> None:
    """There is a file."""
    existing(path)
    if os.path.isdir(os.path.expanduser(path)):
        raise InputError(f"{os.fspath(path)!r} is a folder; a file is needed.")


def written(*endings: str, pipe: bool = False) -> Callable[[str], None]:
    """A check of a file that shall be written: it can be, and its name says a kind that there is.

    Without endings any does; `pipe` means that `-` is the standard output.
    """

    def check(path: str) -> None:
        if pipe and path == STDOUT:
            return
        if endings and not os.path.isdir(path) and Path(path).suffix.lower() not in endings:
            kinds = f"{', '.join(endings[:-1])} or {endings[-1]}" if endings[1:] else endings[0]
            raise InputError(f"The output's name must end in {kinds}. Received: {path!r}.")
        if not endings and os.path.exists(path) and (is_picture(path) or is_model(path)):
            raise InputError(f"{path!r} is there, and is an image or a model: give another name.")
        check_writable(path)

    return check


def cache(place: str) -> None:
    """Decoded images can be kept there."""
    if place != "ram":
        check_writable_folder(place)


def logger(name: str) -> None:
    """Its package is installed, or torch's writer of the same files."""
    package = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
    one_of("log", name, package)
    try:
        require(package[name], name, f"Logging to {name}")
    except MissingDependencyError:
        if name != "tensorboard":  # torch may have its own writer: training finds out
            raise


def port(number: int) -> None:
    """A server can listen there."""
    if not 0 <= number < 65536:
        raise InputError(f"The port must be from 0 to 65535. Received: {number}.")


def is_model(path: str) -> bool:
    """Whether a path is a model's by its name, or a run folder."""
    found = Path(path).expanduser()
    named = found.suffix == ".keras" or (found.exists() and format_of_file(found) is not None)
    return named or bool(run_models(found))


def keras_model(path: str) -> None:
    """It is a `.keras` file, a run folder, or the name of a variant with published weights."""
    if named_variant(path) is None:
        find_keras_file(path)


def model(path: str) -> None:
    """It is that, or an exported file."""
    found = Path(path).expanduser()
    kind = format_of_file(found) if found.exists() else None
    if kind is None:
        keras_model(path)


def runtime(path: str, engine: str) -> None:
    """What runs the model is installed."""
    kind = format_of_file(Path(path).expanduser())
    for name, row in FORMATS.items():
        if engine == row.module or (kind == name and engine in ("keras", "auto")):
            require_runtime(name)


def weight_file(path: str) -> None:
    """It is a `.keras` file, or some other file."""
    (find_keras_file if path.endswith(".keras") else existing_file)(path)


def model_first(command: str, arguments: dict[str, Any]) -> None:
    """The model is not among the words behind it."""
    words: list[str] = []
    for name in ("model", "directory", "paths", "source"):
        value = arguments.get(name, [])
        words += [value] if isinstance(value, str) else value
    if is_model(words[0]) or words[0] in SPECS or not os.path.exists(words[0]):
        return
    found = [word for word in words[1:] if is_model(word) and os.path.exists(word)]
    if found:
        others = [word for word in words if word != found[0]]
        raise InputError(
            f"The model comes first: keras-resnet {command} {' '.join([found[0], *others])}"
        )


def pictures(paths: list[str], columns: str | None) -> Images:
    """Images to classify, with what was said of their tables."""
    unused = "label", "split", "weight"
    if columns is None:
        return Images(paths)
    return Images([images(one, columns, None, unused) for one in paths])


def training(
    directory: str, recipe: Recipe, columns: str | None = None, label_regex: str | None = None
) -> str | Source:
    """There are images to train on, and the weights that training starts from can be had."""
    if is_model(directory) or directory in SPECS:
        raise InputError(
            f"{directory!r} is a model; a folder of images is needed: "
            "keras-resnet train DIR --model NAME."
        )
    source = images(directory, columns, label_regex)
    check_training(source)
    weights = recipe.weights
    if weights in (None, "auto"):
        pass
    elif os.path.isdir(weights) or weights.endswith(".keras"):
        find_keras_file(weights)
    elif not os.path.exists(weights):
        if hub_name(weights):
            require("huggingface_hub", "hub", f"weights={weights!r}")
        elif is_tag(weights):
            resolve_weights(get_spec(recipe.model).name, weights)
        else:
            existing(weights)
    return source
