"""Reads a pickle with Python's own unpickler, which gets nothing to hold but stand-ins.

A pickle is a program for a small stack machine. `pickle.Unpickler` runs it; what the program may do
is decided in two places:

1. A pass over the instructions, by `pickletools`' table of them, bounds their number, lengths,
   memo and protocol before anything is allocated, and writes the same program without what the
   unpickler would do by itself. It would call what it finds, copy the values of each call, and
   hash every key of a dict, though numbers can be chosen so that their hashes collide and nested
   tuples so deep that hashing them overflows the stack. So a call becomes a persistent id (of the
   function and its values), a new dict a persistent id too, a set a list, a bytearray bytes.
2. `find_class` and `persistent_load` answer with stand-ins (`stand_ins.py`) alone. No name in the
   file is imported or looked up; a harmless name (`pickle_names.py`) makes a description, any
   other is noted and makes a record of the call.

So a hostile file can be read to its end, and what it wants can be named, without any of it
happening.
"""

from __future__ import annotations

import codecs
import contextlib
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from typing import Any

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.pickle_names import HARMLESS
from keras_resnet.weights.stand_ins import (
    MAX_IDENTIFIER,
    MAX_PICKLE,
    Budget,
    Dict,
    Name,
    Record,
    Span,
    brief,
    one_line,
)

MAX_INT_BYTES = 255
MAX_PROTOCOL = 5


def read_pickle(
    data: Any,
    start: int,
    end: int,
    budget: Budget,
    refused: dict[str, None],
    persistent: Callable[[Any], Any] | None = None,
    most: int = MAX_PICKLE,
) -> tuple[Any, int]:
    """The object that a pickle describes, of stand-ins and plain values, and where it ended.

    The budget is shared by all pickles of a file. `refused` collects the names that are not
    harmless, in order; `persistent` makes storages of persistent ids; the pickle may have as many
    bytes as `most`.

    Raises:
        CheckpointError: It is damaged, or more than a state dict needs.
    """
    program = _Pass(data, start, end, budget, most)
    try:
        program.run()
    except CheckpointError as error:
        # What it wanted before it broke is news all the same.
        stopped = not _Reader(program, Budget(), refused, persistent).names()
        if stopped and not isinstance(error, Damaged):
            raise Damaged(str(error)) from None
        raise
    return _Reader(program, budget, refused, persistent).value(start), program.position


class Damaged(CheckpointError):
    """Any unpickler would have stopped here; other errors are about our limits."""


class _Truncated(Damaged):
    """The bytes end inside a pickle."""


# ------------------------------------------------------------------- the pass over the instructions

_COUNTS = {
    pickletools.TAKEN_FROM_ARGUMENT1: struct.Struct("<B"),
    pickletools.TAKEN_FROM_ARGUMENT4: struct.Struct("<i"),
    pickletools.TAKEN_FROM_ARGUMENT4U: struct.Struct("<I"),
    pickletools.TAKEN_FROM_ARGUMENT8U: struct.Struct("<Q"),
}
_BUFFERS = ("NEXT_BUFFER", "READONLY_BUFFER")  # bytes outside the pickle
# By instruction: pickletools' number for what follows it (0: nothing), None where there is none.
_FOLLOWS: list[int | None] = [None] * 256
for _op in pickletools.opcodes:
    if _op.name not in _BUFFERS:
        _FOLLOWS[ord(_op.code)] = _op.arg.n if _op.arg else 0
# Names and calls cost three steps more than the others, dicts one.
_COSTS = [1] * 256
for _code in b"ciRoPQ\x81\x82\x83\x84\x92\x93":
    _COSTS[_code] = 4
for _code in b"}d":
    _COSTS[_code] = 2
# What is written instead; `_Reader.persistent_load` tells the ids apart by their form.
_INSTEAD = {
    ord(b"Q"): b"\x85Q",  # BINPERSID: the id as a tuple of one
    ord(b"R"): b"\x86Q",  # REDUCE: (function, values)
    0x81: b"N\x87Q",  # NEWOBJ: (class, values, None)
    0x92: b"\x87Q",  # NEWOBJ_EX: (function, values, values by name)
    ord(b"}"): b")Q",  # EMPTY_DICT: ()
    ord(b"d"): b"lQ",  # DICT: the list of keys and values
    0x8F: b"]",  # EMPTY_SET
    0x90: b"e",  # ADDITEMS
    0x91: b"t",  # FROZENSET
    0x96: b"\x8e",  # a short BYTEARRAY8, which would be allocated before it is read
}
_LONG = 4096  # bytes of a string from which on it is looked at
_BEYOND_LATIN_1 = re.compile(rb"[\xc4-\xff]")  # first bytes of such letters in UTF-8
# What Python 2's repr of a string can hold after a backslash.
_ESCAPE = re.compile(rb"\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2})")


