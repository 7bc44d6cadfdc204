"""Which device computes, and how exactly."""

from __future__ import annotations

import subprocess
import sys
import types

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.cli import main as command_line
from keras_resnet.cli.commands import _TF32, COMMANDS
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models.files import model_input
from keras_resnet.runtimes import runner, writing
from keras_resnet.system import device
from keras_resnet.system.errors import InputError
from keras_resnet.weights import verify


@pytest.fixture
def as_found():
    """Puts every switch back, whatever a test does with it."""
    before = [(write, read()) for read, write, *_ in device._tf32_switches()]
    yield
    for write, value in before:
        write(value)


def test_tf32_is_off_inside_a_proof_and_as_before_behind_it(as_found):
    assert device.tf32_allowed()  # each backend's own default
    with pytest.raises(ZeroDivisionError), device.exact_float32():
        assert not device.tf32_allowed()
        raise ZeroDivisionError
    assert device.tf32_allowed()
    kr.set_tf32(False)
    with device.exact_float32():
        assert not device.tf32_allowed()
    assert not device.tf32_allowed()
    kr.set_tf32(True)
    assert device.tf32_allowed()


def torch_precisions():
    from torch import backends

    owners = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
    return [owner.fp32_precision for owner in owners]


@pytest.mark.once
@pytest.mark.parametrize("mixed", ["older names", "newer names", "for all"])
def test_whatever_is_set_on_torch_a_proof_is_exact_and_puts_it_back(mixed, as_found):
    import torch

    if mixed == "older names":
        torch.set_float32_matmul_precision("medium")  # bfloat16, where a processor has it
    elif mixed == "newer names":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.fp32_precision = "tf32"
    before = torch_precisions()
    try:
        with device.exact_float32():
            assert torch_precisions() == ["ieee"] * 4
            # As torch.compile reads them: it fails where old and new names say different things.
            assert not torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch_precisions() == before
    finally:
        torch.backends.fp32_precision = "none"


def rounding():
    """Convolutions as TF32 computes them, where it is allowed: operands of 10 bits."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def rounded(x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    class Rounding(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default and device.tf32_allowed():
                args = [*map(rounded, args[:2]), *args[2:]]
            return function(*args, **(kwargs or {}))

    return Rounding()


@pytest.mark.once
def test_a_right_import_is_proved_on_a_device_that_computes_in_tf32(monkeypatch):
    keras.utils.set_random_seed(0)
    model = kr.create_model("resnet20")
    state = kr.to_torchvision(model)
    with rounding():
        assert kr.verify(model, state).error < 1e-5
        bare = verify.verify_source.__wrapped__  # and without the switch?
        monkeypatch.setattr(verify, "verify_source", bare)
        assert kr.verify(model, state).error > 3e-4


@pytest.mark.parametrize("prove", ["verify", "export"])
def test_every_proof_runs_without_tf32(prove, tmp_path, monkeypatch):
    seen = []

    def stop(*_, **__):
        seen.append(device.tf32_allowed())
        raise InputError("That is enough.")

    monkeypatch.setattr(verify, "_stage_tensors", stop)
    monkeypatch.setattr(writing, "write", stop)
    model = kr.create_model("resnet_tiny", num_classes=2)
    with pytest.raises(InputError, match="enough"):
        if prove == "verify":
            kr.verify(model, kr.to_torchvision(model))
        else:
            kr.export(model, tmp_path / "saved", format="saved_model", verify=False) if (
                keras.backend.backend() != "torch"
            ) else kr.export(model, tmp_path / "model.pt2", verify=False)
    assert seen == [False]


@pytest.mark.once
@pytest.mark.parametrize("word, allowed", [("--no-tf32", False), ("--tf32", True)])
def test_the_command_line_has_the_switch(word, allowed, as_found, monkeypatch):
    seen = []
    row = COMMANDS["evaluate"]._replace(
        run=lambda: seen.append(device.tf32_allowed()), arguments=[_TF32], order=None
    )
    monkeypatch.setitem(COMMANDS, "evaluate", row)
    assert command_line.main(["evaluate", word]) == 0
    assert seen == [allowed]
    assert all(_TF32 in COMMANDS[name].arguments for name in ("train", "predict"))


def test_the_device_is_the_one_that_keras_computes_on():
    assert device.devices() == ["cpu"]  # no test machine is asked to have another
    assert device.devices()[0] in device.backend_line()


@pytest.mark.once
def test_a_gpu_is_named_where_keras_computes_on_it(monkeypatch):
    import torch

    made = types.SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(keras.ops, "zeros", lambda shape: made)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"Card {place.index}")
    assert device.devices() == ["Card 1"]  # of two, the one in use


@pytest.mark.once
def test_a_hidden_gpu_gets_no_batches(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # KERAS_TORCH_DEVICE=cpu
    batch = (np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1))
    assert device.Sender()(batch) is batch


def test_info_says_what_a_report_of_a_bug_needs(capsys):
    assert command_line.main(["info"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["backend"] == device.backend_line()
    assert lines["TF32"].startswith("allowed") and lines["engines"].startswith("keras")


def test_a_command_imports_no_more_with_keras_than_it_needs():
    others = "{'cv2', 'IPython', 'jax', 'matplotlib', 'pandas', 'sklearn', 'tensorflow', 'torch'}"
    program = (
        "import sys; from keras_resnet.cli.main import main; "
        "main(['summary', 'resnet_tiny']); import keras; keras.utils.set_random_seed(0); "
        f"print(sorted({others} & {{*sys.modules}})); import pandas; print(pandas.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *_, found, there = done.stdout.splitlines()
    # Keras' seed on jax is one for TensorFlow too.
    backend = keras.backend.backend()
    assert found == str(["jax", "tensorflow"] if backend == "jax" else [backend])
    assert there == "pandas"  # and is not hidden any more


@pytest.mark.once
@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_tries_its_kernels_unless_they_are_to_be_deterministic(deterministic, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert device.cudnn_benchmark() is False
    with device.fastest_convolutions():
        assert device.cudnn_benchmark() is not deterministic
    assert device.cudnn_benchmark() is False


@pytest.mark.parametrize("inside", [True, False])
def test_predictions_on_an_accelerator_send_bytes_and_are_the_same(inside, monkeypatch, rng):
    model = kr.create_model("resnet_tiny", num_classes=3, include_preprocessing=inside)
    preprocess, fed = model_input(model, Preprocess(32, 32))
    images = rng.integers(0, 256, (4, *model.input_shape[1:]), np.uint8)
    as_it_is = runner.KerasRunner(model).outputs(images)
    expected = runner.KerasRunner(model).outputs(images if inside else preprocess.normalize(images))
    monkeypatch.setattr(runner, "devices", lambda: ["Card"])
    sent = []

    class Wire:
        device = None

        def __call__(self, batch):
            sent.extend(array.dtype for array in batch)
            return batch

    monkeypatch.setattr(runner, "Sender", Wire)
    apart = runner.KerasRunner(model)
    assert apart.at_once(4) == 2
    assert apart.fed(preprocess, fed) == "uint8"  # of either it is normalised over there
    found = apart.outputs(images)
    assert sent == [np.uint8]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (
        apart.fed(preprocess, "uint8") == "uint8"
    )  # the next call says that nothing is to be done
    np.testing.assert_allclose(apart.outputs(images), as_it_is, rtol=1e-5, atol=1e-6)
