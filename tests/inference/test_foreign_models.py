"""Models that somebody built for themselves predict what they say, not what we would have built."""

import io

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image
from sklearn.metrics import average_precision_score

import keras_resnet as kr
from keras_resnet.cli import main as cli
from keras_resnet.runtimes.runner import Runner
from keras_resnet.system.errors import InputError

SHAPE = (16, 16, 3)
PREPARED = kr.Preprocess(SHAPE[:2], None)
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Dark ants, middling bees, bright cats: a model of the mean tells them apart."""
    folder = tmp_path_factory.mktemp("foreign") / "pictures"
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(60 * number, 60 * number + 60, SHAPE, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def batch(folder):
    paths = sorted(folder.glob("*/*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype("float32")


def build(*last, units=3, activation=None, front=None):
    """Its logits are lines over the mean brightness 0..255; each class has its range."""
    mean = layers.GlobalAveragePooling2D()
    dense = layers.Dense(units, activation=activation)
    body = [layers.Conv2D(1, 1), mean, dense, *last]
    model = keras.Sequential([keras.Input(SHAPE), front or layers.Rescaling(1 / 255), *body])
    body[0].set_weights([np.full((1, 1, 3, 1), 1 / 3), np.zeros(1)])
    slopes, lines = np.array([[-30.0, 0.0, 30.0]]), np.array([7.0, 0.0, -14.0])
    dense.set_weights([slopes[:, :units] if units > 1 else slopes[:, 2:], lines[3 - units :]])
    return model


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


def shown(predictions, names):
    """Probabilities in the order of the classes."""
    return np.array([[dict(one.classes)[name] for name in names] for one in predictions])


def named(model, names=NAMES):
    model.info = {"class_names": list(names), "preprocess": PREPARED.get_config()}
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: build(layers.Softmax()),
        lambda: build(activation="softmax"),
        lambda: keras.Sequential([keras.Input(SHAPE), build(activation="softmax")]),
    ],
)
def test_a_softmax_is_taken_once(wrap, pictures):
    expected = softmax(np.asarray(build().predict_on_batch(batch(pictures))))
    found = shown(kr.predict(named(wrap()), pictures, workers=0), NAMES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_three_sigmoids_are_shown_as_they_are(pictures):
    model = named(build(activation="sigmoid"))
    own = np.asarray(model.predict_on_batch(batch(pictures)))
    np.testing.assert_allclose(shown(kr.predict(model, pictures), NAMES), own, atol=1e-6)
    result = kr.evaluate(model, pictures)
    true = np.repeat([0, 1, 2], 3)
    hits = np.eye(3)[true]
    assert result.top1 == np.mean(((own >= 0.5) == hits).all(1))  # each class for itself
    precision = average_precision_score(hits, own)
    assert result.headline == ("mean average precision", pytest.approx(precision))
    p = np.clip(own.astype(float), 1e-12, 1 - 1e-12)
    loss = -(hits * np.log(p) + (1 - hits) * np.log(1 - p)).mean()
    assert result.loss == pytest.approx(loss, rel=1e-3)


def test_one_sigmoid_speaks_for_the_second_class(pictures, tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("ant", "cat"):
        (tmp_path / "two" / name).symlink_to(pictures / name)
    paths = [*sorted((pictures / "ant").iterdir()), *sorted((pictures / "cat").iterdir())]
    for last in ({"activation": "sigmoid"}, {}):  # and its logit
        model = named(build(units=1, **last), ["ant", "cat"])
        p = np.asarray(model.predict_on_batch(batch(pictures)))[[0, 1, 2, 6, 7, 8], 0]
        p = p if last else 1 / (1 + np.exp(-p))
        found = shown(kr.predict(model, paths), ["ant", "cat"])
        np.testing.assert_allclose(found, np.stack([1 - p, p], axis=1), atol=1e-5)
        assert kr.open_runner(model).num_classes == 2
    dataset = kr.image_dataset_from_directory(
        pictures, class_names=["ant", "cat"], shuffle=False, preprocess=PREPARED
    )
    result = kr.evaluate(model, dataset)
    assert result.top1 == 1.0 and result.confusion.tolist() == [[3, 0], [0, 3]]
    assert result.loss == pytest.approx(-np.log([*(1 - p[:3]), *p[3:]]).mean(), rel=1e-3)


def test_heat_maps_look_behind_the_sigmoid(rng):
    x = keras.Input(SHAPE)
    maps = layers.Conv2D(4, 3, activation="relu")(x)
    logit = layers.Dense(1)(layers.GlobalAveragePooling2D()(maps))
    images = rng.normal(size=(2, *SHAPE)).astype("float32")
    logits = keras.Model(x, layers.Concatenate()([-logit, logit]))
    for end in (layers.Activation("sigmoid")(logit), keras.ops.sigmoid(logit)):
        model = keras.Model(x, end)
        for index in (0, 1, None):
            expected = kr.grad_cam(logits, images, index)
            np.testing.assert_allclose(kr.grad_cam(model, images, index), expected, atol=1e-5)


def test_a_head_that_is_a_model_is_looked_behind(rng):
    features = keras.Input((4,))
    head = keras.Model(features, layers.Softmax()(layers.Dense(3)(features)))
    x = keras.Input(SHAPE)
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(x))
    model, logits = keras.Model(x, head(pooled)), keras.Model(x, head.layers[1](pooled))
    images = rng.normal(size=(2, *SHAPE)).astype("float32")
    np.testing.assert_allclose(
        kr.grad_cam(model, images, 1), kr.grad_cam(logits, images, 1), atol=1e-5
    )


def test_a_model_that_normalises_inside_is_fed_pixels_whatever_it_says(pictures):
    images, true = batch(pictures), np.repeat([0, 1, 2], 3)
    x = keras.Input(SHAPE)
    inner = build()
    model = kr.ImageModel(x, inner(x), info={"preprocess": PREPARED.get_config()})
    own = np.asarray(model.predict_on_batch(images))
    assert (own.argmax(1) == true).all()
    np.testing.assert_allclose(shown(kr.predict(model, pictures), "012"), softmax(own), atol=1e-5)
    result = kr.evaluate(model, pictures)  # without names they are the folder's
    assert result.top1 == 1.0 and result.class_names == NAMES
    assert kr.evaluate(model, pictures, pixels="normalized").top1 < 1
    wrong = kr.image_dataset_from_directory(
        pictures, shuffle=False, preprocess=PREPARED, output="float32"
    )
    with pytest.raises(InputError, match="Received: a dataset of output='float32'"):
        kr.evaluate(model, wrong)


def test_a_model_of_0_to_1_is_fed_that(pictures):
    model = build(front=layers.Normalization(mean=[0.5] * 3, variance=[0.25] * 3))
    expected = softmax(np.asarray(model.predict_on_batch(batch(pictures) / 255)))
    found = shown(kr.predict(named(model), pictures), NAMES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.once
def test_pixels_can_be_said(pictures, tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = build()

        def call(self, x):
            return self.body(x)

    x = keras.Input(SHAPE)
    model = kr.ImageModel(x, Net()(x), info=named(build()).info)
    with pytest.raises(InputError, match="say pixels="):
        kr.predict(model, pictures)
    expected = softmax(np.asarray(model.predict_on_batch(batch(pictures))))
    found = shown(kr.predict(model, pictures, pixels="0..255"), NAMES)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="pixels must be None"):
        kr.predict(model, pictures, pixels="255")


@pytest.mark.once
def test_layers_that_cannot_be_copied_are_run_as_they_are(pictures):
    class Shift(layers.Layer):
        def __init__(self, by):  # and no get_config
            super().__init__()
            self.by = by

        def call(self, x):
            return x + self.by(x)

    x = keras.Input(SHAPE)
    y = Shift(lambda x: 0 * x)(layers.Rescaling(1 / 255)(x))
    y = layers.BatchNormalization()(layers.Conv2D(4, 3)(y))
    model = keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(y)))
    expected = softmax(np.asarray(model.predict_on_batch(batch(pictures))))
    found = shown(kr.predict(named(model), pictures), NAMES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.once
def test_names_that_are_too_few_are_said(pictures):
    with pytest.raises(InputError, match="has 3 classes and info"):
        kr.predict(named(build(), ["ant", "bee"]), pictures)


@pytest.mark.once
def test_labels_of_a_dataset_go_by_name(pictures):
    model = named(build())
    dataset = kr.image_dataset_from_directory(
        pictures, class_names=["bee", "cat"], shuffle=False, preprocess=PREPARED
    )
    assert kr.evaluate(model, dataset).top1 == 1.0


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "output", "task"),
    [
        ({"activation": "sigmoid"}, "probabilities", "multi-label"),
        ({"units": 1, "activation": "sigmoid"}, "probabilities", "binary"),
        ({"units": 1}, "logits", "binary"),
    ],
)
def test_an_exported_file_says_the_same(options, output, task, pictures, tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    count = options.get("units", 3)
    model = named(build(**options), NAMES if count == 3 else NAMES[:2])
    kr.export(model, tmp_path / "m.onnx", pictures=pictures)
    assert onnx.load(tmp_path / "m.onnx").graph.output[0].name == output
    runner = kr.open_runner(tmp_path / "m.onnx")
    assert (runner.task, runner.num_classes, runner.pixels) == (task, max(2, count), "0..255")
    names = runner.info["class_names"]
    expected = shown(kr.predict(model, pictures), names)
    found = shown(kr.predict(runner, pictures), names)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.once
def test_numbers_of_another_kind_are_exported_and_not_taken_for_classes(pictures, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    kr.export(build(units=1), tmp_path / "m.onnx", pictures=pictures)  # a regression, say
    with pytest.raises(InputError, match="cannot be told what the outputs"):
        kr.open_runner(tmp_path / "m.onnx")


@pytest.mark.once
@pytest.mark.parametrize(
    ("last", "task"), [("Softmax", "single-label"), ("Sigmoid", "multi-label")]
)
def test_somebody_elses_file_is_read_by_its_numbers(last, task, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    end = torch.nn.Softmax(1) if last == "Softmax" else torch.nn.Sigmoid()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3), end)
    torch.onnx.export(net, torch.zeros(1, 3, 4, 4), tmp_path / "theirs.onnx", dynamo=False)
    runner = kr.open_runner(tmp_path / "theirs.onnx")
    assert (runner.task, runner.gives_probabilities) == (task, True)


class Two(Runner):
    """Somebody's own runner, which says nothing but what 0.1 asked for."""

    name = model_name = "two"
    num_classes = 2
    gives_probabilities = True

    def __init__(self):
        self.info = {}

    def outputs(self, images):
        return np.tile([[0.25, 0.75]], (len(images), 1))


