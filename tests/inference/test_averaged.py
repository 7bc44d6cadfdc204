"""The mean of several models, and of an image and its mirror image, against the mean by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli.main import main
from keras_resnet.system.errors import InputError

NAMES = ["ant", "bee", "cat"]


def tiny(names=NAMES, size=16):
    shape = (size, size, 3)
    model = kr.create_model(
        "resnet_tiny", num_classes=len(names), input_shape=shape, include_preprocessing=True
    )
    model.info["class_names"] = list(names)
    model.info["preprocess"] = kr.Preprocess(size, size).get_config()
    return model


@pytest.fixture
def folder(tmp_path, rng):
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def chances(model, images, **options):
    """Probabilities by class, an image a row."""
    found = kr.predict(model, images, top=3, **options)
    return np.array([[dict(p.classes)[name] for name in NAMES] for p in found])


def test_flipping_averages_the_image_and_its_mirror_image(folder):
    model, paths = tiny(), sorted(map(str, folder.rglob("*.png")))
    mirrored = [Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT) for path in paths]
    expected = (chances(model, paths) + chances(model, mirrored)) / 2
    assert np.abs(chances(model, mirrored) - expected).max() > 1e-3
    np.testing.assert_allclose(chances(model, paths, tta="flip"), expected, rtol=1e-5)
    rows = kr.evaluate(model, folder, tta="flip").rows
    np.testing.assert_allclose([row["probability"] for row in rows], expected.max(1), rtol=1e-5)


@pytest.mark.once
def test_several_models_are_averaged_by_the_names_of_their_classes(folder):
    models, paths = [tiny(), tiny(["cat", "ant", "bee"])], sorted(map(str, folder.rglob("*.png")))
    expected = np.mean([chances(model, paths) for model in models], axis=0)
    np.testing.assert_allclose(chances(models, paths), expected, rtol=1e-5)
    both = chances(models, paths, tta="flip")
    each = [chances(model, paths, tta="flip") for model in models]
    np.testing.assert_allclose(both, np.mean(each, axis=0), rtol=1e-5)
    rows = kr.evaluate(models, folder).rows
    np.testing.assert_allclose([row["probability"] for row in rows], expected.max(1), rtol=1e-5)


@pytest.mark.once
def test_models_that_do_not_go_together_are_refused(folder):
    with pytest.raises(InputError, match=r"same classes.* they differ in 'cat', 'dog'"):
        kr.predict([tiny(), tiny(["ant", "bee", "dog"])], folder)
    with pytest.raises(InputError, match="take images in different ways"):
        kr.predict([tiny(), tiny(size=32)], folder)
    with pytest.raises(InputError, match=r"Received: 'flips'"):
        kr.predict(tiny(), folder, tta="flips")
    with pytest.raises(InputError, match="empty list"):
        kr.predict([], folder)


@pytest.mark.once
def test_the_command_takes_several_models_and_goes_on_with_an_output(folder, tmp_path, capsys):
    models = [tiny(), tiny()]
    files = [str(tmp_path / name) for name in ("a.keras", "b.keras")]
    for model, file in zip(models, files, strict=True):
        model.save(file)
    written = tmp_path / "x.json"
    words = ["predict", *files, str(folder), "--tta", "flip", "--engine", "keras"]
    assert main([*words, "--json", str(written)]) == 0
    assert "Engine: keras/torch, 2 models, flip" in capsys.readouterr().out
    rows = json.loads(written.read_text())
    found = [{c["name"]: c["probability"] for c in row["classes"]} for row in rows]
    expected = chances(models, folder, tta="flip")
    np.testing.assert_allclose([[f[n] for n in NAMES] for f in found], expected, rtol=1e-5)
    output = str(tmp_path / "y.jsonl")
    assert main([*words, "--output", output]) == 0
    assert len((tmp_path / "y.jsonl").read_text().splitlines()) == 6
    assert main(["evaluate", files[0], str(folder), "--tta", "flip"]) == 0
    assert "top-1" in capsys.readouterr().out
