"""Weight files in the zip format: a pickle, and a file for each storage."""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
import zipfile
import zlib
from typing import Any

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.loaded import Loaded, Member, Storages
from keras_resnet.weights.pickles import read_pickle
from keras_resnet.weights.stand_ins import MAX_IDENTIFIER, MAX_PICKLE, Budget, one_line

MAX_ENTRIES = 50_000
MAX_DIRECTORY = 5 << 19
MAX_METADATA = 2 << 20
MAX_INFLATION = 32 << 20  # decompressed bytes beyond 1.1 for each of the file's
_BLOCK = 1 << 14  # read at a time; unpacks to 16 MiB at most


def load_zip(data: Any, size: int, name: str) -> Loaded:
    """Understands a zip archive that torch.save wrote; its storages stay where they are."""
    members = zip_members(data, size)
    if members is None:
        raise _without_directory(data, size)
    loaded = Loaded("zip", data, size, members=members)
    # PyTorch takes the folder of the first entry, and looks nowhere else.
    first = next(iter(members), b"")
    root = loaded.archive = first[: first.find(b"/") + 1]
    member = loaded.member("data.pkl") if root else None
    if member is None:
        raise CheckpointError(_contents(members))
    outside = [_shown(m) for m in members if not m.startswith(root)]
    if outside:
        raise CheckpointError(
            f"the zip archive holds {outside[0]!r} outside of its folder {_shown(root)!r}, which "
            f"PyTorch refuses: zip that folder alone, without compression"
        )
    if loaded.member("constants.pkl") or any(m.startswith(root + b"code/") for m in members):
        loaded.kind = "TorchScript"
        loaded.refused["torch.jit.load"] = None  # which is what torch.load calls
        loaded.problem = (
            "it is a TorchScript program (torch.jit.save), code and weights together. In PyTorch: "
            f"torch.save(torch.jit.load({name!r}).state_dict(), 'state_dict.pth'), and read that"
        )
    order = loaded.member("byteorder")
    if order is not None:
        text = unpacked(data, order, "byteorder") if order.size < 64 else b"?"
        if text not in (b"little", b"big"):
            raise CheckpointError(f"its byte order is neither little nor big: {text[:20]!r}")
        loaded.big_endian = text == b"big"
    if member.size > MAX_PICKLE:
        raise CheckpointError(f"its pickle of {member.size:,} bytes is no state dict's")
    storages = Storages()
    pickle = unpacked(data, member, "data.pkl")
    try:
        loaded.root, _ = read_pickle(pickle, 0, member.size, Budget(), loaded.refused, storages)
    except CheckpointError:
        if not loaded.refused:
            raise
    _read_metadata(loaded)
    if not loaded.refused:
        _place_storages(loaded, storages)
    return loaded


def _read_metadata(loaded: Loaded) -> None:
    """The text that `write_checkpoint` puts beside the tensors; anything else is ignored."""
    name = "extra/metadata.json"
    member = loaded.member(name)
    if member is None:
        return
    found = None
    if member.size <= MAX_METADATA:
        with contextlib.suppress(ValueError, RecursionError):  # CheckpointError is a ValueError
            found = json.loads(unpacked(loaded.data, member, name))
    if type(found) is dict:
        loaded.metadata = {str(key): str(value) for key, value in found.items()}
    else:
        loaded.notes[name] = "ignored: it is no JSON object"


def _place_storages(loaded: Loaded, storages: Storages) -> None:
    for key, storage in storages.roots.items():
        member = loaded.member(f"data/{key}")
        if member is None:
            raise CheckpointError(
                f"storage data/{one_line(key)} is missing from the zip archive: download it again"
            )
        if member.size < storage.nbytes:
            raise CheckpointError(
                f"storage data/{one_line(key)} has {member.size:,} of {storage.nbytes:,} bytes: "
                f"download it again"
            )
        storage.start = member.start


# ---------------------------------------------------------------------------------- the directory


