"""The house stays in order: imports point one way, and each library has its room."""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import keras_resnet

PACKAGE = pathlib.Path(keras_resnet.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
once = pytest.mark.once

# From the ground up: a file imports its own folder and those before it.
FOLDERS = (
    "system", "variants", "recipes", "plots", "data", "layers", "weights", "models",
    "runtimes", "inference", "reports", "training", "cli",
)  # fmt: skip


@functools.cache
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


@once
def test_folders_import_only_those_below():
    graph = {name: {folder(module) for module in own(path)} for name, path in FILES.items()}
    for name, below in graph.items():
        if folder(name) in FOLDERS:
            level = FOLDERS.index(folder(name))
            above = {one for one in below if one in FOLDERS and FOLDERS.index(one) > level}
            assert not above, f"{name} imports {sorted(above)}"


@once
def test_imports_have_no_circles():
    modules = {"keras_resnet." + name[:-3].replace("/", "."): path for name, path in FILES.items()}
    graph = {name: own(path) & set(modules) - {name} for name, path in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@once
@pytest.mark.parametrize(
    "name",
    [
        "weights/checkpoint",
        "weights/reference",
        "weights/matching",
        "weights/keras_files",
        "data/preprocess",
        "data/scan",
        "data/sources",
        "data/walk",
        "runtimes/rows",
        "cli/commands",
        "variants",
        "system/errors",
    ],
)
def test_reading_files_and_pixels_needs_no_keras_and_no_backend(name):
    tops = {module.split(".")[0] for module in imports(FILES[f"{name}.py"])}
    assert not tops & {"keras", "torch", "tensorflow", "jax", "torchvision", "matplotlib"}


@once
def test_only_figures_import_matplotlib():
    assert users("matplotlib") == {"plots.py", "reports/figures.py"}


@once
def test_few_files_know_a_backend():
    assert users("torch") == {
        "system/device.py", "system/group.py", "cli/launch.py", "layers/torch_call.py",
        "layers/conv.py", "layers/norm.py", "layers/sync_norm.py", "layers/pool.py",
        "models/torch_graph.py", "models/torch_fused.py", "models/torch_step.py",
        "runtimes/torch_program.py",
        "inference/grad_cam.py", "training/ema.py", "training/optimizers.py",
    }  # fmt: skip
    assert users("tensorflow") == {
        "system/device.py", "system/replicas.py", "data/directory.py", "layers/conv.py",
        "layers/norm.py", "runtimes/saved_model.py", "inference/grad_cam.py", "training/ema.py",
    }  # fmt: skip
    assert users("jax") == {
        "system/device.py", "system/replicas.py", "layers/conv.py", "inference/grad_cam.py",
        "training/ema.py",
    }  # fmt: skip


@once
def test_one_place_opens_images():
    for name, path in FILES.items():
        if name != "data/reading.py":
            assert "Image.open" not in path.read_text(encoding="utf-8"), name


@once
def test_the_reference_shares_no_code_with_what_it_checks():
    allowed = ("keras_resnet.system.errors", "keras_resnet.weights.numpy_ops",
               "keras_resnet.weights.reference_check")  # fmt: skip
    for name in ("weights/reference.py", "weights/reference_check.py", "weights/numpy_ops.py"):
        assert all(module.startswith(allowed) for module in own(FILES[name])), name


@once
def test_nothing_imports_keras_internals():
    for name, path in FILES.items():
        assert not any(m.startswith("keras.src") for m in imports(path)), name


@once
def test_importing_the_package_imports_no_backend_and_no_keras():
    code = (
        "import sys, keras_resnet as kr; kr.read_checkpoint; kr.Preprocess; "
        "print(sorted({'keras', 'torch', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Each line of the arguments is run first in a process where nothing of this package is loaded, and
# Keras is yet to be imported as far as this package can see: its submodules are there (a fork has
# them for nothing), `keras` itself is not, and importing it runs the hook.
FIRST_WORDS = """
import gc, importlib, os, sys
import keras, matplotlib.pyplot, sklearn.metrics, PIL.ImageOps, simplejpeg
gc.disable()  # which looks at all of Keras at each module

def alone(statement):
    child = os.fork()
    if child == 0:
        try:
            del sys.modules["keras"]
            exec(statement)
            import keras
            names = "Conv2D", "BatchNormalization", "ImageModel", "SGD", "CosineSchedule"
            find = keras.saving.get_registered_object
            missing = [name for name in names if not find("keras_resnet>" + name)]
            assert not missing, f"not registered: {missing}"
        except BaseException as error:
            print(f"{statement}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

sys.exit(sum(alone(statement) != 0 for statement in sys.argv[1:]))
"""


def modules_with_keras():
    """Modules whose import may import Keras, and with it what registers there: all others cannot
    meet it half there."""
    modules = {
        name[:-3].replace("/", ".").removesuffix(".__init__"): p for name, p in FILES.items()
    }
    needs = {f"keras_resnet.{name}": {*imports(path), f"keras_resnet.{folder(name)}"}
             for name, path in modules.items()}  # fmt: skip
    found = {
        name for name, needed in needs.items() if any(n.split(".")[0] == "keras" for n in needed)
    }
    while more := {name for name, needed in needs.items() if needed & found} - found:
        found |= more
    return {name.removeprefix("keras_resnet.") for name in found}


def first_words():
    """Every public name, those of one home together, and the other modules with Keras."""
    homes = {}
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            homes[node.module or ""] = [alias.name for alias in node.names]
    modules = modules_with_keras()
    return [
        *(f"import keras_resnet as kr; {', '.join(f'kr.{n}' for n in names)}"
          for names in homes.values()),
        *(f"import keras_resnet.{name}" for name in sorted(modules - set(homes))),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.long("tensorflow", "jax")  # in which order files import each other is the same there
def test_any_public_name_and_any_module_may_be_a_programs_first_word(tmp_path):
    """And model files load after the import alone, whichever comes first."""
    path = tmp_path / "m.keras"
    keras_resnet.create_model("resnet_tiny").save(path)
    load = f"assert type(keras.saving.load_model({str(path)!r})).__name__ == 'ImageModel'"
    orders = ("keras_resnet, keras", "keras, keras_resnet")
    words = [*first_words(), *(f"import {order}; {load}" for order in orders)]
    run = subprocess.run(
        [sys.executable, "-c", FIRST_WORDS, *words], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


@once
@pytest.mark.slow
def test_the_builders_may_be_the_first_word_of_a_fresh_process(tmp_path):
    path = tmp_path / "m.keras"
    keras_resnet.create_model("resnet_tiny").save(path)
    code = (
        "import keras_resnet as kr; print(kr.conv_block.__name__); import keras; "
        f"print(type(keras.saving.load_model({str(path)!r})).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split()[-2:] == ["conv_block", "ImageModel"], run.stderr


@once
def test_public_names_exist_and_are_documented():
    for name in keras_resnet.__all__:
        assert getattr(keras_resnet, name).__doc__ or name == "RECIPES", name


@once
def test_the_tested_versions_are_those_that_the_project_asks_for():
    root = PACKAGE.parent
    if not (root / "constraints.txt").is_file():
        pytest.skip("not a checkout")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    asked = {one.name: one.specifier for one in map(Requirement, lines)}
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = [Requirement(line.partition("#")[0]) for line in lines if line[0] != "#"]
    wrong = [f"{one} is not {asked[one.name]}" for one in tested if one.name in asked
             for version in one.specifier if version.version not in asked[one.name]]  # fmt: skip
    assert not wrong and len(set(asked) & {one.name for one in tested}) > 25
