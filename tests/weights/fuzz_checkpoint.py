"""Damages real weight files at random and reads them; run alone for a long session.

    python tests/weights/fuzz_checkpoint.py --count 20000 --seed 0
    python tests/weights/fuzz_checkpoint.py --minutes 30 --seed 1
    python tests/weights/fuzz_checkpoint.py --read-with torch

Every damaged file must end in a result or in `CheckpointError`, in `--limit` CPU seconds and
within 1.2 times its size and 100 MB; with `--read-with torch`, what is called safe is also loaded
by torch, which may run nothing of it and must find the same numbers.
`tests/weights/test_checkpoint.py` runs a short session of both; the frame is `tests/fuzzing.py`.
The samples of the folder `shared` are damaged too where `KERAS_RESNET_SHARED` names it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import pickle
import pickletools
import random
import struct
import sys
import tarfile
import tempfile
import types
import warnings
import zipfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fuzzing
import h5py
import numpy as np
import torch

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights import download
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


def other_samples() -> dict[str, bytes]:
    """The same of formats that are not torch's, and what stands beside weights on the hub."""
    arrays = {f"{i}.weight": np.full((3, i), i, "f4") for i in range(5)}
    arrays["5.weight"] = np.arange(3000, dtype="f4")  # so long that its bytes stay in the file
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    files = {f"{protocol}.pkl": pickle.dumps(content, protocol) for protocol in (2, 5)}
    files |= {name: h5_bytes(name) for name in ("a.h5", "a.weights.h5")}
    return {**files, "config.json": json.dumps(HUB).encode()}


HUB = {
    "architecture": "resnet50",
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "test_input_size": [3, 288, 288], "crop_pct": 0.95,
        "test_crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
    },
    "label_names": ["a", "b"], "id2label": {"0": "a", "1": "b"}, "model_type": "resnet",
    "downsample_in_bottleneck": False, "model_args": None,
}  # fmt: skip


def h5_bytes(name: str) -> bytes:
    """Weights as Keras writes them: its older files and its newer ones."""
    out = io.BytesIO()
    layers = {"conv1_conv": (3, 3, 3, 4), "conv1_bn": (4, 4, 4, 4), "predictions": (4, 2)}
    with h5py.File(out, "w") as file:
        for number, (layer, shape) in enumerate(layers.items()):
            norm = layer == "conv1_bn"
            kinds = ("gamma", "beta", "moving_mean", "moving_variance") if norm else ("kernel",)
            for i, kind in enumerate(kinds):
                numbers = np.random.default_rng(i).random(shape[i : i + 1] if norm else shape, "f4")
                if name == "a.h5":
                    file[f"model_weights/{layer}/{layer}/{kind}:0"] = numbers
                else:
                    of = ("conv2d", "batch_normalization", "dense")[number]
                    file[f"layers/{of}/vars/{i}"] = numbers
                    file[f"layers/{of}/vars"].attrs["name"] = layer
        file["optimizer/vars/0"] = np.int64(3)
    return out.getvalue()


# ------------------------------------------------------------------------------ structured damage

SUNG: list[Any] = []  # what the canary was called with: code of a file that ran
sys.modules["fuzz_canary"] = types.ModuleType("fuzz_canary")
exec("def sing(*values): sung.extend(values)", vars(sys.modules["fuzz_canary"]))
sys.modules["fuzz_canary"].sung = SUNG  # type: ignore[attr-defined]
CANARY = b"cfuzz_canary\nsing\nK\x01\x85R"
# Whole values, and what is done to the value on top of the stack, as instructions.
VALUES = [
    CANARY,
    b"N",
    b"K\x07",
    b"}",
    b"]",
    b")",
    b"X\x01\x00\x00\x00w",
    b"U\x02\xc3\xa9",
    b"J\xff" * 2,
]
VALUES += [b"ccollections\nOrderedDict\n)R", b"ctorch\nFloatStorage\n", b"cnumpy\ndtype\n", b"\x88"]
DONE = [b"0" + value for value in VALUES]
DONE += [
    b"b",
    b"}b",
    b"N}\x86b",
    b"\x85R",
    b")\x81",
    b"s",
    b"a",
    b"e",
    b"u",
    b"Q",
    b"\x85",
    b"\x86",
    b"2",
    b"0",
]
DONE += [CANARY + b"0", b"K\x00K\x00)R", b"N" + b"ctorch\nDoubleStorage\n" + b"0b"]


def instructions(pickle_: bytes) -> list[bytes]:
    """A pickle in pieces, and what follows it as the last."""
    pieces, last = [], 0
    source = io.BytesIO(pickle_)
    for _ in pickletools.genops(source):
        pieces.append(pickle_[last : source.tell()])
        last = source.tell()
    return [*pieces, pickle_[last:]]


