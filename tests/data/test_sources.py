"""Images that are no folder: tables, arrays and shards are used as folders are."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from keras_resnet.cli import checks, main as cli
from keras_resnet.cli.demo import write_digits
from keras_resnet.data import (
    cifar as archives,
    listing,
    looking,
    opening,
    rows as rows_of_tables,
    shards as shard_files,
    walk,
)
from keras_resnet.data.arrays import Arrays
from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.folders import find_pictures
from keras_resnet.data.items import Item, Source
from keras_resnet.data.mixing import Mix
from keras_resnet.data.opening import find_parts, image_source, labelled, opened
from keras_resnet.data.packing import pack
from keras_resnet.data.reading import decode
from keras_resnet.data.rows import content
from keras_resnet.data.scan import scan
from keras_resnet.data.sources import Images
from keras_resnet.inference.evaluate import evaluate
from keras_resnet.inference.explain import iter_explanations
from keras_resnet.inference.predict import predict
from keras_resnet.recipes import get_recipe
from keras_resnet.reports.report import report
from keras_resnet.system.errors import DataError, InputError, NotFoundError
from keras_resnet.training import prepare
from keras_resnet.training.train import train

once = pytest.mark.once
TINY = {
    "model": "resnet_tiny", "image_size": 16, "batch_size": 8, "epochs": 1, "workers": 1,
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


def shards(folder):
    place = folder.parent / "shards"
    if not place.exists():
        pack(folder, place, shard_mb=0.03)
    return place


MAKERS = {
    "shards": shards,
    "rows": lambda folder: hub(folder),
    "images in parquet": lambda folder: parquet_images(folder),
    "csv": table,
    "jsonl": lambda folder: table(folder, "jsonl"),
    "parquet": lambda folder: table(folder, "parquet"),
    "arrays": arrays,
    "regex": lambda folder: image_source(folder, label_regex=r"^(?:is_)?([a-z]+|\d)_"),
}


@pytest.fixture(scope="module")
def history(folder, tmp_path_factory):
    return train(folder, output=tmp_path_factory.mktemp("run"), **TINY)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Three of each of the demo's digits, whose classes are called by numbers; and their run."""
    root = tmp_path_factory.mktemp("digits")
    folder = write_digits(root / "digits", each=3)
    for path in folder.glob("*/*.png"):
        path.rename(path.with_name(f"is_{path.parent.name}_{path.name}"))
    return folder, train(folder, output=root, **TINY)


@once  # batches are NumPy's until Keras has them
@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_trains_the_demos_digits_to_the_same_losses(kind, digits, tmp_path):
    folder, history = digits
    source = MAKERS[kind](folder)
    result = train(source, output=tmp_path, **TINY)
    for column, values in history.history.items():
        if column != "seconds":
            assert result.history[column] == values, column
    assert (result.folder / "batch.png").is_file()
    if kind in ("shards", "arrays"):  # the same call goes on with the run, and is not a new one
        assert evaluate(result.model, source).loss == evaluate(history.model, folder).loss
        again = train(source, output=tmp_path, **{**TINY, "epochs": 2})
        assert again.folder == result.folder and len(again.history["loss"]) == 2
    if kind == "csv":  # the same files, and another class
        source.write_text(source.read_text().replace(",9", ",8"))
        with pytest.raises(InputError, match="images or their classes have changed"):
            train(source, output=tmp_path, **{**TINY, "epochs": 2})
        assert json.loads((result.folder / "config.json").read_text())["status"] == "finished"


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
    if kind == "rows":  # the stand-in's class is a test's
        return
    again = pickle.loads(pickle.dumps(paths))
    assert list(again) == list(paths)
    if isinstance(again[5], Item):
        assert np.array_equal(again[5].read(), paths[5].read())


@once
def test_sources_are_predicted(folder, history):
    expected = predict(history.model, folder)
    for source in (str(table(folder)), opened(arrays(folder)), shards(folder)):
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


HERE = '{"path": "here.png", '


@once
@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        ("t.csv", "", DataError, "is empty"),
        ("t.jsonl", "\n", DataError, "is empty"),
        ("t.csv", "p\0a\0t\0h\0", DataError, "no UTF-8 but UTF-16"),
        ("t.csv", "path,label\n", DataError, "no row"),
        ("t.csv", "path,label\nhere.png,a\n,b\n", DataError, "Row 2 of"),
        ("t.csv", "path,label\nhere.png,a\nhere.png,\n", DataError, "Row 2 .* has no label"),
        ("t.csv", "path,label\nhere.png\n", DataError, "row 1 has 1 cells, the header 2"),
        ("t.csv", "path,label\naway.png,a\n", NotFoundError, "count from the table's folder"),
        ("t.csv", "path,label,split\nhere.png,a,odd\n", DataError, "neither train, val nor test"),
        ("t.csv", "foto,art\nhere.png,a\n", InputError, "--columns path=NAME"),
        ("t.jsonl", "[1]\n", DataError, "line 1 is no object"),
        ("t.jsonl", '{"path": "a"}\n{', DataError, "line 2, column 2"),
        ("t.jsonl", '{"path": 3}', DataError, "has no path. Received: 3"),
        ("t.jsonl", '{"path": "here.png", "label": [{}, "b"]}', DataError, "Row 1 .* no label. R"),
        ("t.csv", "path,y,sample_weight\nhere.png,a,-1\n", DataError, "Row 1 .* weight .*: '-1'"),
        ("t.csv", "path,y,sample_weight\nhere.png,a,much\n", DataError, "no number from 0 on"),
        ("t.parquet", "no table", DataError, "cannot be read"),
        ("t.jsonl", HERE + '"label": [["b"]]}', DataError, r"Row 1 .* no label. Received: \['b'\]"),
        ("t.jsonl", HERE + '"y": ' + "[" * 900 + "]" * 900 + "}", DataError, "Row 1 .* no label"),
        ("t.jsonl", HERE + '"y": 1, "x": ' + "[" * 900 + "]" * 900 + ', "z": [1]}', None, ""),
        ("t.jsonl", HERE + f'"sample_weight": {10**400}}}', DataError, "no number from 0 on"),
        ("t.jsonl", HERE + r'"y": "\ud800"}', DataError, "surrogates not allowed"),
        ("t.jsonl", "".join(f'{{"c{i}": 1}}\n' for i in range(2_000)), DataError, "different keys"),
        ("t.csv", f"path,y,split\nhere.png,a,{'x' * 9_000}\n", DataError, "x{59}...x{29}'"),
    ],
)
def test_a_bad_table_is_said_in_one_line(name, text, error, words, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "here.png")
    (tmp_path / name).write_text(text)
    if error is None:
        assert len(opened(tmp_path / name)) == 1
        return
    with pytest.raises(error, match=words) as caught:
        opened(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@once
def test_a_parquet_file_unpacks_to_what_it_may_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_of_tables, "_ROOM", 2**26)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for kind, name in ((str, "path"), (str.encode, "image")):  # 300 MB of one value
        once_kept = pyarrow.array([kind("a" * 1_000)])
        rows = pyarrow.DictionaryArray.from_arrays(np.zeros(300_000, np.int32), once_kept)
        table = pyarrow.table({name: rows, "label": np.zeros(300_000, np.int8)})
        parquet.write_table(table, tmp_path / "t.parquet", store_schema=False)
        with pytest.raises(DataError, match="unpacks to more than 1 GB and 64 times"):
            opened(tmp_path / "t.parquet").read(0)
    for cell in ({"bytes": 3}, {"bytes": None, "path": 3}, {"bytes": "a"}, 0):
        with pytest.raises(DataError, match="the row has no image"):
            content(cell, "row 1")
    assert content({"bytes": bytearray(b"a")}, "row 1") == b"a"