@pytest.mark.once
def test_a_runner_of_ones_own_says_probabilities_as_before(pictures):
    found = kr.predict(Two(), pictures / "ant" / "0.png", preprocess=PREPARED)
    assert found[0].classes == [("1", pytest.approx(0.75)), ("0", pytest.approx(0.25))]


# --- images in memory ----------------------------------------------------------------------------


def with_gradient(pixels):
    tensor = keras.ops.convert_to_tensor(pixels.astype("float32"))
    return tensor.requires_grad_() if keras.backend.backend() == "torch" else tensor


@pytest.mark.once
def test_images_may_be_arrays_pillow_images_and_bytes(pictures, tmp_path):
    model = named(build())
    path = pictures / "bee" / "0.png"
    expected = kr.predict(model, path)[0].classes
    pixels = np.asarray(Image.open(path))
    given = [
        pixels,
        pixels[None],
        pixels.astype("float32"),  # as keras.utils.img_to_array gives it
        pixels.astype("int64"),
        keras.ops.convert_to_tensor(pixels),
        with_gradient(pixels),
        Image.open(path),
        Image.fromarray(pixels),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
    ]
    for one in given:
        assert kr.predict(model, one)[0].classes == expected
    given[-1].seek(0)
    found = kr.predict(model, [*given, path], batch_size=4, workers=1)
    for one in found:
        assert dict(one.classes) == pytest.approx(dict(expected), abs=1e-6)
    assert [one.path for one in found[:6]] == [f"image {i}" for i in range(1, 7)]
    assert found[6].path == found[-1].path == str(path)  # Pillow knows where it was opened
    assert len(kr.predict(model, np.stack([pixels] * 3))) == 3
    broken = kr.predict(
        model, [b"no image", pixels, Image.open(io.BytesIO(path.read_bytes()[:200]))]
    )
    assert [bool(one.classes) for one in broken] == [False, True, False]
    for _ in range(2):  # names alone are no reason to go on with
        written = kr.predict(model, [pixels, pixels], output=tmp_path / "a.csv")
        assert written.count == 2 and written.resumed == 0
    kr.save_predictions(found, tmp_path / "sheet.png")
    shown = next(iter(kr.iter_explanations(model, pixels)))
    assert shown.prediction.path == "image 1" and shown.heatmap is not None


