"""Weight files in the safetensors format."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from keras_resnet.errors import CheckpointError
from keras_resnet.weights.dtypes import SAFETENSORS_DTYPES, SIZES
from keras_resnet.weights.loaded import Loaded, cut_off
from keras_resnet.weights.stand_ins import Storage, Tensor, Unreadable, brief, counts, one_line

MAX_HEADER = 2 << 20


def load_safetensors(data: Any, size: int, name: str) -> Loaded:
    """The format of https://github.com/huggingface/safetensors, which the README there defines."""
    (length,) = struct.unpack_from("<Q", data, 0)
    if length > size - 8:
        raise cut_off("the header", size - 8, length, size)
    if length > MAX_HEADER:
        raise CheckpointError(f"its header of {length:,} bytes is above {MAX_HEADER:,}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is damaged ({one_line(error)})") from error
    if type(header) is not dict:
        raise CheckpointError("its header is no JSON object")
    loaded = Loaded("safetensors", data, size)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        raise CheckpointError("its __metadata__ is not text by name")
    loaded.metadata = metadata
    begin = 8 + length
    ranges, root = [], {}
    for key, entry in header.items():
        if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise CheckpointError(f"the entry {one_line(key)!r} lacks dtype, shape or data_offsets")
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
        offsets = counts(entry["data_offsets"], "data_offsets")
        shape = counts(entry["shape"], "shape")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise CheckpointError(f"the entry {one_line(key)!r} has the offsets {brief(offsets)}")
        ranges.append((*offsets, key))
        if dtype is None:
            root[key] = Unreadable(one_line(f"{entry['dtype']}", 20))
            continue
        if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
            raise CheckpointError(
                f"the entry {one_line(key)!r} has {offsets[1] - offsets[0]:,} bytes for "
                f"{brief(shape)} of {dtype}"
            )
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        storage = Storage(key, dtype, math.prod(shape))
        storage.start = begin + offsets[0]
        root[key] = Tensor(storage, 0, shape, strides)
    reached = 0
    for first, last, key in sorted(ranges):
        if first != reached:
            raise CheckpointError(f"the bytes of {one_line(key)!r} overlap others or leave a gap")
        reached = last
    if begin + reached > size:
        raise cut_off("the file", size, begin + reached)
    if begin + reached < size:
        raise CheckpointError(f"{size - begin - reached:,} bytes follow its last tensor")
    loaded.root = root
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out
