"""`make bench`: each benchmark in a short configuration, every row that this machine can run.

Results go to benchmarks/results: a JSON file and a plot a row, and README.md with all tables.
It is made to take at most 12 minutes on two cores; longer runs of a row are a command away, since
each is printed.

    python benchmarks/bench.py [ROW ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import time

import peers
import report

_HERE = pathlib.Path(__file__).resolve().parent
_SHARED = pathlib.Path(os.environ.get("KERAS_RESNET_SHARED", peers.ROOT.parent / "shared"))
_PICTURES = _SHARED / "data" / "hymenoptera" / "train"


@dataclasses.dataclass(frozen=True)
class Row:
    """A benchmark and its arguments.

    Attributes:
        name: Of its files.
        command: Script and arguments.
        needs: Packages (import names), or `cuda`, `bfloat16` and `pictures`.
        draws: Whether the script knows `--plot`.
    """

    name: str
    command: str
    needs: tuple[str, ...] = ()
    draws: bool = True


_TORCH = ("torch", "torchvision")
ROWS = (
    Row("train", "train.py --rounds 5 --contenders torchvision ours", _TORCH),
    Row(
        "train-as-users-run-it",
        "train.py --rounds 3 --contenders torchvision ours --allocator users",
        _TORCH,
    ),
    Row(
        "train-bfloat16",
        "train.py --rounds 7 --contenders torchvision ours --precision bfloat16",
        (*_TORCH, "bfloat16"),
    ),
    Row(
        "fit-resnet20",
        "train.py --fit --model resnet20 --image-size 32 --batch 128 --steps 5 --rounds 7 "
        "--contenders torchvision ours",
        _TORCH,
    ),
    Row("overhead", "overhead.py --rounds 5 --steps 2 --contenders torchvision ours", _TORCH),
    Row("infer", "infer.py --batch 1 16 --rounds 5", _TORCH),
    Row(
        "infer-bfloat16",
        "infer.py --batch 16 --rounds 7 --precision bfloat16 --contenders torchvision "
        "'torchvision autocast' ours 'ours optimized' OpenVINO",
        (*_TORCH, "bfloat16"),
    ),
    Row(
        "train-tensorflow",
        "train.py --backend tensorflow --rounds 3 --contenders torchvision ours",
        (*_TORCH, "tensorflow"),
    ),
    Row(
        "infer-tensorflow",
        "infer.py --backend tensorflow --batch 16 --rounds 5 --contenders torchvision ours",
        (*_TORCH, "tensorflow"),
    ),
    Row(
        "infer-tensorflow-bfloat16",
        "infer.py --backend tensorflow --batch 16 --rounds 5 --precision bfloat16 "
        "--contenders torchvision 'torchvision autocast' ours",
        (*_TORCH, "tensorflow", "bfloat16"),
    ),
    Row(
        "train-jax",
        "train.py --backend jax --rounds 3 --contenders torchvision ours",
        (*_TORCH, "jax"),
    ),
    Row(
        "pipeline",
        "pipeline.py --rounds 2 --epochs 2",
        (*_TORCH, "pictures"),
        draws=False,
    ),
    Row(
        "infer-files",
        f"infer.py --data '{_PICTURES.parent / 'val'}' --model resnet50 --batch 1 16 --rounds 3",
        (*_TORCH, "pictures"),
    ),
    Row("import_weights", "import_weights.py --rounds 2", ("torch",), draws=False),
    Row("gpu", "gpu.py --rounds 5 --batch 64", (*_TORCH, "cuda"), draws=False),
)


def lacks(need: str) -> str | None:
    """Why a need is not met here."""
    if need == "cuda":
        return None if peers.about().get("device") else "no CUDA device"
    if need == "pictures":
        return None if _PICTURES.is_dir() else f"no pictures in {_PICTURES}"
    if need == "bfloat16":
        # Without such instructions each product is computed in software.
        processor = peers.about()["processor"]
        found = any(flag in processor for flag in ("avx512_bf16", "amx_bf16"))
        return None if found else "the processor does not compute in bfloat16"
    return peers.missing(need)


def run(row: Row, folder: pathlib.Path) -> str:
    """Runs a row; a word on how it went."""
    reasons = [reason for reason in map(lacks, row.needs) if reason]
    if reasons:
        return f"left out: {reasons[0]}"
    script, *arguments = shlex.split(row.command)
    file = folder / f"{row.name}.json"
    file.unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, str(_HERE / script), *arguments, "--json", str(file)]
    if row.draws:
        command += ["--plot", str(file.with_suffix(".png"))]
    print(f"\n== {row.name}: python benchmarks/{row.command}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    seconds = f"{time.monotonic() - start:.0f} s"
    return f"failed with code {code} after {seconds}" if code else seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [row.name for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(names))
    parser.add_argument("--results", type=pathlib.Path, default=_HERE / "results")
    options = parser.parse_args()
    unknown = [name for name in options.rows if name not in names]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; there are: {', '.join(names)}")
    folder = options.results.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    outcomes = {
        row.name: run(row, folder) for row in ROWS if not options.rows or row.name in options.rows
    }
    files = [folder / f"{name}.json" for name in names]
    written = [file for file in files if file.is_file()]
    text = report.markdown(report.read(written)) if written else ""
    (folder / "README.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    for name, outcome in outcomes.items():
        print(f"{name:<28}{outcome}")
    minutes = (time.monotonic() - start) / 60
    print(f"{minutes:.1f} minutes; {len(written)} results in {folder}")
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
