"""Time and memory of inference, against torchvision, Keras' own models, and other runtimes.

Each contender sets up in a process of its own; then they take turns, one batch each: random
pictures in memory in, logits in memory out. All get the same processors and the same setting of
the allocator unless `--allocator` says otherwise. Models are exported once, before the first turn.

    python benchmarks/infer.py --model resnet50 --batch 1 16 --rounds 9 --json infer.json

With `--data DIR` a turn is all of a folder's JPEG files, and times are an image's: what `predict`
does with a model that it has converted before, against the runtime alone with a good loader.

    python benchmarks/infer.py --data DIR --model resnet18 --batch 1 16 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import native
import peers
import train

CONTENDERS = {
    "torchvision": "torchvision's model in channels_last, no_grad",
    "torchvision autocast": "the same under autocast (bfloat16)",
    "torchvision compiled": "torch.compile with weights frozen; autocast where bfloat16 is asked",
    "ours": "what predict runs: predict_on_batch of the model (torch) or of its folded twin",
    "ours optimized": "predict_on_batch of optimize_for_inference(model, precision) (torch)",
    "ours compiled": "predict_on_batch with jit_compile=True",
    "stock layers": "predict_on_batch of to_stock(our model)",
    "keras.applications": "predict_on_batch of its ResNet of the same depth (v1, biases)",
    "ONNX Runtime": "our model through export, in float32",
    "OpenVINO": "our model through export",
}
# From files, to probabilities. The baseline is the last, or the first that takes part.
FROM_FILES = {
    "predict": "kr.predict as it is by default: JPEG files in, classes out",
    "predict --engine keras": "the same by the model itself",
    "ONNX Runtime, Pillow": "onnxruntime by default, torchvision's model; threads that "
    "read ahead with Pillow and torchvision's transforms",
}
# Compiling takes minutes, so that these two are asked for by name or by `all`.
_SLOW = ("torchvision compiled", "ours compiled")
_FILES = {"ONNX Runtime": ("onnx", "model.onnx"), "OpenVINO": ("openvino", "model.xml")}
_NEEDS = {"ONNX Runtime": ("onnx", "onnxruntime"), "OpenVINO": ("openvino",)}
_EXPORT = "export "  # a contender of this name writes the file, and ends


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(
            f"{name:<24}{what}" for name, what in {**CONTENDERS, **FROM_FILES}.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_common_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="batches a turn")
    parser.add_argument(
        "--contenders",
        nargs="+",
        help="by default all but those that compile; with --data those that read files",
        choices=[*CONTENDERS, *FROM_FILES, "all"],
    )
    parser.add_argument(
        "--data", type=pathlib.Path, help="a folder of JPEG files, searched through"
    )
    peers.add_output_arguments(parser)
    parser.add_argument("--files", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is not None:
        options.contenders = options.contenders or list(FROM_FILES)
    elif options.contenders is None:
        options.contenders = [name for name in CONTENDERS if name not in _SLOW]
    elif "all" in options.contenders:
        options.contenders = list(CONTENDERS)
    return options


def torchvision_step(options, autocast: bool, compiled: bool):
    import torch

    device = train.device_of(options)
    model = native.torch_model(options.model).to(device).to(memory_format=torch.channels_last)
    model.eval()
    if compiled:
        torch._inductor.config.freezing = True
        model = torch.compile(model)
    x = torch.tensor(train.batch_of(options)[0], device=device).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)

    def step():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            return model(x)

    return step


def keras_step(options, which: str):
    import keras

    backend = keras.backend.backend()
    if which == "ours" and backend != "torch":
        which = "ours optimized"  # as predict does it there
    if which == "ours optimized":
        from keras_resnet.models.rebuild import optimize_for_inference
        from keras_resnet.models.zoo import create_model

        shape = (options.image_size, options.image_size, 3)
        classes = native.classes_of(options.model)
        model = create_model(options.model, num_classes=classes, input_shape=shape)
        model = optimize_for_inference(model, options.precision)
    else:
        model = train.keras_model(options, which)
    if which == "ours compiled":
        model.compile(jit_compile=True)
    x = train.batch_of(options)[0]
    if backend == "torch":
        import torch

        x = torch.tensor(x, device=train.device_of(options))
    return lambda: model.predict_on_batch(x)


def file_step(options, which: str):
    from keras_resnet.runtimes.select import runtime_of

    name, file = _FILES[which]
    runner = runtime_of(name)(options.files / file, options.precision, options.threads)
    x = train.batch_of(options)[0]
    return lambda: runner.outputs(x)


def jpegs(folder: pathlib.Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.jp*g"))]


def predict_step(options, engine: str):
    """What the command does once the model is open, for a model that was converted before."""
    import keras_resnet as kr

    paths, file = jpegs(options.data), options.files / "model.keras"
    runner = kr.open_runner(file, engine, images=len(paths))
    print(f"Engine: {runner}", file=sys.stderr, flush=True)
    return lambda: kr.predict(runner, paths, batch_size=options.batch)


def runtime_step(options):
    """The loop that people write around onnxruntime, with images read ahead of it."""
    from collections import deque
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import onnxruntime
    from PIL import Image

    transforms = peers.import_torchvision().transforms
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    size = options.image_size
    chain = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    chain = transforms.Compose([*chain, transforms.ToTensor(), transforms.Normalize(mean, std)])
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(
        options.files / "torchvision.onnx", settings, providers=["CPUExecutionProvider"]
    )
    paths, pool = jpegs(options.data), ThreadPoolExecutor(options.threads)

    def read(path):
        with Image.open(path) as image:
            return chain(image.convert("RGB")).numpy()

    def step():
        found, coming, rest = [], deque(), iter(paths)
        while len(found) < len(paths):
            while len(coming) < 2 * options.batch + options.threads:
                path = next(rest, None)
                if path is None:
                    break
                coming.append(pool.submit(read, path))
            count = min(options.batch, len(coming))
            batch = np.stack([coming.popleft().result() for _ in range(count)])
            (logits,) = session.run(None, {"images": batch})
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            found += [row.argsort()[:-6:-1].tolist() for row in shares]
        return found

    return step


def export_for_files(options) -> None:
    """Our model file and what `predict` makes of it for many images, and torchvision's model."""
    import torch

    import keras_resnet as kr

    size, classes = options.image_size, native.classes_of(options.model)
    model = kr.create_model(options.model, num_classes=classes, input_shape=(size, size, 3))
    model.info["preprocess"] = kr.Preprocess(size * 8 // 7, size).get_config()
    model.save(options.files / "model.keras")
    kr.open_runner(options.files / "model.keras", "auto", images=10**9)
    torch.onnx.export(
        native.torch_model(options.model).eval(),
        (torch.zeros(2, 3, size, size),),
        options.files / "torchvision.onnx",
        dynamo=False,
        input_names=["images"],
        dynamic_axes={"images": {0: "batch"}},
    )


def export(options, name: str) -> None:
    """Writes our model for another runtime; `export` itself says when it cannot."""
    import keras_resnet as kr

    if name in FROM_FILES:
        export_for_files(options)
        return
    shape = (options.image_size, options.image_size, 3)
    classes = native.classes_of(options.model)
    model = kr.create_model(options.model, num_classes=classes, input_shape=shape)
    name, file = _FILES[name]
    kr.export(model, options.files / file, name, verify=False)


def contend(options) -> None:
    which = options.contender
    if which.startswith(_EXPORT):
        export(options, which.removeprefix(_EXPORT))
        return
    train.prepare(options)
    [options.batch] = options.batch
    if which.startswith("torchvision"):
        compiled = which.endswith("compiled")
        half = options.precision == "bfloat16" and which != "torchvision"
        step = torchvision_step(options, half, compiled)
    elif which.startswith("predict"):
        step = predict_step(options, which.partition("--engine ")[2] or "auto")
    elif which in FROM_FILES:
        step = runtime_step(options)
    elif which in _FILES:
        step = file_step(options, which)
    else:
        step = keras_step(options, which)
    if which in FROM_FILES:
        peers.serve(step, warmup=1, parts=len(jpegs(options.data)))
        return
    peers.serve(step, options.steps, warmup=train.warmup_of(options))


def excuse(name: str, options) -> str | None:
    """Why a contender cannot take part, as far as it can be said beforehand."""
    half = options.precision == "bfloat16"
    if name in FROM_FILES:
        if options.data is None or not jpegs(options.data):
            return "--data names no folder of JPEG files"
        return peers.missing("onnx", "onnxruntime", "torchvision")
    if name == "torchvision autocast" and not half:
        return "the same as torchvision in float32"
    if name == "ours optimized" and options.backend != "torch":
        return f"the same as ours on {options.backend}"
    if name in _FILES:
        if name == "ONNX Runtime" and half:
            return "it computes in float32 alone"
        if options.device == "cuda":
            return "here it runs on the processor alone"
        if options.backend == "jax":
            return "jax writes no such file: --backend torch or tensorflow"
        return peers.missing(*_NEEDS[name])
    return train.excuse(name, options)


def taking_part(options) -> dict[str, str]:
    """Contenders and their backends, without those that cannot take part."""
    contenders = {}
    for name in options.contenders:
        reason = excuse(name, options)
        written = FROM_FILES.keys() & contenders.keys()
        if reason is None and (name in _FILES or (name in FROM_FILES and not written)):
            command = [sys.executable, __file__, "--contender", _EXPORT + name, *sys.argv[1:]]
            done = subprocess.run(
                [*command, "--files", str(options.files)],
                env=peers.environment(options.backend),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["export failed"])[-1]
        if reason is None:
            contenders[name] = "torch" if name.startswith("torchvision") else options.backend
        else:
            peers.left_out(native.label(name, options.model), reason)
    return contenders


def measure(options) -> list[dict]:
    """A table for every batch size."""
    half = options.precision == "bfloat16"
    baseline = "torchvision autocast" if half else "torchvision"
    if options.data is not None:
        baseline = "ONNX Runtime, Pillow"
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        options.files = pathlib.Path(folder)
        contenders = taking_part(options)
        for batch in options.batch:
            arguments = [*sys.argv[1:], "--files", folder, "--batch", str(batch)]
            results = peers.compete(__file__, contenders, arguments, options.rounds)
            rows = train.labelled(peers.rows_of(results, baseline), options.model)
            title = f"Inference, {options.model}, batch {batch}, {train.setting(options)}"
            if options.data is not None:
                title += f", an image out of {len(jpegs(options.data))} JPEG files"
            tables.append(peers.table(title, rows, native.label(baseline, options.model)))
    return tables


def main() -> None:
    options = _arguments()
    if options.contender:
        contend(options)
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    peers.publish("infer", measure(options), options)


if __name__ == "__main__":
    main()
