"""HDF5 files as Keras writes them, alone or inside a `.keras` file: nothing in them is run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, cast

import numpy as np

from keras_resnet.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from keras_resnet.system.errors import CheckpointError, InputError, one_of, reason_of
from keras_resnet.weights.dialects import KERAS_CAFFE, PIXELS
from keras_resnet.weights.dtypes import SIZES
from keras_resnet.weights.loaded import Loaded
from keras_resnet.weights.stand_ins import Storage, Tensor, Unreadable, one_line

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LINKS = 20_000  # names in a model's weights (3,000), half a millisecond each
_DEPTH = 16  # groups around an array: two for each model around a layer

# A layer's variables, which `.weights.h5` files number, by the start of the layer's class.
_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # of torch's kernels in Keras' order


class Window(io.RawIOBase):
    """A part of a mapped file, as a file."""

    def __init__(self, data: Any, start: int, size: int):
        self._data, self._start, self._size, self._at = data, start, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place within the part."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Copies the next bytes."""
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._data[self._start + self._at : self._start + self._at + count]
        self._at += count
        return count


def each_dataset(file: IO[bytes], size: int, look: Callable[[str, Any, Any], None]) -> None:
    """Calls `look(name, dataset, file)` for all arrays of an HDF5 file, in alphabetical order.

    Raises:
        InputError: There are too many, links to other places, arrays that are packed (which may
            unpack to any size), or more bytes of them than the file has.
    """
    import h5py  # a quarter of a second

    links = held = 0

    def follow(name: str, link: Any) -> None:
        nonlocal links, held
        links += 1
        if links > _LINKS or not isinstance(link, h5py.HardLink):
            raise InputError("its weights are too many, or links to other places.")
        if name.count("/") > _DEPTH:  # each is looked up from the file's root on
            raise InputError(f"its weights lie in more than {_DEPTH} groups.")
        item = weights[name]
        if isinstance(item, h5py.Dataset):
            held += math.prod(item.shape) * item.dtype.itemsize
            _check_stored(item)
            if held > size:
                raise InputError("its weights claim more bytes than are in the file.")
            look(name, item, weights)

    with h5py.File(file, "r") as weights:
        error = weights.visititems_links(functools.partial(_error_of, follow))
    if error is not None:
        raise error


def _error_of(look: Callable[..., None], *arguments: Any) -> Exception | None:
    """What a call raises, which h5py would lose on its way through HDF5; anything ends the walk."""
    try:
        look(*arguments)
    except Exception as error:
        return error
    return None


def _check_stored(item: Any) -> None:
    """Weights are as Keras writes them, one after the other and as they are."""
    from h5py import h5d

    how = item.id.get_create_plist()
    plain = how.get_layout() in (h5d.COMPACT, h5d.CONTIGUOUS) and not how.get_external_count()
    if not plain or item.dtype.hasobject:
        raise InputError("its weights are packed or elsewhere: save the model again with Keras.")


def load_h5(data: Any, size: int, name: str) -> Loaded:
    """A `.weights.h5` or `.h5` file of Keras: `layer.variable` -> a view with torch's axes."""
    loaded = Loaded("h5", data, size, root={})
    layers: dict[str, str] = {}

    def look(path: str, item: Any, file: Any) -> None:
        named = _name_of(path, file, layers)
        dtype, start = item.dtype.name, item.id.get_offset()
        if named is None or not item.shape:
            return
        if named in loaded.root:
            raise InputError(f"two of its arrays are called {one_line(named)!r}.")
        if dtype not in SIZES or start is None or item.dtype.byteorder == ">":
            loaded.root[named] = Unreadable(dtype)
            return
        storage = Storage(named, dtype, math.prod(item.shape))
        storage.start, storage.data = start, data
        if start + storage.nbytes > size or file.userblock_size:
            raise InputError("its weights are not where they should be: save the model again.")
        strides = [math.prod(item.shape[i + 1 :]) for i in range(item.ndim)]
        axes = _AXES.get(item.ndim) if named.endswith("kernel") else None
        axes = axes or tuple(range(item.ndim))
        shape, strides = [item.shape[i] for i in axes], [strides[i] for i in axes]
        loaded.root[named] = Tensor(storage, 0, shape, strides)

    try:
        each_dataset(cast(IO[bytes], Window(data, 0, size)), size, look)
    except Exception as error:  # h5py alone raises a dozen kinds for a damaged file
        reason = one_line(reason_of(error), 300)
        raise CheckpointError(f"it is an HDF5 file that cannot be read: {reason}") from error
    return loaded


