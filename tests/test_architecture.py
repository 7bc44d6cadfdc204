"""The house stays in order: imports point one way, and each library has its room."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import keras_resnet

PACKAGE = pathlib.Path(keras_resnet.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
pytestmark = pytest.mark.once

# From the ground up: a file imports its own folder and those before it.
FOLDERS = (
    "errors", "system", "variants", "recipes", "plots", "data", "layers", "weights", "models",
    "runtimes", "inference", "reports", "training", "cli",
)  # fmt: skip


def imports(path):
    """Names of the modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def folder(name):
    """The folder (or lone file) of a file's name or of a module's."""
    return name.removesuffix(".py").replace("/", ".").removeprefix("keras_resnet.").split(".")[0]


def own(path):
    return {name for name in imports(path) if name.startswith("keras_resnet.")}


def users(library):
    return {name for name, path in FILES.items()
            if any(module.split(".")[0] == library for module in imports(path))}  # fmt: skip


def test_folders_import_only_those_below():
    graph = {name: {folder(module) for module in own(path)} for name, path in FILES.items()}
    for name, below in graph.items():
        if folder(name) in FOLDERS:
            level = FOLDERS.index(folder(name))
            above = {one for one in below if one in FOLDERS and FOLDERS.index(one) > level}
            assert not above, f"{name} imports {sorted(above)}"


def test_imports_have_no_circles():
    modules = {"keras_resnet." + name[:-3].replace("/", "."): path for name, path in FILES.items()}
    graph = {name: own(path) & set(modules) - {name} for name, path in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    "name",
    ["weights/checkpoint", "weights/reference", "data/preprocess", "variants", "errors"],
)
def test_reading_files_and_pixels_needs_no_keras_and_no_backend(name):
    tops = {module.split(".")[0] for module in imports(FILES[f"{name}.py"])}
    assert not tops & {"keras", "torch", "tensorflow", "jax", "torchvision", "matplotlib"}


def test_only_figures_import_matplotlib():
    assert users("matplotlib") == {"plots.py", "reports/figures.py"}


def test_the_reference_shares_no_code_with_what_it_checks():
    assert {folder(name) for name in own(FILES["weights/reference.py"])} <= {"errors"}


def test_nothing_imports_keras_internals():
    for name, path in FILES.items():
        assert not any(m.startswith("keras.src") for m in imports(path)), name


def test_importing_the_package_imports_no_backend_and_no_keras():
    code = (
        "import sys, keras_resnet as kr; kr.read_checkpoint; kr.Preprocess; "
        "print(sorted({'keras', 'torch', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("first", ["keras_resnet", "keras"])
def test_model_files_load_after_the_import_alone(first, tmp_path):
    path = tmp_path / "m.keras"
    keras_resnet.create_model("resnet20").save(path)
    second = "keras" if first == "keras_resnet" else "keras_resnet"
    code = f"import {first}, {second}; print(type(keras.saving.load_model({str(path)!r})).__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1] == "ImageModel"


def test_public_names_exist_and_are_documented():
    for name in keras_resnet.__all__:
        assert getattr(keras_resnet, name).__doc__ or name == "RECIPES", name
