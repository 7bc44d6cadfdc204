"""The containers of weight files: zip, stream, tar and safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import struct
import zlib
from typing import Any

import numpy as np

from keras_resnet.errors import CheckpointError
from keras_resnet.weights.dtypes import _SAFETENSORS, _SIZES
from keras_resnet.weights.pickles import (
    MAX_DIMENSIONS,
    MAX_IDENTIFIER,
    MAX_PICKLE,
    _brief,
    _Budget,
    _integers,
    _Machine,
    _Name,
    _Parameter,
    _plain,
    _Record,
    _Storage,
    _Tensor,
    _text,
    _Unreadable,
)

MAX_ENTRIES = 50_000
MAX_HEADER = 2 << 20  # of a safetensors file
MAX_INFLATION = 8  # decompressed bytes per byte of the file; weights reach about 1.1

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


# --------------------------------------------------------------------------------- the four formats


@dataclasses.dataclass
class _Loaded:
    """A file opened and understood, none of its numbers touched."""

    format: str
    data: Any
    size: int
    root: Any = None
    refused: dict[str, None] = dataclasses.field(default_factory=dict)
    kind: str = "state dict"
    problem: str | None = None  # why its tensors cannot be had, in a sentence
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    members: dict[str, _Member] = dataclasses.field(default_factory=dict)
    archive: str = ""
    big_endian: bool = False
    buffers: dict[tuple, Any] = dataclasses.field(default_factory=dict)


class _Storages:
    """Makes storages from the persistent ids of the zip and stream formats."""

    def __init__(self):
        self.known: dict[str, _Storage] = {}
        self.views: dict[tuple[str, str], _Storage] = {}

    def __call__(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) > 1 and pid[0] == "module":
            return pid[1]  # a class with its source text, from a pickled module
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise CheckpointError(f"the persistent id {_brief(pid)} is no storage")
        kind, key, _location, numel = pid[1:5]
        view = pid[5] if len(pid) == 6 else None
        if type(kind) is not _Name or kind.value not in _SIZES:
            raise CheckpointError(f"a storage of the unknown type {_brief(kind)}")
        (numel,) = _integers((numel,), "storage size")
        key = self._key(key)
        storage = self.known.get(key)
        if storage is None:
            storage = self.known[key] = _Storage(key, kind.value, numel)
        elif storage.nbytes != numel * _SIZES[kind.value]:
            raise CheckpointError(f"storage {_text(key)!r} is described twice, differently")
        if view is not None:
            return self._view(storage, kind.value, view)
        if storage.dtype != kind.value:
            return _Storage(key, kind.value, numel, (storage, 0))
        return storage

    @staticmethod
    def _key(key: Any) -> str:
        if type(key) not in (str, int) or (type(key) is str and len(key) > MAX_IDENTIFIER):
            raise CheckpointError(f"a storage with the key {_brief(key)}")
        return str(key)

    def _view(self, root: _Storage, dtype: str, view: Any) -> _Storage:
        """Files before 0.4 share memory through views of a storage: (key, offset, size)."""
        if type(view) is not tuple or len(view) != 3 or dtype != root.dtype:
            raise CheckpointError(f"storage {_text(root.key)!r} has the view {_brief(view)}")
        offset, numel = _integers(view[1:], "view")
        if offset + numel > root.numel:
            raise CheckpointError(
                f"a view of storage {_text(root.key)!r} ends at {offset + numel:,} of "
                f"{root.numel:,} elements"
            )
        name = (root.key, self._key(view[0]))
        made = self.views.get(name)
        if made is None:
            made = self.views[name] = _Storage(name[1], dtype, numel, (root, offset))
        return made


def _cut_off(what: str, have: int, want: int, file_size: int | None = None) -> CheckpointError:
    at = "" if file_size is None else f" (the file has {file_size:,})"
    return CheckpointError(f"{what} ends at {have:,} of {want:,} bytes{at}: download it again")


@dataclasses.dataclass(slots=True)
class _Member:
    """One file inside a zip archive."""

    method: int
    packed: int
    size: int
    crc: int
    header: int
    start: int


def _zip_members(data: Any, size: int) -> dict[str, _Member] | None:
    """The central directory, believed only where the local headers agree; None without one.

    Our own reader, because the rules here are stricter than `zipfile`'s: no overlapping entries,
    no name twice, no entry outside the file, sizes that the compressed bytes can reach.
    """
    tail = max(0, size - 65557)
    at = data.rfind(b"PK\x05\x06", tail, size)
    if at < 0 or at + 22 > size:
        return None
    disk, first_disk, _, count, length, start, _ = struct.unpack_from("<4H2IH", data, at + 4)
    limit = at
    if 0xFFFF in (disk, count) or 0xFFFFFFFF in (length, start):
        if at < 20 or data[at - 20 : at - 16] != b"PK\x06\x07":
            raise CheckpointError("the zip archive's 64-bit directory is missing")
        (limit,) = struct.unpack_from("<Q", data, at - 12)
        if limit + 56 > at or data[limit : limit + 4] != b"PK\x06\x06":
            raise CheckpointError("the zip archive's 64-bit directory is damaged")
        disk, first_disk, _, count, length, start = struct.unpack_from("<2I4Q", data, limit + 16)
    if disk or first_disk:
        raise CheckpointError("one part of a zip archive in several parts: join them first")
    if start + length > limit:
        raise CheckpointError(
            f"the zip archive's directory should lie at bytes {start:,} to {start + length:,} of "
            f"{size:,}: the file is damaged, download it again"
        )
    if count > MAX_ENTRIES or count * 46 > length:
        raise CheckpointError(f"the zip archive claims {count:,} entries in {length:,} bytes")
    members: dict[str, _Member] = {}
    position, stop = start, start + length
    for _ in range(count):
        if position + 46 > stop or data[position : position + 4] != b"PK\x01\x02":
            raise CheckpointError(f"the zip archive's directory is damaged at byte {position:,}")
        (flags, method, _, crc, packed, unpacked, n, extra, comment) = struct.unpack_from(
            "<2HI3I3H", data, position + 8
        )
        (header,) = struct.unpack_from("<I", data, position + 42)
        following = position + 46 + n + extra + comment
        if following > stop:
            raise CheckpointError(f"the zip archive's directory is damaged at byte {position:,}")
        raw = data[position + 46 : position + 46 + n]
        more = data[position + 46 + n : position + 46 + n + extra]
        unpacked, packed, header = _zip64(more, unpacked, packed, header)
        name = raw.decode("utf-8", "replace")
        members_name = _text(name)
        if flags & 1:
            raise CheckpointError(f"the zip entry {members_name!r} is encrypted: unpack it first")
        if method not in (0, 8):
            raise CheckpointError(
                f"the zip entry {members_name!r} is packed by method {method}: unpack it and zip "
                f"it again without compression"
            )
        if name in members:
            raise CheckpointError(f"the zip entry {members_name!r} is there twice")
        if header + 30 > start or data[header : header + 4] != b"PK\x03\x04":
            raise CheckpointError(f"the zip entry {members_name!r} is not where it should be")
        local_method, n_local, extra_local = struct.unpack_from("<H16x2H", data, header + 8)
        begin = header + 30 + n_local + extra_local
        if data[header + 30 : header + 30 + n_local] != raw or local_method != method:
            raise CheckpointError(f"the zip entry {members_name!r} contradicts its own header")
        if begin + packed > start:
            raise CheckpointError(
                f"the zip entry {members_name!r} claims {packed:,} bytes where "
                f"{max(0, start - begin):,} are left"
            )
        if (method == 0 and packed != unpacked) or unpacked > packed * 1032 + 64:
            raise CheckpointError(
                f"the zip entry {members_name!r} claims {unpacked:,} bytes from {packed:,}"
            )
        members[name] = _Member(method, packed, unpacked, crc, header, begin)
        position = following
    reached = 0
    for member in sorted(members.values(), key=lambda m: m.header):
        if member.header < reached:
            raise CheckpointError("the zip archive's entries overlap")
        reached = member.start + member.packed
    inflated = sum(m.size for m in members.values() if m.method == 8)
    if inflated > MAX_INFLATION * size + (1 << 20):
        raise CheckpointError(
            f"the zip archive would unpack to {inflated:,} bytes from {size:,}: weights do not "
            f"compress like that"
        )
    return members


def _zip64(extra: bytes, *fields: int) -> tuple[int, ...]:
    """Fields of a directory entry, those that are full taken from its 64-bit extension."""
    if 0xFFFFFFFF not in fields:
        return fields
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = extra[position + 4 : position + 4 + length]
            wanted = sum(f == 0xFFFFFFFF for f in fields)
            if len(wide) < 8 * wanted:
                break
            values = iter(struct.unpack_from(f"<{wanted}Q", wide))
            return tuple(next(values) if f == 0xFFFFFFFF else f for f in fields)
        position += 4 + length
    raise CheckpointError("a zip entry's 64-bit size is missing")


def _unpacked(data: Any, member: _Member, name: str) -> bytes:
    """A member's bytes in memory: for pickles, and for the rare compressed storage."""
    raw = data[member.start : member.start + member.packed]
    if member.method == 0:
        return raw
    engine = zlib.decompressobj(-15)
    try:
        out = engine.decompress(raw, member.size + 1)
    except zlib.error as error:
        raise CheckpointError(f"the zip entry {_text(name)!r} is damaged ({error})") from error
    if len(out) != member.size or zlib.crc32(out) != member.crc:
        raise CheckpointError(
            f"the zip entry {_text(name)!r} unpacks to {len(out):,} of {member.size:,} bytes, or "
            f"to other bytes than were packed: download it again"
        )
    return out


