"""Settings of the process: what they do, and that they can be turned off."""

import math
import os
import platform
import subprocess
import sys

import pytest

from keras_resnet.system import process

pytestmark = pytest.mark.once


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
