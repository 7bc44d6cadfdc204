"""A run that is killed at any instant goes on as if it had not been.

`python tests/training/test_resume.py FOLDER KILLS` is the long form: it trains once in peace and
once killed KILLS times, half at a random moment and half in the middle of writing a file, and
compares. pytest runs it with `KERAS_RESNET_KILLS` kills (2 by default; off torch it is long).
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet.models.files import load_model
from keras_resnet.recipes import get_recipe
from keras_resnet.reports import report as reporting
from keras_resnet.system import files
from keras_resnet.system.errors import InputError
from keras_resnet.training.run_folder import Run, SaveError, fingerprint
from keras_resnet.training.train import train

OPTIONS = {
    "model": "resnet_tiny",
    "image_size": 16,
    "batch_size": 4,
    "workers": 1,
    "deterministic": True,
    "checkpoint_steps": 2,
    "dropout": 0.3,
    "mixup": 0.2,
    "class_weights": {"ant": 2.0},
    "sampler": "balanced",
    "ema": True,
    "ema_steps": 1,
    "learning_rate": 0.05,
    "verbose": False,
    "report": False,
}


def write_pictures(folder, count=10, size=16):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 150, (size, size, 3), dtype=np.uint8)
            pixels[..., k] += 60
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("resume") / "pictures")


@pytest.fixture(scope="module")
def peaceful(pictures, tmp_path_factory):
    """The run that nobody interrupts: 3 epochs of 4 steps."""
    return train(pictures, output=tmp_path_factory.mktemp("peaceful"), epochs=3, **OPTIONS)


def numbers(folder):
    """history.csv without the seconds."""
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same_outcome(first, second):
    """Equal history, and equal models to the bit."""
    assert numbers(first) == numbers(second)
    for name in ("best.keras", "last.keras"):
        a, b = load_model(first / name), load_model(second / name)
        for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


class At(keras.callbacks.Callback):
    """Does something after so many steps of this process."""

    def __init__(self, step, action):
        super().__init__()
        self.left, self.action = step, action

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            self.action()


def in_a_process_of_its_own(test):
    """Runs a test by a pytest that runs nothing else."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
         f"{__file__}::{test.name}"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    "steps",
    [pytest.param(1, marks=pytest.mark.once), pytest.param(4, marks=pytest.mark.once), 7],
    ids=["in epoch 1", "at its end", "in epoch 2"],
)
@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(request, tmp_path, steps, backend):
    if backend == "tensorflow" and "PYTEST_XDIST_WORKER" in os.environ:
        # TensorFlow has died here by SIGSEGV, in processes that had run many other tests.
        in_a_process_of_its_own(request.node)
        return
    pictures, peaceful = map(request.getfixturevalue, ("pictures", "peaceful"))
    options = {**OPTIONS, "output": tmp_path, "epochs": 3}
    stop = At(steps, lambda: signal.raise_signal(signal.SIGINT))
    first = train(pictures, callbacks=[stop], **options)
    assert first.interrupted and (first.folder / "last.keras").is_file()
    second = train(pictures, **options)
    assert second.folder == first.folder and not second.interrupted
    assert_same_outcome(peaceful.folder, second.folder)
    assert second.evaluation.loss == peaceful.evaluation.loss
    assert not (second.folder / "state.npz").exists()


@pytest.mark.slow
def test_a_half_precision_run_keeps_its_loss_scale(pictures, tmp_path, backend):
    if backend != "torch" and not os.environ.get("KERAS_RESNET_LONG"):
        pytest.skip("half a minute there: make test-long")

    class Overflow(keras.callbacks.Callback):
        """The gradients of the second step are beyond float16."""

        def on_epoch_begin(self, epoch, logs=None):
            self.scale = float(self.model.optimizer.dynamic_scale)

        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1 and self.scale == 2.0**15:
                self.model.optimizer.dynamic_scale.assign(2.0**30)

    options = {**OPTIONS, "epochs": 2, "precision": "fp16", "unfreeze": "head", "gradual": 1}
    overflow = Overflow()
    peaceful = train(pictures, output=tmp_path / "a", callbacks=[overflow], **options)
    assert 2.0**15 < overflow.scale < 2.0**30  # epoch 2 has an optimizer of its own
    stop = [Overflow(), At(3, lambda: signal.raise_signal(signal.SIGINT))]
    first = train(pictures, output=tmp_path / "b", callbacks=stop, **options)
    with np.load(first.folder / "state.npz") as state:
        counter, scale = state["optimizer/2"], state["optimizer/3"]
    assert first.interrupted and counter < 2 and 2.0**15 < scale < 2.0**30
    second = train(pictures, output=tmp_path / "b", **options)
    assert_same_outcome(peaceful.folder, second.folder)


class Killed(BaseException):
    """Stands for SIGKILL where the test's own process must live on."""


