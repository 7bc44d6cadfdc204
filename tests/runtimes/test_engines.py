"""`--engine auto`: another engine where it pays, compared and kept; else the model itself."""

from __future__ import annotations

import importlib.util
import os
import shutil

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet.cli import main as cli
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.inference.evaluate import evaluate
from keras_resnet.inference.predict import predict
from keras_resnet.models.zoo import create_model
from keras_resnet.runtimes import kept, onnx, runner as runners, select, writing
from keras_resnet.runtimes.runner import KerasRunner
from keras_resnet.runtimes.select import images_that_pay, open_runner
from keras_resnet.runtimes.writing import sample_input
from keras_resnet.weights.verify import relative_difference

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.once  # of files that all backends share
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

MANY = 10**9


@pytest.fixture
def model():
    keras.utils.set_random_seed(3)
    model = create_model("resnet_tiny", num_classes=3, input_shape=(32, 32, 3))
    model.info["class_names"] = ["ant", "bee", "cat"]
    model.info["preprocess"] = Preprocess(36, 32).get_config()
    return model


@pytest.fixture
def file(model, tmp_path, monkeypatch):
    """A model file; its seconds are not those of this machine, nor its cache the user's."""
    monkeypatch.setenv("KERAS_RESNET_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        select, "_median_seconds", lambda one, *_: 8.0 if isinstance(one, KerasRunner) else 4.0
    )
    (tmp_path / "models").mkdir()
    model.save(tmp_path / "models" / "m.keras")
    return tmp_path / "models" / "m.keras"


@pytest.fixture
def work(monkeypatch):
    """What was converted and compared, in order."""
    done = []
    for place, name in ((writing, "write"), (select, "_compared")):
        call = getattr(place, name)

        def noted(*args, call=call, name=name, **options):
            done.append(name.strip("_"))
            return call(*args, **options)

        monkeypatch.setattr(place, name, noted)
    return done


def kept_of(file):
    """Where what was made of the file lies: in the user's cache, never beside the file."""
    assert os.listdir(file.parent) == ["m.keras"]
    (folder,) = (file.parent.parent / "home" / "engines").iterdir()
    return folder


def test_few_images_are_the_models_own(model, file, work):
    few = open_runner(file, "auto", images=399)
    assert str(few) == (f"keras/{BACKEND} (399 images; a conversion pays from 400 at the earliest)")
    needed = images_that_pay(model)
    under = open_runner(model, "auto", images=needed - 1)
    assert under.why == f"{needed - 1:,} images; a conversion pays from {needed:,}"
    assert work == [] and os.listdir(file.parent) == ["m.keras"]


def test_what_pays_is_counted_from_arithmetic_and_size(monkeypatch):
    monkeypatch.setattr(select, "cores", lambda: 2)
    tiny, small, large = (
        images_that_pay(create_model(name)) for name in ("resnet_tiny", "resnet20", "resnet18")
    )
    assert tiny > small > large
    assert 900 < large < 1200 and 5_000 < small < 7_000
    monkeypatch.setattr(select, "cores", lambda: 16)  # the sooner a core is done, the more images
    assert images_that_pay(create_model("resnet18")) > 4 * large


def test_many_images_get_an_engine_that_is_kept(model, file, work):
    first = open_runner(file, "auto", images=MANY)
    assert str(first) == ("onnxruntime (1,000,000,000 images; 500 ms an image, the model 1e+03)")
    assert work == ["write", "compared"]
    assert sorted(os.listdir(kept_of(file))) == ["m.keras.onnx", "m.keras.onnx.json"]
    images = sample_input(model, 5, seed=1)
    expected = KerasRunner(model).outputs(images)
    assert relative_difference(first.outputs(images), expected) < 1e-5

    # Neither compared nor converted again, however many; the model is not even loaded.
    for count in (1, MANY):
        again = open_runner(file, "auto", images=count)
        assert str(again) == ("onnxruntime (converted before; 500 ms an image, the model 1e+03)")
    assert relative_difference(again.outputs(images), expected) < 1e-5
    assert again.info["class_names"] == ["ant", "bee", "cat"] and work == ["write", "compared"]
    assert open_runner(file, "onnxruntime").name == "onnxruntime"
    assert work == ["write", "compared"]
    assert open_runner(file, images=MANY).name == f"keras/{BACKEND}"  # the bits


