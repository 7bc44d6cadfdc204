"""The contenders of the benchmarks, and what they share: interleaved turns, medians, tables."""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from keras_resnet.system.process import (  # this checkout's
    available_cores,
    keep_freed_memory,  # noqa: F401
    system_name,
)

_KEPT = []  # a torch.library.Library forgets its operators when it is collected


def limit_threads(count: int) -> None:
    """Gives this process `count` processors, so that no runtime can use more than another.

    Call it before a backend is imported: each sizes its pools by what it finds then.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def settle() -> None:
    """Hands back what setting up has freed, and forgets the high-water mark so far.

    Kept pages would otherwise serve a step, which then would seem to need no memory of its own.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    cuda = _cuda()
    if cuda is not None:
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


def _cuda():
    """`torch.cuda`, where this process uses torch on a CUDA device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda


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
        self._process = subprocess.Popen(
            [sys.executable, script, "--contender", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(backend),
        )
        self.ready = self._read()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with code {self._process.wait()}")

    def turn(self) -> dict:
        """One turn's measurements."""
        try:
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}") from None
        return self._read()

    def end(self) -> None:
        """Lets the process end."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def environment(backend: str) -> dict[str, str]:
    """A contender's environment."""
    return {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}


def serve(step, steps_per_turn: int = 1, warmup: int = 2, parts: int = 1) -> None:
    """Runs in a contender's process: `step()` does the work; a turn is timed to its end.

    Where a step is a whole epoch, `parts` says of how many batches; times are then a batch's.
    """

    def timed(count: int) -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            step()
        if _cuda() is not None:
            _cuda().synchronize()
        return time.perf_counter() - start, time.process_time() - cpu

    settle()
    before = _held()  # imports, model, optimizer: what a step needs lies above it
    seconds, _ = timed(warmup)
    settle()  # what the first steps alone needed, to compile or to pack; what they keep counts
    timed(1)  # pages and device memory that it gave back
    print(json.dumps({"warmup_s": seconds}), flush=True)
    for _ in sys.stdin:
        if _cuda() is not None:
            timed(1)
        seconds, cpu = timed(steps_per_turn)
        result = {
            "seconds": seconds / steps_per_turn / parts,
            # Of all threads together; on a busy machine it says more than the wall clock.
            "cpu": cpu / steps_per_turn / parts,
            "peak": max(0, _peak() - before),
        }
        if _cuda() is not None:
            _cuda().empty_cache()  # the next contender needs the device's memory
        print(json.dumps(result), flush=True)


def _held() -> int:
    return resident_memory() if _cuda() is None else _cuda().memory_allocated()


def _peak() -> int:
    return peak_memory() if _cuda() is None else _cuda().max_memory_allocated()


def compete(script: str, contenders: dict[str, str], arguments: list[str], rounds: int) -> dict:
    """`{name: [{"seconds", "cpu", "peak"}, ...]}` of contenders `{name: backend}`, in turns."""
    started, results = [], {}
    for name, backend in contenders.items():
        try:
            started.append(Contender(script, name, arguments, backend))
        except RuntimeError as error:
            left_out(name, str(error))
    for index in range(rounds):
        # Every other round backwards, so that drift of the machine favours nobody.
        for contender in list(started if index % 2 == 0 else started[::-1]):
            try:
                results.setdefault(contender.name, []).append(contender.turn())
            except RuntimeError as error:
                left_out(contender.name, str(error))
                started.remove(contender)
    for contender in started:
        contender.end()
    return {contender.name: results[contender.name] for contender in started}


def left_out(name: str, reason: str) -> None:
    """Says on the error stream that a contender does not take part."""
    print(f"left out: {name}: {reason}", file=sys.stderr, flush=True)


def missing(*modules: str) -> str | None:
    """A sentence if one of these modules is not installed."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


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


_PACKAGES = (
    "keras", "torch", "torchvision", "tensorflow-cpu", "tensorflow", "jax", "onnxruntime",
    "openvino", "pillow", "simplejpeg", "grain", "numpy",
)  # fmt: skip


def about() -> dict:
    """What a measurement depends on: the machine and the versions."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    device = _device()
    return {
        "when": time.strftime("%Y-%m-%d"),
        "machine": system_name(),
        "processor": _processor(),
        "processors": available_cores(),
        **({"device": device} if device else {}),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            rows = [row.split(":", 1) for row in file if ":" in row]
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, value in rows}
    name = facts.get("model name", platform.machine())
    notable = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if flag in facts.get("flags", "").split()
    ]
    return f"{name} ({', '.join(notable)})" if notable else name


def _device() -> str | None:
    """The name of the CUDA device, without a backend's import."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


# --- what comes out ------------------------------------------------------------------------------


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--plot`."""
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--plot", type=pathlib.Path, help="draw them into this file (.png, .svg)")


def table(title: str, rows: list[dict], baseline: str) -> dict:
    """A table of `rows_of`'s rows, as `publish` takes it."""
    return {"title": title, "baseline": baseline, "rows": rows}


def publish(benchmark: str, tables: list[dict], options: argparse.Namespace) -> None:
    """Prints the tables, writes them as JSON for report.py, and draws them."""
    facts = about()
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    for one in tables:
        show(one["title"], one["rows"], one["baseline"])
    given = {k: v for k, v in vars(options).items() if k not in ("json", "plot", "contender")}
    given = {k: v if isinstance(v, (int, str, list)) else str(v) for k, v in given.items()}
    if options.json:
        result = {"benchmark": benchmark, "about": facts, "options": given, "tables": tables}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(tables, options.plot)


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
    print(f"x: throughput against {baseline}; step MB: peak memory above what was held before it")


def plot(tables: list[dict], path: pathlib.Path) -> None:
    """Draws medians as bars with their quartiles, a panel a table."""
    from matplotlib.figure import Figure

    tables = [one for one in tables if one["rows"]]
    if not tables:
        return
    heights = [len(one["rows"]) + 1.6 for one in tables]
    figure = Figure(figsize=(8, 0.42 * sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, one in zip(panels, tables, strict=True):
        names = [row["contender"] for row in one["rows"]]
        medians = [row["median_ms"] for row in one["rows"]]
        ends = [row["quartiles_ms"] for row in one["rows"]]
        below = [max(0, m - low) for m, (low, _) in zip(medians, ends, strict=True)]
        above = [max(0, high - m) for m, (_, high) in zip(medians, ends, strict=True)]
        colors = ["#2b6cb0" if name.startswith("ours") else "#a0aec0" for name in names]
        axes.barh(names, medians, xerr=[below, above], color=colors, capsize=3, height=0.7)
        for y, row in enumerate(one["rows"]):
            ratio = f"  ({row['ratio']:.2f}x)" if "ratio" in row else ""
            axes.annotate(
                f"{row['median_ms']:.4g}{ratio}", (ends[y][1], y), xytext=(6, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.set_xlim(0, 1.25 * max(high for _, high in ends))
        axes.invert_yaxis()
        axes.set_xlabel("ms, median and quartiles", fontsize=8)
        axes.set_title(one["title"], fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
