"""Reads and writes weight files without PyTorch: `.pth`, `.pt`, `.th`, `.tar`, `.safetensors`.

A `.pth` file is a pickle, and a pickle is a program. Here it is run by a small machine of our own
(`_Machine`) which knows every opcode and no Python object: a name in the file resolves to an inert
stand-in, a call of a stand-in makes a record of the call, and nothing is ever imported. So a
hostile file can be read to its end, and what it wants can be named, without any of it happening.
Only if every name was harmless are the tensors handed out.

A tensor is four numbers about a storage (type, offset, shape, strides), and a storage is a range
of bytes in the file. The file is memory-mapped once, the ranges are checked against its length,
and the arrays are read-only views of the mapping: no byte is read before it is used. (So do not
truncate a file in place while its arrays are alive; replacing it is fine.)

The formats, as `torch/serialization.py` (2.13) reads them:

| name        | what                                                                            |
|-------------|---------------------------------------------------------------------------------|
| zip         | PyTorch >= 1.6: `archive/data.pkl`, `archive/data/<storage>`, `byteorder`       |
| stream      | before 1.6: pickles (magic, protocol, sys_info, object, storage keys), storages |
| tar         | before 0.2: `sys_info`, `pickle`, `tensors`, `storages`                         |
| safetensors | 8 bytes of length, a JSON header, the bytes                                     |
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import mmap
import os
import pathlib
import re
import secrets
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_resnet.errors import (
    CheckpointError,
    KerasResNetError,
    MissingDependencyError,
    NotFoundError,
    did_you_mean,
)

# Limits. A ResNet-50's pickle has about 8,000 steps (25 a tensor) and 40 kB; a file that needs
# more than this is no state dict, and what stays below it is done in a second and 200 MB.
MAX_STEPS = 500_000
MAX_PICKLE = 16 << 20
MAX_INT_BYTES = 255
MAX_IDENTIFIER = 256
MAX_NAME = 512
MAX_LEAVES = 100_000
MAX_ENTRIES = 50_000
MAX_DIMENSIONS = 32  # NumPy 1 stops here; NumPy 2 and torch at 64
MAX_HEADER = 2 << 20  # of a safetensors file
MAX_INFLATION = 8  # decompressed bytes per byte of the file; weights reach about 1.1
MAX_DEPTH = 16  # of dicts inside dicts

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

# Where nested dicts offer several state dicts, the first of these names wins: live weights before
# averaged ones, because that is what `torch.load(...)["model"]` users mean. `key=` overrides it.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network"),
    *("weights", "params", "module"),
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
)
PREFIXES = ("module.", "_orig_mod.")
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loss|criterion|^amp$|history", re.IGNORECASE)
# torch.optim.swa_utils.AveragedModel saves this counter beside the prefixed names of its model.
_COUNTERS = ("n_averaged",)

# ------------------------------------------------------------------------------------------- dtypes

_NUMPY = {
    **{"float64": "f8", "float32": "f4", "float16": "f2", "complex64": "c8", "complex128": "c16"},
    **{"uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "?"},
    **{"int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8"},
}
# Types that NumPy lacks. bfloat16 and complex32 widen exactly where no library has them.
_EXTENSION_SIZES = {
    **{"bfloat16": 2, "complex32": 4},
    **{"float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1},
    "float8_e8m0fnu": 1,
}
_QUANTISED_SIZES = {"quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
_OTHER_SIZES = {
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    **{"bits1x8": 1, "bits2x4": 1, "bits4x2": 1, "bits8": 1, "bits16": 2},
    "float4_e2m1fn_x2": 1,
}
_SIZES = {
    **{name: np.dtype(code).itemsize for name, code in _NUMPY.items()},
    **_EXTENSION_SIZES,
    **_QUANTISED_SIZES,
    **_OTHER_SIZES,
}
_ALIASES = {
    **{"float": "float32", "double": "float64", "half": "float16", "long": "int64"},
    **{"int": "int32", "short": "int16", "cfloat": "complex64", "cdouble": "complex128"},
    "chalf": "complex32",
}
# The classes `torch.FloatStorage`, `torch.FloatTensor` and their kind.
_CLASSES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    **{"Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64"},
    **{"ComplexHalf": "complex32", "QUInt8": "quint8", "QInt8": "qint8", "QInt32": "qint32"},
    **{"QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4", "Untyped": "uint8"},
}
_SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "C64": "complex64"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}


def _extension_dtype(name: str) -> np.dtype | None:
    """The ml_dtypes type of that name, or None where ml_dtypes is missing or does not have it."""
    try:
        import ml_dtypes
    except ImportError:
        return None
    found = getattr(ml_dtypes, name, None)
    return None if found is None else np.dtype(found)


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


# --------------------------------------------------------------------------------- which file is it

_SIGNATURES = (
    (b"\x1f\x8b", "it is gzip-compressed: unpack it with gunzip, and read what comes out"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive: unpack it first"),
    (b"\xfd7zXZ\0", "it is xz-compressed: unpack it first"),
    (b"BZh", "it is bzip2-compressed: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is zstd-compressed: unpack it first"),
    (b"Rar!", "it is a RAR archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file (Keras .h5 weights): use model.load_weights"),
    (b"\x93NUMPY", "it is a NumPy .npy file: open it with numpy.load"),
    (b"GGUF", "it is a GGUF file, which holds language models"),
    (b"\x89PNG", "it is a PNG picture"),
    (b"\xff\xd8\xff", "it is a JPEG picture"),
    (b"%PDF", "it is a PDF document"),
)


def _what_else(data: Any, size: int, name: str) -> str | None:
    """Names a file that is no checkpoint by its first bytes."""
    head = bytes(data[:2048])
    for signature, text in _SIGNATURES:
        if head.startswith(signature):
            return text
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"\nsize (\d{1,20})\n", head)
        real = f" of {int(found[1]):,} bytes" if found else ""
        return (
            f"it is a git-LFS pointer{real}, not the file itself: run `git lfs pull`, or download "
            f"the file from the web page"
        )
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return (
            "it is a web page (HTML or XML), not weights: the download ended at a login, consent "
            "or error page. Fetch the direct link"
        )
    if name.lower().endswith(".onnx") or re.match(
        rb"\x08[\x01-\x0f]\x12.{1,40}(pytorch|onnx)", head
    ):
        return "it is an ONNX graph: export the state dict instead, torch.save(model.state_dict())"
    return None


@contextlib.contextmanager
def _only_our_errors(path: Any, doing: str) -> Iterator[None]:
    """Puts the path before a message, and lets nothing but this package's errors out.

    What is read here was perhaps made to break the reader; a caller who catches CheckpointError
    must not meet an IndexError because of a damaged file.
    """
    try:
        yield
    except (NotFoundError, MissingDependencyError):
        raise
    except CheckpointError as error:
        raise CheckpointError(f"cannot {doing} {_text(path, 500)}: {error}") from error.__cause__
    except KerasResNetError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"cannot {doing} {_text(path, 500)}: {reason}") from error
    except Exception as error:
        raise CheckpointError(
            f"cannot {doing} {_text(path, 500)}: it is damaged or not what it seems "
            f"({type(error).__name__}: {_text(error)})"
        ) from error


def _path(path: Any) -> pathlib.Path:
    try:
        return pathlib.Path(os.fsdecode(path)).expanduser()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"a path is needed, not {type(path).__name__}") from error


def _load(path: pathlib.Path) -> _Loaded:
    """Opens, maps and understands a file; no tensor's bytes are touched."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        near = ""
        with contextlib.suppress(OSError):
            near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
        raise NotFoundError(f"no file {_text(path, 500)}.{near}") from None
    if stat.S_ISDIR(status.st_mode):
        kinds = (".pth", ".pt", ".th", ".tar", ".safetensors")
        inside = sorted(p.name for p in path.iterdir() if p.suffix in kinds)[:3]
        hint = f" It holds {', '.join(map(_text, inside))}." if inside else ""
        raise CheckpointError(f"it is a folder; name a file.{hint}")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("it is no regular file")
    if status.st_size == 0:
        raise CheckpointError("it is empty (0 bytes): download it again")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = len(data)
    if size >= 10 and data[8:9] == b"{" and struct.unpack_from("<Q", data, 0)[0] < 1 << 40:
        return _load_safetensors(data, size, path.name)
    other = _what_else(data, size, path.name)
    if other:
        raise CheckpointError(other)
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _load_zip(data, size, path.name)
    if data[257:262] == b"ustar":
        return _load_tar(data, size, path.name)
    if size >= 8 and path.suffix.lower() == ".safetensors":
        return _load_safetensors(data, size, path.name)
    try:
        loaded = _load_stream(data, size, path.name)
    except CheckpointError as error:
        if data[:1] == b"\x80":
            raise
        raise CheckpointError(_unknown(data)) from error
    if data[:1] != b"\x80" and not all(_IDENTIFIER.fullmatch(n) for n in loaded.refused):
        raise CheckpointError(_unknown(data))
    return loaded


