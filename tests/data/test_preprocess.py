"""Preprocess against torchvision's transforms, and decode against Pillow, on real and bad files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import fuzz_images
import fuzzing  # beside which fuzz_images puts itself
import numpy as np
import pytest
from PIL import Image

from keras_resnet.data import preprocess as preparing, reading as module
from keras_resnet.data.in_flight import Gate, in_flight
from keras_resnet.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, resize_image
from keras_resnet.data.reading import decode, load
from keras_resnet.system.errors import DataError, InputError, NotFoundError

pytestmark = pytest.mark.once


def photographs(shared, every=1):
    folder = shared / "data"
    files = sorted(folder.glob("hymenoptera/*/*/*")) + sorted(folder.glob("imagenet_samples/*"))
    files += sorted(folder.glob("cifar10_small/test/*/*"))[::50]
    return files[::every]


def encoded(picture, kind, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(rng, height, width, channels=3):
    return rng.integers(0, 256, (height, width, channels), np.uint8)


# --- against torchvision --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resize, crop, every",
    [(256, 224, 1), (232, 224, 1), ((101, 77), None, 7), (77, 75, 7), (40, 64, 7), (None, 301, 7)],
)
@pytest.mark.slow
def test_photographs_have_torchvisions_pixels_to_the_bit(torchvision, shared, resize, crop, every):
    from torchvision import transforms

    steps = [transforms.Resize(resize)] if resize else []
    steps += [transforms.CenterCrop(crop)] if crop else []
    oracle = transforms.Compose(steps)
    preprocess = Preprocess(resize, crop)
    files = photographs(shared, every)
    assert len(files) > 60
    for file in files:
        with Image.open(file) as picture:
            expected = np.asarray(oracle(picture.convert("RGB")))
        np.testing.assert_array_equal(preprocess.pixels(file), expected, err_msg=str(file))


def test_normalised_pixels_equal_to_tensor_and_normalize(torchvision, shared):
    from torchvision import transforms

    preset = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    preprocess = Preprocess()
    for file in photographs(shared, 10):
        with Image.open(file) as picture:
            expected = preset(picture.convert("RGB")).permute(1, 2, 0).numpy()
        got = preprocess(file)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "lanczos"])
@pytest.mark.parametrize("size", [(1, 1), (235, 235), (7, 300), (300, 7), (64, 65), (223, 500)])
def test_odd_sizes_and_every_interpolation(torchvision, rng, interpolation, size):
    from torchvision import transforms

    picture = Image.fromarray(noise(rng, *size))
    mode = transforms.InterpolationMode(interpolation)
    for resize, crop in ((64, 64), (65, (50, 81)), ((33, 90), (64, 64)), (235, 224)):
        oracle = transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(crop)])
        expected = np.asarray(oracle(picture))
        got = Preprocess(resize, crop, interpolation).pixels(picture)
        np.testing.assert_array_equal(got, expected)


def test_crop_offset_is_rounded_to_even_and_not_floored(torchvision, rng):
    from torchvision.transforms.functional import center_crop

    # 235 - 224 = 11 and 237 - 224 = 13: rounded half to even, the offsets are 6 and 6, floored
    # they are 5 and 6.
    for height, offset in ((235, 6), (237, 6)):
        pixels = noise(rng, height, 224)
        got = Preprocess(None, 224).pixels(pixels)
        np.testing.assert_array_equal(got, pixels[offset : offset + 224])
        np.testing.assert_array_equal(got, np.asarray(center_crop(Image.fromarray(pixels), 224)))


def test_every_input_form_gives_the_same_result(shared):
    file = photographs(shared)[0]
    preprocess = Preprocess()
    expected = preprocess(str(file))
    with Image.open(file) as picture:
        np.testing.assert_array_equal(preprocess(picture), expected)
    np.testing.assert_array_equal(preprocess(file), expected)
    np.testing.assert_array_equal(preprocess(file.read_bytes()), expected)
    np.testing.assert_array_equal(preprocess(decode(file)), expected)
    with open(file, "rb") as stream:
        np.testing.assert_array_equal(preprocess(stream), expected)


def test_normalize_of_a_batch_is_that_of_its_pictures(rng):
    preprocess = Preprocess()
    batch = np.stack([noise(rng, 5, 7) for _ in range(3)])
    expected = np.stack([preprocess.normalize(picture) for picture in batch])
    np.testing.assert_array_equal(preprocess.normalize(batch), expected)


def test_without_mean_and_std_values_are_pixels_over_255(rng):
    pixels = noise(rng, 4, 4)
    got = Preprocess(None, None, mean=None, std=None)(pixels)
    np.testing.assert_array_equal(got, pixels.astype(np.float32) / np.float32(255))


# --- decoding -------------------------------------------------------------------------------------


def kinds_of_files(rng):
    rgb = Image.fromarray(noise(rng, 20, 30))
    gray = rgb.convert("L")
    deep = Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16))
    alpha = Image.fromarray(noise(rng, 20, 30, 4))
    palette = rgb.quantize(16)
    yield "jpeg", encoded(rgb, "JPEG")
    yield "jpeg 420", encoded(rgb, "JPEG", quality=70, subsampling=2)
    yield "jpeg progressive", encoded(rgb, "JPEG", progressive=True)
    yield "jpeg gray", encoded(gray, "JPEG")
    yield "jpeg cmyk", encoded(rgb.convert("CMYK"), "JPEG")
    yield "jpeg stored as rgb", encoded(rgb, "JPEG", keep_rgb=True)
    yield "jpeg and rubbish", encoded(rgb, "JPEG") + b"rubbish"
    yield "jpeg without end marker", encoded(rgb, "JPEG")[:-2] + b"\x00\x00"
    yield "png", encoded(rgb, "PNG")
    yield "png palette", encoded(palette, "PNG")
    yield "png palette transparent", encoded(palette, "PNG", transparency=bytes(range(16)))
    yield "png gray", encoded(gray, "PNG")
    yield "png 16 bit", encoded(deep, "PNG")
    yield "png 1 bit", encoded(gray.convert("1"), "PNG")
    yield "png alpha", encoded(alpha, "PNG")
    yield "png gray alpha", encoded(alpha.convert("LA"), "PNG")
    yield "bmp", encoded(rgb, "BMP")
    yield "gif", encoded(palette, "GIF")
    yield "gif animated", encoded(rgb, "GIF", save_all=True, append_images=[gray.convert("RGB")])
    yield "webp", encoded(rgb, "WEBP")
    yield "webp alpha", encoded(alpha, "WEBP", lossless=True)
    yield "tiff", encoded(rgb, "TIFF")
    yield "tiff 16 bit", encoded(deep, "TIFF")
    yield "tiff cmyk", encoded(rgb.convert("CMYK"), "TIFF")
    yield "ppm", encoded(rgb, "PPM")


def test_every_format_and_mode_decodes_as_torchvisions_loader(rng, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = {kind: decode(data) for kind, data in kinds_of_files(rng)}
    assert len(ours) > 20
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, data in kinds_of_files(rng):
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(ours[kind], expected, err_msg=kind)


def test_simplejpeg_and_pillow_agree_on_all_photographs(shared, monkeypatch):
    if module.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    files = photographs(shared, 3)
    fast = {file: load(file) for file in files}
    assert sum(isinstance(pixels, np.ndarray) for pixels in fast.values()) > 0.9 * len(files)
    monkeypatch.setattr(module, "simplejpeg", None)
    for file, pixels in fast.items():
        plain = load(file)
        assert isinstance(plain, Image.Image)
        np.testing.assert_array_equal(np.asarray(pixels), np.asarray(plain), err_msg=str(file))


def test_damaged_jpegs_are_read_or_refused_alike_with_and_without_simplejpeg(rng, monkeypatch):
    if module.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    whole = encoded(Image.fromarray(noise(rng, 64, 64)), "JPEG")
    damaged = []
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(2, len(data) - 2, rng.integers(1, 4)):
            data[place] = rng.integers(256)
        damaged.append(bytes(data))

    def outcome(data):
        try:
            return decode(data).tobytes()
        except DataError:
            return None

    fast = [outcome(data) for data in damaged]
    assert None in fast and any(fast)
    monkeypatch.setattr(module, "simplejpeg", None)
    assert [outcome(data) for data in damaged] == fast


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_an_option_and_off_by_default(rng, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(rng, 20, 30)), "JPEG", exif=exif)
    plain = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode(data), np.asarray(plain.convert("RGB")))
    turned = np.asarray(ImageOps.exif_transpose(plain).convert("RGB"))
    np.testing.assert_array_equal(decode(data, exif=True), turned)
    np.testing.assert_array_equal(Preprocess(None, None, exif=True).pixels(plain), turned)


def bad_files(rng):
    whole = encoded(Image.fromarray(noise(rng, 50, 50)), "JPEG")
    png = encoded(Image.fromarray(noise(rng, 50, 50)), "PNG")
    yield "empty.jpg", b"", "empty"
    yield "truncated.jpg", whole[: len(whole) // 2], "truncated"
    yield "truncated.png", png[: len(png) // 2], "cannot be read"
    yield "header only.jpg", whole[:20], "cannot be read"
    yield "text.png", b"this is not an image", "no format"
    yield "zeros.gif", bytes(1000), "no format"
    yield "page.jpg", b"<html>404</html>", "no format"


def test_unreadable_files_raise_one_line_with_the_name_and_the_reason(rng, tmp_path):
    for name, data, reason in bad_files(rng):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=reason) as error:
            decode(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("RGB", (100, 100)), "PNG"))
    (tmp_path / "bomb.jpg").write_bytes(encoded(Image.new("RGB", (100, 100)), "JPEG"))
    for name in ("bomb.png", "bomb.jpg"):
        with pytest.raises(DataError, match=r"more than 2,000 pixels.*decompression bomb") as error:
            decode(tmp_path / name)
        assert name in str(error.value)


def held_at_once(monkeypatch, jobs) -> int:
    """Runs jobs in 8 threads; how many images, at most, waited to be resized at a time."""
    lock, now, most = threading.Lock(), 0, 0

    def resize(image, *arguments):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return resize_image(image, *arguments)

    monkeypatch.setattr(preparing, "resize_image", resize)
    monkeypatch.setattr(preparing, "_kernels", False)  # resizes without it
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: job(), jobs))
    assert in_flight._held == 0
    return most


@pytest.mark.parametrize(
    ("kind", "side", "most"),
    [
        ("PNG", 60, 2),
        ("JPEG", 60, 2),
        ("PNG", 90, 1),
        ("ICO", 16, 1),
        (None, 60, 2),
        (None, 120, 1),
    ],
)
def test_pixels_in_flight_are_bounded_until_they_are_made_small(kind, side, most, monkeypatch):
    """Of all threads together, as many as one image may have; of an icon's nothing is known."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    image = Image.new("RGB", (side, side), "red")
    source = np.asarray(image) if kind is None else encoded(image, kind)
    small = Preprocess(8, 8)
    assert held_at_once(monkeypatch, [lambda: small.pixels(source)] * 12) == most


