"""Model files of strangers: they load, or are refused in a line, before they take anything."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import resource
import zipfile

import fuzz_keras
import fuzzing
import h5py
import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli.main import main
from keras_resnet.models.files import images_at_a_time
from keras_resnet.system.errors import InputError
from keras_resnet.weights.keras_files import check_keras_file, inspect_keras_file

pytestmark = pytest.mark.once
H5 = "model.weights.h5"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, bytes]:
    """What a small model's file holds."""
    model = kr.create_model("resnet_tiny", num_classes=3, input_shape=(None, None, 3))
    model.info.update(class_names=["a", "b", "c"], preprocess=kr.Preprocess(16, 16).get_config())
    path = tmp_path_factory.mktemp("model") / "m.keras"
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path, parts, packed=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def described(parts, change):
    """The parts with another description."""
    config = json.loads(parts["config.json"])
    change(config["config"])
    return {**parts, "config.json": json.dumps(config).encode()}


def peak_growth(do) -> float:
    """Megabytes that the process took beyond its peak so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    do()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def layer(config, kind):
    return next(one for one in config["layers"] if one["class_name"] == kind)


def inserted(config, kind, given=None, **options):
    """Puts a layer of Keras' between the input, or `given`, and the rest."""
    first, *others = config["layers"]
    tensor = {"shape": [None, None, None, 3], "dtype": "float32"}
    tensor["keras_history"] = [first["name"], 0, 0]
    given = given or {"class_name": "__keras_tensor__", "config": tensor}
    made = {"module": "keras.layers", "class_name": kind, "config": {"name": "x", **options}}
    made |= {"registered_name": None, "name": "x"}
    made["inbound_nodes"] = [{"args": [given], "kwargs": {}}]
    text = json.dumps(others).replace(f'["{first["name"]}", 0, 0]', '["x", 0, 0]')
    config["layers"] = [first, made, *json.loads(text)]


ONE = {"class_name": "__numpy__", "config": {"value": [[[[1.0]]]], "dtype": "float32"}}
LONG = {"class_name": "__numpy__", "config": {"value": [""], "dtype": "S2000000000"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: layer(c, "InputLayer")["config"].update(batch_shape=[None, 10**5, 10**5, 3]),
         r"a tensor of it has 30,000,000,000 values \(batch_shape\)"),
        (lambda c: layer(c, "Dense")["config"].update(units=10**9), "would weigh more than the fi"),
        (lambda c: layer(c, "Dense")["config"].update(units=10**300), "would weigh more than the"),
        (lambda c: layer(c, "Conv2D")["config"].update(filters=10**6), "would weigh more than the"),
        (lambda c: layer(c, "Dense").update(build_config={"input_shape": [None, 10**7]}),
         "would weigh more than the file has weights"),
        (lambda c: inserted(c, "Resizing", height=60_000, width=60_000), "has 3,600,000,000 valu"),
        (lambda c: inserted(c, "UpSampling2D", size=[5_000, 5_000]), "'x' has 19,200,000,000 val"),
        (lambda c: inserted(c, "UpSampling2D", ONE, size=[20_000, 20_000]), "called on constants"),
        (lambda c: inserted(c, "AveragePooling2D", pool_size=10**5, padding="same"),
         "a kernel of it reaches over 100,000 pixels"),
        (lambda c: c.update(extra=LONG), "an array of it is of the type 'S2000000000'"),
        (lambda c: c.update(layers=c["layers"] * 400), "10,000 calls of layers"),
    ],
)  # fmt: skip
def test_what_a_description_claims_takes_no_memory(tmp_path, parts, change, message):
    path = written(tmp_path / "m.keras", described(parts, change))

    def load():
        with pytest.raises(InputError, match=message) as stop:
            kr.load_model(path)
        assert "\n" not in str(stop.value)

    assert peak_growth(load) < 100


