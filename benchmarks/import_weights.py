"""Time and memory of reading and importing a ResNet-50 state dict (98 MB), against torch.

The file is made in a temporary folder, in PyTorch's zip and pre-zip formats, with random numbers.
Contenders run in turns, each turn in a fresh process: imports, one warm-up on a small file, then
one timed reading. "touched" also copies every tensor into a buffer that is there already, which
is what assigning weights does; without it, a memory-mapping reader has read no number yet. Memory
is the rise of the process's high-water mark (Linux) over the whole measured part.

"Importing" puts the numbers into a model that is built already: `load_torchvision` on Keras' torch
backend, with its checks and the file's sha256, and `load_state_dict` into torchvision's model. The
warm-up is one import of the same file.

    python benchmarks/import_weights.py --rounds 9 --json import_weights.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import peers

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A contender's process: `read(path)` gives an iterable of NumPy arrays without a copy.
READERS = {
    "read_checkpoint": """
import sys, types
package = types.ModuleType("keras_resnet")  # without the package's imports of Keras
package.__path__ = [ROOT + "/keras_resnet"]
sys.modules["keras_resnet"] = package
from keras_resnet.weights.checkpoint import read_checkpoint
read = lambda path: read_checkpoint(path).values()
""",
    "torch.load(mmap=True)": """
import torch
read = lambda path: [
    t.numpy() for t in torch.load(path, weights_only=True, mmap=True, map_location="cpu").values()
]
""",
    "torch.load": """
import torch
read = lambda path: [
    t.numpy() for t in torch.load(path, weights_only=True, map_location="cpu").values()
]
""",
}
# A contender's process: `load(path)` reads the file into a model.
IMPORTERS = {
    "load_torchvision": """
import os
os.environ["KERAS_BACKEND"] = "torch"
import keras_resnet as kr
from keras_resnet.system import download
model = kr.ResNet50()
def load(path):
    download._file_sha256.cache_clear()  # it is remembered for a file that has not changed
    kr.load_torchvision(model, path)
""",
    "torch.load(mmap=True) + load_state_dict": """
import torch
from peers import import_torchvision
model = import_torchvision().models.resnet50()
load = lambda path: model.load_state_dict(torch.load(path, weights_only=True, mmap=True))
""",
    "torch.load + load_state_dict": """
import torch
from peers import import_torchvision
model = import_torchvision().models.resnet50()
load = lambda path: model.load_state_dict(torch.load(path, weights_only=True))
""",
}
MEASURE_IMPORT = """
import time
load(LARGE)
start = time.perf_counter()
load(LARGE)
print(time.perf_counter() - start)
"""
MEASURE = """
import json, time
import numpy as np
def peak(mark):
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(mark))
    except OSError:
        return 0
for array in read(SMALL):
    array.sum()