def test_no_thread_waits_for_itself_or_for_what_failed(rng, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    whole = encoded(Image.fromarray(noise(rng, 90, 90)), "PNG")
    for _ in range(3):
        with pytest.raises(DataError):
            decode(whole[:-2000])
    with in_flight:  # 24,300 pixels
        assert [len(decode(whole)) for _ in range(3)] == [90, 90, 90]
    assert in_flight._held == 0


def test_a_large_image_gets_its_turn_among_small_ones():
    gate, done = Gate(lambda: 10, 100), []

    def job(amount):
        with gate:
            gate.take(amount)
            time.sleep(0.01)
            done.append(amount)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(job, [3] * 9 + [50] + [3] * 40))
    assert done.index(50) < 20


def test_a_file_that_does_not_fit_into_memory_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")

    def take(size):
        raise MemoryError

    monkeypatch.setattr(module.files_read, "take", take)
    with pytest.raises(DataError, match=r"a\.png.*not enough memory"):
        decode(tmp_path / "a.png")


def test_a_picture_that_resizing_would_blow_up_is_refused():
    with pytest.raises(DataError, match="resize_size"):
        Preprocess().pixels(np.zeros((1, 100_000, 3), np.uint8))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="gone"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match="folder"):
        decode(tmp_path)


@pytest.mark.parametrize("name", ["a b.png", 'it\'s "x".png', "two\nlines.png", "größe 图.png"])
def test_unusual_file_names(tmp_path, name):
    (tmp_path / name).write_bytes(encoded(Image.new("RGB", (2, 2)), "PNG"))
    assert decode(tmp_path / name).shape == (2, 2, 3)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as error:
        decode(tmp_path / name)
    assert "\n" not in str(error.value)


