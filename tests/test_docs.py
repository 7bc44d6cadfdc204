"""The pages and the READMEs do what they say: their code runs, their names and links exist.

Every block of Python and every `keras-resnet` line is run, in the order of its page, in a folder
like the one that the page speaks of. Numbers that decide only how long it takes are made small,
and published weights are random ones of the same shapes.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.cli import main as cli
from keras_resnet.training import lr_finder, train as training
from keras_resnet.weights import download, published as registry

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).resolve().parents[1]
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*SITE, *(ROOT / name for name in ("README.md", "SECURITY.md", "weights/README.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSERS = next(a for a in cli.build_parser()._actions if a.dest == "run" or a.choices).choices


def blocks(path, language):
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield text[: match.start()].count("\n") + 2, match[2]


def commands(path):
    """The words of every line of the shell's blocks, its comment removed, and where it stands."""
    for first, block in blocks(path, "sh"):
        for number, line in enumerate(block.replace("\\\n", " ").splitlines(), first):
            words = shlex.split(line, comments=True)
            if words:
                yield number, words


# --- running -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder that the pages speak of."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for name, photo in zip(("cat", "dog"), load_sample_images().images, strict=True):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            y, x = rng.integers(0, 300, 2)
            Image.fromarray(photo[y : y + 100, x : x + 120]).save(
                folder / "photos" / name / f"{i}.jpg"
            )
    shutil.copytree(folder / "photos", folder / "new-photos")
    (folder / "more").mkdir()
    for i in range(3):
        Image.open(folder / "photos" / "dog" / f"{i}.jpg").save(folder / "more" / f"{i}.png")
    Image.open(folder / "photos" / "cat" / "0.jpg").save(folder / "cat.jpg")
    for name in ("resnet18-photos", "resnet18-photos-2"):
        kr.train(folder / "photos", model="resnet_tiny", output=folder / "runs", name=name,
                 epochs=1, image_size=32, weights=None, report=False, verbose=False)  # fmt: skip
    for name in ("resnet50-photos", "a", "b"):
        shutil.copytree(folder / "runs" / "resnet18-photos", folder / "runs" / name)
    return folder


@functools.cache
def published(folder, name):
    """A file of torchvision's name with random weights, for it cannot be downloaded here."""
    model = kr.create_model(name.split("-")[0])
    kr.save_torchvision(model, folder / name)
    return folder / name


@pytest.fixture
def small(world, monkeypatch):
    """The world as working folder, and everything that takes long made short."""
    monkeypatch.chdir(world)
    for name in ("resnet18-f37072fd.pth", "resnet34-b627a593.pth", "resnet50-0676ba61.pth"):
        published(world, name)
    if not (world / "my_checkpoint.pth").exists():
        kr.save_torchvision(kr.ResNet50(num_classes=5), world / "my_checkpoint.pth")
        (world / "suspicious.pth").symlink_to("resnet18-f37072fd.pth")

    def fetched(entry, **_):
        path = published(world, entry.file_name)
        known[download.file_sha256(path)] = entry
        return path

    def shorter(function, **numbers):
        @functools.wraps(function)
        def run(*arguments, **options):
            if function is training_train and not options.get("weights"):
                options["model"] = "resnet_tiny"
            return function(*arguments, **{**options, **numbers})

        return run

    known, training_train = {}, training.train
    monkeypatch.setattr(download, "weights_path", fetched)
    monkeypatch.setattr(registry, "published_by_torchvision", known.get)
    # `kr` keeps a name once it has been asked for: to replace the module's is not enough.
    for module, name, numbers in (
        (training, "train", {"epochs": 1}),
        (lr_finder, "lr_find", {"steps": 8}),
    ):
        short = shorter(getattr(module, name), image_size=32, workers=1, **numbers)
        monkeypatch.setattr(module, name, short)
        monkeypatch.setattr(kr, name, short)
    monkeypatch.setattr(keras.Model, "fit", shorter(keras.Model.fit, epochs=1))
    folder = shorter(kr.image_dataset_from_directory, batch_size=8)  # of 224 pixels
    monkeypatch.setattr(kr, "image_dataset_from_directory", folder)
    return world


# A layer that a page names, and one of the tiny network that stands for a ResNet-18.
LAYERS = {"layer3_1_bn2": "layer2_0_bn2"}

# Not run: what serves until Ctrl-C, and the demo, which has its own tests.
PARSED_ONLY = ("serve", "demo")


