"""A pickle run by a machine that knows no Python object."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_resnet.errors import CheckpointError
from keras_resnet.weights.dtypes import _ALIASES, _CLASSES, _QUANTISED_SIZES, _SIZES

# Limits. A ResNet-50's pickle has about 8,000 steps (25 a tensor) and 40 kB; a file that needs
# more than this is no state dict, and what stays below it is done in a second and 200 MB.
MAX_STEPS = 500_000
MAX_PICKLE = 16 << 20
MAX_INT_BYTES = 255
MAX_IDENTIFIER = 256
MAX_DIMENSIONS = 32  # NumPy 1 stops here; NumPy 2 and torch at 64


# ---------------------------------------------------------------------------------------- stand-ins


class _Name:
    """A name that a pickle asked for, `collections.OrderedDict` say; never the thing itself."""

    __slots__ = ("call", "full", "value")

    def __init__(self, full: str, call: Callable | None, value: Any = None):
        self.full, self.call, self.value = full, call, value


class _Record:
    """An object that a pickle would have made: which name, from what; nothing was called."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: _Name, args: Any):
        self.name, self.args, self.state = name, args, None


class _Storage:
    """A range of bytes with an element type; `view` is (storage, first element)."""

    __slots__ = ("dtype", "key", "numel", "start", "view")

    def __init__(self, key: str, dtype: str, numel: int, view: tuple | None = None):
        self.key, self.dtype, self.numel, self.view = key, dtype, numel, view
        self.start: int | None = None  # where it begins in the file; set by stream and tar

    @property
    def nbytes(self) -> int:
        return self.numel * _SIZES[self.dtype]


