"""Fixtures shared by all tests: the backend, the data folder beside the checkout, torchvision."""

from __future__ import annotations

import ast
import collections
import ctypes
import gc
import importlib.util
import os
import pathlib
import platform
import random
import re
import resource
import sys
import threading

# Before keras is imported anywhere: the tests name their backend, torch unless told otherwise.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest

from keras_resnet.system.process import keep_keras_alone

# As the commands do: without it each test process imports all that Keras can find, 600 MB more.
# Doctests, examples and whatever runs as a process of its own import Keras as users do.
keep_keras_alone()

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Files that take longest, first: they train, or start processes.
LONGEST = (
    *("test_docs.py", "test_resume.py", "test_train.py", "test_training_parity.py"),
    *("test_replicas.py", "test_architecture.py", "test_explain.py", "test_examples.py"),
    *("test_report.py", "test_export.py", "test_graph.py", "test_devices.py", "test_process.py"),
    *("test_load.py", "test_models.py", "test_to_stock.py", "test_serve.py", "test_tasks.py"),
    *("test_notebook.py", "test_cross_backend.py", "test_files_of_v01.py", "test_predict.py"),
)
# Where trainings are many and nobody looks at their figures, which take as long as the rest.
UNDRAWN = {
    *("test_train.py", "test_resume.py", "test_tasks.py", "test_folds.py", "test_waiting.py"),
    *("test_channels.py", "test_files_of_v01.py", "test_docs.py"),
}


def pytest_addoption(parser):
    parser.addoption(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="fail the test in which the test process first takes more than this (Linux)",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "once: does not depend on the Keras backend, so runs under KERAS_BACKEND=torch alone",
    )
    config.addinivalue_line("markers", "slow: takes more than a few seconds; not in `make quick`")
    config.addinivalue_line(
        "markers", "cuda: `-m cuda` runs these on a CUDA device, TF32 off; all else never sees one"
    )
    if not _on_device(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.addinivalue_line(
        "markers",
        "long(*backends): runs where KERAS_RESNET_LONG=1, as in `make test-long`, on these or all",
    )


def _on_device(config) -> bool:
    """Whether the tests are to run on a CUDA device."""
    return config.getoption("markexpr") == "cuda"


def pytest_ignore_collect(collection_path, config):
    """A file of `once` alone is not even imported elsewhere."""
    if os.environ["KERAS_BACKEND"] == "torch" or _on_device(config) or collection_path.is_dir():
        return None
    text = collection_path.read_text(encoding="utf-8") if collection_path.suffix == ".py" else ""
    return True if re.search(r"^pytestmark = .*\bonce\b", text, re.MULTILINE) else None


def pytest_collection_modifyitems(config, items):
    on_device, absent = _on_device(config), None
    if on_device and items:
        from keras_resnet.system.device import devices, set_tf32

        set_tf32(False)
        if devices()[0] == "cpu":
            absent = pytest.mark.skip(reason=f"{os.environ['KERAS_BACKEND']} finds no CUDA device")
    backend, long = os.environ["KERAS_BACKEND"], bool(os.environ.get("KERAS_RESNET_LONG"))
    elsewhere = []
    for item in items:
        if absent is not None:
            item.add_marker(absent)
        once = "once" in item.keywords and backend != "torch"
        much = any(not mark.args or backend in mark.args for mark in item.iter_markers("long"))
        if not on_device and (once or (much and not long)):
            elsewhere.append(item)
    # Not skipped: there are 2,500, and each would be set up, torn down and reported.
    config.hook.pytest_deselected(items=elsewhere)
    gone = set(elsewhere)
    items[:] = [item for item in items if item not in gone]
    # Files in the order in which `--no-loadscope-reorder` hands them out: pytest-xdist's own, most
    # tests first, leaves one process with all of the long ones at the end.
    counts = collections.Counter(item.path for item in items)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (ranks.get(item.path.name, len(ranks)), -counts[item.path]))


