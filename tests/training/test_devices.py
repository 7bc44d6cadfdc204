"""One training in several processes, each with its part of every batch, is the one of one process.

This file is also the program that those processes run: `test_devices.py PICTURES OUTPUT OPTIONS`.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
import types
from contextlib import nullcontext

from keras_resnet.system.process import keep_keras_alone

keep_keras_alone()  # before Keras is imported: each process here would take twice as long

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.system import group as groups, process
from keras_resnet.system.errors import DataError, OtherProcessError
from keras_resnet.training import prepare, train as training
from keras_resnet.training.callbacks import Position

once, long = pytest.mark.once, pytest.mark.long

OPTIONS = {
    "model": "resnet_tiny",
    "recipe": "cifar",
    "image_size": 16,
    "epochs": 2,
    "batch_size": 16,
    "workers": 1,
    "learning_rate": 0.05,
    "report": False,
    "verbose": False,
}


EVERYTHING = {  # of the last batches, one image each, other processes have no part
    "float64": True,
    "batch_size": 7,
    "val_split": 0.15,
    "epochs": 3,
    "mixup": 0.4,
    "class_weights": "ant=3",
    "sampler": "balanced",
    "cutmix": 0.3,
    "label_smoothing": 0.1,
    "random_erasing": 0.5,
    "accumulate": 3,
    "clip_norm": 1.0,
    "ema": True,
    "ema_steps": 1,
    "checkpoint_steps": 2,
}


class Die(keras.callbacks.Callback):
    """Ends this process, or does something else to it, after so many steps; once."""

    def __init__(self, rank, step, number, mark):
        super().__init__()
        self.rank, self.left, self.number, self.mark = rank, step, number, pathlib.Path(mark)

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        here = int(os.environ.get("RANK", 0)) == self.rank
        if here and self.left == 0 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), self.number)


def main(pictures, output, options):
    """`kr.train`, in float64 where asked, so that rounding hides nothing."""
    options = json.loads(options)
    if options.pop("float64", False):
        keras.config.set_floatx("float64")
        prepare._POLICIES["fp32"] = "float64"
    die = options.pop("die", None)
    result = kr.train(pictures, output=output, callbacks=[Die(*die)] if die else [], **options)
    print(json.dumps([str(result.folder), result.interrupted]))


def train_in(processes, pictures, output, **options):
    """Trains in so many processes; gives the run folder, and each one's exit code and output."""
    options = {**OPTIONS, **options}
    with tempfile.TemporaryDirectory() as meeting:
        started = []
        for rank in range(processes):
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            if processes > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                        "LOCAL_WORLD_SIZE": str(processes), "KERAS_RESNET_MEETING": meeting,
                        "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            started.append(subprocess.Popen(
                [sys.executable, __file__, str(pictures), str(output), json.dumps(options)],
                env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ))  # fmt: skip
        ended = [(*process.communicate(timeout=200), process.returncode) for process in started]
    return next(pathlib.Path(output).glob("*"), None), ended


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from test_resume import write_pictures  # here, for the processes of this file need it not

    return write_pictures(tmp_path_factory.mktemp("devices") / "pictures", count=29)


def numbers(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: float(v) for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)]


def assert_equal_history(a, b):
    for one, other in zip(numbers(a), numbers(b), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-7)


def difference(a, b):
    """The largest of a weight of the last or the best model."""
    largest = 0.0
    for name in ("last.keras", "best.keras"):
        one, other = (kr.load_model(folder / name).get_weights() for folder in (a, b))
        largest = max(largest, *(np.abs(v - w).max() for v, w in zip(one, other, strict=True)))
    return largest


@once
@pytest.mark.slow
def test_two_processes_train_as_one(pictures, tmp_path):
    """Partial batches, mixup across parts, weights, accumulation past epochs, EMA, clipping."""
    table = tmp_path / "t.csv"
    found = sorted(pictures.rglob("*.png"))
    lines = [f"{path},{path.parent.name},{i % 4}" for i, path in enumerate(found)]
    table.write_text("\n".join(["path,label,weight", *lines]))
    pictures = table
    alone, _ = train_in(1, pictures, tmp_path / "1", **EVERYTHING)
    together, ended = train_in(2, pictures, tmp_path / "2", **EVERYTHING)
    assert [code for *_, code in ended] == [0, 0], ended
    assert difference(alone, together) < 1e-10
    assert_equal_history(alone, together)
    counts = [
        json.loads((run / "evaluation.json").read_text())["count"] for run in (alone, together)
    ]
    assert counts == [8, 8]


