"""The compiled resize gives Pillow's pixels, is loaded when it pays, and is not needed."""

import io
import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from keras_resnet.data import preprocess
from keras_resnet.data.augment import Augment
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.data.transforms import RandomHorizontalFlip, RandomResizedCrop

pytest.importorskip("numba")
pytestmark = pytest.mark.once


def noise(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def kernels(monkeypatch):
    from keras_resnet.data import resampling

    monkeypatch.setattr(preprocess, "_kernels", resampling)
    return resampling


def test_every_size_and_window_has_pillows_pixels(kernels, rng):
    for turn in range(300):
        before = rng.integers(1, (5, 40, 300)[turn % 3], 2)
        height, width = (int(side) for side in rng.integers(1, (60, 4, 300, 30)[turn % 4], 2))
        pixels = noise(rng, *before)
        if turn % 5 == 0:
            pixels[:] = 255  # sums that rounding takes above it
        if turn % 2:
            pixels = pixels[before[0] // 3 :, before[1] // 4 :]  # a part: rows that lie apart
        expected = np.asarray(Image.fromarray(pixels).resize((width, height), 2))
        np.testing.assert_array_equal(kernels.resize(pixels, (height, width)), expected)
        top, left = int(rng.integers(height)), int(rng.integers(width))
        window = (top, left, (height - top + 1) // 2, (width - left + 1) // 2)
        np.testing.assert_array_equal(
            kernels.resize(pixels, (height, width), window),
            expected[top : top + window[2], left : left + window[3]],
        )
        np.testing.assert_array_equal(kernels.mirrored(pixels), pixels[:, ::-1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_size": None},
        {"crop_size": (31, 64)},
        {"crop_size": 90},  # padded, which Pillow does
        {"resize_size": (40, 70), "crop_size": (40, 56)},
        {"resize_size": None},
        {"interpolation": "bicubic"},
        {"resize_size": (64, 48), "crop_to_aspect_ratio": True},
        {"resize_size": (64, 48), "pad_to_aspect_ratio": True},
    ],
    ids=str,
)
def test_images_are_prepared_alike_with_and_without(kernels, monkeypatch, rng, options):
    pytest.importorskip("simplejpeg")
    one = Preprocess(**{"resize_size": 64, "crop_size": 56, **options})
    files = []
    for size in ((99, 150), (150, 99), (64, 64), (64, 200), (1, 30), (33, 20)):
        file = io.BytesIO()
        Image.fromarray(noise(rng, *size)).save(file, "JPEG")
        files.append(file.getvalue())
    seen, resize = [], kernels.resize
    monkeypatch.setattr(kernels, "resize", lambda *given: seen.append(1) or resize(*given))
    compiled = [one.pixels(file) for file in files]
    plain = options.keys() <= {"crop_size", "resize_size"} and one.resize_size
    assert bool(seen) == bool(plain and options.get("crop_size") != 90)
    monkeypatch.setattr(preprocess, "_kernels", False)
    for file, pixels in zip(files, compiled, strict=True):
        np.testing.assert_array_equal(pixels, one.pixels(file))


def test_images_are_augmented_alike_with_and_without(kernels, monkeypatch, rng):
    steps = [RandomResizedCrop(24), RandomHorizontalFlip()]
    kinds = [noise(rng, 40, 60), noise(rng, 40, 60)[..., :1], Image.fromarray(noise(rng, 9, 30))]
    chains = [Augment(steps), Augment(steps[::-1]), Augment([RandomResizedCrop(9, ratio=(1, 1))])]
    cases = list(itertools.product(chains, kinds, range(6)))
    compiled = [chain(image, np.random.default_rng(seed)) for chain, image, seed in cases]
    monkeypatch.setattr(preprocess, "_kernels", False)
    for (chain, image, seed), pixels in zip(cases, compiled, strict=True):
        np.testing.assert_array_equal(pixels, chain(image, np.random.default_rng(seed)))


@pytest.mark.parametrize("broken", [None, "numba", "arithmetic"])
def test_it_is_loaded_after_so_many_images_and_only_if_it_works(monkeypatch, rng, broken):
    monkeypatch.setattr(preprocess, "_kernels", None)
    monkeypatch.setattr(preprocess, "_images", itertools.count(preprocess._AFTER - 1))
    if broken == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delitem(sys.modules, "keras_resnet.data.resampling", raising=False)
        monkeypatch.delattr("keras_resnet.data.resampling", raising=False)
    elif broken:
        from keras_resnet.data import resampling

        monkeypatch.setattr(resampling, "agrees_with_pillow", lambda: False)
    image = noise(rng, 30, 20)
    bilinear = Image.Resampling.BILINEAR
    assert preprocess.compiled(image, Image.Resampling.BICUBIC) is None
    assert preprocess.compiled(image, bilinear) is None and preprocess._kernels is None
    assert (preprocess.compiled(image, bilinear) is None) == bool(broken)
    assert (preprocess.compiled(image, bilinear) is None) == bool(broken)
    for other in (image[..., :1], image[:0], image.astype(np.float32)):
        assert preprocess.compiled(other, bilinear) is None
