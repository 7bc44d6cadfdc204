"""What our reader calls safe runs nothing in torch.load, and has the same numbers there.

Files that two readers could see differently; `compare` of fuzz_checkpoint.py asks ours and torch.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pathlib
import pickle
import re
import struct
import warnings
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fuzz_checkpoint import CANARY, SUNG, compare, mutate, samples, tar_bytes
from fuzzing import memory_of_readers, session
from test_checkpoint import (
    SAVERS,
    alone,
    linux,
    message,
    stream,
    tar_with,
    tensor,
    text,
    with_checksum,
)

from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.stream_files import MAGIC
from keras_resnet.weights.writing import write_checkpoint

pytestmark = pytest.mark.once

SING = b"\x80\x02" + CANARY + b"."
GOOD = b"\x80\x02}" + text("w") + tensor((2,), (1,)) + b"s."
PERSID = b"(" + text("storage") + b"ctorch\nFloatStorage\n"


def zipped(*members: tuple[str, bytes], **options) -> bytes:
    """A zip archive of exactly these members; `attributes` and `method` are for all."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as new:
        warnings.simplefilter("ignore")  # a name twice
        version = (f"{members[0][0].partition('/')[0]}/version", b"3\n")
        for name, data in (*members, version):
            info = zipfile.ZipInfo("x")
            info.filename, info.external_attr = name, options.get("attributes", 0)
            info.compress_type = options.get("method", zipfile.ZIP_STORED)
            new.writestr(info, data)
    return out.getvalue()


DATA = ("a/data/0", np.arange(16, dtype="f4").tobytes())
PLAIN = (("a/data.pkl", GOOD), DATA)


def described(*values: bytes, name: bytes = b"ctorch._utils\n_rebuild_tensor_v2\n") -> bytes:
    return b"\x80\x02}" + text("w") + name + b"(" + b"".join(values) + b"tRs."


def two(change: bytes) -> bytes:
    """A tensor `w`, of the memo's 0 (a tensor) and 1 (its storage), made by `change`."""
    body = b"\x80\x02" + tensor((2,), (1,)) + b"q\x000" + tensor((2,), (1,), offset=4) + b"q\x010"
    return body + b"}" + text("w") + change + b"s."


def zips() -> dict[str, tuple[bytes, str]]:
    first, rest = PLAIN[0], PLAIN[1:]
    central = zipped(*PLAIN).index(b"PK\x01\x02")
    evil, good = zipped(("a/data.pkl", SING), DATA), zipped(*PLAIN)
    state = {"data": b"h\x01", "real": b"h\x01", "__class__": b"N"}
    attributes = {
        f"attribute {name}": (
            zipped(
                (
                    "a/data.pkl",
                    two(
                        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_parameter\n"
                        b"ctorch.nn.parameter\nParameter\nh\x00\x89ccollections\nOrderedDict\n)R\x87}"
                        + text(name)
                        + value
                        + b"stR"
                    ),
                ),
                DATA,
            ),
            "is set afterwards",
        )
        for name, value in state.items()
    }
    return attributes | {
        "plain": (good, ""),
        "with a folder's own entry": (zipped(("a/", b""), *PLAIN), ""),
        "byteorder": (zipped(*PLAIN, ("a/byteorder", b"big")), ""),
        "byteorder in capitals": (zipped(*PLAIN, ("a/BYTEORDER", b"big")), ""),
        "capitals": (zipped(("a/DATA.PKL", GOOD), ("a/Data/0", DATA[1])), ""),
        "two, one in capitals": (zipped(first, ("a/Data.pkl", SING), *rest), "there twice"),
        "another folder first": (
            zipped(("b/x", b""), ("B/data.pkl", SING), *PLAIN),
            "outside of its",
        ),
        "another folder behind": (zipped(*PLAIN, ("b/data.pkl", SING)), "outside of its folder"),
        "a file in no folder": (zipped(*PLAIN, ("data.pkl", SING)), "outside of its folder"),
        "./": (zipped(("./a/data.pkl", SING), *PLAIN), "without data.pkl"),
        "backslashes": (zipped(("a\\data.pkl", SING), *PLAIN), "without data.pkl"),
        "NUL": (zipped(first, ("a/data/0\0x", bytes(64)), *rest), "has a NUL in its name"),
        "NUL in a key": (
            zipped(("a/data.pkl", GOOD.replace(text("0"), text("0\0x"))), DATA),
            r"data/0\\x00x is missing",
        ),
        "a stream before it": (SING + good, "wants to call"),
        "a stream behind it": (good + SING, "directory should lie"),
        "a zip behind it": (good + evil, "directory should lie"),
        "a zip before it": (evil + good, "directory should lie"),
        "a folder that is the pickle": (
            zipped(("a/data.pkl", SING), DATA, attributes=0x10),
            "a folder with contents",
        ),
        "TorchScript": (zipped(*PLAIN, ("a/constants.pkl", b"\x80\x02).")), "TorchScript"),
        "a data descriptor": (
            good[:6] + b"\x08" + good[7 : central + 8] + b"\x08" + good[central + 9 :],
            "",
        ),
        "another name in the header": (
            good.replace(b"a/data.pkl", b"a/Data.pkl", 1),
            "contradicts",
        ),
        "packed": (zipped(*PLAIN, method=zipfile.ZIP_DEFLATED), ""),
    }