def test_a_small_archive_does_not_unpack_to_a_large_one(tmp_path, parts):
    path, packed = tmp_path / "m.keras", zipfile.ZIP_DEFLATED
    blank = b" " * 2**26
    for more in ({"config.json": parts["config.json"] + blank}, {"assets/a": blank}):
        written(path, {**parts, **more}, packed)
        for use in (kr.load_model, inspect_keras_file):
            with pytest.raises(InputError, match=r"would unpack to 6[0-9,]* bytes from"):
                use(path)
    written(path, {**parts, "config.json": parts["config.json"] + blank[: 2**24]})
    with pytest.raises(InputError, match=r"config\.json has 16,7.* bytes"):
        kr.load_model(path)
    written(path, {**parts, **{f"assets/{i}": b"" for i in range(2_000)}})
    with pytest.raises(InputError, match="it has 2,003 parts"):
        kr.load_model(path)
    written(path, parts, packed)  # what is only packed loads
    assert kr.load_model(path).count_params() == check_keras_file(path)


def kernel(weights):
    return weights["layers/dense/vars/0"]


def again(*shape, **how):
    """Replaces the head's kernel."""

    def change(weights):
        group = kernel(weights).parent
        del group["0"]
        group.create_dataset("0", shape, "f4", **how)

    return change


def virtual(weights):
    group = kernel(weights).parent
    del group["0"]
    layout = h5py.VirtualLayout((32, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (32, 3))
    group.create_virtual_dataset("0", layout)


def linked(link):
    def change(weights):
        group = kernel(weights).parent
        del group["0"]
        group["0"] = link

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (again(10**5, 10**5), "claim more bytes than are in the file"),
        (again(10**5, 10**5, chunks=(100, 100)), "packed or elsewhere"),
        (again(32, 3, chunks=(32, 3), compression="gzip"), "packed or elsewhere"),
        (again(32, 3, external=[("/etc/passwd", 0, 384)]), "packed or elsewhere"),
        (virtual, "packed or elsewhere"),
        (linked(h5py.SoftLink("/layers")), "links to other places"),
        (linked(h5py.ExternalLink("/etc/passwd", "x")), "links to other places"),
        (again(2, 2), "The shape of the target variable and the shape of the target value"),
    ],
)
def test_weights_are_in_the_file_as_they_are(tmp_path, parts, change, message):
    out = io.BytesIO(parts[H5])
    with h5py.File(out, "r+") as weights:
        change(weights)
    path = written(tmp_path / "m.keras", {**parts, H5: out.getvalue()})
    with pytest.raises(InputError, match=message) as stop:
        kr.load_model(path)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (None, [1], "The info of 'resnet_tiny' must be a dict. Received: [1]."),
        ("class_names", 5, "info['class_names'] of 'resnet_tiny' is not what it must be"),
        ("class_names", {"0": "a"}, "info['class_names'] of"),
        ("class_names", ["a", None, "c"], "info['class_names'] of"),
        ("class_names", ["a", "b"], "has 3 classes and info['class_names'] 2 names"),
        ("preprocess", "x", "info['preprocess'] of"),
        ("preprocess", {"size": 5}, "Preprocess has no argument size"),
        ("preprocess", {"crop_size": 60_000}, "crop_size must make an image of at most 16,777,216"),
        ("preprocess", {"resize_size": [1, 10**9]}, "resize_size must make an image of at most"),
        ("preprocess", {"mean": [math.nan] * 3}, "mean must be one finite number a channel"),
        ("preprocess", {"mean": {"r": 1}}, "mean must be one finite number a channel"),
        ("preprocess", {"std": [1e-320] * 3}, "std must be positive"),
        ("preprocess", {"color_mode": ["rgb"]}, "`color_mode` must be one of"),
        ("preprocess", {"interpolation": {}}, "interpolation must be one of"),
        ("preprocess", {"color_mode": "grayscale", "mean": 0.5, "std": 0.5},
         "takes images of 3 channels, and its preprocessing makes 1"),
        ("options", [1], "info['options'] of"),
        ("options", {"task": 5}, "info['options']['task'] of"),
        ("variant", "\x1b[31m", None),
        ("variant", ["x"], "info['variant'] of"),
        ("weights", "x", "info['weights'] of"),
        ("weights", {"num_batches_tracked": {"bn1": "x"}}, "['num_batches_tracked'] of"),
        ("training", {"val_accuracy": "x"}, "info['training']['val_accuracy'] of"),
        ("training", {"val_accuracy": 10**400}, "info['training']['val_accuracy'] of"),
        ("training", {"val_accuracy": math.nan}, None),
    ],
)  # fmt: skip
def test_info_is_checked_once_in_one_line(tmp_path, parts, name, value, message, capsys):
    def change(config):
        if name is None:
            config["info"] = value
        else:
            config["info"][name] = value

    path = written(tmp_path / "m.keras", described(parts, change))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    code = main(["predict", str(path), str(tmp_path / "a.png")])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    if message is None:
        assert code == 0
        return
    assert code == 2 and message in said.err and said.err.count("\n") == 1
    with pytest.raises(InputError, match=re.escape(message)):
        kr.load_model(path)