def _load_zip(data: Any, size: int, name: str) -> _Loaded:
    members = _zip_members(data, size)
    if members is None:
        raise _zip_without_directory(data, size)
    loaded = _Loaded("zip", data, size, members=members)
    pickles = [m for m in members if m.count("/") == 1 and m.endswith("/data.pkl")]
    if len(pickles) > 1:
        raise CheckpointError(
            f"the zip archive holds {len(pickles)} checkpoints: {_text(', '.join(pickles))}"
        )
    if not pickles:
        raise CheckpointError(_zip_contents(members))
    root = loaded.archive = pickles[0][: -len("data.pkl")]
    script = f"{root}constants.pkl" in members or any(m.startswith(f"{root}code/") for m in members)
    if script:
        loaded.kind = "TorchScript"
        loaded.problem = (
            "it is a TorchScript program (torch.jit.save), code and weights together. In PyTorch: "
            f"torch.save(torch.jit.load({name!r}).state_dict(), 'state_dict.pth'), and read that"
        )
    order = members.get(f"{root}byteorder")
    if order is not None:
        text = _unpacked(data, order, "byteorder") if order.size < 64 else b"?"
        if text not in (b"little", b"big"):
            raise CheckpointError(f"its byte order is neither little nor big: {text[:20]!r}")
        loaded.big_endian = text == b"big"
    member = members[pickles[0]]
    if member.size > MAX_PICKLE:
        raise CheckpointError(f"its pickle of {member.size:,} bytes is no state dict's")
    storages = _Storages()
    pickle = _unpacked(data, member, pickles[0])
    machine = _Machine(pickle, 0, len(pickle), _Budget(), loaded.refused, storages)
    try:
        loaded.root = machine.run()
    except CheckpointError:
        if not (script or loaded.refused):
            raise
    extra = members.get(f"{root}extra/metadata.json")
    if extra is not None and extra.size <= MAX_HEADER:
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(_unpacked(data, extra, "metadata.json"))
            loaded.metadata = {str(k): str(v) for k, v in found.items()} if found else {}
    if not (script or loaded.refused):
        _check_zip_storages(loaded, storages)
    return loaded


