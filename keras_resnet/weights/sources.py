"""What a user hands over as weights: a tag, a file, a state dict or a module."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.layers.norm import Normalize
from keras_resnet.system.errors import CheckpointError, InputError, reason_of
from keras_resnet.system.files import printable, to_json, write_text
from keras_resnet.variants import SPECS
from keras_resnet.weights import download, published
from keras_resnet.weights.arrays import adapted_to, how_adapted
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.dialects import CAFFE, TORCHVISION, head_shape, unwritten
from keras_resnet.weights.h5_files import imagenet_pixels, prepared_as, without_biases
from keras_resnet.weights.mapping import convs_of_module, module_path, strides_of, weighted_layers
from keras_resnet.weights.matching import Network, Shape, find_networks, locate
from keras_resnet.weights.selection import find_entry


@dataclasses.dataclass
class Source:
    """A state dict as arrays, and what is known about where it comes from."""

    label: str
    tensors: dict[str, np.ndarray]
    kind: str
    dtypes: dict[str, str]
    sha256: str | None = None
    key: str = ""
    prefix: str = ""
    strides: str | None = None
    strides_from: str = ""
    convs: dict[str, tuple[Shape, Shape]] = dataclasses.field(default_factory=dict)  # a module's
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # what stands beside the file
    published: published.TorchvisionWeights | None = None
    named: download.HubFile | None = None
    pixels: str | None = None  # of keras.applications' own files, see `take_pixels`
    preprocess: Preprocess | None = None  # of a published file, or as the caller says
    adapted: str = ""
    network: Network = dataclasses.field(default_factory=lambda: Network("", TORCHVISION, {}))
    whole: bool = False  # every entry of the network's body is there
    beside: dict[str, Shape] = dataclasses.field(default_factory=dict)
    told: bool = False  # the caller knows how images are prepared
    rivals: tuple[str, ...] = ()  # other places that have as much of a network that is not whole

    @property
    def names(self) -> str:
        """Whose names the entries had, where that is not torchvision."""
        return "" if self.network.dialect is TORCHVISION else self.network.dialect.of

    @property
    def other_pixels(self) -> str:
        """That its images may not have been as ours, where nothing says how they were prepared."""
        dialect = self.network.dialect
        known = self.strides is not None and dialect.name != "keras"
        whose, bgr, scaled = dialect.of, dialect.bgr, dialect.scaled
        if self.config.get("style") not in (None, "pytorch"):
            whose, bgr, known = "OpenMMLab's style='caffe'", CAFFE, False
        if known or self.preprocess or (self.named and self.named.images) or not (bgr or scaled):
            return ""
        mode, pixels = "tf", "RGB pixels of -1..1"
        if bgr:
            mode, pixels = "caffe", f"BGR pixels of 0..255 less {list(bgr)}"
        return (
            f"{self.label} does not say how its images were prepared; {whose} takes {pixels} "
            "unless told otherwise, and answers wrongly for other images (keras-resnet convert "
            f"--pixels {mode} makes a model for ordinary ones)."
        )

    def take_pixels(self, mode: str, preprocess: Preprocess | None = None) -> None:
        """Says how its images were prepared, and makes it a network for RGB pixels.

        What takes BGR pixels gives the same for RGB ones with its first kernel turned round.

        Args:
            mode: As keras.applications' `preprocess_input` calls it: `"caffe"`, `"tf"`, `"torch"`.
            preprocess: Sides and interpolation; the rest is the mode's.

        Raises:
            InputError: The mode is unknown, or the images have no three channels.
        """
        means = self.network.dialect.bgr or (CAFFE if self.config.get("style") else ())
        self.preprocess = prepared_as(mode, means, preprocess)
        if mode == "caffe":
            first = next(key for key, array in self.tensors.items() if array.ndim == 4)
            if self.tensors[first].shape[1] != 3:
                raise InputError(f"pixels='caffe' is for images of three channels: {self.label}.")
            self.tensors[first] = self.tensors[first][:, ::-1]

    @property
    def near(self) -> set[str]:
        """Names of the layers that stand beside the network in its own module."""
        return {name[len(self.network.prefix) :] for name in self.network.near}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key to shape as torch has it."""
        return {key: tuple(array.shape) for key, array in self.tensors.items()}


