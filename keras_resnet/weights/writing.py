"""Writes weight files that torch and safetensors read."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_resnet.system.errors import CheckpointError, NotFoundError
from keras_resnet.system.files import replace_file
from keras_resnet.weights.dtypes import (
    CLASSES,
    EXTENSION_SIZES,
    NUMPY_CODES,
    QUANTISED_SIZES,
    SAFETENSORS_DTYPES,
)
from keras_resnet.weights.opening import as_path, only_our_errors
from keras_resnet.weights.selection import MAX_NAME
from keras_resnet.weights.stand_ins import brief, one_line

_STORAGE_CLASSES = {
    dtype: f"{prefix}Storage"
    for prefix, dtype in CLASSES.items()
    if dtype not in QUANTISED_SIZES and prefix not in ("Untyped", "ComplexHalf")
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_checkpoint(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays as a PyTorch state dict or a safetensors file, whole or not at all.

    The same arrays give the same bytes. A `.pth` is PyTorch's zip format, which
    `torch.load(path, weights_only=True)` and `load_state_dict(strict=True)` take; PyTorch is not
    needed to write it. The file appears under its name only when it is complete.

    Args:
        path: Ends in `.pth`, `.pt`, `.th` or `.safetensors`, which chooses the format.
        tensors: Name to array (or anything that `numpy.asarray` takes), of any dtype of
            `read_checkpoint`.
        metadata: Text by name: safetensors' `__metadata__`; in a `.pth` a record beside the
            tensors, which PyTorch ignores and `inspect_checkpoint` shows.

    Raises:
        NotFoundError: The folder does not exist.
        CheckpointError: Another ending, an array that has no torch dtype, or the disk refused.

    Examples:
        >>> import pathlib, tempfile
        >>> import keras_resnet as kr
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.safetensors"
        >>> kr.write_checkpoint(path, {"w": np.eye(2)}, metadata={"from": "an example"})
        >>> kr.inspect_checkpoint(path).metadata
        {'from': 'an example'}
    """
    with only_our_errors(path, "write"):
        file = as_path(path)
        suffix = file.suffix.lower()
        if suffix not in (".pth", ".pt", ".th", ".safetensors"):
            raise CheckpointError(f"its ending is {suffix!r}: use .pth, .pt, .th or .safetensors")
        if not file.parent.is_dir():
            raise NotFoundError(f"no folder {one_line(file.parent, 500)} to write {file.name} into")
        arrays = _checked_arrays(tensors)
        about = {str(k): str(v) for k, v in sorted(dict(metadata or {}).items())}
        write = _write_safetensors if suffix == ".safetensors" else _write_zip

        def write_to(name: str) -> None:
            with open(name, "wb") as out:
                write(out, arrays, about)

        replace_file(file, write_to)


def _checked_arrays(tensors: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, str]]:
    """Name to (array, torch's name of its dtype)."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"tensors should be a dict of arrays, not {type(tensors).__name__}")
    out = {}
    for name, value in tensors.items():
        if type(name) is not str or not name or len(name) > MAX_NAME:
            raise CheckpointError(f"{brief(name)} is no name for a tensor")
        array = np.asarray(value)
        dtype = array.dtype.newbyteorder("=")
        if dtype.name not in NUMPY_CODES and dtype.name not in EXTENSION_SIZES:
            raise CheckpointError(f"{one_line(name)!r} has dtype {array.dtype}, which torch lacks")
        out[name] = (array.astype(dtype, copy=False), dtype.name)
    return out


def _raw(array: np.ndarray) -> memoryview:
    """The array's bytes in C order, little-endian."""
    if array.dtype.name in NUMPY_CODES:
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return memoryview(np.ascontiguousarray(array).reshape(-1).view("u1"))


def _write_zip(out: Any, arrays: dict[str, tuple[np.ndarray, str]], about: dict[str, str]) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def record(name: str, data: Any) -> None:
            info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            info.file_size = len(data)
            wide = len(data) >= 0xF0000000
            # torch maps storages in place, so each begins at a multiple of 64 bytes; the gap is
            # an extra field "FB", as its own writer makes it.
            header = out.tell() + 30 + len(info.filename.encode()) + 20 * wide + 4
            info.extra = struct.pack("<2sH", b"FB", -header % 64) + b"Z" * (-header % 64)
            with archive.open(info, "w", force_zip64=wide) as entry:
                entry.write(data)

        record("data.pkl", _state_dict_pickle(arrays))
        record("byteorder", b"little")
        for index, (array, _) in enumerate(arrays.values()):
            record(f"data/{index}", _raw(array))
        record("version", b"3\n")
        if about:
            record("extra/metadata.json", json.dumps(about, sort_keys=True).encode())


def _state_dict_pickle(arrays: dict[str, tuple[np.ndarray, str]]) -> bytes:
    """An OrderedDict of `_rebuild_tensor_v2` calls, in the opcodes that torch.save writes."""

    def text(value: str) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw

    def integer(value: int) -> bytes:
        if value < 256:
            return b"K" + struct.pack("<B", value)
        if value < 2**31:
            return b"J" + struct.pack("<i", value)
        return b"\x8a\x08" + struct.pack("<q", value)

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    new_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", new_dict, b"("]
    for index, (name, (array, dtype)) in enumerate(arrays.items()):
        sizes = [max(n, 1) for n in array.shape]
        strides = tuple(math.prod(sizes[i + 1 :]) for i in range(array.ndim))
        # Types younger than the storage classes are named beside an untyped storage.
        old = dtype in _STORAGE_CLASSES
        storage = f"torch\n{_STORAGE_CLASSES[dtype]}" if old else "torch.storage\nUntypedStorage"
        version, count = ("2", array.size) if old else ("3", array.nbytes)
        parts += [
            text(name),
            f"ctorch._utils\n_rebuild_tensor_v{version}\n".encode(),
            *(b"((", text("storage"), f"c{storage}\n".encode(), text(str(index)), text("cpu")),
            *(integer(count), b"tQ", integer(0), integers(array.shape), integers(strides)),
            *(b"\x89", new_dict, b"" if old else f"ctorch\n{dtype}\n".encode(), b"tR"),
        ]
    return b"".join([*parts, b"u."])


def _write_safetensors(
    out: Any, arrays: dict[str, tuple[np.ndarray, str]], about: dict[str, str]
) -> None:
    if "__metadata__" in arrays:
        raise CheckpointError("safetensors keeps the name '__metadata__' for itself")
    # The widest types first, as the library does: every tensor then begins aligned.
    order = sorted(arrays, key=lambda n: (-arrays[n][0].dtype.itemsize, n))
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    position = 0
    for name in order:
        array, dtype = arrays[name]
        if dtype not in _SAFETENSORS_NAMES:
            raise CheckpointError(
                f"{one_line(name)!r} is {dtype}, which safetensors lacks: use .pth"
            )
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        out.write(_raw(arrays[name][0]))
