"""Time and memory of a training step, against torchvision, Keras' own models and stock layers.

Each contender sets up in a process of its own; then they take turns, one step each. All compute
the same: forward, softmax cross-entropy, backward, SGD with momentum 0.9 and weight decay 1e-4 (the
stock contenders without the decay), on one batch of random pictures that stays in memory. The
allocator's setting is the same for all (`--allocator default` for none).

    python benchmarks/train.py --model resnet50 --batch 16 --rounds 7 --json train.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

import peers

BASELINE = "torchvision"
CONTENDERS = {
    "torchvision": "torchvision's model in channels_last, torch.optim.SGD, an own loop",
    "torchvision compiled": "the same under torch.compile",
    "ours": "model.train_step, as fit runs it",
    "ours bare": "our model and optimizer in torchvision's loop (torch)",
    "ours compiled": "fit with jit_compile=True",
    "stock layers": "to_stock(our model) with keras.optimizers.SGD",
    "keras.applications": "ResNet50 (v1, biases) with keras.optimizers.SGD",
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=["torch", "tensorflow", "jax"], default="torch")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--allocator", choices=["keep", "default"], default="keep")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps a turn")
    parser.add_argument("--contenders", nargs="+", default=["torchvision", "ours", "stock layers"],
                        choices=[*CONTENDERS, "all"])  # fmt: skip
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def batch_of(options, classes: int = 1000):
    """Pictures `(batch, size, size, 3)`, float32, and labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    size = options.image_size
    pictures = rng.normal(size=(options.batch, size, size, 3)).astype("float32")
    return pictures, rng.integers(0, classes, size=options.batch)


def device_of(options) -> str:
    import torch

    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_loop(model, optimizer, options, channels_first: bool):
    """A step of torchvision's references/classification/train.py, on one batch."""
    import torch

    device = device_of(options)
    pictures, labels = batch_of(options)
    x, y = torch.tensor(pictures, device=device), torch.tensor(labels, device=device)
    if channels_first:
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    half = options.precision == "bfloat16" and channels_first

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = model(x) if channels_first else model(x, training=True)
            loss = torch.nn.functional.cross_entropy(logits.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def torchvision_step(options, compiled: bool = False):
    import torch

    model = getattr(peers.import_torchvision().models, options.model)(weights=None)
    model = model.to(device_of(options)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    step = torch_loop(torch.compile(model) if compiled else model, optimizer, options, True)
    return step


def keras_model(options, which: str):
    import keras

    if options.precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    shape = (options.image_size, options.image_size, 3)
    if which == "keras.applications":
        # No ResNet-18 there: ResNet50 stands for what a Keras user gets.
        return keras.applications.ResNet50(
            weights=None, input_shape=shape, classifier_activation=None
        )
    from keras_resnet.zoo import create_model

    model = create_model(options.model, num_classes=1000, input_shape=shape)
    if which == "stock layers":
        from keras_resnet.stock import to_stock

        return to_stock(model)
    return model


def keras_step(options, which: str):
    import keras
    import numpy as np

    model = keras_model(options, which)
    if which.startswith("ours"):
        from keras_resnet.optimizers import SGD

        optimizer = SGD(0.01, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    if which == "ours bare":
        import torch

        optimizer = torch.optim.SGD(
            [v.value for v in model.trainable_variables], 0.01, momentum=0.9, weight_decay=1e-4
        )
        return torch_loop(model, optimizer, options, False)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True if which == "ours compiled" else "auto",
    )
    pictures, labels = batch_of(options)
    if keras.backend.backend() == "torch":
        import torch

        device = device_of(options)
        data = torch.tensor(pictures, device=device), torch.tensor(labels, device=device)
        model.make_train_function()

        def step():
            model.train_function([data])
            if device == "cuda":
                torch.cuda.synchronize()

        return step
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        data = tf.constant(pictures), tf.constant(labels)
        train_step = tf.function(model.train_step, jit_compile=bool(model.jit_compile))
        return lambda: {k: np.asarray(v) for k, v in train_step(data).items()}
    return lambda: model.train_on_batch(pictures, labels)


def contend(options) -> None:
    if options.allocator == "keep":
        peers.keep_freed_memory()
    if options.backend == "torch" or options.contender.startswith("torchvision"):
        import torch

        torch.set_num_threads(options.threads)
    if options.contender.startswith("torchvision"):
        step = torchvision_step(options, compiled=options.contender.endswith("compiled"))
    else:
        step = keras_step(options, options.contender)
    peers.serve(step, options.steps)


def main() -> None:
    options = _arguments()
    if options.contender:
        contend(options)
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    chosen = list(CONTENDERS) if "all" in options.contenders else options.contenders
    contenders = {
        name: "torch" if name.startswith("torchvision") else options.backend for name in chosen
    }
    results = peers.compete(__file__, contenders, sys.argv[1:], options.rounds)
    rows = peers.rows_of(results, BASELINE)
    title = (
        f"One training step, {options.model}, batch {options.batch}, {options.image_size} px, "
        f"{options.precision}, {options.backend}, {options.threads} threads"
    )
    print(", ".join(f"{k} {v}" for k, v in peers.about().items()))
    peers.show(title, rows, BASELINE)
    if options.json:
        about = {**peers.about(), **{k: str(v) for k, v in vars(options).items()}}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
