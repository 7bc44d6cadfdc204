"""The examples run as a reader would run them, and leave behind what they promise."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT

import keras_resnet as kr

EXAMPLES = ROOT / "examples"

# Script -> further arguments, files that it leaves in --output, lines that it prints.
RUNS = {
    "bird_photos_resnet50": (
        [],
        ["batch.png", "curves.png", "model.keras"],
        ["Shape of X [N, H, W, C]: (21, 32, 32, 3)", "Multiply-adds", "Epoch: 1, Train_acc:"],
    ),
    "alexnet_cifar10": (
        ["--batch_size", "16"],
        ["AlexNet_CIFAR10.pth", "curves.png", "confusion_matrix.png", "predictions.csv"],
        ["Conv1     55*55", "Maxpool3  6*6", "[Epoch   1] train_loss:", "[Test ] loss:"],
    ),
    "resnet34_cifar10": (
        [],
        [
            "ResNet/ResNet.pt",
            "ResNet/best.keras",
            "ResNet/train.log",
            "ResNet/history.csv",
            "ResNet/curves.png",
        ],
        ["learning rates: [0.01", "Look into"],
    ),
    "flowers_transfer": (
        ["--freeze"],
        ["resNet34.keras", "resNet34.pth", "class_indices.json", "predicted.png"],
        ["[left out]:\nfc.bias\nfc.weight", "Training 1 layers (5,130 weights)", "class: 0"],
    ),
    "resnet50_v1_relu": (
        [],
        ["summary.txt", "differences.txt"],
        ["Output shape: (1, 1000)", "resnet50_v1 refuses the weights at first"],
    ),
}


def example(name):
    """An example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a script once, away from the checkout; gives what it printed and its output folder."""
    workplace = tmp_path_factory.mktemp("examples")

    @functools.cache
    def once(name):
        # The package need not be installed: the checkout comes first on the path.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, EXAMPLES / f"{name}.py", "--smoke", "--output", name]
        done = subprocess.run(
            [*command, *RUNS[name][0]],
            cwd=workplace,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout, workplace / name

    return once


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_and_leaves_the_files_it_promises(name, run, backend):
    if backend == "jax" and name not in ("resnet50_v1_relu", "alexnet_cifar10"):
        pytest.skip("jax compiles for minutes what runs for seconds; two of the five will do")
    _, files, lines = RUNS[name]

    printed, folder = run(name)

    for line in lines:
        assert line in printed
    for file in files:
        assert (folder / file).stat().st_size > 0


@pytest.mark.once
def test_every_example_is_run_here_and_described():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")

    assert scripts == set(RUNS)
    assert all(f"({name}.py)" in readme for name in scripts)


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
@pytest.mark.slow
def test_the_resnet50_written_by_hand_answers_as_the_one_of_the_table(stride_on, rng):
    by_hand = example("bird_photos_resnet50").resnet50((64, 64, 3), 10, stride_on)
    name = {"1x1": "resnet50_v1", "3x3": "resnet50"}[stride_on]
    model = kr.create_model(name, num_classes=10, input_shape=(64, 64, 3))
    picture = rng.standard_normal((2, 64, 64, 3)).astype("float32")

    report = kr.load_torchvision(by_hand, kr.to_torchvision(model), allow_other_strides=True)
    ours, theirs = (
        keras.ops.convert_to_numpy(each(picture, training=False)) for each in (by_hand, model)
    )

    assert report.ok and len(report.loaded) == 320
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.once
def test_the_saved_alexnet_is_a_state_dict_of_the_pytorch_class(run):
    torch = pytest.importorskip("torch")
    _, folder = run("alexnet_cifar10")

    state = torch.load(folder / "AlexNet_CIFAR10.pth", weights_only=True)

    # nn.Sequential(Conv2d, ...) called conv1 to conv5, nn.Sequential(Flatten, Linear, ...) fc1.
    modules = [*(f"conv{i}.0" for i in range(1, 6)), "fc1.1", "fc2.0", "fc3.0"]
    assert list(state) == [f"{m}.{kind}" for m in modules for kind in ("weight", "bias")]
    assert state["fc1.1.weight"].shape == (4096, 4 * 4 * 256)


@pytest.mark.once
def test_the_sizes_by_the_formula_are_torchs(capsys):
    torch = pytest.importorskip("torch")
    module = example("alexnet_cifar10")

    module.print_sizes(224)

    x = torch.zeros(1, 1, 224, 224)
    for (name, (kernel, strides, padding)), line in zip(
        module.PAPER.items(), capsys.readouterr().out.splitlines()[2:], strict=True
    ):
        x = torch.nn.functional.max_pool2d(x, kernel, strides, padding)
        assert line.split() == [name, f"{x.shape[2]}*{x.shape[3]}"]
