"""Folded models against the models that they were made of."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

import keras_resnet as kr
from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization
from keras_resnet.models.rebuild import optimize_for_inference, to_stock
from keras_resnet.runtimes.runner import KerasRunner
from keras_resnet.system.errors import InputError

# One of every kind of block, stem, shortcut and head.
VARIANTS = {"resnet20": 32, "resnet18": 48, "resnet50_v1_relu": 48, "alexnet_cifar10": 32}


def randomized(model):
    """Statistics and scales as after training: untouched ones hide what folding gets wrong."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.path.endswith(("beta", "moving_mean", "bias")):
            variable.assign(rng.normal(0, 0.2, variable.shape))
    return model


def tiny():
    return kr.create_model("resnet_tiny", input_shape=(32, 32, 3), include_preprocessing=True)


def answers(model, x):
    if keras.backend.backend() == "jax":  # compiles a whole network faster than its operations
        return np.asarray(model.predict_on_batch(x))
    return np.asarray(ops.convert_to_numpy(ops.cast(model(x, training=False), "float32")))


def assert_close(actual, expected, tolerance=1e-5):
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def norms_of(model):
    return [la for la in model.layers if isinstance(la, keras.layers.BatchNormalization)]


DEEP = pytest.mark.long("tensorflow", "jax")  # folding is NumPy; the small ones show the same


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=DEEP if name in ("resnet18", "resnet50_v1_relu") else ())
        for name in VARIANTS
    ],
)
@pytest.mark.slow
def test_a_folded_model_has_no_norms_and_gives_the_same_answers(name, tmp_path, rng):
    size = VARIANTS[name]
    model = randomized(
        kr.create_model(name, input_shape=(size, size, 3), include_preprocessing=True)
    )
    model.info["class_names"] = [str(i) for i in range(model.output_shape[-1])]
    before = [w.copy() for w in model.get_weights()]
    x = rng.integers(0, 256, (2, size, size, 3)).astype("float32")
    expected = answers(model, x)
    folded = optimize_for_inference(model)
    assert not norms_of(folded)
    assert folded.info["optimized"]["folded_norms"] == len(norms_of(model))
    assert folded.info["class_names"] == model.info["class_names"]
    kept = {la.name for la in model.layers if isinstance(la, Conv2D)}
    assert kept == {la.name for la in folded.layers if isinstance(la, Conv2D)}
    assert_close(answers(folded, x), expected)
    assert_close(np.asarray(folded.predict_on_batch(x)), expected)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    if name == "resnet20":
        folded.save(tmp_path / "folded.keras")
        assert_close(answers(keras.saving.load_model(tmp_path / "folded.keras"), x), expected)
        assert_close(answers(to_stock(folded), x), expected)


def test_low_precision_is_near_and_keeps_the_logits_in_float32(rng):
    model = randomized(tiny())
    x = rng.integers(0, 256, (16, 32, 32, 3)).astype("float32")
    expected = answers(model, x)
    half = optimize_for_inference(model, precision="bf16")
    kernels = {la.kernel.dtype for la in half.layers if isinstance(la, Conv2D)}
    assert kernels == {"bfloat16"}
    assert keras.backend.standardize_dtype(half.output.dtype) == "float32"
    actual = answers(half, x)
    assert_close(actual, expected, 3e-2)
    assert np.abs(actual - expected).max() > 0
    assert half.info["optimized"]["precision"] == "bf16"


def test_stock_layers_and_awkward_graphs(rng):
    layers = keras.layers
    x = keras.Input((8, 8, 3))
    y = layers.BatchNormalization()(x)  # follows no convolution
    y = layers.Conv2D(4, 3, padding="same", strides=2, use_bias=True)(y)
    y = layers.BatchNormalization(scale=False)(y)  # folds
    y = layers.Conv2D(4, 1, activation="relu")(y)
    y = layers.BatchNormalization()(y)  # after the activation: stays
    z = layers.Conv2D(4, 3, padding="same")(y)
    y = layers.Add()([layers.BatchNormalization()(z), z])  # z has another user: stays
    shared = layers.Conv2D(4, 1)
    y = layers.BatchNormalization()(shared(y))
    y = layers.BatchNormalization()(shared(y))  # one kernel cannot take over two norms
    y = layers.DepthwiseConv2D(3)(y)
    y = layers.BatchNormalization()(y)
    y = BatchNormalization(activation="relu")(Conv2D(6, 2)(y))  # folds
    model = randomized(keras.Model(x, layers.GlobalAveragePooling2D()(y)))
    folded = optimize_for_inference(model)
    assert len(norms_of(model)) == 8 and len(norms_of(folded)) == 6
    pictures = rng.normal(size=(3, 8, 8, 3)).astype("float32")
    assert_close(answers(folded, pictures), answers(model, pictures))


def test_what_cannot_be_optimized_is_said():
    model = kr.create_model("resnet20")
    with pytest.raises(InputError, match=r"'fp32', 'bf16'.*'bf61'.*Did you mean"):
        optimize_for_inference(model, precision="bf61")
    x = keras.Input((4,))
    with pytest.raises(InputError, match="one input and one output"):
        optimize_for_inference(keras.Model(x, [x + 1, x + 2]))


def test_predict_and_evaluate_run_without_norms(backend, rng):
    model = randomized(tiny())
    runner = KerasRunner(model)
    if backend == "torch":
        assert runner._model is model  # which folds itself: tests/models/test_graph.py
    else:
        assert not norms_of(runner._model)
    x = rng.integers(0, 256, (2, 32, 32, 3)).astype("uint8")
    assert_close(runner.outputs(x), answers(model, x.astype("float32")))
    half = KerasRunner(model, "bfloat16")
    assert_close(half.outputs(x), answers(model, x.astype("float32")), 5e-2)
