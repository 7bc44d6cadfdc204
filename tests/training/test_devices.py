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
from keras_resnet.cli import launch, main as cli
from keras_resnet.system import files, group as groups, process
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
    die, then = options.pop("die", None), options.pop("then", [])
    result = kr.train(pictures, output=output, callbacks=[Die(*die)] if die else [], **options)
    print(json.dumps([str(result.folder), result.interrupted]))
    for words in then:
        assert cli.main(words) == 0


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


def write_pictures(*where, **how):
    from test_resume import write_pictures  # here, for the processes of this file need it not

    return write_pictures(*where, **how)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
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
def test_two_processes_train_and_predict_as_one(pictures, tmp_path):
    """Partial batches, mixup across parts, weights, accumulation past epochs, EMA, clipping.

    And then both classify images by one model into one file, and measure it: to the same bytes.
    """
    model, shown = tmp_path / "1" / "run" / "best.keras", tmp_path / "shown"
    write_pictures(shown, count=5)
    (shown / "ant" / "3.png").write_bytes(b"no image")

    def then(name):
        words = [str(model), str(shown), "--batch-size", "3", "--output", str(tmp_path / name)]
        both = [str(model), str(model.with_name("last.keras")), *words[1:-1]]
        return [
            ["predict", *words[:-1], f"{words[-1]}.jsonl"],
            ["predict", *both, f"{words[-1]}.csv", "--tta", "flip"],
            ["evaluate", *words, "--tta", "flip"],
            ["embed", *words[:-1], f"{words[-1]}.npz"],
        ]

    table = tmp_path / "t.csv"
    found = sorted(pictures.rglob("*.png"))
    lines = [f"{path},{path.parent.name},{i % 4}" for i, path in enumerate(found)]
    table.write_text("\n".join(["path,label,sample_weight", *lines]))
    options = {**EVERYTHING, "name": "run"}
    alone, _ = train_in(1, table, tmp_path / "1", then=then("a"), **options)
    together, ended = train_in(2, table, tmp_path / "2", then=then("b"), **options)
    assert [code for *_, code in ended] == [0, 0], ended
    assert difference(alone, together) < 1e-10
    assert_equal_history(alone, together)
    counts = [
        json.loads((run / "evaluation.json").read_text())["count"] for run in (alone, together)
    ]
    assert counts == [8, 8]
    assert "9 images: top-1" in ended[0][0] and "9 images: top-1" not in ended[1][0]
    names = ".jsonl", ".errors.csv", ".csv", ".npz", "/evaluation.json", "/predictions.csv"
    for name in (f"{{}}{ending}" for ending in names):
        one, other = ((tmp_path / name.format(who)).read_bytes() for who in "ab")
        assert one and one == other, name


@once
@long
def test_sixteen_images_a_step_are_two_times_eight_and_four_times_four(tmp_path):
    """ResNet-20 after eight steps, half of them of partial batches."""
    options = EVERYTHING | {"model": "resnet20", "image_size": 32, "batch_size": 16, "epochs": 4}
    pictures = write_pictures(tmp_path / "pictures", count=16, size=32)
    alone, _ = train_in(1, pictures, tmp_path / "1", **options)
    for processes in (2, 4):
        together, ended = train_in(processes, pictures, tmp_path / str(processes), **options)
        assert [code for *_, code in ended] == [0] * processes, ended
        largest = difference(alone, together)
        print(f"{processes} processes: the largest difference of a weight is {largest:.2g}")
        assert largest < 1e-10
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
    rng = np.random.default_rng(0)
    for step, rank in zip(range(2, 12), rng.integers(0, 2, 10).tolist(), strict=True):
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
def test_a_batch_that_no_process_can_read_is_replaced_in_all(tmp_path):
    """One that some can read is not, though others have nothing of it."""
    found = sorted(write_pictures(tmp_path / "few", count=4).rglob("*.png"))
    for path in (*found[:4], *found[6:]):
        path.write_bytes(b"no image")
    made = []
    for part in ((0, 1), (0, 2), (1, 2)):
        data = kr.ImageDataset(found, [0, 1] * 4, ["a", "b"], batch_size=4, shuffle=False,
                               preprocess=kr.Preprocess(16, 16), mixup=0.5, seed=1)  # fmt: skip
        data.part = part
        made.append(prepare.readable_batch(data, 0)[0])
    whole, *parts = map(keras.ops.convert_to_numpy, made)
    assert [len(images) for images in (whole, *parts)] == [2, 2, 0]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@once
