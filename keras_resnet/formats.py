"""File formats that other runtimes read: what is written, by whom, and what goes along.

Keras' own `model.export` writes each of them. What is added here: one input called `images` with a
free batch, one output, and beside the graph everything that `predict` needs, as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.backends import package_version
from keras_resnet.errors import InputError, MissingDependencyError, did_you_mean, reason_of
from keras_resnet.layers import Conv2D
from keras_resnet.model import ImageModel
from keras_resnet.preprocess import Preprocess

# The name under which a file keeps what is known about its model.
METADATA = "keras_resnet"
METADATA_FILE = f"{METADATA}.json"
INPUT = "images"


@dataclasses.dataclass(frozen=True)
class Format:
    """A row of `FORMATS`.

    Attributes:
        name: What users call it.
        keras_name: What `keras.Model.export` calls it.
        suffix: Of its files; `""` for a folder.
        needs: By backend that can write it, the packages (import name to extra) that takes.
        runtime: What runs it.
    """

    name: str
    keras_name: str
    suffix: str
    needs: dict[str, dict[str, str]]
    runtime: str


# Left out, with Keras 3.15: on jax, OpenVINO (its converter knows no XlaCallModule, which jax2tf
# writes) and ONNX (by jax2onnx, with 50 packages more); on torch, SavedModel (by torch_xla, and
# Keras' call of torch.export fails) and LiteRT (by litert-torch, for one batch size alone).
FORMATS = {
    row.name: row
    for row in (
        Format(
            "onnx",
            "onnx",
            ".onnx",
            {
                "torch": {"onnx": "onnx"},
                "tensorflow": {"onnx": "onnx", "tf2onnx": "onnx"},
            },
            "onnxruntime",
        ),
        Format(
            "openvino",
            "openvino",
            ".xml",
            {"torch": {"openvino": "openvino"}, "tensorflow": {"openvino": "openvino"}},
            "openvino",
        ),
        Format(
            "saved_model",
            "tf_saved_model",
            "",
            {"tensorflow": {}, "jax": {"tensorflow": "tensorflow"}},
            "tensorflow",
        ),
        Format("litert", "litert", ".tflite", {"tensorflow": {}}, "litert"),
        Format("torch", "torch", ".pt2", {"torch": {}}, "torch"),
    )
}


def get_format(name: str) -> Format:
    """A row of `FORMATS` by its name.

    Raises:
        InputError: There is none of that name.

    Examples:
        >>> get_format("onxx")
        Traceback (most recent call last):
        ...
        keras_resnet.errors.InputError: Unknown format 'onxx'. Did you mean 'onnx'?
    """
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS) or f" There are: {', '.join(FORMATS)}."
        raise InputError(f"Unknown format {name!r}.{hint}")
    return FORMATS[name]


def format_of_file(path: str | os.PathLike) -> str | None:
    """The format of an exported file or folder, by its suffix; `None` for anything else.

    Examples:
        >>> format_of_file("model.onnx"), format_of_file("model.keras")
        ('onnx', None)
    """
    path = Path(path)
    if path.is_dir():
        return "saved_model" if (path / "saved_model.pb").is_file() else None
    return next((row.name for row in FORMATS.values() if row.suffix == path.suffix != ""), None)


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
        hint = (
            f"set KERAS_BACKEND={installed[0]} for this command"
            if installed
            else f"pip install 'keras3-resnet[{able[0]}]' and set KERAS_BACKEND={able[0]}"
        )
        raise InputError(
            f"Keras on {backend} cannot write {name}; on {' or '.join(able)} it can: {hint}. "
            "A .keras file goes from one backend to the other as it is."
        )
    for module, extra in row.needs[backend].items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(
                f"Writing {name} on {backend} needs the package {module!r}: "
                f'pip install "keras3-resnet[{extra}]".'
            )


# --- what goes along -----------------------------------------------------------------------------


def picture_size(model: keras.Model) -> tuple[int, int, int]:
    """`(height, width, channels)` of the pictures that a file of the model takes.

    Where the model leaves a size free the file has that of its preprocessing: traced graphs hold
    sizes in places, and a file is proven at one.

    Raises:
        InputError: Neither says a size.
    """
    height, width, channels = _nhwc(tuple(model.input_shape[1:]))
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


def _nhwc(shape: tuple) -> tuple:
    last = keras.config.image_data_format() == "channels_last"
    return shape if last else (*shape[1:], shape[0])


def describe(model: keras.Model, batch_size: int | None = None) -> dict[str, Any]:
    """What a file says about its model, JSON-able.

    Args:
        model: With one input and one output.
        batch_size: Of the file's input, where it is fixed.
    """
    height, width, channels = picture_size(model)
    info = getattr(model, "info", {})
    last = keras.config.image_data_format() == "channels_last"
    inside = info.get("options", {}).get("include_preprocessing")
    steps = ["decode to RGB"]
    if info.get("preprocess"):
        steps = _steps(Preprocess.from_config(info["preprocess"]), bool(inside))
    return {
        "name": model.name,
        "written_by": f"keras3-resnet {package_version()}, Keras {keras.__version__} on "
        f"{keras.backend.backend()}",
        "input": {
            "name": INPUT,
            "shape": [
                batch_size,
                *((height, width, channels) if last else (channels, height, width)),
            ],
            "layout": "NHWC" if last else "NCHW",
            "dtype": "float32",
            "holds": "pixel values 0 to 255" if inside else "normalised pixels",
        },
        "output": "probabilities" if ends_in_softmax(model) else "logits",
        "steps_before_the_model": steps,
        "info": info,
    }


def _steps(preprocess: Preprocess, inside: bool) -> list[str]:
    """What is to be done to a picture before the model gets it, in words."""
    steps = [f"decode to {preprocess.color_mode}"]
    if preprocess.exif:
        steps.append("turn as EXIF says")
    size = preprocess.resize_size
    if isinstance(size, tuple):
        crop = (
            ", the largest centred window of that shape" if preprocess.crop_to_aspect_ratio else ""
        )
        steps.append(f"resize to {size[0]}x{size[1]} ({preprocess.interpolation}, antialias){crop}")
    elif size is not None:
        steps.append(
            f"resize the short side to {size}, the long one to int({size} * long / short) "
            f"({preprocess.interpolation}, antialias)"
        )
    if preprocess.crop_size is not None:
        steps.append("centre crop to {}x{}".format(*preprocess.crop_size))
    if inside:
        steps.append("leave pixel values 0 to 255: the model normalises them")
    else:
        steps.append(f"(pixels / 255 - mean) / std, mean {preprocess.mean}, std {preprocess.std}")
    return steps


def to_json(description: dict[str, Any]) -> str:
    """The description as ASCII text, so that no name in it can break a file's syntax."""
    return json.dumps(description, ensure_ascii=True, default=str)