def pickles() -> dict[str, tuple[bytes, str]]:
    """Zip files by their pickle: a tensor `w` that is changed, or made in another way."""
    storage = PERSID + text("0") + text("cpu") + b"K\x10tQ"
    double = storage.replace(b"Float", b"Double").replace(b"K\x10", b"K\x08")
    args = b"K\x00K\x02\x85K\x01\x85\x89N"
    conj = b"}" + text("neg")
    encode = b"c_codecs\nencode\n" + text("\xe9" * 8)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01K\x02\x85"
    order = b"(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"

    def typed(kind: bytes) -> bytes:
        """An array under "w" whose NumPy type is called for in this way."""
        start = b"\x80\x02}" + text("w") + array + b"cnumpy\ndtype\nU\x02f4" + kind
        return start + order + b"\x89" + encode + text("latin1") + b"\x86Rtbs."

    cases = {
        "BUILD of a tensor": (two(b"h\x00(h\x01\x89NNNtb"), "after it was made"),
        "BUILD of a class": (
            two(b"ctorch\nTensor\nN}" + text("w") + b"Ns\x86b0h\x00"),
            "changes torch.Tensor",
        ),
        "SETITEM of a tensor": (two(b"h\x00K\x00K\x05s"), "damaged"),
        "a Parameter with three": (
            two(b"ctorch.nn.parameter\nParameter\n)\x81h\x00NN\x87b"),
            "state",
        ),
        "OrderedDict by NEWOBJ": (
            b"\x80\x02ccollections\nOrderedDict\n]("
            + text("w")
            + tensor((2,), (1,))
            + b"\x86e\x85\x81.",
            "no tensors",
        ),
        "Counter of pairs": (
            b"\x80\x02ccollections\nCounter\n](" + text("w") + tensor((2,), (1,)) + b"\x86e\x85R.",
            "no tensors",
        ),
        "keys 1 and '1'": (
            two(b"h\x00sK\x01h\x00s" + text("1") + b"h\x01"),
            "two keys that read '1'",
        ),
        "keys 1 and True": (two(b"h\x00sK\x01h\x00s\x88h\x01"), ""),
        "UTF-8 from Python 2": (b"\x80\x02}U\x02\xc3\xa9" + tensor((2,), (1,)) + b"s.", ""),
        "one storage, two dtypes": (
            b"\x80\x02}" + text("v") + tensor((2,), (1,)) + b"s" + described(double, args)[3:],
            "described twice, differently",
        ),
        "neg by a number": (described(storage, args, conj + b"K\x01s"), "metadata"),
        "neg": (described(storage, args, conj + b"\x88s"), ""),
        "an array in cp437": (
            b"\x80\x02}"
            + text("w")
            + array
            + b"cnumpy\ndtype\nU\x02f4\x85R\x89"
            + encode
            + text("cp437")
            + b"\x86Rtbs.",
            "no tensors",
        ),
        "NumPy's own type": (
            typed(b"\x85R"),
            "",
        ),
        "NumPy's type copied": (
            typed(b"\x89\x88\x87R"),
            "",
        ),
    }
    for protocol in range(6):
        cases[f"a canary in protocol {protocol}"] = (
            pickle.dumps(Sings(), protocol),
            r"wants to call fuzz_canary\.sing",
        )
    return {
        name: (zipped(("a/data.pkl", data), DATA), words) for name, (data, words) in cases.items()
    }


class Sings:
    """Calls the canary when it is unpickled."""

    def __reduce__(self):
        import fuzz_canary

        return fuzz_canary.sing, (0,)


