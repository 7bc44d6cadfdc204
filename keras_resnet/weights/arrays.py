"""NumPy arrays of a weight file's tensors: views of the mapped file wherever they can be."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.dtypes import EXTENSION_SIZES, NUMPY_CODES, SIZES
from keras_resnet.weights.loaded import Loaded
from keras_resnet.weights.stand_ins import Array, Span, Storage, Tensor, Unreadable, one_line
from keras_resnet.weights.zip_files import unpacked


def to_array(loaded: Loaded, tensor: Tensor | Array) -> np.ndarray:
    """The numbers, read-only, with the tensor's shape, strides and (but for complex32) dtype."""
    if type(tensor) is Array:
        array = _from_pickle(loaded, tensor)
    elif tensor.numel == 0:
        array = np.empty(tensor.shape, _numpy_type(tensor.dtype))
    else:
        array = _view(loaded, tensor)
    if type(tensor) is Tensor and tensor.dtype == "complex32":
        loaded.spend(2 * tensor.nbytes)
        halves = np.array(array, order="C")[..., None].view("f2").astype("f4")
        array = halves.view("c8")[..., 0]
    if type(tensor) is Tensor and (tensor.conj or tensor.neg):
        loaded.spend(array.nbytes)
        array = np.conj(array) if tensor.conj else array
        array = np.negative(array) if tensor.neg else array
    array = np.asarray(array)
    array.flags.writeable = False
    return array


def _numpy_type(name: str) -> np.dtype:
    """The type of that torch name; an integer of its size for complex32, which nobody has."""
    if name in NUMPY_CODES:
        return np.dtype(NUMPY_CODES[name])
    if name == "complex32":
        return np.dtype("u4")
    if name in EXTENSION_SIZES:
        return np.dtype(getattr(ml_dtypes, name))
    raise CheckpointError(f"torch.{name} has no NumPy counterpart: save another dtype")


def _from_pickle(loaded: Loaded, array: Array) -> np.ndarray:
    if type(array.data) is str or array.code[0] == ">":
        loaded.spend(array.nbytes)
    data, start = array.data, 0
    try:
        if type(data) is str:
            data = data.encode("latin-1")
        elif type(data) is Span:
            data, start = data.data, data.start
    except UnicodeEncodeError:
        raise CheckpointError("a NumPy array in the pickle holds text, not bytes") from None
    out = np.ndarray(array.shape, array.code, data, start, order="F" if array.fortran else "C")
    return out.astype(out.dtype.newbyteorder("="), copy=False)


def _view(loaded: Loaded, tensor: Tensor) -> np.ndarray:
    dtype, size = _numpy_type(tensor.dtype), SIZES[tensor.dtype]
    storage, first = tensor.storage, tensor.offset * size
    while storage.view is not None:
        parent, offset = storage.view
        first += offset * SIZES[parent.dtype]
        storage = parent
    buffer, start, end = _buffer(loaded, storage, tensor.dtype)
    last = first + size * sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
    )
    if start + last + size > end:
        raise CheckpointError(f"a tensor ends outside storage {one_line(storage.key)!r}")
    strides = tuple(s * size for s in tensor.strides)
    return np.ndarray(tensor.shape, dtype, buffer, start + first, strides)


def _buffer(loaded: Loaded, storage: Storage, dtype: str) -> tuple[Any, int, int]:
    """(buffer, first byte, past the last byte) of a root storage, in this machine's byte order."""
    size = SIZES[storage.dtype]
    unit = size // 2 if storage.dtype.startswith("complex") else size
    if loaded.big_endian and storage.dtype != dtype:
        raise CheckpointError(f"{dtype} in big-endian order, which PyTorch does not turn round")
    member = loaded.member(f"data/{storage.key}")
    if member is None or (member.method == 0 and (unit == 1 or not loaded.big_endian)):
        data = loaded.data if storage.data is None else storage.data
        return data, storage.start, storage.start + storage.nbytes
    known = loaded.buffers.get(storage.key)
    if known is None:
        known = loaded.buffers[storage.key] = unpacked(loaded.data, member, storage.key)
        if loaded.big_endian and unit > 1:
            np.frombuffer(known, f"u{unit}", storage.nbytes // unit).byteswap(inplace=True)
    return known, 0, len(known)


def dtype_name(value: Tensor | Array | Unreadable) -> str:
    """The dtype as torch names it, or the kind of a tensor that cannot be read."""
    if type(value) is Unreadable:
        return value.kind
    return value.dtype if type(value) is Tensor else np.dtype(value.code).name


def adapted_to(weight: np.ndarray, channels: int) -> np.ndarray:
    """A first convolution of three channels for others, as timm's `adapt_input_conv` makes it.

    Summed for one channel, which answers as for three equal ones; else repeated, and scaled to the
    same sum. The weight is torch's, (out, 3, height, width).
    """
    if channels == 1:
        return weight.sum(axis=1, keepdims=True, dtype=weight.dtype)
    repeated = np.tile(weight, (1, -(-channels // 3), 1, 1))[:, :channels]
    return repeated * weight.dtype.type(3 / channels)


def how_adapted(key: str, channels: int) -> str:
    """What `adapted_to` did, for a person."""
    how = "summed for 1" if channels == 1 else f"repeated and scaled for {channels}"
    return f"{key} of 3 channels {how}"
