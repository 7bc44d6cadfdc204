"""Twenty training steps end where torchvision and torch.optim.SGD end."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_resnet.convert import load_torchvision, to_torchvision
from keras_resnet.optimizers import SGD
from keras_resnet.schedules import CosineSchedule
from keras_resnet.zoo import create_model

STEPS, BATCH, CLASSES = 20, 4, 10


@pytest.fixture
def dtype(request):
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[1])
    keras.config.set_dtype_policy(before[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)
@pytest.mark.parametrize(
    ("name", "size", "rate", "options"),
    [("resnet18", 64, 0.001, {}), ("alexnet", 63, 0.001, {"dropout": 0.0})],
    ids=["resnet18", "alexnet"],
)
def test_twenty_steps_equal_torchvision(torchvision, backend, dtype, name, size, rate, options):
    if dtype == "float64" and backend == "jax":
        pytest.skip("jax has no float64 unless its process is started for it")
    import torch

    # A changing rate: Keras' own SGD, which folds it into the velocity, would end elsewhere.
    schedule = CosineSchedule(rate, epochs=STEPS, warmup_epochs=4, warmup_decay=0.1)
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    reference = reference.to(getattr(torch, dtype)).train()
    model = create_model(name, num_classes=CLASSES, input_shape=(size, size, 3), **options)
    load_torchvision(model, reference)
    start = {k: v.clone() for k, v in reference.state_dict().items()}
    model.compile(
        optimizer=SGD(schedule, momentum=0.9, weight_decay=1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    optimizer = torch.optim.SGD(reference.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4)

    rng = np.random.default_rng(0)
    for step in range(STEPS):
        images = rng.standard_normal((BATCH, size, size, 3)).astype(dtype)
        labels = rng.integers(0, CLASSES, BATCH)
        loss = model.train_on_batch(images, labels)
        model.reset_metrics()
        optimizer.param_groups[0]["lr"] = schedule.value_at(step)
        optimizer.zero_grad()
        logits = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        expected.backward()
        optimizer.step()

    loss = loss[0] if isinstance(loss, list) else loss
    tolerance = {"float64": 1e-10, "float32": 1e-5 if backend == "torch" else 1e-4}[dtype]
    # Keras computes the loss and its metric in float32 from its own functions.
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
    ours = to_torchvision(model)
    errors, moved = {}, []
    for key, tensor in reference.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        theirs = tensor.numpy()
        errors[key] = np.abs(ours[key] - theirs).max() / np.abs(theirs).max()
        moved.append(np.abs(start[key].numpy() - theirs).max() / np.abs(theirs).max())
    worst = max(errors, key=errors.get)
    print(name, dtype, f"{worst}: {errors[worst]:.2e}, moved {min(moved):.2e}")
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.2e}"
    # Every tensor has gone at least ten times as far as it may differ.
    assert min(moved) > 10 * tolerance
