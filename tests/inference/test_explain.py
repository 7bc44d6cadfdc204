"""Heat maps equal pytorch-grad-cam's on the same weights, on every backend and for every row."""

from __future__ import annotations

import gc
import importlib

import keras
import numpy as np
import pytest
from PIL import Image
from rounding import allowed

import keras_resnet as kr
from keras_resnet.cli import main as cli
from keras_resnet.inference.grad_cam import resized
from keras_resnet.system.errors import DataError, InputError
from keras_resnet.variants import SPECS, list_models

SIDES = {"alexnet": 128, "alexnet_paper": 224, "resnet34_cifar10": 64}


def side_of(name):
    spec = SPECS[name]
    return SIDES.get(name, 64 if spec.input_size > 64 else 32)


def randomised(model, seed=0):
    """A torch model whose batch norms have statistics as after a training."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # it would overwrite what the package has kept of a convolution
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.6, 1.6),
                (module.weight.data, 0.6, 1.4), (module.bias.data, -0.2, 0.2),
            ):  # fmt: skip
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def library(model, target_layer, images, classes, change=lambda x: x):
    """pytorch-grad-cam's answer for images `(n, height, width, 3)`, which `change` may nudge."""
    import torch

    pytest.importorskip("ttach", reason="pytorch-grad-cam needs it")
    package = pytest.importorskip("pytorch_grad_cam", reason="pip install --no-deps grad-cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    wanted = None if classes is None else [targets.ClassifierOutputTarget(int(c)) for c in classes]
    x = change(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    with package.GradCAM(model, [target_layer]) as cam:
        return cam(input_tensor=x, targets=wanted)


def difference(a, b):
    assert a.shape == b.shape and a.dtype == np.float32
    assert a.min() >= 0 and a.max() <= 1
    assert (a.std(axis=(1, 2)) > 0.01).sum() >= 2  # maps of one value would agree with anything
    return float(np.abs(a - b).max())


def assert_the_packages(maps, theirs, layer, images, classes):
    """Equal to pytorch-grad-cam's, as closely as its own are to each other (see `rounding.py`)."""
    expected = library(theirs, layer, images, classes)
    found = difference(maps, expected)

    def again(change):
        return library(theirs, layer, images, classes, change)

    assert found <= allowed(1e-3, found, again, expected, difference)


# --- against pytorch-grad-cam --------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(torchvision):
    """Torchvision's model with random batch norms and ours with the same weights, built once."""
    made = {}

    def make(name):
        if name not in made:
            import torch

            made.clear()  # one at a time
            gc.collect()
            torch.manual_seed(0)
            side = {"alexnet": 128}.get(name, 96)
            theirs = randomised(getattr(torchvision.models, name)(num_classes=11))
            ours = kr.create_model(name, num_classes=11, input_shape=(side, side, 3))
            kr.load_torchvision(ours, theirs)
            images = np.random.default_rng(0).normal(size=(3, side, side, 3)).astype("float32")
            made[name] = theirs, ours, images
        return made[name]

    return make


def target_of(theirs):
    """The layer that the package's own README names for the architecture."""
    return theirs.features[-1] if hasattr(theirs, "features") else theirs.layer4[-1]


# A backend has its own way to a gradient, which blocks do not change: two networks will do there.
DEEP = pytest.mark.long("tensorflow", "jax")


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("resnet50", marks=DEEP),
        pytest.param("resnext50_32x4d", marks=DEEP),
        "alexnet",
    ],
)
@pytest.mark.slow
def test_maps_equal_the_packages(pair, name):
    theirs, ours, images = pair(name)
    for classes in (None, [4, 0, 10]):
        maps = kr.grad_cam(ours, images, classes)
        assert_the_packages(maps, theirs, target_of(theirs), images, classes)


@pytest.mark.parametrize(
    ("name", "layer", "path"),
    [  # the cut is the same on every backend
        pytest.param("resnet18", "layer3_1_bn2", "layer3.1", marks=DEEP),
        ("resnet18", "layer4_1_conv2", "layer4.1.conv2"),  # a shortcut leads around it
        pytest.param("resnet18", "layer2_0_downsample_1", "layer2.0.downsample.1", marks=DEEP),
        pytest.param("alexnet", "features_8", "features.8", marks=DEEP),
    ],
)
@pytest.mark.slow
def test_any_layer_can_be_looked_at(pair, name, layer, path):
    theirs, ours, images = pair(name)
    for given in (layer, ours.get_layer(layer)):
        maps = kr.grad_cam(ours, images, [1, 2, 3], given)
        assert_the_packages(maps, theirs, theirs.get_submodule(path), images, [1, 2, 3])