def damaged_pickle(pickle_: bytes, random: random.Random) -> bytes:
    """Instructions left out, repeated, exchanged, put in, and their values changed."""
    try:
        *pieces, rest = instructions(pickle_)
    except ValueError:
        return fuzzing.damaged(pickle_, random, WORDS)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, other = random.randrange(len(pieces)), random.randrange(len(pieces))
        piece = pieces[at]
        match random.randrange(8):
            case 0:
                pieces[at] = b""
            case 1:
                pieces[at] = pieces[other]
            case 2:
                pieces[at], pieces[other] = pieces[other], piece
            case 3:
                pieces[at:at] = pieces[other : other + random.randrange(1, 12)]
            case 4:
                pieces[at] = piece + random.choice(DONE)
            case 5:
                pieces[at] = random.choice(VALUES) + piece
            case 6 if len(piece) > 1:
                pieces[at] = piece[:1] + fuzzing.damaged(piece[1:], random, WORDS, times=(1,))
            case _:
                same = [p for p in pieces if p[:1] == piece[:1]]
                pieces[at] = random.choice(same)
    return b"".join(pieces) + rest


def damaged_zip(data: bytes, random: random.Random) -> bytes:
    """Members damaged, renamed, repeated, moved, packed; the whole put behind or before bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    method = random.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(members))
        name, body = members[at]
        folder, _, rest = name.partition("/")
        match random.randrange(9):
            case 0 | 1 | 2:
                at = next(i for i, (n, _) in enumerate(members) if n.lower().endswith("data.pkl"))
                members[at] = (members[at][0], damaged_pickle(members[at][1], random))
            case 3:
                members[at] = (name, fuzzing.damaged(body, random, WORDS, times=(1,)) + b"\0")
            case 4:
                names = [name.upper(), f"x/{rest}", f"{folder}/./{rest}", f"{name}\0x", f"./{name}"]
                names += [name.replace("/", "\\"), f"{folder}/{rest.title()}", f"/{name}", name]
                members.insert(random.randrange(len(members)), (random.choice(names), body))
            case 5:
                members.append(members.pop(at))
            case 6:
                extra = {
                    "byteorder": random.choice((b"big", b"little", b"Big", b"")),
                    "version": b"3\n",
                }
                extra |= {
                    "constants.pkl": b"\x80\x02).",
                    ".format_version": b"1",
                    "data.pkl": CANARY + b".",
                }
                extra |= {
                    ".data/serialization_id": b"1" * 40,
                    "code/a.py": b"",
                    "extra/metadata.json": b"[]",
                }
                rest = random.choice(list(extra))
                members.insert(random.randrange(2), (f"{folder}/{rest}", extra[rest]))
            case 7:
                del members[at]
            case 8:
                members[at] = (name, members[random.randrange(len(members))][1])
        if not members:
            break
        if not any(n.lower().endswith("data.pkl") for n, _ in members):
            break
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as new:
        warnings.simplefilter("ignore")  # a name twice
        for name, body in members:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            with new.open(info, "w", force_zip64=random.random() < 0.1) as member:
                member.write(body)
    packed = out.getvalue()
    if random.random() < 0.3:
        directory = packed.find(b"PK\x01\x02")
        tail = fuzzing.damaged(
            packed[directory:], random, [b"PK\x05\x06", b"PK\x01\x02"], times=(1,)
        )
        packed = packed[:directory] + tail
    if random.random() < 0.1:
        packed = random.choice((packed + packed, packed + CANARY + b".", CANARY + b"." + packed))
    return packed


def damaged_stream(data: bytes, random: random.Random) -> bytes:
    """One of its five pickles damaged, or what follows them, or a pickle put in."""
    parts, source = [], io.BytesIO(data)
    for _ in range(5):
        start = source.tell()
        for _ in pickletools.genops(source):
            pass
        parts.append(data[start : source.tell()])
    parts.append(data[source.tell() :])
    at = random.choice((0, 1, 2, 3, 3, 3, 3, 4, 5))
    if at == 5:
        parts[5] = fuzzing.damaged(parts[5], random, ends=(200, 200), times=(1,))
    else:
        parts[at] = damaged_pickle(parts[at], random)
    if random.random() < 0.1:
        parts.insert(at, random.choice((CANARY + b".", parts[0], b"N.")))
    return b"".join(parts)


def damaged_tar(data: bytes, random: random.Random) -> bytes:
    """Members damaged, renamed, repeated, of other kinds; headers with a right checksum."""
    with tarfile.open(fileobj=io.BytesIO(data)) as old:
        members = [(info.name, old.extractfile(info).read()) for info in old]
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(members))
        name, body = members[at]
        match random.randrange(4):
            case 0 | 1:
                members[at] = (name, damaged_pickle(body, random))
            case 2:
                names = [
                    f"./{name}",
                    name.upper(),
                    f"{name}/",
                    CANARY.decode("latin-1") + ".",
                    name,
                ]
                members.insert(random.randrange(len(members) + 1), (random.choice(names), body))
            case 3:
                members.append(members.pop(at))
    out = io.BytesIO()
    for name, body in members:
        info = tarfile.TarInfo("x")
        info.size = len(body)
        block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        raw = name.encode("latin-1")[:100]
        block[: len(raw)] = raw
        if random.random() < 0.1:
            block[156] = random.choice(b"0123457xgLKS\0")
        if random.random() < 0.1:
            block[:] = fuzzing.damaged(bytes(block), random, ends=(500, 12), times=(1,))[:512]
            block += bytes(512 - len(block))
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        out.write(bytes(block) + body + bytes(-len(body) % 512))
    if random.random() < 0.8:
        out.write(bytes(1024))
    return out.getvalue()


def damaged_safetensors(data: bytes, random: random.Random) -> bytes:
    """The header's entries changed, and its length with them; or its length an instruction."""
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice([key for key in header if key != "__metadata__"] or [""])
        entry = header.get(name, {})
        other = random.choice(list(header.values()) or [{}])
        number = random.choice(fuzzing.NUMBERS)
        match random.randrange(6):
            case 0:
                entry["dtype"] = random.choice(
                    ("F64", "F16", "I8", "C64", "F4", "x", 3, None, "BF16")
                )
            case 1:
                entry["shape"] = random.choice(
                    ([], [number], [1, number], [[1]], "2", other.get("shape"))
                )
            case 2:
                entry["data_offsets"] = random.choice(
                    ([0, number], [number, 4], [0], None, other.get("data_offsets"))
                )
            case 3:
                header[random.choice(("w", "", name.upper(), "__metadata__"))] = dict(other)
            case 4:
                header.pop(name, None)
            case 5:
                body = fuzzing.damaged(body, random, times=(1,))
    text = json.dumps(header)
    if random.random() < 0.2:
        text = text[:-1] + random.choice(
            (',"w":1,"w":2}', "\n" + CANARY.decode("latin-1") + ".", "}", " " * 5)
        )
    raw = text.encode("latin-1", "replace")
    if random.random() < 0.3:  # the first byte takes the line, or so many bytes
        raw += b" " * ((random.choice(b"VXPSB(c\x80") - len(raw)) % 256)
    return struct.pack("<Q", len(raw)) + raw + body


