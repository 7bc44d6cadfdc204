"""Folders to batches: torchvision's files, labels and pixels; equal batches; bad folders."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import shutil
import socket
import threading
import time

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet.data import dataset as data
from keras_resnet.data.augment import Augment, TrivialAugmentWide
from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.directory import image_dataset_from_directory as from_directory
from keras_resnet.data.folders import find_pictures, labels_by_name
from keras_resnet.data.labels import check_classes
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.statistics import dataset_statistics
from keras_resnet.data.transforms import (
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from keras_resnet.system.errors import DataError, InputError, MissingDependencyError, NotFoundError

once = pytest.mark.once


def training_augment(size, *more):
    return Augment([RandomResizedCrop(size), RandomHorizontalFlip(), *more])


def picture(seed, size=(24, 32), kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 6 and 7 images, one of them in a nested folder."""
    seed = 0
    for name, count in (("ants", 5), ("bees", 6), ("cats", 7)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "data" / name / f"{i}.png").write_bytes(picture(seed, (24 + seed, 32)))
            seed += 1
    nested = tmp_path / "data" / "cats" / "more"
    nested.mkdir()
    (nested / "deep.JPG").write_bytes(picture(99, kind="JPEG"))
    return tmp_path / "data"


def epoch(dataset):
    return [(x.copy(), y.copy()) for x, y in dataset]


def equal(one, other):
    assert len(one) == len(other)
    for (x, y), (u, v) in zip(one, other, strict=True):
        assert x.dtype == u.dtype and y.dtype == v.dtype
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(y, v)


def everything(folder, **more):
    arguments = {"batch_size": 4, "seed": 5, "augment": training_augment(16, TrivialAugmentWide())}
    return from_directory(folder, **{**arguments, **more})


# --- which files, which labels --------------------------------------------------------------------


@once
def test_files_and_labels_are_those_of_torchvisions_image_folder(torchvision, folder, shared):
    from torchvision.datasets import ImageFolder

    for root in (folder, shared / "data" / "hymenoptera" / "train"):
        oracle = ImageFolder(root)
        dataset = from_directory(root, shuffle=False)
        expected = [path for path, _ in oracle.samples]
        got = [p for p in dataset.file_paths if not p.endswith(".gif")]  # we read GIF as well
        assert got == expected
        assert dataset.class_names == oracle.classes
        by_path = dict(oracle.samples)
        for path, label in zip(dataset.file_paths, dataset.labels, strict=True):
            assert by_path.get(path, label) == label


@once
@pytest.mark.slow
def test_unshuffled_batches_hold_torchvisions_pixels_in_file_order(torchvision, shared):
    from torchvision import transforms

    root = shared / "data" / "hymenoptera" / "val"
    steps = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])
    dataset = from_directory(root, shuffle=False, preprocess=Preprocess(64, 56), batch_size=50)
    images = np.concatenate([x for x, _ in dataset])
    assert len(images) == dataset.num_samples == 153
    for pixels, path in zip(images, dataset.file_paths, strict=True):
        with Image.open(path) as opened:
            np.testing.assert_array_equal(pixels, np.asarray(steps(opened.convert("RGB"))))
    np.testing.assert_array_equal(np.concatenate([y for _, y in dataset]), dataset.labels)


@once
def test_classes_are_sorted_as_text_and_hidden_things_are_no_classes(tmp_path):
    for name in ("1", "10", "2", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(picture(0))
    (tmp_path / "1" / "._x.png").write_bytes(b"resource fork")
    (tmp_path / "1" / ".cache").mkdir()
    (tmp_path / "1" / ".cache" / "y.png").write_bytes(picture(0))
    dataset = from_directory(tmp_path, image_size=8)
    assert dataset.class_names == ["1", "10", "2"]
    assert dataset.class_counts == {"1": 1, "10": 1, "2": 1}


@once
def test_class_names_choose_and_order(folder):
    dataset = from_directory(folder, class_names=["cats", "ants"], shuffle=False)
    assert dataset.class_counts == {"cats": 8, "ants": 5}
    assert dataset.labels.tolist() == [0] * 8 + [1] * 5
    with pytest.raises(
        InputError, match=r"Not there: \['dogs'\].*Found: \['ants', 'bees', 'cats'\]"
    ):
        from_directory(folder, class_names=["ants", "dogs"])


@once
@pytest.mark.parametrize("name", ["a b.png", 'it\'s "x".png', "two\nlines.png", "größe 图.png"])
def test_unusual_file_names_are_read(folder, name):
    (folder / "ants" / name).write_bytes(picture(7))
    dataset = from_directory(folder, image_size=8)
    assert dataset.class_counts["ants"] == 6
    assert sum(len(x) for x, _ in dataset) == 20 and not dataset.skipped


@once
def test_links_are_followed_and_may_lead_in_circles(torchvision, folder, tmp_path):
    from torchvision.datasets import ImageFolder

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "z.png").write_bytes(picture(3))
    os.symlink(elsewhere, folder / "ants" / "link")
    os.symlink(elsewhere / "z.png", folder / "ants" / "file.png")
    os.symlink(elsewhere, folder / "dogs")  # a whole class
    assert from_directory(folder, follow_links=False).class_counts["ants"] == 6
    dataset = from_directory(folder, shuffle=False)
    assert dataset.file_paths == [path for path, _ in ImageFolder(folder).samples]
    # Circles: to itself, to each other, all to all (10! paths), to above everything.
    many = [folder / "bees" / f"deep{i}" for i in range(10)]
    for one in many:
        one.mkdir()
    for one in many:
        for other in many:
            os.symlink(other, one / other.name)
    os.symlink(".", folder / "ants" / "self")
    os.symlink(folder / "ants", folder / "cats" / "x")
    os.symlink(folder / "cats", folder / "ants" / "x")
    os.symlink("loop.png", folder / "ants" / "loop.png")
    counts = from_directory(folder).class_counts
    # ants: its own 6, z.png and loop.png, and by its link all of cats; and the other way round.
    assert counts == {"ants": 16, "bees": 6, "cats": 16, "dogs": 1}


