"""What a model takes and what its outputs say is read off its graph, whoever built it."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_resnet as kr
from keras_resnet.models.meaning import Meaning, meaning_of, meaning_of_numbers, pixels_of
from keras_resnet.system.errors import InputError

SHAPE = (16, 16, 3)


def sequential(*last):
    return keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), *last]
    )


def functional(function, units=3, activation=None):
    """A model whose last dense layer's output goes through a function."""
    body = sequential(layers.Dense(units, activation=activation))
    return keras.Model(body.inputs[0], function(body.outputs[0]))


def convolutional(activation, *last):
    return keras.Sequential([keras.Input(SHAPE), layers.Conv2D(3, 1, activation=activation), *last])


def ensemble(join, activation):
    x = keras.Input(SHAPE)
    members = [sequential(layers.Dense(3, activation=activation)) for _ in range(2)]
    return keras.Model(x, join([member(x) for member in members]))


def nested(model):
    return keras.Sequential([keras.Input(SHAPE), layers.Rescaling(1 / 255), model])


class Subclassed(keras.Model):
    def __init__(self, activation):
        super().__init__()
        self.body = sequential(layers.Dense(3, activation=activation))

    def call(self, x):
        return self.body(x)


class Similarity(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return ops.matmul(x, self.kernel)


def wrapped(model):
    x = keras.Input(SHAPE)
    return keras.Model(x, model(x))


def informed(model, **info):
    model.info = info
    return model


def by_hand(x):
    exps = ops.exp(x)
    return exps / ops.sum(exps, axis=-1, keepdims=True)


LOGITS, SOFTMAX = Meaning("single-label", False), Meaning("single-label", True)
BINARY, MULTI = Meaning("binary", True), Meaning("multi-label", True)
CASES = {
    "dense": (lambda: sequential(layers.Dense(3)), LOGITS),
    "dense softmax": (lambda: sequential(layers.Dense(3, activation="softmax")), SOFTMAX),
    "dense sigmoid": (lambda: sequential(layers.Dense(3, activation="sigmoid")), MULTI),
    "one sigmoid": (lambda: sequential(layers.Dense(1, activation="sigmoid")), BINARY),
    "Softmax": (lambda: sequential(layers.Dense(3), layers.Softmax()), SOFTMAX),
    "Activation": (lambda: sequential(layers.Dense(3), layers.Activation("softmax")), SOFTMAX),
    "linear behind softmax": (
        lambda: sequential(layers.Dense(3, activation="softmax"), layers.Activation("linear")),
        SOFTMAX,
    ),
    "dropout behind softmax": (
        lambda: sequential(layers.Dense(3, activation="softmax"), layers.Dropout(0.1)), SOFTMAX,
    ),
    "a layer as activation": (
        lambda: sequential(layers.Dense(3, activation=layers.Softmax())), SOFTMAX,
    ),
    "a function of one's own": (
        lambda: sequential(layers.Dense(3, activation=lambda x: ops.softmax(x))), SOFTMAX,
    ),
    "nested softmax": (
        lambda: nested(sequential(layers.Dense(3, activation="softmax"))), SOFTMAX,
    ),
    "nested twice": (lambda: nested(nested(sequential(layers.Dense(3)))), LOGITS),
    "ops.softmax": (lambda: functional(ops.softmax), SOFTMAX),
    "activations.sigmoid": (lambda: functional(keras.activations.sigmoid, 1), BINARY),
    "hard sigmoid": (lambda: functional(ops.hard_sigmoid), MULTI),
    "log softmax": (lambda: functional(ops.log_softmax), LOGITS),
    "temperature": (lambda: functional(lambda x: ops.softmax(x / 2)), SOFTMAX),
    "logits over a temperature": (lambda: functional(lambda x: x / 2), LOGITS),
    "some logits": (lambda: functional(lambda x: x[:, :2]), LOGITS),
    "softmax by hand": (lambda: functional(by_hand), SOFTMAX),
    "1 - p and p": (
        lambda: functional(lambda p: ops.concatenate([1 - p, p], -1), 1, "sigmoid"), SOFTMAX,
    ),
    "Lambda": (lambda: functional(layers.Lambda(ops.softmax, output_shape=(3,))), SOFTMAX),
    "mean of softmaxes": (lambda: ensemble(layers.Average(), "softmax"), SOFTMAX),
    "their sum by hand": (lambda: ensemble(lambda p: (p[0] + p[1]) / 2, "softmax"), SOFTMAX),
    "mean of logits": (lambda: ensemble(layers.Average(), None), LOGITS),
    "heads of sigmoids": (lambda: ensemble(layers.Concatenate(), "sigmoid"), MULTI),
    "batch norm": (lambda: sequential(layers.Dense(3), layers.BatchNormalization()), LOGITS),
    "SqueezeNet": (
        lambda: convolutional("relu", layers.GlobalAveragePooling2D(), layers.Softmax()), SOFTMAX,
    ),
    "SqueezeNet's logits": (
        lambda: convolutional("relu", layers.GlobalAveragePooling2D()), LOGITS,
    ),
    "places": (lambda: convolutional("sigmoid", layers.GlobalMaxPooling2D()), MULTI),
    "a class of one's own": (lambda: wrapped(Subclassed("softmax")), SOFTMAX),
    "a class of one's own, logits": (lambda: wrapped(Subclassed(None)), LOGITS),
    "a layer of one's own": (lambda: sequential(Similarity()), LOGITS),
    "one logit, two names": (
        lambda: informed(sequential(layers.Dense(1)), class_names=["cat", "dog"]),
        Meaning("binary", False),
    ),
    "logits of several labels": (
        lambda: informed(sequential(layers.Dense(3)), options={"task": "multi-label"}),
        Meaning("multi-label", False),
    ),
    "ours": (lambda: kr.create_model("resnet_tiny"), LOGITS),
    "ours, softmax": (
        lambda: kr.create_model("resnet_tiny", classifier_activation="softmax"), SOFTMAX,
    ),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", CASES)
def test_outputs_say_what_the_graph_makes_them(name):
    build, expected = CASES[name]
    assert meaning_of(build()) == expected


REFUSED = {
    "tanh": (lambda: sequential(layers.Dense(3, activation="tanh")), r"no logits \(tanh\)"),
    "relu": (lambda: sequential(layers.Dense(3), layers.ReLU()), r"\(relu\)"),
    "exponential": (lambda: functional(ops.exp), "no probabilities"),
    "per cent": (lambda: functional(lambda p: 100 * p, 3, "softmax"), "no probabilities"),
    "some of a softmax": (lambda: functional(lambda p: p[:, :2], 3, "softmax"), "no probabilities"),
    "softmax of one": (lambda: sequential(layers.Dense(1, activation="softmax")), "is 1 for every"),
    "one logit": (lambda: sequential(layers.Dense(1)), r"class_names'\] = \['cat', 'dog'\]"),
    "pooled features": (
        lambda: kr.create_model("resnet_tiny", include_top=False, pooling="avg"), "no classificat",
    ),
    "feature maps": (lambda: kr.create_model("resnet_tiny", include_top=False), "no classificat"),
    "two outputs": (lambda: functional(lambda x: [x, x[:, :2]]), r"\(None, 3\), \(None, 2\)"),
    "no graph": (lambda: Subclassed(None), r"keras\.Model\(x, model\(x\)\)"),
    "not built": (lambda: keras.Sequential([layers.Dense(3)]), r"begin it with keras\.Input"),
    "another task": (
        lambda: informed(sequential(layers.Dense(3)), options={"task": "binary"}), "has 3 outputs",
    ),
    "an unknown task": (
        lambda: informed(sequential(layers.Dense(3)), options={"task": "multilabel"}),
        "Did you mean 'multi-label'",
    ),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_unclear_is_refused_with_the_remedy(name):
    build, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        meaning_of(build())


@pytest.mark.once
def test_a_layer_of_ones_own_that_gives_the_same_for_all_says_nothing():
    model = sequential(Similarity())
    model.layers[-1].kernel.assign(np.zeros((4, 3)))
    with pytest.raises(InputError, match="the same number"):
        meaning_of(model)


@pytest.mark.once
def test_probabilities_are_those_of_the_outputs():
    outputs = np.array([[0.0, 3.0, -2.0], [800.0, -800.0, 0.0]])
    sigmoids = 1 / (1 + np.exp(-np.clip(outputs, -700, 700)))
    np.testing.assert_allclose(Meaning("multi-label").probabilities(outputs), sigmoids, atol=1e-99)
    softmax = Meaning().probabilities(outputs)
    np.testing.assert_allclose(softmax.sum(axis=1), 1)
    np.testing.assert_allclose(softmax[0], np.exp(outputs[0]) / np.exp(outputs[0]).sum())
    one = Meaning("binary").probabilities(outputs[:, :1])
    np.testing.assert_allclose(one, [[0.5, 0.5], [0, 1]])
    assert np.isfinite(Meaning("binary").log_probabilities(outputs[:, :1])).all()
    np.testing.assert_allclose(BINARY.probabilities([[0.25]]), [[0.75, 0.25]])
    assert BINARY.num_classes(1) == 2 and MULTI.num_classes(3) == 3
    np.testing.assert_allclose(MULTI.probabilities([[0.0, 0.9996, 1.0]]), [[1e-12, 0.9996, 1.0]])


@pytest.mark.once
def test_losses_equal_scikit_learns_and_keras():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, true = rng.normal(size=(6, 3)), np.array([0, 2, 1, 1, 0, 2])
    logs = LOGITS.log_probabilities(logits)
    expected = metrics.log_loss(true, np.exp(logs), labels=[0, 1, 2])
    assert LOGITS.losses(logs, true).mean() == pytest.approx(expected)
    several = Meaning("multi-label")
    p = 1 / (1 + np.exp(-logits))
    hits = np.eye(3)[true]
    expected = -(hits * np.log(p) + (1 - hits) * np.log(1 - p)).mean()
    found = several.losses(several.log_probabilities(logits), true).mean()
    assert found == pytest.approx(expected)


@pytest.mark.once
def test_numbers_tell_where_there_is_no_graph():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3))
    assert meaning_of_numbers(logits) == "logits"
    assert meaning_of_numbers(SOFTMAX.probabilities(np.log(np.abs(logits)))) is not None
    assert meaning_of_numbers(LOGITS.probabilities(logits)) == "softmax"
    assert meaning_of_numbers(1 / (1 + np.exp(-logits))) == "sigmoid"
    assert meaning_of_numbers(np.zeros((4, 3))) is None
    assert meaning_of_numbers(np.full((4, 3), np.nan)) is None


# --- what a model takes --------------------------------------------------------------------------


def headed(front=lambda x: x, shape=SHAPE, dtype=None, **options):
    """A backbone under a head of one's own, with something in front of it."""
    backbone = kr.create_model(
        "resnet_tiny", include_top=False, pooling="avg", input_shape=SHAPE, **options
    )
    x = keras.Input(shape, dtype=dtype)
    return kr.ImageModel(x, layers.Dense(3)(backbone(front(x))))


def normalization(mean, variance):
    return layers.Normalization(mean=[mean] * 3, variance=[variance] * 3)


class OwnStem(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return ops.mean(ops.matmul(x, self.kernel), axis=(1, 2))


def augmented():
    return keras.Sequential([keras.Input(SHAPE), layers.RandomFlip(), layers.RandomContrast(0.1)])


INSIDE = {"include_preprocessing": True}
TAKES = {
    "ours": (lambda: kr.create_model("resnet_tiny"), "normalized"),
    "ours, inside": (lambda: kr.create_model("resnet_tiny", **INSIDE), "0..255"),
    "optimized": (
        lambda: kr.optimize_for_inference(kr.create_model("resnet_tiny", **INSIDE)), "0..255",
    ),
    "stock": (lambda: kr.to_stock(kr.create_model("resnet_tiny", **INSIDE)), "0..255"),
    "a backbone": (lambda: headed(), "normalized"),
    "a backbone, inside": (lambda: headed(**INSIDE), "0..255"),
    "Rescaling": (lambda: headed(layers.Rescaling(1 / 255)), "0..255"),
    "Rescaling to -1..1": (lambda: headed(layers.Rescaling(1 / 127.5, -1)), "0..255"),
    "augmented": (lambda: headed(augmented()), "normalized"),
    "augmented and rescaled": (
        lambda: headed(lambda x: layers.Rescaling(1 / 255)(augmented()(x))), "0..255",
    ),
    "an operation": (lambda: headed(lambda x: x / 255.0), "0..255"),
    "Lambda": (lambda: headed(layers.Lambda(lambda x: x / 255.0)), "0..255"),
    "means of 0..255": (lambda: headed(lambda x: ops.flip(x, -1) - 116.0), "0..255"),
    "measured on 0..255": (lambda: headed(normalization(118.0, 4000.0)), "0..255"),
    "measured on 0..1": (lambda: headed(normalization(0.45, 0.05)), "0..1"),
    "0..1 to -1..1": (lambda: headed(layers.Rescaling(2.0, -1.0)), "0..1"),
    "0..1 to 0..255": (lambda: headed(layers.Rescaling(255.0), **INSIDE), "0..1"),
    "padded": (lambda: headed(lambda x: layers.ZeroPadding2D()(x)[:, 1:-1, 1:-1]), "normalized"),
    "gray": (
        lambda: headed(lambda x: ops.repeat(x, 3, axis=-1), shape=(16, 16, 1), **INSIDE), "0..255",
    ),
    "resized": (lambda: headed(layers.Resizing(16, 16), (None, None, 3), **INSIDE), "0..255"),
    "uint8": (lambda: headed(dtype="uint8", **INSIDE), "0..255"),
    "rescaled for a layer of one's own": (
        lambda: keras.Sequential([keras.Input(SHAPE), layers.Rescaling(1 / 255), OwnStem()]),
        "0..255",
    ),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", TAKES)
def test_pixels_are_those_that_the_graph_takes(name):
    build, expected = TAKES[name]
    assert pixels_of(build()) == expected


@pytest.mark.once
@pytest.mark.parametrize(
    "build",
    [
        lambda: keras.Sequential([keras.Input(SHAPE), OwnStem()]),
        lambda: wrapped(Subclassed(None)),
        lambda: headed(normalization(0.2, 1.2)),  # of what is normalised already, or not
    ],
)
def test_unclear_pixels_are_refused_until_it_is_said(build):
    model = build()
    with pytest.raises(InputError, match=r"say pixels='0\.\.255'"):
        pixels_of(model)
    # Of an ImageModel the dict is there; a plain attribute does on any other.
    object.__setattr__(model, "_info", {})
    info = {"options": {"include_preprocessing": True}}
    model.info.update(info) if isinstance(model, kr.ImageModel) else informed(model, **info)
    assert pixels_of(model) == "0..255"


# --- keras.Sequential ----------------------------------------------------------------------------


def test_a_sequential_model_is_a_functional_one_to_everything(rng):
    backbone = kr.create_model("resnet_tiny", include_top=False, pooling="avg", input_shape=SHAPE)
    model = keras.Sequential([keras.Input(SHAPE), layers.Rescaling(1 / 255), backbone,
                              layers.Dense(3)])  # fmt: skip
    images = rng.integers(0, 256, (2, *SHAPE)).astype("float32")
    expected = model.predict_on_batch(images)
    for made in (kr.to_stock(model), kr.optimize_for_inference(model)):
        np.testing.assert_allclose(made.predict_on_batch(images), expected, rtol=1e-4, atol=1e-5)
    found = kr.summary(model)
    assert [row.name for row in found.rows][1] == "conv1" and found.rows[-1].kind == "Dense"
    assert sum(row.params for row in found.rows) == model.count_params()
    # The nested layers' work counts: the mean and Dense(3) apart, that of the backbone.
    assert kr.count_flops(model) == kr.count_flops(backbone) + backbone.output_shape[1] * 3
    maps = keras.Sequential([keras.Input(SHAPE), layers.Conv2D(4, 3, 2, padding="same")])
    assert [y.shape for y in kr.feature_extractor(maps, [2]).outputs] == [(None, 8, 8, 4)]
    model.add(layers.Softmax())  # what was unwrapped before is not kept
    assert meaning_of(model) == SOFTMAX


@keras.saving.register_keras_serializable("tests")
class Fails(keras.layers.Layer):
    def call(self, inputs):
        raise RuntimeError("no such kernel")

    def compute_output_shape(self, input_shape):
        return input_shape


def test_a_model_that_fails_on_noise_is_one_line():
    inputs = keras.Input((8, 8, 3))
    outputs = Fails()(keras.layers.Dense(3)(keras.layers.Flatten()(inputs)))
    with pytest.raises(InputError, match=r"fails on images of the shape \(8, 8, 3\): .*no such"):
        meaning_of(keras.Model(inputs, outputs))
