"""Training and prediction on a CUDA device: ours against torchvision's own way, eager and compiled.

This one file is all there is to copy: it needs torch, torchvision and this package, installed.

    python gpu.py --json gpu.json

Both sides get the same bytes: uint8 images out of page-locked memory, sent beside the kernels and
normalised on the device, in channels_last, with cudnn.benchmark and the same rule for TF32, and
torch.optim.SGD's arithmetic. Training is an epoch of `--steps` batches: torchvision's loop, without
the numbers that it reads back at each step, and `model.fit` as `train` calls it. Prediction is
so many batches to log-probabilities (torchvision: to logits) in the host's memory, as `predict`
runs them. Contenders are processes of their own, which take turns; each setting is a table.
Whether it runs can be tried without a device:

    python gpu.py --device cpu --model resnet18 --batch 2 --image-size 32 --rounds 1 --steps 2
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

TORCHVISION, COMPILED = "torchvision", "torchvision compiled"
CONTENDERS = {
    "train": (TORCHVISION, COMPILED, "ours: fit", "ours: fit compiled"),
    "predict": (TORCHVISION, COMPILED, "ours: predict"),
}
PACKAGES = ("keras3-resnet", "keras", "torch", "torchvision", "numpy")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="a network of torchvision's")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument(
        "--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"]
    )
    parser.add_argument("--what", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                        help="for convolutions, as torch has it")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=20, help="batches a turn")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- in a contender's process --------------------------------------------------------------------


def images_and_labels(options) -> tuple:
    """Random batches, uint8 `(steps, batch, size, size, 3)`, and labels."""
    import numpy as np

    rng, size = np.random.default_rng(0), options.image_size
    shape = options.steps, options.batch[0], size, size, 3
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 1000, shape[:2], np.int64)


def import_torchvision():
    """Torchvision; in a checkout also the one of CUDA's wheel beside a torch without CUDA."""
    import torch

    if not torch.cuda.is_available() and importlib.util.find_spec("peers"):
        return importlib.import_module("peers").import_torchvision()
    return importlib.import_module("torchvision")


def torchvision_turn(options, training: bool, compiled: bool):
    """A turn of torchvision's model in the way of its references/classification/train.py."""
    import torch

    device, half = torch.device(options.device), options.precision == ["bf16"]
    model = getattr(import_torchvision().models, options.model)(weights=None)
    model = model.to(device, memory_format=torch.channels_last).train(training)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    if compiled and not training:
        torch._inductor.config.freezing = True  # the counterpart of our folded norms
    network = torch.compile(model) if compiled else model
    batches = [
        tuple(map(torch.from_numpy, pair)) for pair in zip(*images_and_labels(options), strict=True)
    ]
    if device.type == "cuda":
        batches = [(images.pin_memory(), labels.pin_memory()) for images, labels in batches]
    mean = torch.tensor(MEAN, device=device)[:, None, None]
    std = torch.tensor(STD, device=device)[:, None, None]

    def forward(images):
        images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)  # is channels_last
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return network(images.float().div_(255).sub_(mean).div_(std))

    def train():
        total = torch.zeros((), device=device)
        for images, labels in batches:
            labels = labels.to(device, non_blocking=True)
            loss = torch.nn.functional.cross_entropy(forward(images).float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total)

    def predict():
        with torch.inference_mode() if not compiled else torch.no_grad():
            return torch.cat([forward(images).float() for images, _ in batches]).cpu()

    return train if training else predict


def our_model(options, precision: str):
    import keras

    import keras_resnet as kr

    keras.config.set_dtype_policy({"bf16": "mixed_bfloat16", "fp32": "float32"}[precision])
    shape = (options.image_size, options.image_size, 3)
    return kr.create_model(
        options.model, num_classes=1000, input_shape=shape, include_preprocessing=True
    )