def test_info_nested_without_end_is_refused(tmp_path, parts):
    nested = []
    for _ in range(200):
        nested = [nested]
    path = written(tmp_path / "m.keras", described(parts, lambda c: c["info"].update(x=nested)))
    for use in (kr.load_model, inspect_keras_file):
        with pytest.raises(InputError, match="100 levels"):
            use(path)


def test_a_model_in_memory_is_checked_as_a_file_is(parts):
    x = keras.Input((8, 8, 3))
    y = keras.layers.Dense(2)(keras.layers.Flatten()(x))
    pixels = np.zeros((8, 8, 3), np.uint8)
    for info in ({"class_names": 3}, {"options": "x"}, {"preprocess": [1]}):
        with pytest.raises(InputError, match="is not what it must be"):
            kr.predict(kr.ImageModel(x, y, info=copy.deepcopy(info)), pixels)


def test_large_images_make_small_batches():
    sizes = [images_at_a_time(kr.Preprocess(side, side), 32) for side in (224, 724, 1024, 4096)]
    assert sizes == [32, 32, 16, 1]


def test_a_pipe_is_no_model_file(tmp_path):
    os.mkfifo(tmp_path / "m.keras")
    with pytest.raises(InputError, match="is a device or a pipe"):
        kr.load_model(tmp_path / "m.keras")


@pytest.mark.slow
def test_damaged_model_files_load_or_are_refused(tmp_path):
    files = fuzz_keras.samples()
    result = fuzzing.session(
        *(files, fuzz_keras.mutate, fuzz_keras.read, tmp_path),
        count=60,
        memory=fuzz_keras.memory,
    )
    assert not result.failures, result
    assert result.outcomes["refused"] > 20 and result.outcomes["read"] > 1


def test_a_full_disk_ends_a_conversion_in_a_line(tmp_path, capsys):
    """HDF5 would end the whole process."""
    model, size = kr.create_model("resnet_tiny", num_classes=3), resource.RLIMIT_FSIZE
    kr.save_torchvision(model, tmp_path / "a.pth")
    words = ["convert", str(tmp_path / "a.pth"), "--model", "resnet_tiny", "--no-verify"]
    for target in ("b.weights.h5", "b.keras"):
        limits = resource.getrlimit(size)
        resource.setrlimit(size, (30_000, limits[1]))
        try:
            assert main([*words, str(tmp_path / target)]) == 2
        finally:
            resource.setrlimit(size, limits)
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"keras-resnet: {str(tmp_path / target)!r}: File too large"
        assert os.listdir(tmp_path) == ["a.pth"]
    assert main([*words, str(tmp_path / "b.weights.h5")]) == 0
    fresh = kr.create_model("resnet_tiny", num_classes=3)
    fresh.load_weights(tmp_path / "b.weights.h5")
    for one, other in zip(fresh.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
