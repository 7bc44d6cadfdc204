"""Pictures per second of the training pipeline, against torchvision's, tf.data's and caches.

RandomResizedCrop(224) + horizontal flip + normalise, batches of 32, on a folder of photographs of
about 500 x 400 (`--data DIR`, or `hymenoptera/train` under `KERAS_RESNET_SHARED`). Contenders run
in turns, each turn in a fresh process on `--cores` processors: epochs to warm up (caches fill, and
ours compiles its resize after 1,000 images), then `--epochs` timed ones. The allocator keeps freed
memory on all sides.

"same pixels" are torchvision's, to the bit. ffcv's way (photographs with a short side of 256 in one
memory map, cut out and resized by OpenCV) and tf.data (decode_and_crop_jpeg, resized without
antialias) give others. uint8 is normalised on the device; the others are normalised here.

    python benchmarks/pipeline.py --data DIR --rounds 5 --json pipeline.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import peers

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCH, SIZE = 32, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(folder, workers, output="uint8", cache=None):
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
        cache=tempfile.mkdtemp() if cache == "disk" else cache,
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
            transforms.Normalize(MEAN, STD),
        ]
    )
    return torch.utils.data.DataLoader(
        datasets.ImageFolder(folder, chain),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def files_of(folder):
    """Paths and labels, as torchvision orders them."""
    classes = sorted(path for path in pathlib.Path(folder).iterdir() if path.is_dir())
    return [(str(file), i) for i, path in enumerate(classes) for file in sorted(path.iterdir())]


def tf_data(folder, workers):
    """TensorFlow's usual pipeline for ResNets (models/official/vision, `_decode_crop_and_flip`)."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(max(1, workers))
    tf.config.threading.set_inter_op_parallelism_threads(max(1, workers))
    # TensorFlow's decoder of windows takes nothing but JPEGs.
    found = [(path, label) for path, label in files_of(folder) if not path.endswith(".gif")]
    paths, labels = zip(*found, strict=True)
    everything = tf.zeros((1, 0, 4))

    def read(path, label):
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, everything, aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0),
            max_attempts=10, use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_FAST")
        image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE)))
        return (image / 255 - MEAN) / STD, label

    dataset = tf.data.Dataset.from_tensor_slices((list(paths), list(labels)))
    dataset = dataset.shuffle(len(paths)).map(read, num_parallel_calls=max(1, workers))
    return dataset.batch(BATCH).prefetch(2)


