"""What the objects of a pickled weight file become: descriptions, in which nothing can happen."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.dtypes import SIZES

# Limits. A ResNet-50's pickle has about 8,000 steps (25 a tensor) and 40 kB; a file that needs
# more than this is no state dict, and what stays below it is done in a second and 200 MB.
MAX_STEPS = 500_000
MAX_PICKLE = 16 << 20
MAX_IDENTIFIER = 256
MAX_DIMENSIONS = 32  # NumPy 1 stops here; NumPy 2 and torch at 64


@dataclasses.dataclass
class Budget:
    """What may still be spent on a file, over all its pickles together."""

    steps: int = MAX_STEPS
    bytes: int = MAX_PICKLE
    unnamed: int = 0

    def spend(self, steps: int) -> None:
        """Takes steps; what takes longer than a step costs more, copies what they copy."""
        self.steps -= steps
        if self.steps < 0:
            raise CheckpointError(
                f"the pickle takes more than {MAX_STEPS:,} steps, which no state dict needs"
            )

    def spend_bytes(self, count: int) -> None:
        """Takes bytes that are copied."""
        self.bytes -= count
        if self.bytes < 0:
            raise CheckpointError("the pickle copies more bytes than a state dict needs")

    def key(self, value: Any) -> str:
        """A dict key as text: only strings are hashed, since integers can be made to collide."""
        if type(value) is str:
            return value
        if type(value) in (bool, float) and value == value // 1:
            value = int(value)  # equal keys are one
        if type(value) is int:
            return str(value)
        if type(value) is bytes:
            self.spend_bytes(len(value))
            return value.decode("latin-1")
        self.spend(3)
        self.unnamed += 1
        return f"<{one_line(brief(value), 40)} #{self.unnamed}>"


class StandIn:
    """An object of a pickle, that a pickle sets nothing on (`BUILD`) unless it says otherwise.

    It would set the attributes of a class, or the numbers of a tensor that is there already.
    """

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError(f"it changes {brief(self)} after it was made")


class Name(StandIn):
    """A name that a pickle asked for, `collections.OrderedDict` say; never the thing itself."""

    __slots__ = ("dtype", "full", "make")

    def __init__(self, full: str, make: Any = None, dtype: str | None = None):
        self.full = full  # with its module
        self.make = make  # what a call of it makes, in `pickle_names`; None where not harmless
        self.dtype = dtype  # the element type that it stands for, as `torch.FloatStorage` does

    def __call__(self, *args: Any) -> Record:
        """As `INST` and `OBJ` call it, the instructions for classes of Python 2."""
        return Record(self, args)


class Record(StandIn):
    """An object that a pickle would have made: which name, from what; nothing was called."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: Name, args: Any):
        self.name, self.args, self.state = name, args, None

    def __call__(self, *args: Any) -> Record:
        """As `INST` and `OBJ` call it; see `Name`."""
        return Record(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        """What is appended (`APPEND`, `APPENDS`) has no effect."""

    append = extend


class Dict(StandIn, dict):
    """A dict of the pickle, every key of it a string: see `Budget.key`."""

    __slots__ = ("budget", "spelled")

    def __init__(self, budget: Budget):
        self.budget = budget
        self.spelled: Any = ()  # keys that are no strings in the file

    def __setitem__(self, key: Any, value: Any) -> None:
        text = key if type(key) is str else self.budget.key(key)
        if type(key) is not str and text not in self:
            self.spelled = self.spelled or set()
            self.spelled.add(text)
        elif (type(key) is str) == (text in self.spelled):
            raise CheckpointError(f"a dict with two keys that read {one_line(text)!r}")
        dict.__setitem__(self, text, value)

    def __setstate__(self, state: Any) -> None:
        pass  # attributes, such as a state dict's `_metadata`


class Storage(StandIn):
    """A range of bytes with an element type; `view` is (storage, first element)."""

    __slots__ = ("data", "dtype", "key", "numel", "start", "view")

    def __init__(self, key: str, dtype: str, numel: int, view: tuple | None = None):
        self.key, self.dtype, self.numel, self.view = key, dtype, numel, view
        self.start: int | None = None  # where it begins in the file
        self.data: Any = None  # the mapping, where it is another file's than the `Loaded` one

    @property
    def nbytes(self) -> int:
        """Its length in the file."""
        return self.numel * SIZES[self.dtype]


class Tensor(StandIn):
    """Shape and strides (in elements) over a storage, checked to lie inside it."""

    __slots__ = ("conj", "dtype", "neg", "numel", "offset", "shape", "storage", "strides")

    def __init__(self, storage, offset, shape, strides, dtype=None, metadata=None):
        if type(storage) is not Storage:
            raise CheckpointError("a tensor is built on something that is no storage")
        self.storage, self.dtype = storage, dtype or storage.dtype
        self.shape = counts(shape, "shape")
        self.strides = counts(strides, "strides")
        (self.offset,) = counts((offset,), "offset")
        if len(self.shape) != len(self.strides):
            raise CheckpointError(
                f"a tensor has {len(self.shape)} dimensions and {len(self.strides)} strides"
            )
        self.numel = math.prod(self.shape)
        size = SIZES[self.dtype]
        if math.prod(n for n in self.shape if n) * size >= 2**62:
            raise CheckpointError(f"a tensor has the absurd shape {brief(self.shape)}")
        last = self.offset + sum(
            (n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if n
        )
        if self.numel and (last + 1) * size > storage.nbytes:
            raise CheckpointError(
                f"a tensor of shape {self.shape} reaches element {last:,} of storage "
                f"{one_line(storage.key)!r}, which has {storage.nbytes // size:,}"
            )
        bits = metadata if isinstance(metadata, dict) else {}
        self.conj, self.neg = bits.get("conj", False), bits.get("neg", False)
        if type(self.conj) is not bool or type(self.neg) is not bool:
            raise CheckpointError(f"a tensor's metadata are {brief(metadata)}")

    @property
    def nbytes(self) -> int:
        """The length of an array of it, which may be more than its storage's."""
        return self.numel * SIZES[self.dtype]


class Unreadable(StandIn):
    """A tensor of a kind that has no plain array: quantised, sparse, meta ..."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind


class Parameter(StandIn):
    """`torch.nn.Parameter` as files before 0.4 write it: made empty, its tensor set afterwards."""

    __slots__ = ("data",)

    def __init__(self, data: Any = None):
        self.data = data

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise CheckpointError("a Parameter's state is not what torch writes")
        self.data = state[0]


class NumpyType(StandIn):
    """`numpy.dtype("f4")` with its byte order, for plain numbers only."""

    __slots__ = ("code", "fixed", "size")

    def __init__(self, code: str, fixed: bool):
        self.code, self.fixed = code, fixed
        self.size = int(code[2:])

    def __setstate__(self, state: Any) -> None:
        # NumPy's own types cannot be changed, only copies of them.
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if not self.fixed and order in ("<", ">", "|", "="):
            self.code = order + self.code[1:]


class Span(StandIn):
    """A long string of bytes in a pickle, left where it is."""

    __slots__ = ("data", "size", "start")

    def __init__(self, data: Any, start: int, size: int):
        self.data, self.start, self.size = data, start, size

    def __len__(self) -> int:
        return self.size


class Array(StandIn):
    """A NumPy array inside the pickle; Python 2 wrote its bytes as text in latin-1."""

    __slots__ = ("code", "data", "fortran", "nbytes", "shape")

    def __init__(self):
        self.code, self.data, self.fortran, self.nbytes, self.shape = None, b"", False, 0, (0,)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise CheckpointError("a NumPy array in the pickle has no proper state")
        _, shape, dtype, fortran, data = state
        shape = counts(shape, "shape")
        if type(dtype) is not NumpyType or type(data) not in (bytes, str, Span):
            self.code = None  # objects or strings: kept as an entry without numbers
            return
        if math.prod(shape) * dtype.size != len(data):
            raise CheckpointError(
                f"a NumPy array of shape {brief(shape)} in the pickle has {len(data):,} bytes"
            )
        if math.prod(n for n in shape if n) >= 2**60:
            raise CheckpointError(f"a NumPy array has the absurd shape {brief(shape)}")
        self.code, self.data, self.shape = dtype.code, data, shape
        self.nbytes, self.fortran = len(data), fortran is True


def counts(values: Any, what: str) -> tuple[int, ...]:
    """The values as a tuple, if they are what a shape can be; raises CheckpointError."""
    if type(values) in (tuple, list) and len(values) > MAX_DIMENSIONS:
        raise CheckpointError(f"a tensor's {what} has {len(values):,} entries")
    if type(values) not in (tuple, list) or any(type(v) is not int or v < 0 for v in values):
        raise CheckpointError(f"a tensor's {what} should be counts, not {brief(values)}")
    if any(v >= 2**62 for v in values):
        raise CheckpointError(f"a tensor's {what} is absurd: {brief(values)}")
    return tuple(values)


def one_line(value: Any, limit: int = 80) -> str:
    """One one_line line of at most `limit` characters."""
    text = str(value[: limit + 1] if isinstance(value, str) else value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def brief(value: Any, depth: int = 0) -> str:
    """What an entry holds, in a few words; bounded whatever the value is."""
    if type(value) is Parameter:
        value = value.data
    kind = dict if isinstance(value, dict) else type(value)
    if kind is str:
        return f"'{one_line(value, 60)}'"
    if kind in (int, float, bool, complex) or value is None:
        return one_line(repr(value), 40)
    if kind in (bytes, Span):
        return f"{len(value):,} bytes"
    if kind in (tuple, list, dict):
        if len(value) > 8 or (depth and value):
            return f"{kind.__name__} of {len(value):,}"
        if kind is dict:
            inner = (f"{one_line(k, 40)}: {brief(v, 1)}" for k, v in value.items())
            return "{" + ", ".join(inner) + "}"
        inner = ", ".join(brief(v, 1) for v in value)
        return f"[{inner}]" if kind is list else f"({inner})"
    if kind is Tensor:
        return f"tensor {value.shape} {value.dtype}"
    if kind is Array:
        return f"array {value.shape} {value.code or 'of objects'}"
    if kind is Unreadable:
        return f"{value.kind} tensor"
    if kind is Name:
        return one_line(value.full, 60)
    if kind is Record:
        fields = value.state if isinstance(value.state, dict) and not depth else {}
        shown = [
            f"{one_line(k, 40)}={brief(v, 1)}" for k, v in itertools.islice(fields.items(), 40)
        ]
        if len(fields) > 40:
            shown.append(f"and {len(fields) - 40:,} more")
        return f"{one_line(value.name.full, 60)}({', '.join(shown)})"
    return kind.__name__.lower()
