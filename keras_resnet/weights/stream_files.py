"""Weight files of PyTorch before 1.6: pickles one after the other, then the storages.

And plain pickles of NumPy arrays by name, Detectron2's `.pkl`.
"""

from __future__ import annotations

import struct
from typing import Any

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.loaded import Loaded, Storages, cut_off
from keras_resnet.weights.pickles import read_pickle
from keras_resnet.weights.stand_ins import MAX_PICKLE, Array, Budget, brief, one_line

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# Bytes of a pickle that has the arrays inside, as Detectron2 writes them: those of protocol 2 that
# Python 3 wrote are text, which is copied three times, others stay where they are.
_MAX_ARRAYS = 1 << 29
_ARRAYS_ENDINGS = (".pkl", ".pickle")


def load_stream(data: Any, size: int, name: str) -> Loaded:
    """The pre-zip stream; also names what a pickle that is no checkpoint wants."""
    loaded = Loaded("stream", data, size)
    arrays = name.lower().endswith(_ARRAYS_ENDINGS)
    most = max(MAX_PICKLE, min(size, _MAX_ARRAYS)) if arrays else MAX_PICKLE
    budget, storages = Budget(bytes=most), Storages()

    def pickle(start: int, persistent: Any = None) -> tuple[Any, int]:
        return read_pickle(data, start, size, budget, loaded.refused, persistent)

    try:
        magic, position = read_pickle(data, 0, size, budget, loaded.refused, storages, most)
        loaded.root = magic
        if type(magic) is not int or magic != MAGIC:
            if not loaded.refused and _has_arrays(magic):
                loaded.format = "pickle"
                return loaded
            loaded.kind = "pickle"
            loaded.problem = (
                "it is a Python pickle, but no checkpoint: torch.save did not write it (it holds "
                f"{one_line(brief(magic), 60)}). Save the weights with torch.save or safetensors"
            )
            return loaded
        version, position = pickle(position)
        if type(version) is not int or version != PROTOCOL:
            raise CheckpointError(f"format version {brief(version)} instead of {PROTOCOL}")
        _, position = pickle(position)
        loaded.root, position = pickle(position, storages)
        if loaded.refused:
            return loaded
        keys, position = pickle(position)
        if loaded.refused:
            return loaded
    except CheckpointError:
        # A name that was asked for before the pickle broke is the more important news.
        if loaded.refused:
            return loaded
        raise
    _place_storages(loaded, storages, keys, position)
    return loaded


def _has_arrays(root: Any) -> bool:
    """Whether it is a dict of NumPy arrays, or holds one: `{"model": {...}, "__author__": ...}`."""
    dicts = [root, *root.values()] if isinstance(root, dict) else []
    return any(type(v) is Array for d in dicts if isinstance(d, dict) for v in d.values())


def _place_storages(loaded: Loaded, storages: Storages, keys: Any, position: int) -> None:
    """Finds the storages, which follow the list of their keys at `position`."""
    data, size = loaded.data, loaded.size
    if type(keys) is not list or any(type(k) not in (str, int) for k in keys):
        raise CheckpointError("its list of storages is damaged: download it again")
    missing = storages.roots
    want = position + sum(8 + s.nbytes for s in missing.values())
    for key in map(str, keys):
        storage = missing.pop(key, None)
        if storage is None:
            raise CheckpointError(
                f"its list of storages names {one_line(key)!r}, which no tensor uses"
                if key not in storages.known
                else f"its list of storages names {one_line(key)!r} twice"
            )
        if position + 8 > size:
            raise cut_off("the file", size, want)
        (numel,) = struct.unpack_from("<q", data, position)
        if numel != storage.numel:
            raise CheckpointError(
                f"storage {one_line(key)!r} has {numel:,} elements where {storage.numel:,} were "
                f"announced: the file is damaged, download it again"
            )
        if position + 8 + storage.nbytes > size:
            raise cut_off("the file", size, want)
        storage.start = position + 8
        position += 8 + storage.nbytes
    if missing:
        raise CheckpointError(
            f"storage {one_line(next(iter(missing)))!r} is used and not stored: the file is "
            f"damaged, download it again"
        )