def zip_members(data: Any, size: int) -> dict[bytes, Member] | None:
    """The archive's directory by `zipfile`, under stricter rules; None where it has none.

    Names are in small letters, since PyTorch's look-up ignores the case of ASCII. None is there
    twice or has a NUL, where the look-up would end; no entry is contradicted by its own header, or
    lies outside the file or in another; no size is one that the compressed bytes cannot reach.
    """
    directory = _directory(data, size)
    if directory is None:
        return None
    count, start = directory
    try:
        with zipfile.ZipFile(data) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"the zip archive's directory is damaged ({one_line(error)}): download it again"
        ) from error
    if len(entries) != count:
        raise CheckpointError(
            f"the zip archive's directory is damaged: it has {len(entries):,} of {count:,} entries"
        )
    members: dict[bytes, Member] = {}
    for entry in entries:
        raw = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        if raw.lower() in members:
            raise CheckpointError(
                f"the zip entry {_shown(raw)!r} is there twice (PyTorch ignores case)"
            )
        if b"\0" in raw:
            raise CheckpointError(f"the zip entry {_shown(raw)!r} has a NUL in its name")
        members[raw.lower()] = _member(data, entry, raw, _shown(raw), start)
    reached = 0
    for member in sorted(members.values(), key=lambda m: m.header):
        if member.header < reached:
            raise CheckpointError("the zip archive's entries overlap")
        reached = member.start + member.packed
    inflated = sum(m.size for m in members.values() if m.method == zipfile.ZIP_DEFLATED)
    if inflated > 1.1 * size + MAX_INFLATION:
        raise CheckpointError(
            f"the zip archive would unpack to {inflated:,} bytes from {size:,}: weights do not "
            f"compress like that"
        )
    return members


def _directory(data: Any, size: int) -> tuple[int, int] | None:
    """How many entries the directory claims, and where it begins; None where there is none.

    `zipfile` takes the directory to lie right before its end record, wherever the record says it
    is, and shifts every entry by the difference; PyTorch believes the record. Only where both
    agree is the file one archive.
    """
    at = data.rfind(b"PK\x05\x06", max(0, size - 65557), size)
    if at < 0 or at + 22 > size:
        return None
    disk, first_disk, _, count, length, start, comment = struct.unpack_from("<4H2IH", data, at + 4)
    limit = at
    if at >= 76 and data[at - 20 : at - 16] == b"PK\x06\x07":
        (limit,) = struct.unpack_from("<Q", data, at - 12)
        if limit != at - 76 or data[limit : limit + 4] != b"PK\x06\x06":
            raise CheckpointError("the zip archive's 64-bit directory is damaged")
        short = (count, length, start)
        disk, first_disk, _, count, length, start = struct.unpack_from("<2I4Q", data, limit + 16)
        for old, new, full in zip(
            short, (count, length, start), (0xFFFF, 2**32 - 1, 2**32 - 1), strict=True
        ):
            if old not in (new, full):
                raise CheckpointError("the zip archive's directory contradicts its 64-bit one")
    if disk or first_disk:
        raise CheckpointError("one part of a zip archive in several parts: join them first")
    if start + length != limit or at + 22 + comment != size:
        raise CheckpointError(
            f"the zip archive's directory should lie at bytes {start:,} to {start + length:,} of "
            f"{size:,}: the file is damaged, download it again"
        )
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise CheckpointError(f"the zip archive claims {count:,} entries in {length:,} bytes")
    return count, start