@pytest.mark.once
@pytest.mark.slow
def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(pictures, peaceful, tmp_path):
    def die():
        raise Killed

    options = {**OPTIONS, "output": tmp_path, "epochs": 3}
    with pytest.raises(Killed):
        train(pictures, callbacks=[At(7, die)], **options)  # the last checkpoint: after 6
    folder = next(tmp_path.iterdir())
    with np.load(folder / "state.npz") as state:
        progress = json.loads(bytes(state["progress"]).decode())
    assert (progress["epoch"], progress["step"]) == (1, 2)
    assert_same_outcome(peaceful.folder, train(pictures, **options).folder)


@pytest.mark.once
@pytest.mark.parametrize("moment", [1, 2, 3, 9, 14], ids=lambda n: f"file {n}")
@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_file_goes_on(
    pictures, peaceful, tmp_path, monkeypatch, moment
):
    options = {**OPTIONS, "output": tmp_path, "epochs": 3}
    written, sync = [], os.fsync

    def fsync(handle):
        written.append(handle)
        if len(written) == moment:
            raise Killed
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "unlink", lambda name: None)  # the dead do not clean up
    with pytest.raises(Killed):
        train(pictures, **options)
    monkeypatch.undo()
    folder = next(tmp_path.iterdir())
    assert_whole(folder)
    left = [p for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    assert len(left) <= 1  # none, where it died between the rename and the folder's fsync
    result = train(pictures, **options)
    assert result.folder == folder
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []
    assert_same_outcome(peaceful.folder, folder)


@pytest.mark.once
@pytest.mark.slow
def test_a_run_killed_while_its_report_is_written_goes_on(
    pictures, peaceful, tmp_path, monkeypatch
):
    options = {**OPTIONS, "output": tmp_path, "epochs": 3, "report": True}

    def die(*arguments, **_):
        raise Killed

    monkeypatch.setattr(reporting, "report", die)
    with pytest.raises(Killed):
        train(pictures, **options)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    result = train(pictures, **options)
    assert result.folder == folder and result.evaluation.count == peaceful.evaluation.count
    assert_same_outcome(peaceful.folder, folder)
    assert (folder / "report.html").exists() and not (folder / "state.npz").exists()


@pytest.mark.once
@pytest.mark.slow
def test_gradual_unfreezing_goes_on_where_it_was(pictures, tmp_path):
    options = {**OPTIONS, "epochs": 4, "unfreeze": "head", "gradual": 1, "backbone_rate": 0.5,
               "ema": False}  # fmt: skip
    whole = train(pictures, output=tmp_path / "a", **options)
    stop = At(10, lambda: signal.raise_signal(signal.SIGINT))
    train(pictures, output=tmp_path / "b", callbacks=[stop], **options)
    assert_same_outcome(whole.folder, train(pictures, output=tmp_path / "b", **options).folder)


@pytest.mark.once
def test_other_options_start_a_run_of_their_own_and_are_named(pictures, tmp_path, capsys):
    stop = At(1, lambda: signal.raise_signal(signal.SIGINT))
    first = train(pictures, output=tmp_path, epochs=3, callbacks=[stop], **OPTIONS)
    plan = {"output": tmp_path, "dry_run": True, **OPTIONS, "verbose": True}
    for epochs in (3, 4):  # of more it is the beginning
        assert train(pictures, epochs=epochs, **plan).folder == first.folder
    capsys.readouterr()
    for other, told in (
        ({"epochs": 2}, "it differs in epochs (3 there)."),
        ({"epochs": 3, "seed": 1}, "it differs in seed (0 there)."),
        ({"epochs": 4, "clip_norm": 1.0}, "it differs in clip_norm (None there), epochs (3 there)"),
        ({"epochs": 3, "restart": True}, ""),
    ):
        assert train(pictures, **{**plan, **other}).folder.name == f"{first.folder.name}-2"
        assert told in capsys.readouterr().out


@pytest.mark.once
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.slow
def test_more_epochs_extend_a_run_finished_or_not(pictures, tmp_path, stopped):
    # A constant rate does not depend on the number of epochs: the end is that of one long run.
    options = {**OPTIONS, "ema": False, "dropout": 0.0, "schedule": "constant"}
    long = train(pictures, output=tmp_path / "long", epochs=3, **options)
    stop = [At(6, lambda: signal.raise_signal(signal.SIGINT))] if stopped else []
    first = train(pictures, output=tmp_path, name="a", epochs=2, callbacks=stop, **options)
    assert first.interrupted == stopped
    second = train(pictures, output=tmp_path, name="a", epochs=3, **options)
    assert second.folder == first.folder and len(second.history["loss"]) == 3
    assert_same_outcome(long.folder, second.folder)
    again = train(pictures, output=tmp_path, name="a", epochs=3, dry_run=True, **options)
    assert again.folder.name == "a-2"
    text = (first.folder / "train.log").read_text()
    assert "Extends the run 'a' of 2 epochs to 3." in text


@pytest.mark.once
@pytest.mark.slow
def test_an_extension_that_is_killed_goes_on_and_one_that_cannot_be_is_said(
    pictures, tmp_path, capsys, monkeypatch
):
    def die():
        raise Killed

    options = {**OPTIONS, "ema": False, "output": tmp_path}
    first = train(pictures, epochs=1, **options)
    monkeypatch.setattr(Run, "save_state", lambda *_: die())  # before there is any state
    with pytest.raises(Killed):
        train(pictures, epochs=3, **options)
    monkeypatch.undo()
    with pytest.raises(Killed):
        train(pictures, epochs=3, callbacks=[At(3, die)], **options)
    second = train(pictures, epochs=3, **options)
    assert second.folder == first.folder and len(second.history["loss"]) == 3
    averaged = train(pictures, epochs=1, name="ema", **{**options, "ema": True})
    plan = {**options, "ema": True, "dry_run": True, "verbose": True, "name": "ema"}
    assert train(pictures, epochs=2, **plan).folder.name == f"{averaged.folder.name}-2"
    assert "cannot be extended, for its averaged weights were not kept" in capsys.readouterr().out


@pytest.mark.once
def test_an_unfinished_run_of_01_is_found_though_weights_are_auto_now(tmp_path):
    asdict = {**dataclasses.asdict(get_recipe("finetune")), "weights": None}
    before = {"directory": "/d", "recipe": asdict, "seed": 0, "exif": False, "backend": "torch",
              "data_format": "channels_last"}  # fmt: skip
    # What 0.1 wrote: its words are those of the recipe then, its fingerprint that of the row then.
    assert fingerprint(before) == "66a636949a2de464"
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**before, "fingerprint": fingerprint(before)}))
    (folder / "state.npz").write_bytes(b"x")
    now = {**before, "recipe": dataclasses.asdict(get_recipe("finetune"))}
    found = Run.find(tmp_path, "a", now, restart=False)
    assert found.folder == folder and found.resumed and found.config["start"] == [None, ""]
    (folder / "config.json").write_text(json.dumps({**before, "start": [None, ""]}))
    found = Run.find(tmp_path, "a", now, restart=False)  # of today, where --weights none insisted
    assert not found.resumed and "it differs in weights (None there)" in found.note