def _check_zip_storages(loaded: _Loaded, storages: _Storages) -> None:
    for key, storage in storages.known.items():
        member = loaded.members.get(f"{loaded.archive}data/{key}")
        if member is None:
            raise CheckpointError(
                f"storage data/{_text(key)} is missing from the zip archive: download it again"
            )
        if member.size < storage.nbytes:
            raise CheckpointError(
                f"storage data/{_text(key)} has {member.size:,} of {storage.nbytes:,} bytes: "
                f"download it again"
            )
        storage.start = member.start


def _zip_contents(members: dict[str, _Member]) -> str:
    """What a zip archive that is no checkpoint is instead."""
    names = list(members)
    if "model.weights.h5" in members:
        return "it is a Keras model file: open it with keras.saving.load_model"
    if names and all(n.endswith(".npy") for n in names):
        return "it is a NumPy .npz file: open it with numpy.load"
    inside = [n for n in names if n.endswith((".pth", ".pt", ".th", ".safetensors"))]
    if inside:
        return f"it is a zip archive with {_text(inside[0])!r} inside: unpack it and read that"
    shown = ", ".join(_text(n, 40) for n in names[:5]) or "nothing"
    return f"it is a zip archive without data.pkl, so no PyTorch checkpoint; it holds {shown}"