def _name_of(path: str, file: Any, known: dict[str, str]) -> str | None:
    """`layer.variable` of an array, models around it before that; `None` for no layer's.

    Args:
        path: Of the array.
        file: Where it is.
        known: Gets the names of layers: thousands of arrays may be of one with a long name.
    """
    parts = path.split("/")
    if parts[0] in ("optimizer", "optimizer_weights", "top_level_model_weights", "seed_generator"):
        return None
    if len(parts) < 4 or parts[-2] != "vars":  # .h5: the layer's name, and the variable's path
        parts = parts[1:] if parts[0] == "model_weights" else parts
        parts[-1] = parts[-1].partition(":")[0]
        again = len(parts) > 2 and re.fullmatch(re.escape(parts[0]) + r"(_\d+)?", parts[1])
        return ".".join([parts[0], *parts[2:]] if again else parts)
    # .weights.h5: layers/CLASS_1/layers/CLASS_2/vars/0, where each layer's `vars` has its name.
    layers = [
        "/".join(parts[: i + 1]) for i in range(1, len(parts) - 2) if parts[i - 1] == "layers"
    ]
    for layer in layers:
        if layer not in known:
            name = file[f"{layer}/vars"].attrs.get("name")
            known[layer] = (name if isinstance(name, str) else layer.rpartition("/")[2])[:512]
    kind = re.sub(r"_\d+$", "", parts[-3])
    variables = _VARIABLES.get(kind, ())
    number = int(parts[-1]) if parts[-1].isdecimal() else len(variables)
    last = variables[number] if number < len(variables) else parts[-1]
    return ".".join([*(known[layer] for layer in layers), last])


# MD5 of the ImageNet files for 50, 101 and 152 layers, with and without the head: the constants
# WEIGHTS_HASHES of keras/src/applications/resnet.py, and the mode of their `preprocess_input`.
_IMAGENET = {
    **dict.fromkeys(
        (
            *("2cb95161c43110f7111970584f804107", "4d473c1dd8becc155b73f8504c6f6626"),
            *("f1aeb4b969a6efcfb50fad2f0c20cfc5", "88cf7a10940856eca736dc7b7e228a21"),
            *("100835be76be38e30d865e96f2aaae62", "ee4c566cf9a93f14d82f913c2dc6dd0c"),
        ),
        "caffe",
    ),
    **dict.fromkeys(
        (
            *("3ef43a0b657b3be2300d5770ece849e0", "fac2f116257151a9d068a22e544a4917"),
            *("6343647c601c52e1368623803854d971", "c0ed64b8031c3730f411d2eb4eea35b5"),
            *("a49b44d1979771252814e80f8ec446f9", "ed17cf2e0169df9d443503ef94b23b33"),
        ),
        "tf",
    ),
}
_EPSILONS = 1.001e-5 - 1e-5  # keras.applications' batch norms, and those of everybody else


def folded_biases(names: Iterable[str]) -> dict[str, str]:
    """keras.applications' batch-norm means -> the biases of the convolutions before them."""
    known = set(names)
    pairs = {n: f"{n.removesuffix('_bn.moving_mean')}_conv.bias" for n in known
             if n.endswith("_bn.moving_mean")}  # fmt: skip
    return {mean: bias for mean, bias in pairs.items() if bias in known}


def without_biases(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """keras.applications' networks as the papers have them: batch norms alone shift.

    `gamma (conv + bias - mean) / sqrt(variance + 1.001e-5) + beta` is the same without the bias,
    with `mean - bias` and `variance + 1e-8`, rounded once. Biases that no norm follows (v2) stay.
    """
    biases = folded_biases(tensors)
    out = {name: array for name, array in tensors.items() if name not in biases.values()}
    for mean, bias in biases.items():
        exact = np.subtract(tensors[mean], tensors[bias], dtype=np.float64)
        out[mean] = exact.astype(tensors[mean].dtype)
    theirs = biases or any(name.endswith("_preact_bn.gamma") for name in tensors)
    for name in out if theirs else ():
        if name.endswith("_bn.moving_variance"):
            exact = tensors[name].astype(np.float64) + _EPSILONS
            out[name] = exact.astype(tensors[name].dtype)
    return out


def imagenet_pixels(path: os.PathLike) -> str | None:
    """The mode of `preprocess_input` of keras.applications' own files; `None` for others."""
    with open(path, "rb") as file:
        return _IMAGENET.get(hashlib.file_digest(file, "md5").hexdigest())


def prepared_as(
    mode: str, bgr: tuple[float, ...] = (), preprocess: Preprocess | None = None
) -> Preprocess:
    """How RGB images are prepared where `preprocess_input` takes a mode.

    Args:
        mode: `"caffe"`, whose first kernel has to be turned round for that, `"tf"` or `"torch"`.
        bgr: What "caffe" subtracts from blue, green and red, in place of keras.applications'.
        preprocess: Sides and interpolation.

    Examples:
        >>> prepared_as("tf").mean
        (0.5, 0.5, 0.5)
    """
    one_of("pixels", mode, PIXELS)
    mean, std = {
        "caffe": (tuple(m / 255 for m in (bgr or KERAS_CAFFE)[::-1]), (1 / 255,) * 3),
        "tf": ((0.5,) * 3, (0.5,) * 3),
        "torch": (IMAGENET_MEAN, IMAGENET_STD),
    }[mode]
    return dataclasses.replace(preprocess or Preprocess.for_size(224, 224), mean=mean, std=std)