def read_source(
    source,
    key: str | None,
    wanted: Mapping[str, Shape] | None = None,
    head: str | None = None,
    variant: str | None = None,
) -> Source:
    """Reads whatever a user hands over as weights, and finds the network in it.

    That is a tag of published weights of the `variant`, a name on the hub, a path, a state dict, a
    torch module, or a `Source`; `key` says which entry or which network of several. `wanted` are
    the model's own entries, by default those of any row of the table, and `head` is its last layer.

    Raises:
        InputError: It is none of these, holds no tensors, or several networks that fit.
        CheckpointError: The file cannot be read, or is refused.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, str) and published.is_tag(source) and not os.path.exists(source):
        if variant is None:
            raise InputError(f"weights={source!r} needs a model made by kr.create_model.")
        source = download.weights_path(published.resolve_weights(variant, source))
    named = download.hub_file(source) if published.hub_name(source) else None
    named = source if isinstance(source, download.HubFile) else named
    if named is not None:
        _check_variant(named, variant)
        source = named.path
    if isinstance(source, str | os.PathLike):
        if published.is_quantised(Path(source).name):
            raise InputError(
                f"{Path(source).name} is one of torchvision's files quantised to 8 bits, which "
                "cannot be imported. Use the float weights, such as weights='DEFAULT'."
            )
        path = Path(source).expanduser()
        found = _from_file(path, key)
        if named is None and "architecture" in found.config:  # timm's folder, as on the hub
            told = download._told(found.config, found.label)
            named = download.HubFile(path, found.label, **told)
            _check_variant(named, variant)
    elif isinstance(source, Mapping):
        found = _from_mapping(source, key)
    elif callable(getattr(source, "state_dict", None)):
        found = _from_module(source, key)
    else:
        raise InputError(
            "Weights come from a path, a dict of arrays or a torch module. Received: "
            f"{type(source).__name__}."
        )
    if not found.tensors:
        raise InputError(f"{found.label} holds no tensors.")
    _take_network(found, wanted, head, key)
    if found.pixels is not None and found.whole:
        found.take_pixels(found.pixels)
    if found.kind == "h5" and not found.whole:
        raise InputError(
            f"{found.label} is a Keras model's weights, and no network of keras.applications that "
            "fits: model.load_weights(path) reads those of a model like the one that wrote it."
        )
    if named is not None:
        found.label, found.named = named.label, named
        if named.strides:
            found.strides, found.strides_from = named.strides, "its config.json"
    _find_strides(found)
    if wanted is not None:
        _adapt_channels(found, wanted)
    return found


def _check_variant(named: download.HubFile, variant: str | None) -> None:
    """Others have networks of the same shapes that answer differently: blurred, padded otherwise.

    Raises:
        InputError: They are of another network than the model.
    """
    if variant is None or named.variant in (None, variant):
        return
    use = f"use kr.create_model({named.variant!r})" if named.variant in SPECS else "no model has it"
    raise InputError(f"{named.label} are weights for {named.variant}, not for {variant}: {use}.")


def _from_file(path: Path, key: str | None) -> Source:
    about = inspect_checkpoint(path, key)
    tensors = read_checkpoint(path, key)
    if about.format == "h5":
        tensors = without_biases(tensors)
    sha256 = download.file_sha256(path)
    row = published.published_by_torchvision(sha256)
    strides, known_from = about.metadata.get("stride_on"), "the file's metadata"
    if row is not None:
        strides, known_from = "3x3", "torchvision published the file"
    return Source(
        label=printable(path.name),
        tensors=tensors,
        kind=about.format,
        dtypes={k: about.tensors[k][1] for k in tensors},
        sha256=sha256,
        key=about.key,
        prefix=about.prefix,
        strides=strides if strides in ("1x1", "3x3") else None,
        strides_from=known_from,
        config=_config_beside(path)
        | {"__author__": about.others.get("__author__"), "style": about.others.get("meta.style")},
        published=row,
        pixels=imagenet_pixels(path) if about.format == "h5" else None,
        preprocess=row.preprocess if row else None,
    )


_TIMMS = ("model", "pytorch_model")  # as its files are called beside a config.json


def _config_beside(path: Path) -> dict[str, Any]:
    """The config of Hugging Face's ResNet, or timm's, in the file's folder; empty without one."""
    beside = path.with_name("config.json")
    try:
        with open(beside if beside.is_file() else os.devnull, "rb") as file:
            config = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    timms = isinstance(config.get("architecture"), str) and path.stem in _TIMMS
    return config if timms or config.get("model_type") == "resnet" else {}


