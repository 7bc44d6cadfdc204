"""The benchmarks run, at sizes that measure nothing, and their plain-torch network is ours."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "torchvision")),
        reason="torch and torchvision are the other side",
    ),
]
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ["--model", "resnet20", "--image-size", "32", "--rounds", "2", "--threads", "1"]


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def contenders(path):
    result = json.loads(path.read_text())
    for table in result["tables"]:
        for row in table["rows"]:
            assert row["n"] == 2
            assert row["median_ms"] > 0
            assert row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
    assert result["about"]["processors"] >= 1
    return [[row["contender"] for row in table["rows"]] for table in result["tables"]]


def test_infer_writes_json_and_a_plot_and_says_who_is_left_out(tmp_path):
    written = tmp_path / "infer.json", tmp_path / "infer.png"
    done = run(
        "infer.py", *SMALL, "--batch", "2", "--json", str(written[0]), "--plot",
        str(written[1]), "--contenders", "torchvision", "ours", "keras.applications",
        "ONNX Runtime",
    )  # fmt: skip
    assert contenders(written[0]) == [["native torch", "ours", "ONNX Runtime"]]
    assert "left out: keras.applications: it has no resnet20" in done.stderr
    assert "resnet20, batch 2, 32 px, float32, torch, 1 thread" in done.stdout
    assert written[1].read_bytes().startswith(b"\x89PNG")
