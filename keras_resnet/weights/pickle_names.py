"""The names that may stand in a pickled weight file, and what a call of each makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.dtypes import ALIASES, CLASSES, QUANTISED_SIZES, SIZES
from keras_resnet.weights.stand_ins import (
    Array,
    Dict,
    Name,
    NumpyType,
    Parameter,
    Span,
    Tensor,
    Unreadable,
)


def _make_dict(reader: Any, args: tuple) -> Dict:
    """OrderedDict and its kind: empty, or (Python 2) from one dict or list of pairs."""
    out = Dict(reader.budget)
    for source in args[:1]:
        if type(source) is Dict:
            reader.budget.spend(len(source))
            out.update(source)
            out.spelled = set(source.spelled) if source.spelled else ()
        elif type(source) in (list, tuple):
            reader.budget.spend(len(source))
            for pair in source:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise CheckpointError("a dict in the pickle is made from something not pairs")
                out[pair[0]] = pair[1]
    return out


def _make_counter(reader: Any, args: tuple) -> Any:
    """From a dict; from anything else it would count."""
    return _make_dict(reader, args) if not args or type(args[0]) is Dict else None


def _make_list(reader: Any, args: tuple) -> list:
    """Sets become lists too: nothing from the file is ever hashed but strings."""
    if not args or type(args[0]) not in (list, tuple):
        return []
    reader.budget.spend(len(args[0]))
    return list(args[0])


def _make_tuple(reader: Any, args: tuple) -> tuple:
    return tuple(_make_list(reader, args))


def _make_bytes(reader: Any, args: tuple) -> Any:
    """`_codecs.encode(text, "latin1")`, `bytes(...)`, `bytearray(...)`: from text or bytes."""
    source = args[0] if args else b""
    encoding = args[1] if len(args) > 1 else "latin1"
    if type(source) not in (str, bytes):
        return source if type(source) is Span else None
    reader.budget.spend_bytes(len(source))
    if type(source) is bytes:
        return source
    if encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        return None
    try:
        return source.encode(encoding)
    except UnicodeEncodeError:
        return None


def _make_complex(reader: Any, args: tuple) -> Any:
    return complex(*args) if args and all(type(a) is float for a in args[:2]) else None


def _make_tensor(reader: Any, args: tuple) -> Any:
    """`_rebuild_tensor(storage, offset, size, stride)`, and `_v2` with (..., hooks, metadata)."""
    if len(args) < 4:
        raise CheckpointError(f"a tensor is built from {len(args)} values instead of 4 or more")
    return plain(Tensor(*args[:4], metadata=args[6] if len(args) > 6 else None))


def _make_typed_tensor(reader: Any, args: tuple) -> Any:
    """`_rebuild_tensor_v3`: as v2, the element type named after an untyped storage."""
    if len(args) < 7 or type(args[6]) is not Name or args[6].dtype not in SIZES:
        raise CheckpointError("a tensor of a type that this reader does not know")
    metadata = args[7] if len(args) > 7 else None
    return plain(Tensor(*args[:4], dtype=args[6].dtype, metadata=metadata))


def plain(tensor: Tensor) -> Tensor | Unreadable:
    """The tensor, unless its numbers are not plain ones."""
    return Unreadable("quantised") if tensor.dtype in QUANTISED_SIZES else tensor


def _first(reader: Any, args: tuple) -> Any:
    """`_rebuild_parameter(data, requires_grad, hooks, state)`, `Parameter(data)`: the data."""
    _check_attributes(args[3:])
    return args[0] if args else Parameter()


def _check_attributes(states: tuple) -> None:
    """Refuses Python attributes of a tensor that would be its numbers: torch sets each by name."""
    for state in states:
        for part in state if type(state) is tuple else (state,):
            numbers = {"data", "real", "imag", "names", "__class__", "__dict__"}
            if isinstance(part, dict) and (found := numbers & part.keys()):
                raise CheckpointError(f"a tensor whose attribute {min(found)!r} is set afterwards")


def _make_subclass(reader: Any, args: tuple) -> Any:
    """`_rebuild_from_type_v2(function, type, args, state)`: a tensor with Python attributes."""
    if len(args) < 3 or type(args[0]) is not Name or type(args[2]) is not tuple:
        raise CheckpointError("a tensor with attributes is not built as torch builds it")
    reader.budget.spend(3)
    _check_attributes(args[3:])
    return reader.call(args[0], args[2])


def _make_numpy_type(reader: Any, args: tuple) -> Any:
    code = args[0] if args else None
    if type(code) is bytes and len(code) < 9:
        code = code.decode("latin-1")
    if type(code) is str and re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", code):
        code = code if code[0] in "<>|=" else f"={code}"
        return NumpyType(code, fixed=code[0] != ">" and not (len(args) > 2 and args[2]))
    return None


def _make_numpy_scalar(reader: Any, args: tuple) -> Any:
    if len(args) == 2 and type(args[0]) is NumpyType and type(args[1]) in (bytes, str):
        dtype, raw = args
        if len(raw) != dtype.size:
            raise CheckpointError("a NumPy number in the pickle has the wrong number of bytes")
        raw = raw.encode("latin-1") if type(raw) is str else raw  # as Python 2 wrote it
        return np.frombuffer(raw, dtype.code)[0].item()
    return None


def _make_array(reader: Any, args: tuple) -> Any:
    """`_frombuffer(bytes, dtype, shape, order)`, as protocol 5 writes an array."""
    if len(args) < 4 or args[3] not in ("C", "F"):
        return Unreadable("permuted")
    array = Array()
    array.__setstate__((1, args[2], args[1], args[3] == "F", args[0]))
    return array


def _unreadable(kind: str) -> Callable:
    return lambda reader, args: Unreadable(kind)


def _nothing(reader: Any, args: tuple) -> None:
    """A harmless call whose result no tensor needs: `call` keeps a record of it."""
    return None


_Rows = dict[str, tuple[Callable, str | None]]


def _rows(make: Callable, *names: str, within: str = "", dtype: str | None = None) -> _Rows:
    return {f"{within}{name}": (make, dtype) for name in names}


def _python_names() -> _Rows:
    names = {
        **_rows(_make_dict, "collections.OrderedDict"),
        **_rows(_make_counter, "collections.Counter"),
        **_rows(lambda reader, args: _make_dict(reader, args[1:]), "collections.defaultdict"),
        **_rows(_make_list, "collections.deque"),
        **_rows(_make_bytes, "_codecs.encode"),
        # Settings beside the weights: the record shows name and fields.
        **_rows(_nothing, "argparse.Namespace", "types.SimpleNamespace"),
        **_rows(_nothing, "copyreg._reconstructor", "copy_reg._reconstructor"),
    }
    times = ("datetime", "date", "time", "timedelta", "timezone")
    names |= _rows(_nothing, *times, within="datetime.")
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    for module in ("pathlib.", "pathlib._local."):
        names |= _rows(_nothing, *paths, within=module)
    others = ("int", "float", "bool", "str", "slice", "range", "object", "long", "unicode")
    for module in ("builtins.", "__builtin__."):
        names |= _rows(_make_dict, "dict", within=module)
        names |= _rows(_make_list, "list", "set", "frozenset", within=module)
        names |= _rows(_make_tuple, "tuple", within=module)
        names |= _rows(_make_bytes, "bytes", "bytearray", within=module)
        names |= _rows(_make_complex, "complex", within=module)
        names |= _rows(_nothing, *others, within=module)
    return names


def _numpy_names() -> _Rows:
    names = _rows(_make_numpy_type, "numpy.dtype")
    for core in ("numpy.core.multiarray.", "numpy._core.multiarray."):
        names |= _rows(_make_numpy_scalar, "scalar", within=core)
        names |= _rows(lambda reader, args: Array(), "_reconstruct", within=core)
    names |= _rows(_make_array, "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
    numbers = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    numbers += ["ndarray", "float16", "float32", "float64", "bool_", "bool"]
    return names | _rows(_nothing, *numbers, within="numpy.")


def _torch_names() -> _Rows:
    names = {
        **_rows(_make_tensor, "_rebuild_tensor", "_rebuild_tensor_v2", within="torch._utils."),
        **_rows(_make_typed_tensor, "torch._utils._rebuild_tensor_v3"),
        **_rows(_make_subclass, "torch._tensor._rebuild_from_type_v2"),
        **_rows(_make_tuple, "torch.Size"),
        **_rows(_nothing, "torch.serialization._get_layout", "torch.torch_version.TorchVersion"),
        **_rows(_nothing, "torch._tensor.Tensor"),
    }
    names |= _rows(_first, "parameter", "parameter_with_state", within="torch._utils._rebuild_")
    for module in ("torch.nn.", "torch.nn.parameter."):
        names |= _rows(_first, "Parameter", "Buffer", within=module)
    for kind, rebuilt in {
        "quantised": ("qtensor",),
        "sparse": ("sparse_tensor", "sparse_csr_tensor"),
        "nested": ("nested_tensor",),
        "meta": ("meta_tensor_no_storage", "meta_tensor"),
        "device": ("device_tensor_from_numpy", "device_tensor_from_cpu_tensor", "xla_tensor"),
        "subclassed": ("wrapper_subclass",),
    }.items():
        names |= _rows(_unreadable(kind), *rebuilt, within="torch._utils._rebuild_")
    schemes = [f"per_{k}_affine{f}" for k in ("tensor", "channel") for f in ("", "_float_qparams")]
    layouts = ("strided", "sparse_coo", "sparse_csr")
    formats = ("contiguous_format", "channels_last", "preserve_format")
    names |= _rows(_nothing, "device", "Tensor", *layouts, *formats, *schemes, within="torch.")
    for name, dtype in {**{dtype: dtype for dtype in SIZES}, **ALIASES}.items():
        names |= _rows(_nothing, name, within="torch.", dtype=dtype)
    for prefix, dtype in CLASSES.items():
        for module in ("torch.", "torch.cuda.", "torch.storage."):
            kinds = (f"{prefix}Storage", f"{prefix}Tensor")
            names |= _rows(_nothing, *kinds, within=module, dtype=dtype)
    for module in ("torch.", "torch.storage."):
        untyped = ("_UntypedStorage", "TypedStorage", "_TypedStorage")
        names |= _rows(_nothing, *untyped, within=module, dtype="uint8")
    return names


# Every name that resolves: what a call of it makes (from the reader and the values), and the
# element type that the name itself stands for.
HARMLESS: _Rows = {**_python_names(), **_numpy_names(), **_torch_names()}
IDENTIFIER = re.compile(r"[^\W\d][\w.<>]*(\.[\w.<>]+)*")
