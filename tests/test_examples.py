"""The examples run as a reader would run them, and leave behind what they promise."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT

import keras_resnet as kr
from keras_resnet.cli.demo import write_digits
from keras_resnet.recipes import get_recipe
from keras_resnet.training.schedules import make_schedule

EXAMPLES = ROOT / "examples"

# Script -> further arguments, files that it leaves in --output, lines that it prints.
RUNS = {
    "bird_photos_resnet50": (
        [],
        ["batch.png", "curves.png", "model.keras"],
        [
            "Shape of X [N, H, W, C]: (20, 32, 32, 3)",
            "Multiply-adds",
            "Epoch: 1, Train_acc:",
            "Dataset ImageDataset\n    Number of images: 80\n    Root location: runs/digits-10\n",
            "Beside torchsummary's table",
        ],
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
            "logs/ResNet0.txt",
        ],
        [
            "20 for training, none held out for validation: best.keras is the last epoch",
            "learning rates: [0.01, 0.001, 0.001, 0.0001]",
            "Look into",
        ],
    ),
    "flowers_transfer": (
        ["--freeze"],
        ["resNet34.keras", "resNet34.pth", "class_indices.json", "predicted.png"],
        [
            "[missing_keys]:\nfc.weight\nfc.bias\n[unexpected_keys]:\n",
            "Training 1 layers (5,130 weights)",
            "\n[epoch 1] train_loss: ",
            "class: 0",
        ],
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
    """Runs a script once, away from the checkout; gives what it printed and its output folder.

    One in a process of its own, as a reader would; the others in this one, to save their imports.
    """
    workplace = tmp_path_factory.mktemp("examples")

    @functools.cache
    def once(name):
        command = [str(EXAMPLES / f"{name}.py"), "--smoke", "--output", name, *RUNS[name][0]]
        if name != "resnet50_v1_relu":
            with (
                contextlib.chdir(workplace),
                contextlib.redirect_stdout(io.StringIO()) as printed,
                pytest.MonkeyPatch.context() as patch,
            ):
                patch.setattr(sys, "argv", command)
                example(name).main()
            return printed.getvalue(), workplace / name
        # The package need not be installed: the checkout comes first on the path.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, *command],
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
@pytest.mark.long("tensorflow", "jax")  # where what they use is tested by itself
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_and_leaves_the_files_it_promises(name, run):
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


@pytest.mark.once
def test_every_example_says_where_the_programs_parts_are_and_keeps_its_trial_apart():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "Where the program's parts are: " in text
        assert text.count("args.smoke") == 1, path.name


@pytest.mark.once
def test_the_rate_drops_where_the_posted_rule_lowers_it():
    rate_drops = example("resnet34_cifar10").rate_drops
    for epochs in (2, 3, 4, 5, 50, 1000):
        rate, rates = 0.01, []
        for epoch in range(epochs):  # the rule as posted, its crash repaired
            if (epoch + 1) % int(epochs / 2) == 0:
                rate /= 10
            rates.append(rate)
        recipe = get_recipe("resnet34_cifar10").with_options(
            epochs=epochs, milestones=rate_drops(epochs)
        )
        schedule = make_schedule(recipe, steps_per_epoch=3)
        ours = [schedule.value_at(3 * epoch) for epoch in range(epochs)]
        np.testing.assert_allclose(ours, rates, rtol=1e-6)
    assert rate_drops(1) == ()


@pytest.mark.once
def test_the_loss_of_every_part_is_the_mean_of_its_steps(tmp_path):
    callback = example("resnet34_cifar10").PartLosses(6, tmp_path / "logs" / "ResNet0.txt")
    losses = [3.0, 1.0, 2.0, 0.5, 0.25, 0.0, 9.0]
    callback.on_epoch_begin(0)
    for i in range(7):
        callback.on_train_batch_end(i, {"loss": np.mean(losses[: i + 1])})
    callback.on_epoch_end(0, {"accuracy": 0.5})
    assert callback.path.read_text().splitlines() == [
        "epoch 0   part 2     loss: 2.0000000", "epoch 0   part 5     loss: 0.2500000",
        "Accuracy of the network on the train images: 50%",
    ]  # fmt: skip


@pytest.mark.once
def test_cifar10_as_keras_gives_it_becomes_folders(tmp_path, rng):
    arrays = [
        (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n)[:, None] % 10)
        for n in (20, 10)
    ]
    folder = example("alexnet_cifar10").write_cifar10(tmp_path / "cifar10", arrays)
    test_set = kr.image_dataset_from_directory(
        folder / "test", image_size=32, batch_size=10, shuffle=False
    )
    assert test_set.class_names[:3] == ["airplane", "automobile", "bird"]
    np.testing.assert_array_equal(test_set[0][0], arrays[1][0])
    assert len(list((folder / "train").rglob("*.png"))) == 20


@pytest.mark.once
def test_few_digits_are_as_many_of_each(tmp_path):
    folder = write_digits(tmp_path / "few", each=2)
    assert [len(list((folder / str(d)).iterdir())) for d in range(10)] == [2] * 10


@pytest.mark.slow
@pytest.mark.once
def test_the_third_way_trains_one_layer_behind_the_head_of_1000_classes(tmp_path):
    module = example("flowers_transfer")
    kr.save_torchvision(kr.ResNet34(), tmp_path / "resnet34-pre.pth")
    net = module.transfer(3, tmp_path / "resnet34-pre.pth", 5, 64)
    report = kr.freeze(net, until="head")
    assert net.output_shape == (None, 5) and report.trained == ["new_head"]
    assert sum(np.prod(w.shape) for w in net.trainable_weights) == 1000 * 5 + 5


@pytest.mark.slow
@pytest.mark.once
def test_the_saved_resnet34_is_the_best_epoch(run):
    _, folder = run("flowers_transfer")
    model = kr.load_model(folder / "resNet34.keras")
    loaded = kr.ResNet34(num_classes=10)
    assert kr.load_torchvision(loaded, folder / "resNet34.pth").ok
    ours, theirs = (keras.ops.convert_to_numpy(m.layers[-1].kernel) for m in (model, loaded))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
@pytest.mark.slow
@pytest.mark.once
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
