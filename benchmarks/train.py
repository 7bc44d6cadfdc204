"""Time and memory of a training step, against torchvision, Keras' own models and stock layers.

Each contender sets up in a process of its own; then they take turns, one step each. All compute
the same: forward, softmax cross-entropy, backward, SGD with momentum 0.9 and weight decay 1e-4 (the
stock contenders without the decay), on one batch of random pictures that stays in memory. The
allocator's setting is the same for all unless `--allocator` says otherwise.

    python benchmarks/train.py --model resnet50 --batch 16 --rounds 7 --json train.json

With `--fit`, a turn is an epoch of `--steps` batches out of memory, shuffled, with loss and
accuracy kept: `model.fit` against a loop written by hand. For the variants of CIFAR, which
torchvision has not, the other side is the same network in plain torch (native.py).

    python benchmarks/train.py --fit --model resnet20 --image-size 32 --batch 128 --steps 20
"""

from __future__ import annotations

import argparse
import os
import sys

import native
import peers

BASELINE = "torchvision"
CONTENDERS = {
    "torchvision": "torchvision's model in channels_last, torch.optim.SGD, an own loop",
    "torchvision compiled": "the same under torch.compile",
    "ours": "model.train_step, as fit runs it",
    "ours bare": "our model and optimizer in torchvision's loop (torch)",
    "ours compiled": "fit with jit_compile=True",
    "stock layers": "to_stock(our model) with keras.optimizers.SGD",
    "keras.applications": "its ResNet (v1, biases) with keras.optimizers.SGD",
}


# What keras.applications calls them.
_APPLICATIONS = {"resnet50": "ResNet50", "resnet101": "ResNet101", "resnet152": "ResNet152"}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What train.py and infer.py have in common."""
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=["torch", "tensorflow", "jax"], default="torch")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: cuda where it is",
    )
    parser.add_argument("--threads", type=int, default=peers.available_cores())
    parser.add_argument(
        "--allocator",
        choices=["keep", "default", "users"],
        default="keep",
        help="keep freed pages, in every contender; users: in ours alone, as train sets it",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(f"{name:<22}{what}" for name, what in CONTENDERS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_arguments(parser)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps a turn")
    parser.add_argument("--fit", action="store_true", help="epochs, not steps on one batch")
    parser.add_argument("--contenders", nargs="+", default=["torchvision", "ours", "stock layers"],
                        choices=[*CONTENDERS, "all"])  # fmt: skip
    peers.add_output_arguments(parser)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(options) -> None:
    """What every contender's process does first, before it imports a backend."""
    peers.limit_threads(options.threads)
    if options.device != "auto":
        os.environ["KERAS_TORCH_DEVICE"] = options.device
    ours = options.contender.startswith("ours")
    if options.allocator == "keep" or (options.allocator == "users" and ours):
        peers.keep_freed_memory()
    if options.backend == "torch" or options.contender.startswith("torchvision"):
        import torch

        torch.set_num_threads(options.threads)
        torch.backends.cudnn.benchmark = True  # as torchvision's reference has it