def damaged_h5(data: bytes, random: random.Random) -> bytes:
    """Arrays of other kinds and sizes, groups within themselves, links, names, odd attributes."""
    out = io.BytesIO(data)
    with h5py.File(out, "a") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(random.choice((1, 1, 2, 4))):
            name = random.choice(names)
            new = random.choice(
                ("x", "..", "\n", "layers/x/vars/0", "é" * 90, "a/" * 40 + "b", name)
            )
            with contextlib.suppress(Exception):  # what HDF5 itself refuses to write
                _damage_h5(file, name, new, random)
    return out.getvalue()


def _damage_h5(file: h5py.File, name: str, new: str, random: random.Random) -> None:
    many = random.choice([n for n in fuzzing.NUMBERS if n >= 0])
    odd = (np.float16(1), b"\xff\0", "\x1b" * 3000, [1, 2], np.zeros(900), h5py.Empty("f4"), "")
    match random.randrange(12):
        case 0:
            file.move(name, new)
        case 1:
            file[new] = file[name]
        case 2:
            file[f"{name}/{new}"] = file[random.choice(("/", name))]
        case 3:
            file[new] = random.choice((h5py.SoftLink(name), h5py.ExternalLink("/etc/passwd", "/")))
        case 4:
            file[name].attrs["name"] = random.choice(odd)
        case 5:
            kinds = (">f4", "f2", "c8", "?", "S4", [("a", "f4")], h5py.string_dtype(), "u8")
            file.create_dataset(new, (4,), dtype=random.choice(kinds))
        case 6:
            file.create_dataset(new, (many,), "f4", chunks=random.choice((None, (64,))))
        case 7:
            file.create_dataset(new, (64, 64), "f4", compression="gzip", data=np.zeros((64, 64)))
        case 8:
            file.create_dataset(new, (4,), "f4", external=[("/etc/passwd", 0, 16)])
        case 9:
            file.create_virtual_dataset(new, h5py.VirtualLayout((4,), "f4"))
        case 10:
            del file[name]
        case 11:
            file[new] = np.dtype("f4")


