"""Settings of the process: what they do, and that they can be turned off."""

import json
import math
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from keras_resnet.system import process

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_share_of_a_container(tmp_path):
    assert process.cgroup_cores(tmp_path) == math.inf
    two = tmp_path / "two"
    two.mkdir()
    for text, cores in (("max 100000", math.inf), ("150000 100000", 1.5), ("x", math.inf)):
        (two / "cpu.max").write_text(text)
        assert process.cgroup_cores(two) == cores
    one = tmp_path / "one"
    (one / "cpu").mkdir(parents=True)
    for quota, cores in ((-1, math.inf), (200000, 2.0)):
        (one / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (one / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert process.cgroup_cores(one) == cores


def test_memory_that_is_left(tmp_path):
    assert process.free_memory(tmp_path) == math.inf
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1500\n")
    assert process.free_memory(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("2000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert process.free_memory(tmp_path) == 2000 - (1500 - 300)
    for name, text in (
        ("limit_in_bytes", "1000"), ("usage_in_bytes", "900"), ("stat", "total_inactive_file 50"),
    ):  # fmt: skip
        (group / "memory" / f"memory.{name}").write_text(f"{text}\n")
    assert process.free_memory(tmp_path) == 150
    assert process.free_memory() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells")
def test_the_peak_of_memory():
    before = process.peak_memory(anew=True)
    block = b"x" * 2**25
    assert process.peak_memory() - before > 0.8 * len(block)


PROGRAM = """
import os, resource
import numpy as np
from keras_resnet.system import process
process.tune_process()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
before = faults()
for _ in range(20):
    np.ones(2**23)  # 64 MB
print(faults() - before, os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_unless_told_otherwise():
    results = {}
    for switch in ("1", "0"):
        environment = {
            k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**environment, "KERAS_RESNET_TUNE": switch},
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        results[switch] = int(out[0]), out[1]
    assert results["1"][0] * 10 < results["0"][0]  # page faults
    assert results["1"][1] == "5000" and results["0"][1] == "None"


def test_threads_fit_the_cores_and_the_environment_wins(monkeypatch):
    monkeypatch.setattr(process, "available_cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    torch = pytest.importorskip("torch")
    calls = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "7")
    process.fit_threads()
    assert calls == [3]
    assert os.environ["TF_NUM_INTRAOP_THREADS"] == "3"
    assert os.environ["TF_NUM_INTEROP_THREADS"] == "7"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    process.fit_threads()
    assert calls == [3]


# Hides what is installed, and puts a Keras in its place that says what it would import: a real one
# takes seconds. As Keras does, it writes its settings before it imports the backend.
SITE = {
    "sitecustomize.py": """
import sys
from importlib.machinery import PathFinder
class Some:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        known = name in ("torch", "tensorflow", "jax") and spec
        return None if known and "site-packages" in str(spec.origin) else spec
sys.meta_path[sys.meta_path.index(PathFinder)] = Some
""",
    "keras/__init__.py": """
import importlib, json, os, pathlib
settings = pathlib.Path.home() / ".keras/keras.json"
settings.parent.mkdir(exist_ok=True)
if not settings.exists():
    settings.write_text('{"backend": "tensorflow"}')
backend = os.environ.get("KERAS_BACKEND") or json.loads(settings.read_text())["backend"]
print(backend, os.environ.get("TF_CPP_MIN_LOG_LEVEL"), flush=True)
importlib.import_module(backend)
raise SystemExit
""",
}
NONE = "pip install one of keras3-resnet[torch], keras3-resnet[tensorflow], keras3-resnet[jax]."
BROKEN = "no libcudart"


@pytest.mark.parametrize(
    ("installed", "settings", "variable", "told"),
    [
        (["torch"], None, None, "torch 3"),
        (["jax"], None, "", "jax 3"),
        (["tensorflow"], None, None, "tensorflow 2"),
        (["torch"], "tensorflow", None, "torch 3"),
        (["tensorflow"], "jax", None, "tensorflow 2"),
        (["torch"], "theano", None, "torch 3"),
        (["torch"], "[not json", None, "torch 3"),
        (["torch", "jax"], "jax", None, "jax 3"),
        (["torch", "tensorflow"], None, None, "tensorflow 2"),
        (["torch", "tensorflow"], "tensorflow", "torch", "torch 3"),
        (["torch", "numpy"], None, "numpy", "numpy 3"),
        ([], None, None, NONE),
        ([], "torch", None, NONE),
        ([], None, "jax", NONE),
        (["torch", "jax"], None, None, "torch and jax are installed: set KERAS_BACKEND=torch or"),
        (["torch", "jax"], "tensorflow", None, "keras.json names the tensorflow backend, which is"),
        (
            ["torch"],
            None,
            "jax",
            "KERAS_BACKEND names the jax backend, which is not installed",
        ),
        (["torch"], None, "pytorch", "KERAS_BACKEND says 'pytorch'. Did you mean 'torch'?"),
        (["torch", BROKEN], None, None, BROKEN),
    ],
)
def test_a_plain_import_finds_the_backend(tmp_path, installed, settings, variable, told):
    for name, text in SITE.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in {"torch", "tensorflow", "jax"} - {*installed}:
        (tmp_path / name).mkdir()  # a folder in the way is no package
    for name in {*installed} - {BROKEN, "numpy"}:
        broken = f"raise ImportError({BROKEN!r})" if BROKEN in installed else ""
        (tmp_path / "site" / f"{name}.py").write_text(broken)
    written = tmp_path / "home/.keras/keras.json"
    written.parent.mkdir(parents=True)
    if settings is not None:
        written.write_text(settings if settings[0] == "[" else json.dumps({"backend": settings}))
    hidden = ("KERAS_BACKEND", "KERAS_HOME", "TF_CPP_MIN_LOG_LEVEL")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    if variable is not None:
        environment["KERAS_BACKEND"] = variable
    paths = [str(tmp_path / "site"), str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(paths)}
    program = "import keras_resnet as kr\ntry: kr.ResNet18\nexcept ImportError: pass\nkr.ResNet18"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if told[-1].isdigit():
        assert (done.returncode, done.stdout) == (0, f"{told}\n"), done.stderr
    else:
        assert done.returncode == 1 and told in done.stderr.splitlines()[-1], done.stderr
        assert written.exists() == (settings is not None)


@pytest.mark.slow
def test_tensorflow_beside_torch_prints_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    program = "import keras_resnet as kr; kr.ResNet18; import keras; keras.utils.set_random_seed(0)"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print('tensorflow' in sys.modules)"],
        env={**environment, "KERAS_BACKEND": "torch"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    if done.stdout == "False\n":
        pytest.skip("set_random_seed imported no TensorFlow")


@pytest.mark.once
@pytest.mark.slow
def test_torchs_compiler_is_imported_by_those_alone_that_compile():
    program = """
import sys
from keras_resnet.system.process import keep_keras_alone
keep_keras_alone(compiler=False)
import keras_resnet as kr, numpy as np
model = kr.create_model("resnet_tiny", num_classes=2)
assert model.predict(np.zeros((1, 16, 16, 3), "float32"), verbose=0).shape == (1, 2)
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
import torch
assert callable(torch._dynamo.reset) and torch.compile(lambda x: x + 1, backend="eager")(1) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KERAS_BACKEND": "torch"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