@once
@long
def test_four_processes_train_as_one(pictures, tmp_path):
    alone, _ = train_in(1, pictures, tmp_path / "1", **EVERYTHING)
    together, ended = train_in(4, pictures, tmp_path / "4", **EVERYTHING)
    assert [code for *_, code in ended] == [0] * 4, ended
    assert difference(alone, together) < 1e-10
    assert_equal_history(alone, together)


@once
@long
def test_frozen_norms_leave_rounding_alone(pictures, tmp_path):
    """In float32, and where the last layers alone train."""
    options = {"freeze_norms": True, "unfreeze": "layer2", "learning_rate": 0.01}
    alone, _ = train_in(1, pictures, tmp_path / "1", **options)
    together, _ = train_in(2, pictures, tmp_path / "2", sync_bn=False, **options)
    assert difference(alone, together) < 1e-5


@once
def test_a_step_beyond_float16_is_skipped_as_in_one_process():
    """Within a window of accumulated steps, of which it is then none."""

    def made():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        inner = keras.optimizers.SGD(0.01, gradient_accumulation_steps=3)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**110)
        model.compile(optimizer, "mse", jit_compile=False)
        return model

    alone, joined = made(), made()
    group = types.SimpleNamespace(rank=0, size=1, tell_size=lambda size: lambda: size)
    group.ddp = type("DDP", (), {"__call__": lambda _, x: joined(x), "no_sync": nullcontext})()
    at = Position(steps=12)
    step = groups._Step(group, joined, at, seed=0)
    rng = np.random.default_rng(0)
    for number in range(12):
        x, y = (rng.normal(size=(4, n)).astype("float32") for n in (3, 1))
        x *= 1e4 if number in (1, 5, 6) else 1
        alone.train_on_batch(x, y)
        step([tuple(map(keras.ops.convert_to_tensor, (x, y)))])
        at.step += 1
    assert int(alone.optimizer.inner_optimizer._iterations) == 9
    assert float(alone.optimizer.dynamic_scale) == float(joined.optimizer.dynamic_scale) == 2.0**107
    for one, other in zip(alone.get_weights(), joined.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


class Odd(Exception):
    """Cannot be made from its own text."""

    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")


@once
@pytest.mark.parametrize(
    "error, elsewhere", [(DataError("none"), DataError), (Odd(5, "lost"), OtherProcessError)]
)
def test_an_error_of_the_first_process_is_raised_in_all(monkeypatch, error, elsewhere):
    sent = []

    def broadcast(box, *others, **options):
        if sent:
            box[:] = pickle.loads(sent[0])
        sent.append(pickle.dumps(box))

    monkeypatch.setattr(groups.dist, "broadcast_object_list", broadcast)

    def make():
        raise error

    with pytest.raises(type(error)) as first:
        groups._Joined(0, 2, None).from_first(make)
    with pytest.raises(elsewhere) as other:
        groups._Joined(1, 2, None).from_first(make)
    assert first.value is error and str(other.value) == str(error)


@once
@pytest.mark.parametrize("count, restart", [("0", True), ("1", False)])
def test_a_process_in_anothers_place_goes_on(pictures, tmp_path, monkeypatch, count, restart):
    """Though the words that torchrun gives it again ask for a new run."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    asked, find = [], training.Run.find
    monkeypatch.setattr(
        training.Run, "find", lambda *words: asked.append(words[-1]) or find(*words)
    )
    kr.train(pictures, output=tmp_path, dry_run=True, restart=True, **OPTIONS)
    assert asked == [restart]


ELASTIC = {
    "epochs": 3,
    "mixup": 0.2,
    "dropout": 0.3,
    "ema": True,
    "ema_steps": 1,
    "accumulate": 2,
    "checkpoint_steps": 2,
    "deterministic": True,
}


def torchrun(pictures, output, *words, **options):
    """Runs this file under torchrun, and a minute's patience; gives the run folder and the end."""
    options = json.dumps({**OPTIONS, **ELASTIC, **options})
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words),
            *(__file__, str(pictures), str(output), options),
        ],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    return next(pathlib.Path(output).glob("*"), None), ended


@once
@long
def test_a_killed_process_changes_no_bit(pictures, tmp_path):
    peaceful, _ = torchrun(pictures, tmp_path / "peaceful")
    for rank, step in ((0, 3), (1, 6), (0, 9), (1, 12)):
        output, mark = tmp_path / f"{rank}-{step}", str(tmp_path / f"mark{rank}-{step}")
        die = [rank, step, signal.SIGKILL, mark]
        folder, ended = torchrun(pictures, output, "--max-restarts", "1", die=die, restart=True)
        assert ended.returncode == 0 and len(list(output.iterdir())) == 1, ended.stderr
        assert difference(peaceful, folder) == 0 and numbers(peaceful) == numbers(folder)