def test_a_step_sends_its_gradients_and_one_small_message(pictures, tmp_path, monkeypatch):
    """All that is sent, counted by torch, in a group of one process."""
    import torch

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KERAS_RESNET_MEETING", str(tmp_path))
    monkeypatch.setattr(groups, "_group", None)
    monkeypatch.setattr(process, "store", None)
    monkeypatch.setattr(keras.Model, "_initialize_ddp", lambda model: 1 / 0, raising=False)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                profiler.start()
            if batch == 5:
                profiler.stop()

    try:
        options = {**OPTIONS, "batch_size": 7, "epochs": 1, "mixup": 0.2, "ema": True}
        kr.train(pictures, output=tmp_path / "runs", callbacks=[Count()], **options)
        buckets = groups.current().ddp._get_ddp_logging_data()["bucket_sizes"].split(",")
    finally:
        torch.distributed.destroy_process_group()
    sent = [e for e in profiler.events() if e.name.startswith("c10d::")]
    counts = {e.name: sum(one.name == e.name for one in sent) / 4 for e in sent}
    assert counts == {"c10d::allreduce_": len(buckets), "c10d::allgather_": 1}
    assert keras.Model._initialize_ddp(None) is None  # Keras 3.16 wraps no model beside it


@once
def test_folders_of_killed_launchers_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("keras_resnet-killed", "keras_resnet-running", "keras_resnet-begins", "mine-x"):
        (tmp_path / name).mkdir()
        if not name.endswith("begins"):
            (tmp_path / name / "lock").touch()
    held = files.take_lock(tmp_path / "keras_resnet-running" / "lock")
    launch._sweep()
    held.release()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"keras_resnet-running", "keras_resnet-begins", "mine-x"}


@once
@pytest.mark.parametrize("asked, each", [(None, None), (0, 0), (1, 1), (7, 2)])
def test_threads_that_are_asked_for_are_shared_out(monkeypatch, asked, each):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert process.threads_each(asked) == each


@once
def test_other_commands_are_for_one_process(pictures, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["lr-find", str(pictures)]) == 2
    assert "for one process: give it without torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cli.main(["predict", "x.keras", str(pictures)]) == 2
    assert cli.main(["lr-find", str(pictures)]) == 2
    assert "WORLD_SIZE must be a whole number, as torchrun" in capsys.readouterr().err


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
    assert len(left) == 1 and "Stopping" not in text and not [*home.iterdir()]


@once
@long
@pytest.mark.parametrize("number, whom", [("INT", "launcher"), ("TERM", "last"), ("KILL", "first")])
def test_a_prediction_in_two_processes_goes_on(tmp_path, number, whom):
    """Interrupted or killed, and then with another number of them: to the bytes of one."""
    model = kr.create_model("resnet_tiny", num_classes=2, input_shape=(16, 16, 3))
    model.info["preprocess"] = kr.Preprocess(16, 16).get_config()
    model.save(tmp_path / "model.keras")
    big, output = tmp_path / "big", tmp_path / "answers.jsonl"
    big.mkdir()
    few = sorted(write_pictures(tmp_path / "few", count=20).rglob("*.png"))
    few[7].write_bytes(b"no image")
    for i in range(3000):
        os.link(few[i % 40], big / f"{i:05}.png")
    words = ["predict", str(tmp_path / "model.keras"), str(big), "--batch-size", "4", "--output"]

    def begin(*more):
        return subprocess.Popen(
            [sys.executable, "-m", "keras_resnet", *words, *more], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    launcher, part = begin(str(output), "--devices", "2"), tmp_path / "answers.jsonl.part"
    while not (part.exists() and part.stat().st_size > 20_000):
        assert launcher.poll() is None
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], text=True, capture_output=True)
    pair = sorted(map(int, found.stdout.split()))
    victim = {"launcher": launcher.pid, "first": pair[0], "last": pair[1]}[whom]
    os.kill(victim, signal.Signals[f"SIG{number}"])
    error = launcher.communicate(timeout=100)[1]
    if number == "KILL":
        assert launcher.returncode == 1 and "ended by SIGKILL. Give the same command" in error
    else:
        assert launcher.returncode == 130 and error.count("Interrupted at") == 1, error
    again = begin(str(output), "--devices", "3")
    assert "Going on behind" in again.communicate(timeout=100)[0]
    assert begin(str(tmp_path / "one.jsonl")).wait() == 0
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
