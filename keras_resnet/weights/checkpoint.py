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
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_resnet.errors import (
    CheckpointError,
    KerasResNetError,
    MissingDependencyError,
    NotFoundError,
    did_you_mean,
)
from keras_resnet.weights.dtypes import _EXTENSION_SIZES, _NUMPY, _SIZES, _extension_dtype
from keras_resnet.weights.pickles import (
    _IDENTIFIER,
    MAX_STEPS,
    _Array,
    _brief,
    _Parameter,
    _Tensor,
    _text,
    _Unreadable,
)
from keras_resnet.weights.torch_files import (
    _buffer,
    _load_safetensors,
    _load_stream,
    _load_tar,
    _load_zip,
    _Loaded,
    _pickled_module,
)

MAX_NAME = 512
MAX_LEAVES = 100_000
MAX_DEPTH = 16  # of dicts inside dicts

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