@once
def test_what_is_no_regular_file_is_an_error_of_its_own(folder, monkeypatch):
    ants = folder / "ants"
    os.mkfifo(ants / "fifo.png")
    os.symlink("fifo.png", ants / "to fifo.png")
    os.symlink("/dev/zero", ants / "zero.jpg")
    os.symlink("gone.png", ants / "gone.jpg")
    os.symlink("loop.jpg", ants / "loop.jpg")
    (ants / "folder.jpg").mkdir()
    with open(ants / "huge.jpg", "wb") as file:
        file.truncate(3 * 2**30)  # takes no room
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(ants)
        server.bind("socket.jpg")
        dataset = from_directory(folder, image_size=8, verify=True)
    assert dataset.class_counts == {"ants": 5, "bees": 6, "cats": 8}
    special = "is a pipe, a socket or a device, not an image."
    expected = {
        "fifo.png": special,
        "to fifo.png": special,
        "zero.jpg": special,
        "socket.jpg": special,
        "gone.jpg": "does not exist.",
        "loop.jpg": "cannot be opened: ",
        "folder.jpg": "is a folder, not an image.",
        "huge.jpg": "has 3.2 GB, more than any image has.",
    }
    found = {os.path.basename(path): reason for path, reason in dataset.skipped}
    assert sorted(found) == sorted(expected)
    assert all(text in found[name] for name, text in expected.items()), found


@once
def test_labels_given_or_none(folder):
    given = from_directory(folder, labels=[i % 2 for i in range(19)], image_size=8, batch_size=19)
    assert given.class_names == ["0", "1"] and given.class_counts == {"0": 10, "1": 9}
    bare = from_directory(folder, labels=None, image_size=8, batch_size=19)
    assert isinstance(bare[0], np.ndarray) and bare.labels is bare.class_names is None
    with pytest.raises(InputError, match="one int an image"):
        from_directory(folder, labels=[0, 1])


@once
def test_label_modes(folder):
    arguments = {"image_size": 8, "shuffle": False, "batch_size": 19}
    integers = from_directory(folder, **arguments)[0][1]
    assert integers.dtype == np.int32
    one_hot = from_directory(folder, label_mode="categorical", **arguments)[0][1]
    np.testing.assert_array_equal(one_hot, np.eye(3, dtype=np.float32)[integers])
    two = {"class_names": ["ants", "bees"], **arguments}
    binary = from_directory(folder, label_mode="binary", **two)[0][1]
    assert binary.shape == (11, 1) and binary.dtype == np.float32
    assert isinstance(from_directory(folder, label_mode=None, **arguments)[0], np.ndarray)
    with pytest.raises(InputError, match="2 classes"):
        from_directory(folder, label_mode="binary", **arguments)


@once
@pytest.mark.parametrize("mode, channels", [("grayscale", 1), ("rgb", 3), ("rgba", 4)])
@pytest.mark.parametrize("augment", [None, Augment([RandomResizedCrop(8)])])
@pytest.mark.parametrize("cache", [None, "ram"])
def test_color_modes(folder, mode, channels, augment, cache):
    arguments = {"image_size": 8, "color_mode": mode, "augment": augment, "cache": cache}
    x, _ = from_directory(folder, batch_size=19, **arguments)[0]
    assert x.shape == (19, 8, 8, channels)


# --- split ----------------------------------------------------------------------------------------


@once
def test_channels_first_holds_the_same_pixels(folder):
    last = from_directory(folder, image_size=8, shuffle=False)
    first = from_directory(folder, image_size=8, shuffle=False, data_format="channels_first")
    (x, y), (u, v) = last[0], first[0]
    assert u.shape == (19, 3, 8, 8) and u.flags.c_contiguous
    np.testing.assert_array_equal(u.transpose(0, 2, 3, 1), x)
    np.testing.assert_array_equal(v, y)
    np.testing.assert_array_equal(next(iter(first))[0], u)
    np.testing.assert_array_equal(first.read_batch(0).images, x)
    keras.config.set_image_data_format("channels_first")
    try:
        assert from_directory(folder, image_size=8)[0][0].shape == (19, 3, 8, 8)
    finally:
        keras.config.set_image_data_format("channels_last")


