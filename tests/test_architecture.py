"""The house stays in order: imports point one way, and each library has its room."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import keras_resnet

PACKAGE = pathlib.Path(keras_resnet.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")}
pytestmark = pytest.mark.once


def imports(path, everywhere=True):
    """Names of the modules that a file imports; only at its top level if not `everywhere`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else ast.iter_child_nodes(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path):
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("keras_resnet.")}
    return (inside & set(MODULES)) - {path.stem}


def test_imports_have_no_circles():
    graph = {name: own(path) for name, path in MODULES.items() if name not in ("__init__", "cli")}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    for lower, higher in [
        ("layers", "blocks"), ("blocks", "resnet"), ("resnet", "zoo"), ("alexnet", "zoo"),
        ("zoo", "training"), ("evaluation", "training"),
    ]:  # fmt: skip
        assert order.index(lower) < order.index(higher)


@pytest.mark.parametrize("name", ["checkpoint", "reference", "preprocess", "specs", "errors"])
def test_reading_files_and_pixels_needs_no_keras_and_no_backend(name):
    tops = {module.split(".")[0] for module in imports(MODULES[name])}
    assert not tops & {"keras", "torch", "tensorflow", "jax", "torchvision", "matplotlib"}


def test_only_plots_imports_matplotlib():
    users = {name for name, path in MODULES.items()
             if any(m.split(".")[0] == "matplotlib" for m in imports(path))}  # fmt: skip
    assert users == {"plots"}


def test_the_witness_shares_no_code_with_what_it_checks():
    assert own(MODULES["reference"]) <= {"errors"}


def test_nothing_imports_keras_internals():
    for name, path in MODULES.items():
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