def streams() -> dict[str, tuple[bytes, str]]:
    def one(*ids: bytes, keys=("0",), numbers=16) -> bytes:
        body = b"\x80\x02}" + b"".join(
            text(f"w{i}")
            + b"ctorch._utils\n_rebuild_tensor\n("
            + id_
            + b"K\x00K\x02\x85K\x01\x85tRs"
            for i, id_ in enumerate(ids)
        )
        stored = struct.pack("<q", numbers) + np.arange(numbers, dtype="f4").tobytes()
        head = stream(body + b".")[: -len(pickle.dumps([], 2))]
        return head + pickle.dumps(list(keys), 2) + stored * len(keys)

    def id_(key: bytes, view: bytes = b"N") -> bytes:
        return PERSID + key + text("cpu") + b"K\x10" + view + b"tQ"

    def view(key: str, offset: int, size: int) -> bytes:
        return b"(" + text(key) + b"K" + bytes([offset]) + b"K" + bytes([size]) + b"t"

    zero = id_(text("0"))
    return {
        "plain": (one(zero), ""),
        "keys 0 and '0'": (one(zero, id_(b"K\x00")), "two storages with keys that read '0'"),
        "a view": (one(id_(text("0"), view("v", 4, 4))), ""),
        "a view twice, differently": (
            one(id_(text("0"), view("v", 4, 4)), id_(text("0"), view("v", 8, 4))),
            "described twice",
        ),
        "a view called as a storage": (
            one(zero, id_(text("1")), id_(text("0"), view("1", 4, 4)), keys=("0", "1")),
            "described twice",
        ),
        "a storage called as a view": (
            one(id_(text("0"), view("1", 4, 4)), id_(text("1"))),
            "described twice",
        ),
        "a canary first": (SING + one(zero), "wants to call"),
        "a canary as sys_info": (
            pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + SING + one(zero)[40:],
            "wants to call",
        ),
        "a canary as keys": (
            stream(b"\x80\x02}.")[: -len(pickle.dumps([], 2))] + SING,
            "wants to call",
        ),
    }


def others() -> dict[str, tuple[bytes, str]]:
    """Tar and safetensors files that are pickles to a reader that comes later."""
    good = tar_bytes({"w": torch.arange(4.0)})
    name = b"\x80\x02" + CANARY + b"."
    first = with_checksum(name + bytes(100 - len(name)) + good[100:512])
    extended = with_checksum(good[:156] + b"x" + good[157:512])
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()

    def safetensors(head: bytes, first: int) -> bytes:
        head += b" " * ((first - len(head)) % 256)
        return struct.pack("<Q", len(head)) + head + bytes(8)

    length = len(SING) + 1
    bytewise = {"w": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}
    bytewise = json.dumps(bytewise).encode()
    spaced = header + b"\n" + b" " * 3
    return {
        "tar": (good, ""),
        "a tar that is a pickle": (first + good[512:], "wants to call"),
        "the same, and torch's tarfile stumbles": (
            first + good[512:].rstrip(b"\0") + bytes(-len(good.rstrip(b"\0")) % 512) + extended,
            "wants to call",
        ),
        "a canary in storages": (tar_with(b"storages", SING), "wants to call"),
        "safetensors": (safetensors(header, 0x48), ""),
        "V, and a newline": (safetensors(spaced, ord("V")), ""),
        "V, a newline and a canary in the numbers": (
            safetensors(bytewise, ord("V"))[:-8] + b"\n" + SING,
            "wants to call",
        ),
    }


CASES = {"zip": zips, "pickle": pickles, "stream": streams, "other": others}


@pytest.mark.parametrize("kind", CASES)
def test_files_that_two_readers_could_see_differently(tmp_path, kind):
    wrong = []
    for name, (data, words) in CASES[kind]().items():
        path = tmp_path / ("x.weights" if "safetensors" in name or "V" in name else "x.pth")
        path.write_bytes(data)
        try:
            told = compare(path)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
            continue
        try:
            said = "read" if read_checkpoint(path) else ""
        except CheckpointError as error:
            said = str(error)
        if told != ("refused" if words else "read") or (words and not re.search(words, said)):
            wrong.append(f"{name}: {told}, said {said!r}, not {words!r}")
    assert not wrong, "\n".join(wrong)


