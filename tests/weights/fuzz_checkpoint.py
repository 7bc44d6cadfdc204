"""Damages real weight files at random and reads them; run alone for a long session.

    python tests/weights/fuzz_checkpoint.py --count 20000 --seed 0

Every damaged file must end in a result or in `CheckpointError`. Another exception, a crash or a
file that takes more than `--limit` seconds fails, and the file is kept for a closer look.
`tests/weights/test_checkpoint.py` runs a short session of the same.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import io
import pathlib
import pickle
import random
import struct
import sys
import tarfile
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from keras_resnet.errors import CheckpointError
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.writing import write_checkpoint

NUMBERS = (
    0,
    1,
    -1,
    127,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**62,
    -(2**63),
)
# Instructions that make pickles interesting: containers, calls, memo, lengths, names.
OPCODES = b"(.)0123IJKLMNPQRSTUVXBC]abcdeghijlopqrstu}\x80\x81\x82\x84\x85\x86\x87\x88\x8a\x8b\x8c"
OPCODES += b"\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98GF"


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


def mutate(data: bytes, random: random.Random) -> bytes:
    """One to six random damages: bits, bytes, numbers, cuts, copies, insertions."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        if not out:
            break
        # Headers and pickles are at the ends; that is where damage is worth the most.
        spans = (
            (0, min(len(out), 600)),
            (0, min(len(out), 15_000)),
            (max(0, len(out) - 900), len(out)),
        )
        first, last = random.choice((*spans, (0, len(out))))
        at = random.randrange(first, last)
        match random.randrange(10):
            case 0:
                out[at] ^= 1 << random.randrange(8)
            case 1:
                out[at] = random.randrange(256)
            case 2:
                out[at] = random.choice(OPCODES)
            case 3:
                form = random.choice(("<i", "<q", "<h", "b"))
                width = struct.calcsize(form) * 8
                number = (random.choice(NUMBERS) + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
                packed = struct.pack(form, number)
                out[at : at + len(packed)] = packed
            case 4:
                del out[at:]
            case 5:
                del out[at : at + random.randrange(1, 40)]
            case 6:
                length = random.randrange(1, 200)
                source = random.randrange(len(out))
                out[at:at] = out[source : source + length]
            case 7:
                length = random.randrange(1, 60)
                source = random.randrange(len(out))
                out[at : at + length] = out[source : source + length]
            case 8:
                out[at:at] = bytes(random.choice(OPCODES) for _ in range(random.randrange(1, 9)))
            case 9:
                digits = [i for i in range(first, last) if 48 <= out[i] < 58]
                if digits:
                    out[random.choice(digits)] = random.choice(b"0123456789-")
    return bytes(out)


def outcome(path: pathlib.Path) -> str:
    """Reads a file to its last number; "read", or what kind of refusal it met."""
    told = "read"
    try:
        str(inspect_checkpoint(path))
        inspect_checkpoint(path).to_json()
    except CheckpointError as error:
        told = _kind(error)
    try:
        arrays = read_checkpoint(path)
    except CheckpointError as error:
        return told if told != "read" else _kind(error)
    for array in arrays.values():
        if array.size <= 1 << 22:
            array.tobytes()  # touches every byte: a view outside the file would crash here
    return "read"


def _kind(error: CheckpointError) -> str:
    """Refused by a rule, or by the net under all rules (worth a look, though no failure)."""
    return "caught by the net" if "not what it seems" in str(error) else "refused"


def session(
    files: dict[str, bytes], count: int, seed: int, folder: pathlib.Path, limit: float = 5.0
) -> tuple[collections.Counter, float, str]:
    """Reads `count` damaged files; (outcomes, slowest seconds, which damage that was).

    Raises:
        AssertionError: A file took longer than `limit` seconds, or raised another exception; the
            file stays in `folder`.
    """
    outcomes: collections.Counter = collections.Counter()
    slowest, slowest_name = 0.0, ""
    names = sorted(files)
    for index in range(count):
        name = names[index % len(names)]
        random_ = random.Random(f"{seed} {index}")
        path = folder / f"damaged_{name}"
        path.write_bytes(mutate(files[name], random_))
        faulthandler.dump_traceback_later(30, exit=True)
        start = time.perf_counter()
        try:
            result = outcome(path)
        except Exception as error:
            kept = path.rename(folder / f"failed_{seed}_{index}_{name}")
            raise AssertionError(f"{kept} raised {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        faulthandler.cancel_dump_traceback_later()
        assert seconds < limit, f"{name}, seed {seed}, damage {index}: {seconds:.1f} s"
        outcomes[result] += 1
        if result == "caught by the net" and __name__ == "__main__":
            path.rename(folder / f"net_{seed}_{index}_{name}")
        if seconds > slowest:
            slowest, slowest_name = seconds, f"{name} #{index}"
    return outcomes, slowest, slowest_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that one file may take")
    parser.add_argument(
        "--shared", type=pathlib.Path, help="folder with weights/ to damage as well"
    )
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the files that fail")
    options = parser.parse_args()
    folder = options.keep or pathlib.Path(tempfile.mkdtemp(prefix="fuzz_checkpoint_"))
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    files = samples(options.shared)
    outcomes, slowest, name = session(files, options.count, options.seed, folder, options.limit)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - start
    print(f"{options.count:,} damaged files of {len(files)} kinds in {seconds:.0f} s")
    for result, number in outcomes.most_common():
        print(f"  {result:<18} {number:>7,}")
    print(
        f"  slowest {slowest * 1000:.0f} ms ({name}), peak memory {peak:.0f} MB; files in {folder}"
    )


if __name__ == "__main__":
    main()