def _from_mapping(source: Mapping[str, Any], key: str | None) -> Source:
    root = source if isinstance(source, dict) else dict(source)
    try:
        path, _, (values, _) = find_entry(
            root, key, lambda v: v if hasattr(v, "shape") and hasattr(v, "dtype") else None
        )
    except CheckpointError as error:
        raise InputError(f"The dict cannot be read: {error}") from error
    tensors = {k: _as_array(k, v) for k, v in values.items()}
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in values.items()}
    return Source("a state dict", tensors, "dict", dtypes, key=".".join(path))


def _from_module(module, key: str | None) -> Source:
    found = _from_mapping(module.state_dict(), key)
    found.label, found.kind = f"the module {type(module).__name__}", "module"
    found.convs = convs_of_module(module) if hasattr(module, "named_modules") else {}
    return found


def _as_array(key: str, value) -> np.ndarray:
    """A NumPy array of another library's, from any device; not a copy where that can be."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            # NumPy has no bfloat16; float32 holds every one of its values.
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
            return value.numpy()
        return np.asarray(value)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{key!r} cannot be read as a plain array: {reason_of(error)}") from error


def _take_network(found: Source, wanted, head: str | None, key: str | None) -> None:
    """Leaves a source the one network that is meant, under torchvision's names.

    Raises:
        InputError: Several fit, with other numbers.
    """
    for name, scale in unwritten(found.tensors).items():
        # As Detectron2's FrozenBatchNorm2d: with its epsilon the deviation is 1.
        value = np.float32(1 - 1e-5 if name.endswith("riv") else 0)
        found.tensors[name] = np.broadcast_to(value, found.tensors[scale].shape)
        found.dtypes[name] = "float32"
    shapes = found.shapes
    networks = find_networks(shapes) if wanted is None else locate(shapes, wanted, head)
    whole = [network for network in networks if not network.strange]
    at_key = [network for network in whole if not network.prefix] if key is not None else []
    fits = at_key[:1] or whole
    different = [fits[0]] if fits else []
    different += [n for n in fits[1:] if not _same_numbers(found.tensors, fits[0], n)]
    if len(different) > 1:
        raise InputError(several(found.label, found.key, found.prefix, different))
    if fits:
        network = fits[0]
    else:  # what is most like it, for the message
        like = _most_like(shapes, wanted or {})
        prefix = like[0] if like else ""
        own = {k[len(prefix) :]: k for k in shapes if k.startswith(prefix)}
        others = tuple(k for k in shapes if not k.startswith(prefix))
        network = Network(prefix, TORCHVISION, own, beside=others)
        front = ".".join(part for part in (found.key, found.prefix[:-1]) if part)
        found.rivals = tuple(f"{front}.{p}".strip(".") for p in like) if like[1:] else ()
    names = network.names | {k[len(network.prefix) :]: k for k in network.near}
    found.whole, found.network = bool(fits), network
    found.prefix += network.prefix
    found.beside = {name: shapes[name] for name in network.beside}
    found.tensors = {
        ours: found.tensors[name].reshape(head_shape(name, tuple(shapes[name])))
        for ours, name in names.items()
    }
    found.dtypes = {ours: found.dtypes[name] for ours, name in names.items()}


def _find_strides(found: Source) -> None:
    """Where the bottlenecks stride: what the file, its folder, or else the dialect says.

    Raises:
        InputError: A config says that the network is one that no model here is.
    """
    dialect, config = found.network.dialect, found.config
    if found.convs:
        modules = {
            k.rpartition(".")[0]: v.rpartition(".")[0] for k, v in found.network.names.items()
        }
        convs = {ours: found.convs[v] for ours, v in modules.items() if v in found.convs}
        found.strides, found.strides_from = strides_of(convs), "the module's convolutions"
    elif found.strides is None and dialect.name == "detectron2":
        if "torchvision" in str(config.get("__author__")):
            found.strides, found.strides_from = "3x3", "its author is torchvision"
    elif found.strides is None and config.get("style"):
        found.strides = {"caffe": "1x1", "pytorch": "3x3"}.get(config["style"], "1x1 or 3x3")
        found.strides_from = f"style={config['style']!r} in its config"
    elif found.strides is None and dialect is not TORCHVISION:
        found.strides = dialect.strides
        found.strides_from = f"as {dialect.of} does unless told otherwise"
        if dialect.name == "huggingface" and config.get("downsample_in_bottleneck"):
            found.strides, found.strides_from = "1x1", "its config.json"
    if dialect.name != "huggingface":
        return
    for name, usual in (("hidden_act", "relu"), ("downsample_in_first_stage", False)):
        if config.get(name, usual) != usual:
            raise InputError(
                f"{found.label} has {name} = {printable(repr(config[name])[:60])} in its "
                f"config.json; the models here have {usual!r}."
            )


def _same_numbers(tensors: Mapping[str, np.ndarray], one: Network, other: Network) -> bool:
    """Whether two networks are one, which a module holds under two names."""
    return one.names.keys() == other.names.keys() and all(
        np.array_equal(tensors[one.names[k]], tensors[other.names[k]]) for k in one.names
    )


def _most_like(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """The prefixes under which most of the wanted names stand."""
    counts: collections.Counter[str] = collections.Counter()
    parts = 1 + max((name.count(".") for name in wanted), default=-1)
    for name in shapes:
        at = len(name) + 1
        for _ in range(parts):  # from behind: a stranger's names may have a million parts
            at = name.rfind(".", 0, at - 1) + 1
            if name[at:] in wanted:
                counts[name[:at]] += 1
            if at == 0:
                break
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most > 0]


def several(label: str, key: str, prefix: str, networks: Iterable[Network]) -> str:
    """The message where a file holds more than one network that is asked for."""
    listed = []
    for network in networks:
        front = ".".join(part for part in (key, (prefix + network.prefix)[:-1]) if part)
        what = f" ({network})" if network.variants else ""
        listed.append(f"key={printable(front)!r}{what}")
    shown = ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
    return f"{label} holds {len(listed)} networks that fit; name one of {shown}."


def _adapt_channels(found: Source, expected: Mapping[str, Shape]) -> None:
    key = next((key for key, shape in expected.items() if len(shape) == 4), None)
    weight, shape = found.tensors.get(key), expected.get(key)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or weight.dtype.kind != "f":
        return
    if shape[1] != 3 and (*weight.shape[:1], *weight.shape[2:]) == (*shape[:1], *shape[2:]):
        found.tensors[key] = adapted_to(weight, shape[1])
        found.adapted = how_adapted(key, shape[1])


def told_preprocess(model: keras.Model, found: Source) -> Preprocess | None:
    """How a source says that images are prepared, for the model's side and channels."""
    preprocess = found.preprocess
    channels = next((array.shape[1] for array in found.tensors.values() if array.ndim == 4), 3)
    if found.named:
        sides = {side for side in model.input_shape[1:] if side not in (None, channels)}
        preprocess = found.named.preprocess(sides.pop() if len(sides) == 1 else None)
    return None if preprocess is None else preprocess.for_channels(channels)