def from_json(text: str | None, path: str | os.PathLike) -> dict[str, Any]:
    """What `to_json` wrote; empty for a file that somebody else made.

    Raises:
        InputError: There is something, but not that.
    """
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"What {str(path)!r} says about its model is no JSON object.")
    return found


def ends_in_softmax(model: keras.Model) -> bool:
    """Whether a model gives probabilities already."""
    activation = getattr(model.layers[-1], "activation", None)
    return activation is not None and activation is keras.activations.softmax


# --- writing -------------------------------------------------------------------------------------


def write(
    model: keras.Model, path: str | os.PathLike, name: str, batch_size: int | None = None
) -> dict[str, Any]:
    """Writes a model in a format, unchecked; `export` is what users call.

    Args:
        model: With one input and one output.
        path: With the format's suffix. Nothing is there yet.
        name: Of the format.
        batch_size: A fixed one; any by default.

    Returns:
        The description that went along.

    Raises:
        InputError: A model that cannot be written, or a backend that cannot.
        MissingDependencyError: A package is missing.
    """
    check_backend(name)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise InputError(
            f"A model with one input and one output can be exported; {model.name!r} has "
            f"{len(model.inputs)} and {len(model.outputs)}."
        )
    description = describe(model, batch_size)
    model = in_float32(model)
    if name == "onnx" and keras.backend.backend() == "tensorflow":
        model = _without_xla(model)
    # Keras takes another exporter of ONNX for fixed sizes; the batch is fixed afterwards.
    batch = None if name == "onnx" else batch_size
    signature = keras.InputSpec(shape=(batch, *description["input"]["shape"][1:]), dtype="float32")
    signature.name = INPUT
    options: dict[str, Any] = {}
    if name == "torch" and batch is None:
        import torch

        options["dynamic_shapes"] = {0: torch.export.Dim("batch", min=1)}
    try:
        with _quiet():
            model.export(
                os.fspath(path),
                format=FORMATS[name].keras_name,
                verbose=False,
                input_signature=[signature],
                **options,
            )
            _FINISH[name](Path(path), description)
    except OSError:  # a full disk, say
        raise
    except Exception as error:  # of converters, each with kinds of its own
        raise InputError(
            f"Keras on {keras.backend.backend()} could not write {model.name!r} as {name}: "
            f"{reason_of(error)}"
        ) from error
    return description