class Lit(torch.nn.Module):
    """A network whose state dict has buffers, shared weights and views."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.bn = torch.nn.BatchNorm2d(4)
        self.tied = self.conv
        self.register_buffer("scale", torch.arange(10.0)[2:8:2])


def layouts() -> dict[str, object]:
    """What training programs put into a checkpoint, by name."""
    model = Lit()
    weights, some = model.state_dict(), torch.randn(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    programs = {}
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        optimizer = kind(model.parameters(), lr=0.1)
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        programs[kind.__name__] = {
            "net": weights,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": {"scale": 65536.0, "_growth_tracker": 0},
            "rng": [torch.get_rng_state(), np.random.default_rng(0).integers(9, size=5)],
        }
    lightning = {
        "epoch": 3,
        "global_step": 300,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{k}": v for k, v in weights.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best": some[0, 0]}},
        "optimizer_states": [programs["AdamW"]["optimizer"]],
        "lr_schedulers": [programs["AdamW"]["scheduler"]],
        "hparams_name": "kwargs",
        "hyper_parameters": collections.OrderedDict(lr=0.1, size=(3, [4, {"a": None}])),
    }
    attributed = torch.nn.Parameter(some.clone())
    attributed.note = {"a": 1}
    return programs | {
        "lightning": lightning,
        "settings": {"model": weights, "args": argparse.Namespace(lr=0.1, where=pathlib.Path("."))},
        "numpy": {
            "w": some,
            "scalar": np.float32(1.5),
            "count": np.int64(3),
            "flag": np.bool_(True),
            "array": np.arange(6, dtype="i2").reshape(2, 3).T,
            "half": np.ones(3, "f2"),
            "big": np.arange(3, dtype=">f8"),
            "complex": np.ones((2, 0), "c8"),
            "none": np.zeros((), "u8"),
        },
        "nested": {"a": {"b": {"c": some}}, "list": [some, some.T, (some[0], {"d": some[1:]})]},
        "containers": {
            "w": some,
            "size": some.shape,
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "layout": torch.strided,
            "counter": collections.Counter("aab"),
            "default": collections.defaultdict(list, {"x": [1]}),
            "set": {1, 2},
            "frozen": frozenset("ab"),
            "deque": collections.deque([1], maxlen=3),
            "bytes": b"\xff" * 3,
            "large": 2**70,
            "complex": 1 + 2j,
            "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
            3: "a number as a key",
            (1, 2): "a tuple as a key",
            "\u00e9\u4e2d\U0001f600": some[0],
        },
        "attributes": {"w": attributed, "v": torch.nn.Buffer(some[1])},
        "empty": {"w": some[:0], "v": torch.empty(0, 3), "u": torch.empty(2, 0), "n": some[0, 0]},
        "views": {
            "expanded": some[:, :1].expand(3, 5),
            "overlap": torch.arange(9.0).as_strided((4, 3), (2, 1)),
            "bits": some.view(3, 2).t()[1],
            "flip": some.flip(0),
            "conj": torch.randn(3, dtype=torch.complex64).conj(),
            "imag": torch.randn(3, dtype=torch.complex128).conj().imag,
        },
        "alone": some.t(),
        "a list": [some, some[1]],
    }


@pytest.mark.parametrize("saver", SAVERS)
def test_what_training_programs_save_means_the_same_to_torch(tmp_path, saver):
    path = tmp_path / "a.pth"
    for name, saved in layouts().items():
        SAVERS[saver](saved, path)
        assert compare(path) == "read", name


def test_the_canary_sings_where_nobody_refuses(tmp_path):
    (tmp_path / "a.pth").write_bytes(zipped(("a/data.pkl", SING), DATA))
    SUNG.clear()
    torch.load(tmp_path / "a.pth", weights_only=False)  # made above
    assert SUNG == [1]


@pytest.mark.slow
def test_damaged_files_mean_the_same_to_torch(tmp_path):
    done = session(samples(), mutate, compare, tmp_path, count=600, seed=3)
    assert not done.failures, done
    assert done.outcomes["read"] > 60


LARGE = """
import pathlib
from keras_resnet.system.errors import CheckpointError
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
def memory(mark):
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().partition(mark)[2].split()[0])
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS:")
    try:
        inspect_checkpoint(path)
        arrays = read_checkpoint(path)
        told = "read" if all(array.sum() == 0 for array in arrays.values()) else "other numbers"
    except CheckpointError as error:
        told = str(error)
    arrays = None
    print(path.stem, memory("VmHWM:") - before, told, sep="|")