@once
def test_the_split_is_stratified_disjoint_complete_and_seeded(folder):
    train, val = from_directory(folder, validation_split=0.3, subset="both", seed=1)
    assert val.class_counts == {"ants": 2, "bees": 2, "cats": 2}
    assert train.class_counts == {"ants": 3, "bees": 4, "cats": 6}
    assert not set(train.file_paths) & set(val.file_paths)
    assert set(train.file_paths) | set(val.file_paths) == set(find_pictures(folder)[0])
    again = from_directory(folder, validation_split=0.3, subset="validation", seed=1)
    assert again.file_paths == val.file_paths
    first = from_directory(folder, validation_split=0.3, subset="training", seed=1)
    assert first.file_paths == train.file_paths
    others = [
        from_directory(folder, validation_split=0.3, subset="validation", seed=s).file_paths
        for s in range(2, 8)
    ]
    assert any(paths != val.file_paths for paths in others)


@once
def test_the_validation_part_is_neither_shuffled_nor_changed(folder):
    _, val = from_directory(
        folder,
        image_size=16,
        validation_split=0.4,
        subset="both",
        seed=0,
        augment=training_augment(16),
        mixup=0.2,
        cutmix=1.0,
        label_smoothing=0.1,
        drop_last=True,
        repeats=3,
        batch_size=4,
    )
    images = np.concatenate([x for x, _ in val])
    plain = Preprocess((16, 16), None)
    np.testing.assert_array_equal(images, [plain.pixels(path) for path in val.file_paths])
    labels = np.concatenate([y for _, y in val])
    np.testing.assert_array_equal(labels, val.labels)
    assert sorted(val.file_paths) == val.file_paths


# --- the same batches, whatever reads them --------------------------------------------------------


@once
@pytest.mark.parametrize("workers", [1, 2, 4, 9])
def test_batches_do_not_depend_on_the_number_of_workers(folder, workers):
    arguments = {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "output": "float32"}
    equal(
        epoch(everything(folder, workers=0, **arguments)),
        epoch(everything(folder, workers=workers, **arguments)),
    )


@once
def test_batches_depend_on_seed_epoch_and_index_alone(folder):
    dataset = everything(folder)
    epochs = []
    for _ in range(3):
        epochs.append(epoch(dataset))
        dataset.on_epoch_end()
    fresh = everything(folder)
    fresh.set_epoch(2)
    # Any order, any number of times, through [index] or iteration.
    for index in (3, 0, 3, -1, 1):
        equal([fresh[index]], [epochs[2][index]])
    equal(epoch(fresh), epochs[2])
    fresh.set_epoch(0)
    equal(epoch(fresh), epochs[0])
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(epochs[0], epochs[1], strict=True))
    other = epoch(everything(folder, seed=6))
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(epochs[0], other, strict=True))


@once
def test_every_epoch_holds_every_picture_once_in_another_order(folder):
    dataset = from_directory(folder, image_size=8, batch_size=4, seed=0)
    orders = []
    for _ in range(3):
        orders.append(np.concatenate([batch.indices for batch in dataset.batches()]))
        assert sorted(orders[-1]) == list(range(19))
        dataset.on_epoch_end()
    assert not np.array_equal(orders[0], orders[1])
    equal_labels = np.concatenate([y for _, y in dataset])
    indices = np.concatenate([dataset.batch_indices(i) for i in range(len(dataset))])
    np.testing.assert_array_equal(equal_labels, dataset.labels[indices])


@once
def test_a_pictures_augmentation_does_not_depend_on_the_batch_size(folder):
    small = everything(folder, batch_size=3)
    large = everything(folder, batch_size=19)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in small]), large[0][0])


@once
@pytest.mark.parametrize("augment", [None, training_augment(16)])
def test_caches_change_nothing_and_are_used(folder, tmp_path, augment, monkeypatch):
    arguments = {"image_size": 16, "batch_size": 4, "seed": 1, "augment": augment}
    plain = from_directory(folder, **arguments)
    expected = [epoch(plain)]
    plain.on_epoch_end()
    expected.append(epoch(plain))
    for cache in ("ram", str(tmp_path / "cache")):
        dataset = from_directory(folder, cache=cache, **arguments)
        equal(epoch(dataset), expected[0])
        dataset.on_epoch_end()
        with monkeypatch.context() as patch:
            patch.setattr(data, "load", None)  # the second epoch decodes nothing
            patch.setattr("keras_resnet.data.preprocess.load", None)
            equal(epoch(dataset), expected[1])
    for place, file in enumerate(sorted((tmp_path / "cache").iterdir())):  # cut off: made anew
        file.write_bytes(file.read_bytes()[: (0, 5, 50, 128, -1)[place % 5]])
    equal(epoch(from_directory(folder, cache=cache, **arguments)), expected[0])


