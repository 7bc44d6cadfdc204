"""Python time of one step: pictures so small that arithmetic vanishes, one thread.

What is left is what a GPU would wait for: dispatch by Keras and torch. The optimizer, whose work
does not shrink with the pictures, is left out of both sides; its share is in train.py. Contenders
run in processes of their own and take turns. Wall and processor time are both given: on a busy
machine the second is the steadier.

    python benchmarks/overhead.py --model resnet50 --rounds 15 --json overhead.json
"""

from __future__ import annotations

import argparse
import os
import sys

import peers

BASELINE = "torchvision"
CONTENDERS = ("torchvision", "ours", "stock layers", "keras.applications")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument(
        "--modes", nargs="+", default=["train", "infer"], choices=["train", "infer"]
    )
    peers.add_output_arguments(parser)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    return parser.parse_args()


def contend(options) -> None:
    import torch

    torch.set_num_threads(1)
    peers.keep_freed_memory()
    training = options.mode == "train"
    x = torch.randn(options.batch, options.image_size, options.image_size, 3)
    labels = torch.zeros(options.batch, dtype=torch.int64)
    if options.contender == "torchvision":
        model = getattr(peers.import_torchvision().models, options.model)(weights=None)
        model = model.to(memory_format=torch.channels_last).train(training)
        x = x.permute(0, 3, 1, 2)
        run = model
    else:
        import train

        options.precision = "float32"
        model = train.keras_model(options, options.contender)

        def run(x):
            return model(x, training=training)

    def step():
        with torch.set_grad_enabled(training):
            logits = run(x)
        if training:
            torch.nn.functional.cross_entropy(logits, labels).backward()
            model.zero_grad(set_to_none=True)

    peers.serve(step, options.steps)


def main() -> None:
    options = _arguments()
    if options.contender:
        contend(options)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    tables = []
    for mode in options.modes:
        arguments = [*sys.argv[1:], "--mode", mode]
        contenders = dict.fromkeys(options.contenders, "torch")
        results = peers.compete(__file__, contenders, arguments, options.rounds)
        title = (
            f"Python time of a step, {mode}, {options.model}, batch {options.batch}, "
            f"{options.image_size} px, torch, 1 thread"
        )
        tables.append(peers.table(title, peers.rows_of(results, BASELINE), BASELINE))
    peers.publish("overhead", tables, options)


if __name__ == "__main__":
    main()