def test_grayscale_and_rgba(rng):
    rgb = Image.fromarray(noise(rng, 20, 30))
    gray = Preprocess(None, None, color_mode="grayscale", mean=0.5, std=0.5)
    assert gray.output_shape == (None, None, 1) and gray(rgb).shape == (20, 30, 1)
    np.testing.assert_array_equal(gray.pixels(rgb)[..., 0], np.asarray(rgb.convert("L")))
    alpha = Image.fromarray(noise(rng, 20, 30, 4))
    kept = Preprocess(None, None, color_mode="rgba", mean=None, std=None).pixels(alpha)
    np.testing.assert_array_equal(kept, np.asarray(alpha))


# --- the object -----------------------------------------------------------------------------------


def test_config_survives_json_and_equality_means_equal_results():
    made = [
        Preprocess(),
        Preprocess(232, (200, 224), "bicubic", None, None, exif=True),
        Preprocess((64, 48), None, crop_to_aspect_ratio=True),
        Preprocess(None, 28, mean=0.5, std=0.5, color_mode="grayscale"),
    ]
    for preprocess in made:
        assert Preprocess.from_config(json.loads(preprocess.to_json())) == preprocess
    assert len(set(made)) == len(made)
    assert Preprocess([64, 64], 32) == Preprocess((64, 64), (32, 32))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"resize_size": 0}, "resize_size"),
        ({"resize_size": "256"}, "resize_size"),
        ({"resize_size": (1, 2, 3)}, "resize_size"),
        ({"crop_size": 1.5}, "crop_size"),
        ({"crop_size": True}, "crop_size"),
        ({"interpolation": "bilinar"}, "Did you mean 'bilinear'"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.2, 0.2, 0.0)}, "std"),
        ({"color_mode": "bgr"}, "color_mode"),
        ({"color_mode": "grayscale"}, "mean"),
        ({"crop_to_aspect_ratio": True}, "crop_to_aspect_ratio"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Preprocess(**arguments)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)]
)
def test_arrays_that_are_no_picture_are_refused(array):
    with pytest.raises(InputError, match="array"):
        Preprocess()(array)


