"""What a tar archive holds, by its headers alone: somebody else's file, so nothing is believed."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO

MOST_BYTES = 2**31 - 1  # of an image
_ELSEWHERE = frozenset(("", ".", ".."))  # parts of a name that lead somewhere
_NAMES = 2**16  # bytes of an entry's long name, at most


def read_at(file: IO[bytes], start: int, size: int) -> bytes:
    """Bytes of a file, fewer at its end."""
    file.seek(start)
    return file.read(size)


def entries(file: IO[bytes], size: int, skipped: Counter) -> Iterator[tuple[str, int, int]]:
    """Name, place and size of each plain file of a tar archive, with safe names.

    Raises:
        ValueError: It is damaged, or ambiguous: readers would not agree on what it holds.
    """
    position, block, at = 0, b"", 0
    name: bytes | None = None
    sparse = False
    while position + 512 <= size:
        if not at <= position <= at + len(block) - 512:
            block, at = read_at(file, position, 4096), position
        header = block[position - at : position - at + 512]
        if len(header) < 512 or not (header[0] or header.strip(b"\0")):
            return
        found, length, kind = _header(header, position)
        start = position + 512
        position = start + -(-length // 512) * 512
        if start + length > size:
            raise ValueError(f"it is cut off: an entry ends at byte {start + length:,}")
        if kind in b"xgL":
            if length > _NAMES:
                raise ValueError(f"an entry at byte {start:,} has a name of {length:,} bytes")
            data = read_at(file, start, length)
            if kind == b"L":
                name = data.split(b"\0")[0]
                continue
            records = _records(data, start)
            if b"size" in records or (kind == b"g" and b"path" in records):
                raise ValueError(f"an entry at byte {start:,} has a second size or name")
            if kind == b"x":
                name = records.get(b"path", name)
                sparse = sparse or any(key.startswith(b"GNU.sparse") for key in records)
            continue
        if kind == b"K":  # the long name of a link
            continue
        found, name = found if name is None else name, None
        sparse, was_sparse = False, sparse
        if kind == b"S":
            raise ValueError(f"an entry at byte {start:,} is sparse")
        plain = kind in b"\x000\x007" and not found.endswith(b"/")
        if not plain and length:
            raise ValueError(f"an entry at byte {start:,} is no plain file, and has a size")
        safe = _safe_name(found)
        reason = (
            "a link" if kind in b"12" else
            "a device or a pipe" if kind in b"346" else
            "sparse" if was_sparse else
            "a name that leads elsewhere" if plain and safe is None else
            "larger than any image" if length > MOST_BYTES else None
        )  # fmt: skip
        if reason:
            skipped[reason] += 1
        elif plain and safe is not None:
            yield safe, start, length


def _header(header: bytes, position: int) -> tuple[bytes, int, bytes]:
    """An entry's name, size and kind: POSIX.1-1988 (ustar) and GNU's, whose numbers differ."""
    try:
        # Most of it is zeros, and a million headers take a minute to add up byte by byte.
        total = 256 + sum(header.translate(None, b"\0")) - sum(header[148:156])
        if _number(header[148:156]) != total:
            raise ValueError
        length = _number(header[124:136])
    except (tarfile.TarError, ValueError):
        raise ValueError(f"its entry at byte {position:,} is damaged") from None
    if length < 0:
        raise ValueError(f"its entry at byte {position:,} has a size below 0")
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name, length, header[156:157]


def _number(field: bytes) -> int:
    digits = field.rstrip(b" \0")
    return int(digits, 8) if digits.isdigit() else tarfile.nti(field)


def _records(data: bytes, start: int) -> dict[bytes, bytes]:
    """The records of an extended header, each with its length before it: `28 path=a name`."""
    records, position = {}, 0
    while position < len(data):
        digits = data[position : position + 8].split(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[position + len(digits) + 1 : position + length]
        if position + length > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError(f"an extended header at byte {start:,} is damaged")
        key, _, value = record[:-1].partition(b"=")
        records[key] = value
        position += length
    return records


def _safe_name(name: bytes) -> str | None:
    text = name.decode("utf-8", "surrogateescape")
    while text.startswith("./"):
        text = text[2:]
    safe = _ELSEWHERE.isdisjoint(text.split("/")) and "\0" not in text
    return text if safe else None
