"""Counts the house: files, lines, long functions, floors of imports, what a name loads, start-up.

    python benchmarks/house.py                    this checkout
    python benchmarks/house.py ../other --time    another one, with CPU seconds of short commands

A function's lines are those of its body without the docstring. A room is a folder, or a file that
lies in none; its floor is one above the highest of the rooms that it imports, imports inside
functions included.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import pathlib
import resource
import subprocess
import sys
import tempfile

NAMES = ("train", "predict", "load_torchvision", "create_model")
COMMANDS = ("--help", "models", "scan {folder}", "train {folder}/nowhere", "predikt")


def imported(path: pathlib.Path, modules: dict[str, pathlib.Path]) -> set[str]:
    """Names of the modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
            whole = {node.module} & set(modules)
            found |= below or whole
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(modules)
    return {name for name in found if modules[name] != path}


def floors(package: pathlib.Path) -> dict[str, int]:
    """The floor of every room (a folder, or a file that lies in none), from 1."""
    modules = {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): path
        for path in package.rglob("*.py")
        if path.stem != "__init__"
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        below = {one.split(".")[1] for one in imported(path, modules)}
        room = name.split(".")[1]
        graph.setdefault(room, set()).update(below - {room})

    levels: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():  # CycleError: an import upwards
        levels[room] = 1 + max((levels[below] for below in graph[room]), default=0)
    return levels


def functions(path: pathlib.Path) -> list[tuple[int, str]]:
    """(lines, where) of every function in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
            found.append((node.end_lineno - body[0].lineno + 1, f"{path}: {node.name}"))
    return found


def loaded(root: pathlib.Path, name: str) -> int:
    """How many modules of the package are loaded once a public name is there."""
    code = (
        f"import sys, keras_resnet as kr; kr.{name}; "
        "print(sum(m.split('.')[0] == 'keras_resnet' for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def cpu_seconds(root: pathlib.Path, *words: str) -> float:
    """User and system time of one Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=root, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", nargs="?", default=pathlib.Path(__file__).parents[1])
    parser.add_argument("--time", action="store_true", help="CPU seconds too; imports backends")
    options = parser.parse_args()
    root = pathlib.Path(options.root).resolve()
    package = root / "keras_resnet"
    files = sorted(package.rglob("*.py"))
    sizes = sorted((len(f.read_text(encoding="utf-8").splitlines()), f) for f in files)
    longest = sorted((f for path in files for f in functions(path)), reverse=True)
    levels = floors(package)
    print(f"files {len(files)}, lines {sum(size for size, _ in sizes):,}")
    print(f"over 480 lines: {sum(size > 480 for size, _ in sizes)}; the longest:")
    for size, path in sizes[:-6:-1]:
        print(f"  {size:5}  {path.relative_to(root)}")
    print(f"functions over 60 lines: {sum(size > 60 for size, _ in longest)}; the longest:")
    for size, where in longest[:5]:
        print(f"  {size:5}  {where.replace(str(root) + '/', '')}")
    print(f"rooms {len(levels)} on {max(levels.values())} floors")
    if options.time:
        print("modules loaded by", ", ".join(f"{name} {loaded(root, name)}" for name in NAMES))
        print(f"import keras_resnet: {cpu_seconds(root, '-c', 'import keras_resnet'):.2f} CPU s")
        with tempfile.TemporaryDirectory() as folder:
            for command in COMMANDS:
                words = command.format(folder=folder).split()
                seconds = cpu_seconds(root, "-m", "keras_resnet", *words)
                print(f"keras-resnet {command}: {seconds:.2f} CPU s")


if __name__ == "__main__":
    main()