class _Tensor:
    """Shape and strides (in elements) over a storage, checked to lie inside it."""

    __slots__ = ("conj", "dtype", "neg", "numel", "offset", "shape", "storage", "strides")

    def __init__(self, storage, offset, shape, strides, dtype=None, metadata=None):
        if type(storage) is not _Storage:
            raise CheckpointError("a tensor is built on something that is no storage")
        self.storage, self.dtype = storage, dtype or storage.dtype
        self.shape = _integers(shape, "shape")
        self.strides = _integers(strides, "strides")
        (self.offset,) = _integers((offset,), "offset")
        if len(self.shape) != len(self.strides):
            raise CheckpointError(
                f"a tensor has {len(self.shape)} dimensions and {len(self.strides)} strides"
            )
        self.numel = math.prod(self.shape)
        size = _SIZES[self.dtype]
        if math.prod(n for n in self.shape if n) * size >= 2**62:
            raise CheckpointError(f"a tensor has the absurd shape {_brief(self.shape)}")
        last = self.offset + sum(
            (n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if n
        )
        if self.numel and (last + 1) * size > storage.nbytes:
            raise CheckpointError(
                f"a tensor of shape {self.shape} reaches element {last:,} of storage "
                f"{_text(storage.key)!r}, which has {storage.nbytes // size:,}"
            )
        bits = metadata if type(metadata) is dict else {}
        self.conj, self.neg = bits.get("conj") is True, bits.get("neg") is True

    @property
    def nbytes(self) -> int:
        return self.numel * _SIZES[self.dtype]


class _Unreadable:
    """A tensor of a kind that has no plain array: quantised, sparse, meta ..."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind


class _Parameter:
    """`torch.nn.Parameter` as files before 0.4 write it: made empty, its tensor set afterwards."""

    __slots__ = ("data",)

    def __init__(self, data: Any = None):
        self.data = data


class _Array:
    """A NumPy array inside the pickle."""

    __slots__ = ("code", "data", "fortran", "shape")

    def __init__(self):
        self.code, self.data, self.fortran, self.shape = None, b"", False, (0,)

    def set(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise CheckpointError("a NumPy array in the pickle has no proper state")
        _, shape, dtype, fortran, data = state
        shape = _integers(shape, "shape")
        if type(dtype) is not _NumpyType or type(data) is not bytes:
            self.code = None  # objects or strings: kept as an entry without numbers
            return
        if math.prod(shape) * dtype.size != len(data):
            raise CheckpointError(
                f"a NumPy array of shape {_brief(shape)} in the pickle has {len(data):,} bytes"
            )
        if math.prod(n for n in shape if n) >= 2**60:
            raise CheckpointError(f"a NumPy array has the absurd shape {_brief(shape)}")
        self.code, self.data, self.shape = dtype.code, data, shape
        self.fortran = fortran is True


class _NumpyType:
    """`numpy.dtype("f4")` with its byte order, for plain numbers only."""

    __slots__ = ("code", "size")

    def __init__(self, code: str):
        self.code = code
        self.size = int(code[2:])

    def set(self, state: Any) -> None:
        if type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.code = state[1] + self.code[1:]


def _integers(values: Any, what: str) -> tuple[int, ...]:
    if type(values) in (tuple, list) and len(values) > MAX_DIMENSIONS:
        raise CheckpointError(f"a tensor's {what} has {len(values):,} entries")
    if type(values) not in (tuple, list) or any(type(v) is not int or v < 0 for v in values):
        raise CheckpointError(f"a tensor's {what} should be counts, not {_brief(values)}")
    if any(v >= 2**62 for v in values):
        raise CheckpointError(f"a tensor's {what} is absurd: {_brief(values)}")
    return tuple(values)


def _text(value: Any, limit: int = 80) -> str:
    """One printable line of at most `limit` characters."""
    text = str(value[: limit + 1] if isinstance(value, str) else value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _brief(value: Any, depth: int = 0) -> str:
    """What an entry holds, in a few words; bounded whatever the value is."""
    kind = type(value)
    if kind is _Parameter:
        value = value.data
        kind = type(value)
    if kind is str:
        return f"'{_text(value, 60)}'"
    if kind in (int, float, bool, complex) or value is None:
        return _text(repr(value), 40)
    if kind is bytes:
        return f"{len(value):,} bytes"
    if kind in (tuple, list, dict):
        if len(value) > 8 or (depth and value):
            return f"{kind.__name__} of {len(value):,}"
        if kind is dict:
            inner = (f"{_text(k, 40)}: {_brief(v, 1)}" for k, v in value.items())
            return "{" + ", ".join(inner) + "}"
        inner = ", ".join(_brief(v, 1) for v in value)
        return f"[{inner}]" if kind is list else f"({inner})"
    if kind is _Tensor:
        return f"tensor {value.shape} {value.dtype}"
    if kind is _Array:
        return f"array {value.shape} {value.code or 'of objects'}"
    if kind is _Unreadable:
        return f"{value.kind} tensor"
    if kind is _Name:
        return _text(value.full, 60)
    if kind is _Record:
        fields = value.state if type(value.state) is dict and not depth else {}
        shown = [f"{_text(k, 40)}={_brief(v, 1)}" for k, v in itertools.islice(fields.items(), 40)]
        if len(fields) > 40:
            shown.append(f"and {len(fields) - 40:,} more")
        return f"{_text(value.name.full, 60)}({', '.join(shown)})"
    return kind.__name__.strip("_").lower()


# --------------------------------------------------------------------------- the names that resolve


def _make_dict(machine: _Machine, args: tuple) -> dict:
    """OrderedDict and its kind: empty, or (Python 2) from one dict or list of pairs."""
    out: dict[str, Any] = {}
    for source in args:
        if type(source) is dict:
            machine.charge(len(source))
            out.update(source)
        elif type(source) in (list, tuple):
            machine.charge(len(source))
            for pair in source:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise CheckpointError("a dict in the pickle is made from something not pairs")
                out[machine.key(pair[0])] = pair[1]
    return out


def _make_list(machine: _Machine, args: tuple) -> list:
    """Sets become lists too: nothing from the file is ever hashed but strings."""
    if not args or type(args[0]) not in (list, tuple):
        return []
    machine.charge(len(args[0]))
    return list(args[0])


def _make_tuple(machine: _Machine, args: tuple) -> tuple:
    return tuple(_make_list(machine, args))


def _make_bytes(machine: _Machine, args: tuple) -> Any:
    """`_codecs.encode(text, "latin1")`, `bytes(...)`, `bytearray(...)`: from text or bytes."""
    source = args[0] if args else b""
    if type(source) not in (str, bytes):
        return None
    machine.charge_bytes(len(source))
    if type(source) is bytes:
        return source
    try:
        return source.encode("latin-1")
    except UnicodeEncodeError:
        return source.encode("utf-8", "surrogatepass")


def _make_complex(machine: _Machine, args: tuple) -> Any:
    return complex(*args) if args and all(type(a) is float for a in args[:2]) else None


def _make_tensor(machine: _Machine, args: tuple) -> Any:
    """`_rebuild_tensor(storage, offset, size, stride)`, and `_v2` with (..., hooks, metadata)."""
    if len(args) < 4:
        raise CheckpointError(f"a tensor is built from {len(args)} values instead of 4 or more")
    return _plain(_Tensor(*args[:4], metadata=args[6] if len(args) > 6 else None))


def _make_typed_tensor(machine: _Machine, args: tuple) -> Any:
    """`_rebuild_tensor_v3`: as v2, the element type named after an untyped storage."""
    if len(args) < 7 or type(args[6]) is not _Name or args[6].value not in _SIZES:
        raise CheckpointError("a tensor of a type that this reader does not know")
    metadata = args[7] if len(args) > 7 else None
    return _plain(_Tensor(*args[:4], dtype=args[6].value, metadata=metadata))


def _plain(tensor: _Tensor) -> _Tensor | _Unreadable:
    return _Unreadable("quantised") if tensor.dtype in _QUANTISED_SIZES else tensor


def _first(machine: _Machine, args: tuple) -> Any:
    """`_rebuild_parameter(data, requires_grad, hooks)`, `Parameter(data)`: the data."""
    return args[0] if args else _Parameter()


def _make_subclass(machine: _Machine, args: tuple) -> Any:
    """`_rebuild_from_type_v2(function, type, args, state)`: a tensor with Python attributes."""
    if len(args) < 3 or type(args[0]) is not _Name or type(args[2]) is not tuple:
        raise CheckpointError("a tensor with attributes is not built as torch builds it")
    return machine.call(args[0], args[2])


def _make_numpy_type(machine: _Machine, args: tuple) -> Any:
    code = args[0] if args else None
    if type(code) is bytes:
        code = code.decode("latin-1")
    if type(code) is str and re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", code):
        return _NumpyType(code if code[0] in "<>|=" else "=" + code)
    return None


def _make_numpy_scalar(machine: _Machine, args: tuple) -> Any:
    if len(args) == 2 and type(args[0]) is _NumpyType and type(args[1]) is bytes:
        if len(args[1]) != args[0].size:
            raise CheckpointError("a NumPy number in the pickle has the wrong number of bytes")
        return np.frombuffer(args[1], args[0].code)[0].item()
    return None


def _unreadable(kind: str) -> Callable:
    return lambda machine, args: _Unreadable(kind)


def _nothing(machine: _Machine, args: tuple) -> None:
    """A harmless call whose result no tensor needs: `call` keeps a record of it."""
    return None


def _harmless_names() -> dict[str, tuple[Callable, Any]]:
    """Every name that resolves: full name -> (what a call of it makes, its own value)."""
    names: dict[str, tuple[Callable, Any]] = {}

    def allow(call: Callable, *full: str, value: Any = None) -> None:
        names.update({name: (call, value) for name in full})

    allow(_make_dict, "collections.OrderedDict", "collections.Counter")
    allow(lambda machine, args: {}, "collections.defaultdict")
    allow(_make_list, "collections.deque")
    for module in ("builtins", "__builtin__"):
        allow(_make_dict, f"{module}.dict")
        allow(_make_list, *(f"{module}.{name}" for name in ("list", "set", "frozenset")))
        allow(_make_tuple, f"{module}.tuple")
        allow(_make_bytes, f"{module}.bytes", f"{module}.bytearray")
        allow(_make_complex, f"{module}.complex")
        kinds = ("int", "float", "bool", "str", "slice", "range", "object", "long", "unicode")
        allow(_nothing, *(f"{module}.{name}" for name in kinds))
    allow(_make_bytes, "_codecs.encode")
    # Settings beside the weights. Their classes are not made: the record shows name and fields.
    allow(_nothing, "argparse.Namespace", "types.SimpleNamespace")
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    for module in ("pathlib", "pathlib._local"):
        allow(_nothing, *(f"{module}.{name}" for name in paths))
    times = ("datetime", "date", "time", "timedelta", "timezone")
    allow(_nothing, *(f"datetime.{name}" for name in times))
    allow(_nothing, "copyreg._reconstructor", "copy_reg._reconstructor")

    allow(_make_numpy_type, "numpy.dtype")
    for core in ("numpy.core", "numpy._core"):
        allow(_make_numpy_scalar, f"{core}.multiarray.scalar")
        allow(lambda machine, args: _Array(), f"{core}.multiarray._reconstruct")
    numbers = [f"{k}{b}" for k in ("int", "uint") for b in (8, 16, 32, 64)]
    numbers += ["ndarray", "float16", "float32", "float64", "bool_", "bool"]
    allow(_nothing, *(f"numpy.{name}" for name in numbers))

    allow(_make_tensor, "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
    allow(_make_typed_tensor, "torch._utils._rebuild_tensor_v3")
    allow(_first, "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
    for name in ("Parameter", "Buffer"):
        allow(_first, f"torch.nn.parameter.{name}", f"torch.nn.{name}")
    allow(_make_subclass, "torch._tensor._rebuild_from_type_v2")
    allow(_unreadable("quantised"), "torch._utils._rebuild_qtensor")
    allow(
        _unreadable("sparse"),
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_sparse_csr_tensor",
    )
    allow(_unreadable("nested"), "torch._utils._rebuild_nested_tensor")
    allow(_unreadable("meta"), "torch._utils._rebuild_meta_tensor_no_storage")
    allow(_unreadable("meta"), "torch._utils._rebuild_meta_tensor")
    allow(
        _unreadable("device"),
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_xla_tensor",
    )
    allow(_unreadable("subclassed"), "torch._utils._rebuild_wrapper_subclass")
    allow(_make_tuple, "torch.Size")
    others = ("device", "Tensor", "strided", "sparse_coo", "sparse_csr", "contiguous_format")
    schemes = [f"per_{k}_affine{f}" for k in ("tensor", "channel") for f in ("", "_float_qparams")]
    allow(_nothing, *(f"torch.{name}" for name in (*others, *schemes)))
    allow(_nothing, "torch.channels_last", "torch.preserve_format", "torch._tensor.Tensor")
    allow(_nothing, "torch.serialization._get_layout", "torch.torch_version.TorchVersion")
    for dtype in _SIZES:
        allow(_nothing, f"torch.{dtype}", value=dtype)
    for alias, dtype in _ALIASES.items():
        allow(_nothing, f"torch.{alias}", value=dtype)
    for prefix, dtype in _CLASSES.items():
        for module in ("torch", "torch.cuda", "torch.storage"):
            storage = f"{module}.{prefix}Storage"
            allow(_nothing, storage, f"{module}.{prefix}Tensor", value=dtype)
    for name in ("_UntypedStorage", "TypedStorage", "_TypedStorage"):
        allow(_nothing, f"torch.storage.{name}", f"torch.{name}", value="uint8")
    return names


_HARMLESS = _harmless_names()
_IDENTIFIER = re.compile(r"[^\W\d][\w.<>]*(\.[\w.<>]+)*")

# ------------------------------------------------------------------------------- the pickle machine


@dataclasses.dataclass
class _Budget:
    """What may still be spent on a file, over all its pickles together."""

    steps: int = MAX_STEPS
    bytes: int = MAX_PICKLE

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise CheckpointError(
                f"the pickle takes more than {MAX_STEPS:,} steps, which no state dict needs"
            )


class _Truncated(CheckpointError):
    """The bytes end inside a pickle."""


_MARK = _Name("mark", None)
_ABSENT = _Name("absent", None)


class _Machine:
    """Runs one pickle from `start`, making plain containers, numbers, strings and stand-ins.

    Args:
        data: The bytes (or the mapping of the file).
        start: Where the pickle begins; `position` is where it ended.
        end: Where it has to have ended.
        budget: Shared by all pickles of a file.
        refused: Collects the names that do not resolve, in order, as a dict's keys.
        persistent: Called for a persistent id; makes storages.
    """

    def __init__(
        self,
        data: Any,
        start: int,
        end: int,
        budget: _Budget,
        refused: dict[str, None],
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.data, self.position, self.budget = data, start, budget
        self.file_end = end
        self.end = min(end, start + MAX_PICKLE)
        self.refused, self.persistent = refused, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.steps = 0
        self.unnamed = 0

    def run(self) -> Any:
        """The object that the pickle describes; raises CheckpointError where it is damaged."""
        start, data, table, end = self.position, self.data, _OPCODES, self.end
        limit = self.budget.steps
        try:
            while True:
                if self.position >= end:
                    raise self.ended()
                code = data[self.position]
                self.position += 1
                self.steps += 1
                if self.steps > limit:
                    self.budget.spend(self.steps)
                handler = table[code]
                if handler is None:
                    raise CheckpointError(f"byte {code:#04x} is no pickle instruction")
                if handler(self):
                    break
            self.budget.spend(self.steps)
            return self.stack.pop()
        except _Truncated:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"its pickle, at byte {self.position:,}: {error}") from None
        except (IndexError, struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"its pickle, begun at byte {start:,}, is damaged at byte {self.position:,} "
                f"({type(error).__name__})"
            ) from error

    def ended(self) -> CheckpointError:
        if self.end < self.file_end:
            return CheckpointError(f"the pickle is longer than {MAX_PICKLE:,} bytes")
        return _Truncated(f"its pickle is cut off at byte {self.file_end:,}")

    def charge(self, items: int) -> None:
        """What takes longer than a step costs more: copies what they copy, calls three."""
        self.steps += items
        if self.steps > self.budget.steps:
            self.budget.spend(self.steps)

    def charge_bytes(self, count: int) -> None:
        self.budget.bytes -= count
        if self.budget.bytes < 0:
            raise CheckpointError("the pickle copies more bytes than a state dict needs")

    def take(self, count: int) -> bytes:
        """The next `count` bytes, checked before anything is allocated."""
        at = self.position
        if count < 0 or count > self.end - at:
            if count > self.file_end - at >= 0:
                raise _Truncated(
                    f"its pickle is cut off or damaged at byte {at:,}: it wants {count:,} more "
                    f"bytes where {self.file_end - at:,} are left"
                )
            raise CheckpointError(f"a length of {count:,} bytes")
        self.position = at + count
        return self.data[at : at + count]

    def line(self, limit: int = 2 * MAX_IDENTIFIER) -> bytes:
        at = self.position
        stop = self.data.find(b"\n", at, min(self.end, at + limit))
        if stop < 0:
            if self.end - at < limit:
                raise self.ended()
            raise CheckpointError(f"a line of more than {limit} bytes")
        self.position = stop + 1
        return self.data[at:stop]

    def number(self, form: str, size: int) -> int:
        return struct.unpack(form, self.take(size))[0]

    def key(self, value: Any) -> str:
        """A dict key as text: only strings are hashed, since integers can be made to collide."""
        kind = type(value)
        if kind is str:
            return value
        if kind is int:
            return str(value)
        if kind is bytes:
            self.charge_bytes(len(value))
            return value.decode("latin-1")
        self.charge(3)
        self.unnamed += 1
        return f"<{_text(_brief(value), 40)} #{self.unnamed}>"

    def popped(self) -> list[Any]:
        """Everything above the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def pop(self) -> Any:
        if self.marks and self.marks[-1] >= len(self.stack):
            raise IndexError("a mark where a value should be")
        return self.stack.pop()

    def remember(self, index: int) -> None:
        # Writers number their memo in order, so an index is never above the steps taken.
        if index < 0 or index > self.steps:
            raise CheckpointError(f"memo entry {index:,} after {self.steps:,} steps")
        memo = self.memo
        if index == len(memo):
            memo.append(self.stack[-1])
            return
        while index >= len(memo):
            memo.append(_ABSENT)
        memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        value = self.memo[index] if 0 <= index < len(self.memo) else _ABSENT
        if value is _ABSENT:
            raise CheckpointError(f"memo entry {index:,} was never written")
        self.stack.append(value)

    def find(self, module: Any, name: Any) -> _Name:
        """The stand-in for a name; a name that is not harmless is noted, and made no less inert."""
        self.charge(3)
        if type(module) is not str or type(name) is not str:
            raise CheckpointError("a name that is no text")
        if len(module) > MAX_IDENTIFIER or len(name) > MAX_IDENTIFIER:
            raise CheckpointError(f"a name of {max(len(module), len(name)):,} characters")
        full = f"{module}.{name}"
        known = _HARMLESS.get(full)
        if known is not None:
            return _Name(full, *known)
        self.refuse(full)
        return _Name(full, None)

    def refuse(self, full: str) -> None:
        # Pickles name os.system after the module it really lives in, which nobody looks for.
        module, dot, rest = full.partition(".")
        full = (
            {"posix": "os", "nt": "os", "__builtin__": "builtins"}.get(module, module) + dot + rest
        )
        if len(self.refused) < 1000:
            self.refused[_text(full, 2 * MAX_IDENTIFIER)] = None

    def call(self, function: Any, args: Any) -> Any:
        """What a call would make: a container, a tensor's description, or a record of the call."""
        self.charge(3)
        if type(args) is not tuple:
            raise CheckpointError("a call without a tuple of values")
        if type(function) is not _Name:
            # A record of something refused can be "called" in turn; it stays a record.
            if type(function) is not _Record:
                raise CheckpointError(f"a call of {_brief(function)}, which is no function")
            return _Record(function.name, args)
        if function.call is None:
            return _Record(function, args)
        made = function.call(self, args)
        if made is not None:
            return made
        if function.full.endswith("._reconstructor") and args and type(args[0]) is _Name:
            return _Record(args[0], args)
        return _Record(function, args)


_OPCODES: list[Callable[[_Machine], Any] | None] = [None] * 256


def _opcode(*codes: bytes) -> Callable:
    def register(function: Callable) -> Callable:
        for code in codes:
            _OPCODES[code[0]] = function
        return function

    return register


def _constant(code: bytes, make: Callable[[], Any]) -> None:
    _OPCODES[code[0]] = lambda m: m.stack.append(make())


for _code, _make in {
    **{b"N": lambda: None, b"\x88": lambda: True, b"\x89": lambda: False},
    **{b"}": dict, b"]": list, b")": tuple, b"\x8f": list},
}.items():
    _constant(_code, _make)


def _fixed(code: bytes, form: str) -> None:
    unpack, size = struct.Struct(form).unpack_from, struct.calcsize(form)

    def push(m: _Machine) -> None:
        if m.position + size > m.end:
            raise m.ended()
        m.stack.append(unpack(m.data, m.position)[0])
        m.position += size

    _OPCODES[code[0]] = push


for _code, _form in {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}.items():
    _fixed(_code, _form)


def _counted(code: bytes, form: str, make: Callable[[_Machine, bytes], Any]) -> None:
    """BINUNICODE and its kind: a length, then that many bytes."""
    unpack, size = struct.Struct(form).unpack_from, struct.calcsize(form)

    def push(m: _Machine) -> None:
        if m.position + size > m.end:
            raise m.ended()
        length = unpack(m.data, m.position)[0]
        m.position += size
        m.stack.append(make(m, m.take(length)))

    _OPCODES[code[0]] = push


def _decode(m: _Machine, raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _decode_old(m: _Machine, raw: bytes) -> str | bytes:
    """A Python 2 `str`: text where it is ASCII (names, keys), else bytes (numbers of an array)."""
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        return raw


def _integer(m: _Machine, raw: bytes) -> int:
    if len(raw) > MAX_INT_BYTES:
        raise CheckpointError(f"an integer of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


for _code, _form, _make in (
    *((b"\x8c", "<B", _decode), (b"X", "<I", _decode), (b"\x8d", "<Q", _decode)),
    *((b"U", "<B", _decode_old), (b"T", "<i", _decode_old)),
    *((b"C", "<B", lambda m, raw: raw), (b"B", "<I", lambda m, raw: raw)),
    *((b"\x8e", "<Q", lambda m, raw: raw), (b"\x96", "<Q", lambda m, raw: raw)),
    *((b"\x8a", "<B", _integer), (b"\x8b", "<i", _integer)),
):
    _counted(_code, _form, _make)


@_opcode(b".")
def _stop(m: _Machine) -> bool:
    return True


@_opcode(b"\x80")
def _proto(m: _Machine) -> None:
    if m.number("<B", 1) > 5:
        raise CheckpointError("a pickle protocol above 5")


@_opcode(b"\x95")
def _frame(m: _Machine) -> None:
    if m.number("<Q", 8) > m.file_end - m.position:
        raise _Truncated(f"its pickle is cut off: a frame at byte {m.position:,} is incomplete")


@_opcode(b"(")
def _mark(m: _Machine) -> None:
    m.marks.append(len(m.stack))


@_opcode(b"0")
def _pop(m: _Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()


@_opcode(b"1")
def _pop_mark(m: _Machine) -> None:
    m.popped()


@_opcode(b"2")
def _dup(m: _Machine) -> None:
    m.stack.append(m.stack[-1])


@_opcode(b"I", b"L")
def _decimal(m: _Machine) -> None:
    line = m.line()
    if line in (b"00", b"01"):
        m.stack.append(line == b"01")
        return
    text = line.rstrip(b"L")
    if len(text) > 64 or not re.fullmatch(rb"-?\d+", text):
        raise CheckpointError(f"{_text(line.decode('latin-1'), 40)!r} is no integer")
    m.stack.append(int(text))


@_opcode(b"F")
def _decimal_float(m: _Machine) -> None:
    line = m.line()
    try:
        m.stack.append(float(line))
    except ValueError:
        raise CheckpointError(f"{_text(line.decode('latin-1'), 40)!r} is no number") from None


# What Python 2's repr of a string can hold after a backslash.
_ESCAPE = re.compile(rb"\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2}|[0-3]?[0-7]{1,2})")


@_opcode(b"S")
def _quoted(m: _Machine) -> None:
    line = m.line(MAX_PICKLE)
    if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
        raise CheckpointError("a string without its quotes")
    inside = line[1:-1]
    if b"\\" in inside:
        m.charge(inside.count(b"\\"))
        if b"\\" in _ESCAPE.sub(b"", inside):
            raise CheckpointError("a string with an escape that Python does not write")
        inside = inside.decode("unicode_escape").encode("latin-1")
    m.stack.append(_decode_old(m, inside))


@_opcode(b"V")
def _raw_unicode(m: _Machine) -> None:
    m.stack.append(m.line(MAX_PICKLE).decode("raw-unicode-escape"))


@_opcode(b"l")
def _list(m: _Machine) -> None:
    m.stack.append(m.popped())


@_opcode(b"t", b"\x91")
def _tuple(m: _Machine) -> None:
    m.stack.append(tuple(m.popped()))


@_opcode(b"\x85")
def _tuple1(m: _Machine) -> None:
    m.stack.append((m.pop(),))


@_opcode(b"\x86")
def _tuple2(m: _Machine) -> None:
    b, a = m.pop(), m.pop()
    m.stack.append((a, b))


@_opcode(b"\x87")
def _tuple3(m: _Machine) -> None:
    c, b, a = m.pop(), m.pop(), m.pop()
    m.stack.append((a, b, c))


@_opcode(b"d")
def _dict(m: _Machine) -> None:
    items = m.popped()
    m.stack.append({})
    _set_pairs(m, items)


def _set_pairs(m: _Machine, items: list[Any]) -> None:
    if len(items) % 2:
        raise CheckpointError("a dict with a key and no value")
    target = m.stack[-1]
    if type(target) is dict:
        for i in range(0, len(items), 2):
            key = items[i]
            target[key if type(key) is str else m.key(key)] = items[i + 1]
    elif type(target) is not _Record:
        raise CheckpointError(f"items set on {_brief(target)}")


@_opcode(b"u")
def _set_items(m: _Machine) -> None:
    _set_pairs(m, m.popped())


@_opcode(b"s")
def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    _set_pairs(m, [key, value])


def _extend(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is not _Record:
        raise CheckpointError(f"items appended to {_brief(target)}")


@_opcode(b"e", b"\x90")
def _appends(m: _Machine) -> None:
    _extend(m, m.popped())


@_opcode(b"a")
def _append(m: _Machine) -> None:
    _extend(m, [m.pop()])


@_opcode(b"p")
def _put(m: _Machine) -> None:
    m.remember(_small(m))


@_opcode(b"g")
def _get(m: _Machine) -> None:
    m.recall(_small(m))


def _small(m: _Machine) -> int:
    line = m.line()
    if len(line) > 10 or not line.isdigit():
        raise CheckpointError(f"{_text(line.decode('latin-1'), 40)!r} is no memo entry")
    return int(line)


@_opcode(b"q")
def _binput(m: _Machine) -> None:
    m.remember(m.number("<B", 1))


@_opcode(b"r")
def _long_binput(m: _Machine) -> None:
    m.remember(m.number("<I", 4))


@_opcode(b"\x94")
def _memoize(m: _Machine) -> None:
    m.remember(len(m.memo))


@_opcode(b"h")
def _binget(m: _Machine) -> None:
    m.recall(m.number("<B", 1))


@_opcode(b"j")
def _long_binget(m: _Machine) -> None:
    m.recall(m.number("<I", 4))


@_opcode(b"c")
def _global(m: _Machine) -> None:
    module, name = m.line(), m.line()
    m.stack.append(m.find(_decode(m, module), _decode(m, name)))


@_opcode(b"\x93")
def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.stack.append(m.find(module, name))


@_opcode(b"\x82", b"\x83", b"\x84")
def _extension(m: _Machine) -> None:
    width = {0x82: 1, 0x83: 2, 0x84: 4}[m.data[m.position - 1]]
    full = f"copyreg extension {int.from_bytes(m.take(width), 'little')}"
    m.refuse(full)
    m.stack.append(_Name(full, None))


@_opcode(b"R", b"\x81")
def _reduce(m: _Machine) -> None:
    args, function = m.pop(), m.pop()
    m.stack.append(m.call(function, args))


@_opcode(b"\x92")
def _newobj_ex(m: _Machine) -> None:
    keywords, args, function = m.pop(), m.pop(), m.pop()
    made = m.call(function, args)
    if type(made) is _Record and type(keywords) is dict:
        made.state = keywords
    m.stack.append(made)


@_opcode(b"i")
def _inst(m: _Machine) -> None:
    module, name = m.line(), m.line()
    args = tuple(m.popped())
    m.stack.append(m.call(m.find(_decode(m, module), _decode(m, name)), args))


@_opcode(b"o")
def _obj(m: _Machine) -> None:
    items = m.popped()
    m.stack.append(m.call(items[0], tuple(items[1:])))


@_opcode(b"b")
def _build(m: _Machine) -> None:
    state, target = m.pop(), m.stack[-1]
    kind = type(target)
    if kind is _Record:
        target.state = state
    elif kind in (_Array, _NumpyType):
        target.set(state)
    elif kind is _Parameter and type(state) is tuple and state:
        target.data = state[0]
    # Attributes of a dict (a state dict's `_metadata`) say nothing about the numbers.


@_opcode(b"P")
def _persid(m: _Machine) -> None:
    _persistent(m, _decode(m, m.line()))


@_opcode(b"Q")
def _binpersid(m: _Machine) -> None:
    _persistent(m, m.pop())


def _persistent(m: _Machine, pid: Any) -> None:
    if m.persistent is None:
        raise CheckpointError("a persistent id where none can be")
    m.charge(3)
    m.stack.append(m.persistent(pid))