def _unknown(data: Any) -> str:
    return (
        f"it begins with {bytes(data[:8])!r}, so it is none of PyTorch's zip, stream or tar "
        f"formats, nor safetensors"
    )


# ----------------------------------------------------------------------------- choosing the tensors


def _leaf(value: Any) -> Any:
    """The tensor (or unreadable tensor, or array) that a value is, else None."""
    if type(value) is _Parameter:
        value = value.data
    if type(value) is _Array and value.code is None:
        return None
    return value if type(value) in (_Tensor, _Unreadable, _Array) else None


class _Counter:
    """Counts the tensors in a value; bounds the work over all its counts together."""

    def __init__(self):
        self.left = MAX_STEPS

    def __call__(self, value: Any) -> int:
        found, seen, todo = 0, set(), [value]
        while todo:
            item = todo.pop()
            if _leaf(item) is not None:
                found += 1
            elif type(item) in (dict, list, tuple) and id(item) not in seen:
                seen.add(id(item))
                self.left -= len(item)
                if self.left < 0:
                    raise CheckpointError("its entries hold each other over and over")
                todo.extend(item.values() if type(item) is dict else item)
        return found


def _choose(root: Any, count: _Counter) -> tuple[list[str], Any]:
    """The path to the state dict, and the state dict: see `read_checkpoint` for the order."""
    path: list[str] = []
    node = root
    while type(node) is dict and len(path) < MAX_DEPTH:
        holders = {k for k, v in node.items() if type(v) is dict and count(v)}
        named = [name for name in WRAPPERS if name in holders]
        if not named:
            named = [name for name in holders if not _NOT_WEIGHTS.search(name)]
            if len(named) != 1 or any(_leaf(v) is not None for v in node.values()):
                break
        path.append(named[0])
        node = node[named[0]]
    return path, node