def _zip_without_directory(data: Any, size: int) -> CheckpointError:
    """Says what a truncated zip archive has, from its pickle and its local headers."""
    lost = f"the zip archive's directory is missing, so the file was cut off at {size:,} bytes"
    again = "download it again"
    if size < 30:
        return CheckpointError(f"{lost}: {again}")
    n, extra = struct.unpack_from("<2H", data, 26)
    first = data[30 : 30 + min(n, MAX_IDENTIFIER)].decode("utf-8", "replace")
    position = 30 + n + extra
    if not first.endswith("data.pkl"):
        return CheckpointError(f"{lost}: {again}")
    storages, refused = _Storages(), {}
    machine = _Machine(data, position, size, _Budget(), refused, storages)
    try:
        machine.run()
    except CheckpointError:
        return CheckpointError(f"{lost}, inside its data.pkl: {again}")
    position, complete, partial = machine.position, 0, ""
    for _ in range(len(storages.known) + 16):
        # Between members lie a data descriptor and, in newer files, small records.
        at = data.find(b"PK\x03\x04", position, min(size, position + 4096))
        if at < 0 or at + 30 > size:
            break
        n, extra = struct.unpack_from("<2H", data, at + 26)
        name = data[at + 30 : at + 30 + min(n, 1024)].decode("utf-8", "replace")
        position = at + 30 + n + extra
        storage = storages.known.get(name.rpartition("/data/")[2]) if "/data/" in name else None
        if storage is None:
            continue
        if position + storage.nbytes > size:
            there = max(0, size - position)
            key = f"data/{_text(storage.key)}"
            partial = f"; {key} ends at {there:,} of {storage.nbytes:,} bytes"
            break
        complete += 1
        position += storage.nbytes
    want = machine.position + sum(s.nbytes + 64 for s in storages.known.values())
    return CheckpointError(
        f"the zip archive ends at {size:,} of at least {want:,} bytes, with {complete:,} of "
        f"{len(storages.known):,} storages{partial}, and without its directory: {again}"
    )


