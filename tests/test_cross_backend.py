"""A model saved on one backend answers the same on the others."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_resnet as kr

LONG = bool(os.environ.get("KERAS_RESNET_LONG"))
ANSWER = """
from keras_resnet.system.process import keep_keras_alone
keep_keras_alone()  # the import takes half as long
import pathlib, sys, numpy as np, keras, keras_resnet
folder, backend = pathlib.Path(sys.argv[1]), sys.argv[2]
for path in folder.glob("*.keras"):
    model = keras.saving.load_model(path)
    x = np.load(path.with_suffix(".npy"))
    np.save(path.with_suffix(f".{backend}.npy"), model.predict(x, verbose=0))
"""


def randomise_statistics(model, rng):
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(size=shape, scale=0.3))
            layer.moving_variance.assign(rng.uniform(0.5, 2, size=shape))
            layer.gamma.assign(rng.uniform(0.5, 1.5, size=shape))
            layer.beta.assign(rng.normal(size=shape, scale=0.3))


@pytest.mark.slow
@pytest.mark.long("tensorflow", "jax")
def test_saved_models_answer_alike_everywhere(backend, tmp_path, rng):
    models = {"resnet_tiny": (32, {"include_preprocessing": True}), "alexnet_cifar10": (32, {})}
    if backend == "torch":  # the others' files are the same; one with everything in it will do
        models["resnet18"] = (64, {"include_preprocessing": True, "num_classes": 5})
    if LONG:
        models |= {"resnet20": (32, {}), "resnext50_32x4d": (64, {"num_classes": 5})}
    expected = {}
    for name, (side, options) in models.items():
        model = kr.create_model(name, input_shape=(side, side, 3), **options)
        randomise_statistics(model, rng)
        x = rng.normal(size=(2, side, side, 3)).astype("float32")
        model.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", x)
        expected[name] = model.predict(x, verbose=0)
    for other in {"torch", "tensorflow", "jax"} - {backend}:
        pytest.importorskip(other)
        done = subprocess.run(
            [sys.executable, "-c", ANSWER, str(tmp_path), other],
            env={**os.environ, "KERAS_BACKEND": other},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for name, answer in expected.items():
            got = np.load(tmp_path / f"{name}.{other}.npy")
            assert np.abs(got - answer).max() < 1e-4 * np.abs(answer).max(), (name, other)
