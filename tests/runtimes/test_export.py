"""Exported files answer as the model does, in their own runtimes, and carry what predict needs."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet import runtimes
from keras_resnet.cli import main as cli
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.inference.evaluate import evaluate
from keras_resnet.inference.predict import predict
from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization
from keras_resnet.models.rebuild import optimize_for_inference, to_stock
from keras_resnet.models.zoo import create_model
from keras_resnet.runtimes import export as exporting, int8, select, writing as formats
from keras_resnet.runtimes.export import export
from keras_resnet.runtimes.rows import FORMATS
from keras_resnet.runtimes.runner import KerasRunner
from keras_resnet.runtimes.select import open_file, open_runner
from keras_resnet.system.device import exact_float32
from keras_resnet.system.errors import (
    InputError,
    MissingDependencyError,
    NotFoundError,
    VerificationError,
)
from keras_resnet.weights.verify import relative_difference

# Nothing in them may break XML, JSON or a zip archive.
NAMES = ["ant", "<script>&amp;", "q\"uo'te", "new\nline", "\u202ertl", "é]]>\x07"]
BACKEND = keras.backend.backend()
WRITABLE = [name for name, row in FORMATS.items() if BACKEND in row.needs]


def build(name="resnet_tiny", **options):
    """A model whose batch norms do something, so that a forgotten one is seen."""
    keras.utils.set_random_seed(5)
    options = {"num_classes": len(NAMES), "input_shape": (32, 32, 3), **options}
    model = create_model(name, **options)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name == "moving_mean":
            weight.assign(rng.normal(0, 0.1, weight.shape))
        elif weight.name == "moving_variance":
            weight.assign(rng.uniform(0.5, 2, weight.shape))
    model.info["class_names"] = list(NAMES)
    size = model.input_shape[1] or 48
    model.info["preprocess"] = Preprocess(size + 8, size).get_config()
    return model


@pytest.fixture(scope="module")
def model():
    return build(include_preprocessing=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "pictures"
    rng = np.random.default_rng(0)
    for name in ("ant", "q\"uo'te"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((60, 50)).save(folder / name / f"{i}.png")
    return folder


def needs(name):
    """Skips where a format's packages are missing."""
    for module in FORMATS[name].needs[BACKEND]:
        pytest.importorskip(module)
    pytest.importorskip(FORMATS[name].module)


def target(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"model{FORMATS[name].suffix}"


def by_hand(path: pathlib.Path, name: str, images: np.ndarray) -> np.ndarray:
    """The runtime's answer, without a line of ours."""
    if name == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(str(path)).run(None, {"images": images})[0]
    if name == "openvino":
        import openvino

        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        return openvino.Core().compile_model(str(path), "CPU", hint)(images)[0]
    if name == "saved_model":
        import tensorflow

        loaded = tensorflow.saved_model.load(str(path))
        return loaded.serve(images).numpy()
    if name == "litert":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path))
        (given,), (answer,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(given["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(answer["index"])
    import torch

    return torch.export.load(path).module()(torch.from_numpy(images)).detach().numpy()


def assert_says_nothing_of_this_machine(folder):
    """No file, nor one inside it, names a folder: exporters note lines of code by their paths."""
    here = [str(folder), keras.__path__[0], os.path.dirname(runtimes.__path__[0])]
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        texts = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                texts += map(archive.read, archive.namelist())
        assert not [one for one in here if any(os.fsencode(one) in text for text in texts)], path


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.slow
def test_a_file_answers_as_the_model_and_knows_what_the_model_knows(name, pictures, tmp_path):
    needs(name)
    # One that has never run: what layers make at their first call must not be an exporter's.
    model = build(include_preprocessing=True)
    path = target(tmp_path, name)
    report = export(model, path, name, pictures=pictures)
    assert report.passed and [one.batch for one in report.comparisons] == [1, 12]
    assert "Agrees to 0.0001" in str(report)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {path.name} | ({"model.bin"} if name == "openvino" else set())
    assert_says_nothing_of_this_machine(tmp_path)
    images = np.random.default_rng(1).uniform(0, 255, (5, 32, 32, 3)).astype(np.float32)
    expected = model.predict_on_batch(images)
    for count in (1, 2, 5):
        found = by_hand(path, name, images[:count])
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=2e-5 * abs(expected).max())
    runner = open_runner(path)
    assert runner.info == model.info and runner.num_classes == len(NAMES)
    ours, theirs = predict(model, pictures, workers=1), predict(runner, pictures, workers=1)
    for a, b in zip(ours, theirs, strict=True):
        assert a.path == b.path and [n for n, _ in a.classes] == [n for n, _ in b.classes]
        np.testing.assert_allclose([p for _, p in a.classes], [p for _, p in b.classes], rtol=1e-3)
    assert evaluate(runner, pictures).loss == pytest.approx(evaluate(model, pictures).loss, 1e-4)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in WRITABLE])