def test_pictures_of_any_shape(torchvision):
    import torch

    torch.manual_seed(0)
    theirs = randomised(torchvision.models.resnet18(num_classes=4))
    ours = kr.create_model("resnet18", num_classes=4, input_shape=(None, None, 3))
    kr.load_torchvision(ours, theirs)
    images = np.random.default_rng(1).normal(size=(2, 97, 131, 3)).astype("float32")
    maps = kr.grad_cam(ours, images)
    assert maps.shape == (2, 97, 131)
    assert difference(maps, library(theirs, theirs.layer4[-1], images, None)) < 1e-3


def test_channels_first_gives_the_same_map(pair, backend):
    if backend != "torch":
        pytest.skip("the other backends run no channels_first convolution on a CPU")
    theirs, ours, images = pair("resnet18")
    expected = kr.grad_cam(ours, images, 3)
    keras.config.set_image_data_format("channels_first")
    try:
        first = kr.create_model("resnet18", num_classes=11, input_shape=(3, 96, 96))
        kr.load_torchvision(first, theirs)
        maps = kr.grad_cam(first, images.transpose(0, 3, 1, 2), 3)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert difference(maps, expected) < 1e-5


@pytest.mark.once
def test_enlarging_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for small, large in [
        ((7, 7), (224, 224)),
        ((3, 5), (97, 131)),
        ((6, 4), (6, 4)),
        ((9, 8), (5, 3)),
    ]:
        values = rng.random(small, dtype=np.float32)
        expected = cv2.resize(values, large[::-1])
        np.testing.assert_allclose(resized(values, large), expected, atol=1e-5)


# --- every row, and what models may be -----------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_the_last_map_of_every_row_is_found(name, backend):
    spec = SPECS[name]
    if backend != "torch" and name not in ("resnet20", "resnet34_cifar10", "alexnet_cifar10"):
        pytest.skip("the cut is the same on every backend; test_models.py looks at every row's")
    deep = hasattr(spec, "blocks") and sum(spec.blocks) > 16
    if spec.input_size > 64 and (deep or name in ("resnetv2_34", "resnetv2_50")):
        pytest.skip("deeper rows of the same graphs: test_models.py looks at them")
    side = side_of(name)
    model = kr.create_model(name, num_classes=5, input_shape=(side, side, 3))
    rng = np.random.default_rng(0)
    maps = kr.grad_cam(model, rng.normal(size=(2, side, side, 3)).astype("float32"), [0, 4])
    assert maps.shape == (2, side, side) and maps.dtype == np.float32
    assert np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1


def small_model(**options):
    keras.utils.set_random_seed(3)
    model = kr.create_model("resnet_tiny", num_classes=4, input_shape=(32, 32, 3), **options)
    rng = np.random.default_rng(5)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(0, 0.1, shape))
            layer.moving_variance.assign(rng.uniform(0.6, 1.5, shape))
    return model


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3)).astype("float32")


def normalised(pixels):
    return kr.Preprocess(None, None).normalize(pixels).astype("float32")


def test_a_model_that_normalises_inside_sees_the_same(pixels):
    plain, inside = small_model(), small_model(include_preprocessing=True)
    inside.set_weights(plain.get_weights())
    expected = kr.grad_cam(plain, normalised(pixels), [0, 1, 2])
    assert difference(kr.grad_cam(inside, pixels, [0, 1, 2]), expected) < 1e-4
    assert difference(kr.grad_cam(inside, pixels.astype("uint8"), [0, 1, 2]), expected) < 1e-4


def test_a_folded_model_looks_at_the_same_places(pixels):
    model = small_model(include_preprocessing=True)
    folded = kr.optimize_for_inference(model)
    assert not any(isinstance(x, keras.layers.BatchNormalization) for x in folded.layers)
    expected = kr.grad_cam(model, pixels, [0, 1, 2])
    model.predict_on_batch(pixels)  # which folds inside, on torch, and leaves no trace here
    assert difference(kr.grad_cam(folded, pixels, [0, 1, 2]), expected) < 1e-4
    assert difference(kr.grad_cam(model, pixels, [0, 1, 2]), expected) < 1e-5