def batch_of(options, batches: int = 1):
    """Pictures `(batch, size, size, 3)`, float32, and labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    size, count = options.image_size, batches * options.batch
    pictures = rng.normal(size=(count, size, size, 3)).astype("float32")
    return pictures, rng.integers(0, native.classes_of(options.model), size=count)


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

    return step


def native_fit(model, optimizer, options):
    """An epoch as people write it for data in memory: shuffled, loss and accuracy kept."""
    import torch

    device = device_of(options)
    pictures, labels = batch_of(options, options.steps)
    x = torch.tensor(pictures, device=device).permute(0, 3, 1, 2)
    y = torch.tensor(labels, device=device)
    half = options.precision == "bfloat16"

    def epoch():
        total = torch.zeros((), device=device)
        right = torch.zeros((), device=device, dtype=torch.int64)
        for index in torch.randperm(len(y), device=device).split(options.batch):
            images, targets = x[index], y[index]
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                logits = model(images)
                loss = torch.nn.functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(targets)
            right += (logits.detach().argmax(1) == targets).sum()
        return float(total) / len(y), float(right) / len(y)

    return epoch


def torchvision_step(options, compiled: bool = False):
    import torch

    model = native.torch_model(options.model)
    model = model.to(device_of(options)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    model = torch.compile(model) if compiled else model
    if options.fit:
        return native_fit(model, optimizer, options)
    return torch_loop(model, optimizer, options, True)


def keras_model(options, which: str):
    import keras

    if options.precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    shape = (options.image_size, options.image_size, 3)
    if which == "keras.applications":
        make = getattr(keras.applications, _APPLICATIONS[options.model])
        return make(weights=None, input_shape=shape, classifier_activation=None)
    from keras_resnet.models.zoo import create_model

    classes = native.classes_of(options.model)
    model = create_model(options.model, num_classes=classes, input_shape=shape)
    if which == "stock layers":
        from keras_resnet.models.rebuild import to_stock

        return to_stock(model)
    return model


def keras_step(options, which: str):
    import keras
    import numpy as np

    model = keras_model(options, which)
    if which.startswith("ours"):
        from keras_resnet.training.optimizers import SGD

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
        metrics=["accuracy"] if options.fit else None,
    )
    if options.fit:
        pictures, labels = batch_of(options, options.steps)
        return lambda: model.fit(pictures, labels, batch_size=options.batch, verbose=0)
    pictures, labels = batch_of(options)
    if keras.backend.backend() == "torch":
        import torch

        device = device_of(options)
        data = torch.tensor(pictures, device=device), torch.tensor(labels, device=device)

        def step():
            if model.train_function is None:  # builds loss and metrics, as fit does, and compiles
                model.train_on_batch(*data)
            model.train_function([data])

        return step
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        data = tf.constant(pictures), tf.constant(labels)
        train_step = tf.function(model.train_step, jit_compile=bool(model.jit_compile))
        return lambda: {k: np.asarray(v) for k, v in train_step(data).items()}
    return lambda: model.train_on_batch(pictures, labels)


def warmup_of(options) -> int:
    """Steps before the first timed one: a compiler may compile anew in each of the first eight."""
    return 10 if options.contender.endswith("compiled") else 2


def contend(options) -> None:
    prepare(options)
    if options.contender.startswith("torchvision"):
        step = torchvision_step(options, compiled=options.contender.endswith("compiled"))
    else:
        step = keras_step(options, options.contender)
    if options.fit:
        peers.serve(step, 1, warmup=1, parts=options.steps)
    else:
        peers.serve(step, options.steps, warmup=warmup_of(options))


def excuse(name: str, options) -> str | None:
    """Why a contender cannot take part, as far as it can be said beforehand."""
    if name.startswith("torchvision"):
        return peers.missing("torch", "torchvision")
    if name == "keras.applications" and options.model not in _APPLICATIONS:
        return f"it has no {options.model}"
    if name == "ours bare" and (options.backend != "torch" or options.fit):
        return "it is for single steps on torch"
    return peers.missing({"tensorflow": "tensorflow"}.get(options.backend, options.backend))


def setting(options) -> str:
    """How a measurement was taken, for its title."""
    memory = {
        "keep": "",
        "default": ", default allocator",
        "users": ", freed memory kept by ours alone",
    }[options.allocator]
    return (
        f"{options.image_size} px, {options.precision}, {options.backend}, "
        f"{options.threads} thread{'s' if options.threads > 1 else ''}{memory}"
    )


def labelled(rows: list[dict], model: str) -> list[dict]:
    """Rows with their contenders named after what they ran."""
    return [{**row, "contender": native.label(row["contender"], model)} for row in rows]


def measure(options) -> list[dict]:
    """The one table."""
    chosen = list(CONTENDERS) if "all" in options.contenders else options.contenders
    contenders = {}
    for name in chosen:
        reason = excuse(name, options)
        if reason is None:
            contenders[name] = "torch" if name.startswith("torchvision") else options.backend
        else:
            peers.left_out(native.label(name, options.model), reason)
    results = peers.compete(__file__, contenders, sys.argv[1:], options.rounds)
    rows = labelled(peers.rows_of(results, BASELINE), options.model)
    what = f"A step of fit, epochs of {options.steps}" if options.fit else "One training step"
    title = f"{what}, {options.model}, batch {options.batch}, {setting(options)}"
    return [peers.table(title, rows, native.label(BASELINE, options.model))]


def main() -> None:
    options = _arguments()
    if options.contender:
        contend(options)
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    peers.publish("train", measure(options), options)


if __name__ == "__main__":
    main()
