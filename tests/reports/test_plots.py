"""Figures are written, of the right kind and size, whatever the names and numbers are."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from keras_resnet import plots
from keras_resnet.system.errors import InputError

pytestmark = pytest.mark.once

ODD = ["$\\alpha$ {", "a" * 200, "\u732b", "\x1b[31m", "", "_^\\"]


@pytest.fixture
def texts(monkeypatch):
    """The texts of the figure that was saved last."""
    found = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        save(figure, *arguments, **options)
        found[:] = [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


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


@pytest.mark.parametrize("name", ODD)
def test_no_name_is_drawn_as_dots_alone(name):
    label = plots.label_text(name)
    assert not name or label.strip(".")
    assert plots.label_text("a" * 200) == "a" * 14 + "..." + "a" * 7


def test_letters_without_a_font_are_said(tmp_path, texts, caplog, recwarn):
    plots._say_missing.cache_clear()
    names = ["\U000f1234", "cat", "caf\u00e9"]  # a letter for private use, which no font has
    plots.confusion_matrix(np.eye(3, dtype=int), names, tmp_path / "m.png")
    assert [t for t in texts if t.startswith("No font here has U+F1234; install one")]
    assert "U+F1234" in caplog.text and not recwarn.list
    plots.confusion_matrix(np.eye(2, dtype=int), ["cat", "caf\u00e9"], tmp_path / "m.png")
    assert not [t for t in texts if "No font" in t]


def test_letters_are_looked_for_in_other_fonts(monkeypatch):
    def letters(path):
        return frozenset("\u732b" if "STIXGeneral" in path else "abc")

    monkeypatch.setattr(plots, "_letters_of", letters)
    found = plots._fonts.__wrapped__(frozenset("a\u732b\u72ac"))
    usual = tuple(matplotlib.rcParams["font.family"])
    assert found == ((*usual, "STIXGeneral"), ("\u72ac",))
    assert plots._fonts.__wrapped__(frozenset("abc")) == (usual, ())


def test_what_is_right_is_blue_and_mistakes_are_orange(tmp_path):
    path = plots.confusion_matrix([[3, 1], [0, 4]], ["a", "b"], tmp_path / "m.png")
    found = {tuple(color) for color in pixels_of(path).reshape(-1, 3)}
    blue = (61, 125, 235)  # all of class b is right
    mistake = tuple(round(255 * (0.5 * c + 0.5)) for c in (0.87, 0.36, 0.05))  # a quarter: its root
    assert any(np.abs(np.subtract(c, blue)).max() <= 1 for c in found)
    assert any(np.abs(np.subtract(c, mistake)).max() <= 2 for c in found)


def test_many_classes_list_their_most_frequent_mistakes(tmp_path, texts):
    matrix = 50 * np.eye(100, dtype=int)
    matrix[3, 7], matrix[99, 0] = 25, 10
    names = [f"class {i}" for i in range(100)]
    plots.confusion_matrix(matrix, names, tmp_path / "m.png")
    [said] = [t for t in texts if "most frequent" in t]
    assert said.split("\n")[1:] == [
        "class 3 taken for class 7: 25 (33%)", "class 99 taken for class 0: 10 (17%)",
    ]  # fmt: skip
    plots.confusion_matrix(50 * np.eye(100, dtype=int), names, tmp_path / "m.png")
    assert "The most frequent mistakes\nNone" in texts


def test_frequent_mistakes_are_counted_as_the_matrix_says():
    matrix = np.array([[5, 2, 0], [3, 1, 3], [0, 0, 0]])
    found = plots.frequent_mistakes(matrix, ["a", "b", "c"], 3)
    assert found == [("b", "a", 3, 3 / 7), ("b", "c", 3, 3 / 7), ("a", "b", 2, 2 / 7)]
    assert matrix[0, 0] == 5


def test_curves_say_the_best_epoch_in_percent(tmp_path, texts):
    history = {"accuracy": [0.4, 0.9], "val_accuracy": [0.5, 0.781], "loss": [2.0, 1.0]}
    plots.curves(history, tmp_path / "c.png")
    assert {"78.1%", "Training and validation accuracy", "Training loss", "100%"} <= set(texts)


def test_an_explanation_shows_image_map_class_probability_and_scale(tmp_path, texts):
    image = np.full((32, 48, 1), 100, np.uint8)
    overlay = np.full((256, 384, 3), (200, 30, 10), np.uint8)
    path = plots.explanation(image, overlay, ("$cat$", 0.8123), ("dog", 0.003), tmp_path / "e.png")
    assert {r"Predicted: \$cat\$ 81.2%", "For: dog 0.3%", "nothing", "most"} <= set(texts)
    colors = {tuple(c) for c in pixels_of(path).reshape(-1, 3)}
    assert {(100, 100, 100), (200, 30, 10)} <= colors


@pytest.mark.parametrize("count", [2, 40, 1000])
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
    path = plots.learning_rates(rates, flat, flat, None, tmp_path / "flat.png", noise=True)
    assert path.is_file()


def test_a_confusion_matrix_may_be_lists_and_has_a_row_a_class(tmp_path):
    assert plots.confusion_matrix([[3, 1], [0, 4]], ["a", "b"], tmp_path / "m.svg").exists()
    with pytest.raises(InputError, match=r"of 3 classes is 3 x 3\. Received: \(2, 2\)"):
        plots.confusion_matrix([[3, 1], [0, 4]], ["a", "b", "c"], tmp_path / "m.png")
