"""Pictures per second of the training pipeline, against torchvision's and Keras' own loaders.

RandomResizedCrop(224) + horizontal flip + normalise, batches of 32, on a folder of photographs of
about 500 x 400 (`--data DIR`, or `hymenoptera/train` under `KERAS_RESNET_SHARED`). Contenders run
in turns, each turn in a fresh process: one epoch to warm up, then `--epochs` timed ones. Keras'
loaders have no random crop; they resize, flip and normalise, which is less work.

    python benchmarks/pipeline.py --data DIR --rounds 5 --json pipeline.json

Measured on two cores of an AMD EPYC virtual machine, pictures/s, medians over epochs in turns
(torchvision 0.28.0, torch 2.13.0, Pillow 13.0.0, simplejpeg 1.9.0, TensorFlow 2.21.0, grain
0.2.18):

    n = 10: torchvision 550, ours as uint8 875 (1.59 times), as float32 765 (1.39)
    n = 6:  torchvision 517, ours as uint8 838 (1.62 times), as float32 738 (1.43),
            keras tf.data 631 and grain 335, both without a crop

Both cores are then busy, 2.15 ms of them a picture as uint8: decoding 1.17 (Pillow 1.36), the
resize in Pillow 0.65, cutting and copying 0.15, reading 0.03, the flip 0.03. The first two are
other libraries' and fixed by the pixels, so that 1.6 is about what threads can reach here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import peers

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCH, SIZE = 32, 224


def ours(folder, workers, output):
    from keras_resnet.data import directory as data
    from keras_resnet.data.augment import Augment
    from keras_resnet.data.transforms import RandomHorizontalFlip, RandomResizedCrop

    return data.image_dataset_from_directory(
        folder,
        batch_size=BATCH,
        seed=0,
        augment=Augment([RandomResizedCrop(SIZE), RandomHorizontalFlip()]),
        workers=workers,
        output=output,
    )


def torchvision_loader(folder, workers):
    import torch

    peers.import_torchvision()
    from torchvision import datasets, transforms

    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return torch.utils.data.DataLoader(
        datasets.ImageFolder(folder, chain),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )


def keras_loader(folder, workers, format):
    import keras

    arguments = {"image_size": (SIZE, SIZE), "batch_size": BATCH, "seed": 0, "verbose": False}
    dataset = keras.utils.image_dataset_from_directory(folder, format=format, **arguments)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    if format == "grain":
        import numpy as np

        def change(batch):
            images = np.asarray(batch[0])
            return (images[:, :, ::-1] - np.float32(mean)) / np.float32(std), batch[1]

        return dataset.map(change)
    import tensorflow as tf

    def change(images, labels):
        return (tf.image.random_flip_left_right(images) - mean) / std, labels

    return dataset.map(change, num_parallel_calls=workers).prefetch(2)


CONTENDERS = {
    "torchvision": lambda folder, workers: torchvision_loader(folder, workers),
    "ours uint8": lambda folder, workers: ours(folder, workers, "uint8"),
    "ours float32": lambda folder, workers: ours(folder, workers, "float32"),
    "keras tf.data (no crop)": lambda folder, workers: keras_loader(folder, workers, "tf"),
    "keras grain (no crop)": lambda folder, workers: keras_loader(folder, workers, "grain"),
}


def epoch(dataset) -> tuple[int, float]:
    """Reads everything once; returns pictures and seconds."""
    start, count = time.perf_counter(), 0
    for images, _ in dataset:
        count += len(images)
    if hasattr(dataset, "on_epoch_end"):
        dataset.on_epoch_end()
    return count, time.perf_counter() - start


def child(name: str, folder: str, workers: int, epochs: int) -> None:
    """Prints the pictures per second of each timed epoch, and the CPU time of a picture."""
    dataset = CONTENDERS[name](folder, workers)
    before = sum(os.times()[:4])
    pictures, _ = epoch(dataset)
    timed = [epoch(dataset) for _ in range(epochs)]
    pictures += sum(count for count, _ in timed)
    del dataset  # ends worker processes: only then is their time known
    gc.collect()
    cpu = (sum(os.times()[:4]) - before) / pictures
    print(json.dumps({"rates": [count / s for count, s in timed], "cpu_ms": 1000 * cpu}))


def turn(name: str, arguments: argparse.Namespace) -> dict | None:
    command = [sys.executable, __file__, "--child", name, "--data", arguments.data]
    command += ["--workers", str(arguments.workers), "--epochs", str(arguments.epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    shared = os.environ.get("KERAS_RESNET_SHARED", str(ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=f"{shared}/data/hymenoptera/train")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs a turn")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.data, arguments.workers, arguments.epochs)
        return

    figures: dict[str, list[float]] = {name: [] for name in arguments.only}
    cpu: dict[str, list[float]] = {name: [] for name in arguments.only}
    for _ in range(arguments.rounds):
        for name in list(figures):
            result = turn(name, arguments)
            if result is None:
                del figures[name]
            else:
                figures[name] += result["rates"]
                cpu[name].append(result["cpu_ms"])
    base = statistics.median(figures["torchvision"]) if figures.get("torchvision") else None
    rows = []
    for name, rates in figures.items():
        median = statistics.median(rates)
        low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        ratio = median / base if base else None
        rows.append(
            {"name": name, "n": len(rates), "median": median, "quartiles": [low, high]}
            | {"times_torchvision": ratio, "cpu_ms": statistics.median(cpu[name]), "all": rates}
        )
    print(f"{'':26}{'n':>4}{'pictures/s':>12}{'quartiles':>14}{'x torchvision':>15}{'CPU ms':>9}")
    for row in rows:
        spread = "{:.0f} - {:.0f}".format(*row["quartiles"])
        ratio = f"{row['times_torchvision']:.2f}" if base else "-"
        print(
            f"{row['name']:26}{row['n']:>4}{row['median']:>12.0f}{spread:>14}{ratio:>15}"
            f"{row['cpu_ms']:>9.2f}"
        )
    # As peers.publish writes it, for report.py.
    table = {
        "title": f"Training pipeline, batches of {BATCH}, {SIZE} px, {arguments.workers} workers",
        "unit": "pictures/s",
        "baseline": "torchvision",
        "rows": [
            {"contender": row["name"], "ratio": row["times_torchvision"]}
            | {key: row[key] for key in ("n", "median", "quartiles", "cpu_ms", "all")}
            for row in rows
        ],
    }
    if arguments.json:
        about = {
            **peers.about(),
            "data": pathlib.Path(arguments.data).name,
        }
        pathlib.Path(arguments.json).write_text(
            json.dumps({"benchmark": "pipeline", "about": about, "tables": [table]}, indent=1)
        )


if __name__ == "__main__":
    main()
