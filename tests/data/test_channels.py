"""Gray, RGBA, 16-bit and n-channel images: the pixels of Pillow, torchvision and timm, each."""

import io

import numpy as np
import pytest
from PIL import Image

from keras_resnet.data import augment, transforms, warps
from keras_resnet.data.bands import Bands, bands_of
from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.looking import load_shown
from keras_resnet.data.preprocess import IMAGENET_MEAN, Preprocess
from keras_resnet.data.reading import decode
from keras_resnet.data.statistics import dataset_statistics
from keras_resnet.system.errors import DataError, InputError

pytestmark = pytest.mark.once


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def noise(rng, *shape, kind=np.uint8):
    return rng.integers(0, np.iinfo(kind).max + 1, shape, kind)


@pytest.fixture
def many(rng):
    return noise(rng, 30, 40, 5)


# --- read and resized -----------------------------------------------------------------------------


@pytest.mark.parametrize("size, crop", [(64, 56), ((40, 33), None), (40, 64)])
@pytest.mark.parametrize(
    "mode, shape, kind", [("L", (), np.uint8), ("RGBA", (4,), np.uint8), ("I;16", (), np.uint16)]
)
def test_gray_alpha_and_16_bits_have_torchvisions_pixels(
    torchvision, rng, mode, shape, kind, size, crop
):
    from torchvision.transforms import functional as F

    image = Image.fromarray(noise(rng, 90, 70, *shape, kind=kind))
    assert image.mode == mode
    expected = F.resize(image, size if isinstance(size, int) else list(size))
    expected = np.asarray(F.center_crop(expected, crop) if crop else expected)
    expected = expected.reshape(*expected.shape[:2], -1) / np.iinfo(kind).max
    preprocess = Preprocess(size, crop, color_mode=shape[0] if shape else 1, mean=0.4, std=0.2)
    for source in (encoded(image), image):
        np.testing.assert_allclose(preprocess(source), (expected - 0.4) / 0.2, atol=1e-6)
    assert preprocess.pixels(image).dtype == (np.uint8 if kind == np.uint8 else np.float32)


def tiff_pages(array):
    first, *others = [Image.fromarray(array[..., i]) for i in range(array.shape[2])]
    return encoded(first, "TIFF", save_all=True, append_images=others)