@once
@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("t.csv", "path,label\n{},cat|dog\n{},bee\n{},\n", None),
        ("t.csv", "path;tags\n{};\"dog, cat\"\n{};bee\n{};\n", {"separator": ", "}),
        ("t.csv", "path,classes\n{},\"['dog', 'cat']\"\n{},['bee']\n{},[]\n", None),
        ("t.jsonl", '{{"path": "{}", "labels": ["cat", "dog"]}}\n'
                    '{{"path": "{}", "labels": ["bee"]}}\n{{"path": "{}", "labels": []}}', None),
    ],
)  # fmt: skip
def test_an_image_may_have_several_labels(name, text, columns, tmp_path, png):
    for i in range(3):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / name).write_text(text.format("0.png", "1.png", "2.png"))
    source = image_source(tmp_path / name, columns=columns)
    assert source.class_names == ["bee", "cat", "dog"]
    assert source.labels.tolist() == [(1, 2), (0,), ()]
    assert source[:2].labels.tolist() == [(1, 2), (0,)] and source[:2].digest() != source.digest()
    assert pickle.loads(pickle.dumps(source)).labels.tolist() == source.labels.tolist()
    report = scan(source)
    assert report.class_counts == {"": {"cat": 1, "dog": 1, "bee": 1, "": 1}}
    assert labelled(source)[1].tolist() == source.labels.tolist()
    pack(source, tmp_path / "out")
    again = opened(tmp_path / "out")
    assert again.labels.tolist() == source.labels.tolist()
    assert again.class_names == source.class_names
    other = np.zeros((2, 4, 4, 3), np.uint8), [["dog"], ["cat", "bee"]]
    both = opened(
        {"train": source, "val": other, "test": (other[0], ["bee", "cat"], ["bee", "cat"])}
    )
    assert both.labels.tolist() == [(1, 2), (0,), (), (2,), (0, 1), (0,), (1,)]


@once
def test_several_labels_are_rows_of_ones_and_lists_and_may_be_unknown_in_a_test(tmp_path, png):
    x = np.zeros((3, 4, 4, 3), np.uint8)
    for labels in ([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], np.array([[1, 0, 1, 0], [0, 1, 0, 0],
                   [0] * 4], bool), [[0, 2], [1], []], [(0, 2), (1,), ()]):  # fmt: skip
        source = opened((x, labels, [*"abcd"]))
        assert source.labels.tolist() == [(0, 2), (1,), ()] and source.class_names == [*"abcd"]
    assert opened((x, np.eye(4)[:3])).class_names == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match=r"labels of shape \(3, 2\)"):
        opened((x, np.ones((3, 2)) / 2))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png)
    text = "path,label,split\n0.png,a|b,train\n1.png,,train\n2.png,,test\n3.png,{},test\n"
    for last, labels in (("", None), ("b", [(), (1,)])):
        (tmp_path / "t.csv").write_text(text.format(last))
        parts = find_parts(opened(tmp_path / "t.csv")).of
        assert parts["train"][1].tolist() == [(0, 1), ()]
        found = parts["test"][1]
        assert (found if found is None else found.tolist()) == labels
    (tmp_path / "t.jsonl").write_text('{"path": "0.png", "label": ["a", "b"]}\n{"path": "1.png"}')
    with pytest.raises(DataError, match=r"Row 2 .* has no label"):
        opened(tmp_path / "t.jsonl")


@once
@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (("1,0,1", "0,1,0", "0,0,0"), [(0, 2), (1,), ()]),
        (("1.0,0.0,True", "0,1,False", ",,"), [(0, 2), (1,), None]),
        (("1,0,0", "0,1,0", "0,0,1"), [0, 1, 2]),
        (("1,0,0", "0,1,0", ",,"), [0, 1, -1]),  # to test on
        (("1,0,2", "0,1,0", "0,0,1"), [(0,), (1,), ()]),  # the third is no label's
    ],
)
def test_a_column_of_0_and_1_a_label_is_a_table_of_labels(rows, labels, tmp_path, png):
    text = "image_name,dog,cat,bird\n"
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(png)
        text += f"{i}.png,{row}\n"
    (tmp_path / "t.csv").write_text(text)
    source = opened(tmp_path / "t.csv")
    assert source.labels.tolist() == labels
    names = ["dog", "cat", "bird"][: 3 - ("2" in rows[0])]
    assert source.class_names == names and f"{len(names)} columns of 0 and 1" in source.notes[0]
    if labels[2] in (-1, None):
        with pytest.raises(DataError, match=r"no label of 1 of its 3 images, such as '.*2\.png'"):
            find_parts(source)
    (tmp_path / "t.csv").write_text("path,good\n0.png,1\n1.png,0\n")  # it may be anything
    assert opened(tmp_path / "t.csv").labels is None


@once
def test_what_a_table_says_of_its_rows_is_neither_a_label_nor_a_weight(tmp_path, png):
    (tmp_path / "0.png").write_bytes(png)
    (tmp_path / "1.png").write_bytes(png)
    path = tmp_path / "t.csv"
    path.write_text("path,cat,dog,fold,Is Valid,weight\n0.png,1,0,0,1,12 kg\n1.png,1,1,1,0,3\n")
    source = opened(path)
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [(0,), (0, 1)]
    assert source.weights is None
    assert "0 and 1: 'cat', 'dog'; not used: 'fold', 'weight'." in source.notes[0]
    source = image_source(path, columns={"label": "fold+dog"})
    assert source.class_names == ["fold", "dog"] and source.labels.tolist() == [(), (0, 1)]
    with pytest.raises(DataError, match=r"column 'weight' .* more than 0 and 1"):
        image_source(path, columns={"label": "dog+weight"})
    with pytest.raises(InputError, match=r"no column 'dog\+bird'"):
        image_source(path, columns={"label": "dog+bird"})
    with pytest.raises(DataError, match="a weight that is no number"):
        image_source(path, columns={"weight": "weight"})
    path.write_text(path.read_text().replace("weight", "sample_weight"))
    assert image_source(path, columns={"weight": ""}).weights is None
    with pytest.raises(DataError, match=r"Received: '12 kg'.*--columns weight=\) takes none"):
        opened(path)
    assert len(labelled(path)[0]) == scan(path).pictures == 2  # they need no weights
    assert len(checks.images(str(path), None, "(.)", ["weight"])) == 2
    # And who needs no label either may have rows without one.
    path.write_text("path,label,split,sample_weight\n0.png,,then,x\n1.png,cat,,y\n")
    wanted = [str(tmp_path / name) for name in ("0.png", "1.png")]
    assert list(Images(path)) == list(checks.pictures([str(path)], "path=path")) == wanted


