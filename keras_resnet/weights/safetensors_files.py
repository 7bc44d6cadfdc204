"""Weight files in the safetensors format."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

from keras_resnet.system.errors import CheckpointError
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
        storage.start, storage.data = begin + offsets[0], data
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


def load_index(data: Any, path: Path, open_shard: Callable[[Path], Loaded]) -> Loaded:
    """The shards that the `*.index.json` at a path names, in the same folder, as one file."""
    if len(data) > MAX_HEADER:
        raise CheckpointError(f"an index of {len(data):,} bytes is above {MAX_HEADER:,}")
    try:
        index = json.loads(data[:].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"it is no JSON ({one_line(error)})") from error
    places = index.get("weight_map") if type(index) is dict else None
    if type(places) is not dict or not places or any(type(v) is not str for v in places.values()):
        raise CheckpointError("it is JSON, but no index of shards: weight_map is missing")
    names = sorted(set(places.values()))
    strange = [n for n in names if PureWindowsPath(n).name != n or "\0" in n or n in ("", "..")]
    if strange:
        raise CheckpointError(f"its shard {one_line(strange[0])!r} is no name of a file beside it")
    if not all(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"it is the index of {len(names):,} pickled shards, such as {one_line(names[0])!r}: "
            f"name one of them, or save the model as safetensors "
            f"(save_pretrained(..., safe_serialization=True)), whose index is read"
        )
    loaded = Loaded("safetensors", data, 0, root={})
    loaded.notes["shards"] = f"{len(names):,}, such as {one_line(names[0])}"
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing:
        raise CheckpointError(f"its shard {one_line(missing[0])!r} is missing: download it too")
    for name in names:
        try:
            shard = open_shard(path.parent / name)
        except CheckpointError as error:
            raise CheckpointError(f"its shard {one_line(name)!r}: {error}") from error
        if shard.format != "safetensors":
            raise CheckpointError(f"its shard {one_line(name)!r} is a {shard.format} file")
        for key in shard.root:
            if places.get(key) != name:
                where = f"places in {one_line(places[key])!r}" if key in places else "does not list"
                raise CheckpointError(
                    f"its shard {one_line(name)!r} holds {one_line(key)!r}, which the index {where}"
                )
        loaded.root |= shard.root
        loaded.refused |= shard.refused
        loaded.metadata |= shard.metadata
        loaded.size += shard.size
    lacking = [key for key in places if key not in loaded.root]
    if lacking:
        raise CheckpointError(
            f"its shard {one_line(places[lacking[0]])!r} lacks {one_line(lacking[0])!r}, which the "
            f"index places there: download it again"
        )
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out
