"""Whole files from one form to another: torch's checkpoints, `.keras`, safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_resnet.data.preprocess import MAX_PIXELS, Preprocess
from keras_resnet.models.blocks import channel_axis
from keras_resnet.models.image_model import as_functional
from keras_resnet.models.meaning import PIXELS, meaning_of, nodes_of, pixels_of
from keras_resnet.models.summary import summary
from keras_resnet.models.zoo import create_model
from keras_resnet.system.device import image_shape
from keras_resnet.system.errors import InputError, one_of, reason_of
from keras_resnet.system.files import printable, replace_file, to_json
from keras_resnet.variants import SPECS, get_spec
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.dialects import WORDS, has_group_norms
from keras_resnet.weights.keras_files import (
    KERAS_WRITTEN,
    MAX_TENSOR,
    TORCH_WRITTEN,
    check_keras_file,
    find_keras_file,
    target_ending,
)
from keras_resnet.weights.load import load_torchvision
from keras_resnet.weights.mapping import (
    Head,
    not_written,
    readers_differ,
    renamed,
    save_torchvision,
)
from keras_resnet.weights.matching import fit, grouped, spec_shapes, variants_of
from keras_resnet.weights.published import named_variant
from keras_resnet.weights.sources import Source, normalise_as_told, read_source
from keras_resnet.weights.stand_ins import one_line
from keras_resnet.weights.verify import VerifyReport, verify
from keras_resnet.weights.writing import write_checkpoint


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert_file` did; `print` it.

    Attributes:
        source: The file that was read.
        target: The file that was written.
        lines: What was found and assumed, in sentences.
        verification: The numerical proof, or `None` where it was not asked for or means nothing.
    """

    source: str
    target: str
    lines: list[str]
    verification: VerifyReport | None = None

    @property
    def passed(self) -> bool:
        """Nothing disagrees."""
        return self.verification is None or self.verification.passed

    def __str__(self) -> str:
        proof = [] if self.verification is None else [str(self.verification)]
        return "\n".join([*self.lines, *proof, f"Written: {self.target}"])

    def to_json(self) -> str:
        """The report as JSON text."""
        proof = None if self.verification is None else json.loads(self.verification.to_json())
        facts = {"source": self.source, "target": self.target, "notes": self.lines}
        return to_json({**facts, "passed": self.passed, "verification": proof}, indent=2)