@pytest.mark.once
def test_pictures_that_changed_meanwhile_are_said(tmp_path):
    folder = write_pictures(tmp_path / "pictures", count=5)
    options = {**OPTIONS, "output": tmp_path / "runs", "epochs": 2}
    stop = At(1, lambda: signal.raise_signal(signal.SIGINT))
    train(folder, callbacks=[stop], **options)
    (folder / "ant" / "0.png").rename(folder / "ant" / "new.png")
    with pytest.raises(InputError, match=r"have changed since .* Pass --restart"):
        train(folder, **options)
    (folder / "ant" / "new.png").rename(folder / "ant" / "0.png")
    state = next((tmp_path / "runs").glob("*/state.npz"))
    whole = state.read_bytes()
    at = whole.index(b"progress.npy")  # a disk that forgets
    state.write_bytes(whole[: at + 150] + b"\0" + whole[at + 151 :])
    with pytest.raises(InputError, match=r"state\.npz' cannot be read \(.*pass --restart"):
        train(folder, **options)


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("limited", ["state.npz", "last.keras", "history.csv"])
@pytest.mark.slow
def test_a_full_disk_is_said_and_loses_nothing(pictures, peaceful, tmp_path, monkeypatch, limited):
    options = {**OPTIONS, "output": tmp_path, "epochs": 3}
    sync, full = os.fsync, []

    def fsync(handle):
        # Full from the moment this file is written after the first epoch.
        name = os.readlink(f"/proc/self/fd/{handle}")
        stem, suffix = limited.split(".")
        begun = list(tmp_path.glob("*/best.keras"))
        if begun and f"/.{stem}-" in name and name.endswith(suffix):
            full.append(name)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(
        SaveError, match=r"No space left on device\. What was saved before is whole"
    ):
        train(pictures, **options)
    monkeypatch.undo()
    folder = next(tmp_path.iterdir())
    assert_whole(folder)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert_same_outcome(peaceful.folder, train(pictures, **options).folder)


