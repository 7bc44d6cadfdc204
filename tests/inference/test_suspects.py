"""Planted label errors and changed copies are found; what is chance is not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli.main import main
from keras_resnet.inference.suspects import alike_across, label_errors, out_of_fold

pytestmark = pytest.mark.once


def test_label_errors_are_those_off_the_confident_joint():
    # Northcutt et al. 2021, equation 1: of the first labels the thresholds are 0.6 and 0.8; the
    # second image alone reaches that of the other class.
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9], [0.1, 0.9], [0.4, 0.6]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert label_errors(labels, chances) == [(1, 1)]
    assert label_errors(np.array([0, 0, 0, 1, 1, 0]), chances) == []  # 0.55 and 0.9 then
    assert label_errors(np.array([0, 1, 0, 1, 0, 1]), chances) == [(4, 1)]


def test_planted_labels_and_copies_are_found_among_clusters(rng):
    labels = np.repeat([0, 1, 2], 60)
    vectors = rng.normal(size=(3, 16))[labels] * 3 + rng.normal(size=(180, 16))
    planted, given = rng.choice(180, 9, replace=False), labels.copy()
    given[planted] = (given[planted] + 1) % 3
    found = label_errors(given, out_of_fold(vectors, given))
    assert len({i for i, _ in found} & set(planted.tolist())) >= 7 and len(found) <= 11
    assert all(j == labels[i] for i, j in found if i in planted)
    assert out_of_fold(vectors[:3], np.array([0, 0, 1])) is None
    splits = np.where(np.arange(180) % 3, "train", "val")
    assert alike_across(vectors, splits) == []
    vectors[[1, 4]] = vectors[[0, 30]] + rng.normal(size=(2, 16)) / 20
    assert sorted(pair[:2] for pair in alike_across(vectors, splits)) == [(1, 0), (4, 30)]


def test_scan_with_a_model_lists_what_train_leaves_out(tmp_path, rng, capsys):
    folder, wrong = tmp_path / "photos", []
    for split in ("train", "val"):
        for k, name in enumerate(("ant", "bee")):
            (folder / split / name).mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 120, (4, 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
                bad = split == "train" and i == 7
                pixels[..., 1 - k if bad else k] += 135 if bad else 120
                path = folder / split / name / f"{i}.png"
                Image.fromarray(pixels).save(path)
                wrong += [str(path)] * bad
    copy = str(folder / "train" / "ant" / "copy.png")
    pixels = np.asarray(Image.open(folder / "val" / "ant" / "3.png")).astype(int)
    noisy = np.clip(pixels + rng.integers(-2, 3, pixels.shape), 0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(copy)  # whose hash is another one
    model = kr.create_model("resnet_tiny", num_classes=2, input_shape=(16, 16, 3))
    model.info["preprocess"] = kr.Preprocess(16, 16).get_config()
    model.save(tmp_path / "m.keras")
    listed = str(tmp_path / "out.txt")
    words = ["scan", str(folder), "--model", str(tmp_path / "m.keras"), "--exclude-list", listed]
    assert main([*words, "--sheet", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    assert "suspected labels (others right: 9" in said and "alike to the model in two" in said
    lines = (tmp_path / "out.txt").read_text().splitlines()
    paths = [line for line in lines if line[0] != "#"]
    assert sorted(paths) == sorted([*wrong, copy])
    kr.train(folder, exclude=listed, model="resnet_tiny", dry_run=True, output=tmp_path / "runs")
    assert "Images: 38 for training" in capsys.readouterr().out
    report = kr.scan(folder, model=tmp_path / "m.keras")
    report.out_of_fold = 0.7  # of a model that is no judge
    assert report.exclude_list() == [copy]