def in_float32(model: keras.Model) -> keras.Model:
    """The same network with every layer in float32; the model itself where it is so already.

    What runs exported files chooses its own precision, and Keras' ONNX exporter wants float32.
    """
    if all(layer.dtype_policy.name == "float32" for layer in _all_layers(model)):
        return model

    def recast(layer):
        if isinstance(layer, keras.Model):
            return in_float32(layer)
        return type(layer).from_config({**layer.get_config(), "dtype": "float32"})

    return _clone(model, recast)


def _all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    found = []
    for layer in model.layers:
        found += _all_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def _clone(model: keras.Model, make) -> keras.Model:
    # A bare Functional model, so that any class of model can be cloned.
    plain = keras.Model(model.input, model.output, name=model.name)
    clone = keras.models.clone_model(plain, clone_function=make)
    info = getattr(model, "info", {})
    clone = ImageModel(clone.input, clone.output, name=model.name, info=info)
    clone.set_weights(model.get_weights())
    return clone


def _without_xla(model: keras.Model) -> keras.Model:
    """The same network with grouped convolutions that tf2onnx can read.

    Keras compiles them with XLA, as TensorFlow cannot run them on a CPU; tf2onnx finds a call of a
    function there and leaves it in the file. Written and not run, they may be what they are.
    """
    if not any(getattr(layer, "groups", 1) > 1 for layer in _all_layers(model)):
        return model
    import tensorflow as tf

    class GroupedConv2D(Conv2D):
        def convolution_op(self, inputs, kernel):
            last = self.data_format == "channels_last"
            padding = self.padding.upper()
            if any(self.pad):
                none, sides = [0, 0], [[pad, pad] for pad in self.pad]
                padding = [none, *sides, none] if last else [none, none, *sides]
            return tf.nn.conv2d(
                inputs,
                kernel,
                self.strides,
                padding,
                data_format="NHWC" if last else "NCHW",
                dilations=self.dilation_rate,
            )

    def plain(layer):
        if isinstance(layer, keras.Model):
            return _without_xla(layer)
        if isinstance(layer, keras.layers.Conv2D) and layer.groups > 1:
            return GroupedConv2D.from_config(layer.get_config())
        return type(layer).from_config(layer.get_config())

    return _clone(model, plain)


@contextlib.contextmanager
def _quiet():
    """Without the tracers' warnings, of which there are dozens and none is for the user."""
    import logging

    loggers = [logging.getLogger(name) for name in ("tf2onnx", "tensorflow", "torch.onnx")]
    levels = [one.level for one in loggers]
    # torch prints a whole graph where it cannot convert it.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def _finish_onnx(path: Path, description: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(path)
    graph = model.graph
    # tf2onnx makes inputs of constants that a function captured, and folds them away afterwards.
    used = {name for node in graph.node for name in node.input}
    for value in [value for value in graph.input if value.name not in used]:
        graph.input.remove(value)
    (given,) = graph.input
    answer = graph.output[0]
    renamed = {given.name: INPUT, answer.name: description["output"]}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    batch = description["input"]["shape"][0]
    for value in (given, answer):
        value.name = renamed[value.name]
        size = value.type.tensor_type.shape.dim[0]
        size.Clear()
        if batch is None:
            size.dim_param = "batch"
        else:
            size.dim_value = batch
    del graph.value_info[:]  # of the old names and sizes; a runtime finds its own
    describe_onnx(model, description)
    onnx.save(model, path)