def _load_stream(data: Any, size: int, name: str) -> _Loaded:
    """The pre-zip stream; also names what a pickle that is no checkpoint wants."""
    loaded = _Loaded("stream", data, size)
    budget, storages = _Budget(), _Storages()

    def pickle(start: int, persistent: Any = None) -> tuple[Any, int]:
        machine = _Machine(data, start, size, budget, loaded.refused, persistent)
        return machine.run(), machine.position

    try:
        magic, position = pickle(0, storages)
        loaded.root = magic
        if type(magic) is not int or magic != MAGIC:
            loaded.kind = "pickle"
            loaded.problem = (
                "it is a Python pickle, but no checkpoint: torch.save did not write it (it holds "
                f"{_text(_brief(magic), 60)}). Save the weights with torch.save or safetensors"
            )
            return loaded
        version, position = pickle(position)
        if type(version) is not int or version != PROTOCOL:
            raise CheckpointError(f"format version {_brief(version)} instead of {PROTOCOL}")
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
    if type(keys) is not list or any(type(k) not in (str, int) for k in keys):
        raise CheckpointError("its list of storages is damaged: download it again")
    missing = dict(storages.known)
    want = position + sum(8 + s.nbytes for s in storages.known.values())
    for key in map(str, keys):
        storage = missing.pop(key, None)
        if storage is None:
            raise CheckpointError(
                f"its list of storages names {_text(key)!r}, which no tensor uses"
                if key not in storages.known
                else f"its list of storages names {_text(key)!r} twice"
            )
        if position + 8 > size:
            raise _cut_off("the file", size, want)
        (numel,) = struct.unpack_from("<q", data, position)
        if numel != storage.numel:
            raise CheckpointError(
                f"storage {_text(key)!r} has {numel:,} elements where {storage.numel:,} were "
                f"announced: the file is damaged, download it again"
            )
        if position + 8 + storage.nbytes > size:
            raise _cut_off("the file", size, want)
        storage.start = position + 8
        position += 8 + storage.nbytes
    if missing:
        raise CheckpointError(
            f"storage {_text(next(iter(missing)))!r} is used and not stored: the file is damaged, "
            f"download it again"
        )
    return loaded


def _tar_members(data: Any, size: int) -> dict[str, tuple[int, int]]:
    """Name -> (start, length) of a tar archive's plain files; lengths may pass the file's end."""
    members: dict[str, tuple[int, int]] = {}
    position, count = 0, 0
    while position + 512 <= size:
        header = data[position : position + 512]
        if not header.strip(b"\0"):
            break
        count += 1
        total = sum(header) - sum(header[148:156]) + 8 * 32
        if count > 1000 or total != _octal(header[148:156]):
            raise CheckpointError(f"the tar archive is damaged at byte {position:,}")
        length = _octal(header[124:136])
        kind, start = header[156:157], position + 512
        name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
        name = name.removeprefix("./")
        if kind in (b"0", b"\0"):
            if name in members:
                raise CheckpointError(f"the tar archive holds {_text(name)!r} twice")
            members[name] = (start, length)
        elif kind in (b"x", b"g"):
            # Dates, which is all that torch's tar files put here. A name or size here would
            # replace the header's.
            extended = data[start : start + min(length, 4096)]
            if length > 4096 or re.search(rb" (path|size|linkpath|GNU\.sparse\S*)=", extended):
                raise CheckpointError("a tar archive with extended names or sizes")
        elif kind != b"5":
            raise CheckpointError(
                f"the tar archive's {_text(name)!r} is a link or a special file, not plain bytes"
            )
        position = start + -(-length // 512) * 512
    return members


def _octal(field: bytes) -> int:
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,12}", text):
        raise CheckpointError("the tar archive has a damaged header")
    return int(text, 8)