class _Pass:
    """Checks a pickle's instructions and writes them anew, into `out`, up to `position`."""

    def __init__(self, data: Any, start: int, end: int, budget: Budget, most: int):
        self.data, self.position, self.budget, self.most = data, start, budget, most
        self.file_end, self.end = end, min(end, start + most)
        self.out, self.copied = bytearray(), start
        self.memo: set[int] = set()
        self.late: CheckpointError | None = None
        self.steps = 0

    def run(self) -> None:
        at = self.position
        try:
            while True:
                at = self.at = self.position
                if at >= self.end:
                    raise self.ended()
                code = self.data[at]
                follows = _FOLLOWS[code]
                if follows is None:
                    raise Damaged(f"byte {code:#04x} is no pickle instruction")
                self.steps += _COSTS[code]
                if self.steps > self.budget.steps:
                    self.budget.spend(self.steps)
                self.position = at + 1
                if follows:
                    self.skip(code, follows)
                if self.copied > at:  # a span
                    continue
                if code in _INSTEAD:
                    self.write(at, at + 1, _INSTEAD[code])
                elif code in _CHECKS:
                    _CHECKS[code](self, at)
                elif code == 0x2E:  # STOP
                    break
            self.budget.spend(self.steps)
            at = self.position
            if self.late:
                raise self.late
        except _Truncated:
            raise
        except CheckpointError as error:
            raise type(error)(f"its pickle, at byte {self.position:,}: {error}") from None
        finally:
            with memoryview(self.data) as view:
                self.out += view[self.copied : at]

    def skip(self, code: int, follows: int) -> None:
        """Passes over what follows an instruction."""
        if follows > 0:
            self.take(follows)
        elif follows in _COUNTS:
            count = _COUNTS[follows]
            at = self.take(count.size)
            (length,) = count.unpack_from(self.data, at)
            self.take(length)
            if code in b"\x8a\x8b" and length > MAX_INT_BYTES:
                raise CheckpointError(f"an integer of {length:,} bytes")
            if length > _LONG and code in b"B\x8e\x96":
                self.span(self.position - length)
            elif length > _LONG and code in b"X\x8d":
                self.wide(self.position - length)
        else:
            start = self.position
            for _ in range(2 if code in b"ci" else 1):
                self.line(MAX_PICKLE if code in b"SV" else 2 * MAX_IDENTIFIER)
            if self.position - start > _LONG:
                self.wide(start, escapes=True)

    def wide(self, start: int, escapes: bool = False) -> None:
        """Pays for long text that may take four times its bytes: with letters beyond latin-1."""
        text = self.data[start : self.position]
        if (escapes and b"\\" in text) or _BEYOND_LATIN_1.search(text):
            self.budget.spend_bytes(3 * len(text))

    def span(self, start: int) -> None:
        """Leaves long bytes where they are, and writes their place as an id of sixteen bytes."""
        place = struct.pack("<QQ", start, self.position - start)
        self.write(self.at, self.position, b"C\x10" + place + b"Q")

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        at = self.position
        if count < 0 or count > self.end - at:
            if count > self.file_end - at >= 0:
                raise _Truncated(
                    f"its pickle is cut off or damaged at byte {at:,}: it wants {count:,} more "
                    f"bytes where {self.file_end - at:,} are left"
                )
            raise CheckpointError(f"a length of {count:,} bytes")
        self.position = at + count
        return at

    def line(self, limit: int) -> None:
        at = self.position
        stop = self.data.find(b"\n", at, min(self.end, at + limit))
        if stop < 0:
            if self.end - at < limit:
                raise self.ended()
            # What no name or number begins with is an error to any unpickler.
            plausible = re.fullmatch(rb"[\w.+-]*", self.data[at : at + limit])
            raise (CheckpointError if plausible else Damaged)(f"a line of more than {limit} bytes")
        self.position = stop + 1

    def ended(self) -> CheckpointError:
        if self.end < self.file_end:
            return CheckpointError(f"the pickle is longer than {self.most:,} bytes")
        return _Truncated(f"its pickle is cut off at byte {self.file_end:,}")

    def write(self, start: int, stop: int, instead: bytes) -> None:
        """Writes what lies before `start` as it is, and other bytes up to `stop`."""
        self.out += self.data[self.copied : start]
        self.out += instead
        self.copied = stop

    def number(self, at: int) -> int:
        """The number after the instruction at `at`, in bytes or in digits."""
        raw = self.data[at + 1 : self.position]
        if self.data[at] not in b"pg":
            return int.from_bytes(raw, "little")
        line = raw[:-1]
        if len(line) > 10 or not line.isdigit():
            kind = CheckpointError if line.isdigit() else Damaged
            raise kind(f"{one_line(line.decode('latin-1'), 40)!r} is no memo entry")
        return int(line)

    def protocol(self, at: int) -> None:
        if self.number(at) > MAX_PROTOCOL:
            raise Damaged(f"a pickle protocol above {MAX_PROTOCOL}")
        self.write(at, self.position, b"")

    def frame(self, at: int) -> None:
        if self.number(at) > self.file_end - self.position:
            raise _Truncated(
                f"its pickle is cut off: a frame at byte {self.position:,} is incomplete"
            )
        self.write(at, self.position, b"")

    def put(self, at: int) -> None:
        # Writers number their memo in order, so an index is never above the steps taken.
        index = self.number(at)
        if index > max(255, self.steps):
            # It is left out, and an error at the end, or where it would matter.
            self.late = CheckpointError(f"memo entry {index:,} after {self.steps:,} steps")
            self.write(at, self.position, b"")
        else:
            self.memo.add(index)

    def memoize(self, at: int) -> None:
        if self.late:
            raise self.late
        self.memo.add(len(self.memo))

    def get(self, at: int) -> None:
        index = self.number(at)
        if index not in self.memo:
            raise self.late or Damaged(f"memo entry {index:,} was never written")

    def extension(self, at: int) -> None:
        self.write(at, self.position, f"ccopyreg\nextension {self.number(at)}\n".encode())

    def text(self, at: int, raw: bytes) -> None:
        """Python 2's text without an encoding, which torch takes for UTF-8; else it is latin-1."""
        if not raw.isascii():
            with contextlib.suppress(UnicodeDecodeError):
                raw.decode("utf-8")
                self.write(at, self.position, b"X" + struct.pack("<I", len(raw)) + raw)

    def binary(self, at: int) -> None:
        start = at + (2 if self.data[at] == ord(b"U") else 5)
        if self.position - start > _LONG:
            if not self.is_text(start):  # the numbers of an array
                return self.span(start)
            self.wide(start)
        self.text(at, self.data[start : self.position])

    def is_text(self, start: int) -> bool:
        """Whether long bytes are UTF-8, found without a copy of them."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for i in range(start, self.position, _LONG):
                last = i + _LONG >= self.position
                decoder.decode(self.data[i : min(i + _LONG, self.position)], final=last)
        except UnicodeDecodeError:
            return False
        return True

    def quoted(self, at: int) -> None:
        inside = self.data[at + 1 : self.position - 1]
        if len(inside) < 2 or inside[:1] != inside[-1:] or inside[:1] not in (b"'", b'"'):
            raise Damaged("a string without quotes")
        inside = inside[1:-1]
        if b"\\" in inside:
            self.steps += inside.count(b"\\")
            if self.steps > self.budget.steps:
                self.budget.spend(self.steps)
            if b"\\" in _ESCAPE.sub(b"", inside):
                raise CheckpointError("a string with an escape that Python does not write")
            inside = codecs.escape_decode(inside)[0]  # type: ignore[attr-defined]
        self.text(at, inside)


_CHECKS: dict[int, Callable[[_Pass, int], None]] = {
    0x80: _Pass.protocol,
    0x95: _Pass.frame,
    0x94: _Pass.memoize,
    **dict.fromkeys(b"pqr", _Pass.put),
    **dict.fromkeys(b"ghj", _Pass.get),
    **dict.fromkeys(b"\x82\x83\x84", _Pass.extension),
    ord(b"S"): _Pass.quoted,
    **dict.fromkeys(b"TU", _Pass.binary),
}


# ------------------------------------------------------------------------------------ the unpickler

# What the unpickler raises where a pickle is damaged.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError),
    *(TypeError, ValueError, OverflowError, RecursionError),
)


class _Framed:
    """What `_Pass` wrote as a file, without a copy of it.

    A frame around the whole lets the unpickler take it at once, not byte by byte.
    """

    def __init__(self, program: bytearray):
        self.parts = [b"\x95", struct.pack("<Q", len(program)), program]

    def read(self, size: int) -> Any:
        """The next part, which is what is asked for."""
        return self.parts.pop(0) if self.parts and len(self.parts[0]) == size else b""

    readline = read


class _Reader(pickle.Unpickler):
    """Runs what `_Pass` wrote."""

    def __init__(
        self,
        program: _Pass,
        budget: Budget,
        refused: dict[str, None],
        persistent: Callable[[Any], Any] | None,
    ):
        super().__init__(_Framed(program.out), encoding="latin-1")
        self.data = program.data
        self.budget, self.refused, self.persistent = budget, refused, persistent
        self.names_only = False

    def value(self, start: int) -> Any:
        """The object, of a pickle that began at byte `start`."""
        try:
            return self.load()
        except CheckpointError as error:
            raise CheckpointError(f"its pickle, begun at byte {start:,}: {error}") from None
        except _DAMAGE as error:
            raise Damaged(
                f"its pickle, begun at byte {start:,}, is damaged "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error

    def names(self) -> bool:
        """Runs for the names alone, calls make records; whether it came to the end."""
        self.names_only = True
        try:
            self.load()
        except EOFError:
            return True
        except (CheckpointError, *_DAMAGE):
            return False
        return True

    def find_class(self, module: str, name: str) -> Name:
        """The stand-in for a name; one that is not harmless is noted, and made no less inert."""
        if len(module) > MAX_IDENTIFIER or len(name) > MAX_IDENTIFIER:
            raise CheckpointError(f"a name of {max(len(module), len(name)):,} characters")
        full = f"{module}.{name}"
        if full in HARMLESS:
            return Name(full, *HARMLESS[full])
        # Pickles name os.system after the module it really lives in, which nobody looks for.
        homes = {"posix": "os", "nt": "os", "__builtin__": "builtins"}
        top, dot, rest = module.partition(".")
        full = f"{homes.get(top, top)}{dot}{rest}.{name}"
        if module == "copyreg" and name.startswith("extension "):
            full = f"{module} {name}"
        if len(self.refused) < 1000:
            self.refused[one_line(full, 2 * MAX_IDENTIFIER)] = None
        return Name(full)

    def persistent_load(self, pid: Any) -> Any:
        """An id of the file, or what `_Pass` wrote as one: see `_INSTEAD`."""
        if type(pid) is list:
            return self.dict_of(pid)
        if type(pid) is str:
            return self.identified(pid)
        if type(pid) is bytes:
            return Span(self.data, *struct.unpack("<QQ", pid))
        if not pid:
            return Dict(self.budget)
        if len(pid) == 1:
            return self.identified(pid[0])
        made = self.call(*pid[:2])
        if len(pid) == 3 and type(made) is Record and isinstance(pid[2], dict):
            made.state = pid[2]
        if len(pid) == 3 and type(made) in (Dict, list):
            made.clear()  # what `__new__` alone makes of it
        return made

    def identified(self, pid: Any) -> Any:
        if self.persistent is None:
            raise pickle.UnpicklingError("a persistent id where none can be")
        return Record(Name("an id"), pid) if self.names_only else self.persistent(pid)

    def dict_of(self, items: list) -> Dict:
        if len(items) % 2:
            raise CheckpointError("a dict with a key and no value")
        out = Dict(self.budget)
        for index in range(0, len(items), 2):
            out[items[index]] = items[index + 1]
        return out

    def call(self, function: Any, args: Any) -> Any:
        """What a call would make: a container, a tensor's description, or a record of the call."""
        if type(args) is not tuple:
            raise CheckpointError("a call without a tuple of values")
        if type(function) is not Name:
            # A record of something refused can be "called" in turn; it stays a record.
            if type(function) is not Record:
                raise CheckpointError(f"a call of {brief(function)}, which is no function")
            return Record(function.name, args)
        if function.make is None or self.names_only:
            return Record(function, args)
        made = function.make(self, args)
        if made is not None:
            return made
        if function.full.endswith("._reconstructor") and args and type(args[0]) is Name:
            return Record(args[0], args)
        return Record(function, args)
