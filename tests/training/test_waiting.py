"""A training step asks the device nothing: what waits for it is counted, with a GPU or without."""

from __future__ import annotations

import collections
import contextlib
import traceback
import types

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet.system import device
from keras_resnet.training import callbacks, loop
from keras_resnet.training.train import train

pytestmark = [
    pytest.mark.once,  # the other backends' steps are one program
    pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's synchronisations"),
]
TINY = {
    "model": "resnet_tiny", "image_size": 16, "batch_size": 4, "epochs": 1, "workers": 1,
    "val_split": 0, "verbose": False, "report": False,
}  # fmt: skip
RUNS = {
    "sgd, EMA": {"ema": True, "ema_steps": 2},
    "clipped, mixed": {"clip_norm": 1.0, "mixup": 0.2, "label_smoothing": 0.1},
    "accumulated": {"accumulate": 2},
    "adamw": {"optimizer": "adamw"},
    "rmsprop": {"optimizer": "rmsprop", "weight_decay": 0},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


class Middle(keras.callbacks.Callback):
    """Calls one function before the third of six steps, another before the last."""

    def __init__(self, begin, end):
        super().__init__()
        self.calls = {2: begin, 5: end}

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.get(batch, int)()


@contextlib.contextmanager
def counting(seen):
    """Notes every call that would wait for a device on which Keras' tensors were.

    On a processor nothing does; so Keras' device is called `cpu:0` here, the host `cpu`.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    asking = {"item", "tolist", "numpy", "cpu", "__array__", "nonzero", "masked_select", "unique",
              "__bool__", "__int__", "__float__", "__index__", "equal", "allclose"}  # fmt: skip
    making = {"tensor", "as_tensor"}
    host = torch.device("cpu")

    def note(name):
        rows = traceback.extract_stack()[:-2]
        seen[name, " < ".join(f"{row.filename[-30:]}:{row.lineno}" for row in rows[-4:])] += 1

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            kwargs, name = kwargs or {}, getattr(function, "__name__", "")
            if name in asking or (
                name in making and kwargs.get("device") and not torch.is_tensor(args[0])
            ):
                note(name)
            elif name == "to" and not kwargs.get("non_blocking"):
                places = [a for a in (*args[1:2], kwargs.get("device")) if a in ("cpu", host)]
                if places:
                    note("to the host")
            return function(*args, **kwargs)

    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            name = function.name().removeprefix("aten::").partition(".")[0]
            masks = [a for a in args[1:2] if name == "index" for a in a if a is not None]
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal") or any(
                mask.dtype == torch.bool for mask in masks
            ):
                note(name)
            return function(*args, **(kwargs or {}))

    with keras.device("cpu:0"), Kernels(), Functions():
        yield


@pytest.fixture
def card(monkeypatch):
    """A stand-in for a CUDA device: the processor, with what torch.cuda says of one."""
    import torch

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(device, "_cuda", lambda: torch.device("cpu:0"))
    monkeypatch.setattr(callbacks, "devices", lambda: ["Card"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


@pytest.mark.parametrize("run", RUNS)
def test_a_step_asks_a_device_nothing(run, pictures, card, tmp_path):
    import torch

    seen, stack = collections.Counter(), contextlib.ExitStack()
    # Class indices are checked on a processor; CUDA's kernel checks them itself.
    middle = Middle(lambda: stack.enter_context(counting(seen)), stack.close)
    as_tensor = torch.as_tensor
    with stack:
        train(pictures, output=tmp_path, callbacks=[middle], **TINY, **RUNS[run])
    assert torch.as_tensor is as_tensor
    assert not seen, "\n".join(f"{n} x {' '.join(key)}" for key, n in seen.items())


def test_the_count_sees_what_keras_asks_by_itself(pictures, card, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "without_waiting", contextlib.nullcontext)
    seen, stack = collections.Counter(), contextlib.ExitStack()
    middle = Middle(lambda: stack.enter_context(counting(seen)), stack.close)
    with stack:
        train(pictures, output=tmp_path, callbacks=[middle], **TINY)
    assert sum(seen.values()) == 3 * 4  # three steps
    assert {name for name, _ in seen} == {"as_tensor"}