def _follow(root: Any, key: str) -> Any:
    """The entry at a dotted path; a name may itself contain dots."""
    if type(root) is not dict:
        return None
    if key in root:
        return root[key]
    parts = key.split(".")
    for i in range(1, min(len(parts), MAX_DEPTH)):
        head = ".".join(parts[:i])
        if head in root:
            found = _follow(root[head], ".".join(parts[i:]))
            if found is not None:
                return found
    inside = {k[len(key) + 1 :]: v for k, v in root.items() if k.startswith(f"{key}.")}
    return inside or None


def _flatten(node: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, everything else) by dotted name."""
    tensors: dict[str, Any] = {}
    others: dict[str, Any] = {}
    if _leaf(node) is not None:
        return {"tensor": _leaf(node)}, {}
    todo: list[tuple[str, Any, int]] = [("", node, 0)]
    left = MAX_LEAVES
    while todo:
        prefix, value, depth = todo.pop()
        leaf = _leaf(value)
        if leaf is not None:
            if prefix in tensors:
                raise CheckpointError(f"two tensors are called {_text(prefix)!r}")
            tensors[prefix] = leaf
        elif _nested(prefix, value, depth):
            left -= len(value)
            if left < 0:
                raise CheckpointError(f"its dicts hold more than {MAX_LEAVES:,} entries")
            items = list(value.items() if type(value) is dict else enumerate(value))
            if any(len(prefix) + len(k) > MAX_NAME for k, _ in items if type(k) is str):
                raise CheckpointError(f"it has names of more than {MAX_NAME} characters")
            front = f"{prefix}." if prefix else ""
            todo.extend((f"{front}{k}", v, depth + 1) for k, v in reversed(items))
        elif prefix:
            others[prefix] = value
    return tensors, others


def _nested(prefix: str, value: Any, depth: int) -> bool:
    """Whether an entry's own entries are named one by one."""
    if depth >= MAX_DEPTH or not value:
        return False
    # Optimizer and scheduler states hold tensors too; they are no weights.
    if depth and _NOT_WEIGHTS.search(prefix[-64:].rpartition(".")[2]):
        return False
    if type(value) in (list, tuple):
        return len(value) <= 1000 and any(_leaf(v) is not None for v in value)
    return type(value) is dict


