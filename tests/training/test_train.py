"""The main job through the command line: what is written, and what bad input gets."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet.cli import main as cli
from keras_resnet.inference.evaluate import evaluate
from keras_resnet.inference.explain import iter_explanations
from keras_resnet.inference.predict import predict
from keras_resnet.inference.service import Limits, Service
from keras_resnet.models.files import load_model
from keras_resnet.models.zoo import create_model
from keras_resnet.recipes import get_recipe
from keras_resnet.runtimes.select import open_runner
from keras_resnet.system.errors import DataError, InputError
from keras_resnet.system.progress import shows_bars
from keras_resnet.training import callbacks as run_callbacks, train as training
from keras_resnet.training.freeze import load_pretrained
from keras_resnet.training.prepare import prepare_data
from keras_resnet.training.schedules import make_schedule
from keras_resnet.training.train import train

TINY = {
    "model": "resnet_tiny",
    "image_size": 16,
    "batch_size": 8,
    "epochs": 2,
    "workers": 1,
    "verbose": False,
    "report": False,  # tests/reports/test_report.py looks at those
}
FLAGS = [
    "--model", "resnet_tiny", "--image-size", "16", "--batch-size", "8", "--workers", "1",
    "--no-report",
]  # fmt: skip


def write_pictures(folder, classes=("ant", "bee", "cat"), count=10, size=20, seed=0):
    """Noise with one strong channel a class: easy to tell apart, quick to read."""
    rng = np.random.default_rng(seed)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (size, size, 3), dtype=np.uint8)
            pixels[..., k % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A run folder that the tests of this file only look at, and what `train` gave."""
    output = tmp_path_factory.mktemp("output")
    options = {**TINY, "epochs": 4, "report": True}
    return train(pictures, output=output, learning_rate=0.1, crop="none", **options)


def run_cli(*arguments, capsys):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_line(err):
    """The single line that bad input gets."""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("keras-resnet: "), err
    return lines[0]


# --- what a run leaves ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_folder_holds_what_the_readme_promises(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "best.keras", "last.keras", "history.csv", "curves.png", "batch.png", "config.json",
        "class_indices.json", "train.log", "evaluation.json", "predictions.csv",
        "confusion_matrix.png", "report.html", "MODEL_CARD.md",
    }  # fmt: skip
    assert json.loads((finished.folder / "class_indices.json").read_text()) == {
        "0": "ant",
        "1": "bee",
        "2": "cat",
    }