def test_output_shape_is_the_shape(rng):
    for resize, crop in ((256, 224), ((64, 32), None), ((64, 32), 80), (None, (7, 9))):
        preprocess = Preprocess(resize, crop)
        assert preprocess.pixels(noise(rng, 90, 70)).shape == preprocess.output_shape
    assert Preprocess(256, None).output_shape == (None, None, 3)


def test_only_numpy_and_pillow_are_needed():
    code = f"""
import sys, types
sys.modules["simplejpeg"] = None
package = types.ModuleType("keras_resnet")  # without what the package's own __init__ imports
package.__path__ = [{os.path.dirname(os.path.dirname(module.__file__))!r}]
sys.modules["keras_resnet"] = package
import keras_resnet.data.preprocess
assert keras_resnet.data.reading.simplejpeg is None
unwanted = {{"keras", "torch", "tensorflow", "jax", "cv2"}} & set(sys.modules)
assert not unwanted, unwanted
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damaged_images_are_read_or_refused(tmp_path):
    """More in `tests/data/fuzz_images.py`."""
    result = fuzzing.session(
        fuzz_images.samples(), fuzz_images.mutate, fuzz_images.read, tmp_path, count=900, seed=3
    )
    assert not result.failures and set(result.outcomes) == {"read", "refused"}
