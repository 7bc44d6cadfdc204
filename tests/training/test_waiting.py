"""A training step asks the device nothing: what waits for it is counted, with a GPU or without."""

from __future__ import annotations

import collections
import contextlib
import json
import threading
import traceback
import types

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.runtimes import runner
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
    """Calls a function before the third of six steps and one before the last, or of validation."""

    def __init__(self, begin, end, validation=False):
        super().__init__()
        self.steps, self.tests = {2: begin, 5: end}, {}
        if validation:
            self.steps, self.tests = {}, {1: begin, 3: end}

    def on_train_batch_begin(self, batch, logs=None):
        self.steps.get(batch, int)()

    def on_test_batch_begin(self, batch, logs=None):
        self.tests.get(batch, int)()


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
    """A stand-in for a CUDA device: the processor, with what torch.cuda says of one.

    It gives the addresses of page-locked memory, and notes what was copied there afterwards.
    """
    import torch

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    seen, empty = types.SimpleNamespace(locked=set(), copied=[]), torch.empty

    def locked_empty(*shape, pin_memory=False, **kwargs):
        made = empty(*shape, **kwargs)
        if pin_memory:
            seen.locked.add(made.data_ptr())
        return made

    def pin_memory(tensor):
        if tensor.data_ptr() in seen.locked:
            return tensor
        seen.copied.append(tuple(tensor.shape))
        return tensor.clone()

    monkeypatch.setattr(torch, "empty", locked_empty)
    monkeypatch.setattr(device, "_cuda", lambda: torch.device("cpu:0"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # of others
    monkeypatch.setattr(callbacks, "devices", lambda: ["Card"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda place: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return seen


@pytest.mark.parametrize("run", RUNS)
def test_a_step_asks_a_device_nothing(run, pictures, card, tmp_path):
    import torch

    seen, stack = collections.Counter(), contextlib.ExitStack()
    middle = Middle(lambda: stack.enter_context(counting(seen)), stack.close)
    as_tensor = torch.as_tensor
    with stack:
        result = train(pictures, output=tmp_path, callbacks=[middle], **TINY, **RUNS[run])
    assert torch.as_tensor is as_tensor and not torch.backends.cudnn.benchmark
    assert json.loads((result.folder / "config.json").read_text())["cudnn_benchmark"] is True
    # Threads that read have put the images where they are sent from, but what is mixed.
    assert ((4, 16, 16, 3) in card.copied) == ("mixed" in run)
    assert not seen, "\n".join(f"{n} x {' '.join(key)}" for key, n in seen.items())


@pytest.mark.cuda
@pytest.mark.parametrize("run", RUNS)
def test_a_step_asks_a_cuda_device_nothing(run, pictures, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and pytest -m cuda")
    mode = torch.cuda.set_sync_debug_mode
    middle = Middle(lambda: mode("error"), lambda: mode("default"))
    try:
        train(pictures, output=tmp_path, callbacks=[middle], **TINY, **RUNS[run])
    finally:
        mode("default")


def test_validation_asks_a_device_nothing(pictures, card, tmp_path):
    seen, stack, validated = collections.Counter(), contextlib.ExitStack(), []
    middle = Middle(
        lambda: stack.enter_context(counting(seen)),
        lambda: stack.close() or validated.append(True),
        validation=True,
    )
    with stack:
        train(pictures, output=tmp_path, callbacks=[middle], **{**TINY, "val_split": 0.6})
    assert validated == [True] and not seen, seen


def test_the_count_sees_what_keras_asks_by_itself(pictures, card, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "without_waiting", contextlib.nullcontext)
    seen, stack = collections.Counter(), contextlib.ExitStack()
    middle = Middle(lambda: stack.enter_context(counting(seen)), stack.close)
    with stack:
        train(pictures, output=tmp_path, callbacks=[middle], **TINY)
    assert sum(seen.values()) == 3 * 4  # three steps
    assert {name for name, _ in seen} == {"as_tensor"}


def test_a_number_is_copied_aside_and_only_its_copy_is_waited_for(monkeypatch):
    import torch

    done = []

    class Number:
        device = types.SimpleNamespace(type="cuda")

        def detach(self):
            return self

        def to(self, where, non_blocking=False):
            done.append(f"copy to {where}, waiting {not non_blocking}")
            return torch.tensor(2.5)

    class Event:
        record = staticmethod(lambda stream: done.append(f"mark on {stream}"))
        synchronize = staticmethod(lambda: done.append("wait for the mark"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: f"the stream of {place.type}")
    number = device.fetch(Number())
    assert done == ["copy to cpu, waiting False", "mark on the stream of cuda"]
    assert number() == 2.5 and done[2:] == ["wait for the mark"]


def test_losses_are_looked_at_many_at_once_and_all_before_a_save(card, monkeypatch):
    waited, saved = [], []
    monkeypatch.setattr(callbacks, "fetch", lambda step: lambda: waited.append(step) or step)
    at = callbacks.Position(steps=60)
    settings = callbacks.Settings(say=print, checkpoint_steps=50)
    run = callbacks.RunCallbacks(
        keras.Sequential(), at, settings, epochs=1, first=[],
        save=lambda: saved.append(len(waited)), check_loss=lambda loss, step: None,
    )  # fmt: skip
    run.begin_epoch(60)
    counts = []
    for step in range(60):
        run.on_train_batch_end(step, {"loss": step})
        counts.append(len(waited))
    assert counts[31:34] == [0, 17, 17]  # those that are 16 steps old, which the device has done
    assert saved == [50] and waited == [*range(60)]


def test_the_next_batch_is_begun_while_one_is_computed(card, monkeypatch, rng):
    monkeypatch.setattr(runner, "devices", lambda: ["Card"])
    waiting, fetch = threading.Barrier(2, timeout=60), device.fetch

    def fetched(value):
        get = fetch(value)
        return lambda: (waiting.wait(), get())[1]  # not before another has been begun

    monkeypatch.setattr(runner, "fetch", fetched)
    model = kr.create_model("resnet_tiny", num_classes=3, include_preprocessing=True)
    batches = [rng.integers(0, 256, (2, 16, 16, 3), np.uint8) for _ in range(4)]
    plain = [model.predict_on_batch(batch) for batch in batches]
    apart = runner.KerasRunner(model)
    for found, expected in zip(apart.in_turn(apart.outputs, batches, 2), plain, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert card.copied.count((2, 16, 16, 3)) == 4