@pytest.mark.once
def test_config_names_arguments_versions_backend_and_data(finished, backend):
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["status"] == "finished" and config["backend"] == backend
    assert config["class_counts"] == {
        "train": {"ant": 8, "bee": 8, "cat": 8},
        "val": {"ant": 2, "bee": 2, "cat": 2},
    }
    assert config["recipe"]["learning_rate"] == 0.1 and config["arguments"]["seed"] == 0
    assert config["versions"]["keras"] == keras.__version__ and backend in config["versions"]
    assert config["model"]["parameters"] == 5266 - 7 * 17  # three classes instead of ten
    assert config["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    assert config["devices"] == ["cpu"] and config["tf32"] is True


def test_history_is_one_row_an_epoch(finished):
    with open(finished.folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    for key in ("accuracy", "loss", "val_accuracy", "val_loss", "learning_rate"):
        np.testing.assert_allclose([float(r[key]) for r in rows], finished.history[key], rtol=1e-6)


def test_fit_and_evaluate_agree_on_the_best_model(finished, pictures):
    best = int(np.argmax(finished.history["val_accuracy"]))
    again = evaluate(finished.folder / "best.keras", _validation_folder(finished, pictures))
    for result in (finished.evaluation, again):
        assert result.top1 == pytest.approx(finished.history["val_accuracy"][best], abs=1e-6)
        assert result.loss == pytest.approx(finished.history["val_loss"][best], rel=1e-3)


def _validation_folder(finished, pictures):
    """A folder with the pictures that were held out, to evaluate without the run's own dataset."""
    folder = finished.folder.parent / "held_out"
    for row in finished.evaluation.rows:
        target = folder / row["true"] / pathlib.Path(row["path"]).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(pathlib.Path(row["path"]).read_bytes())
    return folder


def test_the_network_learns_what_is_easy(finished):
    assert finished.history["loss"][-1] < 0.5 * finished.history["loss"][0]


def test_a_model_file_is_enough_to_predict(finished, pictures, tmp_path):
    moved = tmp_path / "elsewhere.keras"
    moved.write_bytes((finished.folder / "best.keras").read_bytes())
    model = load_model(moved)
    assert model.info["class_names"] == ["ant", "bee", "cat"]
    assert model.info["training"]["recipe"] == "finetune"
    paths = sorted(str(p) for p in pictures.glob("*/*.png"))
    answers = predict(moved, pictures, batch_size=7)  # 30 pictures: the last batch is not full
    assert [a.path for a in answers] == paths
    truth = {row["path"]: row for row in finished.evaluation.rows}
    for answer in answers:
        if answer.path in truth:
            assert answer.classes[0][0] == truth[answer.path]["predicted"]
            assert answer.classes[0][1] == pytest.approx(
                truth[answer.path]["probability"], abs=1e-4
            )


@pytest.mark.once
@pytest.mark.slow
def test_a_finished_run_is_kept_and_a_new_one_made_beside_it(pictures, tmp_path):
    options = {**TINY, "epochs": 1, "output": tmp_path, "name": "my run"}
    first = train(pictures, **options)
    before = (first.folder / "best.keras").read_bytes()
    second = train(pictures, **options)
    assert (first.folder.name, second.folder.name) == ("my-run", "my-run-2")
    assert (first.folder / "best.keras").read_bytes() == before


@pytest.mark.once
def test_dry_run_says_what_would_happen_and_writes_nothing(pictures, tmp_path, capsys):
    code, out, err = run_cli(
        "train", pictures, *FLAGS, "--dry-run", "--output", tmp_path / "runs", "--cache",
        tmp_path / "cache", capsys=capsys,
    )  # fmt: skip
    assert code == 0 and not err
    assert "24 for training, 6 for validation, 3 classes (ant 8, bee 8, cat 8)" in out
    assert "Writes to" in out and "15 epochs of 3 steps" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_is_for_terminals(pictures, tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    code, out, _ = run_cli(
        "train", pictures, *FLAGS, "--epochs", 2, "--output", tmp_path, capsys=capsys
    )
    assert code == 0
    assert ("Epoch 2/2" in out and "3/3" in out) == terminal
    # The line per epoch of the programs that users know, either way.
    found = re.findall(r"Epoch: (\d), Train_acc:[\d.]+%, Train_loss:[\d.]+, Val_acc:[\d.]+%", out)
    assert found == ["1", "2"]


@pytest.mark.once
def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(
    pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run_callbacks, "LINE_SECONDS", 0.0)
    options = {**TINY, "verbose": True, "epochs": 1}
    result = train(pictures, output=tmp_path, **options)
    out = capsys.readouterr().out
    assert [f"Epoch 1 of 1: step {n} of 3, " in out for n in (1, 2, 3)] == [True] * 3
    assert "Epoch 1 of 1: validation, batch 1, " in out and " s left\n" in out
    assert "step 2 of 3" in (result.folder / "train.log").read_text()


@pytest.mark.once
def test_a_notebook_gets_the_bar():
    Stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    assert shows_bars(Stream()) and not shows_bars(io.StringIO())


@pytest.mark.once
def test_show_prints_the_recipe_in_full(pictures, tmp_path, capsys):
    code, out, _ = run_cli(
        "train", pictures, "--recipe", "cifar", "--show", "--epochs", 3, capsys=capsys
    )
    assert code == 0 and "epochs           3" in out and "1512.03385" in out


@pytest.mark.once
@pytest.mark.slow
def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    write_pictures(tmp_path / "d" / "train", count=4)
    write_pictures(tmp_path / "d" / "val", classes=("bee", "cat"), count=2, seed=1)
    write_pictures(tmp_path / "d" / "test", count=1, seed=2)
    result = train(tmp_path / "d", output=tmp_path / "runs", **{**TINY, "epochs": 1})
    # A class that the validation folder lacks moves no label.
    assert [row["true"] for row in result.evaluation.rows] == ["bee", "bee", "cat", "cat"]
    assert result.test.count == 3 and (result.folder / "test_predictions.csv").is_file()


def test_channels_first_trains_on_torch(pictures, tmp_path, backend):
    if backend != "torch":
        pytest.skip("convolutions on a CPU need channels last here")
    keras.config.set_image_data_format("channels_first")
    try:
        result = train(pictures, output=tmp_path, **{**TINY, "epochs": 1})
        answer = predict(result.folder, pictures / "bee" / "0.png")[0]
    finally:
        keras.config.set_image_data_format("channels_last")
    # The same file answers the same in the other format's process: weights do not depend on it.
    assert result.model.input_shape == (None, 3, 16, 16)
    assert len(answer.classes) == 3 and 0 < answer.classes[0][1] <= 1


def test_every_option_that_changes_the_step_runs(pictures, tmp_path):
    result = train(
        pictures, output=tmp_path, mixup=0.2, cutmix=1.0, label_smoothing=0.1, ema=True,
        ema_steps=1, accumulate=2, clip_norm=1.0, dropout=0.3, policy="ta_wide",
        random_erasing=0.5, color_jitter=0.1, repeats=2, crop="none", normalization="dataset",
        backbone_rate=0.1, schedule="onecycle", precision="bf16", class_weights={"bee": 3},
        sampler="balanced", **{**TINY, "epochs": 1},
    )  # fmt: skip
    assert np.isfinite(result.history["loss"]).all()
    mean = result.model.info["preprocess"]["mean"]
    pixels = np.stack(
        [np.asarray(Image.open(p)) for p in sorted(pictures.glob("*/*.png"))], dtype=float
    )
    assert mean == pytest.approx(pixels.mean((0, 1, 2)) / 255, abs=0.02)


# --- folders as people bring them ----------------------------------------------------------------


@pytest.mark.once
def test_splits_by_any_usual_name_are_taken_as_such_and_said(tmp_path, capsys):
    write_pictures(tmp_path / "d" / "Training", count=4)
    write_pictures(tmp_path / "d" / "DEV", count=2, seed=1)
    write_pictures(tmp_path / "d" / "test_set", count=2, seed=2)
    (tmp_path / "d" / "Training" / "ant" / "x.heic").write_bytes(b"x")
    (tmp_path / "d" / "Training" / "loose.png").write_bytes(b"x")
    deep = np.arange(1000, 1100, dtype="uint16").reshape(10, 10)
    Image.fromarray(deep).save(tmp_path / "d" / "Training" / "ant" / "deep.png")
    code, out, _ = run_cli("train", tmp_path / "d", *FLAGS, "--dry-run", capsys=capsys)
    assert code == 0
    assert "Folders: train from 'Training', val from 'DEV', test from 'test_set'." in out
    assert "13 for training, 6 for validation, 3 classes (ant 5, bee 4, cat 4)" in out
    assert (
        "Not read: 2 files (1 .heic: HEIC needs a plug-in: pip install pillow-heif; 1 .png: "
        "outside the class folders)." in out
    )
    (note,) = [n for n in prepare_data(tmp_path / "d", recipe()).notes if "constant" in n]
    assert note.startswith("1 images of 16-bit gray") and "deep.png' (I;16)" in note
    os.rename(tmp_path / "d" / "Training", tmp_path / "d" / "bus")  # now all are classes
    assert prepare_data(tmp_path / "d", recipe(), look=False).names == ["DEV", "bus", "test_set"]
    shutil.rmtree(tmp_path / "d" / "bus")
    with pytest.raises(DataError, match="has val and test but no training folder"):
        prepare_data(tmp_path / "d", recipe())


def recipe(**options):
    return get_recipe("finetune").with_options(model="resnet_tiny", image_size=16, **options)


def flat(folder):
    write_pictures(folder / "ant", classes=(".",), count=3, seed=3)
    for path in (folder / "ant").iterdir():
        path.rename(folder / path.name)
    (folder / "ant").rmdir()
    (folder / "broken.png").write_bytes(b"x")
    return folder


@pytest.mark.once
@pytest.mark.parametrize("kind", ["flat", "foreign", "empty", "broken", "gone"])
def test_no_test_folder_ends_a_finished_training(tmp_path, kind, monkeypatch):
    write_pictures(tmp_path / "d" / "train", count=4)
    test = tmp_path / "d" / "test"
    if kind == "flat":
        flat(test)
    elif kind == "foreign":
        write_pictures(test, classes=("ant", "dog"), count=2)
    else:
        write_pictures(test, count=1)
        for path in test.rglob("*.png"):
            path.write_bytes(b"x") if kind == "broken" else path.unlink() if kind == "empty" else 0

    class Vandal(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            if kind == "gone":
                shutil.rmtree(test)

    said = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: said.extend(map(str, text)))
    options = {**TINY, "epochs": 1, "verbose": True}
    result = train(tmp_path / "d", output=tmp_path / "runs", callbacks=[Vandal()], **options)
    folder, said = result.folder, "\n".join(said)
    config = json.loads((folder / "config.json").read_text())
    assert config["status"] == "finished" and result.evaluation is not None
    assert "validation top-1" in repr(result) and "validation" in result._repr_html_()
    assert not (folder / "state.npz").exists()
    if kind in ("flat", "foreign"):
        with open(folder / "test_predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == result.test.count == 4 and "they get predictions" in said
        assert all(row["class1"] in ("ant", "bee", "cat") or row["error"] for row in rows)
        assert ("no classes: 'dog'" in said) == (kind == "foreign")
    else:
        assert result.test is None
        expected = "holds no image" if kind == "empty" else "No results of the test images (None of"
        assert expected in said
    log = [line[20:] for line in (folder / "train.log").read_text().splitlines()]
    lines = [line.rstrip() for line in said.split("\n") if line.strip()]
    assert [line for line in log if not line.startswith("Skipped: ")] == lines  # as printed
    assert (log != lines) == (kind in ("broken", "gone"))


@pytest.mark.once
def test_a_training_that_cannot_evaluate_is_finished_and_the_same_command_tries_again(
    pictures, tmp_path, monkeypatch
):
    options = {**TINY, "epochs": 1, "output": tmp_path}
    monkeypatch.setattr(training, "evaluate", lambda *_: 1 / 0)
    first = train(pictures, **options)
    assert first.evaluation is None and not first.interrupted and first.model is not None
    assert json.loads((first.folder / "config.json").read_text())["status"] == "finished"
    monkeypatch.undo()
    second = train(pictures, **options)
    assert second.folder == first.folder and second.evaluation is not None
    assert second.history["loss"] == first.history["loss"]


# --- a picture that cannot be read ---------------------------------------------------------------


@pytest.fixture
def with_corrupt(tmp_path):
    folder = write_pictures(tmp_path / "pictures", count=5)
    for name in ("ant/1.png", "bee/1.png"):
        (folder / name).write_bytes(b"not a picture")
    return folder


@pytest.mark.once
def test_corrupt_pictures_are_skipped_counted_and_listed(with_corrupt, tmp_path, capsys):
    code, out, _ = run_cli(
        "train", with_corrupt, *FLAGS, "--epochs", 1, "--output", tmp_path / "runs", capsys=capsys
    )
    assert code == 0 and "2 unreadable images were skipped" in out
    with open(tmp_path / "runs" / "resnet_tiny-pictures" / "skipped.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        str(with_corrupt / "ant" / "1.png"),
        str(with_corrupt / "bee" / "1.png"),
    ]
    assert all(row["reason"] for row in rows)


@pytest.mark.once
def test_strict_stops_at_a_corrupt_picture(with_corrupt, tmp_path, capsys):
    code, _, err = run_cli(
        "train", with_corrupt, *FLAGS, "--epochs", 1, "--strict", "--output", tmp_path / "runs",
        capsys=capsys,
    )  # fmt: skip
    assert code == 2 and "1.png" in one_line(err)


@pytest.mark.once
def test_a_batch_without_a_readable_picture_is_left_out(tmp_path):
    folder = write_pictures(tmp_path / "pictures", count=7)  # 18 of the 21 to train on
    for path in sorted((folder / "ant").glob("*.png"))[:5]:
        path.write_bytes(b"")
    result = train(folder, output=tmp_path / "runs", **{**TINY, "epochs": 1, "batch_size": 2})
    assert len(result.skipped) == 5
    assert np.isfinite(result.history["val_loss"]).all()


@pytest.mark.once
@pytest.mark.slow
def test_a_folder_that_changes_under_a_running_epoch(tmp_path):
    folder = write_pictures(tmp_path / "pictures", count=10)

    class Vandal(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                for path in sorted((folder / "bee").glob("*.png"))[:4]:
                    path.unlink()
                for path in sorted((folder / "cat").glob("*.png"))[:2]:
                    path.write_bytes(b"cut off")

    result = train(folder, output=tmp_path / "runs", callbacks=[Vandal()], **TINY)
    assert len(result.history["loss"]) == 2
    assert 4 <= len(result.skipped) <= 6
    assert all("bee" in path or "cat" in path for path, _ in result.skipped)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.once
def test_bad_folders_get_one_line(tmp_path, capsys):
    (tmp_path / "file.png").write_bytes(b"x")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "texts" / "ant").mkdir(parents=True)
    (tmp_path / "texts" / "ant" / "notes.txt").write_text("x")
    write_pictures(tmp_path / "one", classes=("ant",), count=3)
    write_pictures(tmp_path / "gap", count=2)
    (tmp_path / "gap" / "dog").mkdir()
    write_pictures(tmp_path / "broken", count=3)
    for path in (tmp_path / "broken").glob("*/*.png"):
        path.write_bytes(b"broken")
    for name, expected in {
        "nothin": "does not exist. Did you mean 'nothing'?",
        "file.png": "is a file",
        "nothing": "no class folder",
        "texts": ".jpg",
        "one": "one class only ('ant')",
        "gap": "'dog'",
        "broken": "can be read",
    }.items():
        code, _, err = run_cli(
            "train", tmp_path / name, *FLAGS, "--output", tmp_path / "runs", capsys=capsys
        )
        lines = [x for x in err.splitlines() if x and not x.startswith("Skipped: ")]
        assert code == 2 and expected in one_line("\n".join(lines)), (name, err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.once
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "resnet5O"], "'resnet50'"),
        (["--recipe", "fintune"], "Did you mean 'finetune'?"),
        (["--crop", "paded"], "Did you mean 'padded'?"),
        (["--model", "alexnet", "--image-size", "32"], "at least 63x63"),
        (["--val-split", "1.5"], "at least 0 and below 1"),
        (["--epochs", "0"], "at least 1"),
        (["--optimizer", "adam"], "--weight-decay 0"),
        (["--unfreeze", "layer9"], "layer9"),
        (["--gradual", "1"], "--unfreeze head"),
        (["--weights", "no-such.pth"], "no-such.pth"),
        (["--log", "tensorbord"], "Did you mean 'tensorboard'?"),
        (["--checkpoint-steps", "0"], "checkpoint_steps must be a whole number of at least 1"),
        (["--normalization", "imagnet"], "Did you mean 'imagenet'?"),
    ],
)
def test_bad_options_get_one_line_and_leave_nothing(pictures, tmp_path, capsys, flags, expected):
    code, _, err = run_cli(
        "train", pictures, *FLAGS, *flags, "--output", tmp_path / "runs", capsys=capsys
    )
    assert code == 2 and expected in one_line(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
@pytest.mark.slow
def test_a_start_that_fails_leaves_no_folder_and_takes_no_number(pictures, tmp_path):
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise RuntimeError("no")

    output = tmp_path / "new" / "runs"
    for wrong in ({"callbacks": [Fails()]}, {"unfreeze": "layer9"}):
        with pytest.raises((RuntimeError, InputError)):
            train(pictures, output=output, **TINY, **wrong)
        assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError):  # with a state worth keeping, all stays
        train(pictures, output=output, checkpoint_steps=1, callbacks=[Late()], **TINY)
    (folder,) = output.iterdir()
    assert (folder / "state.npz").is_file() and folder.name == f"resnet_tiny-{pictures.name}"


class Late(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise RuntimeError("no")


@pytest.mark.once
def test_an_unknown_option_in_python_is_suggested(pictures):
    with pytest.raises(InputError, match="Did you mean 'epochs'"):
        train(pictures, epoch=3)


@pytest.mark.once
def test_an_output_that_cannot_be_written_gets_one_line(pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        code, _, err = run_cli(
            "train", pictures, *FLAGS, "--epochs", 1, "--output", output, capsys=capsys
        )
        assert code == 2 and str(output) in one_line(err)


@pytest.mark.slow
def test_weights_with_another_number_of_classes_go_under_a_new_head(finished, tmp_path):
    folder = write_pictures(tmp_path / "two", classes=("dog", "eel"), count=4)
    result = train(
        folder, output=tmp_path / "runs", weights=str(finished.folder / "best.keras"),
        unfreeze="head", **{**TINY, "epochs": 1},
    )  # fmt: skip
    old, new = load_model(finished.folder / "best.keras"), result.model
    assert new.output_shape == (None, 2)
    for layer in (layer for layer in old.layers[:-1] if layer.weights):
        for a, b in zip(layer.get_weights(), new.get_layer(layer.name).get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)  # frozen, batch-norm statistics too


@pytest.mark.once
def test_two_processes_do_not_train_in_one_folder(pictures, tmp_path):
    from keras_resnet.training.run_folder import Run

    first = Run.find(tmp_path, "x", {"recipe": {}}, False)
    first.open()
    with pytest.raises(InputError, match="Another process"):
        Run(first.folder, {}).open()
    first.close()
    second = Run(first.folder, {})
    second.open()
    second.close()


# --- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("some GPU", marks=pytest.mark.once)])
def test_a_loss_that_is_no_number_stops_and_names_the_step(pictures, tmp_path, monkeypatch, device):
    # On an accelerator the loss is looked at some steps later, and the step is named all the same.
    monkeypatch.setattr(run_callbacks, "devices", lambda: [device])

    class Poison(keras.callbacks.Callback):
        """After one good epoch a weight becomes no number."""

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                kernel = self.model.get_layer("fc").kernel
                kernel.assign(np.full(kernel.shape, np.nan))

    from keras_resnet.training.callbacks import TrainingError

    with pytest.raises(TrainingError, match=r"nan at epoch 2, step 1\..*last.keras of epoch 1"):
        train(
            pictures, output=tmp_path, callbacks=[Poison()], checkpoint_steps=1,
            **{**TINY, "epochs": 3},
        )  # fmt: skip
    folder = tmp_path / f"resnet_tiny-{pictures.name}"
    for name in ("best.keras", "last.keras"):
        for value in load_model(folder / name).get_weights():
            assert np.isfinite(value).all()
    assert (folder / "history.csv").read_text().count("\n") == 2
    with np.load(folder / "state.npz") as state:
        assert all(np.isfinite(state[key]).all() for key in state.files)


class HugeHead(keras.callbacks.Callback):
    """For one step the logits are beyond float16, and so the loss is no number."""

    def on_train_batch_begin(self, batch, logs=None):
        self.kernel = self.model.get_layer("fc").kernel
        if batch == 0:
            self.before = np.array(keras.ops.convert_to_numpy(self.kernel))
            self.kernel.assign(np.full(self.kernel.shape, 3e38))

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.kernel.assign(self.before)


@pytest.mark.once
@pytest.mark.parametrize("device, accumulate", [("cpu", 1), ("some GPU", 2)])
def test_a_step_beyond_float16_is_skipped_and_said(
    pictures, tmp_path, monkeypatch, capsys, device, accumulate
):
    monkeypatch.setattr(run_callbacks, "devices", lambda: [device])
    options = {**TINY, "precision": "fp16", "batch_size": 1, "epochs": 1, "verbose": True}
    options["accumulate"] = accumulate
    result = train(pictures, output=tmp_path, callbacks=[HugeHead()], **options)
    assert (
        "Steps skipped so far, for their gradients were beyond float16: 1. The"
        in capsys.readouterr().out
    )
    loss = result.history["loss"][0]
    # On an accelerator an epoch as short as this one is over before its losses are looked at.
    assert 0 < loss < 9 if device == "cpu" else np.isnan(loss)
    steps = 24
    schedule = make_schedule(get_recipe("finetune").with_options(epochs=1), steps)
    assert result.history["learning_rate"] == [pytest.approx(schedule.value_at(steps - 2))]
    config = json.loads((result.folder / "config.json").read_text())
    assert config["dtype_policy"] == "mixed_float16"


@pytest.mark.once
def test_a_run_whose_every_step_is_beyond_float16_is_told(pictures, tmp_path, monkeypatch):
    scaled = keras.optimizers.LossScaleOptimizer
    monkeypatch.setattr(scaled, "check_finite", lambda *_: keras.ops.convert_to_tensor(False))
    with pytest.raises(
        ArithmeticError, match=r"scaled by 1.*e-10, at epoch 2, step 24.*Try precision="
    ):
        train(pictures, output=tmp_path, precision="fp16", **{**TINY, "batch_size": 1, "epochs": 2})


@pytest.mark.once
@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better(pictures, tmp_path):
    result = train(
        pictures, output=tmp_path, patience=1, schedule="constant", learning_rate=1e-12,
        warmup_epochs=0, **{**TINY, "epochs": 9},
    )  # fmt: skip
    accuracy = result.history["val_accuracy"]
    assert len(accuracy) < 9 and accuracy[-1] <= max(accuracy[:-1])


@pytest.mark.once
def test_without_validation_the_last_epoch_is_the_best(pictures, tmp_path, capsys):
    options = {**TINY, "val_split": 0, "report": True, "verbose": True, "keep": 1}
    result = train(pictures, output=tmp_path, **options)
    said = capsys.readouterr().out
    assert "30 for training, none held out for validation: best.keras is the last epoch" in said
    assert result.evaluation is None and not result.interrupted
    assert set(result.history) == {"accuracy", "loss", "learning_rate", "seconds"}
    assert len(result.history["loss"]) == 2 and "Val_acc" not in said
    best, last = (load_model(result.folder / name) for name in ("best.keras", "last.keras"))
    for ours, theirs in zip(best.get_weights(), last.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    config = json.loads((result.folder / "config.json").read_text())
    assert config["status"] == "finished" and not (result.folder / "state.npz").exists()
    assert (result.folder / "epoch-002.keras").exists()
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "nothing was held out" in page


@pytest.mark.once
def test_without_validation_a_stopped_run_goes_on(pictures, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise RuntimeError("power cut")

    options = {**TINY, "val_split": 0, "deterministic": True, "checkpoint_steps": 2}
    with pytest.raises(RuntimeError, match="power cut"):
        train(pictures, output=tmp_path / "a", callbacks=[Stop()], **options)
    stopped = train(pictures, output=tmp_path / "a", **options)
    peaceful = train(pictures, output=tmp_path / "b", **options)
    assert stopped.history["loss"] == pytest.approx(peaceful.history["loss"], abs=1e-6)


@pytest.mark.once
def test_patience_needs_images_to_validate_on(pictures, tmp_path):
    with pytest.raises(InputError, match="patience=3 needs images to validate on"):
        train(pictures, output=tmp_path, patience=3, **{**TINY, "val_split": 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_callback_sees_one_run_and_can_stop_it(pictures, tmp_path):
    class Witness(keras.callbacks.Callback):
        seen = ()

        def on_train_begin(self, logs=None):
            self.seen += ("begin",)

        def on_train_batch_end(self, batch, logs=None):
            self.seen += (round(logs["loss"] * 0, 1),)

        def on_epoch_end(self, epoch, logs=None):
            self.seen += (f"epoch {epoch}", "val_loss" in logs)
            self.model.stop_training = epoch == 1

        def on_train_end(self, logs=None):
            self.seen += ("end",)

    witness = Witness()
    result = train(pictures, output=tmp_path, callbacks=[witness], **{**TINY, "epochs": 9})
    step = (0.0,) * 3
    assert witness.seen == (
        "begin", *step, "epoch 0", True, *step, "epoch 1", True, "end",
    )  # fmt: skip
    assert len(result.history["loss"]) == 2 and result.evaluation is not None


@pytest.mark.once
@pytest.mark.slow
def test_keep_saves_the_models_of_the_best_epochs(pictures, tmp_path):
    result = train(pictures, output=tmp_path, keep=2, **{**TINY, "epochs": 4})
    accuracy = result.history["val_accuracy"]
    best = sorted(range(4), key=lambda i: (-accuracy[i], i))[:2]
    kept = sorted(path.name for path in result.folder.glob("epoch-*.keras"))
    assert kept == sorted(f"epoch-{i + 1:03d}.keras" for i in best)
    first = load_model(result.folder / f"epoch-{best[0] + 1:03d}.keras")
    for a, b in zip(first.get_weights(), result.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.once
def test_ctrl_c_leaves_everything_and_the_same_command_goes_on(pictures, tmp_path, number):
    command = [
        sys.executable, "-m", "keras_resnet", "train", str(pictures), *FLAGS, "--epochs", "500",
        "--output", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    history = tmp_path / f"resnet_tiny-{pictures.name}" / "history.csv"
    deadline = time.monotonic() + 240
    while not history.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "The same command goes on from here." in out
    names = {path.name for path in history.parent.iterdir()}
    assert {"best.keras", "last.keras", "history.csv", "curves.png", "batch.png"} <= names
    assert not [name for name in names if name.startswith(".")]
    config = json.loads((history.parent / "config.json").read_text())
    assert config["status"] == "interrupted"
    # In this process, to save a start: the same call finds the same run. (Two epochs more.)
    from keras_resnet.training.run_folder import Run

    identity = {k: config[k] for k in ("directory", "recipe", "seed", "exif", "backend",
                                       "data_format")}  # fmt: skip
    again = Run.find(tmp_path, history.parent.name, identity, restart=False)
    assert again.folder == history.parent and again.resumed
    assert Run.find(tmp_path, history.parent.name, identity, restart=True).folder != again.folder


@pytest.mark.once
@pytest.mark.slow
def test_a_runs_config_says_it_all_again_and_what_is_given_changes_it(
    finished, pictures, tmp_path, capsys
):
    given = finished.folder / "config.json", "--output", tmp_path
    code, out, _ = run_cli("train", "--config", *given, "--no-report", capsys=capsys)
    again = tmp_path / finished.folder.name
    assert code == 0, out
    for name in ("history.csv", "config.json"):
        one, other = ((folder / name).read_text() for folder in (finished.folder, again))
        if name == "history.csv":
            one, other = ([line.rpartition(",")[0] for line in t.split()] for t in (one, other))
        else:
            one, other = (json.loads(t)["fingerprint"] for t in (one, other))
        assert one == other, name
    code, out, _ = run_cli("train", "--epochs", "1", "--config", finished.folder, "--seed=3",
                           "--dry-run", capsys=capsys)  # fmt: skip
    assert code == 0 and "1 epochs" in out and "seed 3" in out and "sgd at 0.1" in out
    code, out, err = run_cli("train", pictures.parent / "nowhere", "--config", given[0],
                             capsys=capsys)  # fmt: skip
    assert code == 2 and "nowhere" in err
    for words, said in (
        (("--confi", finished.folder, "--show"), "epochs           4"),
        (("--config", finished.folder, "--epochs", "15", "--show"), "epochs           15"),
    ):
        code, out, err = run_cli("train", *words, capsys=capsys)
        assert code == 0 and said in out
    with pytest.raises(SystemExit):
        run_cli("train", "--config", finished.folder, "--recipe", "cifar", capsys=capsys)
    assert "give --config or --recipe" in one_line(capsys.readouterr().err)
    (tmp_path / "config.json").write_text("[]")
    for wrong, said in ((tmp_path, "is no record of a run"), ("nix", "'nix' does not exist")):
        code, _, err = run_cli("train", "--config", wrong, capsys=capsys)
        assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.once
@pytest.mark.slow
def test_five_channels_of_16_bits_from_the_folder_to_the_report(tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("low", "high")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):  # told apart by what 8 bits do not keep
            pixels = rng.integers(0, 60, (20, 20, 5)) + 180 * k
            np.save(tmp_path / "data" / name / f"{i}.npy", pixels.astype(np.uint16))
    options = {**TINY, "epochs": 4, "normalization": "dataset", "crop": "none", "report": True}
    result = train(tmp_path / "data", output=tmp_path, channels=5, learning_rate=0.05, **options)
    assert result.model.input_shape[-1] == 5 and result.evaluation.top1 == 1.0
    assert result.model.info["preprocess"]["color_mode"] == 5
    file = str(tmp_path / "data" / "high" / "0.npy")
    model = load_model(result.folder)
    assert predict(model, file)[0].classes[0][0] == "high"
    rgb = create_model("resnet_tiny", num_classes=2)
    rgb.save(tmp_path / "rgb.keras")
    line = load_pretrained(model, tmp_path / "rgb.keras")
    assert line.endswith("conv1 of 3 channels repeated and scaled for 5.")
    stem = rgb.get_layer("conv1").get_weights()[0]
    adapted = model.get_layer("conv1").get_weights()[0]
    np.testing.assert_allclose(adapted, stem[:, :, [0, 1, 2, 0, 1]] * 0.6, rtol=1e-6)
    model = load_model(result.folder)
    assert evaluate(model, tmp_path / "data", engine="keras").top1 > 0.8  # 12 of them trained it
    explanation = next(iter_explanations(model, [file]))
    assert explanation.overlay().shape[-1] == 3
    assert (result.folder / "report.html").stat().st_size > 10_000
    service = Service(open_runner(model), model, Limits(), None)
    [answer] = service.results([(file, pathlib.Path(file).read_bytes)], heat=True)
    assert answer.classes[0][0] == "high" and answer.heat is not None


@pytest.mark.once
@pytest.mark.slow
def test_a_runs_config_has_how_labels_were_found_and_a_trials_warm_up(pictures, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(pictures.glob("*/*.png")):
        (flat / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    code, out, err = run_cli("train", flat, *FLAGS, "--epochs", 1, "--label-regex", "^([a-z]+)_",
                             "--output", tmp_path / "runs", capsys=capsys)  # fmt: skip
    assert code == 0, out + err
    [run] = (tmp_path / "runs").iterdir()
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    assert recipe["warmup_epochs"] == 0  # of the one epoch
    code, out, err = run_cli("train", "--config", run, "--dry-run", capsys=capsys)
    assert code == 0 and "3 classes" in out, out + err
    code, out, _ = run_cli("train", "--config", run, "--epochs", 15, "--show", capsys=capsys)
    assert code == 0 and "warmup_epochs    1" in out
