"""Damages real weight files at random and reads them; run alone for a long session.

    python tests/weights/fuzz_checkpoint.py --count 20000 --seed 0
    python tests/weights/fuzz_checkpoint.py --minutes 30 --seed 1

Every damaged file must end in a result or in `CheckpointError`, in `--limit` CPU seconds and
within 1.2 times its size and 100 MB. `tests/weights/test_checkpoint.py` runs a short session of
the same; the frame is `tests/fuzzing.py`. The samples of the folder `shared` are damaged too where
`KERAS_RESNET_SHARED` names it.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import struct
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fuzzing
import numpy as np
import torch

from keras_resnet.errors import CheckpointError
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.writing import write_checkpoint

# Instructions that make pickles interesting: containers, calls, memo, lengths, names.
OPCODES = b"(.)0123IJKLMNPQRSTUVXBC]abcdeghijlopqrstu}\x80\x81\x82\x84\x85\x86\x87\x88\x8a\x8b\x8c"
OPCODES += b"\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98GF"
WORDS = [bytes([code]) for code in OPCODES]
NET = "refused by the net"


def tar_bytes(tensors, *, parameters=(), views=()) -> bytes:
    """A file as PyTorch 0.1 wrote it: a tar of sys_info, pickle, tensors and storages.

    Args:
        tensors: Name to torch tensor; tensors that share a storage share it in the file.
        parameters: Names stored as `torch.nn.Parameter`.
        views: Names whose storage becomes a view (offset 0) of another storage of the file.
    """

    def dumps(value) -> bytes:
        return pickle.dumps(value, protocol=2)

    def named(kind: str, *values) -> bytes:
        # A tuple of values and a class of torch's, by name.
        body = b"".join(dumps(v)[2:-1] for v in values)
        return b"\x80\x02(" + body + f"ctorch\n{kind}\nt.".encode()

    kinds = {
        **{torch.float32: "Float", torch.float64: "Double", torch.float16: "Half"},
        **{torch.int64: "Long", torch.int32: "Int", torch.uint8: "Byte"},
    }
    storages, described, keys, seen, aliases = [], [], {}, {}, []
    for index, (name, tensor) in enumerate(tensors.items()):
        storage = tensor.untyped_storage()
        kind, address = kinds[tensor.dtype], storage.data_ptr()
        if address not in seen:
            seen[address] = 10_000 + index
            numbers = bytes(storage)
            length = struct.pack("<q", len(numbers) // tensor.element_size())
            head = named(f"{kind}Storage", seen[address], "cpu")
            storages.append(head + length + numbers)
        root = seen[address]
        if name in views:
            numel = len(bytes(storage)) // tensor.element_size()
            aliases.append((30_000 + index, root, 0, numel))
            root = 30_000 + index
        keys[name] = 20_000 + index
        n = tensor.dim()
        described.append(
            named(f"{kind}Tensor", keys[name], root)
            + struct.pack("<ii", n, 0)
            + struct.pack(
                f"<{2 * n + 1}q", *tensor.shape, *tensor.stride(), tensor.storage_offset()
            )
        )
    body = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for name, key in keys.items():
        reference = dumps(str(key))[2:-1] + b"Q"
        if name in parameters:
            reference = b"ctorch.nn.parameter\nParameter\n)\x81(" + reference + b"NN\x88\x89tb"
        body.append(dumps(name)[2:-1] + reference)
    members = {
        "sys_info": dumps({"protocol_version": 1000, "little_endian": True, "type_sizes": {}}),
        "pickle": b"".join(body) + b"u.",
        "tensors": dumps(len(described)) + b"".join(described),
        "storages": dumps(len(storages)) + b"".join(storages) + dumps(aliases),
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1483719550.98166
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def state() -> dict[str, torch.Tensor]:
    """A small state dict with everything in it: sharing, strides, 0-d, half, a Parameter."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    return collections.OrderedDict(
        {
            "module.conv1.weight": weight,
            "module.tied.weight": weight,
            "module.conv1.transposed": weight.permute(1, 0, 3, 2),
            "module.bn1.running_var": torch.rand(8)[2:6],
            "module.bn1.num_batches_tracked": torch.tensor(7),
            "module.half": torch.randn(5).half(),
            "module.fc.weight": torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64)),
            "module.expanded": torch.ones(1).expand(3, 4),
        }
    )


def samples(shared: pathlib.Path | None = None) -> dict[str, bytes]:
    """Real files of every format, by a name with the right ending."""

    def saved(value, **options) -> bytes:
        out = io.BytesIO()
        torch.save(value, out, **options)
        return out.getvalue()

    tensors = state()
    tensors_half = {**tensors, "module.bfloat": torch.randn(4).bfloat16()}
    tensors_half["module.count"] = torch.ones(3, dtype=torch.uint16)
    settings = argparse.Namespace(lr=0.1, epochs=[30, 60], name="resnet")
    checkpoint = {"epoch": np.float64(3), "state_dict": tensors, "args": settings}
    checkpoint["optimizer"] = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
    files = {
        "zip.pth": saved(tensors_half),
        "zip4.pth": saved(checkpoint, pickle_protocol=4),
        "stream.pth": saved(tensors, _use_new_zipfile_serialization=False),
        "stream5.pth": saved(checkpoint, _use_new_zipfile_serialization=False, pickle_protocol=5),
        "tar.pth": tar_bytes(
            {k: v.detach() for k, v in tensors.items()},
            parameters=["module.fc.weight"],
            views=["module.tied.weight"],
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        arrays = {k: v.detach().numpy() for k, v in tensors.items()}
        for name in ("own.pth", "own.safetensors"):
            path = pathlib.Path(folder) / name
            write_checkpoint(path, arrays, metadata={"from": "a test"})
            files[name] = path.read_bytes()
    if shared is not None:
        for name in ("resnet20-12fca82f.th", "tiny_tar_format.pth"):
            files[name] = (shared / "weights" / name).read_bytes()
    return files


def mutate(name: str, data: bytes, random: random.Random) -> bytes:
    """A damaged file."""
    return fuzzing.damaged(data, random, WORDS)


def read(path: pathlib.Path) -> str:
    """Reads a file to its last number; "read", or what kind of refusal it met."""
    told = "read"
    try:
        info = inspect_checkpoint(path)
        assert str(info) and info.to_json()
    except CheckpointError as error:
        told = _kind(error)
    try:
        arrays = read_checkpoint(path)
    except CheckpointError as error:
        return told if told != "read" else _kind(error)
    for array in arrays.values():  # a view outside the file would crash here
        if array.size <= 1 << 18:
            array.tobytes()
        else:
            bool(array[(0,) * array.ndim]), bool(array[(-1,) * array.ndim])
    return "read"


def _kind(error: CheckpointError) -> str:
    """Refused by a rule, or by the net under all rules (worth a look, though no failure)."""
    return NET if "not what it seems" in str(error) else "refused"


if __name__ == "__main__":
    shared = os.environ.get("KERAS_RESNET_SHARED")
    fuzzing.main(
        __doc__,
        lambda: samples(pathlib.Path(shared) if shared else None),
        mutate,
        read,
        keep=[NET],
    )
