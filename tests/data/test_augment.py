"""Augmentations against torchvision on Pillow images: equal parameters, equal pixels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet import plots
from keras_resnet.data import augment, transforms
from keras_resnet.data.augment import Augment, AugMix, AutoAugment, RandAugment, TrivialAugmentWide
from keras_resnet.data.mixing import Mix, smooth_labels
from keras_resnet.data.order import repeated_augmentation
from keras_resnet.data.transforms import (
    ColorJitter,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)
from keras_resnet.data.warps import (
    GaussianBlur,
    RandomAffine,
    RandomGrayscale,
    RandomRotation,
    RandomVerticalFlip,
)
from keras_resnet.recipes import get_recipe
from keras_resnet.system.errors import InputError
from keras_resnet.training.prepare import prepare_data, recipe_augment

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def pictures():
    """Smooth and noisy images of odd sizes; smooth ones tell interpolations apart."""
    rng = np.random.default_rng(1)
    made = []
    for height, width in ((96, 128), (75, 50), (33, 200), (32, 32)):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        made += [smooth, Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))]
    return made


def same(ours, theirs, message=""):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=message)


# --- one image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_random_resized_crop_gives_torchvisions_pixels(torchvision, pictures, rng, interpolation):
    from torchvision.transforms import InterpolationMode, functional as F

    crop = RandomResizedCrop((48, 56), interpolation=interpolation)
    mode = InterpolationMode(interpolation)
    for picture in pictures:
        for _ in range(20):
            window = crop.sample(picture.height, picture.width, rng)
            expected = F.resized_crop(picture, *window, [48, 56], mode)
            same(crop.apply(picture, window), expected)
            same(crop.apply(np.asarray(picture), window), expected)


def test_random_resized_crop_draws_from_torchvisions_distribution(torchvision, rng):
    import torch
    from torchvision import transforms

    torch.manual_seed(0)
    picture = Image.new("RGB", (500, 400))
    crop = RandomResizedCrop(224)
    ours = np.array([crop.sample(400, 500, rng) for _ in range(4000)])
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(picture, crop.scale, crop.ratio) for _ in range(4000)])
    for column in range(4):
        # Kolmogorov-Smirnov: 0.0364 is the 1% bound for two samples of 4000.
        grid = np.arange(501)
        ours_cdf = np.searchsorted(np.sort(ours[:, column]), grid, "right") / 4000
        theirs_cdf = np.searchsorted(np.sort(theirs[:, column]), grid, "right") / 4000
        assert np.abs(ours_cdf - theirs_cdf).max() < 0.0364
    assert (ours[:, 0] + ours[:, 2]).max() <= 400 and (ours[:, 1] + ours[:, 3]).max() <= 500


@pytest.mark.parametrize("size", [(10, 300), (300, 10)])
def test_random_resized_crop_falls_back_to_torchvisions_central_crop(torchvision, rng, size):
    from torchvision import transforms

    # No window of the whole area has an allowed shape, so every draw misses.
    crop = RandomResizedCrop(8, scale=(1.0, 1.0))
    picture = Image.new("RGB", size[::-1])
    expected = transforms.RandomResizedCrop.get_params(picture, crop.scale, crop.ratio)
    assert crop.sample(*size, rng) == expected


def test_horizontal_flip(torchvision, pictures, rng):
    from torchvision.transforms import functional as F

    for picture in pictures:
        same(RandomHorizontalFlip().apply(picture, True), F.hflip(picture))
        same(RandomHorizontalFlip().apply(picture, False), picture)
    draws = [RandomHorizontalFlip(0.3).sample(1, 1, rng) for _ in range(4000)]
    assert abs(np.mean(draws) - 0.3) < 0.03


@pytest.mark.parametrize(
    "padding, needed, size", [(4, False, 32), (0, True, (90, 140)), (3, True, 60)]
)
def test_random_crop_pads_and_cuts_as_torchvision(
    torchvision, pictures, rng, padding, needed, size
):
    from torchvision.transforms import functional as F

    crop = RandomCrop(size, padding, needed)
    for picture in pictures:
        for _ in range(5):
            top, left = crop.sample(picture.height, picture.width, rng)
            padded = F.pad(picture, padding)
            if needed and padded.width < crop.size[1]:
                padded = F.pad(padded, [crop.size[1] - padded.width, 0])
            if needed and padded.height < crop.size[0]:
                padded = F.pad(padded, [0, crop.size[0] - padded.height])
            assert top + crop.size[0] <= padded.height and left + crop.size[1] <= padded.width
            same(crop.apply(picture, (top, left)), F.crop(padded, top, left, *crop.size))


def test_random_crop_reaches_every_offset(rng):
    offsets = {RandomCrop(32, 4).sample(32, 32, rng) for _ in range(3000)}
    assert offsets == {(i, j) for i in range(9) for j in range(9)}


def test_random_crop_of_a_smaller_picture_says_what_to_do(rng):
    with pytest.raises(InputError, match="pad_if_needed"):
        RandomCrop(40).sample(32, 32, rng)


def test_color_jitter_gives_torchvisions_pixels(torchvision, pictures, rng):
    from torchvision.transforms import functional as F

    jitter = ColorJitter(0.4, 0.4, 0.4, 0.5)
    change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    orders = set()
    for picture in pictures:
        for _ in range(20):
            order, values = jitter.sample(picture.height, picture.width, rng)
            orders.add(order)
            expected = picture
            for i in order:
                expected = change[i](expected, values[i])
            same(jitter.apply(picture, (order, values)), expected)
    assert len(orders) > 20


def test_color_jitter_has_torchvisions_limits(torchvision):
    from torchvision import transforms

    for arguments in ((0.4, 1.5, 0.0, 0.1), ((0.5, 2.0), 0.3, (1.0, 1.0), (-0.2, 0.1))):
        ours, theirs = ColorJitter(*arguments), transforms.ColorJitter(*arguments)
        for name, nothing in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)):
            assert getattr(ours, name) == (getattr(theirs, name) or (nothing, nothing))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [None, 128])
@pytest.mark.parametrize("kind", ["TrivialAugmentWide", "RandAugment"])
def test_every_operation_and_magnitude_gives_torchvisions_pixels(
    torchvision, pictures, kind, fill, interpolation
):
    from torchvision.transforms import InterpolationMode, autoaugment

    resample = transforms.resample_filter(interpolation)
    theirs = getattr(autoaugment, kind)()
    for number, picture in enumerate(pictures[::3]):
        size = (picture.height, picture.width)
        arguments = (31, size) if kind == "RandAugment" else (31,)
        expected_space = theirs._augmentation_space(*arguments)
        space = getattr(augment, kind)().space(*size)
        assert list(space) == list(expected_space)
        for name, (magnitudes, signed) in space.items():
            expected_magnitudes, expected_signed = expected_space[name]
            assert signed == expected_signed
            if magnitudes is None:
                assert expected_magnitudes.ndim == 0
                values = [0.0]
            else:
                # A processor without fused multiply-add rounds torch's own values once more.
                np.testing.assert_allclose(
                    magnitudes, expected_magnitudes.numpy(), rtol=2e-7, err_msg=name
                )
                values = magnitudes[number::3]
            for magnitude in {float(v) * s for v in values for s in ((1, -1) if signed else (1,))}:
                ours = augment.apply_operation(picture, name, magnitude, resample, fill)
                expected = autoaugment._apply_op(
                    picture,
                    name,
                    magnitude,
                    InterpolationMode(interpolation),
                    None if fill is None else [fill] * 3,
                )
                same(ours, expected, f"{name} {magnitude}")


def test_trivial_augment_draws_every_operation_magnitude_and_sign(rng):
    transform = TrivialAugmentWide()
    drawn = [transform.sample(32, 32, rng)[0] for _ in range(20_000)]
    names, counts = np.unique([name for name, _ in drawn], return_counts=True)
    assert len(names) == 14 and np.abs(counts / 20_000 - 1 / 14).max() < 0.01
    angles = {magnitude for name, magnitude in drawn if name == "Rotate"}
    assert len(angles) == 61  # 31 magnitudes, 30 of them with two signs


def test_rand_augment_applies_its_number_of_operations_at_one_strength(rng):
    transform = RandAugment(num_ops=3, magnitude=30)
    for _ in range(200):
        drawn = transform.sample(331, 331, rng)
        assert len(drawn) == 3
        for name, magnitude in drawn:
            if name.startswith("Translate"):
                assert abs(magnitude) == 150.0


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "svhn"])
def test_auto_augment_is_torchvisions_table_and_draws_from_it(torchvision, rng, name):
    from torchvision.transforms import autoaugment

    theirs = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(name))
    ours = AutoAugment(name)
    space, expected = ours.space(64, 48), theirs._augmentation_space(10, (64, 48))
    assert sorted(space) == sorted([*expected, "Identity"])
    for operation, (magnitudes, signed) in expected.items():
        assert space[operation][1] == signed
        if magnitudes.ndim:
            np.testing.assert_allclose(space[operation][0], magnitudes.numpy(), rtol=2e-7)
    table = []
    for row in augment._POLICIES[name].split(";"):
        words = row.split()
        found = zip(words[::3], words[1::3], words[2::3], strict=True)
        table.append(tuple((n, float(p), None if m == "-" else int(m)) for n, p, m in found))
    assert table == theirs.policies
    counts = np.bincount([len(ours.sample(64, 48, rng)) for _ in range(4000)], minlength=3)
    chances = np.array([[p1, p2] for (_, p1, _), (_, p2, _) in theirs.policies])
    neither, both = (1 - chances).prod(1).mean(), chances.prod(1).mean()
    np.testing.assert_allclose(counts / 4000, [neither, 1 - neither - both, both], atol=0.03)


def test_invert_is_torchvisions(torchvision, pictures):
    from torchvision.transforms import InterpolationMode, autoaugment

    for picture in pictures[:2]:
        ours = augment.apply_operation(picture, "Invert", 0.0, Image.Resampling.NEAREST)
        same(ours, autoaugment._apply_op(picture, "Invert", 0.0, InterpolationMode.NEAREST, None))


def test_augmix_mixes_as_torchvision(torchvision, pictures, rng):
    """Its formula, with the operations of Pillow images; torchvision's own are of tensors."""
    import torch
    from torchvision.transforms import InterpolationMode, autoaugment

    theirs, ours = autoaugment.AugMix(), AugMix()
    space, expected = ours.space(64, 48), theirs._augmentation_space(10, (64, 48))
    assert sorted(space) == sorted(expected)
    assert sorted(AugMix(all_ops=False).space(9, 9)) == sorted(
        autoaugment.AugMix(all_ops=False)._augmentation_space(10, (9, 9))
    )
    for operation, (magnitudes, signed) in expected.items():
        assert space[operation][1] == signed
        if magnitudes.ndim:
            np.testing.assert_allclose(space[operation][0], magnitudes.numpy(), rtol=2e-7)
    for picture in pictures:
        shares, chains = ours.sample(picture.height, picture.width, rng)
        assert sum(shares) == pytest.approx(1) and len(chains) == 3 == len(shares) - 1
        mixed = shares[0] * torch.from_numpy(np.array(picture))
        for share, chain in zip(shares[1:], chains, strict=True):
            changed = picture
            for name, magnitude in chain:
                changed = autoaugment._apply_op(
                    changed, name, magnitude, InterpolationMode.BILINEAR, None
                )
            mixed.add_(share * torch.from_numpy(np.array(changed)))
        same(ours.apply(picture, (shares, chains)), mixed.to(torch.uint8).numpy())
    depths = [len(chain) for _ in range(500) for chain in ours.sample(8, 8, rng)[1]]
    assert np.abs(np.bincount(depths)[1:] / len(depths) - 1 / 3).max() < 0.05
    drawn = [pair for _ in range(500) for chain in ours.sample(9, 9, rng)[1] for pair in chain]
    steps = {abs(magnitude) for name, magnitude in drawn if name == "Rotate"}
    assert steps == set(map(float, space["Rotate"][0][:3]))


