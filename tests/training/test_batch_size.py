"""`batch_size="auto"` on memory that is made up: none of these tests fills any."""

from __future__ import annotations

import json
import os
import signal

import keras
import pytest
from test_resume import At, write_pictures

from keras_resnet.cli import main as cli
from keras_resnet.reports.run_files import read_run
from keras_resnet.system.group import Alone
from keras_resnet.training import batch_size, train as training
from keras_resnet.training.batch_size import largest_batch
from keras_resnet.training.train import train

TINY = {
    "model": "resnet_tiny",
    "image_size": 16,
    "batch_size": "auto",
    "epochs": 1,
    "val_split": 0,
    "workers": 1,
    "report": False,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("auto") / "pictures", count=32)


@pytest.fixture
def gpu(monkeypatch):
    """A device with memory for a training step of so many images: `gpu(count)`."""
    monkeypatch.setattr(batch_size, "devices", lambda: ["some GPU"])
    tried, step = [], keras.Model.train_on_batch

    def make(room):
        def limited(model, images, *others, **options):
            tried.append(len(images))
            if len(images) > room:
                raise out_of_memory()
            return step(model, images, *others, **options)

        monkeypatch.setattr(keras.Model, "train_on_batch", limited)
        return tried

    return make


def out_of_memory():
    if keras.backend.backend() == "torch":
        import torch

        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648")


@pytest.mark.once
@pytest.mark.parametrize(
    "room, most, expected",
    [(100, 1024, 64), (72, 1024, 64), (71, 1024, 32), (9999, 1024, 1024), (9999, 100, 64),
     (3, 1024, 2), (0, 1, 1)],
)  # fmt: skip
def test_the_largest_power_of_two_with_an_eighth_to_spare(room, most, expected):
    def step(count):
        if count > room:
            raise out_of_memory()

    assert largest_batch(step, most) == expected


@pytest.mark.once
def test_what_is_no_lack_of_memory_is_raised_and_so_is_that_of_two_images():
    def broken(count):
        if count > 20:
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        largest_batch(broken, 64)

    def full(count):
        raise MemoryError

    with pytest.raises(MemoryError):
        largest_batch(full, 64)


def test_it_is_found_by_steps_of_training_said_recorded_and_kept(
    pictures, tmp_path, gpu, capsys, backend
):
    if backend != "torch" and not os.environ.get("KERAS_RESNET_LONG"):
        pytest.skip("it compiles for half a minute there: make test-long")
    tried = gpu(room=9)
    options = {**TINY, "output": tmp_path, "mixup": 0.2}
    stop = At(2, lambda: signal.raise_signal(signal.SIGINT))
    first = train(pictures, callbacks=[stop], **options)
    assert tried == [3, 5, 9, 18]
    said = "Batch size: 8 (the largest power of two that fits into memory with an eighth to spare)"
    rate = "; the learning rate stays 0.01, the recipe's for 32\n"
    assert said + rate in capsys.readouterr().out
    config = json.loads((first.folder / "config.json").read_text())
    assert config["batch_size"] == 8 and config["recipe"]["batch_size"] == "auto"
    tried = gpu(room=5)  # another machine, or another program there by now
    second = train(pictures, **options)
    assert second.folder == first.folder and 3 not in tried[4:]
    printed = capsys.readouterr().out
    assert "Batch size: 8 (as the run began)" in printed and "Going on at epoch 1" in printed
    assert "1 epochs of 8 steps of 8" in printed
    assert read_run(second.folder).recipe["batch_size"] == 8


@pytest.mark.once
def test_few_images_keep_the_recipes_batch_size(pictures, tmp_path, gpu, capsys):
    gpu(room=9999)
    train(pictures, output=tmp_path, dry_run=True, **TINY)
    assert "Batch size: 32 (of 64 images a larger one leaves fewer" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


class Two(Alone):
    """The first of two processes, as far as a dry run asks it."""

    size = devices = 2

    def notes(self, batch_size, threads):
        return [f"{batch_size}, norms together: {self.norms_together}"]


@pytest.mark.once
def test_of_two_devices_each_has_a_part_and_norms_are_nobodys_afterwards(
    pictures, tmp_path, gpu, capsys, monkeypatch
):
    tried, group = gpu(room=9), Two()
    monkeypatch.setattr(training, "join", lambda: group)
    train(pictures, output=tmp_path, dry_run=True, **TINY)
    said = capsys.readouterr().out
    assert "Batch size: 16 (8 on each of 2 devices, the largest power of two that fits" in said
    assert tried == [3, 5, 9, 18] and "16, norms together: True" in said
    # Else a later training in one process alone would wait for the others at each norm.
    assert not group.norms_together


@pytest.mark.once
def test_on_a_cpu_memory_is_reckoned_and_the_recipes_is_the_most(
    pictures, tmp_path, monkeypatch, capsys
):
    words = ["train", str(pictures), "--output", str(tmp_path), "--dry-run", "--image-size", "16"]
    words += ["--model", "resnet_tiny", "--batch-size", "AUTO"]
    assert cli.main(words) == 0
    assert "Batch size: 32 (on a CPU the recipe's 32 at most)" in capsys.readouterr().out
    peaks = iter((100, 180))  # 20 bytes an image
    monkeypatch.setattr(batch_size, "peak_memory", lambda anew=False: next(peaks))
    monkeypatch.setattr(batch_size, "free_memory", lambda: 399)
    assert cli.main(words) == 0
    assert "Batch size: 16 (the largest power of two that fits" in capsys.readouterr().out


@pytest.mark.once
@pytest.mark.parametrize(
    "words, expected",
    [
        (["train", "--batch-size", "most"], "invalid int or auto value: 'most'"),
        (["train", "--auto-batch"], "Give --batch-size auto."),
        (["lr-find", "--batch-size", "auto"], "train --dry-run says what 'auto' comes to"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(pictures, capsys, words, expected):
    try:
        assert cli.main([words[0], str(pictures), *words[1:]]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
