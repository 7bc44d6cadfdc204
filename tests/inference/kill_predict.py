"""Kills `keras-resnet predict FOLDER --output` at any instant, and looks at what comes of it.

    python tests/inference/kill_predict.py --kills 100

Half of the kills come at a random moment, half in the middle of writing: with half of the rows of
a batch written, between two rows of the finished file, before or after a file is synced, renamed or
removed. Each time the same command goes on, until it is through; then there is what one run in
peace leaves, byte for byte. In turns for CSV, JSON lines and Parquet.
`tests/inference/test_predict.py` runs a few of them.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import keras
import numpy as np
import torch  # noqa: F401 (before the first fork, as all that a child would import)
from PIL import Image

from keras_resnet.cli import main as cli
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.inference import prediction_files
from keras_resnet.models.zoo import create_model
from keras_resnet.system import files

FORMATS = (".csv", ".jsonl", ".parquet")
# What is counted, and about how often it happens in one run.
MOMENTS = {"batch": 15, "row": 120, "fsync": 3, "replace": 3, "unlink": 4}


def child(work: Callable[[], int | None]) -> int:
    """Forks a process that works and ends; gives its id. This one must never compute."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = work() or 0
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Waits for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prepare(folder: pathlib.Path, images: int) -> None:
    """A model, and images of which some cannot be read."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(images):
        path = folder / "images" / f"{i:04}.png"
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        if i % 9 == 4:
            path.write_bytes(b"no image")
    keras.utils.set_random_seed(0)
    model = create_model("resnet_tiny", num_classes=3, input_shape=(16, 16, 3))
    model.info["class_names"] = ["ant", "bee", "=1+1"]
    model.info["preprocess"] = Preprocess((16, 16), None).get_config()
    model.save(folder / "model.keras")


def command(folder: pathlib.Path, output: pathlib.Path) -> int:
    words = ["predict", folder / "model.keras", folder / "images", "--output", output]
    return cli.main([*map(str, words), "--batch-size", "4", "--workers", "1"])


def die_at(kind: str, moment: int) -> None:
    """Lets this process die at the so-manieth event of a kind, or after what it does."""
    left = [moment]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fatal(call):
        def do(*arguments, **options):
            last = now()
            if last and moment % 2:
                die()
            call(*arguments, **options)
            if last:
                die()

        return do

    write, rows = prediction_files.PredictionWriter.write, prediction_files._rows

    def half(self, predictions):
        if now():
            whole, self._stream = self._stream, Half(self._stream)
            write(self, predictions)
            whole.flush()
            die()
        write(self, predictions)

    def counted(work):
        for row in rows(work):
            if now():
                die()
            yield row

    if kind == "batch":
        prediction_files.PredictionWriter.write = half
    elif kind == "row":
        prediction_files._rows = counted
    elif kind == "unlink":
        pathlib.Path.unlink = fatal(pathlib.Path.unlink)
    else:
        setattr(files.os, kind, fatal(getattr(os, kind)))


class Half:
    """A file that takes only half of what it is given."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, data):
        return self.stream.write(data[: len(data) // 2])

    def __getattr__(self, name):
        return getattr(self.stream, name)


def outcome(folder: pathlib.Path) -> dict[str, bytes]:
    found = sorted(folder.iterdir())
    return {path.name: path.read_bytes() for path in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of all formats together")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    kills: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name)
        assert ended(child(lambda: prepare(top, args.images))) == 0, "nothing was prepared"
        expected, seconds = {}, 0.0
        for suffix in FORMATS:
            folder = top / f"peaceful{suffix}"
            folder.mkdir()
            begun = time.monotonic()
            pid = child(lambda folder=folder, suffix=suffix: command(top, folder / f"out{suffix}"))
            assert ended(pid) == 0, "the run in peace failed"
            seconds, expected[suffix] = time.monotonic() - begun, outcome(folder)
            assert sorted(expected[suffix]) == sorted({f"out{suffix}", "out.errors.csv"})
        runs = 0
        while sum(kills.values()) < args.kills or runs < len(FORMATS):
            suffix = FORMATS[runs % len(FORMATS)]
            folder = top / f"killed-{runs}"
            folder.mkdir()
            for code in killed(top, folder / f"out{suffix}", chance, seconds, args.kills, kills):
                assert code in (0, -signal.SIGKILL), f"the command failed: {code}"
                if (folder / f"out{suffix}").exists():  # whole or not there
                    assert outcome(folder)[f"out{suffix}"] == expected[suffix][f"out{suffix}"]
            assert outcome(folder) == expected[suffix], (suffix, sorted(outcome(folder)))
            runs += 1
    told = ", ".join(f"{count} {kind}" for kind, count in kills.most_common())
    print(
        f"{sum(kills.values())} kills in {runs} runs of {args.images} images, "
        f"in turns as {', '.join(FORMATS)}: equal bytes ({told})"
    )


def killed(top, output, chance, seconds, limit, kills):
    """Runs the command until it is through, killed on its way; yields each exit code."""
    code = -signal.SIGKILL
    while code != 0:
        kind = chance.choice(list(MOMENTS)) if chance.random() < 0.5 else "random moment"
        enough = sum(kills.values()) >= limit
        moment = chance.randint(1, MOMENTS.get(kind, 1))

        def work(kind=kind, moment=moment, enough=enough):
            if kind in MOMENTS and not enough:
                die_at(kind, moment)
            return command(top, output)

        pid = child(work)
        if kind not in MOMENTS and not enough:
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)  # not waited for yet: the id is still its own
        code = ended(pid)
        kills[kind] += code == -signal.SIGKILL
        yield code


if __name__ == "__main__":
    main()