@once
def test_a_cache_that_cannot_be_written_costs_no_batch(folder, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    dataset = everything(folder, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(np, "save", full)
    equal(epoch(dataset), epoch(everything(folder)))
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == [
        "[Errno 28] No space left on device"
    ]
    assert not os.listdir(tmp_path / "cache")


@once
def test_a_changed_file_leaves_the_folder_cache(folder, tmp_path):
    arguments = {"image_size": 8, "shuffle": False, "cache": str(tmp_path / "c"), "batch_size": 19}
    before = from_directory(folder, **arguments)[0][0]
    path = folder / "ants" / "0.png"
    path.write_bytes(picture(1234))
    os.utime(path, ns=(1, 1))
    after = from_directory(folder, **arguments)[0][0]
    np.testing.assert_array_equal(after[0], Preprocess((8, 8), None).pixels(path))
    np.testing.assert_array_equal(after[1:], before[1:])


@once
def test_a_dataset_can_be_pickled_for_worker_processes(folder):
    dataset = everything(folder, cache="ram")
    dataset[0]
    equal(epoch(pickle.loads(pickle.dumps(dataset))), epoch(dataset))


# --- what comes out -------------------------------------------------------------------------------


@once
def test_float32_is_the_uint8_batch_normalised(folder):
    ints, floats = everything(folder), everything(folder, output="float32")
    for (x, y), (u, v) in zip(ints, floats, strict=True):
        assert x.dtype == np.uint8 and u.dtype == np.float32
        np.testing.assert_array_equal(ints.preprocess.normalize(x), u)
        np.testing.assert_array_equal(y, v)


@once
def test_erasing_writes_zero_after_normalisation_and_the_mean_before(folder):
    chain = Augment([RandomResizedCrop(16), RandomErasing(p=1.0)])
    plain = from_directory(folder, seed=5, batch_size=19, augment=Augment([RandomResizedCrop(16)]))
    floats = from_directory(folder, seed=5, batch_size=19, augment=chain, output="float32")
    ints = from_directory(folder, seed=5, batch_size=19, augment=chain)
    erased = (floats[0][0] == 0).all(-1)
    assert erased.any((1, 2)).mean() > 0.9
    np.testing.assert_array_equal(
        floats[0][0][~erased], plain.preprocess.normalize(plain[0][0])[~erased]
    )
    assert (ints[0][0][erased] == (124, 116, 104)).all()
    np.testing.assert_array_equal(ints[0][0][~erased], plain[0][0][~erased])


@once
def test_mixing_makes_soft_labels_that_sum_to_one(folder):
    soft = everything(folder, mixup=0.4, label_smoothing=0.1)
    for x, y in soft:
        assert x.dtype == np.uint8 and y.shape == (len(x), 3) and y.dtype == np.float32
        np.testing.assert_allclose(y.sum(1), 1, atol=1e-6)
        assert y.min() > 0.03


@once
def test_repeats_give_different_crops_of_the_same_pictures(folder):
    dataset = from_directory(
        folder, seed=0, batch_size=4, augment=Augment([RandomResizedCrop(8)]), repeats=3
    )
    batches = list(dataset.batches())
    indices = np.concatenate([batch.indices for batch in batches])
    assert len(indices) == 19
    assert np.unique(indices, return_counts=True)[1].tolist().count(3) == 6
    images = np.concatenate([batch.images for batch in batches])
    assert len({image.tobytes() for image in images}) == 19


@once
def test_a_balanced_sampler_draws_each_class_as_often_and_depends_on_seed_and_epoch(folder):
    def made(**more):
        crop = Augment([RandomResizedCrop(8)])
        return from_directory(
            folder, batch_size=4, seed=3, augment=crop, sampler="balanced", **more
        )

    dataset = made()
    order = [np.concatenate([batch.indices for batch in dataset.batches()])]
    assert sorted(np.bincount(dataset.labels[order[0]])) == [6, 6, 7] and len(order[0]) == 19
    ants = order[0][dataset.labels[order[0]] == 0]
    assert len(set(ants)) == 5 < len(ants)  # all of them, before one comes again
    images = np.concatenate([batch.images for batch in dataset.batches()])
    assert len({image.tobytes() for image in images}) == 19  # no copy is cut alike
    dataset.set_epoch(1)
    order.append(np.concatenate([batch.indices for batch in dataset.batches()]))
    again = made(workers=0)
    again.set_epoch(1)
    equal(epoch(again), epoch(dataset))
    assert order[0].tolist() != order[1].tolist()
    with pytest.raises(InputError, match="sampler need labels"):
        from_directory(folder, labels=None, sampler="balanced")


@once
@pytest.mark.parametrize(
    "drop, sizes", [(False, [6, 6, 6, 1]), (True, [6, 6, 6]), ("auto", [6, 6, 6])]
)
def test_drop_last(folder, drop, sizes):
    dataset = from_directory(folder, image_size=8, batch_size=6, drop_last=drop)
    assert [len(x) for x, _ in dataset] == sizes and len(dataset) == len(sizes)


@once
def test_auto_drops_only_a_last_batch_of_one_and_never_the_only_batch(folder):
    assert len(from_directory(folder, batch_size=7, drop_last="auto")) == 3  # 7, 7, 5
    for drop in (True, "auto"):
        assert len(from_directory(folder, batch_size=64, drop_last=drop)) == 1
    single = ImageDataset([folder / "ants" / "0.png"], [0], drop_last="auto")
    assert len(single) == 1


@once
def test_take_samples_shows_what_is_fed(folder):
    dataset = everything(folder)
    images, labels, paths = dataset.take_samples(6)
    fed = np.concatenate([dataset[0][0], dataset[1][0]])[:6]
    np.testing.assert_array_equal(images, fed)
    assert [dataset.class_names[i] for i in labels] == [p.split(os.sep)[-2] for p in paths]


@once
def test_statistics_are_those_of_all_pixels_at_once(folder):
    dataset = from_directory(folder, preprocess=Preprocess(None, None), batch_size=4)
    pixels = [np.asarray(Image.open(p).convert("RGB")).reshape(-1, 3) for p in dataset.file_paths]
    pixels = np.concatenate(pixels) / 255.0
    mean, std = dataset_statistics(dataset)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-10)


@once
def test_crop_to_aspect_ratio_does_not_distort(folder):
    wide = np.zeros((20, 100, 3), np.uint8)
    wide[:, 40:60] = 255
    (folder / "ants" / "0.png").write_bytes(b"")
    Image.fromarray(wide).save(folder / "ants" / "0.png")
    arguments = {"image_size": (10, 10), "shuffle": False}
    assert (from_directory(folder, crop_to_aspect_ratio=True, **arguments)[0][0][0] == 255).all()
    assert (from_directory(folder, **arguments)[0][0][0] == 0).any()


@once
@pytest.mark.parametrize(
    "ending", ["jfif", "jpe", "avif", "jp2", "tga", "ico", "pcx", "qoi", "pnm"]
)
def test_other_kinds_that_pillow_reads_are_images(folder, ending):
    kind = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "pnm": "PPM"}.get(ending, ending)
    (folder / "ants" / f"new.{ending.upper()}").write_bytes(picture(1, (32, 32), kind.upper()))
    dataset = from_directory(folder, image_size=8, verify=True)
    assert dataset.class_counts["ants"] == 6 and not dataset.skipped