def pytest_collection_finish(session):
    """What was imported stays to the end: to look at it in each collection takes half a second."""
    gc.collect()
    gc.freeze()


# A model is a cycle of references: it stays until Python gets round to collecting it, and the C
# library keeps what it took. Without the following, a test process grows to 5 GB.

_LIBC = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h; set to its defaults below
_MAY_GROW = 0.25  # GB between two collections
_kept = 0.0  # GB after the last one
_peaks: list[float] = []  # GB, of each process of pytest-xdist
_deaths: list[str] = []  # of those processes


def _resident() -> float:
    """GB of memory that the process has now; 0 where the system does not say."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0.0
    return int(pages) * resource.getpagesize() / 1e9


def _peak() -> float:
    """GB of memory that the process had at most (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Gives memory back after a large test and after each file, when no fixture holds any more."""
    global _kept
    result = yield
    last_of_file = nextitem is None or nextitem.path != item.path
    if last_of_file and os.environ["KERAS_BACKEND"] == "jax":
        importlib.import_module("jax").clear_caches()  # 1 GB of programs after test_layers.py
    if last_of_file or _resident() > _kept + _MAY_GROW:
        gc.collect()
        if _LIBC is not None:
            # Training has told it to keep what is freed (see `system/process.py`).
            _LIBC.mallopt(_MMAP_MAX, 65536)
            _LIBC.mallopt(_TRIM_THRESHOLD, 128 * 1024)
            _LIBC.malloc_trim(0)
        _kept = _resident()
    return result


@pytest.fixture(autouse=True)
def _memory_limit(request):
    limit, before = request.config.getoption("--memory-limit"), _peak()
    yield
    if limit and before <= limit < _peak():
        pytest.fail(f"The test process took {_peak():.2f} GB; --memory-limit is {limit} GB.")


def _seed(number):
    """Keras takes its layers' seeds from `random`; its own `set_random_seed` imports TensorFlow."""
    random.seed(number)
    np.random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


@pytest.fixture(scope="module", autouse=True)
def _seeded_module():
    """Weights of the models that a file's tests share do not depend on the files before it."""
    _seed(1)


@pytest.fixture(autouse=True)
def _seeded(_seeded_module):
    """Weights that a test draws are the same in each run, alone or after others."""
    _seed(0)


@pytest.fixture(scope="module", autouse=True)
def _undrawn(request):
    """Figures of runs are built, but an empty image is written in the place of most."""
    if request.path.name not in UNDRAWN:
        yield
        return
    from PIL import Image

    from keras_resnet import plots
    from keras_resnet.system.files import replace_file

    def save(figure, path):
        replace_file(path, lambda name: Image.new("L", (1, 1)).save(name, "PNG"))
        return pathlib.Path(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", save)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _peaks.append(getattr(node, "workeroutput", {}).get("peak", 0.0))
    if error:  # pytest-xdist says that it died, not of what
        code = node.gateway._io.popen.wait(10)
        _deaths.append(f"{node.gateway.id} ended with code {code} (negative: that signal)")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = _peak()


def pytest_terminal_summary(terminalreporter):
    peaks = ", ".join(f"{peak:.1f} GB" for peak in _peaks or [_peak()])
    for line in (f"memory of the test processes at their peak: {peaks}", *_deaths):
        terminalreporter.write_line(line)


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


@pytest.fixture
def dtype(request, monkeypatch) -> str:
    """A precision for all of Keras: `@pytest.mark.parametrize("dtype", [...], indirect=True)`."""
    import keras

    # Off TensorFlow, Keras' own operations (Dense, the mean, the loss) compute in float32 whatever
    # the policy says. Lifted here, so that what is left of a difference is this package's.
    promotion = importlib.import_module("keras.src.backend.common.dtypes")
    monkeypatch.setitem(promotion.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[1])
    keras.config.set_dtype_policy(before[0])


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


@pytest.fixture
def server():
    """Stands for the network: see `file_server`."""
    from file_server import Server

    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