"""


@linux
@pytest.mark.slow
def test_large_files_take_little_more_than_their_size(tmp_path):
    size = 160_000_000
    storage = PERSID + text("0") + text("cpu") + b"J" + struct.pack("<i", size // 4) + b"tQ"
    flat = b"K\x00J" + struct.pack("<i", size // 4) + b"\x85K\x01\x85\x89N"
    plain, conj = described(storage, flat), described(storage, flat, b"}" + text("neg") + b"\x88s")
    half = described(storage.replace(b"Float", b"ComplexHalf"), flat)
    members = ("a/data/0", bytes(size))
    for name, pickle_, *more in [
        ("big-endian", plain, ("a/byteorder", b"big")),
        ("complex32", half),
        ("negative", conj),
        ("plain", plain),
    ]:
        (tmp_path / f"{name}.pth").write_bytes(zipped(("a/data.pkl", pickle_), members, *more))
    packed = zipped(("a/data.pkl", plain), members, method=zipfile.ZIP_DEFLATED)
    (tmp_path / "zeros, packed.pth").write_bytes(packed)
    told = {}
    for line in alone(LARGE, tmp_path).splitlines():
        name, taken, words = line.split("|")
        told[name] = words.partition(": ")[2][:40] or words
        length = (tmp_path / f"{name}.pth").stat().st_size
        assert int(taken) < memory_of_readers(length), line
    assert told["plain"] == told["big-endian"] == "read"
    assert "copies to read" in message(tmp_path / "complex32.pth")
    assert "copies to read" in message(tmp_path / "negative.pth")
    assert "do not compress like that" in message(tmp_path / "zeros, packed.pth")


# ----------------------------------------------------------------------------- shards and folders


def sharded(folder, places=None, **shards):
    """An index, and its shards: name of the file to names of its tensors."""
    for name, keys in (shards or {"one": ["a", "b"], "two": ["c"]}).items():
        arrays = {key: np.full(2, ord(key), "f4") for key in keys}
        write_checkpoint(folder / f"{name}.safetensors", arrays)
    places = places or {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": places}))
    return path


def test_safetensors_shards_are_read_by_their_index(tmp_path):
    path = sharded(tmp_path)
    arrays = read_checkpoint(path)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        name: [float(ord(name))] * 2 for name in "abc"
    }
    info = inspect_checkpoint(path)
    assert (info.format, len(info.tensors), info.safe) == ("safetensors", 3, True)
    assert info.others == {"shards": "2, such as one.safetensors"}
    with pytest.raises(CheckpointError, match=r"It holds model\.safetensors\.index"):
        inspect_checkpoint(tmp_path)


ONE = {"a": "one.safetensors"}


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"a": "../one.safetensors"}, "no name of a file beside it"),
        ({"a": "/one.safetensors"}, "no name of a file beside it"),
        ({"a": "x\\one.safetensors"}, "no name of a file beside it"),
        ({"a": ".."}, "no name of a file beside it"),
        ({"a": ""}, "no name of a file beside it"),
        ({"a": 3}, "weight_map is missing"),
        ({}, "weight_map is missing"),
        (ONE | {"b": "three.safetensors"}, "'three.safetensors' is missing"),
        (ONE, "holds 'b', which the index does not list"),
        (ONE | {"b": "two.safetensors"}, "holds 'b', which the index places in 'two.safetensors'"),
        (ONE | {"b": "one.safetensors", "z": "two.safetensors"}, "holds 'c'"),
        (ONE | {"b": "one.safetensors", "z": "one.safetensors"}, "lacks 'z'"),
        ({"a": "pytorch_model-00001-of-00002.bin"}, "the index of 1 pickled shards"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, places, words):
    path = sharded(tmp_path, {"x": "y"}, one=["a", "b"], two=["c"])
    path.write_text(json.dumps({"weight_map": places}))
    assert re.search(words, message(path))


def test_an_index_names_each_weight_once_and_its_shards_are_safetensors(tmp_path):
    path = sharded(tmp_path)
    path.write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    assert "a name is there twice" in message(path)
    path.write_text("[1]")
    assert "no index of shards" in message(path)
    path = sharded(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(zipped(*PLAIN))
    assert "its shard 'two.safetensors' is a zip file" in message(path)
    (tmp_path / "two.safetensors").write_bytes(b"")
    assert "its shard 'two.safetensors': it is empty" in message(path)


def test_a_folder_of_torch_distributed_says_what_it_is(tmp_path):
    folder = tmp_path / "step_100"
    folder.mkdir()
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(SING)
    for path in (folder, folder / ".metadata", folder / "__0_0.distcp"):
        assert "dcp_to_torch FOLDER weights.pth" in message(path)
