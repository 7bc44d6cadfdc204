"""Trains many tiny epochs in one process: memory and open files stay what they are.

    python tests/training/soak_train.py --epochs 60

What the first ten epochs take is theirs: kernels, buffers and caches are made then. From there on
the process may grow by `--megabytes` in all, and holds no more files open. Fails otherwise.
"""

from __future__ import annotations

import argparse
import gc
import os
import pathlib
import resource
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import keras
import numpy as np
from PIL import Image

from keras_resnet.training.train import train

WARM = 10  # epochs


class Watch(keras.callbacks.Callback):
    """Megabytes of memory and the number of open files, after each epoch."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[float, int]] = []

    def on_epoch_end(self, epoch, logs=None):
        gc.collect()
        pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        megabytes = pages * resource.getpagesize() / 2**20
        self.seen.append((megabytes, len(os.listdir("/proc/self/fd"))))


def soak(folder: pathlib.Path, epochs: int) -> list[tuple[float, int]]:
    """Trains `resnet_tiny` on 20 images, all that is written with it: what was seen by epoch."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("ant", "bee")):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 150, (20, 20, 3), dtype=np.uint8)
            pixels[..., k] += 60
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
    watch = Watch()
    train(
        folder / "pictures",
        output=folder / "runs",
        model="resnet_tiny",
        image_size=16,
        batch_size=4,
        epochs=epochs,
        ema=True,
        mixup=0.2,
        checkpoint_steps=2,
        keep=2,
        callbacks=[watch],
        verbose=False,
        report=False,
    )
    return watch.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--megabytes", type=float, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(pathlib.Path(folder), args.epochs)
    for epoch in range(WARM, args.epochs + 1, 10):
        megabytes, files = seen[epoch - 1]
        print(f"epoch {epoch:4}: {megabytes:8.1f} MB, {files} open files", flush=True)
    grown = max(megabytes for megabytes, _ in seen[WARM:]) - seen[WARM - 1][0]
    files = max(files for _, files in seen[WARM:]) - seen[WARM - 1][1]
    print(
        f"{args.epochs} epochs on {keras.backend.backend()}: behind the tenth {grown:+.1f} MB at "
        f"most, {files:+} open files"
    )
    if grown > args.megabytes or files > 0:
        sys.exit("It grows.")


if __name__ == "__main__":
    main()
