"""Weight files of PyTorch before 0.2: a tar archive of four files."""

from __future__ import annotations

import contextlib
import re
import struct
import tarfile
from typing import Any

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.dtypes import SIZES
from keras_resnet.weights.loaded import Loaded, cut_off
from keras_resnet.weights.pickle_names import plain
from keras_resnet.weights.pickles import read_pickle
from keras_resnet.weights.stand_ins import (
    MAX_DIMENSIONS,
    Budget,
    Name,
    Parameter,
    Storage,
    Tensor,
    brief,
    counts,
    one_line,
)


def is_tar(data: Any) -> bool:
    """Whether PyTorch, which asks `tarfile`, would take the file for a tar archive.

    What decides is the checksum of the first header; the magic `ustar` may be missing.
    """
    return _header(data, 0) is not None


def _header(data: Any, position: int) -> tarfile.TarInfo | None:
    with contextlib.suppress(tarfile.TarError):
        block = bytes(data[position : position + 512])
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return None


def _tar_members(data: Any, size: int) -> dict[str, tuple[int, int]]:
    """Name -> (start, length) of a tar archive's plain files; lengths may pass the file's end."""
    members: dict[str, tuple[int, int]] = {}
    position, count = 0, 0
    while position + 512 <= size and data[position : position + 512].strip(b"\0"):
        header = _header(data, position)
        count += 1
        if count > 1000 or header is None or header.size < 0:
            raise CheckpointError(f"the tar archive is damaged at byte {position:,}")
        name, length, start = header.name.removeprefix("./"), header.size, position + 512
        if header.isdir():
            if length:  # a reader may skip so many bytes, or read them as the next header
                raise CheckpointError(f"the tar archive's folder {one_line(name)!r} has a size")
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            if name in members:
                raise CheckpointError(f"the tar archive holds {one_line(name)!r} twice")
            members[name] = (start, length)
        elif header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            # Dates, which is all that torch's tar files put here. A name or size here would
            # replace the header's.
            extended = data[start : start + min(length, 4096)]
            if length > 4096 or re.search(rb" (path|size|linkpath|GNU\.sparse\S*)=", extended):
                raise CheckpointError("a tar archive with extended names or sizes")
        else:
            raise CheckpointError(
                f"the tar archive's {one_line(name)!r} is a link or a special file, not plain bytes"
            )
        position = start + -(-length // 512) * 512
    return members


def load_tar(data: Any, size: int, name: str) -> Loaded:
    """Understands a tar archive that torch.save wrote."""
    members = _tar_members(data, size)
    lacking = [n for n in ("pickle", "tensors", "storages") if n not in members]
    if lacking:
        raise CheckpointError(_contents(members, lacking[0], size))
    loaded = Loaded("tar", data, size)
    budget = Budget()
    known: dict[int, Any] = {}

    def bounds(member: str) -> tuple[int, int]:
        start, length = members[member]
        return start, min(start + length, size)

    def pickle(start: int, end: int, persistent: Any = None) -> tuple[Any, int]:
        return read_pickle(data, start, end, budget, loaded.refused, persistent)

    def lookup(pid: Any) -> Any:
        if type(pid) is tuple and pid:
            return pid[0]  # a class with its source text
        key = int(pid) if type(pid) is str and re.fullmatch(r"-?\d{1,20}", pid) else pid
        if type(key) is not int or key not in known:
            raise CheckpointError(f"tensor {brief(pid)} is used and not stored")
        return known[key]

    # The names first: what the pickle wants is news even where storages are cut off.
    start, end = bounds("pickle")
    with contextlib.suppress(CheckpointError):
        pickle(start, end, lambda pid: Parameter())
    if loaded.refused:
        return loaded
    start, length = members["storages"]
    if start + length > size:
        raise cut_off("storages", max(0, size - start), length, size)
    try:
        _read_tar_storages(data, start, start + length, pickle, known)
        _read_tar_tensors(data, *bounds("tensors"), pickle, known)
        loaded.root, _ = pickle(*bounds("pickle"), lookup)
    except CheckpointError:
        if not loaded.refused:
            raise
    return loaded


def _contents(members: dict, lacking: str, size: int) -> str:
    """What a tar archive that is no whole checkpoint is instead."""
    inside = [n for n in members if n.endswith((".pth", ".pt", ".th", ".safetensors"))]
    if inside:
        return f"it is a tar archive with {one_line(inside[0])!r} inside: unpack it and read that"
    if not members:
        return f"the tar archive is cut off at {size:,} bytes: download it again"
    if set(members) & {"sys_info", "pickle", "tensors"}:
        return (
            f"{lacking!r} is missing from the tar archive, which ends at {size:,} bytes: download "
            f"it again"
        )
    shown = ", ".join(one_line(n, 40) for n in list(members)[:5]) or "nothing"
    return f"it is a tar archive, but no PyTorch checkpoint; it holds {shown}: unpack it"


def _read_tar_storages(data: Any, position: int, end: int, pickle: Any, known: dict) -> None:
    count, position = pickle(position, end)
    if type(count) is not int or not 0 <= count <= end - position:
        raise CheckpointError(f"storages claims {brief(count)} entries")
    for _ in range(count):
        described, position = pickle(position, end)
        if type(described) is not tuple or len(described) != 3:
            raise CheckpointError("a storage is not described as (key, location, type)")
        key, _location, kind = described
        if type(key) is not int or type(kind) is not Name or kind.dtype not in SIZES:
            raise CheckpointError(f"a storage of the unknown type {brief(kind)}")
        if position + 8 > end:
            raise CheckpointError("storages ends inside an entry: download it again")
        (numel,) = struct.unpack_from("<q", data, position)
        position += 8
        storage = Storage(str(key), kind.dtype, numel)
        if numel < 0 or storage.nbytes > end - position:
            raise CheckpointError(
                f"storage {key} claims {numel:,} elements where {end - position:,} bytes are left: "
                f"download it again"
            )
        storage.start = position
        known[_tar_key(key, known)] = storage
        position += storage.nbytes
    views, position = pickle(position, end)
    for view in views if type(views) is list else ():
        if type(view) is not tuple or len(view) != 4 or type(view[0]) is not int:
            raise CheckpointError(f"storages has the view {brief(view)}")
        root = known.get(view[1]) if type(view[1]) is int else None
        offset, numel = counts(view[2:], "view")
        if type(root) is not Storage or offset + numel > root.numel:
            raise CheckpointError(f"the view {brief(view)} lies outside its storage")
        if root.view is not None:  # a view of a view: no chains
            root, first = root.view
            offset += first
        view_storage = Storage(str(view[0]), root.dtype, numel, (root, offset))
        known[_tar_key(view[0], known)] = view_storage


def _tar_key(key: int, known: dict) -> int:
    """Keys were addresses. Those alone are hashed, and at most as many as the limit on entries."""
    if not -(2**63) <= key < 2**64 or key in known or len(known) > 10_000:
        raise CheckpointError(f"the key {brief(key)} is not a new address")
    return key


def _read_tar_tensors(data: Any, position: int, end: int, pickle: Any, known: dict) -> None:
    count, position = pickle(position, end)
    if type(count) is not int or not 0 <= count <= end - position:
        raise CheckpointError(f"tensors claims {brief(count)} entries")
    for _ in range(count):
        described, position = pickle(position, end)
        if type(described) is not tuple or len(described) != 3:
            raise CheckpointError("a tensor is not described as (key, storage, type)")
        key, storage, _kind = described
        if position + 8 > end:
            raise CheckpointError("tensors ends inside an entry: download it again")
        (dimensions,) = struct.unpack_from("<i", data, position)
        if not 0 <= dimensions <= MAX_DIMENSIONS or position + 16 + 16 * dimensions > end:
            raise CheckpointError(f"a tensor claims {dimensions:,} dimensions")
        numbers = struct.unpack_from(f"<{2 * dimensions + 1}q", data, position + 8)
        position += 16 + 16 * dimensions
        if type(key) is not int or type(storage) is not int:
            raise CheckpointError("a tensor or its storage has a key that is no number")
        shape, strides = numbers[:dimensions], numbers[dimensions : 2 * dimensions]
        tensor = Tensor(known.get(storage), numbers[-1], shape, strides)
        known[_tar_key(key, known)] = plain(tensor)