@once
@long
def test_sigterm_to_one_process_ends_all_at_the_same_step(pictures, tmp_path):
    """And the same command goes on, also with another number of processes."""
    peaceful, _ = torchrun(pictures, tmp_path / "peaceful")
    for output in (tmp_path / "again", tmp_path / "alone"):
        die = [1, 5, signal.SIGTERM, str(output) + ".mark"]
        folder, ended = torchrun(pictures, output, "--max-restarts", "1", die=die)
        assert ended.returncode == 0 and ended.stdout.count("true]") == 2, ended
        # Agreed upon during the step behind the signal, and done where no gradients wait.
        assert "Interrupted at epoch 2, step 2 of 4" in (folder / "train.log").read_text()
    folder, ended = torchrun(pictures, tmp_path / "again")
    assert difference(peaceful, folder) == 0 and numbers(peaceful) == numbers(folder)
    folder, ended = train_in(1, pictures, tmp_path / "alone", **ELASTIC)
    log = (folder / "train.log").read_text()
    assert "The run was on 2 devices, and is on 1 from here" in log
    assert len(numbers(folder)) == 3


@once
@long
@pytest.mark.parametrize("sync_bn", [True, False])
def test_a_batch_of_one_image_leaves_the_other_process_none(pictures, tmp_path, sync_bn):
    options = {"float64": True, "batch_size": 1, "epochs": 1, "freeze_norms": not sync_bn}
    alone, _ = train_in(1, pictures, tmp_path / "1", **options)
    together, ended = train_in(2, pictures, tmp_path / "2", sync_bn=sync_bn, **options)
    assert [code for *_, code in ended] == [0, 0], ended
    assert difference(alone, together) < 1e-10
    assert_equal_history(alone, together)


@once
def test_a_part_without_images_counts_for_nothing():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True), metrics=["accuracy"])
    model.test_function = groups.tested_by(model)
    rng = np.random.default_rng(0)
    some = (rng.normal(size=(4, 3)).astype("float32"), np.array([0, 1, 1, 0]))
    none = tuple(part[:0] for part in some)
    whole = model.evaluate(*some, verbose=0)
    for parts in ([some, none], [none, some]):
        assert model.evaluate((part for part in parts), steps=2, verbose=0) == whole
    assert model.evaluate((part for part in [none]), steps=1, verbose=0) == [0.0, 0.0]


@once
def test_a_run_whose_torchrun_is_gone_ends_and_can_go_on(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_PARENT", -1)
    assert not process.orphaned()  # one that no torchrun has started
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert kr.train(pictures, output=tmp_path, **OPTIONS).interrupted


@once
def test_devices_of_a_call_are_torchruns(pictures):
    with pytest.raises(kr.InputError, match="torchrun --nproc-per-node N SCRIPT"):
        kr.train(pictures, devices=2)


@once
@long
def test_a_command_whose_launcher_is_killed_ends_and_nothing_is_left(pictures, tmp_path):
    """And goes on in one whose second process is killed, of which the other says no word."""
    home = tmp_path / "tmp"
    home.mkdir()
    words = ["train", str(pictures), "--recipe", "cifar", "--model", "resnet_tiny", "--epochs"]
    words += ["--image-size", "16", "--output", str(tmp_path / "runs"), "--devices", "2"]
    words.insert(words.index("--epochs") + 1, "1000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(home)}

    def workers(launcher):
        found = subprocess.run(["pgrep", "-P", str(launcher.pid)], text=True, capture_output=True)
        return [int(number) for number in found.stdout.split()]

    def started():
        launcher = subprocess.Popen(
            [sys.executable, "-m", "keras_resnet", *words], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said = ""
        while "Epoch:" not in said:
            said = launcher.stdout.readline()
            assert said
        return launcher, workers(launcher)

    launcher, pair = started()
    launcher.kill()
    # Until both have closed it: they have ended.
    assert len(pair) == 2 and "The same command goes on from here." in launcher.stdout.read()
    left = [*home.iterdir()]
    launcher, pair = started()
    os.kill(max(pair), signal.SIGKILL)
    text = launcher.communicate(timeout=100)[0]
    assert launcher.returncode == 1 and "was ended by SIGKILL" in text
    assert "Stopping" not in text and [*home.iterdir()] == left


if __name__ == "__main__":
    main(*sys.argv[1:])
