"""Files that version 0.1 wrote are read, run and gone on with; `data_v01/make.py` made them."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import pathlib
import tarfile

import keras
import numpy as np
import pytest

import keras_resnet as kr

DATA = pathlib.Path(__file__).with_name("data_v01")
BACKENDS = ("torch", "tensorflow", "jax")
# A killed run is found again by its options: those of data_v01/make.py.
RUN = {
    "model": "resnet20",
    "weights": "start.keras",
    "image_size": 16,
    "batch_size": 4,
    "workers": 1,
    "deterministic": True,
    "checkpoint_steps": 2,
    "epochs": 3,
    "unfreeze": "head",
    "gradual": 2,
    "dropout": 0.3,
    "mixup": 0.2,
    "ema": True,
    "ema_steps": 1,
    "learning_rate": 0.05,
    "verbose": False,
    "report": False,
}


def unpack(name, folder):
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: unpack(name, tmp_path_factory.mktemp(name)) for name in BACKENDS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return unpack("runs", tmp_path_factory.mktemp("runs"))


def expected(folder, name="expected.npz"):
    with np.load(folder / name) as file:
        return dict(file)


def assert_close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", BACKENDS)
def test_a_model_gives_what_it_gave(models, source):
    facts = expected(models[source])
    model = kr.load_model(models[source] / "plain.keras")
    assert type(model) is kr.ImageModel and model.info["note"] == "written by 0.1"
    assert model.info["class_names"] == ["ant", "bee", "<fly> & é"]
    assert kr.Preprocess.from_config(model.info["preprocess"]) == kr.Preprocess(20, 16)
    kinds = {type(layer) for layer in model.layers}
    own = ("Normalize", "Conv2D", "BatchNormalization", "MaxPooling2D", "ZeroPaddedShortcut")
    assert {getattr(kr.layers, name) for name in own} <= kinds
    assert_close(model.predict_on_batch(facts["images"].astype("float32")), facts["logits"])
    runner = kr.open_runner(models[source] / "plain.keras")
    assert_close(runner.outputs(facts["images"]), facts["logits"])


@pytest.mark.parametrize("source", BACKENDS)
def test_a_folded_model_gives_what_it_gave(models, source):
    facts = expected(models[source])
    model = kr.load_model(models[source] / "folded.keras")
    assert model.info["optimized"]["folded_norms"] == 9
    assert not any(isinstance(one, keras.layers.BatchNormalization) for one in model.layers)
    assert_close(model.predict_on_batch(facts["images"].astype("float32")), facts["folded_logits"])


@pytest.mark.parametrize(
    "source",  # under torch all; another backend compiles for seconds, and reads the same format
    [pytest.param(b, marks=pytest.mark.long(*{*BACKENDS} - {b, "torch"})) for b in BACKENDS],
)
def test_a_compiled_model_goes_on_training_where_it_was(models, source):
    facts = expected(models[source])
    model = keras.saving.load_model(models[source] / "plain.keras")
    # As train compiles: files of jax ask for it anywhere, and torch would compile for minutes.
    model.jit_compile = keras.backend.backend() == "jax"
    optimizer = model.optimizer
    assert type(optimizer) is kr.optimizers.SGD and int(optimizer.iterations) == 3
    assert optimizer.nesterov and not optimizer.decay_norms
    assert optimizer.rate_multipliers == {"^(.*/)?conv1/": 0.5}
    assert float(optimizer.learning_rate) == pytest.approx(float(facts["rate"]), rel=1e-6)
    model.train_on_batch(facts["images"], facts["labels"])
    found = model.predict_on_batch(facts["images"].astype("float32"))
    assert not np.allclose(facts["next_logits"], facts["logits"], rtol=0, atol=0.01)
    assert_close(found, facts["next_logits"], 1e-4)


@pytest.mark.once
def test_schedules_give_the_rates_that_they_gave(models):
    rows = json.loads((models["torch"] / "schedules.json").read_text())
    kinds = set()
    for row in rows:
        schedule = keras.saving.deserialize_keras_object(row["object"])
        kinds.add(type(schedule))
        found = [schedule.value_at(step) for step in range(len(row["values"]))]
        np.testing.assert_allclose(found, row["values"], rtol=1e-9)
    names = ("Constant", "Step", "MultiStep", "Cosine", "OneCycle")
    assert kinds == {getattr(kr.schedules, f"{name}Schedule") for name in names}


@pytest.mark.once
@pytest.mark.parametrize(
    ("source", "name", "runtime"),
    [
        ("torch", "model.onnx", "onnxruntime"),
        ("torch", "model.xml", "openvino"),
        ("torch", "model.pt2", "torch"),
        ("tensorflow", "model.onnx", "onnxruntime"),
        ("tensorflow", "model.xml", "openvino"),
        ("tensorflow", "model.tflite", "ai_edge_litert"),
        # Its runtime takes seconds to import.
        pytest.param("tensorflow", "saved_model", "tensorflow", marks=pytest.mark.slow),
        pytest.param("jax", "saved_model", "tensorflow", marks=pytest.mark.slow),
    ],
)
def test_an_exported_file_gives_what_its_model_gave(models, source, name, runtime):
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    facts = expected(models[source])
    runner = kr.open_runner(models[source] / name)
    assert runner.info["note"] == "written by 0.1" and runner.num_classes == 3
    assert runner.info["class_names"] == ["ant", "bee", "<fly> & é"]
    assert runner.info["preprocess"] == kr.Preprocess(20, 16).get_config()
    for count in (1, 5):
        assert_close(runner.outputs(facts["images"][:count]), facts["logits"][:count])


# --- run folders ---------------------------------------------------------------------------------


def test_a_finished_run_is_evaluated_as_it_was(runs):
    folder = runs / "finished" / "resnet20-pictures"
    assert kr.load_model(folder).info["training"]["keras_resnet"] == "0.1.0"
    wanted = json.loads((folder / "evaluation.json").read_text())
    found = kr.evaluate(folder, runs / "pictures", workers=1)
    assert found.count == 20 and found.class_names == wanted["class_names"] == ["ant", "bee"]
    # The run evaluated the images that it had held out.
    rows = {pathlib.Path(row["path"]).parts[-2:]: row for row in found.rows}
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        held_out = list(csv.DictReader(file))
    assert len(held_out) == wanted["count"] == 4
    for before in held_out:
        row = rows[pathlib.PurePosixPath(before["path"]).parts[-2:]]
        assert (row["true"], row["predicted"]) == (before["true"], before["predicted"])
        assert row["probability"] == pytest.approx(float(before["probability"]), abs=2e-6)


@pytest.mark.once
def test_a_finished_run_is_reported(runs, tmp_path):
    path = kr.report(runs / "finished" / "resnet20-pictures", tmp_path / "report.html")
    text = pathlib.Path(path).read_text(encoding="utf-8")
    assert "resnet20-pictures" in text and "ant" in text and "0.1.0" in text


@pytest.mark.once
@pytest.mark.skipif(os.name == "nt", reason="the run knows its images by a POSIX path")
@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(runs, monkeypatch):
    folder = runs / "killed" / "resnet20-pictures"
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["keras_resnet"] == "0.1.0" and (folder / "state.npz").is_file()
    # A run is known by where its images are: this process is where that one was.
    home = os.path.dirname(config["directory"])
    monkeypatch.chdir(runs)
    monkeypatch.setattr(os, "getcwd", lambda: home)
    output = runs / "killed"
    plan = kr.train("pictures", output=output, dry_run=True, **RUN)
    assert plan.folder == folder
    result = kr.train("pictures", output=output, **RUN)
    assert result.folder == folder and not result.interrupted
    assert not (folder / "state.npz").exists() and not (folder / ".lock").exists()
    assert [p.name for p in output.iterdir()] == [folder.name]
    log = (folder / "train.log").read_text()
    assert log.count("Going on at epoch 2, step 3 of 4.") == 1
    assert [log.count(f"Epoch: {n}, ") for n in (1, 2, 3)] == [1, 1, 1]

    (peaceful,) = (runs / "peaceful").iterdir()
    found, wanted = (
        np.genfromtxt(one / "history.csv", delimiter=",", names=True) for one in (folder, peaceful)
    )
    assert found.dtype.names == wanted.dtype.names and len(found) == 3
    for name in set(wanted.dtype.names) - {"seconds"}:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, err_msg=name)

    images = np.stack(
        [keras.utils.img_to_array(keras.utils.load_img(p)) for p in
         sorted(runs.glob("pictures/*/*.png"))]
    )  # fmt: skip
    for name in ("best", "last"):
        facts = expected(runs, f"{name}.npz")
        model = kr.load_model(folder / f"{name}.keras")
        assert_close(model.predict_on_batch(images), facts.pop("logits"), 1e-4)
        weights = model.get_weights()
        assert len(weights) == len(facts)
        # Of each weight the first values, its mean and its mean square.
        for i, weight in enumerate(weights):
            flat = weight.astype("float64").ravel()
            numbers = [*flat[:16], flat.mean(), np.square(flat).mean()]
            np.testing.assert_allclose(numbers, facts[str(i)], rtol=1e-3, atol=1e-5)
    model = keras.saving.load_model(folder / "last.keras")
    assert int(model.optimizer.iterations) == 12