def _strip(names: list[str]) -> str:
    """The longest run of `module.` and `_orig_mod.` with which every name begins."""
    prefix = ""
    for _ in range(8 if names else 0):
        longer = [prefix + p for p in PREFIXES]
        found = [p for p in longer if all(n.startswith(p) and len(n) > len(p) for n in names)]
        if not found:
            break
        prefix = found[0]
    return prefix


@dataclasses.dataclass
class _Selection:
    key: str
    prefix: str
    tensors: dict[str, Any]
    others: dict[str, Any]
    alternatives: dict[str, int]


def _select(loaded: _Loaded, key: str | None, keep_prefix: bool) -> _Selection:
    root, count = loaded.root, _Counter()
    if key is None:
        path, node = _choose(root, count)
    else:
        path, node = [key], _follow(root, key) if type(key) is str else None
        if node is None:
            names = list(root) if type(root) is dict else []
            shown = ", ".join(_text(n, 40) for n in names[:12])
            raise CheckpointError(
                f"it has no entry {_text(key)!r}.{did_you_mean(_text(key), names[:1000])} It has: "
                f"{shown or _brief(root)}"
            )
    tensors, others = _flatten(node)
    alternatives: dict[str, int] = {}
    if type(root) is dict and path:
        for name, value in root.items():
            held = count(value) if type(value) is dict else 0
            if held and name == path[0]:
                continue
            if held and node is not value and len(alternatives) < 100:
                alternatives[name] = held
            elif not held and len(others) < MAX_LEAVES:
                others.setdefault(name, value)
    for counter in _COUNTERS:
        if len(tensors) > 1 and type(tensors.get(counter)) is _Tensor:
            others[counter] = tensors.pop(counter)
    prefix = "" if keep_prefix else _strip(list(tensors))
    if prefix:
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    total = sum(t.nbytes for t in tensors.values() if type(t) is _Tensor)
    stored = max(loaded.size, sum(member.size for member in loaded.members.values()))
    if total > 4 * stored + (1 << 24):
        raise CheckpointError(
            f"its tensors claim {total:,} bytes, from a file of {loaded.size:,}: views of the same "
            f"numbers over and over"
        )
    return _Selection(".".join(path), prefix, tensors, others, alternatives)


def _kind(loaded: _Loaded, selection: _Selection | None, name: str) -> tuple[str, str | None]:
    """(what the file is, why its tensors cannot be had or None)."""
    if loaded.problem and not (loaded.kind == "pickle" and loaded.refused):
        return loaded.kind, loaded.problem
    if loaded.refused:
        module = _pickled_module(loaded)
        if module is not None:
            what, where = module
            return "pickled module", (
                f"it holds a whole pickled module ({what}), which is Python code, not weights; not "
                f"loaded. Where you trust the file, with PyTorch and the model's source: "
                f"torch.save(torch.load({name!r}, weights_only=False){where}.state_dict(), "
                f"'state_dict.pth'), and read that"
            )
        names = list(loaded.refused)
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        wants = ", ".join(_text(n, 100) for n in names[:5])
        return "refused pickle", f"the file wants to call {wants}{more}; not loaded"
    assert selection is not None
    strange = {n: t.kind for n, t in selection.tensors.items() if type(t) is _Unreadable}
    if strange:
        first, kind = next(iter(strange.items()))
        if "quantised" in strange.values():
            kind = "quantised"
        such = f"{len(strange):,} tensors, such as {_text(first)!r}, are {kind}"
        return kind, f"{such}{_ADVICE.get(kind, '; save them as plain tensors in PyTorch')}"
    if not selection.tensors:
        return "no tensors", (
            f"it holds no tensors{f' at {selection.key!r}' if selection.key else ''}, only "
            f"{_text(_brief(loaded.root), 200)}"
        )
    return "state dict", None


_ADVICE = {
    "quantised": (
        ": their integers belong to PyTorch's quantised kernels and cannot become Keras weights. "
        "Take the float file of the same model (the name without _fbgemm)"
    ),
    "sparse": (
        ". In PyTorch: torch.save({k: v if v.layout == torch.strided else v.to_dense() for k, v in "
        "state_dict.items()}, 'dense.pth'), and read that"
    ),
    "meta": ": they were saved from the meta device and have no numbers. Save the real model",
    "device": (
        ": they were saved from a device that writes its own format. In PyTorch: "
        "torch.save({k: v.cpu() for k, v in state_dict.items()}, 'cpu.pth'), and read that"
    ),
}


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