def test_what_the_backend_cannot_write_is_said_with_one_that_can(name, model, tmp_path):
    with pytest.raises(InputError, match=f"Keras on {BACKEND} cannot write {name}") as caught:
        export(model, target(tmp_path, name), name)
    assert any(f"KERAS_BACKEND={able}" in str(caught.value) for able in FORMATS[name].needs)
    assert not any(tmp_path.iterdir())


FIRST = WRITABLE[0]  # formats differ in what is tested above; what follows is the same for all


def test_normalised_input_softmax_and_half_precision(pictures, tmp_path):
    needs(FIRST)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = build(classifier_activation="softmax")
    finally:
        keras.config.set_dtype_policy("float32")
    path = target(tmp_path, FIRST)
    report = export(half, path, FIRST, pictures=pictures)
    assert "mixed_bfloat16; file and comparison are in float32" in str(report)
    full = build(classifier_activation="softmax")
    full.set_weights(half.get_weights())
    runner = open_file(path)
    images = formats.sample_input(full, 3)
    assert images.dtype == np.float32 and runner.gives_probabilities
    assert relative_difference(runner.outputs(images), full.predict_on_batch(images)) < 1e-5
    logs = runner.log_probabilities(images)
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1, atol=1e-5)


def test_a_file_of_one_batch_size_takes_any_number_of_pictures(model, tmp_path):
    needs(FIRST)
    path = target(tmp_path, FIRST)
    assert export(model, path, FIRST, batch_size=2).batch_size == 2
    runner = open_file(path)
    assert runner.input_shape[0] == 2
    images = formats.sample_input(model, 5)
    expected = KerasRunner(model).outputs(images)
    assert relative_difference(runner.outputs(images), expected) < 1e-4


def test_a_free_picture_size_becomes_that_of_the_preprocessing(tmp_path):
    needs(FIRST)
    free = build(input_shape=(None, None, 3))
    path = target(tmp_path, FIRST)
    report = export(free, path, FIRST)
    assert "the file takes 48x48" in str(report)
    assert open_file(path).input_shape == (None, 48, 48, 3)
    free.info["preprocess"] = Preprocess(64, None).get_config()
    with pytest.raises(InputError, match="crop_size"):
        export(free, path, FIRST)


def test_grouped_convolutions_and_features_without_a_head(tmp_path):
    needs(FIRST)
    x = inputs = keras.Input((32, 32, 3))
    x = Conv2D(8, 3, strides=2, pad=1, name="stem")(x)
    x = BatchNormalization(activation="relu")(Conv2D(16, 3, strides=2, pad=1, groups=4)(x))
    x = keras.layers.Conv2D(12, 3, padding="same", groups=2)(x)
    features = keras.Model(inputs, x)
    report = export(features, target(tmp_path, FIRST), FIRST)
    assert report.passed and "does not say how its images are prepared" in str(report)
    with pytest.raises(InputError, match="no classification head"):
        open_runner(target(tmp_path, FIRST))