@once
def test_split_folders_given_as_classes_are_said(folder, caplog):
    folder.rename(folder.parent / "train")
    shutil.copytree(folder.parent / "train", folder.parent / "Testing")
    assert from_directory(folder.parent).class_names == ["Testing", "train"]
    (record,) = caplog.records
    assert "'train', 'Testing', which are taken for classes here" in record.getMessage()


@once
def test_class_names_are_compared_whatever_their_accents_are_made_of(folder):
    (folder / "ants").rename(folder / "cafe\u0301")  # as macOS stores it
    given = from_directory(folder, class_names=["caf\u00e9", "bees"], shuffle=False)
    assert given.class_counts == {"caf\u00e9": 5, "bees": 6}
    labels = labels_by_name(np.array([0, 1]), ["cafe\u0301", "bees"], ["bees", "caf\u00e9"])
    assert labels.tolist() == [1, 0]
    (folder / "caf\u00e9").mkdir()
    with pytest.raises(DataError, match="two class folders with the same name"):
        from_directory(folder)


@once
@pytest.mark.parametrize("size", [(10, 10), (30, 12)])
def test_pad_to_aspect_ratio_shows_the_whole_image(folder, size):
    wide = Image.effect_noise((100, 20), 90).convert("RGB")
    wide.save(folder / "ants" / "0.png")
    arguments = {"image_size": size, "shuffle": False, "pad_to_aspect_ratio": True}
    dataset = from_directory(folder, **arguments)
    high = 20 * size[1] // 100
    top = (size[0] - high) // 2
    expected = np.zeros((*size, 3), np.uint8)
    fitted = wide.resize((size[1], high), Image.Resampling.BILINEAR)
    expected[top : top + high] = np.asarray(fitted)
    np.testing.assert_array_equal(dataset[0][0][0], expected)
    config = dataset.preprocess.get_config()
    assert Preprocess.from_config(config) == dataset.preprocess
    assert "pad_to_aspect_ratio" not in Preprocess().get_config(), "files of 0.1 lack it"


@once
def test_without_a_batch_size_images_come_one_by_one(folder):
    dataset = from_directory(folder, image_size=8, batch_size=None, shuffle=False)
    image, label = dataset[7]
    assert image.shape == (8, 8, 3) and label.shape == () and label == dataset.labels[7]
    (folder / "bees" / "0.png").write_bytes(b"no image")
    read = list(from_directory(folder, image_size=8, batch_size=None, labels=None, workers=0))
    assert len(dataset) == 19 and len(read) == 18 and read[0].shape == (8, 8, 3)


@once
def test_pixels_are_kerass_floats(folder):
    arguments = {"image_size": 8, "shuffle": False, "batch_size": 19}
    pixels = from_directory(folder, output="pixels", **arguments)[0][0]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, from_directory(folder, **arguments)[0][0])
    for theirs, ours in (("area", "box"), ("lanczos3", "lanczos")):
        found = from_directory(folder, interpolation=theirs, **arguments)
        assert found.preprocess.interpolation == ours


@once
def test_what_was_found_is_said_when_asked(folder, capsys):
    from_directory(folder)
    assert capsys.readouterr().out == ""
    from_directory(folder, verbose=True)
    from_directory(folder, labels=None, verbose=True)
    said = "Found 19 files belonging to 3 classes.\nFound 19 files.\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("batch_size", [8, None])