def test_vertical_flip_and_grayscale_are_torchvisions(torchvision, pictures, rng):
    from torchvision.transforms import functional as F

    for picture in pictures:
        same(RandomVerticalFlip().apply(picture, True), F.vflip(picture))
        same(RandomVerticalFlip(1.0).in_chain(np.asarray(picture), rng), F.vflip(picture))
        same(RandomVerticalFlip(0.0)(picture, rng), picture)
        same(RandomGrayscale().apply(picture, True), F.to_grayscale(picture, 3))
        same(RandomGrayscale(0.0)(picture, rng), picture)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_rotation_and_affine_maps_give_torchvisions_pixels(
    torchvision, pictures, rng, interpolation
):
    from torchvision.transforms import InterpolationMode, functional as F

    mode = InterpolationMode(interpolation)
    rotation = RandomRotation(75, interpolation, fill=7)
    affine = RandomAffine((-40, 100), (0.2, 0.4), (0.5, 1.6), (-20, 30, 0, 15), interpolation, 9)
    for picture in pictures:
        size = picture.height, picture.width
        for _ in range(4):
            angle = rotation.sample(*size, rng)
            same(rotation.apply(picture, angle), F.rotate(picture, angle, mode, fill=7))
            drawn = angle, shift, scale, shear = affine.sample(*size, rng)
            expected = F.affine(picture, angle, list(shift), scale, list(shear), mode, 9)
            same(affine.apply(picture, drawn), expected)