def tiff(array, **options):
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def test_many_channels_are_read_from_arrays_and_tiffs(many):
    gray = {"photometric": "minisblack"}
    sources = {
        "npy": saved(many),
        "npy, channels first": saved(many.transpose(2, 0, 1)),
        "npy of NumPy's integers": saved(many.astype(np.int64)),
        "npy of fractions": saved(many / 255),
        "npy of 16 bits": saved(many.astype(np.uint16) * 257),
        "pages": tiff_pages(many),
        "samples": tiff(many, planarconfig="contig", **gray),
        "planes": tiff(many.transpose(2, 0, 1), planarconfig="separate", **gray),
        "rgb and two": tiff(many, photometric="rgb", compression="zlib"),
        "array": many,
        "16-bit array": many.astype(np.uint16) * 257,
    }
    for kind, source in sources.items():
        pixels = decode(source, color_mode=5)
        assert pixels.shape == many.shape, kind
        np.testing.assert_allclose(pixels, many, atol=2e-5, err_msg=kind)
    two = encoded(Image.fromarray(many[..., :2], "LA"))
    np.testing.assert_array_equal(decode(two, color_mode=2), many[..., :2])
    infrared = tiff(many[..., :4], photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(decode(infrared, color_mode="rgba"), many[..., :4])
    # Each channel by itself, also beside a fourth that is no alpha.
    for count in (4, 5):
        both = Preprocess((16, 20), 12).for_channels(count).pixels(saved(many[..., :count]))
        gray = Preprocess((16, 20), 12).for_channels(1)
        alone = [gray.pixels(many[..., i]) for i in range(count)]
        np.testing.assert_array_equal(both, np.concatenate(alone, -1))


def test_other_channels_than_asked_for_are_named(many):
    for source in (saved(many), tiff_pages(many[..., :2]), encoded(Image.new("RGB", (4, 4)))):
        with pytest.raises(DataError, match=r"it has [123456789] channels?, not 7; channels="):
            decode(source, color_mode=7)
    for values in (np.full((4, 4), 1.5), np.full((4, 4), 70000), np.full((4, 4), -1)):
        with pytest.raises(DataError, match=r"whole numbers of 0\.\.65535 or floats of 0\.\.1"):
            decode(saved(values), color_mode=1)
    for data in (saved(np.array(["a"])), saved(many)[:200], saved(many[None])):
        with pytest.raises(DataError, match="cannot be read"):
            decode(data, color_mode=5)
    with pytest.raises(InputError, match="or with 6 channels"):
        decode(many, color_mode=6)
    for mode in (0, True, 2000, "five", None):
        with pytest.raises(InputError, match="number of channels"):
            Preprocess(color_mode=mode, mean=None, std=None)
    shown = load_shown(saved(many))
    np.testing.assert_array_equal(np.asarray(shown), many[..., :3])


def test_rgb_stays_what_torchvision_reads(rng):
    deep = Image.fromarray(noise(rng, 8, 9, kind=np.uint16))
    expected = np.asarray(deep.convert("RGB"))
    np.testing.assert_array_equal(decode(encoded(deep)), expected)


# --- augmented ------------------------------------------------------------------------------------

_STEPS = [
    transforms.Resize((24, 28)),
    transforms.CenterCrop(50),
    transforms.RandomResizedCrop(20),
    transforms.RandomHorizontalFlip(1.0),
    transforms.RandomCrop(32, padding=4, fill=7),
    transforms.ColorJitter(0.4, 0.4, 0.4, 0.2),
]


_WARPS = [
    warps.RandomVerticalFlip(1.0),
    warps.RandomRotation(30, fill=9),
    warps.RandomAffine(10, (0.1, 0.2), (0.8, 1.2), 15, "bilinear"),
    warps.GaussianBlur(3),
    warps.RandomGrayscale(1.0),
    augment.AugMix(),
]


def test_every_change_is_that_of_each_channel(many):
    for step in (*_STEPS, *_WARPS):
        changed = augment.Augment([step])(many, np.random.default_rng(5))
        for i in range(5):
            alone = augment.Augment([step])(many[..., i], np.random.default_rng(5))
            np.testing.assert_array_equal(changed[..., i], alone[..., 0], err_msg=str(step))
    trivial, image = augment.TrivialAugmentWide(fill=9, interpolation="bilinear"), bands_of(many)
    for name, (magnitudes, _) in trivial.space(30, 40).items():
        made = [(name, 0.0 if magnitudes is None else float(magnitudes[9]))]
        changed = np.asarray(trivial.apply(image, made))
        alone = np.asarray(trivial.apply(many[..., 2], made))
        np.testing.assert_array_equal(changed[..., 2], alone, err_msg=name)


def test_alpha_moves_and_keeps_its_values(many):
    rgba = many[..., :4]
    trivial = augment.TrivialAugmentWide()
    for name in ("Posterize", "Solarize", "AutoContrast", "Equalize", "Color", "Contrast"):
        changed = np.asarray(trivial.apply(rgba, [(name, 4.0)]))
        expected = np.asarray(trivial.apply(rgba[..., :3], [(name, 4.0)]))
        np.testing.assert_array_equal(changed, np.dstack([expected, rgba[..., 3]]), err_msg=name)
    jittered = transforms.ColorJitter(hue=0.3)(rgba, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(jittered)[..., 3], rgba[..., 3])


def test_16_bits_are_kept_where_colours_stay(rng):
    deep = noise(rng, 30, 40, kind=np.uint16)
    for step in _STEPS[:-1]:
        changed = augment.Augment([step])(deep, np.random.default_rng(5))
        assert changed.dtype == np.float32
        floats = Image.fromarray(deep.astype(np.float32))
        expected = np.asarray(step(floats, np.random.default_rng(5)), np.float32) / 257
        expected[expected == np.float32(7 / 257)] = 7  # what is filled in is of 0..255
        np.testing.assert_allclose(changed[..., 0], expected, atol=4e-3, err_msg=str(step))
    # Pillow mixes the bytes of 16 bits where it interpolates.
    turned = augment.apply_operation(bands_of(deep), "Rotate", 13.0, Image.Resampling.BILINEAR)
    floats = Image.fromarray(deep.astype(np.float32)).rotate(13.0, Image.Resampling.BILINEAR)
    assert isinstance(turned, Bands)
    np.testing.assert_allclose(np.asarray(turned)[..., 0], np.asarray(floats), atol=1)
    blurred = transforms.enhanced(bands_of(deep), "Contrast", 0.5)
    eight = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    expected = np.asarray(transforms.enhanced(eight, "Contrast", 0.5))
    np.testing.assert_array_equal(np.asarray(blurred)[..., 0], expected)


def test_batches_and_statistics(tmp_path, rng):
    images = noise(rng, 3, 20, 24, 5, kind=np.uint16)
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i}.npy", image)
    files = sorted(map(str, tmp_path.iterdir()))
    preprocess = Preprocess(None, None, color_mode=5, mean=None, std=None)
    for cache in (None, "ram"):
        for chain in (None, augment.Augment([transforms.RandomHorizontalFlip(0.0)])):
            dataset = ImageDataset(files, preprocess=preprocess, shuffle=False, cache=cache,
                                   augment=chain, output="float32")  # fmt: skip
            np.testing.assert_allclose(dataset[0], images / 65535, atol=1e-6)
    mean, std = dataset_statistics(dataset)
    np.testing.assert_allclose(mean, (images / 65535).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(std, (images / 65535).std((0, 1, 2)), atol=1e-6)


def test_colours_for_other_channels_follow_the_weights():
    assert Preprocess().for_channels(3) == Preprocess()
    with pytest.raises(InputError, match="up to 1024"):
        Preprocess().for_channels(10**30)
    gray, five = Preprocess().for_channels(1), Preprocess().for_channels(5)
    assert gray.mean == (sum(IMAGENET_MEAN) / 3,) and gray.output_shape == (224, 224, 1)
    assert five.mean == (*IMAGENET_MEAN, *IMAGENET_MEAN[:2]) and five.color_mode == 5
    assert Preprocess.from_config(five.get_config()) == five
