"""scan: each kind of trouble put into a folder is found, and nothing else."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from keras_resnet.data.directory import image_dataset_from_directory
from keras_resnet.data.scan import ScanReport, near_pairs, scan
from keras_resnet.system.errors import DataError, InputError, NotFoundError
from keras_resnet.system.files import text_width

pytestmark = pytest.mark.once


def smooth(seed, size=(90, 70)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two classes of different images each."""
    seed = 0
    for split, count in (("train", 8), ("val", 3)):
        for name in ("ants", "bees"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(count):
                smooth(seed).save(tmp_path / "d" / split / name / f"{i}.png")
                seed += 1
    return tmp_path / "d"


def short(report, items):
    return [tuple(os.path.relpath(p, report.directory) for p in item[:2]) for item in items]


def test_a_clean_folder_has_no_trouble(folder):
    report = scan(folder)
    assert report.class_counts == {"train": {"ants": 8, "bees": 8}, "val": {"ants": 3, "bees": 3}}
    assert report.pictures == 22 and report.imbalance == {"train": 1, "val": 1}
    assert not any(items for _, items in report._troubles())
    assert report.exclude_list() == []
    assert report.formats == {"PNG": 22} and report.modes == {"RGB": 22}
    assert report.sizes["width"] == [90, 90, 90] and report.sizes["height"] == [70, 70, 70]


def test_mean_and_std_are_those_of_all_pixels(folder):
    report = scan(folder)
    pixels = [np.asarray(Image.open(p)).reshape(-1, 3) for p in sorted(folder.glob("*/*/*.png"))]
    pixels = np.concatenate(pixels) / 255.0
    np.testing.assert_allclose(report.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(report.std, pixels.std(0), rtol=1e-10)


def test_unreadable_misnamed_turned_and_other_files_are_told_apart(folder):
    (folder / "train" / "ants" / "empty.jpg").write_bytes(b"")
    (folder / "train" / "ants" / "text.png").write_text("hello")
    smooth(100).save(folder / "train" / "bees" / "really a gif.jpg", "GIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(101).save(folder / "train" / "bees" / "turned.jpg", exif=exif)
    (folder / "train" / "bees" / "notes.txt").write_text("x")
    report = scan(folder)
    assert [os.path.basename(p) for p, _ in report.unreadable] == ["empty.jpg", "text.png"]
    assert "empty" in report.unreadable[0][1]
    assert [(os.path.basename(p), kind) for p, kind in report.wrong_extensions] == [
        ("really a gif.jpg", "GIF")
    ]
    assert report.rotated == 1 and report.other_files == {".txt": 1}
    assert report.class_counts["train"] == {"ants": 8, "bees": 10}


def test_duplicates_near_duplicates_splits_and_conflicts(folder):
    train, val = folder / "train", folder / "val"
    original = (train / "ants" / "0.png").read_bytes()
    (train / "ants" / "copy.png").write_bytes(original)
    (val / "ants" / "leak.png").write_bytes(original)
    (train / "bees" / "mislabelled.png").write_bytes((train / "ants" / "1.png").read_bytes())
    with Image.open(val / "bees" / "0.png") as picture:  # scaled and compressed
        picture.resize((200, 150)).save(train / "bees" / "alike.jpg", quality=70)
    report = scan(folder)
    assert sorted(map(len, report.exact_duplicates)) == [2, 3]
    assert short(report, report.near_duplicates) == [("train/bees/alike.jpg", "val/bees/0.png")]
    across = short(report, report.across_splits)
    assert ("train/bees/alike.jpg", "val/bees/0.png") in across
    assert ("train/ants/0.png", "val/ants/leak.png") in across and len(across) == 3
    assert short(report, report.label_conflicts) == [
        ("train/ants/1.png", "train/bees/mislabelled.png")
    ]
    excluded = [os.path.relpath(p, folder) for p in report.exclude_list()]
    assert excluded == [
        "train/ants/0.png",  # kept in val
        "train/ants/1.png",  # ant or bee?
        "train/ants/copy.png",
        "train/bees/mislabelled.png",
    ]


def test_a_thousand_equal_files_are_not_half_a_million_pairs(tmp_path):
    image = Image.new("RGB", (8, 8))
    for split, count in (("train", 300), ("val", 200)):
        for name in ("ants", "bees"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image.save(tmp_path / split / name / f"{i}.png")
    report = scan(tmp_path)
    assert [len(group) for group in report.exact_duplicates] == [1000]
    for pairs, of in (
        (report.across_splits, report.split_of),
        (report.label_conflicts, report.class_of),
    ):
        assert len({path for pair in pairs for path in pair[:2]}) == 1000 and len(pairs) == 999
        assert all(of(one) != of(other) for one, other, _ in pairs)


def test_the_exclude_list_is_taken_by_the_dataset(folder, tmp_path):
    odd = folder / "train" / "ants" / "two\nlines.png"
    odd.write_bytes(b"")
    (folder / "train" / "bees" / "copy.png").write_bytes(
        (folder / "train" / "bees" / "0.png").read_bytes()
    )
    before = sorted(folder.rglob("*"))
    report = scan(folder)
    assert report.write_exclude_list(tmp_path / "exclude.txt") == 2
    dataset = image_dataset_from_directory(folder / "train", exclude=tmp_path / "exclude.txt")
    assert dataset.class_counts == {"ants": 8, "bees": 8}
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "exclude.txt").write_text('"0.png\n')
    with pytest.raises(InputError, match="begins with a quotation mark and is no JSON string"):
        image_dataset_from_directory(folder / "train", exclude=tmp_path / "exclude.txt")


def test_imbalance_and_folders_without_splits(folder):
    for i in range(6):
        os.remove(folder / "train" / "bees" / f"{i}.png")
    report = scan(folder / "train")
    assert report.class_counts == {"": {"ants": 8, "bees": 2}} and report.imbalance == {"": 4}
    assert "largest / smallest 4: train with --class-weights balanced" in str(report)
    assert scan(folder / "train" / "ants").class_counts == {"": {"": 8}}


def test_report_prints_and_writes_json_and_a_sheet(folder, tmp_path):
    (folder / "train" / "ants" / "größe\n.png").write_bytes(b"")
    (folder / "train" / "ants" / "copy.png").write_bytes(
        (folder / "train" / "ants" / "0.png").read_bytes()
    )
    report = scan(folder)
    text = str(report)
    assert "cannot be read" in text and "ants" in text and "größe\\n.png" in text
    assert json.loads(report.to_json())["exact_duplicates"] == report.exact_duplicates
    assert report.save_sheet(tmp_path / "sheet.png") == 1 + 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert sheet.size == (960, 190)
    # Marked in red: the unreadable one and the copy, not what it is a copy of.
    marks = (pixels[160:174].astype(int) @ (1, -1, 0) > 100).any(0)
    assert [marks[i : i + 160].any() for i in (0, 160, 320)] == [True, False, True]
    assert (pixels[20:150, 20:140] == 221).all()  # the unreadable one, a gray box
    assert len(np.unique(pixels[20:60, 180:280].reshape(-1, 3), axis=0)) > 100  # a photograph
    with pytest.raises(DataError, match="sheet"):
        report.save_sheet(tmp_path / "missing" / "sheet.png")


def test_a_table_of_odd_names_of_which_none_can_be_read_is_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "t.csv").write_text("path,label\na.png,a\nb\x1b[31m.png,b\n")
    report = scan(tmp_path / "t.csv")
    assert len(report.unreadable) == 2 and r"b\x1b[31m.png" in str(report)
    assert str(report).replace("\n", "").isprintable()


def test_the_sheet_of_a_clean_folder_marks_nothing(folder, tmp_path):
    assert scan(folder).save_sheet(tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.min() < 50 and (pixels[..., 0] == pixels[..., 1]).all()  # a few words in black


def test_splits_are_found_by_any_usual_name(folder):
    folder.joinpath("train").rename(folder / "Training Set")
    folder.joinpath("val").rename(folder / "Testing")
    (folder / "Testing" / "bees" / "copy.png").write_bytes(
        (folder / "Training Set" / "bees" / "0.png").read_bytes()
    )
    report = scan(folder)
    assert report.splits == {"train": "Training Set", "test": "Testing"}
    assert report.class_counts == {"train": {"ants": 8, "bees": 8}, "test": {"ants": 3, "bees": 4}}
    assert "Folders: train from 'Training Set', test from 'Testing'." in str(report)
    excluded = [os.path.relpath(p, folder) for p in report.exclude_list()]
    assert excluded == ["Training Set/bees/0.png"] and not report.label_conflicts


def test_a_class_called_train_is_one_of_the_classes(folder):
    folder.joinpath("val").rename(folder / "bus")
    report = scan(folder)
    assert report.class_counts == {"": {"bus": 6, "train": 16}}
    assert "'train' is a class here" in str(report)


def test_what_is_not_read_is_counted_with_the_reason_and_litter_is_not(folder):
    for name in ("a.heic", "b.HEIC", "c.mov", "d.txt", "e"):
        (folder / "train" / "ants" / name).write_bytes(b"x")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "0.png:Zone.Identifier"):
        (folder / "val" / "ants" / name).write_bytes(b"x")
    for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN"):
        (folder / name / "train" / "ants").mkdir(parents=True)
        smooth(0).save(folder / name / "train" / "ants" / "0.png")
    report = scan(folder)
    assert report.pictures == 22
    assert report.other_files == {".heic": 2, ".mov": 1, ".txt": 1, "no extension": 1}
    assert report.not_read == (
        "Not read: 5 files (2 .heic: HEIC needs a plug-in: pip install pillow-heif; 1 .mov: a "
        "video; 1 .txt: no kind of image that is read; 1 no extension: no kind of image that is "
        "read)."
    )
    assert report.not_read in str(report)


def test_deep_images_that_become_one_constant_are_said(folder, rng):
    ants = folder / "train" / "ants"
    deep = rng.integers(1000, 60_000, (9, 9)).astype("uint16")
    Image.fromarray(deep).save(ants / "white.tif")
    Image.fromarray(deep).save(ants / "white.png")
    Image.fromarray(rng.random((9, 9)).astype("float32")).save(ants / "black.tif")
    Image.fromarray(deep // 500).save(ants / "good.tif")  # values up to 119
    Image.fromarray(np.full((9, 9), 7, "uint16")).save(ants / "plain.tif")  # nothing is lost
    report = scan(folder)
    assert [(os.path.basename(p), mode) for p, mode in report.constant] == [
        ("black.tif", "F"), ("white.png", "I;16"), ("white.tif", "I;16"),
    ]  # fmt: skip
    assert "one constant in 8 bits" in str(report) and not report.unreadable


def test_no_file_starts_ghostscript(folder, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    Image.new("RGB", (9, 9)).save(folder / "page.eps")
    (folder / "page.eps").rename(folder / "train" / "ants" / "page.jpg")
    report = scan(folder)
    assert [os.path.basename(path) for path, _ in report.unreadable] == ["page.jpg"]
    assert "%!PS" in report.unreadable[0][1]


def test_near_pairs_are_those_of_the_full_comparison(rng):
    for threshold in (0, 3, 6):
        bits = rng.integers(0, 2, (60, 128)).astype(bool)
        for row in range(30, 60):  # near and not so near copies
            bits[row] = bits[row - 30] ^ (rng.random(128) < 0.04)
        distance = (bits[:, None] != bits[None]).sum(2)
        expected = [
            (a, b, int(distance[a, b]))
            for a in range(60)
            for b in range(a + 1, 60)
            if distance[a, b] <= threshold
        ]
        assert near_pairs(bits, threshold) == expected
    assert expected


@pytest.mark.slow
def test_photographs_have_few_look_alikes(shared):
    report = scan(shared / "data" / "hymenoptera" / "val")
    assert report.pictures == 153 and not report.unreadable and not report.exact_duplicates
    assert len(report.near_duplicates) <= 3


def test_folders_that_cannot_be_scanned(tmp_path):
    with pytest.raises(NotFoundError):
        scan(tmp_path / "gone")
    with pytest.raises(DataError, match="no image"):
        scan(tmp_path)


def test_of_many_classes_the_largest_and_the_smallest_are_printed():
    counts = {f"class {i} " + "\u732b" * 20: 1000 - i for i in range(200)}
    report = ScanReport("d", 1, class_counts={"": counts}, imbalance={"": 1.2})
    lines = [line for line in str(report).split("\n") if line.startswith("    ")]
    assert len(lines) == 21 and lines[10] == "    ... and 180 between"
    assert lines[0].startswith("    class 0 \u732b") and lines[-1].startswith("    class 199 ")
    assert {text_width(line.split("#")[0]) for line in lines if "#" in line} == {4 + 24 + 8 + 2}