def test_affine_maps_are_drawn_from_torchvisions_distribution(torchvision, rng):
    import torch
    from torchvision import transforms as theirs_of

    torch.manual_seed(0)
    options = {"degrees": 30, "translate": (0.2, 0.4), "scale": (0.5, 1.5), "shear": (-20, 10)}
    ours, theirs = RandomAffine(**options), theirs_of.RandomAffine(**options)

    def flat(angle, shift, scale, shear):
        return [angle, *shift, scale, *shear]

    a = np.array([flat(*ours.sample(60, 90, rng)) for _ in range(4000)])
    parts = theirs.degrees, theirs.translate, theirs.scale, theirs.shear
    b = np.array([flat(*theirs.get_params(*parts, [90, 60])) for _ in range(4000)])
    spread = b.std(0) + 1e-9
    assert (np.abs(a.mean(0) - b.mean(0)) / spread).max() < 0.08
    np.testing.assert_allclose(a.std(0), b.std(0), rtol=0.05, atol=1e-9)
    assert RandomAffine(shear=5).sample(9, 9, rng)[3][1] == 0.0


@pytest.mark.parametrize(("size", "sigma"), [(3, 0.1), (5, 0.8), (23, 2.0)])
def test_gaussian_blur_gives_torchvisions_pixels(torchvision, pictures, size, sigma):
    from torchvision.transforms import functional as F

    apart = total = 0
    for picture in pictures:
        ours = np.asarray(GaussianBlur(size, sigma)(picture, np.random.default_rng(0)), np.int64)
        theirs = np.asarray(F.gaussian_blur(picture, [size, size], [sigma, sigma]), np.int64)
        assert np.abs(ours - theirs).max() <= 1
        apart, total = apart + (ours != theirs).sum(), total + ours.size
    assert apart <= 1e-4 * total  # sums of float32 at the middle of two whole numbers


