"""Fixtures shared by all tests: the backend, the data folder beside the checkout, torchvision."""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib

# Before keras is imported anywhere: the tests name their backend, torch unless told otherwise.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "once: does not depend on the Keras backend, so runs under KERAS_BACKEND=torch alone",
    )
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(config, items):
    if os.environ["KERAS_BACKEND"] == "torch":
        return
    skip = pytest.mark.skip(reason="independent of the backend; run once, under torch")
    for item in items:
        if "once" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def backend() -> str:
    """The Keras backend that runs: `"torch"`, `"tensorflow"` or `"jax"`."""
    return os.environ["KERAS_BACKEND"]


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real data and weights; tests that need it skip where it is missing."""
    folder = pathlib.Path(os.environ.get("KERAS_RESNET_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no test data at {folder} (set KERAS_RESNET_SHARED)")
    return folder.resolve()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _operators_with_fakes(source: str) -> list[str]:
    """Names of the compiled operators for which torchvision registers shape functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("register_meta", "register_fake"):
                names.add(str(node.args[0].value).removeprefix("torchvision::"))
    return sorted(names)


_KEPT = []  # a torch.library.Library forgets its operators when it is collected


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, the oracle of most comparisons; skips where it is not installed.

    Its wheel is built for CUDA. Beside a CPU-only torch its compiled operators are missing, and
    registering shape functions for them fails at import; the models and transforms need none of
    them, so they are declared (not implemented) first.
    """
    torch = pytest.importorskip("torch")
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        pytest.skip("torchvision is not installed (pip install --no-deps torchvision==0.28.0)")
    if not torch.cuda.is_available() and not _KEPT:
        library = torch.library.Library("torchvision", "DEF")
        registrations = pathlib.Path(found.origin).with_name("_meta_registrations.py")
        for name in _operators_with_fakes(registrations.read_text(encoding="utf-8")):
            library.define(f"{name}(Tensor x) -> Tensor")
        _KEPT.append(library)
    import torchvision

    return torchvision