def test_another_model_file_or_version_is_compared_again(model, file, work, monkeypatch):
    open_runner(file, "auto", images=MANY)
    model.layers[-1].kernel.assign(np.asarray(model.layers[-1].kernel) * 2)
    model.save(file)
    images = sample_input(model, 3)
    changed = open_runner(file, "auto", images=MANY)
    assert work == ["write", "compared"] * 2
    assert relative_difference(changed.outputs(images), KerasRunner(model).outputs(images)) < 1e-5
    assert sorted(os.listdir(kept_of(file))) == [
        "m.keras.onnx",
        "m.keras.onnx.json",
    ]
    installed = kept.installed_version
    monkeypatch.setattr(
        kept, "installed_version", lambda m: "0.1" if m == "onnxruntime" else installed(m)
    )
    open_runner(file, "auto", images=MANY)
    assert work == ["write", "compared"] * 3


def test_a_damaged_kept_file_is_made_again(file, work):
    open_runner(file, "auto", images=MANY)
    stored = kept_of(file) / "m.keras.onnx"
    for path in (stored, stored.with_name("m.keras.onnx.json")):
        path.write_bytes(path.read_bytes()[:-9])
        assert open_runner(file, "auto", images=MANY).name == "onnxruntime"
    assert work == ["write", "compared"] * 3


def test_an_engine_that_disagrees_is_refused_and_said(model, file, work, monkeypatch):
    run = onnx.Runner._run
    monkeypatch.setattr(onnx.Runner, "_run", lambda self, images: run(self, images) * 1.001)
    monkeypatch.setattr(select, "_UNASKED", ("onnxruntime",))
    for _ in range(2):  # the second time it is known
        refused = open_runner(file, "auto", images=MANY)
        assert refused.name == f"keras/{BACKEND}"
        assert refused.why == "onnxruntime differs from the model by 0.001 of the largest output"
    assert work == ["write", "compared"]
    assert sorted(os.listdir(kept_of(file))) == ["m.keras.onnx.json"]
    monkeypatch.setattr(onnx.Runner, "_run", lambda self, images: run(self, images) * np.nan)
    model.name = "other"
    model.save(file)
    assert "differs from the model by nan" in open_runner(file, "auto", images=MANY).why


def test_an_engine_that_is_slower_fails_or_is_missing_is_said(model, file, monkeypatch):
    monkeypatch.setattr(
        select, "_median_seconds", lambda one, *_: 4.0 if isinstance(one, KerasRunner) else 8.0
    )
    monkeypatch.setattr(select, "_UNASKED", ("onnxruntime",))
    slower = open_runner(file, "auto", images=MANY)
    assert slower.why == "onnxruntime was no faster: 1e+03 ms an image, the model 500"
    model.name = "other"  # another file
    model.save(file)

    def broken(*_):
        raise RuntimeError("no kernel")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write", broken)
        failed = open_runner(file, "auto", images=MANY)
    assert failed.name == f"keras/{BACKEND}" and failed.why == "onnxruntime failed: no kernel"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    assert open_runner(file, "auto", images=MANY).why == "onnxruntime is not installed"