buffer = np.ones(10_000_000, "u1")  # the largest tensor has 9.4 MB
before = peak("VmRSS")
start = time.perf_counter()
arrays = read(LARGE)
if TOUCH:
    for array in arrays:
        out = buffer[: array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(out, array)
seconds = time.perf_counter() - start
print(json.dumps([seconds, max(0, peak("VmHWM") - before)]))
"""


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet50, in its order (He et al. 2015, table 1)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution_and_norm(conv: str, norm: str, out: int, into: int, size: int) -> None:
        shapes[f"{conv}.weight"] = (out, into, size, size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = (out,)
        shapes[f"{norm}.num_batches_tracked"] = ()

    convolution_and_norm("conv1", "bn1", 64, 3, 7)
    into = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            path = f"layer{stage + 1}.{block}"
            convolution_and_norm(f"{path}.conv1", f"{path}.bn1", width, into, 1)
            convolution_and_norm(f"{path}.conv2", f"{path}.bn2", width, width, 3)
            convolution_and_norm(f"{path}.conv3", f"{path}.bn3", 4 * width, width, 1)
            if block == 0:
                shortcut = f"{path}.downsample"
                convolution_and_norm(f"{shortcut}.0", f"{shortcut}.1", 4 * width, into, 1)
            into = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


def make_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """`zip` and `stream`: the large files; `zip small` and `stream small`: for the warm-up."""
    import torch

    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape) if shape else torch.tensor(0)
        for name, shape in resnet50_shapes().items()
    }
    files = {}
    for kind, options in {"zip": {}, "stream": {"_use_new_zipfile_serialization": False}}.items():
        for size, some in {"": tensors, " small": {"bn1.weight": tensors["bn1.weight"]}}.items():
            files[kind + size] = folder / f"{kind}{size.strip()}.pth"
            torch.save(some, files[kind + size], **options)
    return files


def turn(reader: str, large: pathlib.Path, small: pathlib.Path, touch: bool) -> tuple[float, int]:
    """(seconds, bytes of memory) of one reading in a fresh process."""
    given = f"ROOT, LARGE, SMALL, TOUCH = {str(ROOT)!r}, {str(large)!r}, {str(small)!r}, {touch}\n"
    done = subprocess.run(
        [sys.executable, "-c", given + READERS[reader] + MEASURE],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def reading(rounds: int, folder: pathlib.Path) -> list[dict]:
    """One row per format, contender, and touched or not: medians and spreads."""
    files = make_files(folder)
    cases = [
        (kind, reader, touch)
        for kind in ("zip", "stream")
        for touch in (False, True)
        for reader in READERS
        if not (kind == "stream" and "mmap" in reader)  # torch maps zip files only
    ]
    measured: dict[tuple, list[tuple[float, int]]] = {case: [] for case in cases}
    for index in range(rounds):
        # Every other round backwards, so that drift of the machine favours nobody.
        for kind, reader, touch in cases if index % 2 == 0 else cases[::-1]:
            result = turn(reader, files[kind], files[f"{kind} small"], touch)
            measured[kind, reader, touch].append(result)
    rows = []
    for (kind, reader, touch), results in measured.items():
        times = sorted(1000 * seconds for seconds, _ in results)
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        rows.append(
            {
                "format": kind,
                "reader": reader,
                "touched": touch,
                "n": len(times),
                "median_ms": statistics.median(times),
                "quartiles_ms": [quarters[0], quarters[2]],
                "peak_mb": statistics.median(memory for _, memory in results) / 1e6,
                "file_mb": files[kind].stat().st_size / 1e6,
            }
        )
    return rows


def importing(rounds: int, folder: pathlib.Path) -> list[dict]:
    """One row a contender: how long a model that is there takes to get its weights."""
    file = make_files(folder)["zip"]
    times: dict[str, list[float]] = {name: [] for name in IMPORTERS}
    for index in range(rounds):
        for name in list(IMPORTERS)[:: 1 if index % 2 == 0 else -1]:
            done = subprocess.run(
                [sys.executable, "-c", f"LARGE = {str(file)!r}\n{IMPORTERS[name]}{MEASURE_IMPORT}"],
                capture_output=True,
                text=True,
                check=True,
                cwd=pathlib.Path(__file__).parent,
            )
            times[name].append(1000 * float(done.stdout.split()[-1]))
    rows = []
    for name, values in times.items():
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        rows.append(
            {
                "importer": name,
                "n": len(values),
                "median_ms": statistics.median(values),
                "quartiles_ms": [quarters[0], quarters[2]],
            }
        )
    return rows


def _named(row: dict) -> dict:
    if "importer" in row:
        return {**row, "contender": row["importer"]}
    touched = ", every byte read" if row["touched"] else ""
    return {**row, "contender": f"{row['reader']}, {row['format']}{touched}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = reading(options.rounds, pathlib.Path(folder))
        imports = importing(options.rounds, pathlib.Path(folder))
    about = peers.about()
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(
        f"{'format':<8}{'touched':<9}{'reader':<24}{'median ms':>10}{'quartiles':>18}{'peak MB':>9}"
    )
    for row in rows:
        low, high = row["quartiles_ms"]
        print(
            f"{row['format']:<8}{'yes' if row['touched'] else 'no':<9}{row['reader']:<24}"
            f"{row['median_ms']:>10.1f}{f'{low:.1f} - {high:.1f}':>18}{row['peak_mb']:>9.0f}"
        )
    print(f"\n{'importing':<42}{'median ms':>10}{'quartiles':>18}")
    for row in imports:
        low, high = row["quartiles_ms"]
        spread = f"{low:.1f} - {high:.1f}"
        print(f"{row['importer']:<42}{row['median_ms']:>10.1f}{spread:>18}")
    if options.json:
        # As peers.publish writes it, for report.py.
        tables = [
            {"title": "Reading a weight file", "rows": [_named(row) for row in rows]},
            {"title": "Importing it into a model", "rows": [_named(row) for row in imports]},
        ]
        result = {"benchmark": "import_weights", "about": about, "tables": tables}
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
