"""File formats that other runtimes read: what is written, by whom, and what goes along.

Keras' own `model.export` writes each of them. What is added here: one input called `images` with a
free batch, one output, and beside the graph everything that `predict` needs, as JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from typing import Any

import keras

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models.meaning import meaning_of, pixels_of
from keras_resnet.runtimes.rows import get_format
from keras_resnet.system import files
from keras_resnet.system.device import image_shape, package_version
from keras_resnet.system.errors import InputError, require

# The name under which a file keeps what is known about its model.
METADATA = "keras_resnet"
METADATA_FILE = f"{METADATA}.json"
INPUT = "images"
# What the input holds, in words that files of 0.1 have too.
HOLDS = {
    "0..255": "pixel values 0 to 255",
    "0..1": "pixel values 0 to 1",
    "normalized": "normalised pixels",
}


def check_backend(name: str) -> None:
    """Says before any work that a format cannot be written here.

    Raises:
        InputError: The backend cannot write it; the message names one that can.
        MissingDependencyError: A package is missing; the message has the pip line.
    """
    row, backend = get_format(name), keras.backend.backend()
    if backend not in row.needs:
        able = list(row.needs)
        installed = [one for one in able if importlib.util.find_spec(one)]
        hint = f"pip install 'keras3-resnet[{able[0]}]' and set KERAS_BACKEND={able[0]}"
        if installed:
            hint = f"set KERAS_BACKEND={installed[0]} for this command"
        raise InputError(
            f"Keras on {backend} cannot write {name}; on {' or '.join(able)} it can: {hint}. "
            "A .keras file goes from one backend to the other as it is."
        )
    for package, extra in row.needs[backend].items():
        require(package, extra, f"Writing {name} on {backend}")


# --- what goes along -----------------------------------------------------------------------------


def input_size(model: keras.Model) -> tuple[int, int, int]:
    """`(height, width, channels)` of the images that a file of the model takes.

    Where the model leaves a size free the file has that of its preprocessing: traced graphs hold
    sizes in places, and a file is proven at one.

    Raises:
        InputError: Neither says a size.
    """
    first = keras.config.image_data_format() == "channels_first"
    shape = model.input_shape[1:]
    height, width, channels = (*shape[1:], shape[0]) if first else shape
    if height is None or width is None:
        config = getattr(model, "info", {}).get("preprocess")
        given = Preprocess.from_config(config).output_shape if config else (224, 224)
        if None in given:
            raise InputError(
                f"Neither the model {model.name!r} nor its preprocessing has a size; a file needs "
                "one: give model.info['preprocess'] a crop_size."
            )
        height, width = height or given[0], width or given[1]
    return height, width, channels


def describe(model: keras.Model, batch_size: int | None = None) -> dict[str, Any]:
    """What a file says about its model, JSON-able."""
    first = keras.config.image_data_format() == "channels_first"
    info = getattr(model, "info", {})
    pixels = pixels_held(model)
    try:
        meaning = meaning_of(model)
        word = "probabilities" if meaning.activated else "logits"
        output = {"output": word, "task": meaning.task}
    except InputError:  # feature maps, or numbers of another kind
        output = {"output": "outputs"}
    steps = ["decode to RGB"]
    if info.get("preprocess"):
        steps = _steps(Preprocess.from_config(info["preprocess"]), pixels)
    return {
        "name": model.name,
        "written_by": f"keras3-resnet {package_version()}, Keras {keras.__version__} on "
        f"{keras.backend.backend()}",
        "input": {
            "name": INPUT,
            "shape": [batch_size, *image_shape(*input_size(model))],
            "layout": "NCHW" if first else "NHWC",
            "dtype": "float32",
            "holds": HOLDS[pixels],
        },
        **output,
        "steps_before_the_model": steps,
        "info": info,
    }


def pixels_held(model: keras.Model) -> str:
    """As `pixels_of`; where that is unclear, which export need not mind, `"normalized"`."""
    try:
        return pixels_of(model)
    except InputError:
        return "normalized"


def _steps(preprocess: Preprocess, pixels: str) -> list[str]:
    """What is to be done to an image before the model gets it, in words."""
    mode = preprocess.color_mode
    steps = [f"decode to {mode if isinstance(mode, str) else f'{mode} channels'}"]
    if preprocess.exif:
        steps.append("turn as EXIF says")
    size, how = preprocess.resize_size, f"({preprocess.interpolation}, antialias)"
    if isinstance(size, tuple):
        how += ", the largest centred window of that shape" * preprocess.crop_to_aspect_ratio
        how += " in proportion, centred on black" * preprocess.pad_to_aspect_ratio
        steps.append(f"resize to {size[0]}x{size[1]} {how}")
    elif size is not None:
        long = f"the long one to int({size} * long / short)"
        steps.append(f"resize the short side to {size}, {long} {how}")
    if preprocess.crop_size is not None:
        steps.append("centre crop to {}x{}".format(*preprocess.crop_size))
    if pixels == "0..255":
        steps.append("leave pixel values 0 to 255: the model normalises them")
    elif pixels == "0..1":
        steps.append("pixels / 255")
    else:
        steps.append(f"(pixels / 255 - mean) / std, mean {preprocess.mean}, std {preprocess.std}")
    return steps


def to_json(description: dict[str, Any]) -> str:
    """The description as ASCII text, so that no name in it can break a file's syntax."""
    return files.to_json(description, ensure_ascii=True, default=str)


def from_json(text: str | None, path: str | os.PathLike) -> dict[str, Any]:
    """What `to_json` wrote; empty for a file that somebody else made.

    Raises:
        InputError: There is something, but not that.
    """
    if not text:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"What {str(path)!r} says about its model is no JSON object.")
    return found
