"""Folds: each image is validated on once, and an interrupted one is gone on with."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli.main import main
from keras_resnet.data.opening import opened
from keras_resnet.system.errors import InputError
from keras_resnet.training import folds as module

pytestmark = pytest.mark.once
TINY = {"model": "resnet_tiny", "image_size": 16, "batch_size": 4, "workers": 1, "report": False}


@pytest.fixture
def pictures(tmp_path, rng):
    """Two classes of four images, one of them in `val/`, and a test image of each."""
    for k, name in enumerate(("ant", "bee")):
        for split, i in (*(("train", i) for i in range(3)), ("val", 3), ("test", 4)):
            (tmp_path / "photos" / split / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (16, 16, 3), np.uint8)
            pixels[..., k] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


def validated(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [row["path"] for row in csv.DictReader(file)]


def test_folds_validate_on_each_image_once_and_go_on(pictures, tmp_path, monkeypatch, capsys):
    words = [
        "train", str(pictures), "--folds", "2", "--epochs", "1", "--model", "resnet_tiny",
        "--image-size", "16", "--batch-size", "4", "--workers", "1", "--no-report",
        "--output", str(tmp_path / "runs"),
    ]  # fmt: skip
    real, calls = module.train, []

    def train(part, name, **options):
        calls.append(name)
        if calls == ["fold-1", "fold-2"]:
            raise KeyboardInterrupt
        return real(part, name=name, **options)

    monkeypatch.setattr(module, "train", train)
    assert main(words) == 130
    assert main([*words, "--dry-run"]) == main(words) == 0
    assert calls == ["fold-1", "fold-2", "fold-2", "fold-2"]
    folder = tmp_path / "runs" / "resnet_tiny-photos-folds"
    parts = [validated(folder / f"fold-{i}") for i in (1, 2)]
    expected = [str(p) for p in pictures.rglob("*.png") if "test" not in p.parts]
    assert sorted(parts[0] + parts[1]) == sorted(expected)
    for part in parts:
        assert sorted("ant" in path for path in part) == [False, False, True, True]
    found = json.loads((folder / "folds.json").read_text())
    runs = [json.loads((folder / f"fold-{i}" / "config.json").read_text()) for i in (1, 2)]
    losses = [run["results"]["val_loss"] for run in runs]
    assert [row["val_loss"] for row in found["folds"]] == losses
    # t of one degree of freedom: 12.706; of two values the error is half of their distance.
    half = 12.7062 * abs(losses[0] - losses[1]) / 2
    np.testing.assert_allclose(found["summary"]["val_loss"], [np.mean(losses), half], rtol=1e-4)
    assert found["summary"]["test_accuracy"][0] >= 0
    assert "val_accuracy" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0 and (folder / "comparison.html").is_file()
    assert main([*words, "--devices", "2"]) == 2
    assert "leave out --devices" in capsys.readouterr().err


def test_folds_of_arrays_and_of_too_few_images(tmp_path, rng):
    arrays = rng.integers(0, 256, (6, 16, 16, 3), np.uint8), ["ant", "bee"] * 3
    output = tmp_path / "runs"
    with pytest.raises(InputError, match=r"an image of each class .* 3 are all of 'ant'.*folds=4"):
        kr.cross_validate(arrays, 4, output=output, verbose=False, **TINY)
    plan = kr.cross_validate(arrays, 3, output=output, dry_run=True, verbose=False, **TINY)
    assert plan.rows == [] and not output.exists()
    result = kr.cross_validate(arrays, 2, output=output, verbose=False, epochs=1, **TINY)
    assert not result.interrupted and [row["fold"] for row in result.rows] == [1, 2]
    held = [validated(result.folder / f"fold-{i}") for i in (1, 2)]
    assert sorted(held[0] + held[1]) == [f"image {i}" for i in range(1, 7)]
    assert "2 folds, val_accuracy" in repr(result) and "mean" in str(result)
    again = kr.cross_validate(
        arrays, 2, output=output, dry_run=True, verbose=False, epochs=1, **TINY
    )
    assert again.folder.name == f"{result.folder.name}-2"
    left = next(module._parts(module._images(opened(arrays), ["image 1"]), 2, 0))
    assert left.asked == {"exclude": ["image 1"]}  # by which a report knows what a fold learnt from