def test_a_recipes_further_changes_and_policies_are_steps():
    recipe = get_recipe("resnet_v1").with_options(
        vertical_flip=0.5, rotation=10, policy="cifar10", grayscale=0.1, blur=0.2
    )
    steps = recipe_augment(recipe, 224).steps
    assert steps[2:] == (
        RandomVerticalFlip(0.5), RandomRotation(10, "bilinear"),
        AutoAugment("cifar10", "bilinear"), RandomGrayscale(0.1), GaussianBlur(23, p=0.2),
    )  # fmt: skip
    steps = (RandomCrop(8, padding=np.int64(2)), TrivialAugmentWide(np.int64(9)), *steps)
    again = Augment.from_config(json.loads(json.dumps(Augment(steps).get_config())))
    assert again == Augment(steps)
    for policy, kind in (("augmix", AugMix), ("ra", RandAugment), ("svhn", AutoAugment)):
        steps = recipe_augment(recipe.with_options(policy=policy), 64).steps
        assert type(steps[4]) is kind


def test_what_turns_images_has_three_interpolations():
    for make in (RandomAffine, AutoAugment, AugMix, RandAugment, TrivialAugmentWide):
        with pytest.raises(InputError, match="Received: 'lanczos'"):
            make(interpolation="lanczos")
    recipe = get_recipe("resnet_v1").with_options(interpolation="lanczos", rotation=10, policy="ra")
    steps = recipe_augment(recipe, 32).steps
    assert [step.interpolation for step in steps if hasattr(step, "interpolation")] == [
        "lanczos", "bicubic", "bicubic",
    ]  # fmt: skip