@once
def test_images_without_labels_are_scanned_as_such(tmp_path, png):
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).write_bytes(png)
    (tmp_path / "t.csv").write_text("path\n1.png\n")
    report = str(scan(tmp_path / "t.csv"))
    assert "1 without labels" in report and "classes," not in report
    (tmp_path / "t.csv").write_text(
        "path,label,split\n1.png,cat,train\n2.png,,test\n3.png,cat,test\n"
    )
    report = scan(tmp_path / "t.csv")
    assert report.class_counts == {"train": {"cat": 1}, "test": {"": 1, "cat": 1}}
    assert not report.label_conflicts and "no label  " in str(report)


@once
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.tar", "cifar-10-binary"])
def test_a_pipe_that_is_called_as_a_source_is_an_error(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is a pipe, a socket"):
        opened(tmp_path / name)


@once
def test_a_tables_weights_are_those_of_the_training_loss(folder, history, tmp_path, rng, caplog):
    path, weights = folder.parent / "weighed.csv", []
    for w in ("0", "", "2"):
        lines = [
            f"{name},{label},{w if i % 3 else 1}" for i, (name, label) in enumerate(rows(folder))
        ]
        path.write_text("\n".join(["path,label,Sample_Weight", *lines]))
        source = opened(path)
        assert source.notes == (
            "Columns: path from 'path', label from 'label', weight from 'Sample_Weight'.",
        )
        assert source.weights.tolist() == [float(w or 1) if i % 3 else 1 for i in range(24)]
        weights.append(source.take(np.arange(3)).digest())
    assert len(set(weights)) == 3
    pack(path, tmp_path / "shards")
    assert "Shards hold no weights" in caplog.text
    data = prepare.prepare_data(
        path, dataclasses.replace(get_recipe("cifar"), model="resnet_tiny", image_size=16)
    )
    x, y, w = data.train[0]
    assert w.tolist() == data.train.weights[data.train.batch_indices(0)].tolist()
    assert set(w.tolist()) == {1, 2} and data.val.weights is None and len(data.val[0]) == 2
    source = opened(path)  # and in a loop of one's own
    arguments = {"preprocess": data.preprocess, "batch_size": 5, "shuffle": False}
    own = ImageDataset(source, source.labels, source.class_names, **arguments)
    assert own[1][2].tolist() == source.weights[5:10].tolist()
    alone = ImageDataset(source, source.labels, source.class_names, label_mode=None, **arguments)
    assert alone[1].shape == ImageDataset(source, **arguments)[1].shape == (5, 16, 16, 3)
    # Mixed images keep the loss of each of their two, times its weight.
    mix, hot = Mix(mixup=0.4), np.eye(3, dtype=np.float32)[y]
    images, plain = mix(x, hot * w[:, None], np.random.default_rng(1))
    mixed, labels, both = mix.weighed(x, hot, w, np.random.default_rng(1))
    assert np.array_equal(images, mixed) and both.min() < 2
    np.testing.assert_allclose(labels * both[:, None], plain, atol=1e-6)
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    path.write_text(path.read_text().replace(",1\n", ",0\n").replace(",2", ",0"))
    result = train(path, output=tmp_path, **TINY)
    assert result.history["loss"] == [0] and result.history["val_loss"][0] > 0


@once
def test_columns_and_labels_can_be_said(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "here.png")
    path = tmp_path / "t.csv"
    path.write_text("foto,art\nhere.png,10\nhere.png,9\n")
    source = image_source(path, columns={"path": "foto", "label": "art"})
    assert source.class_names == ["9", "10"] and source.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"no column 'arts'\. Did you mean 'art'"):
        image_source(path, columns={"path": "foto", "label": "arts"})
    tar(tmp_path / "x.tar", [])
    for other in (folder, tmp_path / "x.tar", tmp_path / "cifar-10-python.tar.gz", source, {}):
        with pytest.raises(InputError, match="columns are those of a table"):
            image_source(other, columns={"path": "foto"})
    # The same files with other labels are not what a run goes on with.
    path.write_text("foto,art,kind\nhere.png,10,1\nhere.png,9,1\n")
    again = image_source(path, columns={"path": "foto", "label": "art"})
    other = image_source(path, columns={"path": "foto", "label": "kind"})
    assert source.digest() == again.digest() != other.digest()
    assert source[1:].digest() == again[1:].digest() != other[1:].digest()
    with pytest.raises(InputError, match="for path, label, split or weight"):
        image_source(path, columns={"text": "foto"})
    with pytest.raises(DataError, match="finds no label in 24 of 24"):
        image_source(folder, label_regex=r"(\d+)$")
    relabelled = image_source(folder, label_regex=r"(._\d)")
    left = find_parts(relabelled, exclude=[relabelled[0]])
    assert left.of["train"][1].tolist() == relabelled.labels[1:].tolist() and len(left.names) == 16
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
    for view in (images[:2, ..., ::-1], np.asfortranarray(first[:2])):  # no contiguous pixels
        turned = opened((view, ["ant", "bee"]))
        assert turned[1].stamp() == opened((view.copy("C"), None))[1].stamp()
        assert not scan(turned).unreadable
    assert Arrays(images, labels).place != Arrays(images, labels[::-1]).place
    for wrong, words in (
        ((images / 255, labels), "whole pixel values"),
        ((images, labels[:5]), "one label an image"),
        ((images[0, 0], labels), r"Received: shape \(16, 3\)"),
        ((images, labels, ["ant"]), "labels must lie in 0..0"),
        ((images, [*"abcdefgh"] * 3, ["ant"]), "no class 'a'"),
        ((images[:0], labels[:0]), r"no images. Received: .* \(0, 16, 16, 3\)"),
        ({"train": (images, labels), "vla": 1}, "A dict of images .* Received: 'train', 'vla'"),
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
    assert source.title() == folder.name
    # Of a table or a folder that has parts itself it is the part of that name.
    path = folder.parent / "parts.csv"
    kinds = ["train", "train", "val"] * 8
    lines = [
        f"{name},{label},{kind}" for (name, label), kind in zip(rows(folder), kinds, strict=True)
    ]
    path.write_text("\n".join(["path,label,split", *lines]))
    parts = find_parts(opened({"train": folder, "val": path}))
    assert len(parts.of["val"][0]) == 8
    assert list(parts.of["val"][0]) == list(labelled(path, "val")[0])
    with pytest.raises(NotFoundError, match="has no 'test' part; it has: train, val"):
        opened({"train": folder, "test": path})


@once
def test_whole_numbers_are_the_numbers_of_the_classes(folder, history, tmp_path):
    images, labels, names = arrays(folder)
    expected = evaluate(history.model, folder)
    numbers = folder.parent / "numbers.csv"
    lines = [f"{name},{names.index(label)}" for name, label in rows(folder)]
    numbers.write_text("\n".join(["path,label", *lines]))
    for source in (numbers, (images, labels)):
        found = evaluate(history.model, source)
        assert found.loss == expected.loss and found.class_names == names
        assert (found.confusion == expected.confusion).all()
    ones = evaluate(history.model, (images[labels == 1], labels[labels == 1]))
    assert ones.confusion[1].sum() == ones.count == 8
    joined = opened({"train": folder, "val": (images, labels)})
    assert joined.class_names == names and joined.labels.tolist() == [*labels, *labels]
    with pytest.raises(InputError, match=r"The data has the label 3, but the model has 3 classes"):
        evaluate(history.model, (images, labels + 1))
    # Numbers that folders are called, or that are given as names, are names.
    with pytest.raises(InputError, match="The data has classes that the model does not have: '0'"):
        evaluate(history.model, (images, labels, ["0", "1", "2"]))
    with pytest.raises(InputError, match="'val' has classes that the first does not have: 'dog'"):
        opened({"train": folder, "val": (images[:1], ["dog"])})


@once
def test_the_command_line_takes_tables(folder, history, tmp_path, capsys, monkeypatch):
    path = table(folder)
    model = str(history.folder)
    assert cli.main(["scan", str(path)]) == 0
    assert f"{str(path)!r}: 24 images" in capsys.readouterr().out
    assert cli.main(["evaluate", model, str(folder), "--label-regex", "^([a-z]+)"]) == 0
    assert f"Images: 24 of {folder}" in capsys.readouterr().out
    walks = []
    monkeypatch.setattr(opening, "find_pictures", lambda p: walks.append(p) or find_pictures(p))
    assert cli.main(["evaluate", model, str(folder)]) == 0 and walks == [str(folder)]
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


@once
def test_a_folder_is_listed_in_little_memory_as_it_lies_there(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / "bee" / "below").mkdir()
    odd = tmp_path / "x" / "bee" / "below" / "\udcff \n.PNG"
    shutil.copy(tmp_path / "x" / "bee" / "bee_1.png", odd)
    (tmp_path / "x" / "ant" / "notes.txt").touch()
    paths, labels, names = find_pictures(tmp_path / "x")
    seen = collections.Counter()
    source = listing.Listed(str(tmp_path / "x"), None, seen)
    assert list(source) == paths and source.labels.tolist() == labels.tolist() and odd.is_file()
    assert source.class_names == names and sum(seen.values()) == 1
    assert type(source[3]) is str and list(pickle.loads(pickle.dumps(source))) == paths
    some = source.take(np.array([20, 3, 4, 17]))[1:]
    assert list(some) == [paths[i] for i in (3, 4, 17)] and some.labels.tolist() == [0, 0, 2]
    out = [paths[0], "cat/cat_2.png"]
    left = listing.Listed(str(tmp_path / "x"), out)
    assert list(left) == find_pictures(tmp_path / "x", exclude=out)[0] and len(left) == 23
    # As of 0.1, whose runs go on: one text of all paths, that of each part on lines of its own.
    text = "\n".join(["\0".join(map(os.path.abspath, part)) for part in (source, some)])
    expected = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    assert listing.fingerprint(source, some) == listing.fingerprint(paths, list(some)) == expected
    with pytest.raises(DataError, match="No images found"):
        listing.Listed(str(tmp_path / "x"), paths)


@once
def test_many_images_are_listed_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_RESNET_HOME", str(tmp_path / "home"))
    place = shutil.copytree(folder, tmp_path / "x")
    looks = []
    look = listing.class_pictures
    monkeypatch.setattr(listing, "class_pictures", lambda p, **o: looks.append(p) or look(p, **o))

    def found():
        looks.clear()
        source = listing.Listed(str(place))
        assert list(source) == find_pictures(place)[0]
        return len(looks)

    assert [found(), found()] == [1, 1] and not (tmp_path / "home").exists()  # few
    monkeypatch.setattr(listing, "_MANY", 24)
    assert [found(), found()] == [1, 1]  # a folder that has just changed may change once more
    monkeypatch.setattr(listing, "_SETTLED", -1000.0)
    assert [found(), found()] == [1, 0]
    (kept,) = (tmp_path / "home" / "folders").iterdir()
    good = kept.read_bytes()
    for bad in (b"", b"x", good[:-5], good.replace(b'"form": 1', b'"form": 2'), b"[" * 100_000):
        kept.write_bytes(bad)
        assert [found(), found()] == [1, 0]
    for change in (
        lambda: (place / "bee" / "new.png").touch(),
        lambda: (place / "bee" / "new.png").rename(place / "cat" / "new.png"),
        lambda: (place / "cat" / "new.png").unlink(),
        lambda: (place / "bee").rename(place / "wasp"),
        lambda: (place / "wasp" / "more").mkdir(),
        lambda: (place / "wasp" / "more" / "1.png").touch(),
    ):
        change()
        assert [found(), found()] == [1, 0]
    assert "by the list of 20" in find_parts(str(place)).notes[0]
    device, mounts = os.stat(place).st_dev, tmp_path / "mounts"
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /data rw master:1 - {{}} bucket rw\n"
    monkeypatch.setattr(listing, "_MOUNTS", str(mounts))
    for kind, times in (("fuse.gcsfuse", 1), ("ext4", 0)):  # where they may not move: each time
        mounts.write_text("1 2 0:1 / /proc rw - proc proc rw\n" + line.format(kind))
        assert [found(), found()] == [times, times]
    looks.clear()
    for restart in (False, True):
        train(place, output=tmp_path / "runs", dry_run=True, restart=restart, **TINY)
        assert looks == [str(place)] * restart
    monkeypatch.setattr(listing, "IMG_EXTENSIONS", (".new", *listing.IMG_EXTENSIONS))
    assert [found(), found()] == [1, 0]  # there is a plug-in now
    # A folder that cannot be read for a moment is looked at again.
    (place / "wasp" / "more" / "2.png").touch()
    entries = walk.entries

    def failing(folder):
        if folder.endswith("more"):
            raise PermissionError(13, "Permission denied")
        return entries(folder)

    monkeypatch.setattr(walk, "entries", failing)
    assert "1 folder: it cannot be read" in find_parts(str(place)).notes[-1]
    monkeypatch.setattr(walk, "entries", entries)
    assert [found(), found()] == [1, 0]
    monkeypatch.chdir(tmp_path)
    assert list(listing.Listed("x")) == find_pictures("x")[0]  # from elsewhere by other words
    assert looks == []


@once
def test_a_look_before_training_takes_some_of_many_images(folder, monkeypatch):
    looks = []
    monkeypatch.setattr(looking, "constant_images", lambda paths, _: looks.append(paths) or [])
    recipe = dataclasses.replace(get_recipe("cifar"), model="resnet_tiny", val_split=0.5)
    (folder / "cat" / "cat_3.png").rename(folder / "cat" / "cat_3")
    (folder / "cat" / "cat_3.png").write_bytes(b"")
    try:
        few = prepare.prepare_data(folder, recipe)
        monkeypatch.setattr(prepare, "_LOOK", 5)
        monkeypatch.setattr(looking, "_SAMPLE", 4)
        many = prepare.prepare_data(folder, recipe)
    finally:
        (folder / "cat" / "cat_3").rename(folder / "cat" / "cat_3.png")
    skipped = few.val.num_samples == 11  # or it is one to train on
    assert many.val.num_samples == 12 and many.val.skipped == []
    assert few.val.num_samples == (11 if skipped else 12)
    assert [len(paths) for paths in looks] == [12, 12, 4, 4]


# --- shards --------------------------------------------------------------------------------------


def tar(path, files, **options):
    """A tar archive; a file's contents may be a `TarInfo` that changes the entry."""
    with tarfile.open(path, "w", **options) as out:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            if isinstance(data, dict):
                for key, value in data.items():
                    setattr(entry, key, value)
                data = b""
            else:
                entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def png():
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    return stream.getvalue()


@once
def test_packing_the_same_images_gives_the_same_bytes(folder, tmp_path):
    one, two = pack(folder, tmp_path / "1", shard_mb=0.01), pack(arrays(folder), tmp_path / "2")
    again = pack(folder, tmp_path / "3", shard_mb=0.01)
    assert one.count == two.count == 24 and len(one.shards) > 2 and len(two.shards) == 1
    assert [p.read_bytes() for p in one.shards] == [p.read_bytes() for p in again.shards]
    assert all(path.stat().st_size < 20_480 for path in one.shards)
    with tarfile.open(one.shards[0]) as file:
        assert file.getnames()[:2] == ["ant/ant_0.png", "ant/ant_0.cls"]
        assert file.extractfile("ant/ant_0.cls").read() == b"0"
    source = opened(tmp_path / "1")
    assert source[0].read() == (folder / "ant" / "ant_0.png").read_bytes()
    assert opened(tmp_path / "2").class_names == ["ant", "bee", "cat"]
    # Packed once more from shards, they are the same; and no folder of shards is written over.
    pack(source, tmp_path / "4", shard_mb=0.01)
    assert (tmp_path / "4" / one.shards[1].name).read_bytes() == one.shards[1].read_bytes()
    with pytest.raises(InputError, match="holds shards"):
        pack(folder, tmp_path / "1")


@once
@pytest.mark.parametrize("kind", ["rows", "images in parquet"])
def test_rows_of_a_dataset_are_packed_as_what_they_are(kind, folder, tmp_path):
    source = opened(MAKERS[kind](folder))
    packed = pack(source, tmp_path / "out")
    assert packed.count == 24 and not packed.skipped
    again = opened(tmp_path / "out")
    assert again.labels.tolist() == source.labels.tolist()
    assert again[9].read() == source[9].read() and again[9].endswith("10.png")


@once
def test_files_without_an_ending_are_packed_by_their_content(tmp_path, png):
    rgb = Image.new("RGB", (4, 4))
    rgb.save(tmp_path / "b.0001", "JPEG")
    rgb.save(tmp_path / "b.0002", "WEBP")
    (tmp_path / "a").write_bytes(png)
    (tmp_path / "c").write_bytes(b"no image")
    (tmp_path / "t.csv").write_text("path,label\na,x\nb.0001,x\nb.0002,x\nc,y\n")
    packed = pack(tmp_path / "t.csv", tmp_path / "out")
    found = [name.rpartition("/")[2] for name in opened(tmp_path / "out")]
    assert packed.count == 3 and found == ["a.png", "b_0001.jpg", "b_0002.webp"]
    (path, reason) = packed.skipped[0]
    assert path == str(tmp_path / "c") and "is no image: its first bytes b'no image'" in reason
    (tmp_path / "t.csv").write_text("path,label\nc,x\n")
    with pytest.raises(DataError, match=r"None of the images can be read; .*first bytes"):
        pack(tmp_path / "t.csv", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@once
def test_no_shards_are_written_among_images_and_no_other_files_into_shards(tmp_path, png):
    for name in ("x", "y"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(png)
    (tmp_path / "in" / "x" / "2.jpg").write_text("no image")
    (tmp_path / "in" / "x" / "3.png").write_bytes(b"")
    (tmp_path / "in" / "x" / "4.png").write_bytes(png[:45])
    (tmp_path / "in" / "y" / "5.png").write_bytes(png + b"behind its end")  # is read
    kinds = [kind for kind in walk.FORMATS if kind in ("JPEG", "WEBP", "TIFF", "BMP", "GIF")]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for i, kind in enumerate(kinds):
        Image.fromarray(pixels).save(tmp_path / "whole", kind)
        data, name = (tmp_path / "whole").read_bytes(), f"{6 + i}{walk.FORMATS[kind][0]}"
        (tmp_path / "in" / "x" / name).write_bytes(data[: len(data) * 2 // 3])
        (tmp_path / "in" / "y" / name).write_bytes(data)
    (tmp_path / "t.csv").write_text("path,label\nin/x/1.png,x\nin/y/1.png,y\n")
    for data, target, words in (
        ("in", "in", "lies in the folder that is packed"),
        ("in", "in/x/out", "lies in the folder that is packed"),
        ("t.csv", "in", "holds images: give a new folder"),
    ):
        with pytest.raises(InputError, match=words):
            pack(tmp_path / data, tmp_path / target)
    assert not list(tmp_path.rglob("*.tar")) and not (tmp_path / "in" / "x" / "out").exists()
    packed = pack(tmp_path / "in", tmp_path / "out")
    skipped = {os.path.basename(path) for path, _ in packed.skipped}
    assert {"2.jpg", "3.png", "4.png", "6.jpg"} < skipped and len(kinds) == 5
    for path in sorted((tmp_path / "in").rglob("*.*")):  # as in training
        left_out = path.name in skipped and path.parent.name == "x"
        with pytest.raises(DataError) if left_out else contextlib.nullcontext():
            decode(path)
    assert packed.count + len(skipped) == 6 + 2 * len(kinds)


@once
def test_parts_of_a_dataset_are_shards_by_name(folder, tmp_path, png):
    for part in ("Train", "val"):
        shutil.copytree(folder, tmp_path / "data" / part)
    (tmp_path / "data" / "test").mkdir()
    (tmp_path / "data" / "test" / "x.png").write_bytes(png)
    out = tmp_path / "data" / "Train" / "bee" / "bee_1.png"
    packed = pack(tmp_path / "data", tmp_path / "out", exclude=[out])
    assert [path.name for path in packed.shards] == [
        "train-000000.tar", "val-000000.tar", "test-000000.tar",
    ]  # fmt: skip
    parts = find_parts(opened(tmp_path / "out"))
    assert [len(parts.of[kind][0]) for kind in ("train", "val", "test")] == [23, 24, 1]
    assert parts.of["test"][1] is None and parts.names == ["ant", "bee", "cat"]
    assert "classes from folders" in parts.notes[0]
    paths, labels, _ = labelled(str(tmp_path / "out" / "{train,val}-000000.tar"), "train")
    assert len(paths) == 23 and labels[-1] == 2


@once
def test_webdatasets_shards_are_read_by_any_of_their_layouts(tmp_path, png):
    for number in range(2):
        files = [(f"{i:06}.{kind}", data) for i in range(3)
                 for kind, data in (("jpg", png), ("cls", b"%d" % i), ("seg.png", png),
                                    ("json", b"{}"))]  # fmt: skip
        # As webdataset writes them: a time that is no whole number makes an extended header.
        tar(tmp_path / f"a-{number:03}.tar", files, format=tarfile.PAX_FORMAT,
            pax_headers={"comment": "x"})  # fmt: skip
    source = opened(tmp_path / "a-{000..001}.tar")
    assert source.labels.tolist() == [0, 1, 2] * 2 and source.class_names == ["0", "1", "2"]
    assert source[4] == f"{tmp_path}/a-001.tar/000001.jpg" and source[4].read() == png
    assert "6 .json" in source.notes[1] and "6 a further image" in source.notes[1]
    long = "bee/" + "x" * 150 + "/ö.png"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        name = long.replace("ö", "o") if kind == tarfile.USTAR_FORMAT else long
        path = tar(tmp_path / "b.tar", [("./ant/1.png", png), (name, png)], format=kind)
        source = opened(path)
        assert source.class_names == ["ant", "bee"] and source[1] == f"{path}/{name}"
    source = opened(tar(tmp_path / "c.tar", [("1.png", png), ("1.cls", b"cat"), ("2.png", png)]))
    assert source.labels is None and "for 1 have none" in source.notes[0]
    with pytest.raises(NotFoundError, match=r"no shard '.*a-002\.tar'"):
        opened(tmp_path / "a-{000..002}.tar")
    names = [letter * 30 for letter in "abcdefghijk"]
    source = opened(tar(tmp_path / "f.tar", [("1.png", png), ("1.cls", "|".join(names).encode())]))
    assert source.class_names == names and source.labels.tolist() == [(*range(11),)]
    with pytest.raises(DataError, match=r"'1.cls' has 65,537 bytes, a label 65,536 at most"):
        opened(tar(tmp_path / "g.tar", [("1.png", png), ("1.cls", b"a" * 65_537)]))
    with pytest.raises(DataError, match=r"holds no image\. It holds: 1 \.txt"):
        opened(tar(tmp_path / "d.tar", [("1.txt", b"")]))
    (tmp_path / "e.tar").write_bytes(gzip.compress(png))
    with pytest.raises(DataError, match="is compressed: unpack it"):
        opened(tmp_path / "e.tar")
    (tmp_path / "empty").mkdir()
    tar(tmp_path / "empty" / "a.tar", [])
    with pytest.raises(DataError, match=r"holds no image\. In 'a.tar': nothing"):
        opened(tmp_path / "empty")


@once
def test_what_a_hostile_archive_holds_is_left_out_with_its_reason(tmp_path, png):
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    files = [
        ("ok/1.png", png), ("../../up.png", png), ("/etc/x.png", png), ("a/./b.png", png),
        ("ok/1.png", b"other"), ("link.png", link), ("hard.png", {**link, "type": tarfile.LNKTYPE}),
        ("dev.png", {"type": tarfile.CHRTYPE}), ("pipe.png", {"type": tarfile.FIFOTYPE}),
        ("dir.png", {"type": tarfile.DIRTYPE}), ("ok/._1.png", png), ("ok/2.png", png),
    ]  # fmt: skip
    source = opened(tar(tmp_path / "x.tar", files))
    assert [name.rpartition(".tar/")[2] for name in source] == ["ok/1.png", "ok/2.png"]
    assert source[0].read() == png
    for words in ("3 a name that leads elsewhere", "2 a link", "2 a device or a pipe",
                  "1 a name that is there twice"):  # fmt: skip
        assert words in source.notes[1]
    assert not os.path.lexists(tmp_path.parent.parent / "up.png")


def header(name=b"1.png", size=b"00000000004", kind=b"0", tail=b""):
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32 - sum(block[148:156]))
    return bytes(block) + tail


@once
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no tar at all" * 100, "its entry at byte 0 is damaged"),
        (header(size=b"\xff" * 12) + bytes(1024), "has a size below 0"),
        (header(size=b"\x80" + b"\xff" * 11) + bytes(1024), "it is cut off"),
        (header(size=b"77777777777") + bytes(1024), "it is cut off"),
        (header(size=b"9z") + bytes(1024), "is damaged"),
        (header(kind=b"S") + bytes(1024), "is sparse"),
        (header(kind=b"2") + bytes(1024), "is no plain file, and has a size"),
        (header(kind=b"5") + bytes(1024), "is no plain file, and has a size"),
        (header(kind=b"L", size=b"00001000000") + bytes(2**18), "a name of 262,144 bytes"),
        (header(kind=b"x", size=b"00000000012") + b"10 size=1\n" + bytes(1024), "second size"),
        (header(kind=b"g", size=b"00000000013") + b"11 path=ab\n" + bytes(1024), "second size"),
        (header(kind=b"x", size=b"00000000012") + b"99 size=1\n" + bytes(1024), "is damaged"),
        (header(kind=b"x", size=b"00000000012") + b"-1 size=1\n" + bytes(1024), "is damaged"),
    ],
)
def test_a_damaged_or_ambiguous_archive_is_refused_in_one_line(data, words, tmp_path):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        opened(tmp_path / "x.tar")
    assert "\n" not in str(caught.value)


@once
def test_an_archive_is_looked_through_once(tmp_path, png, monkeypatch):
    monkeypatch.setenv("KERAS_RESNET_HOME", str(tmp_path / "home"))
    path = tar(tmp_path / "x.tar", [("ant/1.png", png), ("bee/2.png", png)])
    first, index = opened(path), tmp_path / "x.tar.index"
    assert index.is_file() and not (tmp_path / "home").exists()
    looks = []
    look = shard_files._looked_through
    monkeypatch.setattr(shard_files, "_looked_through", lambda p: looks.append(p) or look(p))
    again = opened(path)
    assert not looks and list(again) == list(first) and again.notes == first.notes
    assert again.digest() == first.digest() and again[1].read() == png
    good = index.read_bytes()
    line, _, arrays = good.partition(b"\n")
    start = int.from_bytes(arrays[:8], "little")
    for bad in (
        b"", line[:30], good[:-3], good + b"x", line.replace(b'_resnet": 1', b'_resnet": 2'),
        line.replace(b'"count": 2', b'"count": 99999999999') + b"\n" + arrays,
        line.replace(b'"count": 2', b'"count": -2') + b"\n" + arrays,
        line + b"\n" + (2**40).to_bytes(8, "little") + arrays[8:],
        line + b"\n" + (-start).to_bytes(8, "little", signed=True) + arrays[8:],
        line[:20] + b'"x": ' + b"[" * 100_000 + b"\n",
    ):  # fmt: skip
        index.write_bytes(bad)
        looks.clear()
        assert list(opened(path)) == list(first) and looks
    # One that has changed under a run is no other image.
    item = first[1]
    stamp = item.stamp()
    tar(path, [("ant/1.png", png), ("bee/2.png", b"other")])
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match="the archive has changed since"):
        item.read()
    assert opened(path)[1].read() == b"other" and opened(path)[1].stamp() != stamp
    # Where nothing can be written beside it, the user's cache has it; also where the file that is
    # called so is another program's, or never ends.
    index.write_bytes(b"mine")
    opened(path)
    assert index.read_bytes() == b"mine"
    shutil.rmtree(tmp_path / "home")
    index.unlink()
    os.mkfifo(index)
    opened(path)
    assert len(list((tmp_path / "home" / "shards").iterdir())) == 1
    looks.clear()
    assert len(opened(path)) == 2 and not looks


@once
def test_many_shards_are_looked_through_by_processes_beside(tmp_path, png, monkeypatch):
    for number in range(4):
        tar(tmp_path / f"{number}.tar", [(f"ant/{number}.png", png), ("bee/1.png", png)])
    expected = [
        f"{tmp_path}/{i}.tar/{name}" for i in range(4) for name in (f"ant/{i}.png", "bee/1.png")
    ]
    (tmp_path / "4.tar").write_bytes(b"no tar at all" * 100)
    looks = []
    look = shard_files._looked_through
    monkeypatch.setattr(shard_files, "_looked_through", lambda p: looks.append(p) or look(p))
    monkeypatch.setattr(shard_files, "_MANY", 4)
    monkeypatch.setattr(shard_files, "default_threads", lambda: 2)
    with pytest.raises(DataError, match=r"4\.tar' cannot be read: its entry at byte 0"):
        opened(tmp_path)
    (tmp_path / "4.tar").unlink()
    assert list(opened(tmp_path)) == expected and looks == [str(tmp_path / "4.tar")]


@once
@pytest.mark.parametrize("kind", ["arrays", "rows", "images in parquet", "cifar"])
def test_images_that_are_no_files_are_shown(kind, folder, tmp_path):
    """In the report of a run, in one that is written later, in a sheet, under a heat map."""
    source = cifar(folder, tmp_path)[0] if kind == "cifar" else MAKERS[kind](folder)
    result = train(source, output=tmp_path / "runs", **{**TINY, "report": True})
    page = (result.folder / "report.html").read_text()
    assert page.count("data:image/jpeg") > 3 and "32" in page if kind == "cifar" else "16" in page
    assert "a training image of" in page and "Without the nearest" not in page
    (result.folder / "report.html").unlink()
    images = source if kind in ("arrays", "rows") else None
    again = report(result.folder, model=result.model, images=images).read_text()
    assert again.count("data:image/jpeg") == page.count("data:image/jpeg")
    found = opened(source)
    (explained,) = iter_explanations(result.model, [found[3]])
    assert explained.heatmap is not None and explained.prediction.path == str(found[3])
    if kind == "rows":
        looked = scan(opened({"train": source, "val": hub(folder)}))
        assert len(looked.across_splits) >= 24
        assert looked.save_sheet(tmp_path / "sheet.png") > 4
        pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
        assert (pixels[3:19, 3:19] != 255).mean() > 0.9  # the image, at its size


@once
def test_deep_images_that_are_no_files_are_known_as_constant(tmp_path):
    pixels = np.arange(60_000, 60_064, dtype=np.uint16).reshape(8, 8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    path = tar(tmp_path / "x.tar", [("ant/1.png", stream.getvalue())])
    assert [str(name) for name, _ in scan(path).constant] == [f"{path}/ant/1.png"]
    assert "1 images of 16-bit gray" in looking.constant_line(opened(path), 1)


@once
def test_images_in_shards_are_in_results_and_reports(folder, history, tmp_path, capsys):
    place = shards(folder)
    result = train(place, output=tmp_path, **{**TINY, "report": True})
    page = (result.folder / "report.html").read_text()
    assert page.count("data:image/jpeg") > 3
    rows = (result.folder / "predictions.csv").read_text().splitlines()
    name = rows[1].split(",")[0]
    assert ".tar/" in name
    assert predict(history.model, name)[0].path == name
    assert cli.main(["pack", str(folder), str(tmp_path / "new")]) == 0
    assert "24 images in 1 shard of" in capsys.readouterr().out
    assert cli.main(["scan", str(tmp_path / "new" / "*.tar")]) == 0
    assert "24 images" in capsys.readouterr().out
    with pytest.raises(NotFoundError, match="No file or folder"):
        predict(history.model, f"{name}x")


# --- CIFAR, and rows of datasets -----------------------------------------------------------------


def cifar(folder, place, form="python", names=("ant", "bee", "cat")):
    """CIFAR-10's archive of other images: five batches to train on, one to test on."""
    pixels, labels, _ = arrays(folder)
    pixels = np.pad(pixels, ((0, 0), (8, 8), (8, 8), (0, 0)))
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)
    files, batches = {}, [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(batches):
        part = slice(4 * i, 4 * i + 4)
        if form == "python":
            batch = {"data": rows[part], "labels": labels[part].tolist()}
            files[name] = pickle.dumps(batch, protocol=2)
        else:
            both = np.concatenate([labels[part, None].astype(np.uint8), rows[part]], axis=1)
            files[f"{name}.bin"] = both.tobytes()
    if form == "python":
        files["batches.meta"] = pickle.dumps({"label_names": list(names)}, protocol=2)
    else:
        files["batches.meta.txt"] = "\n".join(names).encode()
    path = place / f"cifar-10-{form}.tar.gz"
    kind = {"python": "py", "binary": "bin"}[form]
    tar(place / "plain.tar", [(f"cifar-10-batches-{kind}/{n}", d) for n, d in files.items()])
    path.write_bytes(gzip.compress((place / "plain.tar").read_bytes()))
    (place / "plain.tar").unlink()
    return path, pixels, labels, files


@once
@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifars_own_archive_is_read(form, folder, tmp_path):
    path, pixels, labels, files = cifar(folder, tmp_path, form)
    parts = find_parts(opened(path))
    assert parts.notes == ["CIFAR-10: 20 images for train, 4 images for test."]
    assert parts.names == ["ant", "bee", "cat"]
    paths, found = parts.of["train"]
    assert np.array_equal(np.stack([item.read() for item in paths]), pixels[:20])
    assert found.tolist() == labels[:20].tolist() and paths[0].endswith(".tar.gz/train/1")
    assert parts.of["test"][1].tolist() == labels[20:].tolist()
    unpacked = tmp_path / ("cifar-10-batches-" + {"python": "py", "binary": "bin"}[form])
    unpacked.mkdir()
    assert opened(unpacked) == str(unpacked)  # a folder like any other
    for name, data in files.items():
        (unpacked / name).write_bytes(data)
    again = find_parts(opened(unpacked)).of["train"][0]
    assert np.array_equal(again[7].read(), pixels[7])
    (unpacked / next(iter(files))).unlink()
    with pytest.raises(DataError, match="lacks 'data_batch_1"):
        opened(unpacked)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be read"):
        opened(path)


@once
def test_cifar_is_downloaded_by_its_name(folder, server, tmp_path, monkeypatch, capsys):
    data = cifar(folder, tmp_path)[0].read_bytes()
    monkeypatch.setenv("KERAS_RESNET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KERAS_RESNET_DATA_URL", f"http://127.0.0.1:{server.server_port}/mirror/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    archive, right = archives.PUBLISHED["cifar10"]
    assert (archive, len(right)) == ("cifar-10-python.tar.gz", 64)
    server.data, target = data, tmp_path / "home" / "data" / archive
    words = ["train", "cifar10", "--model", "resnet_tiny", "--dry-run", "--weights", "none"]
    for more in ([], ["--folds", "2"]):
        assert cli.main([*words, *more, "--output", str(tmp_path / "runs")]) == 0
        assert f"first: http://127.0.0.1:{server.server_port}/mirror/" in capsys.readouterr().out
    assert not server.requests and os.listdir(tmp_path) == [archive]
    with pytest.raises(DataError, match=r"sha256 begins with \w{8}, not with 6d958be0"):
        opened("cifar10")
    assert not target.exists()
    known = {"cifar10": (archive, hashlib.sha256(data).hexdigest())}
    monkeypatch.setattr(archives, "PUBLISHED", known)
    target.with_name(f"{archive}.part").write_bytes(data[:1000])
    source = opened("cifar10")
    assert server.requests[-1] == "bytes=1000-" and target.read_bytes() == data
    assert len(source.parts()["train"]) == 20 and source.place == str(target)
    asked = len(server.requests)
    assert cli.main([*words, "--output", str(tmp_path / "runs")]) == 0
    assert cli.main(["scan", "cifar10"]) == 0 and len(server.requests) == asked
    target.unlink()
    server.status = 404
    with pytest.raises(DataError, match=r"HTTP 404 .* by hand and put it at .*cifar-10-python"):
        opened("cifar10")
    (tmp_path / "cifar10").mkdir()
    assert opened("cifar10") == "cifar10"  # a folder of that name is meant


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@once
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_in_cifars_archive_runs_nothing(protocol, folder, tmp_path):
    _, _, _, files = cifar(folder, tmp_path)
    unpacked = tmp_path / "cifar-10-batches-py"
    unpacked.mkdir()
    for name, data in files.items():
        (unpacked / name).write_bytes(data)
    mark = tmp_path / "mark"
    for bad in (pickle.dumps(Attack(mark), protocol), pickle.dumps([1], 2), b"\x80\x02}", b"",
                b"\x80\x02}r\xff\xff\xff\x7f.",
                pickle.dumps({"data": 1, "labels": [0]}, 2)):  # fmt: skip
        (unpacked / "data_batch_2").write_bytes(bad)
        with pytest.raises(DataError, match="cannot be read"):
            opened(unpacked)
        assert not mark.exists()


class ClassLabel:
    def __init__(self, names):
        self.names = names


def hub(folder):
    """A stand-in for a `datasets.Dataset`, with its names and answers."""

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    class Dataset:
        def __init__(self, features):
            self.features, self.column_names = features, list(features)
            self._fingerprint = "f1"

        def cast_column(self, column, feature):
            return Dataset({**self.features, column: feature})

        def __len__(self):
            return len(paths)

        def __getitem__(self, key):
            if isinstance(key, str):
                return labels.tolist()
            data = {"bytes": pathlib.Path(paths[key]).read_bytes(), "path": None}
            if self.features["img"].decode:
                raise AssertionError("decoded elsewhere")
            return {"img": data, "kind": int(labels[key])}

    paths, labels, names = find_pictures(folder)
    return Dataset({"img": Image(), "kind": ClassLabel(names)})


def parquet_images(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    paths, labels, names = find_pictures(folder)
    data = [{"bytes": pathlib.Path(path).read_bytes(), "path": "away"} for path in paths]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    said = json.dumps({"info": {"features": features}})
    table = pyarrow.table({"image": data, "label": labels.tolist()})
    path = folder.parent / "hub.parquet"
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": said}), path, row_group_size=7
    )
    return path


@once
def test_a_dataset_gives_its_files_whatever_form_is_set_for_others(folder, tmp_path):
    made = hub(folder)
    plain = {"column_names": ["img"], "features": made.features}

    class Tensors:  # as `datasets` has them: with_format("torch"), or streaming=True
        column_names, features = made.column_names, made.features
        __len__, __getitem__ = lambda _: 24, None
        with_format = lambda self, kind: made  # noqa: E731

    assert opened(Tensors()).labels.tolist() == opened(made).labels.tolist()
    with pytest.raises(InputError, match=r"streamed .* streaming=True\. Received: Stream"):
        opened(type("Stream", (), plain)())
    pyarrow = pytest.importorskip("pyarrow")
    (row := [{"bytes": pathlib.Path(folder / "ant" / "ant_0.png").read_bytes()}])
    said = {"_type": "List", "feature": {"names": ["x", "y"], "_type": "ClassLabel"}}
    table = pyarrow.table({"image": row * 2, "label": [[1, 0], [1]]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": {"label": said}}})}
    )
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    source = opened(tmp_path / "t.parquet")
    assert source.class_names == ["x", "y"] and source.labels.tolist() == [(0, 1), (1,)]


@once
@pytest.mark.parametrize("make", [hub, parquet_images])
def test_rows_of_a_dataset_are_images(make, folder):
    source = opened(make(folder))
    paths, labels, names = find_pictures(folder)
    assert source.class_names == names and source.labels.tolist() == labels.tolist()
    for i in (23, 0, 7):
        assert source[i].read() == pathlib.Path(paths[i]).read_bytes()
    assert scan(source).mean == scan(folder).mean
    parts = opened({"train": make(folder), "validation": make(folder)}).parts()
    assert len(parts["train"]) == len(parts["val"]) == 24