@pytest.mark.parametrize(
    "twin", [to_stock, pytest.param(optimize_for_inference, marks=pytest.mark.once)]
)
@pytest.mark.slow
def test_stock_and_folded_twins_are_exported_as_well(twin, model, tmp_path):
    needs(FIRST)
    path = target(tmp_path, FIRST)
    assert export(twin(model), path, FIRST, pictures=formats.sample_input(model, 3)).passed
    images = formats.sample_input(model, 2, seed=1)
    expected = model.predict_on_batch(images)
    assert relative_difference(by_hand(path, FIRST, images.astype("f4")), expected) < 1e-4


@pytest.mark.once
@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_kept(model, tmp_path, monkeypatch, capsys):
    needs(FIRST)
    path = target(tmp_path, FIRST)
    export(model, path, FIRST)
    before = formats.size_of(path, FIRST), open_file(path).outputs(formats.sample_input(model, 1))
    other = build(include_preprocessing=True)
    other.layers[-1].kernel.assign(np.asarray(other.layers[-1].kernel) * 1.001)
    write = formats.write
    monkeypatch.setattr(formats, "write", lambda _, *args: write(other, *args))
    with pytest.raises(VerificationError) as caught:
        export(model, path, FIRST)
    worst = max(one.difference for one in caught.value.report.comparisons)
    assert 1e-4 < worst < 1e-2 and not caught.value.report.passed
    after = formats.size_of(path, FIRST), open_file(path).outputs(formats.sample_input(model, 1))
    assert before[0] == after[0] and np.array_equal(before[1], after[1])
    assert len(list(tmp_path.iterdir())) == (2 if FIRST == "openvino" else 1)

    file = tmp_path / "m.keras"
    model.save(file)
    assert cli.main(["export", str(file), "--format", FIRST, "--output", str(path)]) == 1
    out = capsys.readouterr()
    assert "more than the tolerance" in out.out and "not kept" in out.err


@pytest.mark.slow
@pytest.mark.long("tensorflow", "jax")
def test_engines_take_a_model_and_auto_measures(model, pictures):
    images = formats.sample_input(model, 3)
    expected = KerasRunner(model).outputs(images)
    for name in WRITABLE:
        runtime = FORMATS[name].runner.runtime
        if runtime in select.ENGINES:
            needs(name)
            runner = open_runner(model, runtime)
            assert runner.name == runtime and runner.info == model.info
            assert relative_difference(runner.outputs(images), expected) < 1e-4
    best = open_runner(model, "auto")
    tried = {t.name: t.seconds for t in best.trials if t.seconds is not None}
    assert f"keras/{BACKEND}" in tried and best.name == min(tried, key=tried.get)
    assert best.name in str(best) and " ms" in str(best)
    assert relative_difference(best.outputs(images), expected) < 1e-4


@pytest.mark.once
def test_auto_survives_an_engine_that_fails_and_says_why(model, monkeypatch):
    def broken(*_):
        raise RuntimeError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setattr(select, "_through_file", broken)
    best = open_runner(model, "auto")
    assert best.name == "keras/torch"
    failed = {trial.name: trial.reason for trial in best.trials if trial.seconds is None}
    assert set(failed) == {"openvino", "onnxruntime", "torch"}
    assert set(failed.values()) == {"libcublas.so.12: cannot open shared object file"}
    monkeypatch.setattr(select, "KerasRunner", broken)
    with pytest.raises(InputError, match=r"keras: libcublas.*; openvino: libcublas"):
        open_runner(model, "auto")