def test_tf_data_has_the_same_batches(folder, batch_size, backend):
    if backend != "tensorflow":
        pytest.skip("one backend is enough, and has TensorFlow in its process already")
    arguments = {"image_size": 8, "seed": 0, "batch_size": batch_size}
    ours = from_directory(folder, output="pixels", label_mode="categorical", **arguments)
    theirs = from_directory(folder, format="tf", label_mode="categorical", **arguments)
    assert theirs.class_names == ours.class_names and theirs.file_paths == ours.file_paths
    first = () if batch_size is None else (None,)
    assert tuple(theirs.element_spec[0].shape) == (*first, 8, 8, 3)
    for _ in range(2):  # epochs, each with an order of its own
        found = [tuple(map(np.asarray, pair)) for pair in theirs]
        for (x, y), (images, labels) in zip(found, ours, strict=True):
            np.testing.assert_array_equal(x, images)
            np.testing.assert_array_equal(y, labels)
        ours.on_epoch_end()


@once
@pytest.mark.skipif(importlib.util.find_spec("grain") is not None, reason="grain is there")
def test_a_format_names_the_package_that_it_needs(folder):
    with pytest.raises(MissingDependencyError, match=r"format=\"grain\" needs.*pip install"):
        from_directory(folder, format="grain")


# --- bad folders ----------------------------------------------------------------------------------


