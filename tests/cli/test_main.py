"""The command line: what needs no Keras imports none, and what is wrong is said in one line."""

import contextlib
import dataclasses
import io
import json
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli import main as cli
from keras_resnet.cli.commands import COMMANDS
from keras_resnet.errors import InputError
from keras_resnet.recipes import Recipe, get_recipe
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
    kr.create_model("resnet_tiny").save(folder / "tiny.keras")
    shapes = spec_shapes(SPECS["resnet20"])
    kr.write_checkpoint(
        folder / "r20.pth", {name: np.zeros(shape, "float32") for name, shape in shapes.items()}
    )
    (folder / "text.txt").write_text("no model")
    (folder / "broken.keras").write_bytes((folder / "tiny.keras").read_bytes()[:500])
    (folder / "empty").mkdir()
    return folder


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
        *([command, "--help"] for command in COMMANDS),
    ]
    found = run_all(lines, world)
    assert [(code, err, modules) for code, _, err, modules in found] == [(0, "", [])] * len(lines)
    for (_, out, *_), told in zip(
        found,
        ["COMMAND", "resnet50_v1_relu   25,557,032   3.858  224x224  -", "68,883,240  11.398",
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
        "train photos --imagesize 3",
        "train: unknown argument '--imagesize'. Did you mean '--ima",
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
    ("predict tiny.keras photos --csv x.txt", "--csv wants a name that ends in .csv, not 'x.txt'."),
    ("predict tiny.keras photos --plot x.doc", "--plot wants a name that ends in .png"),
    ("predict tiny.keras photos --csv empty", "'empty' is a folder; a file's name is needed."),
    ("predict tiny.keras photos --output x.txt", "must end in .csv, .jsonl or .parquet"),
    ("predict tiny.keras photos --output a.csv --csv b.csv", "--output stands alone"),
    ("predict tiny.keras photos --engine kers", "Unknown engine 'kers'. Did you mean 'keras'?"),
    ("predict tiny.keras photos --top 0", "top must be a whole number of at least 1"),
    ("explain tiny.keras foto", "No file or folder at 'foto'. Did you mean 'photos'?"),
    ("explain tinny.keras photos", "No model file at 'tinny.keras'."),
    ("serve tinny.keras", "No model file at 'tinny.keras'."),
    ("report run", "'run' does not exist."),
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


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line_without_keras(world):
    found = run_all([words.split() for words, _ in WRONG], world)
    for (words, told), (code, out, err, modules) in zip(WRONG, found, strict=True):
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


def test_abbreviations_lists_and_none_are_understood():
    expected = get_recipe("finetune").with_options(
        learning_rate=0.5, milestones=(0.5, 0.75), ema=True, norm_decay=False, dropout=None,
        image_size=64, epochs=3,
    )  # fmt: skip
    assert shown(
        "--learning-r", "0.5", "--miles", "0.5", "0.75", "--ema", "--no-norm-decay", "--dropout",
        "None", "--image-size=64", "--epo", "3",
    ) == f"{expected}\n"  # fmt: skip


def test_every_field_of_a_recipe_has_its_words_in_the_help():
    parser = cli.build_parser().parse_args(["lr-find", "x"]).parser
    texts = {action.dest: action.help for action in parser._actions}
    for field in dataclasses.fields(Recipe)[3:]:
        assert texts[field.name] and "`" not in texts[field.name]
    assert texts["crop"].endswith("padded for 32-pixel variants, else resized")


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