@pytest.mark.once
def test_a_gpu_of_onnxruntime_or_openvino_is_used_and_named(model, tmp_path, monkeypatch):
    """Stood in for by the CPU, which gets what is meant for a GPU."""
    ort, ov = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    path, asked = target(tmp_path, "onnx"), []
    formats.write(model, path, "onnx")

    class Session(ort.InferenceSession):
        def __init__(self, path, options, providers):
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    class Core(ov.Core):
        available_devices = ("CPU", "GPU.0")

        def get_property(self, device, name):
            return f"Card of {device}"

        def compile_model(self, model, device, options):
            asked.append((device, sorted(options)))
            return super().compile_model(model, "CPU", options)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    here = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: here)
    monkeypatch.setattr(ov, "Core", Core)
    images = formats.sample_input(model, 2)
    expected = KerasRunner(model).outputs(images)
    for engine, name in (
        ("auto", "onnxruntime on CUDA"),
        ("openvino", "openvino on Card of GPU.0"),
    ):
        runner = open_file(path, engine)
        assert runner.name == name
        assert relative_difference(runner.outputs(images), expected) < 1e-4
    with exact_float32():
        open_file(path)
    (cuda, cpu), gpu, ((_, exact), _) = asked
    assert cuda == ("CUDAExecutionProvider", {"use_tf32": "1"}) and cpu == "CPUExecutionProvider"
    assert gpu == ("GPU.0", ["INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT"])
    assert exact == {"use_tf32": "0"}