def _to_array(loaded: _Loaded, tensor: _Tensor | _Array) -> np.ndarray:
    if type(tensor) is _Array:
        array = np.frombuffer(tensor.data, tensor.code)
        array = array.reshape(tensor.shape, order="F" if tensor.fortran else "C")
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        array.flags.writeable = False
        return array
    name, size = tensor.dtype, _SIZES[tensor.dtype]
    complex_number = name.startswith("complex")
    exact = None
    if name in _NUMPY:
        exact = np.dtype(_NUMPY[name])
    elif name in _EXTENSION_SIZES and name != "complex32":
        exact = _extension_dtype(name)
    elif name != "complex32":
        raise CheckpointError(f"torch.{name} has no NumPy counterpart: save another dtype")
    if exact is None and name not in ("bfloat16", "complex32"):
        raise MissingDependencyError(f"torch.{name} needs ml_dtypes: pip install ml_dtypes")
    # Without a type of its own, two bytes are read as an integer, and widened below.
    raw = exact or np.dtype("u4" if name == "complex32" else "u2")
    if tensor.numel == 0:
        array = np.empty(tensor.shape, raw)
    else:
        storage, first = tensor.storage, tensor.offset * size
        while storage.view is not None:
            parent, offset = storage.view
            first += offset * _SIZES[parent.dtype]
            storage = parent
        unit = size // 2 if complex_number else size
        buffer, start, end = _buffer(loaded, storage, unit)
        last = first + size * sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
        )
        if start + last + size > end:
            raise CheckpointError(f"a tensor ends outside storage {_text(storage.key)!r}")
        strides = tuple(s * size for s in tensor.strides)
        array = np.ndarray(tensor.shape, raw, buffer, start + first, strides)
    if exact is None and name == "bfloat16":
        array = (array.astype("u4") << 16).view("f4")
    elif exact is None:
        halves = np.ascontiguousarray(array)[..., None].view("f2").astype("f4")
        array = halves.view("c8")[..., 0]
    if tensor.conj:
        array = np.conj(array)
    if tensor.neg:
        array = np.negative(array)
    array = np.asarray(array)
    array.flags.writeable = False
    return array


def _dtype_name(value: _Tensor | _Array | _Unreadable) -> str:
    if type(value) is _Unreadable:
        return value.kind
    return value.dtype if type(value) is _Tensor else np.dtype(value.code).name