def test_a_sheet_shows_what_the_first_epochs_train_on(tmp_path, monkeypatch, rng):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    drawn = []
    monkeypatch.setattr(plots, "picture_grid", lambda images, *_, **__: drawn.extend(images))
    options = {"model": "resnet_tiny", "image_size": 16, "val_split": 0, "rotation": 30}
    options |= {"recipe": get_recipe("cifar").with_options(random_erasing=1.0), "seed": 5}
    kr.augment_sheet(tmp_path / "images", "x.png", images=8, versions=2, **options)
    recipe, seed = options.pop("recipe"), options.pop("seed")
    data = prepare_data(tmp_path / "images", recipe.with_options(**options), seed=seed).train
    data.output = "uint8"
    for epoch in range(2):
        count = 0
        for batch in data.batches():
            for image, sample in zip(batch.images, batch.indices, strict=True):
                same(drawn[3 * sample + 1 + epoch], image)
                count += 1
        assert count == 8
        data.on_epoch_end()
    with pytest.raises(InputError, match="changes no image"):
        kr.augment_sheet(tmp_path / "images", "x.png", model="resnet_tiny", crop="none", flip=0)


def test_random_erasing_gives_torchvisions_pixels_after_normalisation(torchvision, rng):
    import torch
    from torchvision.transforms import functional as F

    erasing = RandomErasing(p=1.0)
    picture = rng.standard_normal((40, 50, 3)).astype(np.float32)
    for _ in range(50):
        window = erasing.sample(40, 50, rng)
        expected = F.erase(
            torch.from_numpy(picture).permute(2, 0, 1), *window, torch.zeros(1, 1, 1)
        )
        same(erasing.apply(picture, window), expected.permute(1, 2, 0))


def test_random_erasing_draws_from_torchvisions_distribution(torchvision, rng):
    import torch
    from torchvision import transforms

    torch.manual_seed(0)
    erasing, tensor = RandomErasing(p=0.25), torch.zeros(3, 224, 224)
    drawn = [erasing.sample(224, 224, rng) for _ in range(8000)]
    assert abs(np.mean([window is not None for window in drawn]) - 0.25) < 0.02
    ours = np.array([window for window in drawn if window is not None])
    draw = transforms.RandomErasing.get_params
    theirs = np.array([draw(tensor, erasing.scale, erasing.ratio, [0.0])[:4] for _ in range(2000)])
    for column in range(4):
        grid = np.arange(225)
        ours_cdf = np.searchsorted(np.sort(ours[:, column]), grid, "right") / len(ours)
        theirs_cdf = np.searchsorted(np.sort(theirs[:, column]), grid, "right") / 2000
        assert np.abs(ours_cdf - theirs_cdf).max() < 1.63 * math.sqrt(1 / len(ours) + 1 / 2000)


def test_gray_pictures_pass_through_every_transform(rng):
    gray = rng.integers(0, 256, (40, 50, 1), np.uint8)
    chain = Augment(
        [Resize(36), RandomCrop(32, 4), ColorJitter(0.2, 0.2, 0.2, 0.1), RandAugment(8)]
    )
    for _ in range(20):
        assert chain(gray, rng).shape == (32, 32, 1)


# --- chains ---------------------------------------------------------------------------------------


def test_a_chain_equals_its_steps_and_survives_json(pictures):
    chain = Augment(
        [
            RandomResizedCrop(64),
            RandomHorizontalFlip(),
            ColorJitter(0.1, hue=(0.0, 0.2)),
            TrivialAugmentWide(interpolation="bilinear"),
            RandomErasing(0.1),
        ]
    )
    again = Augment.from_config(json.loads(json.dumps(chain.get_config())))
    assert again == chain and repr(again) == repr(chain) and chain.output_size == (64, 64)
    assert chain != Augment([RandomResizedCrop(64)])
    for picture in pictures:
        rng, step_rng = np.random.default_rng(3), np.random.default_rng(3)
        expected = picture
        for step in chain.steps:
            expected = step(expected, step_rng)
        same(again(picture, rng), expected)
        same(again(np.asarray(picture), np.random.default_rng(3)), expected)