def run_command(words):
    backend = "torch"
    while "=" in words[0] and not words[0].startswith("-"):
        name, value = words.pop(0).split("=", 1)
        if name == "KERAS_BACKEND":
            backend = value
    assert words[0] == "keras-resnet"
    cli.build_parser().parse_args(words[1:])  # exits at an unknown word
    if words[1] not in PARSED_ONLY and backend == "torch":
        assert cli.main(words[1:]) == 0, " ".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_shows_works(page, small):
    parts = [(line, code) for line, code in blocks(page, "python") if "gradio_client" not in code]
    parts += [(n, words) for n, words in commands(page) if "keras-resnet" in words]
    names = {
        "__name__": page.stem,
        # Names that the READMEs take for granted.
        "kr": kr,
        "x": keras.Input((32, 32, 256)),
        "model": kr.ResNet18(num_classes=2, input_shape=(32, 32, 3), include_preprocessing=True),
        "images": np.zeros((1, 224, 224, 3), "uint8"),
        "picture": np.zeros((32, 32, 3), "uint8"),
    }
    for line, part in sorted(parts, key=lambda part: part[0]):
        try:
            if isinstance(part, str):
                exec(compile("\n" * (line - 1) + part, page, "exec"), names)
            else:
                assert all(kr.ResNet18().get_layer(word) for word in part if word in LAYERS)
                run_command([LAYERS.get(word, word) for word in part])
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}, line {line}: {part}") from error


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_of_others_name_what_there_is(page):
    """pip's extras and make's targets; nothing else is asked of a shell."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line, words in commands(page):
        if "keras-resnet" in words:
            continue
        assert words[0] in ("pip", "make", "export", "curl"), f"line {line}: {words}"
        for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, line


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_and_names_in_the_text_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    # A table of torchvision's options beside ours: its first column is not ours.
    start, end = "| torchvision's `train.py` | here |", "\n\n"
    if start in text:
        table = text[text.index(start) :].partition(end)[0]
        ours = "\n".join(line.split("|")[-2] for line in table.splitlines())
        text = text.replace(table, ours)
    text = text.replace("`--resume`", "")  # torchvision's, in a sentence about it
    spans = re.findall(r"`([^`\n]+)`", text)
    known = {o for p in PARSERS.values() for action in p._actions for o in action.option_strings}
    options = {o for span in spans for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert options <= known
    public = {name for span in spans for name in re.findall(r"\bkr\.(\w+)", span)}
    assert public <= set(kr.__all__)
    files = re.findall(r"\btests/\w+/\S*", " ".join(spans))
    assert all((ROOT / name).exists() for name in files), files
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for name in re.findall(r"\bextra `(\w+)`", text):
        assert name in extras


def test_the_reference_has_every_public_name_once():
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/reference").glob("*.md"))
    )
    listed = re.findall(r"^::: keras_resnet\.(?:\w+\.)*(\w+)$", text, re.MULTILINE)
    listed += re.findall(r"`(\w+)`", text.partition("### Builders by name")[2].partition("## ")[0])
    listed.remove("create_model")  # named where the builders' arguments are
    modules = set(re.findall(r"`kr\.(\w+)`", text))
    assert not [name for name in listed if listed.count(name) > 1]
    assert set(kr.__all__) <= set(listed) | modules


def test_recipes_are_all_on_their_page():
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in kr.RECIPES)


@pytest.mark.parametrize("page", [*PAGES[-3:], ROOT / "examples" / "README.md"], ids=str)
def test_links_between_files_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


# --- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs` does: links, anchors and cross-references are checked by MkDocs."""
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_asks_no_other_address_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"""(?:src|srcset)=["'](?:https?:)?//""", text), page
        for link in re.findall(r"<link[^>]+>", text):
            assert "://" not in link or 'rel="canonical"' in link, link


@pytest.mark.slow
def test_the_reference_shows_signatures_docstrings_and_every_command(site):
    for name in ("create_model", "conv_block", "load_torchvision", "train", "grad_cam", "SGD"):
        assert any(
            re.search(rf'id="keras_resnet\.(?:\w+\.)*{name}"', page.read_text(encoding="utf-8"))
            for page in (site / "reference").glob("*.html")
        ), name
    models = (site / "reference" / "models.html").read_text(encoding="utf-8")
    assert "include_preprocessing" in models and "feature map" in models
    shown = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for name, parser in PARSERS.items():
        assert f"keras-resnet {name}" in shown
        for action in parser._actions:
            for option in action.option_strings:
                assert option in shown or option in ("-h", "--help"), (name, option)


def test_examples_are_where_doctest_finds_them():
    """`Example:` would be set as prose by mkdocstrings."""
    for path in (ROOT / "keras_resnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                lines = (ast.get_docstring(node) or "").splitlines()
                assert "Example:" not in lines, f"{path.name}: {getattr(node, 'name', '')}"