# ------------------------------------------------------------------------------------------- public


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointInfo:
    """What a weight file holds, found without reading a number of it.

    Attributes:
        path: The file.
        format: `"zip"`, `"stream"` (before PyTorch 1.6), `"tar"` (before 0.2), `"safetensors"`.
        size: In bytes.
        kind: `"state dict"`, or what stands in the way: `"quantised"`, `"sparse"`,
            `"TorchScript"`, `"pickled module"`, `"refused pickle"`, `"pickle"`, `"no tensors"`.
        safe: Whether every name that the file asks for is harmless.
        refused: The names that are not, in the file's order. None of them was imported.
        problem: Why `read_checkpoint` would refuse the file, in a sentence; None if it would not.
        key: The dotted path to the chosen state dict; `""` for the file's own top level.
        alternatives: Other entries with tensors in them, and how many: values for `key=`.
        prefix: What was removed from the front of every name (`"module."`), or `""`.
        tensors: Name to (shape, dtype), in the file's order.
        others: Everything else beside the tensors (epoch, settings ...), each in a few words.
        metadata: Text that the file carries about itself (safetensors, or `write_checkpoint`).
    """

    path: pathlib.Path
    format: str
    size: int
    kind: str = "state dict"
    safe: bool = True
    refused: tuple[str, ...] = ()
    problem: str | None = None
    key: str = ""
    alternatives: dict[str, int] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    tensors: dict[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict)
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold together."""
        return sum(math.prod(shape) for shape, _ in self.tensors.values())

    def hash(self, progress: Callable[[int, int], None] | None = None) -> str:
        """The file's sha256 in 64 hex digits.

        Args:
            progress: Called with (bytes done, bytes in all) after every 4 MiB.

        Raises:
            CheckpointError: The file cannot be read any more.
        """
        digest, done = hashlib.sha256(), 0
        try:
            with self.path.open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                while block := file.read(1 << 22):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total)
        except OSError as error:
            raise CheckpointError(f"cannot hash {self.path}: {error.strerror}") from error
        return digest.hexdigest()

    def to_json(self, indent: int | None = 2) -> str:
        """The same facts as JSON text."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts["path"] = str(self.path)
        facts["tensors"] = {
            name: {"shape": list(shape), "dtype": dtype}
            for name, (shape, dtype) in self.tensors.items()
        }
        return json.dumps({**facts, "parameters": self.parameters}, indent=indent)

    def __str__(self) -> str:
        formats = {"stream": "stream of pickles (PyTorch before 1.6)", "tar": "tar (before 0.2)"}
        lines = [_text(self.path.name, 200)]
        lines.append(f"  format   {formats.get(self.format, self.format)}, {self.size:,} bytes")
        if self.safe:
            lines.append("  safe     yes: it asks for nothing but tensors and plain containers")
        else:
            shown = ", ".join(_text(n, 100) for n in self.refused[:8])
            more = f" and {len(self.refused) - 8:,} more" if len(self.refused) > 8 else ""
            lines.append(f"  safe     NO: it wants {shown}{more}")
        lines.append(f"  holds    {self.kind}")
        if self.problem:
            lines.append(f"  problem  {self.problem}")
        if self.tensors:
            where = f" in {_text(self.key)!r}" if self.key else ""
            prefix = f", prefix {self.prefix!r} removed" if self.prefix else ""
            lines.append(
                f"  tensors  {len(self.tensors):,}{where}, {self.parameters:,} numbers{prefix}"
            )
        for name, count in list(self.alternatives.items())[:10]:
            lines.append(f"  also     key={_text(name)!r}: {count:,} tensors")
        for name, text in list(self.others.items())[:20]:
            lines.append(f"  beside   {_text(name)} = {text}")
        for name, text in list(self.metadata.items())[:20]:
            lines.append(f"  says     {_text(name)} = {_text(text)}")
        width = min(60, max((len(_text(n)) for n in self.tensors), default=0))
        for name, (shape, dtype) in self.tensors.items():
            lines.append(f"    {_text(name):<{width}}  {dtype:<8}  {shape}")
        return "\n".join(lines)


def inspect_checkpoint(path: str | os.PathLike, key: str | None = None) -> CheckpointInfo:
    """Says what a weight file holds, and whether it is safe, without reading its numbers.

    A file that is refused, or that holds no plain tensors, is described too: see `safe`,
    `refused`, `kind` and `problem`. Nothing in the file is run, and nothing is imported.

    Args:
        path: The file.
        key: The entry to look at instead of the chosen one; dots lead into nested dicts.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It is damaged, or no weight file at all, or has no entry `key`.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.pth"
        >>> write_checkpoint(path, {"fc.bias": np.zeros(3, "float32")})
        >>> info = inspect_checkpoint(path)
        >>> info.format, info.safe, info.tensors
        ('zip', True, {'fc.bias': ((3,), 'float32')})
    """
    with _only_our_errors(path, "inspect"):
        file = _path(path)
        loaded = _load(file)
        info, _ = _describe(file, loaded, key, keep_prefix=False)
    return info


def _describe(
    file: pathlib.Path, loaded: _Loaded, key: str | None, keep_prefix: bool
) -> tuple[CheckpointInfo, _Selection | None]:
    refused = bool(loaded.refused) or loaded.problem is not None
    selection = None if refused else _select(loaded, key, keep_prefix)
    kind, problem = _kind(loaded, selection, file.name)
    facts: dict[str, Any] = {}
    if selection is not None:
        facts = {
            "key": selection.key,
            "prefix": selection.prefix,
            "alternatives": selection.alternatives,
            "tensors": {
                name: (getattr(t, "shape", ()), _dtype_name(t))
                for name, t in selection.tensors.items()
            },
            "others": {
                name: _brief(value)
                for name, value in itertools.islice(selection.others.items(), 1000)
            },
        }
    info = CheckpointInfo(
        path=file,
        format="pickle" if loaded.kind == "pickle" else loaded.format,
        size=loaded.size,
        kind=kind,
        safe=not loaded.refused,
        refused=tuple(loaded.refused),
        problem=problem,
        metadata=loaded.metadata,
        **facts,
    )
    return info, selection


