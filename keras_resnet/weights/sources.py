"""What a user hands over as weights: a tag, a file, a state dict or a module."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_resnet.system.errors import InputError, reason_of
from keras_resnet.system.files import printable, to_json, write_text
from keras_resnet.weights import download, published
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.mapping import convs_of_module, module_path, strides_of, weighted_layers
from keras_resnet.weights.matching import Shape
from keras_resnet.weights.selection import PREFIXES, WRAPPERS

# --- Reading a source ---------------------------------------------------------------------------


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
    published: published.TorchvisionWeights | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key to shape as torch has it."""
        return {key: tuple(array.shape) for key, array in self.tensors.items()}


def read_source(source, key: str | None, expected: Iterable[str], variant: str | None) -> Source:
    """Reads whatever a user hands over as weights.

    Args:
        source: A tag of published weights, a path, a state dict, a torch module or a `Source`.
        key: Which entry of a nested checkpoint.
        expected: The model's own keys, by which a common prefix is found.
        variant: The model's, for a tag.

    Raises:
        InputError: It is none of these, or holds no tensors.
        CheckpointError: The file cannot be read, or is refused.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, str) and published.is_tag(source) and not os.path.exists(source):
        if variant is None:
            raise InputError(f"weights={source!r} needs a model made by kr.create_model.")
        source = download.weights_path(published.resolve_weights(variant, source))
    if isinstance(source, str | os.PathLike):
        if published.is_quantised(Path(source).name):
            raise InputError(
                f"{Path(source).name} is one of torchvision's files quantised to 8 bits, which "
                "cannot be imported. Use the float weights, such as weights='DEFAULT'."
            )
        found = _from_file(Path(source).expanduser(), key)
    elif isinstance(source, Mapping):
        found = _from_mapping(source, key)
    elif callable(getattr(source, "state_dict", None)):
        found = _from_module(source)
    else:
        raise InputError(
            "Weights come from a path, a dict of arrays or a torch module. Received: "
            f"{type(source).__name__}."
        )
    if not found.tensors:
        raise InputError(f"{found.label} holds no tensors.")
    _strip_common_prefix(found, expected)
    return found


def _from_file(path: Path, key: str | None) -> Source:
    about = inspect_checkpoint(path, key)
    tensors = read_checkpoint(path, key)
    sha256 = download.file_sha256(path)
    row = published.published_by_torchvision(sha256)
    strides, known_from = about.metadata.get("stride_on"), "the file's metadata"
    if row is not None:
        strides, known_from = "3x3", "torchvision published the file"
    return Source(
        label=printable(path.name),
        tensors=tensors,
        kind=about.format,
        dtypes={k: dtype for k, (_, dtype) in about.tensors.items()},
        sha256=sha256,
        key=about.key,
        prefix=about.prefix,
        strides=strides if strides in ("1x1", "3x3") else None,
        strides_from=known_from,
        published=row,
    )


def _from_mapping(source: Mapping[str, Any], key: str | None) -> Source:
    path = []
    for part in key.split(".") if key else ():
        if not isinstance(source, Mapping) or part not in source:
            raise InputError(f"The dict has no entry {key!r}; it holds {few(map(str, source))}.")
        source = source[part]
        path.append(part)
    while not key and not any(_is_tensor(value) for value in source.values()):
        part = next((w for w in WRAPPERS if isinstance(source.get(w), Mapping)), None)
        if part is None:
            break
        source = source[part]
        path.append(part)
    if not isinstance(source, Mapping):
        raise InputError(f"The dict's entry {key!r} is a {type(source).__name__}, not a dict.")
    values = {str(k): v for k, v in source.items() if _is_tensor(v) and k != "n_averaged"}
    tensors = {k: _as_array(k, v) for k, v in values.items()}
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in values.items()}
    return Source("a state dict", tensors, "dict", dtypes, key=".".join(path))


def _from_module(module) -> Source:
    found = _from_mapping(module.state_dict(), None)
    found.label, found.kind = f"the module {type(module).__name__}", "module"
    convs = convs_of_module(module) if hasattr(module, "named_modules") else {}
    found.strides, found.strides_from = strides_of(convs), "the module's convolutions"
    return found


def _is_tensor(value) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


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


def _strip_common_prefix(source: Source, expected: Iterable[str]) -> None:
    """Takes away what all names begin with and the model's do not: `module.`, `model.`, ..."""
    expected = {key.partition(".")[0] for key in expected}
    while True:
        first = {key.partition(".")[0] for key in source.tensors}
        whole = all("." in key for key in source.tensors)
        if not whole or len(first) != 1 or (name := first.pop()) in expected:
            return
        known = f"{name}." in PREFIXES
        inner = {key.split(".")[1] for key in source.tensors}
        if not known and not inner & expected:
            return
        cut = len(name) + 1
        source.prefix += f"{name}."
        source.tensors = {key[cut:]: array for key, array in source.tensors.items()}
        source.dtypes = {key[cut:]: dtype for key, dtype in source.dtypes.items()}


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