def _load_tar(data: Any, size: int, name: str) -> _Loaded:
    members = _tar_members(data, size)
    lacking = [n for n in ("pickle", "tensors", "storages") if n not in members]
    if lacking:
        inside = [n for n in members if n.endswith((".pth", ".pt", ".th", ".safetensors"))]
        if inside:
            raise CheckpointError(
                f"it is a tar archive with {_text(inside[0])!r} inside: unpack it and read that"
            )
        if not members:
            raise CheckpointError(
                f"the tar archive is cut off at {size:,} bytes: download it again"
            )
        if set(members) & {"sys_info", "pickle", "tensors"}:
            raise CheckpointError(
                f"{lacking[0]!r} is missing from the tar archive, which ends at {size:,} bytes: "
                f"download it again"
            )
        shown = ", ".join(_text(n, 40) for n in list(members)[:5]) or "nothing"
        raise CheckpointError(
            f"it is a tar archive, but no PyTorch checkpoint; it holds {shown}: unpack it"
        )
    loaded = _Loaded("tar", data, size)
    budget = _Budget()
    known: dict[int, Any] = {}

    def bounds(member: str) -> tuple[int, int]:
        start, length = members[member]
        return start, min(start + length, size)

    def pickle(start: int, end: int, persistent: Any = None) -> tuple[Any, int]:
        machine = _Machine(data, start, end, budget, loaded.refused, persistent)
        return machine.run(), machine.position

    def lookup(pid: Any) -> Any:
        if type(pid) is tuple and pid:
            return pid[0]  # a class with its source text
        key = int(pid) if type(pid) is str and re.fullmatch(r"-?\d{1,20}", pid) else pid
        if type(key) is not int or key not in known:
            raise CheckpointError(f"tensor {_brief(pid)} is used and not stored")
        return known[key]

    # The names first: what the pickle wants is news even where storages are cut off.
    start, end = bounds("pickle")
    with contextlib.suppress(CheckpointError):
        pickle(start, end, lambda pid: _Parameter())
    if loaded.refused:
        return loaded
    start, length = members["storages"]
    if start + length > size:
        raise _cut_off("storages", max(0, size - start), length, size)
    try:
        _read_tar_storages(data, start, start + length, pickle, known)
        _read_tar_tensors(data, *bounds("tensors"), pickle, known)
        loaded.root, _ = pickle(*bounds("pickle"), lookup)
    except CheckpointError:
        if not loaded.refused:
            raise
    return loaded


def _read_tar_storages(data: Any, position: int, end: int, pickle: Any, known: dict) -> None:
    count, position = pickle(position, end)
    if type(count) is not int or not 0 <= count <= end - position:
        raise CheckpointError(f"storages claims {_brief(count)} entries")
    for _ in range(count):
        described, position = pickle(position, end)
        if type(described) is not tuple or len(described) != 3:
            raise CheckpointError("a storage is not described as (key, location, type)")
        key, _location, kind = described
        if type(key) is not int or type(kind) is not _Name or kind.value not in _SIZES:
            raise CheckpointError(f"a storage of the unknown type {_brief(kind)}")
        if position + 8 > end:
            raise CheckpointError("storages ends inside an entry: download it again")
        (numel,) = struct.unpack_from("<q", data, position)
        position += 8
        storage = _Storage(str(key), kind.value, numel)
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
            raise CheckpointError(f"storages has the view {_brief(view)}")
        root = known.get(view[1]) if type(view[1]) is int else None
        offset, numel = _integers(view[2:], "view")
        if type(root) is not _Storage or offset + numel > root.numel:
            raise CheckpointError(f"the view {_brief(view)} lies outside its storage")
        if root.view is not None:  # a view of a view: no chains
            root, first = root.view
            offset += first
        view_storage = _Storage(str(view[0]), root.dtype, numel, (root, offset))
        known[_tar_key(view[0], known)] = view_storage


def _tar_key(key: int, known: dict) -> int:
    """Keys were addresses. Those alone are hashed, and at most as many as the limit on entries."""
    if not -(2**63) <= key < 2**64 or key in known or len(known) > 10_000:
        raise CheckpointError(f"the key {_brief(key)} is not a new address")
    return key


def _read_tar_tensors(data: Any, position: int, end: int, pickle: Any, known: dict) -> None:
    count, position = pickle(position, end)
    if type(count) is not int or not 0 <= count <= end - position:
        raise CheckpointError(f"tensors claims {_brief(count)} entries")
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
        known[_tar_key(key, known)] = _plain(
            _Tensor(
                known.get(storage),
                numbers[-1],
                numbers[:dimensions],
                numbers[dimensions : 2 * dimensions],
            )
        )


