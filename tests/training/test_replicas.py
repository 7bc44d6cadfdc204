"""One training on several devices of TensorFlow or jax, in one process, is the one on one device.

This file is also the program of that process: `test_replicas.py PICTURES OUTPUT`.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import types

from keras_resnet.system.process import keep_keras_alone

keep_keras_alone()  # before Keras is imported: the process takes seconds less

import keras
import pytest
from test_devices import assert_equal_history, difference

import keras_resnet as kr
from keras_resnet.recipes import get_recipe
from keras_resnet.system import process, replicas
from keras_resnet.training import prepare

OPTIONS = {
    "model": "resnet_tiny",
    "recipe": "cifar",
    "image_size": 16,
    "epochs": 2,
    "batch_size": 10,  # of 49 images: 5 and 5, and a last one of 9
    "val_split": 0.15,
    "workers": 1,
    "mixup": 0.4,
    "label_smoothing": 0.1,
    "ema": True,
    "ema_steps": 1,
    "learning_rate": 0.05,
    "report": False,
    "verbose": False,
}
BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":  # jax' step is that of one device
    OPTIONS |= {"accumulate": 2, "clip_norm": 1.0}
several = pytest.mark.skipif(BACKEND == "torch", reason="torch has a process a device")


class Stop(keras.callbacks.Callback):
    """SIGTERM at the third step."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def main(pictures, output):
    """Trains on one device; and on two, interrupted, and going on where a script has set them."""
    keras.config.set_floatx("float64")
    prepare._POLICIES["fp32"] = "float64"
    options = {**OPTIONS, "exclude": [str(min(pathlib.Path(pictures).rglob("*.png")))]}
    process.devices = "2"
    first = kr.train(pictures, output=output + "/2", callbacks=[Stop()], **options)
    assert first.interrupted
    process.devices = "1"
    if BACKEND == "tensorflow":
        import tensorflow as tf

        strategy = tf.distribute.MirroredStrategy(
            ["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice()
        )
        devices = strategy.scope()
    else:
        devices = keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]).scope()
    with devices:
        two = kr.train(pictures, output=output + "/2", **options)
        if BACKEND == "jax":  # batches that they do not divide
            assert keras.distribution.distribution() is not None
            odd = sorted(pathlib.Path(pictures).rglob("*.png"))[:5]
            found = kr.predict(two.model, odd, batch_size=3)
            assert kr.evaluate(two.model, pictures, batch_size=3).count == 58
            assert kr.embed(two.model, odd, batch_size=3).vectors.shape == (5, 16)
            swept = {name: OPTIONS[name] for name in ("model", "recipe", "image_size", "workers")}
            assert len(kr.lr_find(pictures, batch_size=5, steps=3, **swept).losses) == 3
            assert keras.distribution.distribution() is not None
        else:
            dropout = keras.Sequential([keras.Input((64,)), keras.layers.Dropout(0.5)])
            replicas._draw_apart(dropout)
            run = tf.function(lambda: dropout(tf.ones((1, 64)), training=True), autograph=False)
            one, other = (part.numpy() for part in strategy.run(run).values)
            assert (one != other).any() and (one == other).any()
    if BACKEND == "jax":
        alone = kr.predict(kr.load_model(two.folder / "best.keras"), odd, batch_size=3)
        assert [p.classes[0][0] for p in found] == [p.classes[0][0] for p in alone]
    one = kr.train(pictures, output=output + "/1", **options)
    print(json.dumps([str(one.folder), str(two.folder), difference(one.folder, two.folder)]))


@several
@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path):
    """With a last batch that they do not divide, interrupted in the middle of an epoch."""
    from test_resume import write_pictures

    pictures = write_pictures(tmp_path / "pictures", count=29)
    ended = subprocess.run(
        [sys.executable, __file__, str(pictures), str(tmp_path)], text=True, capture_output=True,
        env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    *folders, largest = json.loads(ended.stdout.splitlines()[-1])
    assert largest < 1e-10
    one, two = map(pathlib.Path, folders)
    assert_equal_history(one, two)
    parts = [json.loads((run / "evaluation.json").read_text()) for run in (one, two)]
    assert parts[0]["count"] == parts[1]["count"] == 8
    assert (two / "train.log").read_text().count("Devices: 2, with 5 of the 10 images of a") == 2
    assert parts[0]["loss"] == pytest.approx(parts[1]["loss"], rel=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_what_tensorflows_devices_cannot_do_is_said(monkeypatch):
    two = replicas._Mirrored(types.SimpleNamespace(num_replicas_in_sync=2))
    recipe = get_recipe("cifar")
    assert two.check(recipe, compile=False, sync_bn=None) is None
    with pytest.raises(kr.InputError, match=r"not compiled: leave out compile\. Received: 2"):
        two.check(recipe, compile=True, sync_bn=None)
    with pytest.raises(kr.InputError, match="pass precision='bf16'"):
        two.check(recipe.with_options(precision="fp16", accumulate=2), False, None)
    workers = {"cluster": {"worker": ["one:1", "other:1"]}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    with pytest.raises(kr.InputError, match="set KERAS_BACKEND=torch, and start with torchrun"):
        replicas.join()
    for bad in ("{", "[1]", '{"cluster": 1}', '{"cluster": {"worker": 1}}'):
        monkeypatch.setenv("TF_CONFIG", bad)
        with pytest.raises(kr.InputError, match=r"TF_CONFIG must be JSON .* Received: "):
            replicas.join()


@pytest.mark.skipif(BACKEND != "jax", reason="of jax")
def test_what_jaxs_devices_cannot_do_is_said(monkeypatch):
    import jax

    two = replicas._Sharded(jax.devices() * 2)
    recipe = get_recipe("cifar")
    assert two.check(recipe, compile=True, sync_bn=None) is True
    with pytest.raises(kr.InputError, match="leave out sync_bn=False"):
        two.check(recipe, compile=False, sync_bn=False)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(kr.InputError, match=r"start with torchrun\. Received: 2 processes"):
        replicas.join()


@pytest.mark.once
def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(process, "devices", "3")
    with pytest.raises(kr.InputError, match=r"There are 2 GPU devices here\. "):
        replicas._count(2, "GPU")
    assert replicas._count(1, "CPU") == 3
    monkeypatch.setattr(process, "devices", "all")
    assert replicas._count(4, "GPU") == 4 and replicas._count(1, "CPU") == 1


if __name__ == "__main__":
    main(*sys.argv[1:])
