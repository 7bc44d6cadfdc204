"""The correctness suite of a device: `pytest -m cuda` runs it there, other test runs here.

Numbers are compared with torchvision's on the processor. In float32, TF32 off, outputs may differ
by 1e-4 of the largest, as in `verify`; bfloat16 has 8 bits and may by 5e-2; float64 is strict.
"""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.runtimes.runner import KerasRunner
from keras_resnet.system import device
from keras_resnet.training.optimizers import SGD

pytestmark = [pytest.mark.cuda, pytest.mark.once]
TOLERANCE, HALF = 1e-4, 5e-2


def assert_close(found, expected, tolerance=TOLERANCE):
    found = np.asarray(keras.ops.convert_to_numpy(found), np.float64)
    expected = np.asarray(expected, np.float64)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def in_torch_order(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@pytest.fixture(autouse=True)
def float64_on_jax():
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def pair(torchvision, rng):
    """A network of torchvision's with lively statistics, on the processor, and ours with them."""
    import torch

    def make(name, dtype=torch.float32):
        theirs = getattr(torchvision.models, name)(num_classes=10).to(dtype)
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for part in (module.weight, module.running_var):
                    torch.nn.init.uniform_(part, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, 1.0, 2.0)  # most ReLUs open: see rounding.py
        ours = kr.create_model(name, num_classes=10, input_shape=(64, 64, 3))
        kr.load_torchvision(ours, theirs.state_dict())
        return theirs, ours

    return make


# On a processor others prove the same, and two of these are enough to see that they still run.
long = pytest.mark.long


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnext50_32x4d", marks=long)])
def test_outputs_are_torchvisions(name, pair, rng):
    import torch

    theirs, ours = pair(name)
    images = rng.standard_normal((3, 64, 64, 3)).astype("float32")
    with torch.no_grad():
        expected = theirs.eval()(in_torch_order(images)).numpy()
    assert_close(ours(images, training=False), expected)
    assert_close(ours.predict_on_batch(images), expected)
    assert_close(KerasRunner(ours).outputs(images), expected)
    assert_close(KerasRunner(ours, "bf16").outputs(images), expected, HALF)
    assert kr.verify(ours, theirs.state_dict()).error <= TOLERANCE


@long
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_training_steps_are_torchs(dtype, pair, rng):
    import torch

    theirs, ours = pair("resnet18", torch.float64)
    theirs.train()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ours.compile(SGD(0.01, momentum=0.9, weight_decay=1e-4), loss, jit_compile=False)
    for _ in range(3):
        images, labels = rng.standard_normal((4, 64, 64, 3)), rng.integers(0, 10, 4)
        optimizer.zero_grad()
        logits = theirs(in_torch_order(images))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()
        ours.train_on_batch(images, labels)
    state = kr.to_torchvision(ours)
    for key, expected in theirs.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert_close(state[key], expected.numpy(), 1e-9)


@long
def test_a_folder_is_learned_and_read_back(tmp_path, rng):
    for k, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 100, (20, 20, 3), dtype=np.uint8)
            pixels[..., k] += 120
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    result = kr.train(
        tmp_path / "images", output=tmp_path, model="resnet_tiny", image_size=16, batch_size=8,
        epochs=4, learning_rate=0.1, crop="none", workers=1, report=False, verbose=False,
    )  # fmt: skip
    assert result.history["loss"][-1] < result.history["loss"][0]
    found = kr.evaluate(result.folder, tmp_path / "images", batch_size=7)
    images = sorted((tmp_path / "images").rglob("*.png"))
    predictions = kr.predict(result.folder, images, batch_size=7)
    right = [
        p.classes[0][0] == path.parent.name for p, path in zip(predictions, images, strict=True)
    ]
    assert found.top1 == np.mean(right) and found.count == 30


def test_batches_get_there_as_they_are(rng):
    send = device.Sender()
    batch = send.empty((2, 4, 4, 3), np.uint8), np.array([1, 2])
    batch[0][...] = pixels = rng.integers(0, 256, (2, 4, 4, 3), np.uint8)
    images, labels = send(batch)
    if send.device is None:
        assert images is batch[0]
    else:
        assert images.device.type == labels.device.type == "cuda"
    assert keras.backend.standardize_dtype(images.dtype) == "uint8"
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(images), pixels)
    assert device.fetch(keras.ops.convert_to_tensor(images)[0, 0, 0, 0])() == pixels[0, 0, 0, 0]


def test_what_comes_from_the_host_is_sent(rng):
    """As Keras does it: to a layer called by itself, and images given as a device's tensor."""
    model = kr.create_model(
        "resnet_tiny", num_classes=3, input_shape=(16, 16, 3), include_preprocessing=True
    )
    pixels = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    preprocess = Preprocess(16, 16)
    expected = kr.predict(model, pixels, preprocess=preprocess)
    found = kr.predict(model, keras.ops.convert_to_tensor(pixels), preprocess=preprocess)
    assert [p.classes for p in found] == [p.classes for p in expected]
    if keras.backend.backend() == "torch":
        import torch

        maps = torch.ones(1, 16, 16, 3)
        assert model.get_layer("conv1")(maps).device == keras.ops.zeros(()).device


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch writes it")
def test_a_program_written_on_a_device_takes_any_batch(tmp_path, rng):
    model = kr.create_model(
        "resnet_tiny", num_classes=3, input_shape=(16, 16, 3), include_preprocessing=True
    )
    images = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    kr.export(model, tmp_path / "tiny.pt2", pictures=images)
    runner = kr.open_runner(tmp_path / "tiny.pt2")
    for count in (1, 3):
        assert_close(runner.outputs(images[:count]), model.predict_on_batch(images[:count]))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="cuDNN by torch")
def test_answers_come_from_one_thread(rng):
    """CuDNN chooses kernels anew in each thread, which took eight times as long as the batch."""
    model = kr.create_model(
        "resnet_tiny", num_classes=3, input_shape=(16, 16, 3), include_preprocessing=True
    )
    runner, threads, seen = KerasRunner(model), [], KerasRunner._begin
    runner._begin = lambda images: threads.append(threading.get_ident()) or seen(runner, images)
    batches = [rng.integers(0, 256, (2, 16, 16, 3), np.uint8) for _ in range(6)]
    for _ in range(2):
        found = list(runner.in_turn(runner.outputs, batches, 2))
        assert len(found) == 6
    assert len(set(threads)) == 1
