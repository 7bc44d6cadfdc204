"""The benchmarks run, at sizes that measure nothing, and their plain-torch network is ours."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "torchvision")),
        reason="torch and torchvision are the other side",
    ),
]
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ["--model", "resnet20", "--image-size", "32", "--rounds", "2", "--threads", "1"]


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


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


@pytest.mark.long
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


@pytest.mark.long
def test_infer_from_files_runs_the_engine_that_predict_would(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "files.json"
    for index in range(5):
        pixels = rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
    small = "--model", "resnet18", "--image-size", "64", "--rounds", "2", "--threads", "2"
    done = run("infer.py", *small, "--data", str(tmp_path), "--batch", "2", "--json", str(path))
    assert contenders(path) == [["predict", "predict --engine keras", "ONNX Runtime, Pillow"]]
    assert "Engine: keras/torch\n" in done.stderr and "an image out of 5 JPEG" in done.stdout


@pytest.mark.slow
def test_fit_has_a_native_loop_beside_it(tmp_path):
    path = tmp_path / "fit.json"
    arguments = "--fit", "--batch", "2", "--steps", "2", "--contenders", "torchvision", "ours"
    run("train.py", *SMALL, *arguments, "--json", str(path))
    assert contenders(path) == [["native torch", "ours"]]


@pytest.mark.long
def test_gpu_runs_on_a_processor_too(tmp_path):
    path = tmp_path / "gpu.json"
    run(
        "gpu.py", "--device", "cpu", "--model", "resnet18", "--image-size", "32", "--batch", "2",
        "--rounds", "2", "--steps", "1", "--precision", "fp32", "--eager", "--json", str(path),
    )  # fmt: skip
    assert contenders(path) == [["torchvision", "ours: fit"], ["torchvision", "ours: predict"]]


def test_the_native_network_is_ours(benchmarks):
    import keras
    import torch

    import keras_resnet as kr

    native = benchmarks("native")
    ours = kr.create_model("resnet20")
    rng = np.random.default_rng(0)
    for weight in ours.non_trainable_variables:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    theirs = native.torch_model("resnet20").eval()
    state = {k: torch.from_numpy(np.array(v)) for k, v in kr.to_torchvision(ours).items()}
    theirs.load_state_dict(state, strict=True)
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    found = keras.ops.convert_to_numpy(ours(x, training=False))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_report_has_ratios_units_and_the_machine(benchmarks):
    report = benchmarks("report")
    about = {"processor": "One", "processors": 2, "load": 0.5, "torch": "2.0", "when": "2026-01-01"}
    rows = [
        {"contender": "a", "n": 3, "median_ms": 200.4, "quartiles_ms": [199, 201], "ratio": 1.0},
        {"contender": "b|c", "n": 3, "median_ms": 100.2, "quartiles_ms": [99.4, 101], "ratio": 2},
    ]
    first = {"about": about, "tables": [{"title": "T", "baseline": "a", "rows": rows}]}
    text = report.markdown([first])
    assert text == (
        "**T**\n\n"
        "|  | n | median, ms | quartiles | x a |\n|---|--:|--:|--:|--:|\n"
        "| a | 3 | 200 | 199 - 201 | 1.00 |\n| b\\|c | 3 | 100 | 99.4 - 101 | 2.00 |\n\n"
        "One; 2 processors; torch 2.0, 2026-01-01.\n"
    )
    rates = [{"contender": "d", "n": 1, "median": 550.0, "quartiles": [540.0, 560.0]}]
    other = {
        "about": {**about, "processor": "Two"},
        "tables": [{"title": "U", "unit": "pictures/s", "baseline": "d", "rows": rates}],
    }
    text = report.markdown([first, other])
    assert "**T [1]**" in text and "**U [2]**" in text and "median, pictures/s" in text
    assert "[2] Two; 2 processors" in text


def test_bench_knows_its_rows_and_what_they_need(benchmarks):
    bench = benchmarks("bench")
    assert len({row.name for row in bench.ROWS}) == len(bench.ROWS)
    for row in bench.ROWS:
        assert (FOLDER / row.command.split()[0]).is_file()
    assert bench.lacks("no_such_package") == "not installed: no_such_package"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "bench.py"), "no-such-row"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "no-such-row" in done.stderr


@pytest.mark.long
def test_many_images_are_made_and_measured(tmp_path):
    found = run("many_images.py", str(tmp_path / "x"), "--images", "4000", "--folders", "4")
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["images"] for row in rows] == [4000, 4000, 40, 40]
    assert rows[0]["fingerprint"] == rows[1]["fingerprint"] and rows[0]["megabytes_more"] > 0
