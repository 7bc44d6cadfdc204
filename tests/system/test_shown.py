"""What a prompt and a notebook show of results: one line, and a table with escaped texts."""

import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr

pytestmark = pytest.mark.once
NAME = "<b>bold</b>\x1b"


@pytest.fixture
def evaluation():
    row = {"name": NAME, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "count": 3}
    return kr.Evaluation(
        0.25, 0.75, None, 1234, [NAME, "b"], [row] * 40, np.eye(2), [{}] * 1234, [("a", "b")]
    )


def test_an_evaluation(evaluation):
    line = "1,234 images, top-1 75.00%, loss 0.2500, 1 unreadable"
    assert repr(evaluation) == f"<Evaluation: {line}>"
    page = evaluation._repr_html_()
    assert page.startswith(f"<p>{line}</p><table><tr><th>Class</th>")
    escaped = "&lt;b&gt;bold&lt;/b&gt;\\x1b"
    row = f"<td>{escaped}</td><td>0.500</td><td>1.000</td><td>0.667</td><td>3</td>"
    assert page.count(f"<tr>{row}</tr>") == 30 and page.endswith("<p>and 10 more</p>")


def test_a_training(tmp_path, evaluation):
    history = {"loss": [1.0, 0.5]}
    result = kr.TrainResult(tmp_path / "<i>", None, history, evaluation)
    assert repr(result) == "<TrainResult: .../<i>, 2 epochs, validation top-1 75.00%>"
    page = result._repr_html_()
    assert page.startswith("<p>.../&lt;i&gt;, 2 epochs")
    assert "<td>validation</td><td>75.00%</td><td>0.2500</td><td>1,234</td>" in page
    stopped = kr.TrainResult(tmp_path, None, {"loss": [1.0]}, interrupted=True)
    assert repr(stopped) == f"<TrainResult: .../{tmp_path.name}, 1 epoch, interrupted>"


def test_a_scan_and_a_dataset(tmp_path):
    for name in ("a/1&.png", "a/2.png", "b/3.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 30), 50).save(path)
    (tmp_path / "b" / "<4>.png").write_bytes(b"no image")
    report = kr.scan(tmp_path)
    assert repr(report) == f"<ScanReport: '.../{tmp_path.name}', 4 images, 2 classes, 1 findings>"
    assert "<tr><td>cannot be read</td><td>1</td><td>" in report._repr_html_()
    assert "b/&lt;4&gt;.png" in report._repr_html_()
    data = kr.image_dataset_from_directory(tmp_path, image_size=(32, 32), batch_size=3)
    assert repr(data) == "<ImageDataset: 4 images, 2 classes, 2 batches of 3, uint8>"
    assert "<tr><td>a</td><td>2</td></tr>" in data._repr_html_()
