"""The contenders of the benchmarks, and what they share: interleaved turns, medians, tables."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from keras_resnet.process import keep_freed_memory  # noqa: F401 (of this checkout)

_KEPT = []  # a torch.library.Library forgets its operators when it is collected


def import_torchvision():
    """torchvision, also from its CUDA wheel beside a CPU-only torch.

    There its compiled operators are missing, and registering shape functions for them fails at
    import. The models need none of them, so they are declared (not implemented) first.
    """
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise ImportError("torchvision: pip install --no-deps torchvision")
    if not torch.cuda.is_available() and not _KEPT:
        library = torch.library.Library("torchvision", "DEF")
        source = pathlib.Path(found.origin).with_name("_meta_registrations.py")
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if called in ("register_meta", "register_fake"):
                    name = str(node.args[0].value).removeprefix("torchvision::")
                    library.define(f"{name}(Tensor x) -> Tensor")
        _KEPT.append(library)
    import torchvision

    return torchvision


def _memory(mark: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(row.split()[1]) * 1024 for row in file if row.startswith(mark))
    except OSError:
        return 0


def peak_memory() -> int:
    """Bytes of the process's high-water mark (Linux; 0 elsewhere)."""
    return _memory("VmHWM")


def resident_memory() -> int:
    """Bytes that the process has in memory now (Linux; 0 elsewhere)."""
    return _memory("VmRSS")


class Contender:
    """A contender's own process: it sets up once, then times a turn whenever it is asked.

    Its own process, because backends and allocators disturb each other within one. Turns never
    overlap: the parent asks one contender at a time.
    """

    def __init__(self, script: str, name: str, arguments: list[str], backend: str):
        self.name = name
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._process = subprocess.Popen(
            [sys.executable, script, "--contender", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ready = self._read()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with code {self._process.wait()}")

    def turn(self) -> dict:
        """One turn's measurements."""
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Lets the process end."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(step, steps_per_turn: int = 1, warmup: int = 2) -> None:
    """Runs in a contender's process: `step()` does the work and waits for its end."""
    before = resident_memory()  # imports, model, optimizer: what a step needs lies above it
    start = time.perf_counter()
    for _ in range(warmup):
        step()
    print(json.dumps({"warmup_s": time.perf_counter() - start}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps_per_turn):
            step()
        result = {
            "seconds": (time.perf_counter() - start) / steps_per_turn,
            # Of all threads together; on a busy machine it says more than the wall clock.
            "cpu": (time.process_time() - cpu) / steps_per_turn,
            "peak": peak_memory() - before,
        }
        print(json.dumps(result), flush=True)


def compete(script: str, contenders: dict[str, str], arguments: list[str], rounds: int) -> dict:
    """`{name: [{"seconds", "cpu", "peak"}, ...]}` of contenders `{name: backend}`, in turns."""
    started, results = [], {}
    for name, backend in contenders.items():
        try:
            started.append(Contender(script, name, arguments, backend))
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
    for index in range(rounds):
        # Every other round backwards, so that drift of the machine favours nobody.
        for contender in started if index % 2 == 0 else started[::-1]:
            results.setdefault(contender.name, []).append(contender.turn())
    for contender in started:
        contender.end()
    return {contender.name: results[contender.name] for contender in started}


def rows_of(results: dict, baseline: str) -> list[dict]:
    """Medians, quartiles and ratios of throughput to the baseline's median."""
    base = [turn["seconds"] for turn in results[baseline]] if baseline in results else None
    rows = []
    for name, turns in results.items():
        seconds = sorted(turn["seconds"] for turn in turns)
        quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        row = {
            "contender": name,
            "n": len(seconds),
            "median_ms": 1000 * statistics.median(seconds),
            "quartiles_ms": [1000 * quarters[0], 1000 * quarters[2]],
            "cpu_ms": 1000 * statistics.median(turn["cpu"] for turn in turns),
            "peak_mb": max(turn["peak"] for turn in turns) / 1e6,
        }
        if base:
            # Turn by turn: a slow minute of the machine then weighs on both sides.
            own = [turn["seconds"] for turn in turns]
            row["ratio"] = statistics.median(b / o for b, o in zip(base, own, strict=True))
        rows.append(row)
    return rows


def about() -> dict:
    """What a measurement depends on: the machine and the versions."""
    versions = {}
    for package in ("keras", "torch", "torchvision", "tensorflow-cpu", "tensorflow", "jax"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "when": time.strftime("%Y-%m-%d"),
        "machine": platform.platform(),
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def show(title: str, rows: list[dict], baseline: str) -> None:
    """Prints a table; ratios above 1 are faster than the baseline."""
    print(f"\n{title}")
    print(
        f"{'contender':<26}{'n':>4}{'median ms':>11}{'quartiles':>20}"
        f"{'CPU ms':>9}{'step MB':>9}{'x':>7}"
    )
    for row in rows:
        low, high = row["quartiles_ms"]
        spread = f"{low:.1f} - {high:.1f}"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        print(
            f"{row['contender']:<26}{row['n']:>4}{row['median_ms']:>11.1f}{spread:>20}"
            f"{row['cpu_ms']:>9.1f}{row['peak_mb']:>9.0f}{ratio:>7}"
        )
    print(f"x: throughput against {baseline}")
