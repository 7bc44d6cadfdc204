"""Reads and writes weight files without PyTorch: `.pth`, `.tar`, `.safetensors` and others.

A `.pth` file is a pickle, and a pickle is a program. Here it is run with nothing to hold
(`pickles.py`): a name in the file resolves to an inert stand-in, a call of a stand-in makes a
record of the call, and nothing is ever imported. So a hostile file can be read to its end, and
what it wants can be named, without any of it happening. Only if every name was harmless are the
tensors handed out.

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
| h5          | Keras' weights, kernels with torch's axes; `layer.kernel`, `layer.gamma`        |
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from keras_resnet.system.errors import CheckpointError
from keras_resnet.system.files import to_json
from keras_resnet.weights.arrays import dtype_name, to_array
from keras_resnet.weights.dialects import unwritten
from keras_resnet.weights.h5_files import folded_biases
from keras_resnet.weights.loaded import Loaded
from keras_resnet.weights.matching import Network, find_networks, grouped
from keras_resnet.weights.opening import as_path, only_our_errors, open_file
from keras_resnet.weights.selection import Selection, kind_of, select
from keras_resnet.weights.stand_ins import brief, one_line


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointInfo:
    """What a weight file holds, found without reading a number of it."""

    path: pathlib.Path
    # "zip", "stream" (before PyTorch 1.6), "tar" (before 0.2), "safetensors", "h5" (Keras').
    format: str
    size: int  # in bytes
    # Or what stands in the way: "quantised", "sparse", "TorchScript", "pickled module", "refused
    # pickle", "pickle", "no tensors".
    kind: str = "state dict"
    safe: bool = True  # whether every name that the file asks for is harmless
    refused: tuple[str, ...] = ()  # those that are not, in its order; none of them was imported
    problem: str | None = None  # why `read_checkpoint` would refuse the file, in a sentence
    key: str = ""  # the dotted path to the chosen state dict; "" for the file's own top level
    # Other entries with tensors in them, and how many: values for `key=`.
    alternatives: dict[str, int] = dataclasses.field(default_factory=dict)
    prefix: str = ""  # what was removed from the front of every name ("module.")
    # Name to (shape, dtype), in the file's order.
    tensors: dict[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict)
    # What is beside them (epoch, settings ...), each in a few words, and parts that were ignored.
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    # Text that the file carries about itself (safetensors, or `write_checkpoint`).
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def networks(self) -> list[Network]:
        """The networks of the table among the tensors, in the file's order."""
        folded = set(folded_biases(self.tensors).values())
        shapes = {name: shape for name, (shape, _) in self.tensors.items() if name not in folded}
        shapes |= {new: shapes[scale] for new, scale in unwritten(shapes).items()}
        found = find_networks(shapes)
        return [network for network in found if not network.strange]

    def key_of(self, network: Network) -> str:
        """What `key=` takes to mean that network of the file."""
        front = f"{self.prefix}{network.prefix}".removesuffix(".")
        return ".".join(part for part in (self.key, front) if part)

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
        tensors = self.tensors.items()
        facts["tensors"] = {name: {"shape": list(s), "dtype": d} for name, (s, d) in tensors}
        facts["networks"] = [
            {"key": self.key_of(n), "names": n.dialect.name,
             "variants": [list(v) for v in n.variants], "beside": [*n.near, *n.beside]}
            for n in self.networks
        ]  # fmt: skip
        return to_json({**facts, "parameters": self.parameters}, indent=indent)

    def __str__(self) -> str:
        formats = {"stream": "stream of pickles (PyTorch before 1.6)", "tar": "tar (before 0.2)"}
        lines = [one_line(self.path.name, 200)]
        lines.append(f"  format   {formats.get(self.format, self.format)}, {self.size:,} bytes")
        if self.safe:
            lines.append("  safe     yes: it asks for nothing but tensors and plain containers")
        else:
            shown = ", ".join(one_line(n, 100) for n in self.refused[:8])
            more = f" and {len(self.refused) - 8:,} more" if len(self.refused) > 8 else ""
            lines.append(f"  safe     NO: it wants {shown}{more}")
        lines.append(f"  holds    {self.kind}")
        if self.problem:
            lines.append(f"  problem  {self.problem}")
        if self.tensors:
            where = f" in {one_line(self.key)!r}" if self.key else ""
            prefix = f", prefix {self.prefix!r} removed" if self.prefix else ""
            lines.append(
                f"  tensors  {len(self.tensors):,}{where}, {self.parameters:,} numbers{prefix}"
            )
        for network in self.networks[:10]:
            key = f", key={one_line(self.key_of(network), 600)!r}" if self.networks[1:] else ""
            lines.append(f"  network  {one_line(network)}{key}")
        others = {name for network in self.networks for name in network.names.values()}
        others |= set(folded_biases(self.tensors).values())
        if self.networks and (rest := [name for name in self.tensors if name not in others]):
            lines.append(f"  left out {one_line(grouped(rest, 10), 300)}")
        for name, count in list(self.alternatives.items())[:10]:
            lines.append(f"  also     key={one_line(name)!r}: {count:,} tensors")
        for name, text in list(self.others.items())[:20]:
            lines.append(f"  beside   {one_line(name)} = {text}")
        for name, text in list(self.metadata.items())[:20]:
            lines.append(f"  says     {one_line(name)} = {one_line(text)}")
        width = min(60, max((len(one_line(n)) for n in self.tensors), default=0))
        for name, (shape, dtype) in self.tensors.items():
            lines.append(f"    {one_line(name):<{width}}  {dtype:<8}  {shape}")
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
        >>> import pathlib, tempfile
        >>> import keras_resnet as kr
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.pth"
        >>> kr.write_checkpoint(path, {"fc.bias": np.zeros(3, "float32")})
        >>> info = kr.inspect_checkpoint(path)
        >>> info.format, info.safe, info.tensors
        ('zip', True, {'fc.bias': ((3,), 'float32')})
    """
    with only_our_errors(path, "inspect"):
        file = as_path(path)
        loaded = open_file(file)
        info, _ = _describe(file, loaded, key, keep_prefix=False)
    return info


def _describe(
    file: pathlib.Path, loaded: Loaded, key: str | None, keep_prefix: bool
) -> tuple[CheckpointInfo, Selection | None]:
    refused = bool(loaded.refused) or loaded.problem is not None
    selection = None if refused else select(loaded, key, keep_prefix)
    kind, problem = kind_of(loaded, selection, file.name)
    facts: dict[str, Any] = {}
    notes = dict(loaded.notes)
    if selection is not None:
        found = selection.tensors.items()
        facts = {name: getattr(selection, name) for name in ("key", "prefix", "alternatives")}
        facts["tensors"] = {name: (getattr(t, "shape", ()), dtype_name(t)) for name, t in found}
        others = itertools.islice(selection.others.items(), 1000)
        notes |= {name: brief(value) for name, value in others if name not in notes}
        notes.pop("meta.style", None)
        if style := _openmmlabs_style(selection.others):
            notes["meta.style"] = style
    info = CheckpointInfo(
        path=file,
        format="pickle" if loaded.kind == "pickle" else loaded.format,
        size=loaded.size,
        kind=kind,
        safe=not loaded.refused,
        refused=tuple(loaded.refused),
        problem=problem,
        others=notes,
        metadata=loaded.metadata,
        **facts,
    )
    return info, selection


def _openmmlabs_style(others: Mapping[str, Any]) -> str:
    """Where bottlenecks stride by the config in an OpenMMLab checkpoint, a text of Python."""
    metas = (others.get("meta"), *(others.get(f"meta.{name}") for name in ("config", "cfg")))
    texts = [t for m in metas for t in (m.values() if isinstance(m, dict) else [m])]
    pattern = r"""\bstyle['"]? ?[=:] ?['"](caffe|pytorch)\b"""
    found = {s for text in texts if isinstance(text, str) for s in re.findall(pattern, text)}
    return " and ".join(sorted(found))


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
        path: `.pth`, `.pt`, `.th`, `.tar` (any of PyTorch's three formats), `.safetensors`, a
            pickle of NumPy arrays (Detectron2's `.pkl`), or Keras' `.weights.h5` and `.h5`.
        key: The entry to read, such as `"model_ema"`; dots lead into nested dicts.
        keep_prefix: Leaves the names as they are in the file.

    Returns:
        Name to array, in the file's order. The arrays are read-only views of the memory-mapped
        file, with the tensor's own shape, strides and dtype; tensors that share a storage share
        memory. Files before PyTorch 1.6 are not aligned, and neither are their arrays (NumPy,
        and everything that goes through it, reads those too). bfloat16 and float8 become
        ml_dtypes types, complex32 is widened to complex64. A tensor saved alone is called
        `"tensor"`.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It is damaged, refused ("the file wants to call os.system; not loaded"),
            of a kind without plain tensors, or no weight file at all; the message says which.

    Examples:
        >>> import pathlib, tempfile
        >>> import keras_resnet as kr
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.pth"
        >>> kr.write_checkpoint(path, {"fc.bias": np.arange(3, dtype="float32")})
        >>> kr.read_checkpoint(path)["fc.bias"]
        array([0., 1., 2.], dtype=float32)
    """
    with only_our_errors(path, "read"):
        file = as_path(path)
        loaded = open_file(file)
        info, selection = _describe(file, loaded, key, keep_prefix)
        if info.problem or selection is None:
            raise CheckpointError(info.problem or "it holds no tensors")
        arrays = {name: to_array(loaded, tensor) for name, tensor in selection.tensors.items()}
    return arrays