def damaged_json(data: bytes, random: random.Random) -> bytes:
    """Values of a description changed."""
    text = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        fuzzing.change(text, random)
    return json.dumps(text).encode("utf-8", "surrogatepass")


ENDS = {
    ".safetensors": damaged_safetensors,
    ".pkl": damaged_pickle,
    ".h5": damaged_h5,
    ".json": damaged_json,
}
FORMS = {"zip": damaged_zip, "own": damaged_zip, "str": damaged_stream, "tar": damaged_tar}


def mutate(name: str, data: bytes, random: random.Random) -> bytes:
    """A damaged file: half of them keep their format's structure."""
    form = ENDS.get(pathlib.Path(name).suffix) or FORMS.get(name[:3])
    if form is not None and random.random() < 0.6:
        return form(data, random)
    return fuzzing.damaged(data, random, WORDS)


def read(path: pathlib.Path) -> str:
    """Reads a file to its last number; "read", or what kind of refusal it met."""
    told = "read"
    if path.suffix == ".json":
        return _read_config(path)
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


def _read_config(path: pathlib.Path) -> str:
    """What a repository's config.json says, as far as it is used."""
    try:
        told = download._told(download._read_config(path), "timm/a_in1k")
        made = download.HubFile(path, "a", **told)
        for side in (None, 1, 224, 288):
            made.preprocess(side)
    except CheckpointError as error:
        return _kind(error)
    return "read"


def _kind(error: CheckpointError) -> str:
    """Refused by a rule, or by the net under all rules (worth a look, though no failure)."""
    assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 1500
    return NET if "not what it seems" in str(error) else "refused"


# ---------------------------------------------------------------------------- the same to torch


def compare(path: pathlib.Path) -> str:
    """As `read`; and what is called safe runs nothing in torch, and has the same numbers there."""
    try:
        info = inspect_checkpoint(path)
    except CheckpointError as error:
        return _kind(error)
    if not info.safe:
        return "refused"
    try:
        ours = read_checkpoint(path, keep_prefix=True)
    except CheckpointError:
        ours = {}
    ways: list[dict[str, Any]] = [{"weights_only": True}, {"weights_only": False}]
    if info.format == "zip":
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type for entry in archive.infolist())
        ways += [] if packed else [{"weights_only": True, "mmap": True}]
    for options in ways:
        SUNG.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = torch.load(path, map_location="cpu", **options)
        except Exception:  # what torch cannot read, runs nothing
            theirs = None
        assert not SUNG, f"it is called safe, and ran in torch.load with {options}"
        if theirs is not None and ours:
            _compare(ours, theirs, info.key, options)
    return "read" if ours else "refused"


def _spelled(key: Any) -> Any:
    """A key of torch's dict as our reader writes it."""
    if type(key) in (bool, float) and key == key // 1:
        return int(key)
    return key.decode("latin-1") if type(key) is bytes else key


def _compare(ours: dict[str, np.ndarray], theirs: Any, key: str, options: dict) -> None:
    for part in key.split(".") if key else ():
        theirs = next(value for k, value in theirs.items() if str(_spelled(k)) == part)
    known: dict[str, Any] = {}
    todo = [("", theirs, 0)]
    while todo:
        front, value, depth = todo.pop()
        if isinstance(value, (torch.Tensor, np.ndarray)):
            known[front or "tensor"] = value
        elif depth < 17 and isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            items = [(_spelled(k), v) for k, v in items]
            todo += [(f"{front}.{k}" if front else str(k), v, depth + 1) for k, v in items]
    for name, array in ours.items():
        if "<" in name:  # a key that is no text, as our reader writes it
            continue
        assert name in known, f"torch has no {name!r} with {options}"
        other = known[name]
        assert array.shape == tuple(other.shape), f"{name!r} has another shape with {options}"
        if isinstance(other, torch.Tensor):
            if other.is_meta or other.dtype == torch.complex32:
                continue
            assert array.dtype.name == str(other.dtype).removeprefix("torch."), name
            other = other.detach().resolve_conj().resolve_neg().contiguous()
            raw = other.reshape(-1).view(torch.uint8).numpy().tobytes() if other.numel() else b""
        else:
            raw = other.astype(other.dtype.newbyteorder("=")).tobytes()
        assert array.tobytes() == raw, f"{name!r} has other numbers with {options}"


if __name__ == "__main__":
    shared = os.environ.get("KERAS_RESNET_SHARED")
    fuzzing.main(
        __doc__,
        lambda: samples(pathlib.Path(shared) if shared else None) | other_samples(),
        mutate,
        read,
        keep=[NET],
        others={"torch": compare},
    )
