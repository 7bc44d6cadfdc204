"""Python time of one step: pictures so small that arithmetic vanishes, one thread.

What is left is what a GPU would wait for: dispatch by Keras and torch. The optimizer, whose work
does not shrink with the pictures, is left out of both sides; its share is in train.py. Contenders
run in processes of their own and take turns. Wall and processor time are both given: on a busy
machine the second is the steadier.

    python benchmarks/overhead.py --model resnet50 --rounds 15 --json overhead.json

With `--devices N` it is what several processes of a training add instead: N with a thread and their
part of a batch each, against one process with N threads and the whole batch, and against one with a
thread and a part, who waits for nobody. These steps have the optimizer in them.

    python benchmarks/overhead.py --devices 2 --model resnet18 --batch 16 --image-size 96
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile

import peers

from keras_resnet.system.process import tune_process

BASELINE = "torchvision"
CONTENDERS = ("torchvision", "ours", "stock layers", "keras.applications")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--devices", type=int, help="measure so many processes of a training")
    parser.add_argument("--sync-bn", action="store_true", help="with --devices")
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


def contend_together(options) -> None:
    """As one of the processes of `2 x 8`; the first one is asked for turns, and starts the rest."""
    processes, size = map(int, options.contender.split(" x "))
    threads, rank = size * options.devices // options.batch, 0
    if processes > 1:
        rank = int(os.environ.setdefault("RANK", "0"))
        os.environ |= {
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        os.environ.setdefault("KERAS_RESNET_MEETING", tempfile.mkdtemp())
        for other in range(1, processes) if rank == 0 else ():
            nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            subprocess.Popen(
                [sys.executable, *sys.argv], env={**os.environ, "RANK": str(other)}, **nothing
            )
    os.environ |= {"OMP_NUM_THREADS": str(threads), "LOCAL_WORLD_SIZE": str(processes)}
    tune_process()
    import keras
    import train

    from keras_resnet.system import group
    from keras_resnet.training.callbacks import Position
    from keras_resnet.training.optimizers import SGD

    options.precision, options.batch = "float32", size
    model = train.keras_model(options, "ours")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(SGD(0.01, momentum=0.9), loss, metrics=["accuracy"], jit_compile=False)
    joined = group.join()
    joined.norms_together = options.sync_bn and processes > 1
    joined.join_model(model, Position(steps=1), 0)
    data = tuple(map(keras.ops.convert_to_tensor, train.batch_of(options)))
    model.train_on_batch(*data)  # builds loss and metrics, as fit does
    if rank == 0:
        peers.serve(lambda: model.train_function([data]), options.steps)
    with contextlib.suppress(RuntimeError):  # the first process has ended
        while rank:
            model.train_function([data])


def measure_together(options) -> dict:
    """The table of several processes."""
    part = options.batch // options.devices
    baseline = f"1 x {options.batch}"
    names = [baseline, f"1 x {part}", f"{options.devices} x {part}"]
    contenders = dict.fromkeys(names, "torch")
    results = peers.compete(__file__, contenders, sys.argv[1:], options.rounds)
    norms = "of all" if options.sync_bn else "of its own"
    title = (
        f"A training step in processes x images, {options.model}, {options.image_size} px, torch, "
        f"{options.devices} threads in all, batch norms {norms} images"
    )
    return peers.table(title, peers.rows_of(results, baseline), baseline)


def main() -> None:
    options = _arguments()
    if options.contender:
        (contend_together if options.devices else contend)(options)
        return
    if options.devices:
        peers.publish("overhead", [measure_together(options)], options)
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
