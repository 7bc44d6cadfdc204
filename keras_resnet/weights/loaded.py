"""A weight file opened, and the storages that its pickles speak of."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.dtypes import SIZES
from keras_resnet.weights.stand_ins import MAX_IDENTIFIER, Name, Storage, brief, counts, one_line

MAX_COPIES = 48 << 20


@dataclasses.dataclass(slots=True)
class Member:
    """One file inside a zip archive."""

    method: int
    packed: int
    size: int
    crc: int
    header: int
    start: int


@dataclasses.dataclass
class Loaded:
    """A file opened and understood, none of its numbers touched."""

    format: str
    data: Any
    size: int
    root: Any = None
    refused: dict[str, None] = dataclasses.field(default_factory=dict)
    kind: str = "state dict"
    problem: str | None = None  # why its tensors cannot be had, in a sentence
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # parts ignored, and why
    members: dict[bytes, Member] = dataclasses.field(default_factory=dict)  # by small letters
    archive: bytes = b""
    big_endian: bool = False
    buffers: dict[str, Any] = dataclasses.field(default_factory=dict)
    copied: int = 0  # bytes of the arrays that are no views of the file

    def member(self, name: str) -> Member | None:
        """A file of the archive, found as PyTorch finds it: whatever the case of its letters."""
        return self.members.get(self.archive + name.encode("utf-8", "replace").lower())

    def spend(self, count: int) -> None:
        """Takes bytes for an array that is no view of the file."""
        self.copied += count
        if self.copied > MAX_COPIES:
            raise CheckpointError(
                f"its tensors are stored in a way that takes more than {MAX_COPIES:,} bytes of "
                f"copies to read (complex32, conjugates, foreign byte order): save plain tensors"
            )


class Storages:
    """Makes storages from the persistent ids of the zip and stream formats."""

    def __init__(self):
        self.known: dict[str, Storage] = {}  # roots and views: torch keeps both under their keys
        self.kinds: dict[str, type] = {}  # of the keys, by their text

    @property
    def roots(self) -> dict[str, Storage]:
        """Those that are stored."""
        return {key: storage for key, storage in self.known.items() if storage.view is None}

    def __call__(self, pid: Any) -> Any:
        """The storage, or view of one, that a persistent id describes."""
        if type(pid) is tuple and len(pid) > 1 and pid[0] == "module":
            return pid[1]  # a class with its source text, from a pickled module
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise CheckpointError(f"the persistent id {brief(pid)} is no storage")
        kind, key, _location, numel = pid[1:5]
        view = pid[5] if len(pid) == 6 else None
        if type(kind) is not Name or kind.dtype not in SIZES:
            raise CheckpointError(f"a storage of the unknown type {brief(kind)}")
        (numel,) = counts((numel,), "storage size")
        key = self._key(key)
        storage = self.known.get(key)
        if storage is None:
            storage = self.known[key] = Storage(key, kind.dtype, numel)
        elif (storage.view, storage.numel) != (None, numel) or (
            numel and storage.dtype != kind.dtype
        ):
            raise CheckpointError(f"storage {one_line(key)!r} is described twice, differently")
        if view is not None:
            return self._view(storage, view)
        return storage if storage.dtype == kind.dtype else Storage(key, kind.dtype, 0, (storage, 0))

    def _key(self, key: Any) -> str:
        if type(key) not in (str, int) or (type(key) is str and len(key) > MAX_IDENTIFIER):
            raise CheckpointError(f"a storage with the key {brief(key)}")
        text = str(key)
        if self.kinds.setdefault(text, type(key)) is not type(key):
            raise CheckpointError(f"two storages with keys that read {one_line(text)!r}")
        return text

    def _view(self, root: Storage, view: Any) -> Storage:
        """Files before 0.4 share memory through views of a storage: (key, offset, size)."""
        if type(view) is not tuple or len(view) != 3:
            raise CheckpointError(f"storage {one_line(root.key)!r} has the view {brief(view)}")
        offset, numel = counts(view[1:], "view")
        if offset + numel > root.numel:
            raise CheckpointError(
                f"a view of storage {one_line(root.key)!r} ends at {offset + numel:,} of "
                f"{root.numel:,} elements"
            )
        key = self._key(view[0])
        made = self.known.get(key)
        if made is None:
            made = self.known[key] = Storage(key, root.dtype, numel, (root, offset))
        if (made.view, made.numel) != ((root, offset), numel):
            raise CheckpointError(f"storage {one_line(key)!r} is described twice, differently")
        return made


def cut_off(what: str, have: int, want: int, file_size: int | None = None) -> CheckpointError:
    """The error for something that ends too early, with its bytes."""
    at = "" if file_size is None else f" (the file has {file_size:,})"
    return CheckpointError(f"{what} ends at {have:,} of {want:,} bytes{at}: download it again")
