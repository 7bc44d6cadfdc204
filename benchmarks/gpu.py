"""Training and inference on a CUDA device: ours against torchvision's own way, eager and compiled.

Training is `model.train_step` under mixed precision, as fit runs it, against torchvision's loop
with autocast in channels_last; inference is `predict_on_batch` against the model under autocast.
Data is random and lies on the device. Two contenders take turns at a time, each in a process of
its own, so that twice a step's memory must fit the device.

    python benchmarks/gpu.py --json gpu.json --plot gpu.png

It needs torch, torchvision, Keras and this package. Whether it runs can be tried without a device:

    python benchmarks/gpu.py --device cpu --model resnet18 --batch 2 --image-size 64 --rounds 1
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import native
import peers
import train

_HERE = pathlib.Path(__file__).resolve().parent


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    train.add_common_arguments(parser)
    parser.set_defaults(precision="bfloat16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps a turn (20; 1 on a processor)")
    parser.add_argument("--what", nargs="+", default=["train", "infer"], choices=["train", "infer"])
    parser.add_argument(
        "--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"]
    )
    peers.add_output_arguments(parser)
    options = parser.parse_args()
    if options.backend != "torch":
        parser.error("it compares on torch alone: both sides are to run the same library")
    return options


def check_device(options) -> str | None:
    """Settles the device; a sentence if it is not there."""
    absent = peers.missing("torch", "torchvision", "keras")
    if absent:
        return absent
    import torch

    if options.device == "cpu":
        return None
    if not torch.cuda.is_available():
        return (
            f"no CUDA device: torch {torch.__version__} finds none. Whether the script runs can be "
            "tried with --device cpu --model resnet18 --batch 2 --image-size 64 --rounds 1"
        )
    options.device = "cuda"
    return None


def contenders_of(what: str, mode: str, options) -> list[str]:
    """The baseline and ours, by the names that train.py and infer.py know."""
    if mode == "compiled":
        return ["torchvision compiled", "ours compiled"]
    if what == "infer" and options.precision == "bfloat16":
        return ["torchvision autocast", "ours", "ours optimized"]
    return ["torchvision", "ours"]


def measure(options) -> list[dict]:
    """A table for training and for inference, eager and compiled."""
    common = [
        "--model", options.model, "--batch", str(options.batch),
        "--image-size", str(options.image_size), "--precision", options.precision,
        "--device", options.device, "--threads", str(options.threads),
        "--allocator", options.allocator, "--steps", str(options.steps),
    ]  # fmt: skip
    tables = []
    for what in options.what:
        for mode in options.modes:
            names = contenders_of(what, mode, options)
            contenders = dict.fromkeys(names, "torch")
            results = peers.compete(str(_HERE / f"{what}.py"), contenders, common, options.rounds)
            rows = train.labelled(peers.rows_of(results, names[0]), options.model)
            title = (
                f"{'Training step' if what == 'train' else 'Inference'}, {mode}, {options.device}, "
                f"{options.model}, batch {options.batch}, {train.setting(options)}"
            )
            tables.append(peers.table(title, rows, native.label(names[0], options.model)))
    return tables


def main() -> None:
    options = _arguments()
    reason = check_device(options)
    if reason is not None:
        print(f"gpu.py: {reason}", file=sys.stderr)
        sys.exit(2)
    if options.steps is None:
        options.steps = 20 if options.device == "cuda" else 1
    peers.publish("gpu", measure(options), options)


if __name__ == "__main__":
    main()