def test_on_a_gpu_the_model_stays_unless_the_engine_has_one(file, monkeypatch):
    monkeypatch.setattr(select, "devices", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(select, "_UNASKED", ("onnxruntime",))
    assert open_runner(file, "auto", images=MANY).why == "onnxruntime has no GPU here"
    monkeypatch.setattr(onnx, "_gpu_providers", lambda: ["CUDAExecutionProvider"])
    assert open_runner(file, "auto", images=MANY).name == "onnxruntime"


def test_images_that_a_file_does_not_take_are_the_models(file, monkeypatch):
    sizes = {"preprocess": Preprocess(None, None)}
    open_runner(file, "auto", images=MANY)
    assert "images of one size" in open_runner(file, "auto", images=MANY, **sizes).why


def test_a_cache_that_cannot_be_written(file, work):
    """Stood in for by a file where the folder would be, as root may write anywhere."""
    (file.parent.parent / "home").write_text("in the way")
    for _ in range(2):
        assert open_runner(file, "auto", images=MANY).name == "onnxruntime"
    assert work == ["write", "compared"] * 2


def test_what_lies_beside_a_model_file_is_not_run(file, work):
    """Such a folder comes with a stranger's model: what was made of it once lies elsewhere."""
    open_runner(file, "auto", images=MANY)
    shutil.move(kept_of(file), file.parent / ".keras_resnet")
    assert open_runner(file, "auto", images=1).name == f"keras/{BACKEND}"
    assert work == ["write", "compared"]


def test_an_engine_that_was_asked_for_once_is_timed_before_it_is_taken(file, work):
    assert open_runner(file, "onnxruntime", images=MANY).name == "onnxruntime"
    assert open_runner(file, "auto", images=1).name == f"keras/{BACKEND}"
    assert work == ["write", "compared"]
    assert open_runner(file, "auto", images=MANY).why.endswith("500 ms an image, the model 1e+03")
    assert work == ["write", "compared"] * 2


def test_a_model_in_memory_is_converted_at_each_call(model, file, work):
    for _ in range(2):
        assert open_runner(model, "auto", images=MANY).name == "onnxruntime"
    assert work == ["write", "compared"] * 2 and os.listdir(file.parent) == ["m.keras"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("fixed", [None, 2])
def test_of_many_images_each_thread_has_its_own(model, tmp_path, monkeypatch, engine, fixed):
    pytest.importorskip(engine)
    path, images = tmp_path / "m.onnx", sample_input(model, 7)
    writing.write(model, path, "onnx", fixed)
    runner = select.open_file(path, engine, threads=3, many=True)
    seen, run = [], runner._run
    monkeypatch.setattr(runner, "_run", lambda part: seen.append(len(part)) or run(part))
    expected = KerasRunner(model).outputs(images)
    assert relative_difference(runner.outputs(images), expected) < 1e-5
    assert sorted(seen) == ([2, 2, 3] if fixed is None else [2, 2, 2, 2])
    # So many batches that every thread has work while one of them ends.
    assert [runner.at_once(n) for n in (1, 2, 7)] == ([4, 3, 2] if fixed is None else [4, 4, 2])
    assert select.open_file(path, engine, threads=3).at_once(1) == 1
    found = runner.in_turn(runner.outputs, np.split(images, 7), 1)
    assert relative_difference(np.concatenate(list(found)), expected) < 1e-5


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "photos" / "antbeecat"[index % 3 * 3 :][:3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_predict_and_evaluate_take_it_and_say_so(file, photos, work, monkeypatch, capsys):
    monkeypatch.setattr(select, "_not_worth", lambda *_: "")
    monkeypatch.setattr(runners, "available_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(select, "_MANY", 1)
    own = predict(file, photos, engine="keras", batch_size=4)
    assert work == []
    for size in (1, 4):
        found = predict(file, photos, batch_size=size)
        assert [one.path for one in found] == [one.path for one in own]
        for a, b in zip(found, own, strict=True):
            assert dict(a.classes) == pytest.approx(dict(b.classes), abs=1e-5)
    a, b = evaluate(file, photos, batch_size=4), evaluate(file, photos, engine="keras")
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert (a.confusion == b.confusion).all()
    assert work == ["write", "compared"]
    for command in ("predict", "evaluate"):
        assert cli.main([command, str(file), str(photos)]) == 0
        assert "Engine: onnxruntime (converted before; 500 ms" in capsys.readouterr().out
        assert cli.main([command, str(file), str(photos), "--engine", "keras"]) == 0
        assert f"Engine: keras/{BACKEND}\n" in capsys.readouterr().out


def test_an_interrupted_output_goes_on_with_the_engine_that_began_it(
    file, photos, monkeypatch, capsys
):
    output = photos.parent / "answers.csv"

    def stop(progress):
        if progress.done:
            raise KeyboardInterrupt

    from keras_resnet.inference.predict import write_predictions

    with pytest.raises(KeyboardInterrupt):
        write_predictions(file, photos, output, batch_size=4, progress=stop)
    open_runner(file, "auto", images=MANY)  # in between another folder was converted for
    command = ["predict", str(file), str(photos), "--output", str(output), "--batch-size", "4"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert f"Engine: keras/{BACKEND}\n" in out and "4 of them by an earlier run" in out
    assert cli.main(command) == 0
    assert "Engine: onnxruntime (converted before" in capsys.readouterr().out