def test_a_softmax_at_the_end_is_looked_behind(pixels):
    logits = small_model()
    dense = small_model(classifier_activation="softmax")
    dense.set_weights(logits.get_weights())
    expected = kr.grad_cam(logits, pixels / 20, [3, 2, 1])  # large inputs: certain answers
    layers = keras.Sequential([keras.Input((32, 32, 3)), logits, keras.layers.Softmax()])
    activation = keras.Model(logits.input, keras.layers.Activation("softmax")(logits.output))
    for model in (dense, layers, activation):
        assert difference(kr.grad_cam(model, pixels / 20, [3, 2, 1]), expected) < 1e-3


def test_models_may_be_nested(pixels):
    model = small_model()
    expected = kr.grad_cam(model, pixels / 255, 1)
    wrapped = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), model])
    assert difference(kr.grad_cam(wrapped, pixels, 1), expected) < 1e-4
    inner = kr.grad_cam(model, pixels / 255, 1, "layer2_0_bn2")
    found = difference(kr.grad_cam(wrapped, pixels, 1, "layer2_0_bn2"), inner)

    def again(change):
        return kr.grad_cam(model, change(pixels / 255), 1, "layer2_0_bn2")

    assert found <= allowed(1e-4, found, again, inner, difference)

    backbone = kr.create_model("resnet_tiny", include_top=False, input_shape=(32, 32, 3))
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
    new = keras.Sequential([keras.Input((32, 32, 3)), backbone, *head])
    assert kr.grad_cam(new, pixels / 255, 1).shape == (3, 32, 32)


def test_the_weights_and_their_gradients_are_left_alone(pixels, backend):
    model = small_model()
    before = [w.copy() for w in model.get_weights()]
    first = kr.grad_cam(model, pixels / 255)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    if backend == "torch":
        assert all(p.grad is None for p in model.parameters())
    np.testing.assert_array_equal(kr.grad_cam(model, pixels / 255), first)


def test_new_weights_are_seen(pixels):
    model = small_model()
    before = kr.grad_cam(model, pixels / 255, 0)
    model.layers[-1].kernel.assign(-model.layers[-1].kernel)
    assert np.abs(kr.grad_cam(model, pixels / 255, 0) - before).max() > 0.1


def test_batches_do_not_matter(pixels):
    model = small_model()
    whole = kr.grad_cam(model, pixels / 255)
    np.testing.assert_allclose(kr.grad_cam(model, pixels / 255, batch_size=2), whole, atol=1e-4)
    np.testing.assert_allclose(kr.grad_cam(model, pixels[1:2] / 255), whole[1:2], atol=1e-4)
    assert kr.grad_cam(model, pixels[:0]).shape == (0, 32, 32)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_looks_at_the_same_places(pixels, policy):
    full = small_model(include_preprocessing=True)
    keras.config.set_dtype_policy(policy)
    try:
        mixed = small_model(include_preprocessing=True)
    finally:
        keras.config.set_dtype_policy("float32")
    mixed.set_weights(full.get_weights())
    a, b = kr.grad_cam(full, pixels, [0, 1, 2]), kr.grad_cam(mixed, pixels, [0, 1, 2])
    assert b.dtype == np.float32
    for one, other in zip(a, b, strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98


def test_torchs_inference_mode_is_no_obstacle(pixels, backend):
    if backend != "torch":
        pytest.skip("torch only")
    import torch

    model = small_model()
    expected = kr.grad_cam(model, pixels / 255)
    with torch.inference_mode():
        np.testing.assert_array_equal(kr.grad_cam(model, pixels / 255), expected)


def test_nothing_that_speaks_for_a_class_is_zero_and_no_warning(pixels, recwarn):
    model = small_model()
    model.layers[-1].kernel.assign(np.zeros(model.layers[-1].kernel.shape))
    assert not kr.grad_cam(model, pixels).any()
    assert not [w for w in recwarn.list if issubclass(w.category, RuntimeWarning)]


# --- what cannot work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_index": 4}, "from 0 to 3"),
        ({"class_index": -1}, "from 0 to 3"),
        ({"class_index": [0, 1]}, r"one an image \(3\)"),
        ({"class_index": "cat"}, "whole number"),
        ({"layer": "layer2_0_bn3"}, "no layer 'layer2_0_bn3'. Did you mean 'layer2_0_bn2'"),
        ({"layer": "fc"}, "'fc' makes no feature map"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_arguments_say_what_is_possible(pixels, arguments, message):
    with pytest.raises(InputError, match=message):
        kr.grad_cam(small_model(), pixels, **arguments)


def test_bad_images_and_models(pixels):
    with pytest.raises(InputError, match=r"images\[None\]"):
        kr.grad_cam(small_model(), pixels[0])
    with pytest.raises(InputError, match="takes images of shape"):
        kr.grad_cam(small_model(), pixels[:, :16])
    with pytest.raises(InputError, match="no classification head"):
        kr.grad_cam(kr.create_model("resnet20", include_top=False), pixels)
    flat = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(4)]
    )
    with pytest.raises(InputError, match="no feature map"):
        kr.grad_cam(flat, pixels)