def test_wrong_chains_are_refused():
    with pytest.raises(InputError, match="last"):
        Augment([RandomErasing(), RandomHorizontalFlip()])
    with pytest.raises(InputError, match="RandomCrop"):
        Augment([{"name": "RandomCrp", "size": 3}])
    with pytest.raises(InputError, match="takes"):
        Augment([{"name": "RandomCrop", "sise": 3}])
    with pytest.raises(InputError, match="transforms"):
        Augment([lambda picture: picture])


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomResizedCrop(0),
        lambda: RandomResizedCrop(8, scale=(0.5, 0.1)),
        lambda: RandomHorizontalFlip(1.5),
        lambda: RandomCrop(8, padding=-1),
        lambda: ColorJitter(hue=0.7),
        lambda: ColorJitter(-1),
        lambda: TrivialAugmentWide(interpolation="cubic"),
        lambda: RandAugment(magnitude=31),
        lambda: RandomErasing(scale=(0.1, 2.0)),
        lambda: Mix(0.0, 0.0),
        lambda: Mix(-1.0),
    ],
)
def test_arguments_that_cannot_work_raise_input_error(make):
    with pytest.raises(InputError):
        make()


# --- batches --------------------------------------------------------------------------------------


def mixed_by_torchvision(transform, images, labels, parameters):
    import torch

    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    y = torch.from_numpy(labels)
    given = {"labels": y, "batch_size": len(images), **parameters}
    mixed = transform.transform(x, given).permute(0, 2, 3, 1).numpy()
    return mixed, transform.transform(y, given).numpy()


def test_mixup_and_cutmix_equal_torchvisions(torchvision, rng):
    from torchvision.transforms import v2

    images = rng.standard_normal((6, 20, 30, 3)).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 6)]
    seen = set()
    for _ in range(60):
        mix = Mix(0.2, 1.0)
        kind, share, box = mix.sample(20, 30, rng)
        seen.add(kind)
        if kind == "mixup":
            transform, parameters = v2.MixUp(num_classes=4), {"lam": share}
        else:
            transform, parameters = v2.CutMix(num_classes=4), {"box": box, "lam_adjusted": share}
        expected = mixed_by_torchvision(transform, images, labels, parameters)
        got = mix.apply(images, labels, (kind, share, box))
        np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=1e-6)
        np.testing.assert_allclose(got[1].sum(1), 1, atol=1e-6)
    assert seen == {"mixup", "cutmix"}


def test_mixing_uint8_rounds_to_the_nearest_pixel_value(rng):
    images = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    labels = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    mixed, _ = Mix(1.0).apply(images, labels, ("mixup", 0.3, None))
    assert mixed.dtype == np.uint8
    exact = 0.3 * images + 0.7 * np.roll(images, 1, 0).astype(float)
    assert np.abs(mixed - exact).max() <= 0.5 + 1e-4


def test_mixing_leaves_its_input_alone(rng):
    images = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    labels = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    before = images.copy(), labels.copy()
    for seed in range(8):
        Mix(0.5, 0.5)(images, labels, np.random.default_rng(seed))
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_smoothed_labels_give_torchs_label_smoothing_loss(rng):
    torch = pytest.importorskip("torch")
    logits = torch.from_numpy(rng.standard_normal((5, 7)))
    classes = rng.integers(0, 7, 5)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, torch.from_numpy(classes))
    soft = torch.from_numpy(smooth_labels(np.eye(7)[classes], 0.1))
    loss = -(soft * torch.log_softmax(logits, 1)).sum(1).mean()
    assert abs(float(loss - expected)) < 1e-7


def test_repeated_augmentation_deals_out_as_ra_sampler():
    # What torchvision's references/classification/sampler.py yields for 600 samples, 3
    # repetitions and 1 replica: every index three times, floor(600/256)*256 of them.
    order = np.random.default_rng(0).permutation(600)
    tripled = [int(i) for i in order for _ in range(3)]
    assert repeated_augmentation(order, 3).tolist() == tripled[:512]
    assert repeated_augmentation(order[:100], 3).tolist() == np.repeat(order[:34], 3)[:100].tolist()
