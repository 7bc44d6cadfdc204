"""The command line: what needs no Keras imports none, and what is wrong is said in one line."""

import contextlib
import csv
import dataclasses
import errno
import importlib.util
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli import checks, main as cli, words as foreign
from keras_resnet.cli.commands import COMMANDS
from keras_resnet.cli.files import _read_names
from keras_resnet.recipes import Recipe, get_recipe
from keras_resnet.system import errors
from keras_resnet.system.errors import InputError, MissingDependencyError
from keras_resnet.variants import SPECS
from keras_resnet.weights.keras_files import inspect_keras_file
from keras_resnet.weights.matching import spec_shapes

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).resolve().parents[2]

# Runs each line of arguments, and prints exit code, output and whether Keras was imported by it.
RUN = """
import contextlib, io, json, sys
from keras_resnet.cli.main import main

for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    found = sorted({"keras", "torch", "tensorflow", "jax", "matplotlib"} & set(sys.modules))
    print(json.dumps([code, out.getvalue(), err.getvalue(), found]))
    if found:
        break
"""


def run_all(lines, folder):
    """Exit code, output, errors and forbidden modules of each line, in a process without Keras."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(lines)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with images, a model, a checkpoint and a file that is none."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("ants/1.png", "ants/2.png", "bees/1.png"):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 50).convert("RGB").save(path)
    model = kr.create_model("resnet_tiny")
    model.info["preprocess"] = kr.Preprocess(20, 16).get_config()
    model.save(folder / "tiny.keras")
    shapes = spec_shapes(SPECS["resnet20"])
    kr.write_checkpoint(
        folder / "r20.pth", {name: np.zeros(shape, "float32") for name, shape in shapes.items()}
    )
    (folder / "text.txt").write_text("no model")
    (folder / "broken.keras").write_bytes((folder / "tiny.keras").read_bytes()[:500])
    (folder / "empty").mkdir()
    for name in ("a", "b"):
        (folder / "runs" / name).mkdir(parents=True)
        shutil.copy(folder / "tiny.keras", folder / "runs" / name / "best.keras")
        (folder / "runs" / name / "history.csv").write_text("")
    shutil.copytree(folder / "photos", folder / "data" / "photos")
    shutil.copytree(folder / "photos", folder / "sets" / "photos" / "train")
    for name in ("a", "b"):
        shutil.copytree(folder / "photos", folder / "many" / name / "train")
    with zipfile.ZipFile(folder / "other.keras", "w") as archive:
        archive.writestr("a.txt", "no model")
    return folder


@pytest.mark.slow
def test_help_models_scan_and_inspect_import_no_keras(world):
    lines = [
        [],
        ["models"],
        ["models", "wide*"],
        ["scan", "photos", "--json", "scan.json", "--sheet", "sheet.png", "--exclude-list", "out"],
        ["inspect", "r20.pth", "--json", "-"],
        ["inspect", "tiny.keras"],
        ["train", "photos", "--recipe", "cifar", "--show"],
        ["--help"],
        ["--version"],
        ["version"],
        ["help"],
        ["help", "predict"],
        ["train", "--help-all"],
        *([command, "--help"] for command in COMMANDS),
    ]
    found = run_all(lines, world)
    assert [(code, err, modules) for code, _, err, modules in found] == [(0, "", [])] * len(lines)
    for (_, out, *_), told in zip(
        found,
        ["COMMAND", "resnet50_v1_relu    25,557,032   3.858  224x224  -", "68,883,240  11.398",
         "3 images", "weights for resnet20, 10 classes", "resnet_tiny: ", "Recipe cifar"],
        strict=False,
    ):  # fmt: skip
        assert told in out


WRONG = [
    (
        "trian x",
        "argument COMMAND: invalid choice: 'trian'. Did you mean 'train'? See ",
    ),
    (
        "train photos --imagsize 3",
        "train: unknown argument '--imagsize'. Did you mean '--ima",
    ),
    ("train photos --image-size abc", "argument --image-size: invalid int value: 'abc'."),
    ("train photos extra", "unknown argument 'extra'."),
    ("train", "the following arguments are required: DIR"),
    ("train foto", "'foto' does not exist. Did you mean 'photos'?"),
    ("train text.txt", "'text.txt' is a file"),
    ("train photos --output text.txt", "'text.txt' is a file; a folder is needed"),
    ("train photos --model resnet5", "Unknown model 'resnet5'. Did you mean"),
    ("train photos --recipe cifra", "Unknown recipe 'cifra'. Did you mean 'cifar'?"),
    ("train photos --schedule cosin", "Did you mean 'cosine'?"),
    ("train photos --learning-rate 0", "learning_rate must be"),
    ("train photos --epochs none", "invalid int value: 'none'"),
    ("train photos --workers -1", "workers must be a whole number of at least 0. Received: -1."),
    ("train photos --max-restarts x", "max_restarts must be a whole number of at least 0. Rec"),
    ("train photos --devices x", "--devices must be a whole number of at least 1, or all. Rec"),
    ("train photos --devices 2 --compile --dry-run", "not compiled: leave out --compile. Rec"),
    ("train photos --weights DEFUALT", "is neither a file nor one of DEFAULT, IMAGENET1K_V1"),
    ("train photos --weights IMAGENET1K_V2", "resnet18 has no weights 'IMAGENET1K_V2'."),
    ("train photos --weights r2.pth", "'r2.pth' does not exist. Did you mean 'r20.pth'?"),
    ("train photos --model resnet20 --weights DEFAULT", "publishes no weights for 'resnet20'."),
    ("train photos --exclude-list none.txt", "'none.txt' does not exist."),
    ("lr-find foto", "'foto' does not exist. Did you mean 'photos'?"),
    ("lr-find photos --plot no/x.png", "'no' does not exist."),
    ("summary resnet5", "Unknown model 'resnet5'. Did you mean"),
    ("summary tinny.keras", "No model file at 'tinny.keras'. Did you mean 'tiny.keras'"),
    ("models resnt", "No model matches 'resnt'. Did you mean"),
    ("evaluate tinny.keras photos", "No model file at 'tinny.keras'. Did you mean 'tiny.keras'"),
    ("evaluate broken.keras photos", "'broken.keras' is no whole .keras file (500 bytes"),
    ("evaluate empty photos", "No best.keras or last.keras in the folder 'empty'."),
    ("evaluate tiny.keras foto", "'foto' does not exist. Did you mean 'photos'?"),
    ("evaluate tiny.keras photos --split val", "'photos' has no 'val' folder; it has: none."),
    ("evaluate tiny.keras photos --split vall", "invalid choice: 'vall'. Did you mean 'val'?"),
    ("evaluate tiny.keras photos --output text.txt", "'text.txt' is a file; a folder is needed"),
    (
        "evaluate tiny.keras photos --batch-size 0",
        "batch_size must be a whole number",
    ),
    ("predict r20.pth photos", "keras-resnet convert r20.pth r20.keras"),
    ("predict none.onnx photos", "No model file at 'none.onnx'."),
    ("predict tiny.keras foto", "No file or folder at 'foto'. Did you mean 'photos'?"),
    ("predict tiny.keras empty", "'empty' holds no image. It holds no file"),
    ("predict tiny.keras no*.png", "No file matches 'no*.png'."),
    ("predict tiny.keras photos --csv no/x.csv", "'no' does not exist."),
    (
        "predict tiny.keras photos --csv x.txt",
        "The output's name must end in .csv. Received: 'x.txt'.",
    ),
    (
        "predict tiny.keras photos --plot x.doc",
        "must end in .png, .jpg, .jpeg, .svg or .pdf. Received: 'x.doc'.",
    ),
    ("predict tiny.keras photos --csv empty", "'empty' is a folder; a file's name is needed."),
    ("predict tiny.keras photos --output x.txt", "must end in .csv, .jsonl or .parquet"),
    ("predict tiny.keras photos --output a.csv --csv b.csv", "--output stands alone"),
    ("predict tiny.keras photos --engine kers", "Unknown engine 'kers'. Did you mean 'keras'?"),
    ("predict tiny.keras photos --top 0", "top must be a whole number of at least 1"),
    ("explain tiny.keras foto", "No file or folder at 'foto'. Did you mean 'photos'?"),
    ("explain tinny.keras photos", "No model file at 'tinny.keras'."),
    ("serve tinny.keras", "No model file at 'tinny.keras'."),
    ("report run", "No run folder at 'run'. Did you mean 'runs'?"),
    ("scan foto", "'foto' does not exist. Did you mean 'photos'?"),
    ("scan empty", "holds no image"),
    ("scan photos --json no/x.json", "'no' does not exist."),
    ("inspect r2.pth", "Did you mean 'r20.pth'?"),
    ("inspect broken.keras", "is no whole .keras file"),
    ("inspect tinny.keras", "No model file at 'tinny.keras'. Did you mean 'tiny.keras'"),
    ("convert r2.pth x.keras", "'r2.pth' does not exist. Did you mean 'r20.pth'?"),
    ("convert r20.pth x.kers", "'x.kers' must end in one of .keras"),
    ("convert r20.pth no/x.keras", "The folder 'no' does not exist."),
    ("convert r20.pth x.keras --model resnet2", "Unknown model 'resnet2'. Did you mean"),
    ("convert r20.pth x.keras --class-names no.txt", "Cannot read class names from 'no.txt'"),
    ("verify tiny.keras r2.pth", "'r2.pth' does not exist."),
    ("export tiny.keras", "Say which: --format"),
    ("export tiny.keras --format onxx", "Unknown format 'onxx'. Did you mean 'onnx'?"),
    ("export tiny.keras --output no/x.onnx", "'no' does not exist."),
    ("export tiny.keras --format onnx --pictures foto", "No file or folder at 'foto'."),
]


# What people type who know other programs, or take one thing for another.
HABITS = [
    ("Train photos", "Did you mean 'train'?"),
    ("test tiny.keras photos", "Did you mean 'evaluate'?"),
    ("eval tiny.keras photos", "Did you mean 'evaluate'?"),
    ("gradcam tiny.keras photos", "Did you mean 'explain'?"),
    ("find-lr photos", "Did you mean 'lr-find'?"),
    ("help trian", "Did you mean 'train'?"),
    ("photos", "Did you mean 'train photos', or 'scan photos'?"),
    ("runs/a", "Did you mean 'predict runs/a IMAGE'?"),
    ("photos/ants/1.png", "Did you mean 'predict MODEL photos/ants/1.png'?"),
    ("r20.pth", "Did you mean 'inspect r20.pth'?"),
    ("xyz", "There are: models, summary, info, train"),
    ("--epochs 3 train photos", "the command comes first, not '--epochs'"),
    ("train photos --resume", "goes on with an unfinished run by itself; --restart begins anew."),
    ("train photos --resume=last.pt", "goes on with an unfinished run by itself"),
    ("train photos --pretrained", "--weights DEFAULT starts from the published weights"),
    ("train photos --amp", "Give --precision bf16, or fp16."),
    ("train photos --mixed_precision", "Give --precision bf16, or fp16."),
    ("train photos --device cuda:0", "CUDA_VISIBLE_DEVICES in the environment chooses"),
    ("train photos --gpus 2", "CUDA_VISIBLE_DEVICES in the environment chooses"),
    ("train photos --backend jax", "KERAS_BACKEND in the environment chooses it"),
    ("train --data photos", "It stands without an option: keras-resnet train DIR [options]."),
    (
        "predict -m tiny.keras photos",
        "It stands without an option: keras-resnet predict MODEL PATH",
    ),
    ("predict --weights tiny.keras photos", "It stands without an option"),
    ("train photos --num-classes 2", "The classes are the folders"),
    ("train photos --val-dir photos", "Put train/, val/ and test/ into one folder"),
    ("train photos --freeze", "--unfreeze head trains the head alone."),
    ("train photos --freeze-backbone", "--unfreeze head trains the head alone."),
    ("train photos --wandb", "Give --log tensorboard, wandb or mlflow."),
    ("train photos --cos-lr", "Give --schedule cosine."),
    ("train photos --lr fast", "argument --learning-rate: invalid float value: 'fast'."),
    ("train photos --sched linear", "Received: 'linear'."),
    ("train photos epochs=3", "Did you mean '--epochs 3'?"),
    ("train photos lr=0.1", "Did you mean '--learning-rate 0.1'?"),
    ("train photos resnet50", "Did you mean '--model resnet50'?"),
    ("train photos r20.pth", "Did you mean '--weights r20.pth'?"),
    ("train photos photos", "Usage: keras-resnet train DIR [options]."),
    ("train tiny.keras", "'tiny.keras' is a model; a folder of images is needed"),
    ("train resnet50", "'resnet50' is a model; a folder of images is needed"),
    ("train photos/ants", "It looks like one class of"),
    ("train data", "Did you mean 'data/photos'?"),
    ("train sets", "Did you mean 'sets/photos'?"),
    ("train many", "holds datasets, each with a training folder"),
    ("train https://example.org/photos.zip", "It is an address: download it"),
    ("train fotos/ants", "There is no folder"),
    ("train photos --weights https://example.org/x.pth", "It is an address: download it"),
    ("train photos --log tensorbord", "Did you mean 'tensorboard'?"),
    ("train photos --cache text.txt", "'text.txt' is a file; a folder is needed."),
    ("train photos --output text.txt/runs", "'text.txt' is a file; a folder is needed."),
    ("train photos --output /proc/runs", "Cannot write '/proc/runs'"),
    ("train photos --exclude-list photos", "'photos' is a folder; a file is needed."),
    ("lr-find photos --plot x.doc", "must end in .png, .jpg"),
    ("lr-find photos --start 0", "start must be above 0. Received: 0.0."),
    ("lr-find photos --start 2 --stop 1", "stop must be above 2.0. Received: 1.0."),
    ("evaluate photos tiny.keras", "comes first: keras-resnet evaluate tiny.keras photos"),
    ("evaluate tiny.keras photos/ants", "It looks like one class of"),
    ("evaluate other.keras photos", "cannot be read as a Keras model: it has no config.json."),
    ("evaluate tiny.keras photos --output /proc/x", "Cannot write '/proc/x'"),
    ("predict photos tiny.keras", "comes first: keras-resnet predict tiny.keras photos"),
    ("predict photos/ants/1.png runs/a", "keras-resnet predict runs/a photos/ants/1.png"),
    ("predict runs photos", "It is a folder of runs: give one of them, such as 'runs/"),
    ("predict runs/a/history.csv photos", "Did you mean the run folder 'runs/a'?"),
    ("predict https://example.org/x.keras photos", "It is an address: download it"),
    ("predict tiny.keras https://a.org/x.jpg?a=[b]", "It is an address: download it"),
    ("predict tiny.keras photos --csv /nowhere/x.csv", "The folder '/nowhere' does not exist."),
    ("predict tiny.keras photos --csv=~/nowhere/x.csv", "nowhere' does not exist."),
    ("predict tiny.keras photos --csv /proc/x.csv", "Cannot write '/proc/x.csv'"),
    (f"predict tiny.keras photos --json {'x' * 250}.json", "File name too long"),
    ("predict tiny.keras photos --output /proc/x.csv", "Cannot write '/proc/x.csv'"),
    ("predict tiny.keras photos --output -", "for a pipe give --csv - or --json -."),
    ("predict tiny.keras photos --csv - --json -", "Only one answer can go to"),
    ("explain photos tiny.keras", "comes first: keras-resnet explain tiny.keras photos"),
    ("explain tiny.keras photos --output text.txt", "'text.txt' is a file; a folder is needed."),
    ("serve runs", "It is a folder of runs"),
    ("serve tiny.keras --port 99999", "The port must be from 0 to 65535. Received: 99999."),
    ("serve tiny.keras --max-mb 0", "max_mb must be above 0. Received: 0.0."),
    ("report runs", "There are run folders in it: 'runs/a', 'runs/b'."),
    ("report photos", "'photos' is no run folder."),
    ("report runs/a --output x.pdf", "must end in .html or .htm. Received: 'x.pdf'."),
    ("report runs/a --output /proc/x.html", "Cannot write '/proc/x.html'"),
    ("scan photos --sheet x.doc", "must end in .png, .jpg or .jpeg. Received: 'x.doc'."),
    ("scan photos --exclude-list photos/ants/1.png", "is an image in 'photos': give another name."),
    ("scan photos --json /dev/null", "'/dev/null' is a device or a pipe; a file is needed."),
    ("inspect https://example.org/x.pth", "It is an address: download it"),
    ("convert x.keras r20.pth", "comes first: keras-resnet convert r20.pth x.keras"),
    ("convert tiny.keras tiny.keras", "would be written over what is read"),
    ("convert r20.pth /proc/x.keras", "Cannot write '/proc/x.keras'"),
    ("convert r20.pth x.keras --class-names r20.pth", "Class names are read from UTF-8 text"),
    ("convert r20.pth x.keras --std 1 0 1", "std must be above 0. Received: 0.0."),
    ("verify r20.pth tiny.keras", "comes first: keras-resnet verify tiny.keras r20.pth"),
    ("verify tiny.keras r20.pth --json /proc/x", "Cannot write '/proc/x'"),
    ("export tiny.keras --format onnx --output x.xml", "ends in '.onnx', not 'x.xml'."),
    ("export tiny.keras --output /proc/x.onnx", "Cannot write '/proc/x.onnx'"),
    ("demo --output text.txt", "'text.txt' is a file; a folder is needed."),
]


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line_without_keras(world):
    cases = WRONG + HABITS
    found = run_all([words.split() for words, _ in cases], world)
    for (words, told), (code, out, err, modules) in zip(cases, found, strict=True):
        assert (code, out, modules) == (2, "", []), words
        assert err.startswith("keras-resnet: ") and err.count("\n") == 1, words
        assert told in err, (words, err)


def test_python_m_and_the_installed_command_are_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"keras-resnet": "keras_resnet.__main__:main"}
    done = subprocess.run(
        [sys.executable, "-m", "keras_resnet", "models", "resnet18"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith("resnet18 ")


def shown(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["train", "anywhere", "--show", *words]) == 0
    return out.getvalue()


@pytest.mark.once
@pytest.mark.parametrize(
    "record",
    [
        "[" * 100_000,
        '{"recipe": {"name": []}, "arguments": {}}',
        '{"recipe": {"epochs": "many"}, "arguments": {}}',
        '{"recipe": {"epochs": null}, "arguments": {}}',
        '{"recipe": {"weights": {}}, "arguments": {"directory": "x"}}',
        '{"recipe": {"color_jitter": [[]]}, "arguments": {"directory": "x"}}',
        '{"recipe": {"channels": 1e30}, "arguments": {"directory": "x"}}',
        '{"recipe": {"ema": "yes"}, "arguments": {"directory": "x"}}',
        '{"recipe": {}, "arguments": {}}',
        '{"recipe": {}, "arguments": {"directory": 5}}',
        '{"recipe": {}, "arguments": {"directory": "x", "source": [1]}}',
        '{"recipe": {}, "arguments": {"directory": "x", "columns": 3}}',
        '{"recipe": {}, "arguments": {"directory": "x", "exclude": 3}}',
        '{"recipe": {}, "arguments": {"directory": "x", "cache": {}}}',
        '{"recipe": {}, "arguments": {"directory": "x", "log": "wandb"}}',
        '{"recipe": {}, "arguments": {"directory": "x", "workers": "x"}}',
    ],
)
def test_a_record_that_no_run_wrote_is_refused_in_one_line(record, tmp_path, capsys):
    (tmp_path / "c.json").write_text(record)
    try:
        code = cli.main(["train", "--config", str(tmp_path / "c.json"), "--dry-run"])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("keras-resnet: ") and err.count("\n") == 1, err
    assert "does not exist" not in err


@pytest.mark.once
@pytest.mark.parametrize("text", ['"ab"', "[null]", '{"0": [], "1": {}}', "[" * 100_000])
def test_class_names_in_json_are_texts(text, tmp_path):
    (tmp_path / "n.json").write_text(text)
    with pytest.raises(InputError, match="must hold a JSON list of names"):
        _read_names(str(tmp_path / "n.json"))


def test_abbreviations_lists_and_none_are_understood():
    expected = get_recipe("finetune").with_options(
        learning_rate=0.5, milestones=(0.5, 0.75), ema=True, norm_decay=False, dropout=None,
        image_size=64, epochs=3,
    )  # fmt: skip
    assert shown(
        "--learning-r", "0.5", "--miles", "0.5", "0.75", "--ema", "--no-norm-decay", "--dropout",
        "None", "--image-size=64", "--epo", "3",
    ) == f"{expected}\n"  # fmt: skip


def test_words_of_other_programs_are_taken():
    expected = get_recipe("finetune").with_options(
        learning_rate=0.5, weight_decay=0.0, image_size=64, batch_size=8, model="resnet50",
        epochs=3, val_split=0.5, ema=True, label_smoothing=0.1, clip_norm=1.0,
    )  # fmt: skip
    assert shown(
        "--lr=0.5", "--wd", "0", "--imgsz", "64", "--batch_size", "8", "-a", "resnet50", "-e", "3",
        "--Validation_Split", "0.5", "--model-ema", "--smoothing", "0.1", "--clip-grad=1",
    ) == f"{expected}\n"  # fmt: skip


def test_words_of_other_programs_mean_options_that_there_are():
    parsers = cli.build_parser().commands()
    known = {option for parser in parsers.values() for option in parser._option_string_actions}
    assert {*foreign.SAME.values()} <= known
    assert not {*foreign.SAME} & {*foreign.HINTS} and {*foreign.COMMANDS.values()} <= {*COMMANDS}
    for text in foreign.HINTS.values():
        assert {*re.findall(r"--[a-z][a-z-]*", text)} <= known


def test_a_missing_runtime_is_said_before_keras(monkeypatch, tmp_path):
    (tmp_path / "m.onnx").touch()
    missing = {"onnxruntime", "openvino"}
    found = importlib.util.find_spec
    monkeypatch.setattr(
        errors.importlib.util, "find_spec", lambda name: None if name in missing else found(name)
    )
    checks.runtime(str(tmp_path / "m.keras"), "keras")
    for path, engine, extra in (
        ("m.onnx", "keras", "onnx"),
        ("m.onnx", "openvino", "openvino"),
        ("m.keras", "onnxruntime", "onnx"),
    ):
        with pytest.raises(MissingDependencyError, match=rf"keras3-resnet\[{extra}\]"):
            checks.runtime(str(tmp_path / path), engine)
    missing.remove("openvino")
    checks.runtime(str(tmp_path / "m.onnx"), "openvino")  # which reads it too


def test_help_fits_two_screens(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, parser in cli.build_parser().commands().items():
        text = parser.format_help()
        assert text.count("\n") <= 48 and max(map(len, text.split("\n"))) <= 80, name
        assert text.startswith(f"usage: keras-resnet {name} ")
    parser = cli.build_parser().commands()["train"]
    short, full = parser.format_help(), parser.format_help(full=True)
    assert "--epochs N           passes over the training data (15)\n" in short
    assert "\nTraining:\n" in short and "further options: keras-resnet train --help-all" in short
    for action in parser._actions:
        assert all(option in full for option in action.option_strings)


def test_pipes_hold_nothing_else(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    images = ["photos/ants/1.png", "text.txt"]
    assert cli.main(["predict", "tiny.keras", *images, "--csv", "-", "--top", "2"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0] == ["path", "class1", "probability1", "class2", "probability2", "error"]
    assert [row[0] for row in rows[1:]] == images and "text.txt" in rows[2][-1]
    assert "Backend: " in err and "1 of 2 images could not be read." in err
    assert cli.main(["predict", "tiny.keras", *images, "--json", "-", "--csv", "x.csv"]) == 0
    assert [row["path"] for row in json.loads(capsys.readouterr().out)] == images
    assert (world / "x.csv").read_text().count("\n") == 3
    assert cli.main(["scan", "photos", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 3
    for file in ("r20.pth", "tiny.keras"):
        assert cli.main(["inspect", file, "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_every_field_of_a_recipe_has_its_words_in_the_help():
    parser = cli.build_parser().parse_args(["lr-find", "x"]).parser
    texts = {action.dest: action.help for action in parser._actions}
    for field in dataclasses.fields(Recipe)[3:]:
        assert texts[field.name] and "`" not in texts[field.name]
    assert texts["crop"].endswith("padded for 32-pixel variants, else resized (auto)")


def test_inspect_counts_a_keras_file_as_keras_does(tmp_path):
    model = kr.create_model("resnet_tiny", num_classes=3, dropout=0.5)
    model.info["class_names"] = ["a", "b\x1b", "c"]
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)  # its numbers are none of the model's
    model.save(tmp_path / "m.keras")
    found = inspect_keras_file(tmp_path / "m.keras")
    assert (found.name, found.classes) == (model.name, 3)
    assert found.parameters == model.count_params()
    assert found.info == json.loads(json.dumps(model.info))
    assert found.keras_version == keras.__version__ and "\x1b" not in str(found)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"config.json": b"{}"},
        {"config.json": b"[" * 100_000},
        {"config.json": b"[1]", "metadata.json": b"{}"},
        {"config.json": b'{"config": {"layers": []}}', "metadata.json": b"{}"},
        {"config.json": b'{"config": 1}', "metadata.json": b"{}", "model.weights.h5": b"no h5"},
        {"config.json": b'{"config": {"name": "a", "layers": [1]}}', "metadata.json": b"{}",
         "model.weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(200)},
        {"config.json": b" " * (65 * 2**20)},
    ],
)  # fmt: skip
def test_a_strange_keras_file_is_refused_in_one_line(tmp_path, entries):
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="cannot be read as a Keras model: ") as stop:
        inspect_keras_file(tmp_path / "m.keras")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "Not enough memory: lower the batch size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 40 bytes.\nC++ stack"), "Not enough"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "Not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), "Not enough"),
        (ValueError("OOM when allocating tensor with shape[2] on /cpu:0"), "Not enough memory"),
        (RuntimeError("can't start new thread"), "Not enough memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "Not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "Not enough"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Not enough memory"),
        (OSError(errno.ENOSPC, "Can't write (a long story)", "a.csv"), "'a.csv': No space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "out of memory"), "'out of memory': Disk qu"),
    ],
)  # fmt: skip
def test_memory_and_disks_that_are_full_are_said_in_one_line(error, said, monkeypatch, capsys):
    def fail(**_):
        raise error

    monkeypatch.setitem(COMMANDS, "models", COMMANDS["models"]._replace(run=fail))
    assert cli.main(["models"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"keras-resnet: {said}") and err.count("\n") == 1