def pixel_problem(model: keras.Model, found: Source) -> str | None:
    """Where a model that normalises inside does it otherwise than its weights were trained."""
    layer = next((x for x in model.layers if isinstance(x, Normalize)), None)
    told = None if layer is None else told_preprocess(model, found)
    if layer is None or (told is None and not found.other_pixels):
        return None
    if told is None:
        known = "build it without that, or with the mean= and std= that you know"
        return f"{found.other_pixels} {model.name} normalises inside: {known}."
    theirs, own = [
        [np.round(values or (default,), 4).tolist() for values, default in pair]
        for pair in (((told.mean, 0), (told.std, 1)), ((layer.mean, 0), (layer.std, 1)))
    ]
    if all(np.allclose(a, b, atol=2e-4) for a, b in zip(theirs, own, strict=True)):
        return None
    return (
        f"{found.label} was trained with mean {theirs[0]} and deviation {theirs[1]}; {model.name} "
        f"normalises inside with {own[0]} and {own[1]}: give it the former, mean= and std=."
    )


def normalise_as_told(model: keras.Model, found: Source, mean=None, std=None) -> None:
    """Gives a new model that normalises inside the mean and deviation of its weights.

    Those that the caller gives stay; both together say that the pixels are known.
    """
    told = told_preprocess(model, found)
    layer = next((x for x in model.layers if isinstance(x, Normalize)), None)
    if layer is not None and told is not None:
        layer.mean = layer.mean if mean is not None else told.mean
        layer.std = layer.std if std is not None else told.std
    found.told = told is None and mean is not None and std is not None


def to_json_text(value: dict[str, Any], path) -> str:
    """JSON text of a report, written to a path as well if there is one."""
    text = to_json(value, indent=2)
    if path is not None:
        write_text(path, text + "\n")
    return text


def few(names: Iterable[str], limit: int = 3) -> str:
    """The first names, sorted, and how many more there are."""
    names = [printable(name) for name in sorted(names)]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def own_head_of(model: keras.Model) -> str | None:
    """Module path of the last fully connected layer in the graph."""
    dense = [x for x in weighted_layers(model) if isinstance(x, keras.layers.Dense)]
    return module_path(dense[-1]) if dense else None