@pytest.mark.once
@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.full((16, 16, 3), 0.5, "float32"), r"Received: float32, 0\.5 to 0\.5"),
        (np.full((16, 16, 3), -1.0), "whole pixel values 0 to 255"),
        (np.full((16, 16, 3), 256), "int64, 256 to 256"),
        (np.zeros((16, 16, 3), bool), "Received: bool"),
        (np.zeros((3, 16, 16), "uint8"), "height, width"),
        (np.zeros((0, 16, 3), "uint8"), "height, width"),
        (5, "Received: int"),
        ([None], "Received: NoneType"),
    ],
)
def test_arrays_of_other_numbers_are_refused(image, told):
    with pytest.raises(InputError, match=told):
        kr.predict(named(build()), image)


@pytest.mark.once
@pytest.mark.parametrize("inside", [True, False])
def test_heat_maps_take_images_as_predict_does(inside, pictures):
    model = kr.create_model("resnet_tiny", include_preprocessing=inside, input_shape=SHAPE)
    model.info["preprocess"] = PREPARED.get_config()
    path = pictures / "cat" / "0.png"
    pixels = PREPARED.pixels(path)
    expected = kr.grad_cam(model, (pixels if inside else PREPARED(path))[None].astype("float32"))
    for one in (path, str(path), path.read_bytes(), Image.open(path), [Image.open(path)], pixels,
                pixels[None]):  # fmt: skip
        np.testing.assert_array_equal(kr.grad_cam(model, one), expected)


# --- by a variant's name -------------------------------------------------------------------------


@pytest.mark.once
def test_a_variants_name_stands_for_its_published_weights(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def published(name, weights):
        asked.append((name, weights))
        return named(build())

    monkeypatch.setattr("keras_resnet.models.files.create_model", published)
    path = str(pictures / "cat" / "0.png")
    assert cli.main(["predict", "resnet18", path]) == 0
    assert "cat" in capsys.readouterr().out and asked == [("resnet18", "DEFAULT")]
    assert kr.predict("ResNet18", path)[0].classes[0][0] == "cat"
    assert cli.main(["predict", "resnet20", path]) == 2
    assert "publishes no weights for 'resnet20'" in capsys.readouterr().err
    assert cli.main(["explain", "resnet81", path]) == 2
    assert "Did you mean 'resnet18'" in capsys.readouterr().err
    assert len(asked) == 2