def _member(data: Any, entry: zipfile.ZipInfo, raw: bytes, shown: str, end: int) -> Member:
    """An entry of the directory, believed only where its local header agrees."""
    method, packed, unpacked_size = entry.compress_type, entry.compress_size, entry.file_size
    header = entry.header_offset
    if unpacked_size and (raw.endswith(b"/") or entry.external_attr & 0x10):
        raise CheckpointError(f"the zip entry {shown!r} is a folder with contents of its own")
    if entry.flag_bits & 1:
        raise CheckpointError(f"the zip entry {shown!r} is encrypted: unpack it first")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"the zip entry {shown!r} is packed by method {method}: unpack it and zip it again "
            f"without compression"
        )
    if header + 30 > end or data[header : header + 4] != b"PK\x03\x04":
        raise CheckpointError(f"the zip entry {shown!r} is not where it should be")
    local_method, length, extra = struct.unpack_from("<H16x2H", data, header + 8)
    start = header + 30 + length + extra
    if data[header + 30 : header + 30 + length] != raw or local_method != method:
        raise CheckpointError(f"the zip entry {shown!r} contradicts its own header")
    if start + packed > end:
        raise CheckpointError(
            f"the zip entry {shown!r} claims {packed:,} bytes where {max(0, end - start):,} are "
            f"left"
        )
    stored = method == zipfile.ZIP_STORED
    if (stored and packed != unpacked_size) or unpacked_size > packed * 1032 + 64:
        raise CheckpointError(
            f"the zip entry {shown!r} claims {unpacked_size:,} bytes from {packed:,}"
        )
    return Member(method, packed, unpacked_size, entry.CRC, header, start)


def unpacked(data: Any, member: Member, name: str) -> bytearray:
    """A member's bytes in memory: for pickles, and for a compressed or big-endian storage.

    The file's pages are let go as soon as they are read, so that the bytes are there once.
    """
    out, filled, complete = bytearray(member.size), 0, True
    engine = zlib.decompressobj(-15) if member.method == zipfile.ZIP_DEFLATED else None
    end = member.start + member.packed
    try:
        for at in range(member.start, end, _BLOCK):
            piece = data[at : min(at + _BLOCK, end)]
            if engine is not None:
                piece = engine.decompress(piece, member.size - filled + 1)
                complete = engine.eof
            if len(piece) > member.size - filled:
                complete = False
                break
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            if at // _BLOCK % 64 == 63 and isinstance(data, mmap.mmap):
                forget = at - 63 * _BLOCK
                data.madvise(mmap.MADV_DONTNEED, forget - forget % mmap.PAGESIZE, 64 * _BLOCK)
    except zlib.error as error:
        raise CheckpointError(f"the zip entry {one_line(name)!r} is damaged ({error})") from error
    if filled != member.size or not complete or (engine and zlib.crc32(out) != member.crc):
        raise CheckpointError(
            f"the zip entry {one_line(name)!r} unpacks to {filled:,} of {member.size:,} bytes, "
            f"or to other bytes than were packed: download it again"
        )
    return out


def _shown(raw: bytes) -> str:
    return one_line(raw.decode("utf-8", "replace"))


def _contents(members: dict[bytes, Member]) -> str:
    """What a zip archive that is no checkpoint is instead."""
    names = [name.decode("utf-8", "replace") for name in members]
    if b"model.weights.h5" in members:
        return "it is a Keras model file: open it with keras.saving.load_model"
    if names and all(n.endswith(".npy") for n in names):
        return "it is a NumPy .npz file: open it with numpy.load"
    inside = [n for n in names if n.endswith((".pth", ".pt", ".th", ".safetensors"))]
    if inside:
        return f"it is a zip archive with {one_line(inside[0])!r} inside: unpack it and read that"
    shown = ", ".join(one_line(n, 40) for n in names[:5]) or "nothing"
    return f"it is a zip archive without data.pkl, so no PyTorch checkpoint; it holds {shown}"


def _without_directory(data: Any, size: int) -> CheckpointError:
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
    storages = Storages()
    try:
        _, position = read_pickle(data, position, size, Budget(), {}, storages)
    except CheckpointError:
        return CheckpointError(f"{lost}, inside its data.pkl: {again}")
    begin, complete, partial = position, 0, ""
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
            key = f"data/{one_line(storage.key)}"
            partial = f"; {key} ends at {there:,} of {storage.nbytes:,} bytes"
            break
        complete += 1
        position += storage.nbytes
    want = begin + sum(s.nbytes + 64 for s in storages.known.values())
    return CheckpointError(
        f"the zip archive ends at {size:,} of at least {want:,} bytes, with {complete:,} of "
        f"{len(storages.known):,} storages{partial}, and without its directory: {again}"
    )