@once
def test_folders_that_cannot_be_used_say_why(folder, tmp_path):
    with pytest.raises(NotFoundError, match="Did you mean 'data'"):
        from_directory(tmp_path / "dat")
    with pytest.raises(DataError, match="is a file"):
        from_directory(folder / "ants" / "0.png")
    with pytest.raises(DataError, match=r"no class folder.*6 .png"):
        from_directory(folder / "bees")
    (folder / "dogs").mkdir()
    (folder / "wolves").mkdir()
    with pytest.raises(DataError, match="without an image: 'dogs', 'wolves'"):
        from_directory(folder)
    bare = tmp_path / "bare"
    for name in ("a", "b"):
        (bare / name).mkdir(parents=True)
        (bare / name / "x.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"No images found.*2 \.heic.*\.jpg.*\.gif"):
        from_directory(bare)


@once
def test_one_class_is_refused_where_a_classifier_is_trained(folder):
    check_classes(from_directory(folder).class_counts)
    with pytest.raises(DataError, match=r"one class only.*'ants'"):
        check_classes(from_directory(folder, class_names=["ants"]).class_counts)


@once
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"workers": 1.5}, "workers"),
        ({"label_mode": "ints"}, "label_mode"),
        ({"output": "float16"}, "output"),
        ({"data_format": "NCHW"}, "data_format"),
        ({"on_error": "ignore"}, "on_error"),
        ({"drop_last": "yes"}, "drop_last"),
        ({"validation_split": 0.2}, "go together"),
        ({"subset": "both"}, "go together"),
        ({"validation_split": 1.2, "subset": "both"}, "between 0 and 1"),
        ({"validation_split": 0.2, "subset": "train"}, "Did you mean 'training'"),
        ({"image_size": 8, "preprocess": Preprocess()}, "image_size"),
        ({"exif": True, "preprocess": Preprocess()}, "exif"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"labels": "all"}, "labels"),
        ({"labels": None, "mixup": 0.2}, "labels"),
        ({"mixup": -0.2}, "mixup"),
        ({"interpolation": "gaussian"}, "interpolation"),
        ({"crop_to_aspect_ratio": True, "pad_to_aspect_ratio": True, "image_size": 8}, "Only one"),
        ({"format": "pandas"}, "'tf' or 'grain'"),
        # Keras' words, for which people's tests and logs look.
        ({"labels": "other"}, "`labels` argument should be"),
        ({"label_mode": "other"}, "`label_mode` argument must be"),
        ({"color_mode": "other"}, "`color_mode` must be one of"),
        ({"labels": [0, 1]}, "Expected the lengths of `labels` to match the number of files"),
        ({"labels": None, "class_names": ["a"]}, "`class_names` cannot be specified"),
        ({"class_names": ["ants", "wrong"]}, "`class_names` passed did not match"),
        ({"label_mode": "binary"}, "there must be exactly 2"),
        ({"validation_split": 2}, "`validation_split` must be between 0 and 1"),
        ({"validation_split": 0.2, "subset": "other"}, '`subset` must be either "training", "val'),
        ({"validation_split": 0.0, "subset": "training"}, "`validation_split` must be set"),
    ],
)
def test_arguments_that_cannot_work_are_named(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        from_directory(folder, **arguments)


# --- bad images ---------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder):
    """The folder with one broken image of every kind among the good ones."""
    whole = picture(0, (64, 64), "JPEG")
    broken = {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": picture(0)[:200],
        "page.jpg": b"<html>404</html>",
        "bomb.png": None,
    }
    for name, content in broken.items():
        path = folder / "bees" / name
        if content is None:
            Image.new("1", (20_000, 20_000)).save(path)
        else:
            path.write_bytes(content)
    renamed = io.BytesIO()
    Image.new("P", (30, 20)).save(renamed, "GIF")
    (folder / "bees" / "gif named.jpg").write_bytes(renamed.getvalue())  # reads well
    os.symlink("nowhere.png", folder / "bees" / "dangling.png")
    return folder, {*broken, "dangling.png"}


@once
@pytest.mark.parametrize("mixup, cutmix", [(0.4, 0.0), (0.4, 0.8), (0.0, 0.0)])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_parts_of_processes_make_the_batch(damaged, parts, mixup, cutmix):
    """Also where its last batch has fewer images than there are processes, or none can be read."""
    changes = {"batch_size": 6, "mixup": mixup, "cutmix": cutmix}
    folder, _ = damaged
    whole = everything(folder, **changes)
    for workers in (0, 2):
        shares = [everything(folder, workers=workers, **changes) for _ in range(parts)]
        for which, share in enumerate(shares):
            share.part = (which, parts)
        for index in range(len(whole)):
            expected, got = whole.read_batch(index), [s.read_batch(index) for s in shares]
            for name in ("images", "labels", "indices"):
                joined = np.concatenate([getattr(batch, name) for batch in got])
                np.testing.assert_array_equal(joined, getattr(expected, name))
                assert all(getattr(b, name).dtype == joined.dtype for b in got)


@once
def test_unreadable_pictures_leave_smaller_batches_and_are_listed_once(damaged, caplog):
    folder, broken = damaged
    dataset = from_directory(folder, image_size=8, batch_size=8, seed=0)
    assert dataset.num_samples == 26
    for _ in range(2):
        assert sum(len(x) for x, _ in dataset) == 20
        dataset.on_epoch_end()
    assert {os.path.basename(path) for path, _ in dataset.skipped} == broken
    assert all(os.path.basename(path) in reason for path, reason in dataset.skipped)
    assert len(caplog.records) == len(broken)
    assert not any("\n" in record.getMessage() for record in caplog.records)


@once
def test_a_broken_picture_changes_nothing_about_the_others(folder):
    before = everything(folder, batch_size=19)
    images, _, indices = before.read_batch(0)
    sample = int(indices[7])
    with open(before.file_paths[sample], "wb"):
        pass
    after_images, labels, after_indices = everything(folder, batch_size=19).read_batch(0)
    kept = indices != sample
    np.testing.assert_array_equal(after_indices, indices[kept])
    np.testing.assert_array_equal(after_images, images[kept])
    np.testing.assert_array_equal(labels, before.labels[indices[kept]])


@once
def test_verify_drops_them_before_the_first_batch(damaged):
    folder, broken = damaged
    dataset = from_directory(folder, image_size=8, batch_size=8, verify=True, cache="ram")
    assert dataset.num_samples == 20 == len(dataset.labels)
    assert {os.path.basename(path) for path, _ in dataset.skipped} == broken
    assert [len(x) for x, _ in dataset] == [8, 8, 4]
    for i, path in enumerate(dataset.file_paths):
        kept = dataset._cache.get(path, pytest.fail, "decoded once is enough")
        np.testing.assert_array_equal(kept, dataset.preprocess.pixels(path))
        assert dataset.class_names[dataset.labels[i]] in path


@once
def test_strict_stops_at_the_first(damaged):
    folder, _ = damaged
    with pytest.raises((DataError, NotFoundError), match="bees"):
        list(from_directory(folder, image_size=8, on_error="raise"))
    with pytest.raises((DataError, NotFoundError), match="bees"):
        from_directory(folder, image_size=8, on_error="raise", verify=True)


@once
def test_a_batch_without_any_readable_picture_is_an_error_that_says_what_to_do(folder):
    for path in (folder / "ants").iterdir():
        path.write_bytes(b"")
    dataset = from_directory(folder, image_size=8, batch_size=5, shuffle=False)
    with pytest.raises(DataError, match=r"None of the 5 images of batch 0.*verify=True"):
        dataset[0]
    assert isinstance(dataset.failure, DataError)
    assert len(from_directory(folder, image_size=8, verify=True).file_paths) == 14
    with pytest.raises(DataError, match="None of the 5"):
        ImageDataset(dataset.file_paths[:5], verify=True)


@once
def test_files_that_vanish_or_change_during_an_epoch(folder):
    dataset = from_directory(folder, image_size=8, batch_size=4, shuffle=False, workers=0)
    batches = iter(dataset)
    next(batches)
    os.remove(dataset.file_paths[5])
    with open(dataset.file_paths[10], "wb") as file:
        file.write(b"half wr")
    assert sum(len(x) for x, _ in batches) == 13
    assert [path for path, _ in dataset.skipped] == [dataset.file_paths[5], dataset.file_paths[10]]
    assert "does not exist" in dataset.skipped[0][1]


@once
def test_pictures_of_different_sizes_need_a_size(folder):
    with pytest.raises(InputError, match=r"different sizes.*image_size"):
        from_directory(folder, preprocess=Preprocess(None, None), shuffle=False)[0]


@once
def test_a_crop_that_does_not_fit_names_the_file(folder):
    dataset = from_directory(folder, augment=Augment([RandomCrop(30)]), shuffle=False)
    with pytest.raises(InputError, match=r"0\.png.*pad_if_needed"):
        dataset[0]


@once
def test_exclude_lists_files(folder, tmp_path):
    (folder / "ants" / "two\nlines.png").write_bytes(picture(1))
    listing = tmp_path / "exclude.txt"
    absolute = folder / "bees" / "1.png"
    odd = json.dumps("ants/two\nlines.png")
    listing.write_text(f"# found by hand\nants/0.png\n{absolute}\n{odd}\n\nants/gone.png\n")
    dataset = from_directory(folder, exclude=listing)
    assert dataset.class_counts == {"ants": 4, "bees": 5, "cats": 8}
    assert from_directory(folder, exclude=["ants/0.png"]).class_counts["ants"] == 5
    with pytest.raises(NotFoundError, match="exclude"):
        from_directory(folder, exclude=tmp_path / "nothing.txt")


@once
def test_from_files_names_a_missing_one(folder):
    dataset = ImageDataset.from_files([folder / "ants" / "0.png"], [1], ["a", "b"])
    assert dataset.class_counts == {"a": 0, "b": 1}
    with pytest.raises(NotFoundError, match="gone"):
        ImageDataset.from_files([folder / "gone.png"], [0])


# --- under Keras, on every backend ----------------------------------------------------------------


def small_model():
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    return model


@pytest.mark.parametrize("workers", [0, 2])
def test_fit_evaluate_and_predict_read_it(folder, workers):
    arguments = {"image_size": 16, "batch_size": 4, "workers": workers}
    train = from_directory(folder, seed=0, **arguments)
    ordered = from_directory(folder, shuffle=False, **arguments)
    model = small_model()
    model.fit(train, epochs=2, verbose=0, shuffle=False)
    assert train.epoch == 2
    model.fit(train, epochs=1, verbose=0)
    assert train.epoch == 3
    logits = model.predict(ordered, verbose=0)
    assert logits.shape == (19, 3)
    accuracy = model.evaluate(ordered, verbose=0, return_dict=True)["accuracy"]
    assert abs(accuracy - (logits.argmax(1) == ordered.labels).mean()) < 1e-6


@pytest.mark.parametrize("lazy", [pytest.param(False, marks=once), True])
def test_fit_uses_the_batches_of_iteration_in_their_order(folder, lazy):
    # Keras calls on_epoch_end more often than there are epochs, peeks at batches, and on TensorFlow
    # begins the next pass before the last one has ended: none of that may change what it learns.
    def model():
        keras.utils.set_random_seed(0)
        made = keras.Sequential(
            [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(3)]
        )
        if not lazy:
            made.build((None, 16, 16, 3))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        made.compile(keras.optimizers.SGD(0.5), loss)
        return made

    fitted, stepped = model(), model()
    fitted.fit(everything(folder, workers=2), epochs=3, verbose=0, shuffle=False)
    dataset = everything(folder, workers=0)
    for _ in range(3):
        for x, y in dataset:
            stepped.train_on_batch(x, y)
        dataset.on_epoch_end()
    for one, other in zip(fitted.get_weights(), stepped.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@once
def test_asking_out_of_order_gives_the_same_batches(folder):
    expected = epoch(everything(folder, workers=0))
    dataset = everything(folder, workers=3)
    for seed in range(5):
        for index in np.random.default_rng(seed).permutation(len(dataset)):
            equal([dataset[int(index)]], [expected[index]])


@once
def test_following_batches_are_read_ahead_within_their_limit(folder):
    dataset = everything(folder, workers=1, batch_size=1)
    dataset[0]
    assert len(dataset._ahead.waiting) == dataset._batches_ahead() == 4
    dataset[1]
    assert sorted(index for _, index in dataset._ahead.waiting) == [2, 3, 4, 5]
    dataset.set_epoch(1)
    dataset[7]  # not in order: nothing is read ahead, and the past epoch is forgotten
    assert not dataset._ahead.waiting


@once
def test_the_threads_share_one_batch(folder):
    together = threading.Barrier(3, timeout=30)  # breaks unless three threads meet, twice

    def augment(picture, rng):
        together.wait()
        return np.zeros((8, 8, 3), np.uint8)

    dataset = from_directory(folder, class_names=["bees"], augment=augment, workers=3)
    assert len(dataset) == 1 and dataset[0][0].shape == (6, 8, 8, 3)


@once
def test_of_several_errors_in_a_batch_that_of_the_first_picture_is_raised(folder, monkeypatch):
    for name in ("1.png", "4.png"):
        (folder / "bees" / name).write_bytes(b"")
    read = data.load

    def late(path, **how):
        time.sleep(0.2 * path.endswith("1.png"))
        return read(path, **how)

    monkeypatch.setattr(data, "load", late)
    arguments = {"class_names": ["bees"], "shuffle": False, "augment": training_augment(8)}
    dataset = from_directory(folder, workers=3, on_error="raise", **arguments)
    with pytest.raises(DataError, match=r"1\.png"):
        dataset[0]
    assert "1.png" in str(dataset.failure)


def test_an_error_in_a_worker_ends_fit_and_is_kept(folder):
    (folder / "ants" / "0.png").write_bytes(b"")
    dataset = from_directory(folder, image_size=16, on_error="raise", workers=2)
    with pytest.raises(Exception, match="empty"):
        small_model().fit(dataset, verbose=0)
    assert isinstance(dataset.failure, DataError)