def describe_onnx(model, description: dict[str, Any]) -> None:
    """Writes what is known about a model into an `onnx.ModelProto`."""
    import onnx

    properties = {METADATA: to_json(description)}
    names = description["info"].get("class_names")
    if names:  # for tools that look for the classes alone
        properties["class_names"] = json.dumps(list(names), ensure_ascii=True)
    onnx.helper.set_model_props(model, properties)
    model.doc_string = "; ".join(description["steps_before_the_model"])
    model.producer_name = description["written_by"]


def _finish_openvino(path: Path, description: dict[str, Any]) -> None:
    import openvino as ov

    model = ov.Core().read_model(path)
    # Keras' constants that were not folded come out as further results: the first is the model's.
    model = ov.Model([model.get_results()[0]], model.get_parameters(), description["name"])
    shape = [-1 if size is None else size for size in description["input"]["shape"]]
    model.reshape({model.inputs[0]: ov.PartialShape(shape)})
    model.inputs[0].tensor.set_names({INPUT})
    model.outputs[0].tensor.set_names({description["output"]})
    save_openvino(model, path, description)


def save_openvino(model, path: Path, description: dict[str, Any]) -> None:
    """Writes an OpenVINO model, in float32, with its description, over the file it came from."""
    import openvino as ov

    model.set_rt_info(to_json(description), METADATA)
    # What was read lies in a mapped file: the new one is made beside it.
    fresh = path.with_name(f"new-{path.name}")
    ov.save_model(model, fresh, compress_to_fp16=False)
    del model
    os.replace(fresh.with_suffix(".bin"), path.with_suffix(".bin"))
    os.replace(fresh, path)


def _finish_saved_model(path: Path, description: dict[str, Any]) -> None:
    # TensorFlow's place for files that are not the graph's.
    extra = path / "assets.extra"
    extra.mkdir(exist_ok=True)
    (extra / METADATA_FILE).write_text(to_json(description), encoding="ascii")


def _finish_litert(path: Path, description: dict[str, Any]) -> None:
    # As TensorFlow Lite's own metadata: a zip archive behind the model, which `unzip` opens.
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(METADATA_FILE, to_json(description))
        names = description["info"].get("class_names")
        if names and not any("\n" in name for name in names):
            archive.writestr("labels.txt", "\n".join(names) + "\n")


def _finish_torch(path: Path, description: dict[str, Any]) -> None:
    import torch
    from torch.export.graph_signature import InputKind

    program = torch.export.load(path)
    # Keras' variables come twice: as constants, which the graph uses, and as the parameters of the
    # module, which it does not. Without those the file has half the size.
    nodes, inputs = {node.name: node for node in program.graph.nodes}, program.graph_signature
    for spec in list(inputs.input_specs):
        if spec.kind is InputKind.PARAMETER and not nodes[spec.arg.name].users:
            program.graph.erase_node(nodes[spec.arg.name])
            inputs.input_specs.remove(spec)
            del program.state_dict[spec.target]
    program.graph_module.recompile()
    fresh = path.with_name(f"new-{path.name}")
    torch.export.save(program, fresh, extra_files={METADATA_FILE: to_json(description)})
    os.replace(fresh, path)


_FINISH = {
    "onnx": _finish_onnx,
    "openvino": _finish_openvino,
    "saved_model": _finish_saved_model,
    "litert": _finish_litert,
    "torch": _finish_torch,
}


def files_of(path: Path, name: str) -> list[Path]:
    """All that belongs to an exported model, the file that is opened last."""
    return [path.with_suffix(".bin"), path] if name == "openvino" else [path]


def size_of(path: Path, name: str) -> int:
    """Bytes on disk."""
    total = 0
    for one in files_of(path, name):
        inside = [p for p in one.rglob("*") if p.is_file()] if one.is_dir() else [one]
        total += sum(p.stat().st_size for p in inside)
    return total


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sample_input(model: keras.Model, count: int, seed: int = 0) -> np.ndarray:
    """Noise of the shape and the range that a model takes, `(count, height, width, channels)`."""
    shape = picture_size(model)
    info = getattr(model, "info", {})
    rng = np.random.default_rng(seed)
    if info.get("options", {}).get("include_preprocessing"):
        return rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return rng.standard_normal((count, *shape), dtype=np.float32)