def memory_map(folder, workers):
    """As ffcv: pixels in one file, cut out and resized by OpenCV's INTER_AREA; uint8."""
    import cv2
    import numpy as np
    from PIL import Image

    from keras_resnet.data.preprocess import Preprocess
    from keras_resnet.data.reading import ReadAhead
    from keras_resnet.data.transforms import RandomResizedCrop

    cv2.setNumThreads(0)
    small, places, at = Preprocess(256, None), [], 0
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - as long as the map
    for path, _ in files_of(folder):
        pixels = small.pixels(Image.open(path))
        file.write(pixels)
        places.append((at, pixels.shape))
        at += pixels.size
    file.flush()
    stored = np.memmap(file.name, np.uint8, "r")
    crop, rng = RandomResizedCrop(SIZE), np.random.default_rng(0)

    def one(index):
        at, shape = places[index]
        pixels = stored[at : at + math.prod(shape)].reshape(shape)
        top, left, height, width = crop.sample(*shape[:2], rng)
        part = pixels[top : top + height, left : left + width]
        part = cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        return cv2.flip(part, 1) if rng.random() < 0.5 else part

    class Batches:
        def __iter__(self):
            order, ahead = rng.permutation(len(places)), ReadAhead(workers)
            count = -(-len(places) // BATCH)

            def parts(number):
                return [lambda: [one(i) for i in order[number * BATCH : (number + 1) * BATCH]]]

            for number in range(count):
                join = lambda _, images: (np.stack(images), None)  # noqa: E731
                yield ahead.get(0, number, parts, join, count=count, depth=2 * workers)

    return Batches()


CONTENDERS = {
    "torchvision": torchvision_loader,
    "ours uint8": ours,
    "ours float32": lambda folder, workers: ours(folder, workers, "float32"),
    "ours --cache DIR": lambda folder, workers: ours(folder, workers, cache="disk"),
    "ours --cache ram": lambda folder, workers: ours(folder, workers, cache="ram"),
    "tf.data (other pixels)": tf_data,
    "memory map as ffcv's (other pixels)": memory_map,
}


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that still run (Linux)."""
    mine = sum(os.times()[:4])
    for one in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{one.pid}/stat").read_text(encoding="ascii").split()
        mine += (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    return mine


def epoch(dataset) -> tuple[int, float]:
    """Reads everything once; returns pictures and seconds."""
    start, count = time.perf_counter(), 0
    for images, _ in dataset:
        count += len(images)
    if hasattr(dataset, "on_epoch_end"):
        dataset.on_epoch_end()
    return count, time.perf_counter() - start


def child(name: str, options: argparse.Namespace) -> None:
    """Prints the pictures per second of each timed epoch, and the CPU time of a picture."""
    peers.limit_threads(options.cores)
    peers.keep_freed_memory()
    dataset = CONTENDERS[name](options.data, options.workers[0])
    pictures, _ = epoch(dataset)
    while name.startswith("ours") and pictures < 1200:
        pictures += epoch(dataset)[0]
    gc.collect()
    before = cpu_seconds()
    timed = [epoch(dataset) for _ in range(options.epochs)]
    cpu = (cpu_seconds() - before) / sum(count for count, _ in timed)
    print(json.dumps({"rates": [count / s for count, s in timed], "cpu_ms": 1000 * cpu}))


def turn(name: str, workers: int, options: argparse.Namespace) -> dict | None:
    command = [sys.executable, __file__, "--child", name, "--data", options.data]
    command += ["--workers", str(workers), "--epochs", str(options.epochs)]
    command += ["--cores", str(options.cores)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        peers.left_out(name, done.stderr.strip().splitlines()[-1])
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_of(results: dict[str, list[dict]]) -> list[dict]:
    """Medians, and how many times torchvision's rate and how little of its CPU time."""
    base = results.get("torchvision")
    rows = []
    for name, turns in results.items():
        rates = [rate for one in turns for rate in one["rates"]]
        low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        row = {"contender": name, "n": len(rates), "median": statistics.median(rates)}
        row |= {"quartiles": [low, high], "all": rates, "ratio": None, "cpu_ratio": None}
        row["cpu_ms"] = statistics.median(one["cpu_ms"] for one in turns)
        if base:
            row["ratio"] = row["median"] / statistics.median(
                r for one in base for r in one["rates"]
            )
            row["cpu_ratio"] = statistics.median(one["cpu_ms"] for one in base) / row["cpu_ms"]
        rows.append(row)
    return rows


def main() -> None:
    shared = os.environ.get("KERAS_RESNET_SHARED", str(ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=f"{shared}/data/hymenoptera/train")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs a turn")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return

    results: dict[int, dict[str, list[dict]]] = {workers: {} for workers in options.workers}
    missing = set()
    for _, workers, name in itertools.product(range(options.rounds), options.workers, options.only):
        result = None if (workers, name) in missing else turn(name, workers, options)
        if result is None:
            missing.add((workers, name))
        else:
            results[workers].setdefault(name, []).append(result)
    tables = []
    for workers, found in results.items():
        title = f"Training pipeline, batches of {BATCH}, {SIZE} px, {workers} workers"
        # As peers.publish writes it, for report.py.
        rows = rows_of(found)
        tables.append(peers.table(title, rows, "torchvision") | {"unit": "pictures/s"})
        print(f"\n{title}\n{'':36}{'n':>4}{'a second':>10}{'quartiles':>14}{'x':>6}", end="")
        print(f"{'CPU ms':>9}{'x':>6}")
        for row in rows:
            spread = "{:.0f} - {:.0f}".format(*row["quartiles"])
            print(f"{row['contender']:36}{row['n']:>4}{row['median']:>10.0f}{spread:>14}", end="")
            print(f"{row['ratio'] or 0:>6.2f}{row['cpu_ms']:>9.2f}{row['cpu_ratio'] or 0:>6.2f}")
    if options.json:
        about = {**peers.about(), "data": pathlib.Path(options.data).name, "cores": options.cores}
        result = {"benchmark": "pipeline", "about": about, "tables": tables}
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