def read_checkpoint(
    path: str | os.PathLike, key: str | None = None, *, keep_prefix: bool = False
) -> dict[str, np.ndarray]:
    """Reads a weight file into NumPy arrays; needs no PyTorch and runs nothing from the file.

    Which dict is read, where several are nested: entries named as in `WRAPPERS` are entered in
    that order (`state_dict`, `model_state_dict`, ..., live weights before averaged ones), else the
    one entry that holds tensors and is no optimizer's or scheduler's, else all of them, their
    names joined by dots. `inspect_checkpoint` reports the choice; `key` overrides it. Prefixes
    `module.` (DataParallel) and `_orig_mod.` (torch.compile) are removed where every name has
    them. AveragedModel's counter `n_averaged` is left out.

    Args:
        path: `.pth`, `.pt`, `.th`, `.tar` (any of PyTorch's three formats) or `.safetensors`.
        key: The entry to read, such as `"model_ema"`; dots lead into nested dicts.
        keep_prefix: Leaves the names as they are in the file.

    Returns:
        Name to array, in the file's order. The arrays are read-only views of the memory-mapped
        file, with the tensor's own shape, strides and dtype; tensors that share a storage share
        memory. Files before PyTorch 1.6 are not aligned, and neither are their arrays (NumPy,
        and everything that goes through it, reads those too). bfloat16 and float8 become
        ml_dtypes types; without ml_dtypes, bfloat16 is widened to float32, exactly. complex32 is
        always widened to complex64. A tensor saved alone is called `"tensor"`.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It is damaged, refused ("the file wants to call os.system; not loaded"),
            of a kind without plain tensors, or no weight file at all; the message says which.
        MissingDependencyError: It holds float8 numbers, and ml_dtypes is not installed.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.pth"
        >>> write_checkpoint(path, {"fc.bias": np.arange(3, dtype="float32")})
        >>> read_checkpoint(path)["fc.bias"]
        array([0., 1., 2.], dtype=float32)
    """
    with _only_our_errors(path, "read"):
        file = _path(path)
        loaded = _load(file)
        info, selection = _describe(file, loaded, key, keep_prefix)
        if info.problem or selection is None:
            raise CheckpointError(info.problem or "it holds no tensors")
        arrays = {name: _to_array(loaded, tensor) for name, tensor in selection.tensors.items()}
        halves = sum(_dtype_name(t) == "bfloat16" for t in selection.tensors.values())
    if halves and _extension_dtype("bfloat16") is None:
        warnings.warn(
            f"{file.name}: {halves:,} bfloat16 tensors were widened to float32, exactly "
            f"(pip install ml_dtypes to keep bfloat16)",
            stacklevel=2,
        )
    return arrays


# ------------------------------------------------------------------------------------------ writing

_STORAGE_CLASSES = {
    dtype: f"{prefix}Storage"
    for prefix, dtype in _CLASSES.items()
    if dtype not in _QUANTISED_SIZES and prefix not in ("Untyped", "ComplexHalf")
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS.items()}


