"""checkpoint.py against torch, safetensors and a collection of files made to break it."""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fuzz_checkpoint import mutate, other_samples, read, samples as _samples, state, tar_bytes
from fuzzing import memory_of_readers, session

from keras_resnet.system.errors import CheckpointError, NotFoundError
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.stream_files import MAGIC
from keras_resnet.weights.writing import write_checkpoint

pytestmark = [
    pytest.mark.once,
    # torch says of each of these that it is new, or old; files hold them all the same.
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]
ROOT = pathlib.Path(__file__).resolve().parents[2]
samples = functools.cache(_samples)

# A process that has this module and not the package around it, which imports Keras.
ALONE = f"""
import sys, types
package = types.ModuleType("keras_resnet")
package.__path__ = [{str(ROOT / "keras_resnet")!r}]
sys.modules["keras_resnet"] = package
"""


def alone(script: str, *args: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's numbers in C order, whatever its dtype."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(arrays: dict[str, np.ndarray], tensors: dict[str, torch.Tensor]) -> None:
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        array = arrays[name]
        assert array.shape == tuple(tensor.shape), name
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert array.tobytes() == as_bytes(tensor), name
        assert not array.flags.writeable


SAVERS = {
    "zip": torch.save,
    "zip, protocol 4": functools.partial(torch.save, pickle_protocol=4),
    "zip, protocol 5": functools.partial(torch.save, pickle_protocol=5),
    "stream": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "stream, protocol 4": functools.partial(
        torch.save, _use_new_zipfile_serialization=False, pickle_protocol=4
    ),
}
PLAIN = ["float64", "float32", "float16", "uint8", "int8", "int16", "int32", "int64", "bool"]
PLAIN += ["complex64", "complex128"]
YOUNG = ["bfloat16", "uint16", "uint32", "uint64"]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


# ------------------------------------------------------------------------------ what torch writes


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("dtype", PLAIN + YOUNG + FLOAT8)
def test_every_dtype_reads_as_torch_saved_it(tmp_path, saver, dtype):
    torch.manual_seed(0)
    tensor = (torch.rand(3, 4, dtype=torch.float64) * 9).to(getattr(torch, dtype))
    tensors = {"a": tensor, "zero_dimensional": tensor[0, 0].clone(), "empty": tensor[:0].clone()}
    SAVERS[saver](tensors, tmp_path / "a.pth")
    assert_same(read_checkpoint(tmp_path / "a.pth"), tensors)


@pytest.mark.parametrize("saver", SAVERS)
def test_views_strides_and_parameters_read_as_torch_loads_them(tmp_path, saver):
    base = torch.randn(6, 5, 4, 3)
    tensors = {
        "permuted": base.permute(3, 1, 0, 2),
        "stepped": base[::2, 1:4, ::3],
        "offset": base[2, 3],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 7),
        "overlapping": torch.arange(9.0).as_strided((4, 3), (2, 1)),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "buffer": torch.nn.Buffer(torch.randn(2)),
        "number": torch.tensor(3.5),
        "conjugate": torch.randn(3, 2, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "empty": torch.empty(0, 5),
    }
    tensors["parameter"].note = "a Python attribute, which is saved with the parameter"
    SAVERS[saver](tensors, tmp_path / "a.pth")
    assert_same(read_checkpoint(tmp_path / "a.pth"), tensors)


@pytest.mark.parametrize("saver", SAVERS)
def test_tensors_that_share_a_storage_share_memory(tmp_path, saver):
    weight = torch.randn(8, 8)
    SAVERS[saver](
        {"a": weight, "b": weight.T, "c": weight[2:4], "d": weight + 1}, tmp_path / "a.pt"
    )
    arrays = read_checkpoint(tmp_path / "a.pt")
    assert np.shares_memory(arrays["a"], arrays["b"])
    assert np.shares_memory(arrays["a"], arrays["c"])
    assert not np.shares_memory(arrays["a"], arrays["d"])


@pytest.mark.parametrize("layout", ["plain", "half", "wrapped"])
@pytest.mark.parametrize("saver", SAVERS)
def test_a_whole_torchvision_state_dict_is_bit_exact(tmp_path, torchvision, saver, layout):
    model = torchvision.models.resnet18()
    tensors = (model.half() if layout == "half" else model).state_dict()
    saved = tensors
    if layout == "wrapped":
        optimizer = torch.optim.Adam(model.parameters())
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
        saved = {
            "model": {f"module.{k}": v for k, v in tensors.items()},
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "epoch": 89,
            "args": argparse.Namespace(lr=0.5, output_dir=pathlib.Path("."), amp=False),
        }
    SAVERS[saver](saved, tmp_path / "a.pth")
    assert_same(read_checkpoint(tmp_path / "a.pth"), tensors)
    assert inspect_checkpoint(tmp_path / "a.pth").safe


def test_the_real_pre_zip_file_equals_torch_load(shared):
    path = shared / "weights" / "resnet20-12fca82f.th"
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    assert b"cuda:0" in path.read_bytes()[:2000]  # its storages were on a GPU
    tensors = {k.removeprefix("module."): v for k, v in theirs["state_dict"].items()}
    assert_same(read_checkpoint(path), tensors)
    info = inspect_checkpoint(path)
    assert (info.format, info.key, info.prefix) == ("stream", "state_dict", "module.")
    assert info.others["best_prec1"] == repr(theirs["best_prec1"])
    assert info.hash().startswith("12fca82f")


def test_the_real_tar_file_equals_its_arrays(shared):
    arrays = read_checkpoint(shared / "weights" / "tiny_tar_format.pth")
    with np.load(shared / "weights" / "tiny_tar_format.npz") as expected:
        assert sorted(arrays) == sorted(expected.files)
        for name in expected.files:
            assert arrays[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(arrays[name], expected[name])


def test_a_tar_file_reads_as_torch_loads_it(tmp_path):
    tensors = {k.removeprefix("module."): v.detach() for k, v in state().items()}
    data = tar_bytes(tensors, parameters=["fc.weight", "half"], views=["tied.weight"])
    path = tmp_path / "old.pth"
    path.write_bytes(data)
    theirs = torch.load(path, weights_only=False)  # made above, by us
    assert_same(read_checkpoint(path), theirs)
    assert_same(read_checkpoint(path), tensors)


def test_a_legacy_storage_view_reads_as_torch_loads_it(tmp_path):
    # Files before 0.4 shared memory by (root storage, offset, size) instead of strides.
    whole = torch.arange(10.0)
    torch.save({"a": whole}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    at = data.index(b"K\nN")  # numel 10, then no view
    view = b"(X\x01\x00\x00\x00vK\x03K\x04t"
    data = data[:at] + b"K\n" + view + data[at + 3 :]
    at = data.index(b"QK\x00K\n\x85")  # offset 0, shape (10,)
    data = data[: at + 3] + b"K\x04\x85" + data[at + 6 :]
    (tmp_path / "a.pth").write_bytes(data)
    theirs = torch.load(tmp_path / "a.pth", weights_only=True)
    assert theirs["a"].tolist() == [3, 4, 5, 6]
    assert_same(read_checkpoint(tmp_path / "a.pth"), theirs)


def rezipped(data: bytes, change=lambda name, data: data, method=zipfile.ZIP_STORED) -> bytes:
    """The same zip archive, each member changed by a function, or packed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return out.getvalue()


def zip_bytes(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def test_big_endian_files_read_as_torch_loads_them(tmp_path):
    dtypes = {"data/0": "f4", "data/1": "i8", "data/2": "u2", "data/3": "f4", "data/4": "u1"}

    def swap(name: str, data: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        code = dtypes.get(name.partition("/")[2])
        return np.frombuffer(data, code).byteswap().tobytes() if code else data

    tensors = {
        "a": torch.randn(4, 3).T,
        "b": torch.arange(5),
        "c": torch.randn(3).bfloat16(),
        "d": torch.randn(2, dtype=torch.complex64),
        "e": torch.tensor([True, False]),
    }
    (tmp_path / "big.pth").write_bytes(rezipped(zip_bytes(tensors), swap))
    arrays = read_checkpoint(tmp_path / "big.pth")
    assert_same(arrays, tensors)
    theirs = torch.load(tmp_path / "big.pth", weights_only=True)
    assert all(torch.equal(theirs[k], tensors[k]) for k in tensors)


def test_a_compressed_archive_reads_the_same(tmp_path):
    tensors = {"a": torch.randn(100), "b": torch.arange(50)}
    data = rezipped(zip_bytes(tensors), method=zipfile.ZIP_DEFLATED)
    (tmp_path / "packed.pth").write_bytes(data)
    assert_same(read_checkpoint(tmp_path / "packed.pth"), tensors)


def test_numpy_arrays_and_numbers_in_a_checkpoint_read_with_the_tensors(tmp_path):
    saved = {
        "weight": torch.ones(2),
        "mean": np.arange(6, dtype=">i2").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "accuracy": np.float64(76.5),
    }
    for protocol in (2, 4):
        torch.save(saved, tmp_path / "a.pth", pickle_protocol=protocol)
        arrays = read_checkpoint(tmp_path / "a.pth")
        assert list(arrays) == ["weight", "mean", "fortran"]
        np.testing.assert_array_equal(arrays["mean"], saved["mean"])
        np.testing.assert_array_equal(arrays["fortran"], saved["fortran"])
        assert inspect_checkpoint(tmp_path / "a.pth").others == {"accuracy": "76.5"}


def test_complex32_widens_exactly(tmp_path):
    torch.save({"a": torch.randn(5, dtype=torch.complex64).to(torch.complex32)}, tmp_path / "a.pth")
    expected = torch.load(tmp_path / "a.pth")["a"].to(torch.complex64).numpy()
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "a.pth")["a"], expected)


def test_complex32_keeps_its_shape(tmp_path):
    base = torch.randn(3, 2, dtype=torch.complex64).to(torch.complex32)
    saved = {"number": base[0, 0].clone(), "turned": base.T, "empty": base[:0], "part": base[:, :1]}
    torch.save(saved, tmp_path / "a.pth")
    arrays = read_checkpoint(tmp_path / "a.pth")
    for name, tensor in saved.items():
        assert arrays[name].shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(arrays[name], tensor.to(torch.complex64).numpy())


def test_a_tar_file_without_its_magic_reads_as_torch_loads_it(tmp_path):
    tensors = {"w": torch.arange(6.0).reshape(2, 3)}
    path = tmp_path / "old.pth"
    path.write_bytes(without_magic(tar_bytes(tensors)))
    assert_same(read_checkpoint(path), torch.load(path, weights_only=False))  # made above
    assert_same(read_checkpoint(path), tensors)


@pytest.mark.parametrize("metadata", [b'"x"', b"[1]", b"3", b"null", b"{", b"\xff"])
def test_metadata_that_is_no_object_is_ignored_with_a_note(tmp_path, metadata):
    write_checkpoint(tmp_path / "good.pth", {"w": np.ones(2)}, metadata={"a": "b"})
    data = (tmp_path / "good.pth").read_bytes()
    path = tmp_path / "a.pth"
    path.write_bytes(rezipped(data, lambda n, d: metadata if n.endswith("metadata.json") else d))
    info = inspect_checkpoint(path)
    assert info.metadata == {} and info.problem is None
    assert info.others == {"extra/metadata.json": "ignored: it is no JSON object"}
    assert list(read_checkpoint(path)) == ["w"]


# ------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("ending", [".pth", ".PT", ".th", ".tar", ".ckpt", ".bin"])
def test_safetensors_files_under_endings_of_pickles_are_refused(tmp_path, ending):
    write_checkpoint(tmp_path / "a.safetensors", {"w": np.ones(2)})
    (tmp_path / "a.safetensors").rename(tmp_path / f"a{ending}")
    told = message(tmp_path / f"a{ending}")
    assert f"a safetensors file called {ending.lower()}" in told and "rename it" in told


def test_safetensors_files_read_as_their_library_writes_them(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    tensors = {
        name: (torch.rand(3, 4, dtype=torch.float64) * 9).to(getattr(torch, name))
        for name in sorted([*PLAIN, *YOUNG, *FLOAT8])
        if name != "complex128"
    }
    tensors["zero_dimensional"], tensors["zempty"] = torch.tensor(2.0), torch.empty(0, 3)
    library.save_file(tensors, tmp_path / "a.safetensors", metadata={"epoch": "3"})
    arrays = read_checkpoint(tmp_path / "a.safetensors")
    assert_same({k: arrays[k] for k in tensors}, tensors)
    assert inspect_checkpoint(tmp_path / "a.safetensors").metadata == {"epoch": "3"}


def test_safetensors_files_that_we_write_load_in_their_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = state()
    del tensors["module.expanded"]
    arrays = {k: v.detach().numpy() for k, v in tensors.items()}
    write_checkpoint(tmp_path / "a.safetensors", arrays, metadata={"from": "a test"})
    theirs = library.load_file(tmp_path / "a.safetensors")
    assert sorted(theirs) == sorted(tensors)
    assert all(torch.equal(theirs[k], tensors[k]) for k in tensors)


# --------------------------------------------------------------------------------- what is chosen


def saved_at(folder: pathlib.Path, value) -> pathlib.Path:
    torch.save(value, folder / "a.pth")
    return folder / "a.pth"


ONE, TWO = {"w": torch.ones(2)}, {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("saved", "key", "alternatives"),
    [
        (ONE, "", {}),
        ({"state_dict": ONE}, "state_dict", {}),
        ({"model": ONE, "model_ema": TWO}, "model", {"model_ema": 1}),
        ({"model_ema": TWO, "model": ONE}, "model", {"model_ema": 1}),
        ({"state_dict": ONE, "best_acc1": torch.tensor(7.0)}, "state_dict", {}),
        ({"model": {"state_dict": ONE}}, "model.state_dict", {}),
        ({"net": ONE, "acc": 94.1, "epoch": 3}, "net", {}),
        ({"resnet": ONE, "optimizer": {"state": {0: TWO}}}, "resnet", {"optimizer": 1}),
        ({"model": ONE, "optimizer": {"state": {0: TWO}}}, "model", {"optimizer": 1}),
    ],
)
def test_wrapped_dicts_are_entered_in_the_documented_order(tmp_path, saved, key, alternatives):
    path = saved_at(tmp_path, saved)
    info = inspect_checkpoint(path)
    assert (info.key, info.alternatives) == (key, alternatives)
    assert_same(read_checkpoint(path), ONE)


def test_a_key_overrides_the_choice_and_may_lead_deeper(tmp_path):
    path = saved_at(tmp_path, {"model": ONE, "model_ema": TWO, "extra": {"deep.er": {"w": ONE}}})
    assert_same(read_checkpoint(path, "model_ema"), TWO)
    assert_same(read_checkpoint(path, "extra.deep.er.w"), ONE)
    assert inspect_checkpoint(path, "model_ema").alternatives == {"model": 1, "extra": 1}
    with pytest.raises(CheckpointError, match=r"no entry 'model_em'.* Did you mean 'model_ema'"):
        read_checkpoint(path, "model_em")


def test_a_key_may_be_the_front_of_flat_names(tmp_path):
    path = saved_at(tmp_path, {"state_dict": {"model.w": ONE["w"], "loss.w": TWO["w"]}})
    assert_same(read_checkpoint(path, "state_dict.model"), ONE)


def test_nested_dicts_are_joined_by_dots(tmp_path):
    path = saved_at(
        tmp_path, {"layer1": {"conv": ONE, "bn": {"b": ONE["w"]}}, "fc": {"w": TWO["w"]}}
    )
    assert list(read_checkpoint(path)) == ["layer1.conv.w", "layer1.bn.b", "fc.w"]


@pytest.mark.parametrize(
    ("prefix", "kept"),
    [
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("module._orig_mod.", "module._orig_mod."),
        ("_orig_mod.module.module.", "_orig_mod.module.module."),
        ("backbone.", ""),
    ],
)
def test_prefixes_that_all_names_have_are_removed_and_reported(tmp_path, prefix, kept):
    path = saved_at(tmp_path, {prefix + "a": torch.ones(1), prefix + "b.c": torch.ones(1)})
    assert inspect_checkpoint(path).prefix == kept
    expected = ["a", "b.c"] if kept else [prefix + "a", prefix + "b.c"]
    assert list(read_checkpoint(path)) == expected
    assert list(read_checkpoint(path, keep_prefix=True)) == [prefix + "a", prefix + "b.c"]


def test_a_prefix_that_one_name_lacks_stays(tmp_path):
    path = saved_at(tmp_path, {"module.a": torch.ones(1), "b": torch.ones(1)})
    assert list(read_checkpoint(path)) == ["module.a", "b"]


def test_an_averaged_model_reads_without_its_counter(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    path = saved_at(tmp_path, {"model": model.state_dict(), "model_ema": averaged.state_dict()})
    assert_same(read_checkpoint(path, "model_ema"), averaged.module.state_dict())
    assert "n_averaged" in inspect_checkpoint(path, "model_ema").others


def test_what_lies_beside_the_tensors_is_reported_in_words(tmp_path):
    settings = argparse.Namespace(lr=0.1, milestones=[30, 60])
    path = saved_at(tmp_path, {"state_dict": ONE, "epoch": 3, "args": settings, "name": "a\nb"})
    info = inspect_checkpoint(path)
    assert info.others == {
        "epoch": "3",
        "args": "argparse.Namespace(lr=0.1, milestones=list of 2)",
        "name": "'a\\nb'",
    }
    facts = json.loads(info.to_json())
    assert facts["tensors"] == {"w": {"shape": [2], "dtype": "float32"}}
    assert facts["safe"] is True and facts["parameters"] == 2
    assert "epoch = 3" in str(info) and "zip" in str(info)


def test_the_hash_reports_progress(tmp_path):
    path = saved_at(tmp_path, ONE)
    seen = []
    info = inspect_checkpoint(path)
    digest = info.hash(lambda done, total: seen.append((done, total)))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen == [(info.size, info.size)]


# ----------------------------------------------------------------------------- damage, said plainly


def message(path, key=None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_real_truncated_files_say_what_is_missing(shared):
    bad = shared / "weights" / "bad"
    text = message(bad / "resnet18-5c106cde.truncated.pth")
    assert "storages ends at 1,027,584 of 46,801,661 bytes" in text
    assert "1,048,576" in text and "download it again" in text
    text = message(bad / "resnet18-f37072fd.truncated.pth")
    assert "ends at 579,901 of at least 46,816,184 bytes, with 5 of 102 storages" in text
    assert "download it again" in text


def test_a_truncated_stream_says_how_much_there_should_be(tmp_path):
    data = samples()["stream.pth"]
    (tmp_path / "a.pth").write_bytes(data[:-100])
    assert f"the file ends at {len(data) - 100:,} of {len(data):,} bytes" in message(
        tmp_path / "a.pth"
    )


@pytest.mark.parametrize("name", sorted(samples()))
def test_every_truncation_is_an_error_that_says_so(tmp_path, name):
    data = samples()[name]
    path = tmp_path / name
    for length in [*range(1, len(data) - 1100, 97), len(data) * 3 // 4]:
        path.write_bytes(data[:length])
        text = message(path)
        assert "not what it seems" not in text, length  # a rule said it, not the net
        if length > 200:
            words = ("download it again", "cut off", "missing", "ends", "damaged")
            assert any(word in text for word in words), (length, text)


NOT_CHECKPOINTS = {
    "empty": (b"", "empty .0 bytes."),
    "html": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "web page"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102530333\n",
        "git-LFS pointer of 102,530,333 bytes",
    ),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "gunzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "7z archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(40), "ONNX"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(40), "numpy.load"),
    "text": (b"hello, world\n" * 4, "none of PyTorch's zip, stream or tar"),
    "csv": (b"col1,col2\n1,2\n3,4\n", "none of PyTorch's zip, stream or tar"),
    "zeros": (bytes(5000), "none of PyTorch's zip, stream or tar"),
    "plain pickle": (pickle.dumps({"a": [1.5]}), "a Python pickle, but no checkpoint"),
}


@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_other_files_are_named_plainly(tmp_path, name):
    data, words = NOT_CHECKPOINTS[name]
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / "a.pth")


def test_archives_that_are_no_checkpoints_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    assert "numpy.load" in message(tmp_path / "a.npz")
    for name, words in {
        "model.weights.h5": "load_model",
        "x/w.pth": "x/w.pth",
        "a": "no PyTorch",
    }.items():
        with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
            archive.writestr(name, b"x")
        assert words in message(tmp_path / "b.pth")
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        archive.add(tmp_path / "b.pth", "weights.pth")
    assert "weights.pth" in message(tmp_path / "c.tar")


def test_paths_that_cannot_be_read_are_our_own_errors(tmp_path):
    (tmp_path / "resnet50.pth").write_bytes(b"x")
    with pytest.raises(NotFoundError, match=r"Did you mean 'resnet50.pth'"):
        read_checkpoint(tmp_path / "resnet5O.pth")
    assert "folder" in message(tmp_path) and "resnet50.pth" in message(tmp_path)
    for odd in (None, 3, "a\0b", "x" * 5000):
        with pytest.raises((CheckpointError, NotFoundError)):
            read_checkpoint(odd)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo.pth")
        assert "no regular file" in message(tmp_path / "fifo.pth")


# ------------------------------------------------------------------- kinds without plain tensors


class Pickled(torch.nn.Module):
    """A user's own module, as files hold it by its class's name."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_module_is_refused_with_the_line_that_helps(tmp_path, saver, wrapped):
    path = tmp_path / "whole.pth"
    SAVERS[saver]({"net": Pickled()} if wrapped else Pickled(), path)
    info = inspect_checkpoint(path)
    assert info.kind == "pickled module" and not info.safe
    assert any(name.endswith(".Pickled") for name in info.refused)
    index = "['net']" if wrapped else ""
    assert f"torch.load('whole.pth', weights_only=False){index}.state_dict()" in message(path)


def test_torchscript_is_named_with_the_line_that_helps(tmp_path):
    script = torch.jit.script(torch.nn.Linear(2, 3))
    script.save(str(tmp_path / "script.pt"))
    info = inspect_checkpoint(tmp_path / "script.pt")
    assert info.kind == "TorchScript" and not info.safe
    assert "torch.jit.load('script.pt').state_dict()" in message(tmp_path / "script.pt")


@pytest.mark.parametrize("saver", ["zip", "stream"])
def test_quantised_and_sparse_files_say_what_they_are(tmp_path, saver):
    quantised = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    channels = torch.quantize_per_channel(
        torch.randn(3, 2), torch.ones(3), torch.zeros(3), 0, torch.quint8
    )
    SAVERS[saver](
        {"conv1.weight": quantised, "fc": channels, "b": torch.ones(1)}, tmp_path / "q.pth"
    )
    info = inspect_checkpoint(tmp_path / "q.pth")
    assert info.kind == "quantised" and info.safe
    assert "_fbgemm" in message(tmp_path / "q.pth")
    SAVERS[saver]({"w": torch.eye(3).to_sparse()}, tmp_path / "s.pth")
    assert inspect_checkpoint(tmp_path / "s.pth").kind == "sparse"
    assert "to_dense" in message(tmp_path / "s.pth")
    SAVERS[saver]({"w": torch.eye(3).to_sparse_csr()}, tmp_path / "s.pth")
    assert inspect_checkpoint(tmp_path / "s.pth").kind == "sparse"
    torch.save({"w": torch.empty(3, device="meta")}, tmp_path / "m.pth")
    assert "meta" in message(tmp_path / "m.pth")


def test_a_file_without_tensors_says_what_it_holds(tmp_path):
    assert "no tensors" in message(saved_at(tmp_path, {"epoch": 3}))
    assert "epoch" in message(saved_at(tmp_path, {"epoch": 3}))


# ------------------------------------------------------------------------------- hostile files


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def archive(pickle_: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A zip checkpoint with this pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        new.writestr("a/data.pkl", pickle_)
        for key, data in (storages or {"0": bytes(64)}).items():
            new.writestr(f"a/data/{key}", data)
    return out.getvalue()


def stream(pickle_: bytes) -> bytes:
    head = pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    return head + pickle_ + pickle.dumps([], 2)


def number(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + raw


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape, strides, offset=0, numel=16, kind="FloatStorage") -> bytes:
    """One tensor in a dict, on a storage of 64 bytes, described as we please."""
    storage = b"((" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu")
    body = storage + number(numel) + b"tQ" + number(offset) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + body + b"\x89)tR"


def one_tensor(*args, **options) -> bytes:
    return archive(b"\x80\x02}" + text("w") + tensor(*args, **options) + b"s.")


class Calls:
    """Pickles as a call of a function, the classic attack."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def nested_calls(marker: str) -> dict[str, tuple[bytes, str]]:
    command = f"touch {marker}"
    dumps = functools.partial(pickle.dumps, protocol=2)
    system = r"wants to call os\.system.*not loaded"
    code = f"open({marker!r}, 'w')"
    chained = b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n" + text("os") + b"\x85R"
    chained = b"\x80\x02" + chained + text("system") + b"tR" + text(command) + b"\x85R."
    rebuilt = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n"
    rebuilt += text(command) + b"\x85NtR."
    assembled = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)])
    assembled += command.encode() + b"\x85R."
    inst = b"(S'" + command.encode() + b"'\nios\nsystem\n."
    obj = b"(cos\nsystem\nS'" + command.encode() + b"'\no."
    newobj = b"\x80\x02cos\nsystem\n" + text(command) + b"\x85\x81."
    keyed = b"\x80\x02}cos\nsystem\n" + text(command) + b"\x85RNs."
    late = b"\x80\x02}" + text("w") + tensor((2,), (1,)) + b"scos\nsystem\n" + text(command)
    late += b"\x85R0."
    return {
        "os.system": (archive(dumps(Calls(os.system, command))), system),
        "os.system, stream": (stream(dumps(Calls(os.system, command))), system),
        "os.system, magic": (dumps(Calls(os.system, command)), system),
        "os.system, protocol 0": (pickle.dumps(Calls(os.system, command), 0), system),
        "os.system, protocol 5": (archive(pickle.dumps(Calls(os.system, command), 5)), system),
        "os.system, after the magic": (
            pickle.dumps(MAGIC, 2) + dumps(Calls(os.system, command)),
            system,
        ),
        "os.system, instead of storage keys": (
            stream(b"\x80\x02}.")[: -len(pickle.dumps([], 2))] + dumps(Calls(os.system, command)),
            system,
        ),
        "os.system, and then nonsense": (archive(dumps(Calls(os.system, command))[:-1]), system),
        "os.system, thrown away": (archive(late), system),
        "os.system, as a key": (archive(keyed), system),
        "eval": (archive(dumps(Calls(eval, code))), r"builtins\.eval"),
        "exec": (archive(dumps(Calls(exec, code))), r"builtins\.exec"),
        "a getattr chain": (archive(chained), r"builtins\.getattr, builtins\.__import__"),
        "through a torch helper": (archive(rebuilt), system),
        "torch.load inside": (
            archive(b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x00\x85R."),
            r"torch\.storage\._load_from_bytes",
        ),
        "an assembled name": (archive(assembled), system),
        "INST": (archive(inst), system),
        "OBJ": (archive(obj), system),
        "NEWOBJ": (archive(newobj), system),
        "partial": (archive(dumps(Calls(functools.partial, os.system))), r"functools\.partial"),
        "an extension code": (archive(b"\x80\x02\x82\x07."), "copyreg extension 7"),
        "subprocess": (
            archive(dumps(Calls(subprocess.Popen, command))),
            r"(subprocess|commands)\.Popen",
        ),
        "a name with a newline's trick": (
            archive(b"\x80\x02cos\nsystem\rx\n."),
            "wants to call os",
        ),
        "dunder path": (
            archive(b"\x80\x04\x8c\x0bcollections\x8c\x17OrderedDict.__class__.x\x93."),
            r"collections\.OrderedDict\.__class__",
        ),
    }


def again(call: bytes) -> bytes:
    """A pickle that repeats a call, function and values from the memo, until something stops it."""
    function = call.index(b"\n", call.index(b"\n") + 1) + 1
    once = call[:function] + b"q\x00" + call[function:-1] + b"q\x010"
    return b"\x80\x02" + once + b"h\x00h\x01R0" * 150_000 + b"N."


def many_entries(count: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for index in range(count):
            new.writestr(zipfile.ZipInfo(f"a/data/{index}"), b"")
    return out.getvalue()


def safetensors_entries(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [1, 2, 3], "data_offsets": [8, 32]}
    header = json.dumps({f"{i}": entry for i in range(count)}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


def tar_with(name: bytes, data: bytes) -> bytes:
    """A tar checkpoint, one of its members replaced."""
    source, out = io.BytesIO(tar_bytes({"w": torch.ones(4)})), io.BytesIO()
    with (
        tarfile.open(fileobj=source) as old,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for info in old:
            body = data if info.name == name.decode() else old.extractfile(info).read()
            info.size = len(body)
            info.pax_headers = {}
            new.addfile(info, io.BytesIO(body))
    return out.getvalue()


def with_checksum(block: bytes) -> bytes:
    """A tar header, its checksum computed anew."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def without_magic(data: bytes) -> bytes:
    """A tar archive whose first header lacks `ustar`, as the first writers of tar left it out."""
    return with_checksum(data[:257] + bytes(8) + data[265:512]) + data[512:]


def tar_folder(size: int) -> bytes:
    info = tarfile.TarInfo("folder")
    info.type = tarfile.DIRTYPE
    block = info.tobuf(tarfile.USTAR_FORMAT)
    return with_checksum(block[:124] + b"%011o\0" % size + block[136:])


def hostile(marker: str) -> dict[str, tuple[bytes, str]]:
    """Name to (file, what the refusal says). `marker` is a file that must never appear."""
    calls = nested_calls(marker)
    deep = 200_000
    doubled = b"\x80\x02N" + b"2\x86" * deep
    laughs = b"\x80\x02}" + text("w") + tensor((2,), (1,)) + b"s"
    arrays = b"\x80\x02" + b"B" + struct.pack("<I", 1_000_000) + bytes(1_000_000) + b"q\x000"
    arrays += b"cnumpy\ndtype\n" + text("f4") + b"\x85R(K\x03" + text(">") + b"NNNtbq\x010}("
    for i in range(500):  # each to be turned to this machine's byte order
        arrays += text(f"a{i}") + b"cnumpy.core.multiarray\n_reconstruct\n)R"
        arrays += b"(K\x01J" + struct.pack("<i", 250_000) + b"\x85h\x01\x89h\x00tb"
    # Harmless calls, again and again, each of which could cost what its values are long.
    empty_dicts = b"\x80\x02(" + b"N" * 200_000 + b"tq\x000"
    empty_dicts += b"ccollections\nOrderedDict\nq\x010" + b"h\x01h\x00R0" * 40_000 + b"N."
    types = b"\x80\x02B" + struct.pack("<I", 8_000_000) + bytes(8_000_000) + b"\x85q\x000"
    types += b"cnumpy\ndtype\nq\x010" + b"h\x01h\x00R0" * 70_000 + b"N."
    subclassed = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x000ctorch\nSize\n))\x87q\x010"
    subclassed += b"h\x00Nh\x01\x87q\x010" * 400 + b"h\x00h\x01R0" * 60_000 + b"N."
    for _ in range(60):  # each dict holds the one before twice
        laughs += b"q\x00}(" + text("a") + b"h\x00" + text("b") + b"h\x00u"
    million = b"\x80\x02" + text("x" * 8_000_000) + b"q\x000"
    encode = million + b"c_codecs\nencode\nq\x010" + b"h\x01h\x00" + text("latin1") + b"\x86R0" * 1
    encode += (b"h\x01h\x00N\x86R0") * 5000 + b"N."
    collide = b"\x80\x02}(" + b"".join(
        b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(60_000)
    )
    shapes = b"\x80\x02(" + b"K\x01" * 200_000 + b"tq\x000}"
    shapes += (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + b"K\x10tQK\x00h\x00h\x00tR0"
    ) * 1000
    many = b"\x80\x02}("
    for i in range(900):
        many += text(f"w{i}") + tensor((1024, 1024), (0, 0))
    tangle = b"\x80\x02](" + b"N" * 100_000 + b"eq\x000}("
    for i in range(10_000):
        tangle += text(f"k{i}") + b"}" + text("a") + b"h\x00s"
    good = zip_bytes({"w": torch.ones(16)})
    central = good.index(b"PK\x01\x02")
    lying = bytearray(good)
    struct.pack_into("<2I", lying, central + 20, 2**31, 2**31)
    encrypted = bytearray(good)
    encrypted[central + 8] |= 1
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            size = 60_000_000
            new.writestr(
                "a/data.pkl", b"\x80\x02}" + text("w") + tensor((2,), (1,), numel=size // 4) + b"s."
            )
            new.writestr("a/data/0", bytes(size))
        bomb = out.getvalue()
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as new:
            new.writestr("a/data.pkl", b"\x80\x02}.")
            new.writestr("a/data/0", bytes(64))
            with pytest.warns(UserWarning, match="Duplicate"):
                new.writestr("a/data/0", bytes(64))
        twice = out.getvalue()
    overlapping = bytearray(archive(b"\x80\x02}.", {"0": bytes(64), "1": bytes(64)}))
    first = overlapping.index(b"PK\x01\x02")
    second = overlapping.index(b"PK\x01\x02", first + 4)
    third = overlapping.index(b"PK\x01\x02", second + 4)
    overlapping[third + 42 : third + 46] = overlapping[second + 42 : second + 46]
    overlapping[third + 46 : third + 54] = overlapping[second + 46 : second + 54]
    same = bytes(overlapping).replace(b"a/data/1", b"a/data/2")
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as new:
            new.writestr("a/data.pkl", b"\x80\x02}.")
            new.writestr("a/DATA.PKL", calls["os.system"][0])
        cased = out.getvalue()
    shifted = archive(b"\x80\x02}.")
    directory = shifted.index(b"PK\x01\x02")
    shifted = shifted[:directory] + bytes(10) + shifted[directory:]
    tar = tar_bytes({"w": torch.ones(4)})
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as new:
        info = tarfile.TarInfo("storages")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        new.addfile(info)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    nested = b'{"w":' + b"[" * 200_000
    prefix = struct.Struct("<Q").pack
    cases = calls | {
        "memo index 2**32 - 1": (archive(b"\x80\x02Nr\xff\xff\xff\xff."), "memo entry"),
        "memo index in digits": (archive(b"Np4294967295\n."), "memo entry"),
        "memo never written": (archive(b"\x80\x02h\x05."), "never written"),
        "tuples doubled 200,000 deep": (archive(doubled + b"."), "no tensors"),
        "the same as a key": (archive(b"\x80\x02}" + doubled[2:] + b"Ns."), "no tensors"),
        "the same in a set": (archive(b"\x80\x04\x8f(" + doubled[2:] + b"\x90."), "no tensors"),
        "the same as an id": (archive(doubled + b"Q."), "persistent id"),
        "billion laughs of dicts": (
            archive(laughs + b"."),
            "more than 100,000 entries|names of more",
        ),
        "deep lists": (archive(b"]" * deep + b"a" * (deep - 1) + b"."), "no tensors"),
        "deep dicts": (
            archive(b"(" * deep + b"NNd" + b"NNd" * 10 + b"."),
            "a key and no value",
        ),
        "deep marks": (archive(b"(" * 400_000 + b"."), "damaged"),
        "ten million lists": (archive(b"]" * 10_000_000), "more than 500,000 steps"),
        "ten million dicts": (archive(b"}" * 10_000_000), "more than 500,000 steps"),
        "ten million sets, stream": (stream(b"\x8f" * 10_000_000), "more than 500,000 steps"),
        "BINBYTES8 of 2**62": (archive(b"\x8e" + prefix(2**62) + b"x."), "cut off or damaged"),
        "BINUNICODE8 of 2**63": (archive(b"\x8d" + prefix(2**63) + b"x."), "cut off or damaged"),
        "BYTEARRAY8 of 2**40": (archive(b"\x96" + prefix(2**40) + b"x."), "cut off or damaged"),
        "LONG4 of 2**31 - 1": (archive(b"\x8b\xff\xff\xff\x7fx."), "cut off or damaged"),
        "LONG4 negative": (archive(b"\x8b\xff\xff\xff\xffx."), "length of -1"),
        "LONG4 of 8 MB": (
            archive(b"\x8b" + struct.pack("<i", 8_000_000) + b"\x7f" * 8_000_000 + b"."),
            "integer of 8,000,000 bytes",
        ),
        "FRAME of 2**63": (archive(b"\x80\x04\x95" + prefix(2**63) + b"N."), "cut off"),
        "an integer of a million digits": (
            archive(b"I" + b"9" * 1_000_000 + b"\n."),
            "line of more",
        ),
        "an out-of-band buffer": (archive(b"\x80\x05\x97."), "no pickle instruction"),
        "encode 8 MB 5,000 times": (archive(encode), "copies more bytes"),
        "60,000 colliding integers": (archive(collide + b"u."), "no tensors"),
        "a shape of 200,000, 1,000 times": (archive(shapes + b"."), "has 200,000 entries"),
        "a shared list in 10,000 dicts": (archive(tangle + b"u."), "over and over"),
        "900 expanded tensors": (archive(many + b"u."), "claim .* over and over"),
        "500 arrays of one bytes object": (archive(arrays + b"u."), "claim .* over and over"),
        "a call with 200,000 values": (archive(empty_dicts), "no tensors"),
        "a NumPy type of 8 MB": (archive(types), "no tensors"),
        "a subclass of a subclass": (archive(subclassed), "steps"),
        "a storage of 2**60": (one_tensor((2,), (1,), numel=2**60), "64 of 4,6"),
        "a storage of -1": (one_tensor((2,), (1,), numel=-1), "should be counts"),
        "a storage of 2**100": (one_tensor((2,), (1,), numel=2**100), "absurd"),
        "a shape of 2**40": (one_tensor((2**40,), (1,)), "reaches element"),
        "a negative offset": (one_tensor((2,), (1,), offset=-4), "should be counts"),
        "a large offset": (one_tensor((2,), (1,), offset=15), "reaches element 16"),
        "a negative stride": (one_tensor((2,), (-1,), offset=1), "should be counts"),
        "a large stride": (one_tensor((2,), (2**61,)), "reaches element"),
        "an expanded 2**40": (one_tensor((2**40,), (0,)), "over and over"),
        "an expanded 2**61": (one_tensor((2**61,), (0,)), "absurd shape"),
        "an empty absurd shape": (one_tensor((0, 2**61, 2**61), (1, 1, 1)), "absurd shape"),
        "33 dimensions": (one_tensor((1,) * 33, (1,) * 33), "has 33 entries"),
        "strides without shape": (one_tensor((), (1,)), "0 dimensions and 1 strides"),
        "a tensor on a tensor": (
            archive(b"\x80\x02ctorch._utils\n_rebuild_tensor\n(}K\x00))tR."),
            "no storage",
        ),
        "a dict as a function": (archive(b"\x80\x02})R."), "which is no function"),
        "BUILD of a dict": (archive(b"\x80\x02}}" + text("__class__") + b"Nsb."), "no tensors"),
        "four-byte text of 15 MB": (
            archive(b"\x80\x02" + text("\U0001f600" + "x" * 15_000_000) + b"."),
            "copies more bytes",
        ),
        "four-byte text of 15 MB and 400,000 lists": (
            archive(b"(" + text("\U0001f600" + "x" * 15_000_000) + b"]" * 400_000 + b"t."),
            "copies more bytes",
        ),
        "a pickle of 20 MB": (archive(text("x" * 20_000_000) + b"."), "no state dict's"),
        "a pickle of 20 MB, stream": (stream(text("x" * 20_000_000) + b"."), "a length of"),
        "40,000 zip entries": (many_entries(40_000), "without data.pkl"),
        "a safetensors header of 20,000": (safetensors_entries(20_000), "the bytes of|ends at"),
        "storages that want a name": (
            tar_with(b"storages", b"\x80\x02cos\nsystem\n" + text(f"touch {marker}") + b"\x85R."),
            r"wants to call os\.system",
        ),
        "one tensor built without end": (archive(again(tensor((2,), (1,)))), "steps"),
        "500,000 names": (archive(b"cos\nsystem\n0" * 500_000), r"wants to call os\.system"),
        "500,000 other names": (
            archive(b"".join(b"ca\n%d\n0" % i for i in range(400_000))),
            r"wants to call a\.0, a\.1, a\.2, a\.3, a\.4 and 995 more",
        ),
        "tuples as keys": (archive(b"}(" + b")N" * 240_000 + b"u."), "steps"),
        "a string of 8 million escapes": (
            archive(b"S'" + b"\\n" * 7_500_000 + b"'\n."),
            "copies more bytes",
        ),
        "an escape that warns": (archive(b"S'\\d'\n."), "escape that Python does not write"),
        "a zip bomb": (bomb, "do not compress like that"),
        "sizes beyond the file": (bytes(lying), "claims 2,147,483,648"),
        "an encrypted entry": (bytes(encrypted), "encrypted"),
        "a name twice": (twice, "there twice"),
        "a name twice but for case": (cased, "there twice"),
        "a directory that is shifted": (shifted, "directory should lie"),
        "overlapping entries": (bytes(overlapping), "twice|overlap|contradicts"),
        "an entry that contradicts its header": (
            same[:first] + bytes(overlapping)[first:],
            "contradicts|twice",
        ),
        "a directory elsewhere": (good[:-6] + b"\xf0\xff\xff\x7f\0\0", "directory"),
        "a tar link": (link.getvalue() + bytes(1024), "link or a special file"),
        "a tar archive without its magic": (
            without_magic(
                tar_with(b"pickle", pickle.dumps(Calls(os.system, f"touch {marker}"), 2))
            ),
            r"wants to call os\.system",
        ),
        "a tar folder with a size": (tar_folder(512) + tar, "has a size"),
        "a tar checksum": (tar[:1] + b"x" + tar[2:], "tar archive is damaged at byte 0"),
        "safetensors beyond the file": (prefix(len(header)) + header.encode(), "ends at"),
        "a safetensors header of 2**39": (prefix(2**39) + b"{}", "the header ends at"),
        "deep JSON": (prefix(len(nested)) + nested, "header is damaged"),
        "a JSON integer of 100,000 digits": (
            prefix(100_016) + b'{"w":{"shape":[' + b"9" * 100_000 + b"]",
            "header is damaged",
        ),
    }
    return cases


MEASURE = """
import json, os, resource, sys, time
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.system.errors import CheckpointError
def peak(mark="VmHWM"):
    # The kernel's high-water mark of this process; getrusage's would include its parent's.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(mark))
for name in sorted(os.listdir(sys.argv[1])):
    if os.fork():
        os.wait()
        continue
    path = os.path.join(sys.argv[1], name)
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    base, start = peak("VmRSS"), time.process_time()
    try:
        text = "read " + str(len(read_checkpoint(path)))
    except CheckpointError as error:
        text = str(error)
    seconds = time.process_time() - start
    megabytes = (peak() - base) / 1024
    safe = not text.endswith("not loaded") or inspect_checkpoint(path).safe
    print(json.dumps([name, text, seconds, megabytes, safe]), flush=True)
    os._exit(0)
"""


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")


@linux
@pytest.mark.slow
def test_hostile_files_are_refused_within_a_second_and_little_memory(tmp_path):
    marker = tmp_path / "it_ran"
    cases = hostile(str(marker))
    folder = tmp_path / "files"
    folder.mkdir()
    names = {}
    for index, (name, (data, _)) in enumerate(cases.items()):
        (folder / f"{index:03}.pth").write_bytes(data)
        names[f"{index:03}.pth"] = name
    lines = [json.loads(line) for line in alone(MEASURE, folder).splitlines()]
    assert len(lines) == len(cases)  # none crashed
    if os.environ.get("KERAS_RESNET_SHOW"):
        for file, told, seconds, megabytes, _ in sorted(lines, key=lambda line: line[2]):
            print(f"{seconds:6.3f} s {megabytes:6.1f} MB  {names[file]}: {told[:150]}")
    problems = []
    for file, told, seconds, megabytes, safe in lines:
        name = names[file]
        words = cases[name][1]
        if not re.search(words, told) or "not what it seems" in told:
            problems.append(f"{name}: said {told!r}, not {words!r}")
        if safe == ("wants to call" in told):
            problems.append(f"{name}: inspect_checkpoint says safe={safe}")
        if seconds > 1 or megabytes > memory_of_readers(len(cases[name][0])) / 1e6:
            problems.append(f"{name}: {seconds:.2f} s, {megabytes:.0f} MB")
    assert not problems, "\n".join(problems)
    assert not marker.exists()


def test_the_collected_hostile_files_end_as_they_should(shared):
    folder = shared / "weights" / "hostile"
    assert "'archive/DATA.PKL' is there twice" in message(folder / "zip_case2_evil.pth")
    assert "a safetensors file called .pth" in message(folder / "safetensors_V.pth")
    assert read_checkpoint(folder / "dtype_complex32_1.pth")["z"].shape == ()
    about = inspect_checkpoint(folder / "extra_metadata_not_object.pth")
    assert about.metadata == {} and "extra/metadata.json" in about.others


def test_a_refused_file_is_described_by_inspect(tmp_path):
    data = nested_calls("x")["os.system"][0]
    (tmp_path / "a.pth").write_bytes(data)
    info = inspect_checkpoint(tmp_path / "a.pth")
    assert not info.safe and info.kind == "refused pickle"
    assert info.refused == ("os.system",)
    assert "NO: it wants" in str(info)
    assert json.loads(info.to_json())["refused"] == list(info.refused)


def test_every_name_is_listed_not_only_the_first(tmp_path):
    pickle_ = b"\x80\x02(cos\nsystem\ncsys\nexit\ncshutil\nrmtree\nt."
    (tmp_path / "a.pth").write_bytes(archive(pickle_))
    assert inspect_checkpoint(tmp_path / "a.pth").refused == (
        "os.system",
        "sys.exit",
        "shutil.rmtree",
    )


def test_torch_is_never_imported(tmp_path, shared):
    for name, data in samples(shared).items():
        (tmp_path / name).write_bytes(data)
    script = """
    import importlib.abc, pathlib
    class Ban(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "tensorflow", "jax", "keras", "safetensors"):
                raise AssertionError(f"imports {name}")
    sys.meta_path.insert(0, Ban())
    from keras_resnet.weights import checkpoint, writing
    for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        arrays = checkpoint.read_checkpoint(path)
        str(checkpoint.inspect_checkpoint(path))
        arrays = {k: v for k, v in arrays.items() if v.dtype.name != "complex64"}
        writing.write_checkpoint(path.with_suffix(".pt"), arrays)
        writing.write_checkpoint(path.with_suffix(".safetensors"), arrays)
    print("torch" in sys.modules)
    """
    assert alone(script, tmp_path).strip() == "False"


@linux
@pytest.mark.parametrize("saver", ["zip", "stream"])
def test_reading_costs_the_tensors_and_touches_only_what_is_used(tmp_path, saver):
    path = tmp_path / "large.pth"
    SAVERS[saver]({f"w{i}": torch.full((1024, 1024), float(i)) for i in range(25)}, path)
    script = """
    from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
    def peak():
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    before = peak()
    inspect_checkpoint(sys.argv[1])
    arrays = read_checkpoint(sys.argv[1])
    assert arrays["w3"].mean() == 3
    one = peak() - before
    assert all(array.mean() == i for i, array in enumerate(arrays.values()))
    print(one, peak() - before)
    """
    one, whole = map(int, alone(script, path).split())
    assert one < 20e6
    assert 100e6 < whole < 1.2 * 25 * 2**22


@pytest.mark.slow
def test_damaged_files_end_in_a_result_or_our_own_error(tmp_path, shared):
    count = int(os.environ.get("KERAS_RESNET_FUZZ", "1500"))
    files = samples(shared) | other_samples()
    done = session(files, mutate, read, tmp_path, count=count, seed=7, seconds=2)
    assert not done.failures, done
    assert done.outcomes["read"] > count // 20  # some damage is harmless, or nothing was tested
    assert done.outcomes["refused"] > count // 3


def test_the_undamaged_samples_all_read(tmp_path, shared):
    for name, data in samples(shared).items():
        (tmp_path / name).write_bytes(data)
        assert len(read_checkpoint(tmp_path / name)) >= 5
    for name, data in other_samples().items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == "read"


# ------------------------------------------------------------------------------------- writing


def test_a_written_pth_loads_in_torch_and_in_a_module(tmp_path, torchvision):
    model = torchvision.models.resnet18()
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    write_checkpoint(tmp_path / "a.pth", arrays, metadata={"from": "a test"})
    for options in ({}, {"mmap": True}):
        theirs = torch.load(tmp_path / "a.pth", weights_only=True, **options)
        assert type(theirs) is collections.OrderedDict
        assert list(theirs) == list(arrays)
        assert all(torch.equal(theirs[k], v) for k, v in model.state_dict().items())
        torchvision.models.resnet18().load_state_dict(theirs, strict=True)
    assert inspect_checkpoint(tmp_path / "a.pth").metadata == {"from": "a test"}
    assert all(a.ctypes.data % 64 == 0 for a in read_checkpoint(tmp_path / "a.pth").values())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_every_dtype_survives_writing_and_reading(tmp_path, ending):
    arrays = {}
    for name in [*PLAIN, *YOUNG, *FLOAT8]:
        if name == "complex128" and ending == "safetensors":
            continue
        dtype = getattr(ml_dtypes, name, None) or np.dtype(name)
        arrays[name] = (np.random.default_rng(0).random((3, 4)) * 9).astype(dtype)
    arrays["zero_dimensional"], arrays["empty"] = np.float32(2.5), np.zeros((0, 3))
    arrays["transposed"] = np.arange(6.0).reshape(2, 3).T
    arrays["big_endian"] = np.arange(5, dtype=">i4")
    path = tmp_path / f"a.{ending}"
    write_checkpoint(path, arrays)
    back = read_checkpoint(path)
    for name, array in arrays.items():
        assert back[name].dtype.name == np.asarray(array).dtype.name
        assert back[name].astype("c16").tolist() == np.asarray(array).astype("c16").tolist(), name
    if ending == "pth":
        theirs = torch.load(path, weights_only=True)
        assert_same({k: back[k] for k in theirs}, theirs)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_writing_is_deterministic_and_whole_or_not_at_all(tmp_path, ending, monkeypatch):
    path = tmp_path / f"a.{ending}"
    write_checkpoint(path, {"a": np.ones(3)}, metadata={"b": "1", "a": "2"})
    first = path.read_bytes()
    write_checkpoint(path, {"a": np.ones(3)}, metadata={"a": "2", "b": "1"})
    assert path.read_bytes() == first
    mapped = read_checkpoint(path)
    write_checkpoint(path, {k: v + 1 for k, v in mapped.items()})  # over the file it maps
    assert mapped["a"][0] == 1 and read_checkpoint(path)["a"][0] == 2

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    second = path.read_bytes()
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(path, {"a": np.zeros(3)})
    assert path.read_bytes() == second
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_writing_refuses_what_torch_could_not_read(tmp_path):
    for path, arrays, words in [
        ("a.npz", {"a": np.ones(1)}, "use .pth"),
        ("a.pth", {"a": np.array(["x"])}, "torch lacks"),
        ("a.pth", {"a": np.array([None])}, "torch lacks"),
        ("a.pth", {"": np.ones(1)}, "no name"),
        ("a.pth", {3: np.ones(1)}, "no name"),
        ("a.pth", [np.ones(1)], "a dict of arrays"),
        ("a.safetensors", {"a": np.ones(1, "c16")}, "use .pth"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            write_checkpoint(tmp_path / path, arrays)
    with pytest.raises(NotFoundError, match="no folder"):
        write_checkpoint(tmp_path / "missing" / "a.pth", {"a": np.ones(1)})
    assert not list(tmp_path.iterdir())
