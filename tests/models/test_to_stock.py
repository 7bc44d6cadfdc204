"""The stock twin: the same numbers, the same weight files, and no need for this package."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from rounding import allowed

from keras_resnet import to_stock
from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization
from keras_resnet.layers.pool import MaxPooling2D
from keras_resnet.models.zoo import create_model
from keras_resnet.system.errors import InputError

# One of every kind of block, stem and shortcut.
# jax has no float64 unless its process is started for it.
JAX = keras.backend.backend() == "jax"
VARIANTS = ("resnet18", "resnet50", "resnet20", "resnet34_cifar10", "alexnet_cifar10")


def with_random_state(model, seed=0):
    """Every weight its own value, so that two of them changing places shows."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" in variable.path:
            continue
        near = 1.0 if variable.path.endswith(("gamma", "moving_variance")) else 0.0
        noise = rng.normal(0, 0.1, size=variable.shape)
        kernel = variable.path.endswith("kernel")
        variable.assign(np.asarray(variable) * (1 + noise) if kernel else near + 0.3 * noise)
    return model


def answer(model, x):
    if JAX:  # compiles a whole network faster than its operations
        return np.asarray(model.predict_on_batch(x), "float32")
    return ops.convert_to_numpy(ops.cast(model(x, training=False), "float32"))


def assert_close(actual, expected, tolerance=1e-5):
    assert np.abs(actual - expected).max() <= tolerance * max(1, np.abs(expected).max())


def pictures(shape, batch=2):
    return np.random.default_rng(1).uniform(0, 255, size=(batch, *shape)).astype("float32")


# Every kind of block is rebuilt under torch; a ResNet-18's stem and blocks are in others, too.
MARKS = dict.fromkeys(VARIANTS, pytest.mark.long("tensorflow", "jax"))
MARKS |= {"resnet20": (), "resnet18": pytest.mark.long}


@pytest.fixture(params=[pytest.param(name, marks=MARKS[name]) for name in VARIANTS])
def pair(request):
    model = create_model(
        request.param,
        input_shape=(32, 32, 3),
        num_classes=7,
        include_preprocessing=True,
    )
    with_random_state(model)
    return model, to_stock(model)


@pytest.mark.slow
def test_the_twin_is_stock_and_answers_alike(pair, tmp_path):
    model, twin = pair
    assert {type(op).__module__.split(".")[0] for op in twin.operations} == {"keras"}
    assert twin.count_params() == model.count_params()
    x = pictures(model.input_shape[1:])
    expected = answer(model, x)
    assert_close(answer(twin, x), expected)
    assert np.abs(expected).max() > 1e-3

    # Weight files fit both ways.
    for source, fresh in (
        (model, to_stock(with_random_state(keras.models.clone_model(model), seed=5))),
        (twin, with_random_state(keras.models.clone_model(model), seed=6)),
    ):
        assert np.abs(answer(fresh, x) - expected).max() > 1e-3 * np.abs(expected).max()
        source.save_weights(tmp_path / "some.weights.h5")
        fresh.load_weights(tmp_path / "some.weights.h5")
        assert_close(answer(fresh, x), expected)