def write_checkpoint(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays as a PyTorch state dict or a safetensors file, whole or not at all.

    The same arrays give the same bytes. A `.pth` is PyTorch's zip format, which
    `torch.load(path, weights_only=True)` and `load_state_dict(strict=True)` take; PyTorch is not
    needed to write it. The file appears under its name only when it is complete.

    Args:
        path: Ends in `.pth`, `.pt`, `.th` or `.safetensors`, which chooses the format.
        tensors: Name to array (or anything that `numpy.asarray` takes), of any dtype of
            `read_checkpoint`.
        metadata: Text by name: safetensors' `__metadata__`; in a `.pth` a record beside the
            tensors, which PyTorch ignores and `inspect_checkpoint` shows.

    Raises:
        NotFoundError: The folder does not exist.
        CheckpointError: Another ending, an array that has no torch dtype, or the disk refused.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.safetensors"
        >>> write_checkpoint(path, {"w": np.eye(2)}, metadata={"from": "an example"})
        >>> inspect_checkpoint(path).metadata
        {'from': 'an example'}
    """
    with _only_our_errors(path, "write"):
        file = _path(path)
        suffix = file.suffix.lower()
        if suffix not in (".pth", ".pt", ".th", ".safetensors"):
            raise CheckpointError(f"its ending is {suffix!r}: use .pth, .pt, .th or .safetensors")
        if not file.parent.is_dir():
            raise NotFoundError(f"no folder {_text(file.parent, 500)} to write {file.name} into")
        arrays = _checked_arrays(tensors)
        about = {str(k): str(v) for k, v in sorted(dict(metadata or {}).items())}
        write = _write_safetensors if suffix == ".safetensors" else _write_zip
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as out:
                write(out, arrays, about)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def _checked_arrays(tensors: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, str]]:
    """Name to (array, torch's name of its dtype)."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"tensors should be a dict of arrays, not {type(tensors).__name__}")
    out = {}
    for name, value in tensors.items():
        if type(name) is not str or not name or len(name) > MAX_NAME:
            raise CheckpointError(f"{_brief(name)} is no name for a tensor")
        array = np.asarray(value)
        dtype = array.dtype.newbyteorder("=")
        if dtype.name not in _NUMPY and dtype.name not in _EXTENSION_SIZES:
            raise CheckpointError(f"{_text(name)!r} has dtype {array.dtype}, which torch lacks")
        out[name] = (array.astype(dtype, copy=False), dtype.name)
    return out


def _raw(array: np.ndarray) -> memoryview:
    """The array's bytes in C order, little-endian."""
    if array.dtype.name in _NUMPY:
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return memoryview(np.ascontiguousarray(array).reshape(-1).view("u1"))


def _write_zip(out: Any, arrays: dict[str, tuple[np.ndarray, str]], about: dict[str, str]) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def record(name: str, data: Any) -> None:
            info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            info.file_size = len(data)
            wide = len(data) >= 0xF0000000
            # torch maps storages in place, so each begins at a multiple of 64 bytes; the gap is
            # an extra field "FB", as its own writer makes it.
            header = out.tell() + 30 + len(info.filename.encode()) + 20 * wide + 4
            info.extra = struct.pack("<2sH", b"FB", -header % 64) + b"Z" * (-header % 64)
            with archive.open(info, "w", force_zip64=wide) as entry:
                entry.write(data)

        record("data.pkl", _state_dict_pickle(arrays))
        record("byteorder", b"little")
        for index, (array, _) in enumerate(arrays.values()):
            record(f"data/{index}", _raw(array))
        record("version", b"3\n")
        if about:
            record("extra/metadata.json", json.dumps(about, sort_keys=True).encode())


def _state_dict_pickle(arrays: dict[str, tuple[np.ndarray, str]]) -> bytes:
    """An OrderedDict of `_rebuild_tensor_v2` calls, in the opcodes that torch.save writes."""

    def text(value: str) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw

    def integer(value: int) -> bytes:
        if value < 256:
            return b"K" + struct.pack("<B", value)
        if value < 2**31:
            return b"J" + struct.pack("<i", value)
        return b"\x8a\x08" + struct.pack("<q", value)

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    new_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", new_dict, b"("]
    for index, (name, (array, dtype)) in enumerate(arrays.items()):
        strides = tuple(
            math.prod(max(n, 1) for n in array.shape[i + 1 :]) for i in range(array.ndim)
        )
        # Types younger than the storage classes are named beside an untyped storage.
        old = dtype in _STORAGE_CLASSES
        storage = f"torch\n{_STORAGE_CLASSES[dtype]}" if old else "torch.storage\nUntypedStorage"
        version, count = ("2", array.size) if old else ("3", array.nbytes)
        parts += [
            text(name),
            f"ctorch._utils\n_rebuild_tensor_v{version}\n".encode(),
            *(b"((", text("storage"), f"c{storage}\n".encode(), text(str(index)), text("cpu")),
            *(integer(count), b"tQ", integer(0), integers(array.shape), integers(strides)),
            *(b"\x89", new_dict, b"" if old else f"ctorch\n{dtype}\n".encode(), b"tR"),
        ]
    return b"".join([*parts, b"u."])


def _write_safetensors(
    out: Any, arrays: dict[str, tuple[np.ndarray, str]], about: dict[str, str]
) -> None:
    if "__metadata__" in arrays:
        raise CheckpointError("safetensors keeps the name '__metadata__' for itself")
    # The widest types first, as the library does: every tensor then begins aligned.
    order = sorted(arrays, key=lambda n: (-arrays[n][0].dtype.itemsize, n))
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    position = 0
    for name in order:
        array, dtype = arrays[name]
        if dtype not in _SAFETENSORS_NAMES:
            raise CheckpointError(f"{_text(name)!r} is {dtype}, which safetensors lacks: use .pth")
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        out.write(_raw(arrays[name][0]))