def convert_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    variant: str | None = None,
    key: str | None = None,
    class_names: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    include_preprocessing: bool = False,
    check: bool = True,
    allow_other_strides: bool = False,
    to: str | None = None,
    pixels: str | None = None,
) -> Conversion:
    """Turns a weight file into another form, by the extensions of the two names.

    torch's checkpoints become `.keras` or `.weights.h5`; a `.keras` file becomes `.pth` or
    `.safetensors`, which torchvision's model loads strictly; a checkpoint becomes another.

    Args:
        source: A `.keras` file, or a checkpoint that `read_checkpoint` reads.
        target: The file to write.
        variant: The model's name, where the file's keys and shapes fit several or none is meant.
        key: The entry of a nested checkpoint.
        class_names: Names of the classes, in order; ImageNet's for torchvision's own files.
        preprocess: How images are prepared; torchvision's preset for its own files, else
            ImageNet's normalisation at the variant's size, which the result says.
        include_preprocessing: The Keras model takes pixel values 0..255.
        check: Prove the result against the NumPy forward pass of the weights.
        allow_other_strides: Take weights whose origin does not say where the blocks stride.
        to: Whose names the entries of a written checkpoint have, as for `to_torchvision`; by
            default torchvision's where a model is written, and a checkpoint's own.
        pixels: What images the weights were trained on, where the file does not say, as
            keras.applications' `preprocess_input` calls it: `"caffe"` (BGR less its means),
            `"tf"` (-1..1) or `"torch"`. The model takes ordinary RGB images.

    Returns:
        The `Conversion`; its `passed` is the proof's verdict.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: The source is damaged, or refused.
        InputError: Extensions that do not go together, or weights of another network.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    goal = target_ending(target)
    one_of("to", to, (None, *WORDS))
    if to is not None and goal in KERAS_WRITTEN:
        raise InputError(
            f"to={to!r} names a checkpoint's entries; name a .pth or .safetensors. Received: "
            f"{target.name}."
        )
    if pixels is not None and (source.suffix == ".keras" or goal in TORCH_WRITTEN):
        raise InputError(
            f"pixels={pixels!r} is for a checkpoint that becomes a .keras file. Received: "
            f"{source.name} and {target.name}."
        )
    if source.suffix == ".keras":
        model = load_model(source)
        if goal in KERAS_WRITTEN:
            raise InputError(
                f"{source.name!r} is a Keras model already; name a .pth or .safetensors."
            )
        save_torchvision(model, target, to or "torchvision")
        lines = [f"{source.name}: {model.name}, {model.count_params():,} parameters."]
        lines += not_written(getattr(model, "info", {}))
        return Conversion(str(source), str(target), lines, verify(model, target) if check else None)
    if goal in TORCH_WRITTEN and to is None:
        tensors = read_checkpoint(source, key=key)
        about = inspect_checkpoint(source, key)
        write_checkpoint(target, tensors, metadata=about.metadata)
        return Conversion(str(source), str(target), [f"{source.name}: {len(tensors)} tensors."])
    lines: list[str] = []
    spec = variant and get_spec(variant)  # else it is a network of any row of the table
    own = (spec_shapes(spec), spec.head.replace("_", ".")) if spec else ()
    found = read_source(source, key, *own)
    if pixels is not None:
        found.take_pixels(pixels, preprocess)
        preprocess = None
    if variant is None and found.named and found.named.variant:
        variant = get_spec(found.named.variant).name
    if goal in TORCH_WRITTEN:
        return _renamed(found, source, target, str(to))
    model = _model_for(found, variant, include_preprocessing, preprocess, lines)
    if preprocess is None:
        normalise_as_told(model, found)
    else:
        found.told = True
    head: Head = "strict" if model.info["options"]["include_top"] else "skip"
    report = load_torchvision(model, found, head=head, allow_other_strides=allow_other_strides)
    lines.append(str(report))
    _describe(model, class_names, preprocess, lines, found.other_pixels)
    if goal != ".keras":
        lines += not_written(model.info)
    proof = verify(model, found) if check else None
    replace_file(target, model.save if goal == ".keras" else lambda name: _save_h5(model, name))
    return Conversion(str(source), str(target), lines, proof)


def _save_h5(model: keras.Model, name: str) -> None:
    """As `save_weights`, in whose place HDF5 writes to memory: on a full disk it is a segfault."""
    whole = f"{name.removesuffix('.weights.h5')}.keras"
    try:
        model.save(whole)
        with zipfile.ZipFile(whole) as file, open(name, "wb") as written:
            written.write(file.read("model.weights.h5"))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(whole)


def _renamed(found: Source, source: Path, target: Path, to: str) -> Conversion:
    """The network of a checkpoint, written under other names, with the same numbers."""
    if not found.whole:
        raise InputError(f"{found.label!r} cannot be converted: {fit(found.shapes)}.")
    tensors = renamed({name: found.tensors[name] for name in found.network.names}, to)
    about = {"format": "pt", "writer": "keras3-resnet"}
    lines = [f"{source.name}: {len(tensors)} tensors in the names of {to}."]
    if found.strides:
        about["stride_on"] = found.strides
        lines.append(f"Its bottlenecks stride on the {found.strides} ({found.strides_from}).")
    elif "layer1.0.conv3.weight" in tensors or to != "torchvision":
        lines.append("The file does not say where bottlenecks stride, and nor does this one.")
    network = {name: found.shapes[name] for name in found.network.names}
    lines += readers_differ(found.label, network, found.strides, to)
    dropped = sorted({*found.network.near, *found.beside})
    if dropped:
        lines.append(f"Left out: {printable(grouped(dropped))}.")
    if found.other_pixels:
        lines.append(found.other_pixels)
    told = found.preprocess or (found.named and found.named.images)
    names = found.named.class_names if found.named else found.preprocess
    lines += not_written({"preprocess": told, "class_names": names})
    write_checkpoint(target, tensors, metadata=about)
    return Conversion(str(source), str(target), lines)


def _model_for(
    found: Source, variant: str | None, inside: bool, preprocess, lines: list[str]
) -> keras.Model:
    """A model of the variant that the file fits, with as many classes as the file has."""
    fits = variants_of(found.shapes)
    classes = dict(fits)
    # Detectron2's stride on the 1x1 unless told otherwise.
    strides = found.strides or ("1x1" if found.network.dialect.name == "detectron2" else None)
    own = [row for row in fits if getattr(SPECS[row[0]], "stride_on", None) == strides]
    fits = tuple(own) if strides and own else fits
    if variant is None:
        if not fits:
            raise InputError(
                f"{found.label!r} cannot be converted: {fit(found.shapes)}. It has "
                f"{len(found.tensors)} tensors, the first {list(found.tensors)[:3]}."
            )
        variant = fits[0][0]
        if has_group_norms(found.shapes):
            raise InputError(
                f"{found.label!r} has no statistics of batch norms: either its norms are group "
                f"norms, and --model {variant} (variant={variant!r}) says so, or a batch-norm "
                "network was saved without its buffers, which cannot be converted."
            )
        if len(fits) > 1:
            others = ", ".join(name for name, _ in fits[1:])
            lines.append(f"Taken for {variant}; {others} would fit as well: --model says which.")
        if fits[0][1] is None:
            lines.append("It has no head that is its own: the model ends in the last feature map.")
    spec = get_spec(variant)
    stem = next(iter(found.shapes.values()))
    channels = stem[1] if len(stem) == 4 else 3
    size = spec.input_size
    options = {"include_preprocessing": inside}
    if inside and preprocess is not None:
        preprocess = preprocess.for_channels(channels)
        options |= {"mean": preprocess.mean, "std": preprocess.std}
    return create_model(
        variant,
        num_classes=classes.get(variant) or spec.num_classes,
        include_top=classes.get(variant, 0) is not None,
        input_shape=image_shape(size, size, channels),
        **options,
    )


def _describe(
    model: keras.Model, class_names, preprocess, lines: list[str], open_question: str
) -> None:
    """Class names and preprocessing into the model's info."""
    if class_names is not None:
        count = model.output_shape[-1]
        if len(class_names) != count:
            raise InputError(f"{len(class_names)} class names for {count} classes.")
        model.info["class_names"] = list(class_names)
    if preprocess is None and open_question:
        lines.append(
            "Preprocessing: not assumed, the model names none. If images were RGB, give --mean and "
            "--std; predict and the rest ask for it."
        )
    elif preprocess is None and "preprocess" not in model.info:
        size = SPECS[model.info["variant"]].input_size
        preprocess = Preprocess.for_size(size)
        lines.append(
            "Preprocessing: the file does not say; assumed "
            f"{size}x{size} and ImageNet's mean and deviation (--image-size, --mean, --std)."
        )
    if preprocess is not None:
        channels = model.input_shape[channel_axis()]
        model.info["preprocess"] = preprocess.for_channels(channels).get_config()