def fit_turn(options, compiled: bool):
    """An epoch of `fit`, as `keras_resnet.training.loop` calls it."""
    import contextlib

    import keras
    import numpy as np

    from keras_resnet.system.device import Sender, without_waiting
    from keras_resnet.training.optimizers import SGD
    from keras_resnet.training.prepare import compile_model

    model, send = our_model(options, options.precision[0]), Sender()
    compile_model(model, SGD(0.01, momentum=0.9, weight_decay=1e-4), False, compiled)
    batches = []
    for images, labels in zip(*images_and_labels(options), strict=True):
        locked = send.empty(images.shape, images.dtype)
        np.copyto(locked, images)
        batches.append((locked, labels.astype(np.int32)))

    class Feed(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return send(batches[index])

    def turn():
        with contextlib.nullcontext() if compiled else without_waiting():
            history = model.fit(Feed(workers=1), epochs=1, shuffle=False, verbose=0)
        return history.history["loss"][0]

    return turn


def predict_turn(options):
    """So many batches through what `predict` and `evaluate` run."""
    from keras_resnet.runtimes.runner import KerasRunner

    half = options.precision == ["bf16"]
    runner = KerasRunner(our_model(options, "fp32"), "bf16" if half else None)
    batches = list(images_and_labels(options)[0])
    size = options.batch[0]
    return lambda: list(runner.in_turn(runner.log_probabilities, batches, size))


def contend(options) -> None:
    """Sets up, and times a turn whenever a line comes in."""
    os.environ["KERAS_BACKEND"], os.environ["KERAS_TORCH_DEVICE"] = "torch", options.device
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = options.tf32
    [what], name = options.what, options.contender
    compiled = name.endswith("compiled")
    if name.startswith(TORCHVISION):
        turn = torchvision_turn(options, what == "train", compiled)
    else:
        turn = fit_turn(options, compiled) if what == "train" else predict_turn(options)

    def timed() -> float:
        start = time.perf_counter()
        turn()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    warmup = timed() + timed()  # kernels are chosen, programs compiled
    print(json.dumps({"warmup_s": warmup}), flush=True)
    for _ in sys.stdin:
        peak = {}
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            timed()  # device memory that was given back to the other contenders
        seconds = timed()
        if options.device == "cuda":
            peak = {"peak_mb": torch.cuda.max_memory_allocated() / 1e6}
            torch.cuda.empty_cache()
        print(json.dumps({"seconds": seconds, **peak}), flush=True)


# --- in the first process ------------------------------------------------------------------------


def start(what: str, name: str, precision: str, batch: int, options) -> subprocess.Popen | None:
    """A contender's process, ready; `None` where it could not be."""
    command = [
        sys.executable, str(pathlib.Path(__file__).resolve()), "--contender", name,
        "--what", what, "--precision", precision, "--batch", str(batch),
        "--model", options.model, "--image-size", str(options.image_size),
        "--steps", str(options.steps), "--device", options.device,
        "--tf32" if options.tf32 else "--no-tf32",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process if answer(process, name) is not None else None


def answer(process: subprocess.Popen, name: str) -> dict | None:
    """The next line of JSON that a contender prints; `None` where it has ended, which is said."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    print(f"left out: {name}: ended with code {process.wait()}", file=sys.stderr, flush=True)
    return None


def compete(what: str, precision: str, batch: int, options) -> dict[str, list[dict]]:
    """What each contender's turns took."""
    names = [n for n in CONTENDERS[what] if not (options.eager and n.endswith("compiled"))]
    found = {name: start(what, name, precision, batch, options) for name in names}
    running = {name: process for name, process in found.items() if process is not None}
    turns: dict[str, list[dict]] = {name: [] for name in running}
    for index in range(options.rounds):
        # Every other round backwards, so that a drift of the machine favours nobody.
        for name in list(running)[:: -1 if index % 2 else 1]:
            process = running[name]
            process.stdin.write("turn\n")
            process.stdin.flush()
            taken = answer(process, name)
            if taken is None:
                del running[name], turns[name]
            else:
                turns[name].append(taken)
    for process in running.values():
        process.stdin.close()
        process.wait(timeout=120)
    return turns


def rows_of(turns: dict[str, list[dict]], options, batch: int) -> list[dict]:
    """Medians and quartiles of a batch's milliseconds, and throughput against both baselines."""
    rows = []
    for name, own in turns.items():
        times = [1000 * turn["seconds"] / options.steps for turn in own]
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        row = {
            "contender": name,
            "n": len(times),
            "median_ms": statistics.median(times),
            "quartiles_ms": [quarters[0], quarters[2]],
            "images_per_second": 1000 * batch / statistics.median(times),
        }
        for key, baseline in (("ratio", TORCHVISION), ("ratio_to_compiled", COMPILED)):
            if baseline in turns:  # turn by turn: a slow minute of the machine weighs on both
                pairs = zip(turns[baseline], own, strict=True)
                row[key] = statistics.median(b["seconds"] / o["seconds"] for b, o in pairs)
        if "peak_mb" in own[0]:
            row["peak_mb"] = max(turn["peak_mb"] for turn in own)
        rows.append(row)
    return rows


def show(table: dict) -> None:
    print(f"\n{table['title']}")
    print(f"{'contender':<24}{'n':>4}{'ms a batch':>12}{'quartiles':>20}{'images/s':>10}"
          f"{'MB':>8}{'x eager':>9}{'x compiled':>12}")  # fmt: skip
    for row in table["rows"]:
        low, high = row["quartiles_ms"]
        spread = f"{low:.1f} - {high:.1f}"
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "ratio_to_compiled")]
        memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
        print(
            f"{row['contender']:<24}{row['n']:>4}{row['median_ms']:>12.2f}{spread:>20}"
            f"{row['images_per_second']:>10.0f}{memory:>8}{ratios[0]:>9}{ratios[1]:>12}"
        )


def about(device: str) -> dict:
    """What a measurement depends on."""
    import torch

    facts = {
        "when": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["CUDA"], facts["cuDNN"] = torch.version.cuda, str(torch.backends.cudnn.version())
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def lacking(options) -> str | None:
    """A sentence if it cannot run here."""
    needed = ("torch", "torchvision", "keras", "keras_resnet")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        return (
            f"no CUDA device: torch {torch.__version__} finds none. Whether the script runs can be "
            "tried with --device cpu --model resnet18 --batch 2 --image-size 32 --rounds 1 "
            "--steps 2"
        )
    return None


def main() -> None:
    options = _arguments()
    if options.contender:
        contend(options)
        return
    reason = lacking(options)
    if reason is not None:
        print(f"gpu.py: {reason}", file=sys.stderr)
        sys.exit(2)
    facts, tables = about(options.device), []
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    for what in options.what:
        for precision in options.precision:
            for batch in options.batch:
                turns = compete(what, precision, batch, options)
                title = (
                    f"{'Training step' if what == 'train' else 'Prediction'}, {options.model}, "
                    f"batch {batch}, {options.image_size} px, {precision}, {options.device}"
                    f"{'' if options.tf32 or precision != 'fp32' else ', no TF32'}"
                )
                rows = rows_of(turns, options, batch)
                tables.append({"title": title, "baseline": TORCHVISION, "rows": rows})
                show(tables[-1])
    if options.json:
        given = {k: v for k, v in vars(options).items() if k not in ("json", "contender")}
        result = {"benchmark": "gpu", "about": facts, "options": given, "tables": tables}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