# --- drawing -------------------------------------------------------------------------------------


@pytest.mark.once
def test_an_overlay_colours_the_hot_and_leaves_the_cold():
    image = np.full((40, 40, 3), 90, np.uint8)
    heat = np.zeros((40, 40), np.float32)
    heat[10:20, 10:20] = 1
    drawn = kr.overlay(image, heat)
    assert drawn.dtype == np.uint8 and (drawn[30:, 30:] == 90).all()
    assert (np.abs(drawn[12:18, 12:18].astype(int) - 90).max(axis=-1) > 60).all()
    assert (kr.overlay(image, heat, alpha=0) == image).all()
    assert kr.overlay(image[..., :1], heat[::4, ::4]).shape == (40, 40, 3)


@pytest.mark.once
@pytest.mark.parametrize(
    ("image", "heat", "alpha"),
    [
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4)), 0.5),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4)), 0.5),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 1)), 0.5),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), 2),
    ],
)
def test_what_cannot_be_drawn_is_said(image, heat, alpha):
    with pytest.raises(InputError):
        kr.overlay(image, heat, alpha)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    model = small_model(include_preprocessing=True)
    model.info["class_names"] = ["ant", "bee", "<script>", "d\u202ee"]
    model.info["preprocess"] = kr.Preprocess((32, 32), None).get_config()
    path = tmp_path_factory.mktemp("model") / "m.keras"
    model.save(path)
    return path


def write_picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (50, 40, 3)).astype("uint8")
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.once
def test_explain_writes_overlays_and_prints_the_predictions(model_file, tmp_path, capsys):
    first = write_picture(tmp_path / "a" / "one.png")
    second = write_picture(tmp_path / "b" / "one.png", 1)  # the same name
    broken = tmp_path / "broken\n\x1b[31m.png"
    broken.write_bytes(b"no picture")
    output = tmp_path / "out"
    code = cli.main(
        ["explain", str(model_file), str(first), str(broken), str(second), "--class", "bee",
         "--output", str(output)]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0 and "1 of 3 images could not be read" in said.err
    assert "\x1b" not in said.out + said.err and "bee" in said.out
    assert sorted(p.name for p in output.iterdir()) == ["one-2.png", "one.png"]
    found = next(iter(kr.iter_explanations(model_file, first, class_name="bee")))
    assert found.class_name == "bee" and found.overlay().shape == (256, 256, 3)
    with Image.open(output / "one.png") as picture:  # the image, and beside it the heat map
        assert picture.width > 1.8 * picture.height > 600
    by_name = dict(next(iter(kr.iter_explanations(model_file, first, top=4))).prediction.classes)
    assert found.probability == pytest.approx(by_name["bee"], abs=1e-5)
    predicted = kr.predict(model_file, first)[0]
    assert [name for name, _ in found.prediction.classes] == [name for name, _ in predicted.classes]
    shares = [share for _, share in predicted.classes]
    assert [share for _, share in found.prediction.classes] == pytest.approx(shares, abs=1e-5)


def test_explaining_nothing_readable_is_an_error(model_file, tmp_path, capsys):
    broken = tmp_path / "x.png"
    broken.write_bytes(b"")
    assert cli.main(["explain", str(model_file), str(broken), "--output", str(tmp_path / "o")]) == 2
    with pytest.raises(DataError, match="nothing to draw"):
        next(iter(kr.iter_explanations(model_file, broken))).overlay()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "bees"], "Did you mean 'bee'"),
        (["--layer", "layer9"], "no layer 'layer9'"),
        (["--output", "FILE"], "is a file"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    model_file, tmp_path, capsys, arguments, message
):
    picture, other = (write_picture(tmp_path / name) for name in ("p.png", "other.png"))
    arguments = [str(other) if a == "FILE" else a for a in arguments]
    assert cli.main(["explain", str(model_file), str(picture), *arguments]) == 2
    err = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("keras-resnet:")
    ]
    assert len(err) == 1 and message in err[0]
