"""Weights and outputs that are no numbers: an error that says so, and JSON that stays JSON."""

from __future__ import annotations

import io
import json
import math

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli.main import main
from keras_resnet.inference.service import Limits, open_service
from keras_resnet.models.image_model import weights_not_finite
from keras_resnet.runtimes.runner import KerasRunner
from keras_resnet.system.errors import InputError
from keras_resnet.system.files import to_json, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate("ab"):
        (folder / name).mkdir()
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "1.png")
    return folder


def tiny(value=None):
    """A model of two classes, with one value in one of its weights."""
    model = kr.create_model("resnet_tiny", num_classes=2, include_preprocessing=True)
    preprocess = kr.Preprocess(16, 16, mean=None, std=None)
    model.info.update(class_names=["a", "b"], preprocess=preprocess.get_config())
    if value is not None:
        variable = next(v for v in model.weights if v.path.endswith("bn1/moving_mean"))
        array = np.array(keras.ops.convert_to_numpy(variable))
        array[2] = value
        variable.assign(array)
    return model


SAID = r"'resnet_tiny': 1 of 8 values of the weight '.*bn1/moving_mean' are not finite\. Load other"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_weight_that_is_no_number_is_said_wherever_it_is_used(value, folder, tmp_path, backend):
    model = tiny(value)
    for use in (
        lambda: kr.predict(model, folder),
        lambda: kr.predict(model, folder, output=tmp_path / "p.csv"),
        lambda: kr.evaluate(model, folder),
        lambda: open_service(model, "keras", Limits()),
    ):
        with pytest.raises(InputError, match=SAID) as caught:
            use()
        assert "\n" not in str(caught.value)
    name, kind = ("m", "saved_model") if backend == "jax" else ("m.onnx", "onnx")
    with pytest.raises(InputError, match=SAID):
        kr.export(model, tmp_path / name, format=kind, verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_the_command_line_says_it_in_one_line(folder, tmp_path, capsys):
    tiny(math.nan).save(tmp_path / "m.keras")
    for arguments in (
        ["predict", tmp_path / "m.keras", folder, "--json", tmp_path / "p.json"],
        ["evaluate", tmp_path / "m.keras", folder],
        ["export", tmp_path / "m.keras", "--format", "onnx", "--output", tmp_path / "m.onnx"],
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert "moving_mean" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.keras"]


def test_outputs_that_overflow_are_said_though_the_weights_are_numbers(folder):
    inputs = keras.Input((16, 16, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(inputs)
    last = keras.layers.Dense(2, kernel_initializer=keras.initializers.Constant(3e38))
    model = kr.ImageModel(inputs, last(pooled), info=tiny().info)
    assert weights_not_finite(model) is None
    runner, ones = KerasRunner(model), np.ones((3, 16, 16, 3), "float32")
    ones[1] = 100.0
    ones[0] = 1e-3
    ones[2] = 0.0
    with pytest.raises(InputError, match="infinite for 1 of 3 images: look at its weights"):
        runner.finite_outputs(ones)
    assert np.isfinite(runner.finite_outputs(ones[::2])).all()
    last.kernel.assign(np.full((3, 2), np.nan))  # after it was opened
    with pytest.raises(InputError, match="for 1 of 1 images: 6 of 6 values of the weight"):
        runner.finite_outputs(ones[:1])


@pytest.mark.once
def test_one_image_that_overflows_is_that_images_error_in_a_service(monkeypatch):
    service = open_service(tiny(), "keras", Limits())
    monkeypatch.setattr(service.runner, "outputs", lambda images: np.array([[np.nan, 0.0]]))
    image = Image.new("RGB", (16, 16))
    file = io.BytesIO()
    image.save(file, "png")
    [result] = service.results([("a.png", file.getvalue)], heat=False)
    assert "nan or infinite" in result.error and result.classes == []
    json.dumps(service.to_dict([result]), allow_nan=False)


@pytest.mark.once
def test_a_logit_of_minus_infinity_rules_a_class_out():
    runner = KerasRunner(tiny())
    runner.outputs = lambda images: np.array([[0.0, -np.inf], [1.0, 1.0]])
    found = np.exp(runner.log_probabilities(None))
    np.testing.assert_allclose(found, [[1.0, 0.0], [0.5, 0.5]])
    runner.outputs = lambda images: np.array([[-np.inf, -np.inf]])
    with pytest.raises(InputError, match="for 1 of 1 images"):
        runner.log_probabilities(None)


@pytest.mark.once
def test_json_has_no_nan(tmp_path):
    value = {"loss": math.nan, "all": [1, math.inf, (np.float64("-inf"), "NaN")], "p": {"q": 0.5}}

    def refuse(name):
        raise AssertionError(name)

    expected = {"loss": None, "all": [1, None, [None, "NaN"]], "p": {"q": 0.5}}
    assert json.loads(to_json(value), parse_constant=refuse) == expected
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == expected