@pytest.mark.once
def test_a_file_that_the_system_refuses_to_grow_is_a_full_disk_too(pictures, tmp_path):
    # A real limit of the kernel: files of at most 200 kB, which no resnet20 fits in.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(SaveError, match="What was saved before is whole"):
            train(pictures, output=tmp_path, epochs=1, **{**OPTIONS, "model": "resnet20"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_whole(next(tmp_path.iterdir()))


@pytest.mark.once
def test_a_model_that_does_not_fit_on_the_disk_keeps_the_old_one(peaceful, tmp_path):
    from keras_resnet.training.run_folder import Run

    run = Run(tmp_path, {})
    run.save_model(peaceful.model, "best.keras")
    before = (tmp_path / "best.keras").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(SaveError, match=r"Cannot save best\.keras"):
            run.save_model(peaceful.model, "best.keras")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in tmp_path.iterdir()] == ["best.keras"]
    assert (tmp_path / "best.keras").read_bytes() == before


# --- SIGKILL -------------------------------------------------------------------------------------


def assert_whole(folder):
    """Every file under a final name can be read to its end."""
    for path in folder.iterdir():
        if path.name.startswith(".") or re.fullmatch(r"tmp[a-z0-9_]{8}", path.name):
            continue
        if path.suffix in (".keras", ".npz"):
            with zipfile.ZipFile(path) as file:
                assert file.testzip() is None, path
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n"), path


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_random_moments_the_run_ends_with_the_same_weights(tmp_path, backend, capsys):
    if backend != "torch" and not os.environ.get("KERAS_RESNET_LONG"):
        pytest.skip("files are written alike on every backend, and interrupted runs go on: long")
    kills = os.environ.get("KERAS_RESNET_KILLS", "2")
    main(tmp_path, int(kills))
    assert f"{kills} kills" in capsys.readouterr().out


# As a command starts: half the CPU seconds of this file's own imports.
_CHILD = """
import sys
from keras_resnet.system.process import keep_keras_alone
keep_keras_alone()
sys.path.insert(0, sys.argv[1])
import test_resume
test_resume._train(*sys.argv[2:])
"""


def _child(folder, epochs, output, moment=None):
    """A process of its own that trains; comes back when its imports are done.

    Not a fork: this process compares models in between, and a fork of one that has computed with
    TensorFlow waits for threads that it does not have.
    """
    words = [str(folder), str(epochs), str(output), str(moment or 0)]
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(pathlib.Path(__file__).parent), *words],
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n", f"no start: {process.wait()}"
    return process


def _train(folder, epochs, output, moment):
    print("ready", flush=True)
    if keras.backend.backend() != "tensorflow":
        sys.modules["tensorflow"] = None  # seconds of import, for Keras to set its seed as well
    if int(moment):
        _die_while_writing(int(moment))
    train(pathlib.Path(folder) / "pictures", output=output, **{**OPTIONS, "epochs": int(epochs)})
    # At once: killed while Python tidies up, a run that is finished would be made a second time.
    os._exit(0)


def _die_while_writing(moment):
    """SIGKILL at a file's fsync (it is written, not renamed) or right after its rename."""
    sync, replace, left = os.fsync, os.replace, [moment]

    def counted(call):
        def do(*arguments):
            left[0] -= 1
            if left[0] == 0 and call is sync:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*arguments)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return do

    files.os.fsync, files.os.replace = counted(sync), counted(replace)


def _is_through(folder):
    """Whether all of a run is done: its state is removed last, and written before `last.keras`."""
    return (folder / "last.keras").is_file() and not (folder / "state.npz").is_file()


def main(folder, kills):
    chance = random.Random(0)
    write_pictures(folder / "pictures")
    epochs = 3 + kills // 3
    assert _child(folder, epochs, folder / "peaceful").wait() == 0, "the run in peace failed"
    name = next((folder / "peaceful").iterdir()).name

    delivered = writing = runs = 0
    while delivered < kills or runs == 0:
        output = folder / f"killed-{runs}"
        while True:
            moment = chance.randrange(1, 30) if chance.random() < 0.5 else None
            if delivered >= kills:
                assert _child(folder, epochs, output).wait() == 0, "the last run failed"
                break
            child = _child(folder, epochs, output, moment)
            if moment is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(chance.uniform(0.5, 6.0))
                child.kill()
            if child.wait() == 0:
                break
            assert child.returncode == -signal.SIGKILL, f"the run failed: {child.returncode}"
            delivered += 1
            writing += moment is not None
            if (output / name).is_dir():
                assert_whole(output / name)
            if _is_through(output / name):
                break  # killed between its last act and its exit; the command would start anew
        folders = {p.name: sorted(f.name for f in p.iterdir()) for p in output.iterdir()}
        assert list(folders) == [name], folders
        assert_same_outcome(folder / "peaceful" / name, output / name)
        assert not [p for p in (output / name).iterdir() if p.name.startswith(".")]
        runs += 1
    print(
        f"{delivered} kills, {writing} of them while a file was written, in {runs} runs of "
        f"{epochs} epochs on {keras.backend.backend()}: equal weights"
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