def load_model(path: str | os.PathLike) -> keras.Model:
    """Loads a `.keras` file, compiled or not, without compiling it.

    Args:
        path: A file that `train` or `model.save` wrote, a run folder (its `best.keras`), or the
            name of a variant, for torchvision's weights of it (downloaded once).

    Raises:
        NotFoundError: There is no such file; a near name is suggested.
        InputError: The file is no Keras model, or torchvision publishes no weights of the variant.

    Examples:
        >>> load_model("no-such.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.system.errors.NotFoundError: No model file at 'no-such.keras'.
    """
    variant = named_variant(path)
    if variant is not None:
        return create_model(variant, weights="DEFAULT")
    return open_keras_file(find_keras_file(path))


def open_keras_file(path: Path, compile: bool = False) -> keras.Model:
    """The model in a `.keras` file: the one place where Keras opens one.

    Raises:
        InputError: The file is no Keras model, or one that would take the machine.
    """
    numbers = check_keras_file(path)
    try:
        with _weights_up_to(numbers + _SPARE):
            model = keras.saving.load_model(path, compile=compile)
        _check_loaded(model)
    except Exception as error:  # Keras raises a dozen kinds for a damaged file
        reason = one_line(reason_of(error), 300)
        raise InputError(f"{str(path)!r} cannot be loaded as a Keras model: {reason}") from error
    return model


_SPARE = 1 << 20  # weights that a file need not hold: those of layers that older Kerases left out
_LOADING = threading.RLock()


@contextlib.contextmanager
def _weights_up_to(most: int) -> Iterator[None]:
    """Layers that are made here weigh no more than so many numbers.

    Keras draws the weights of a layer as large as its description says, before it reads those of
    the file.

    Raises:
        InputError: They would.
    """
    left, here = most, threading.get_ident()

    def add_weight(layer: keras.Layer, shape=None, *args, **kwargs):
        nonlocal left
        if threading.get_ident() == here:
            left -= math.prod(shape or ())
            if left < 0:
                raise InputError("its layers would weigh more than the file has weights.")
        return before(layer, shape, *args, **kwargs)

    with _LOADING:
        before = keras.Layer.add_weight
        keras.Layer.add_weight = add_weight  # type: ignore[method-assign]
        try:
            yield
        finally:
            keras.Layer.add_weight = before  # type: ignore[method-assign]