@pytest.mark.skipif(BACKEND == "torch", reason="torch can write for every engine")
def test_an_engine_that_the_backend_cannot_feed_is_said(model):
    with pytest.raises(InputError, match="KERAS_BACKEND=torch"):
        open_runner(model, "torch")


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "labelled"),
    [
        ("onnx", True),
        ("onnx", False),
        ("openvino", True),
        pytest.param("openvino", False, marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_int8_is_measured(name, labelled, pictures, tmp_path, capsys):
    needs(name)
    pytest.importorskip("nncf")
    model = build("resnet20", include_preprocessing=True)  # of a tiny file most is no weight
    source = pictures if labelled else pictures / "ant"
    report = export(model, target(tmp_path, name), int8=source, pictures=pictures, max_drop=1)
    assert report.int8.calibrated == (12 if labelled else 6) and report.int8.count == 12
    assert report.int8.before == pytest.approx(evaluate(model, pictures).top1)
    runner = open_runner(target(tmp_path, name))
    assert report.int8.after == pytest.approx(evaluate(runner, pictures).top1)
    images = formats.sample_input(model, 3)
    difference = relative_difference(runner.outputs(images), KerasRunner(model).outputs(images))
    assert 1e-4 < difference < 1  # it is not the float32 file
    assert report.size < 0.7 * report.int8.size_before
    assert "the same prediction" in str(report)


@pytest.mark.once
def test_int8_that_costs_too_much_fails():
    report = int8.Int8Report(10, 100, True, 0.9, 0.85, 0.9, 1)
    alike = [exporting.Comparison(1, 0.3)]
    assert not exporting._passes(alike, 1e-4, report, 0.02)
    assert exporting._passes(alike, 1e-4, report, 0.06)
    unlabelled = int8.Int8Report(10, 100, True, None, None, 0.85, 1)
    assert not exporting._passes(alike, 1e-4, unlabelled, 0.02)
    assert not exporting._passes([exporting.Comparison(1, float("nan"))], 1e-4, report, 1)


@pytest.mark.once
def test_onnx_is_read_by_other_tools_and_openvino_reads_it(model, tmp_path):
    needs("onnx")
    import onnx

    export(model, tmp_path / "m.onnx")
    found = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(found, full_check=True)
    properties = {p.key: p.value for p in found.metadata_props}
    assert json.loads(properties["class_names"]) == NAMES
    about = json.loads(properties["keras_resnet"])
    assert about["input"]["holds"] == "pixel values 0 to 255" and about["output"] == "logits"
    assert "centre crop to 32x32" in about["steps_before_the_model"]
    pytest.importorskip("openvino")
    images = formats.sample_input(model, 2)
    runner = open_runner(tmp_path / "m.onnx", "openvino")
    assert runner.name == "openvino" and runner.info == model.info
    assert relative_difference(runner.outputs(images), KerasRunner(model).outputs(images)) < 1e-4


@pytest.mark.once
def test_an_onnx_file_of_somebody_else_runs_with_a_preprocess(pictures, tmp_path):
    torch = pytest.importorskip("torch")
    needs("onnx")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    path = tmp_path / "theirs.onnx"
    torch.onnx.export(net, torch.zeros(1, 3, 16, 16), path, dynamo=False)
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        predict(path, pictures)
    preprocess = Preprocess(16, 16)
    answers = predict(path, pictures, preprocess=preprocess)
    first = torch.from_numpy(preprocess(answers[0].path)).permute(2, 0, 1)[None]
    shares = net(first).softmax(1)[0].detach().numpy()
    assert answers[0].classes[0] == (str(shares.argmax()), pytest.approx(shares.max(), rel=1e-4))


@pytest.mark.once
def test_what_is_missing_is_said_before_any_work(model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    for missing, call in {
        "onnx": lambda: export(model, tmp_path / "m.onnx"),
        "onnxruntime": lambda: export(model, tmp_path / "m.onnx"),
        "openvino": lambda: open_runner(model, "openvino"),
        "nncf": lambda: export(model, tmp_path / "m.xml", int8=tmp_path),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(
                "importlib.util.find_spec",
                lambda name, missing=missing: None if name == missing else find(name),
            )
            patch.setattr(formats, "write", lambda *args: pytest.fail("work was begun"))
            with pytest.raises(MissingDependencyError, match=f"'{missing}'.*pip install"):
                call()


@pytest.mark.once
@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("m.onxx", {}, "names no format"),
        ("m.xml", {"format": "onnx"}, r"ends in '\.onnx'"),
        ("m.onnx", {"format": "saved_model"}, "looks like a file"),
        ("m.onnx", {"format": "onxx"}, "Did you mean 'onnx'"),
        ("m.onnx", {"batch_size": 0}, "at least 1"),
        ("m.pt2", {"int8": "."}, "int8 can be had in onnx or openvino. Received: 'torch'"),
        ("folder.onnx", {}, "is a folder"),
    ],
)
def test_what_does_not_fit_is_said(model, tmp_path, path, options, message):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match=message):
        export(model, tmp_path / path, **options)


@pytest.mark.once
def test_more_that_does_not_fit(model, tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        export(model, tmp_path / "none" / "m.onnx")
    with pytest.raises(NotFoundError, match=r"Did you mean 'm\.onnx'"):
        (tmp_path / "m.onnx").write_bytes(b"no model")
        open_file(tmp_path / "m.onn")
    with pytest.raises(InputError, match="cannot open"):
        open_runner(tmp_path / "m.onnx")
    (tmp_path / "alone.xml").write_text("<net/>")
    with pytest.raises(NotFoundError, match=r"alone\.bin' is missing"):
        open_runner(tmp_path / "alone.xml")
    with pytest.raises(InputError, match=r"does not read 'm\.onnx'"):
        open_runner(tmp_path / "m.onnx", "torch")
    with pytest.raises(InputError, match="exported file already"):
        export(tmp_path / "m.onnx", tmp_path / "n.onnx")
    with pytest.raises(InputError, match="Received: 'bfloat16'"):
        open_runner(tmp_path / "m.onnx", precision="bfloat16")


@pytest.mark.once
def test_the_command_writes_beside_the_model(model, tmp_path, capsys):
    needs(FIRST)
    file = tmp_path / "m.keras"
    model.save(file)
    assert cli.main(["export", str(file), "--format", FIRST]) == 0
    out = capsys.readouterr().out
    written = exporting.rows.default_path(file, FIRST)
    assert f"Written: {written}" in out and "batch 3: differs by at most" in out
    assert written.exists()
    assert cli.main(["export", str(file)]) == 2
    assert "--format onnx" in capsys.readouterr().err