@pytest.mark.once
@pytest.mark.slow
def test_saved_twins_load_without_the_package(tmp_path, backend):
    every = backend == "torch" and os.environ.get("KERAS_RESNET_LONG")
    names = VARIANTS if every else VARIANTS[:1]
    options = {"input_shape": (32, 32, 3), "num_classes": 7, "include_preprocessing": True}
    models = {name: with_random_state(create_model(name, **options)) for name in names}
    for name, model in models.items():
        to_stock(model).save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}-x.npy", pictures(model.input_shape[1:]))
    code = """
import sys, keras, numpy as np
sys.modules["keras_resnet"] = None  # importing it would raise
for name in sys.argv[1:]:
    model = keras.saving.load_model(f"{name}.keras")
    x = np.load(f"{name}-x.npy")
    jax = keras.backend.backend() == "jax"  # compiles a network faster than its operations
    y = model.predict_on_batch(x) if jax else model(x, training=False)
    np.save(f"{name}-y.npy", keras.ops.convert_to_numpy(y))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["KERAS_BACKEND"] = backend
    subprocess.run(
        [sys.executable, "-c", code, *models],
        cwd=tmp_path, env=environment, check=True, timeout=300,
    )  # fmt: skip
    for name, model in models.items():
        x = np.load(tmp_path / f"{name}-x.npy")
        assert_close(np.load(tmp_path / f"{name}-y.npy"), answer(model, x))


def test_negative_values_survive_the_pooling_twin():
    inputs = keras.Input((9, 8, 3))
    layer = MaxPooling2D(3, strides=2, pad=1, data_format="channels_last")
    model = keras.Model(inputs, layer(inputs))
    x = -1 - pictures((9, 8, 3))
    np.testing.assert_array_equal(answer(to_stock(model), x), answer(model, x))


def test_shared_and_nested_layers_keep_their_sharing():
    inputs = keras.Input((6, 6, 3))
    inner_input = keras.Input((6, 6, 3))
    conv, norm = (
        Conv2D(3, 3, pad=1, data_format="channels_last"),
        BatchNormalization(activation="relu"),
    )
    inner = keras.Model(inner_input, norm([norm(conv(inner_input)), inner_input]), name="inner")
    model = keras.Model(inputs, inner(inner(inputs)))
    with_random_state(model)
    twin = to_stock(model)
    assert len(twin.weights) == len(model.weights)
    assert {type(op).__module__.split(".")[0] for op in twin.get_layer("inner").operations} == {
        "keras"
    }
    x = pictures((6, 6, 3)) / 255
    assert_close(answer(twin, x), answer(model, x))


def test_mixed_precision_stays_mixed():
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        model = with_random_state(create_model("resnet20"))
    finally:
        keras.config.set_dtype_policy(policy)
    twin = to_stock(model)
    x = pictures((32, 32, 3)) / 255
    assert twin(x).dtype == model(x).dtype
    assert_close(answer(twin, x), answer(model, x), 5e-2)


def test_other_things_are_refused():
    class Subclassed(keras.Model):
        pass

    for thing in (Subclassed(), keras.layers.Dense(2), "resnet50"):
        with pytest.raises(InputError, match="Functional"):
            to_stock(thing)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32" if JAX else "float64"], indirect=True)
def test_twenty_training_steps_are_those_of_stock_layers(rng, dtype):
    """With Keras' variance rule, so that the statistics are comparable as well."""
    keras.utils.set_random_seed(0)
    model = create_model("resnet_tiny")
    for layer in model.layers:
        if isinstance(layer, BatchNormalization):
            layer.unbiased_variance = False
    twin = to_stock(model)
    x = rng.normal(size=(8, 16, 16, 3)).astype(dtype)
    y = rng.integers(0, 10, size=8)
    start = twin.get_weights()

    def trained(network, change=lambda x: x):
        network.set_weights(start)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        network.compile(keras.optimizers.SGD(0.005, momentum=0.9), loss)
        losses = np.array([float(network.train_on_batch(change(x), y)) for _ in range(20)])
        return losses, {v.path: np.array(v) for v in network.variables}

    def difference(some, others):
        losses = np.abs(some[0] / others[0] - 1).max()
        weights = (
            np.abs(some[1][k] - v).max() / max(1, np.abs(v).max()) for k, v in others[1].items()
        )
        return np.array([losses, max(weights)])

    ours, theirs = trained(model), trained(twin)
    assert theirs[0][-1] < 0.9 * theirs[0][0], "it learns"
    found = difference(ours, theirs)
    limits = 1e-10
    if dtype == "float32":
        limits = allowed(1e-4, found, lambda change: trained(twin, change), theirs, difference)
    assert (found <= limits).all(), found
