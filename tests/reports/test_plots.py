"""Figures are written, of the right kind and size, whatever the names and numbers are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from keras_resnet import plots
from keras_resnet.errors import InputError

pytestmark = pytest.mark.once

ODD = ["$\\alpha$ {", "a" * 200, "\u732b", "\x1b[31m", "", "_^\\"]


def ink(path):
    """Share of pixels that are not white."""
    with Image.open(path) as picture:
        return float((np.asarray(picture.convert("L")) < 250).mean())


def test_curves_draw_all_four_columns(tmp_path):
    history = {
        "accuracy": [0.1, 0.5], "loss": [2.0, 1.0], "val_accuracy": [0.2, 0.4],
        "val_loss": [2.1, 1.2],
    }  # fmt: skip
    full = plots.curves(history, tmp_path / "full.png")
    half = plots.curves({"loss": [2.0, 1.0]}, tmp_path / "half.png")
    assert ink(full) > ink(half) > 0


@pytest.mark.parametrize(
    "history",
    [{}, {"loss": []}, {"loss": [float("nan")], "val_loss": [float("inf")]}, {"accuracy": [0.5]}],
)
def test_curves_of_little_or_no_data_are_drawn(tmp_path, history):
    assert plots.curves(history, tmp_path / "c.png").is_file()


def test_a_grid_shows_the_pictures_as_they_are(tmp_path):
    images = np.zeros((3, 40, 30, 3), np.uint8)
    images[1] = (255, 0, 0)
    path = plots.picture_grid(images, ["a", "b", "c"], tmp_path / "grid.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).mean() > 0.02
    assert (pixels == (0, 0, 0)).all(1).mean() > 0.04


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["g.png", "g.jpg", "g.svg", "g.pdf"])
def test_grids_of_any_channels_in_any_format(tmp_path, channels, name):
    images = np.full((len(ODD), 8, 8, channels), 128, np.uint8)
    assert plots.picture_grid(images, ODD, tmp_path / name).stat().st_size > 500


def test_odd_names_are_drawn_without_warnings(tmp_path, recwarn):
    matrix = np.arange(len(ODD) ** 2).reshape(len(ODD), -1)
    plots.confusion_matrix(matrix, ODD, tmp_path / "m.png")
    assert not recwarn.list


@pytest.mark.parametrize("count", [2, 40, 200])
def test_a_confusion_matrix_of_many_classes_stays_a_picture(tmp_path, count):
    names = [f"class {i}" for i in range(count)]
    path = plots.confusion_matrix(np.eye(count, dtype=int), names, tmp_path / "m.png")
    with Image.open(path) as picture:
        assert max(picture.size) < 4000


def test_a_class_without_pictures_divides_by_nothing(tmp_path, recwarn):
    plots.confusion_matrix(np.array([[3, 1], [0, 0]]), ["a", "b"], tmp_path / "m.png")
    assert not recwarn.list


def test_the_sweep_of_learning_rates_is_drawn(tmp_path):
    rates = np.geomspace(1e-5, 1, 30)
    losses = 2 - np.log10(rates / 1e-5) / 5
    assert ink(plots.learning_rates(rates, losses, losses, 1e-2, tmp_path / "lr.png")) > 0
    flat = np.ones(30)
    assert plots.learning_rates(rates, flat, flat, None, tmp_path / "flat.png").is_file()


def test_a_confusion_matrix_may_be_lists_and_has_a_row_a_class(tmp_path):
    assert plots.confusion_matrix([[3, 1], [0, 4]], ["a", "b"], tmp_path / "m.svg").exists()
    with pytest.raises(InputError, match=r"of 3 classes is 3 x 3\. Received: \(2, 2\)"):
        plots.confusion_matrix([[3, 1], [0, 4]], ["a", "b", "c"], tmp_path / "m.png")