def _check_loaded(model: keras.Model) -> None:
    """What can be wrong with a model whatever it is used for: sizes, and what `info` says."""
    functional = as_functional(model, strict=False)
    if functional is None:
        return
    info = getattr(model, "info", {})
    prepared = None if info.get("preprocess") is None else model_preprocess(model)
    if prepared is not None:
        _check_channels(functional, prepared)
    for count, name in _output_sizes(functional, prepared):
        if count > MAX_TENSOR:
            raise InputError(f"the output of its layer {name!r} has {count:,} values an image.")
    if info.get("class_names") and isinstance(functional.layers[-1], keras.layers.Dense):
        model_class_names(model)


def _output_sizes(
    model: keras.Model, prepared: Preprocess | None = None
) -> Iterator[tuple[int, str]]:
    """Values and layer of each tensor of a graph, models inside included, for one image."""
    for node in nodes_of(model):
        inner = node.operation if isinstance(node.operation, keras.Model) else None
        inner = inner and as_functional(inner, strict=False)
        if inner is not None:
            yield from _output_sizes(inner)
        for tensor in node.outputs:
            yield math.prod(size or 1 for size in tensor.shape[1:]), node.operation.name
    if None in model.inputs[0].shape[1:]:  # sides that the preprocessing decides
        sides = prepared.output_shape[:2] if prepared is not None else (None, None)
        with contextlib.suppress(Exception):  # a graph without a summary
            for row in summary(model, [side or 224 for side in sides]).rows:
                yield math.prod(row.output_shape), row.name


def _check_channels(model: keras.Model, prepared: Preprocess) -> None:
    shape = as_functional(model).inputs[0].shape
    count = shape[channel_axis()] if len(shape) == 4 else None
    if count is not None and prepared.channels not in (shape[1], shape[3]):
        raise InputError(
            f"The model {model.name!r} takes images of {count} channels, and its preprocessing "
            f"makes {prepared.channels}: correct color_mode in model.info['preprocess']."
        )


def model_preprocess(model: keras.Model | Any) -> Preprocess:
    """The `Preprocess` that a model was trained or imported with.

    Raises:
        InputError: The model names none.
    """
    config = getattr(model, "info", {}).get("preprocess")
    if config is None:
        name = getattr(model, "model_name", None) or model.name
        raise InputError(
            f"The model {name!r} does not say how its images are prepared: pass "
            "preprocess=kr.Preprocess(...), or set model.info['preprocess'] and save it."
        )
    return Preprocess.from_config(config)


def model_class_names(model: keras.Model | Any) -> list[str]:
    """Names of a model's classes; their numbers where it knows none.

    Raises:
        InputError: There are more or fewer names than classes, or it is no classifier.
    """
    if hasattr(model, "num_classes"):  # a Runner
        count, label = model.num_classes, model.model_name
    else:
        count = meaning_of(model).num_classes(as_functional(model).outputs[0].shape[1])
        label = model.name
    names = list(getattr(model, "info", {}).get("class_names") or map(str, range(count)))
    if len(names) != count:
        raise InputError(
            f"The model {label!r} has {count} classes and info['class_names'] {len(names)} names: "
            "give as many, in the order of the outputs."
        )
    return names


def model_input(
    model: keras.Model | Any, preprocess: Preprocess | None = None, pixels: str | None = None
) -> tuple[Preprocess, str]:
    """How images are prepared for a model or a `Runner`: the one place that knows what it is fed.

    Both can be given in place of what the model says: `pixels` as `"0..255"`, `"0..1"` or
    `"normalized"`.

    Returns:
        The `Preprocess`, and what an `ImageDataset` of it gives: `"uint8"`, the pixels, or
        `"float32"`, what the `Preprocess` makes of them.

    Raises:
        InputError: The model names no preprocessing, or it is unclear which pixels it takes.
    """
    one_of("pixels", pixels, (None, *PIXELS))
    given = getattr(model, "given", model)  # of a Runner of Keras'
    if preprocess is None:
        preprocess = model_preprocess(model)
    elif isinstance(given, keras.Model) and len(shape := as_functional(given).inputs[0].shape) == 4:
        preprocess = preprocess.for_channels(shape[channel_axis()] or 3)
    if isinstance(given, keras.Model):
        _check_channels(given, preprocess)
    if pixels is None:
        pixels = pixels_of(model) if isinstance(model, keras.Model) else model.pixels
    if pixels == "0..1":
        preprocess = dataclasses.replace(preprocess, mean=None, std=None)
    return preprocess, "uint8" if pixels == "0..255" else "float32"


def images_at_a_time(preprocess: Preprocess, batch_size: int) -> int:
    """The batch size that was asked for, or as many images as memory is meant for."""
    height, width, _ = preprocess.output_shape
    return min(batch_size, max(1, MAX_PIXELS // ((height or 256) * (width or 256))))