def _load_safetensors(data: Any, size: int, name: str) -> _Loaded:
    """The format of https://github.com/huggingface/safetensors, which the README there defines."""
    (length,) = struct.unpack_from("<Q", data, 0)
    if length > size - 8:
        raise _cut_off("the header", size - 8, length, size)
    if length > MAX_HEADER:
        raise CheckpointError(f"its header of {length:,} bytes is above {MAX_HEADER:,}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is damaged ({_text(error)})") from error
    if type(header) is not dict:
        raise CheckpointError("its header is no JSON object")
    loaded = _Loaded("safetensors", data, size)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        raise CheckpointError("its __metadata__ is not text by name")
    loaded.metadata = metadata
    begin = 8 + length
    ranges, root = [], {}
    for key, entry in header.items():
        if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise CheckpointError(f"the entry {_text(key)!r} lacks dtype, shape or data_offsets")
        dtype = _SAFETENSORS.get(entry["dtype"]) if type(entry["dtype"]) is str else None
        offsets = _integers(entry["data_offsets"], "data_offsets")
        shape = _integers(entry["shape"], "shape")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise CheckpointError(f"the entry {_text(key)!r} has the offsets {_brief(offsets)}")
        ranges.append((*offsets, key))
        if dtype is None:
            root[key] = _Unreadable(_text(f"{entry['dtype']}", 20))
            continue
        if offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
            raise CheckpointError(
                f"the entry {_text(key)!r} has {offsets[1] - offsets[0]:,} bytes for "
                f"{_brief(shape)} of {dtype}"
            )
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        storage = _Storage(key, dtype, math.prod(shape))
        storage.start = begin + offsets[0]
        root[key] = _Tensor(storage, 0, shape, strides)
    reached = 0
    for first, last, key in sorted(ranges):
        if first != reached:
            raise CheckpointError(f"the bytes of {_text(key)!r} overlap others or leave a gap")
        reached = last
    if begin + reached > size:
        raise _cut_off("the file", size, begin + reached)
    if begin + reached < size:
        raise CheckpointError(f"{size - begin - reached:,} bytes follow its last tensor")
    loaded.root = root
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out


def _pickled_module(loaded: _Loaded) -> tuple[str, str] | None:
    """(class, how to index it) of a pickled torch module in the file, if that is what it is."""

    def is_module(value: Any) -> bool:
        return (
            type(value) is _Record
            and type(value.state) is dict
            and ("_modules" in value.state or "_parameters" in value.state)
        )

    root = loaded.root
    if is_module(root):
        return _text(root.name.full, 100), ""
    if type(root) is dict:
        for key, value in itertools.islice(root.items(), 1000):
            if is_module(value):
                return _text(value.name.full, 100), f"[{_text(key)!r}]"
    if root is None:
        layers = [n for n in loaded.refused if n.startswith("torch.nn.modules.")]
        if layers:  # the pickle broke off before the object was whole
            return _text(next(iter(loaded.refused)), 100), ""
    return None


# -------------------------------------------------------------------------------- tensors -> arrays


def _buffer(loaded: _Loaded, storage: _Storage, unit: int) -> tuple[Any, int, int]:
    """(buffer, first byte, past the last byte) of a root storage, in this machine's byte order."""
    swap = loaded.big_endian and unit > 1
    member = loaded.members.get(f"{loaded.archive}data/{storage.key}")
    if not swap and (member is None or member.method == 0):
        return loaded.data, storage.start, storage.start + storage.nbytes
    known = loaded.buffers.get((storage.key, unit if swap else 0))
    if known is None:
        packed = member is not None and member.method == 8
        raw = (
            _unpacked(loaded.data, member, storage.key)
            if packed
            else memoryview(loaded.data)[storage.start : storage.start + storage.nbytes]
        )
        known = raw
        if swap:
            whole = len(raw) // unit * unit
            known = np.frombuffer(raw[:whole], f"u{unit}").byteswap().view("u1")
            known.flags.writeable = False
        loaded.buffers[storage.key, unit if swap else 0] = known
    return known, 0, len(known)
