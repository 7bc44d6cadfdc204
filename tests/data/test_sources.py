"""Images that are no folder: tables, arrays and shards are used as folders are."""

from __future__ import annotations

import csv
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from keras_resnet.cli import main as cli
from keras_resnet.data.arrays import Arrays
from keras_resnet.data.folders import find_pictures
from keras_resnet.data.items import Item, Source
from keras_resnet.data.opening import find_parts, image_source, labelled, opened
from keras_resnet.data.scan import scan
from keras_resnet.data.sources import Images
from keras_resnet.inference.evaluate import evaluate
from keras_resnet.inference.predict import predict
from keras_resnet.system.errors import DataError, InputError, NotFoundError
from keras_resnet.training.train import train

once = pytest.mark.once
TINY = {
    "model": "resnet_tiny", "image_size": 16, "batch_size": 8, "epochs": 2, "workers": 1,
    "verbose": False, "report": False, "learning_rate": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of eight images in one folder, and one image that is broken."""
    root, rng = tmp_path_factory.mktemp("images") / "insects", np.random.default_rng(3)
    for k, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            pixels[..., k] += 120
            Image.fromarray(pixels).save(root / name / f"{name}_{i}.png")
    return root


def rows(folder):
    paths, labels, names = find_pictures(folder)
    below = [os.path.relpath(path, folder.parent) for path in paths]
    return [(path, names[k]) for path, k in zip(below, labels, strict=True)]


def table(folder, kind="csv"):
    path, found = folder.parent / f"insects.{kind}", rows(folder)
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "class": label}) for name, label in found]
        path.write_text("\n".join(lines))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        names, labels = zip(*found, strict=True)
        parquet.write_table(pyarrow.table({"image_path": names, "label": labels}), path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *found])
    return path


def arrays(folder):
    paths, labels, names = find_pictures(folder)
    return np.stack([np.asarray(Image.open(path)) for path in paths]), labels, names


MAKERS = {
    "csv": table,
    "jsonl": lambda folder: table(folder, "jsonl"),
    "parquet": lambda folder: table(folder, "parquet"),
    "arrays": arrays,
    "regex": lambda folder: image_source(folder, label_regex=r"^([a-z]+)_"),
}


@pytest.fixture(scope="module")
def history(folder, tmp_path_factory):
    return train(folder, output=tmp_path_factory.mktemp("run"), **TINY)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_trains_the_same_images_to_the_same_losses(kind, folder, history, tmp_path):
    source = MAKERS[kind](folder)
    result = train(source, output=tmp_path, **TINY)
    for column, values in history.history.items():
        if column != "seconds":
            assert result.history[column] == values, column
    assert (result.folder / "batch.png").is_file()
    assert evaluate(result.model, source).loss == evaluate(history.model, folder).loss
    # The same call goes on with the run, and is not a new one.
    again = train(source, output=tmp_path, **{**TINY, "epochs": 3})
    assert again.folder == result.folder and len(again.history["loss"]) == 3


@once
@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_is_read_as_the_folder_is(kind, folder):
    source = MAKERS[kind](folder)
    _, labels, names = find_pictures(folder)
    paths, found, called = labelled(source)
    assert [names[k] for k in labels] == [called[k] for k in found] and len(set(paths)) == 24
    first = Images([paths[3]])
    assert list(first) == [paths[3]]
    report = scan(opened(source))
    assert report.pictures == 24 and not report.unreadable
    assert report.class_counts == {"": dict.fromkeys(names, 8)}
    assert json.loads(report.to_json())["mean"] == scan(folder).mean
    again = pickle.loads(pickle.dumps(paths))
    assert list(again) == list(paths)
    if isinstance(again[5], Item):
        assert np.array_equal(again[5].read(), paths[5].read())


@once
def test_sources_are_predicted(folder, history):
    expected = predict(history.model, folder)
    for source in (str(table(folder)), opened(arrays(folder))):
        found = predict(history.model, source)
        assert [p.classes for p in found] == [p.classes for p in expected]


@once
def test_a_table_says_splits_and_what_it_takes_as_what(folder, tmp_path):
    found = rows(folder)
    path = folder.parent / "splits.csv"
    kinds = ["train"] * 6 + ["valid", "Test"]
    lines = [f"{name};{label};{kinds[i % 8]};1" for i, (name, label) in enumerate(found)]
    lines[-1] = lines[-1].replace(";cat;", ";;")  # a test image without a label
    path.write_text("\n".join(["Image;Class;set;weight", *lines]))
    parts = find_parts(opened(path))
    assert {kind: len(of) for kind, (of, _) in parts.of.items()} == {
        "train": 18, "val": 3, "test": 3,
    }  # fmt: skip
    assert parts.names == ["ant", "bee", "cat"] and parts.of["test"][1] is None
    assert parts.notes == [
        "Columns: path from 'Image', label from 'Class', split from 'set'; not used: 'weight'."
    ]
    assert parts.of["val"][1].tolist() == [0, 1, 2]
    out = [os.path.abspath(parts.of["train"][0][0])]
    assert len(find_parts(opened(path), exclude=out).of["train"][0]) == 17
    paths, labels, _ = labelled(path, "val")
    assert len(paths) == 3 and labels.tolist() == [0, 1, 2]


@once
@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        ("t.csv", "", InputError, "no column of paths"),
        ("t.csv", "path,label\n", DataError, "no row"),
        ("t.csv", "path,label\nhere.png,a\n,b\n", DataError, "Row 2 of"),
        ("t.csv", "path,label\nhere.png,a\nhere.png,\n", DataError, "Row 2 .* has no label"),
        ("t.csv", "path,label\nhere.png\n", DataError, "row 1 has 1 cells, the header 2"),
        ("t.csv", "path,label\naway.png,a\n", NotFoundError, "count from the table's folder"),
        ("t.csv", "path,label,split\nhere.png,a,odd\n", DataError, "neither train, val nor test"),
        ("t.csv", "foto,art\nhere.png,a\n", InputError, "--columns path=NAME"),
        ("t.jsonl", "[1]\n", DataError, "line 1 is no object"),
        ("t.jsonl", "{", DataError, "cannot be read"),
        ("t.jsonl", '{"path": 3}', DataError, "has no path. Received: 3"),
        ("t.jsonl", '{"path": "here.png", "label": ["a", "b"]}', DataError, "has 2 labels"),
        ("t.parquet", "no table", DataError, "cannot be read"),
    ],
)
def test_a_bad_table_is_said_in_one_line(name, text, error, words, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "here.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=words) as caught:
        opened(tmp_path / name)
    assert "\n" not in str(caught.value)


@once
def test_columns_and_labels_can_be_said(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "here.png")
    path = tmp_path / "t.csv"
    path.write_text("foto,art\nhere.png,10\nhere.png,9\n")
    source = image_source(path, columns={"path": "foto", "label": "art"})
    assert source.class_names == ["9", "10"] and source.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"no column 'arts'\. Did you mean 'art'"):
        image_source(path, columns={"path": "foto", "label": "arts"})
    with pytest.raises(InputError, match="for path, label or split"):
        image_source(path, columns={"text": "foto"})
    with pytest.raises(DataError, match="finds no label in 24 of 24"):
        image_source(folder, label_regex=r"(\d+)$")
    with pytest.raises(InputError, match="no regular expression"):
        image_source(folder, label_regex="(")
    with pytest.raises(DataError, match="says no labels"):
        labelled(image_source((np.zeros((2, 4, 4), np.uint8), None)))


@once
def test_arrays_are_taken_as_keras_datasets_gives_them(folder):
    images, labels, _ = arrays(folder)
    first = images[:3].transpose(0, 3, 1, 2)
    source = opened(((images, labels[:, None]), (first, np.eye(3)[:3])))
    assert source.splits.tolist() == ["train"] * 24 + ["test"] * 3
    assert source[24] == "test image 1" and np.array_equal(source[24].read(), images[0])
    assert source.class_names == ["0", "1", "2"] and source.labels[24:].tolist() == [0, 1, 2]
    assert len(find_parts(source).of["test"][0]) == 3
    assert Arrays(images, labels).place != Arrays(images, labels[::-1]).place
    for wrong, words in (
        ((images / 255, labels), "whole pixel values"),
        ((images, labels[:5]), "one label an image"),
        ((images[0, 0], labels), r"Received: shape \(16, 3\)"),
        ((images, labels, ["ant"]), "labels must lie in 0..0"),
        ((images, [*"abcdefgh"] * 3, ["ant"]), "no class 'a'"),
        (3, "Received: int"),
    ):
        with pytest.raises(InputError, match=words):
            opened(wrong)


@once
def test_parts_may_come_from_different_places(folder):
    images, labels, names = arrays(folder)
    source = opened(
        {"train": folder, "val": (images[:9], labels[:9], names), "test": table(folder)}
    )
    parts = find_parts(source)
    assert [len(parts.of[kind][0]) for kind in ("train", "val", "test")] == [24, 9, 24]
    assert isinstance(source, Source) and isinstance(source[0], str)
    assert type(source[0]) is str and source[24] == "val image 1"
    with pytest.raises(InputError, match="'val' has classes that the first does not have: 'dog'"):
        opened({"train": folder, "val": (images[:1], ["dog"])})


@once
def test_the_command_line_takes_tables(folder, history, tmp_path, capsys):
    path = table(folder)
    model = str(history.folder)
    assert cli.main(["scan", str(path)]) == 0
    assert f"{str(path)!r}: 24 images" in capsys.readouterr().out
    assert cli.main(["evaluate", model, str(folder), "--label-regex", "^([a-z]+)"]) == 0
    assert f"Images: 24 of {folder}" in capsys.readouterr().out
    names = tmp_path / "t.csv"
    names.write_text(path.read_text().replace("path,label", "foto,art").replace("ins", "../ins"))
    (folder.parent / "below").mkdir()
    names = names.rename(folder.parent / "below" / "t.csv")
    words = ["evaluate", model, str(names), "--columns", "path=foto,label=art"]
    assert cli.main(words) == 0
    assert cli.main(words[:3]) == 2 and "no column of paths" in capsys.readouterr().err
    assert cli.main([*words[:4], "foto"]) == 2
    assert "path=NAME,label=NAME" in capsys.readouterr().err
    words = ["train", str(path), "--model", "resnet_tiny", "--dry-run", "--weights", "none"]
    assert cli.main([*words, "--output", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "Columns: path from 'path', label from 'label'." in out and "3 classes" in out
    assert cli.main(["train", str(tmp_path / "away.csv")]) == 2
    assert "away.csv' does not exist" in capsys.readouterr().err
