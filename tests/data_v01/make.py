"""Made the files beside it; it ran under version 0.1.0, once on each backend, and is kept as proof.

    for backend in torch tensorflow jax; do KERAS_BACKEND=$backend python make.py models; done
    KERAS_BACKEND=torch python make.py runs

What users have on their disks was written by a version that knew nothing of the one that reads it.
`tests/test_files_of_v01.py` opens these files with the present code. Do not make them again with a
later version: the test would then compare that version with itself.

`models`, on each backend: a tiny network with every class that the package registers, trained for
three steps, as `plain.keras` (compiled, with the optimizer's state), `folded.keras`
(`kr.optimize_for_inference`) and exported files, with what they gave: `BACKEND.tar.xz`.

`runs`: `runs.tar.xz` holds images and three folders: `finished`; `killed`, a run that was killed
in the second of its three epochs; and what the same run came to where nobody killed it. The first
two epochs train the head alone, on a backbone whose kernels have two values, so that the state of
the killed run compresses; the third, which the reader of these files has to do, trains more.
PNG files that every run draws anew are left out, and the name of the machine's kernel.
"""

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile

import keras
import numpy as np
from PIL import Image

import keras_resnet as kr

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ["ant", "bee", "<fly> & \u00e9"]
STEPS = 3

# The same in test_files_of_v01.py: a killed run is found again by its options.
RUN = {
    "model": "resnet20",
    "weights": "start.keras",
    "image_size": 16,
    "batch_size": 4,
    "workers": 1,
    "deterministic": True,
    "checkpoint_steps": 2,
    "epochs": 3,
    "unfreeze": "head",
    "gradual": 2,
    "dropout": 0.3,
    "mixup": 0.2,
    "ema": True,
    "ema_steps": 1,
    "learning_rate": 0.05,
    "verbose": False,
    "report": False,
}


# --- models --------------------------------------------------------------------------------------


def tiny_network() -> keras.Model:
    inputs = keras.Input((16, 16, 3))
    x = kr.layers.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), name="preprocessing")(inputs)
    x = kr.layers.Conv2D(8, 3, pad=1, use_bias=False, name="conv1")(x)
    x = kr.layers.BatchNormalization(activation="relu", name="bn1")(x)
    x = kr.layers.MaxPooling2D(3, strides=2, pad=1, name="maxpool")(x)
    # No 1x1 convolution with a stride: on so few channels torch 2.13's gradient of one writes past
    # its memory (channels last, on a CPU with AVX2).
    x = kr.conv_block(x, 3, [8, 8, 12], stage=2, block="a", strides=1, groups=2)
    x = kr.conv_block(x, 3, [16, 16], stage=3, block="a", strides=2, shortcut="zero_padding")
    x = kr.identity_block(x, 3, [16, 16], stage=3, block="b")
    x = keras.layers.GlobalAveragePooling2D(name="avgpool")(x)
    outputs = keras.layers.Dense(len(NAMES), name="fc")(x)
    info = {
        "options": {"include_preprocessing": True},
        "class_names": NAMES,
        "preprocess": kr.Preprocess(20, 16).get_config(),
        "note": "written by 0.1",
    }
    model = kr.ImageModel(inputs=inputs, outputs=outputs, name="tiny", info=info)
    rng = np.random.default_rng(3)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if weight.name in ("gamma", "moving_variance"):
            value = rng.uniform(0.5, 1.5, shape)
        elif weight.name == "kernel":
            value = rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        else:
            value = rng.normal(0, 0.2, shape)
        weight.assign(value.astype("float32"))
    return model


def schedules() -> list:
    return [
        kr.schedules.ConstantSchedule(0.1, steps_per_epoch=4, warmup_epochs=1),
        kr.schedules.StepSchedule(0.1, step_size=2, gamma=0.3, steps_per_epoch=4),
        kr.schedules.MultiStepSchedule(0.1, [1, 3], steps_per_epoch=4, per="epoch"),
        kr.schedules.CosineSchedule(0.1, epochs=5, lr_min=0.01, steps_per_epoch=4, per="step"),
        kr.schedules.OneCycleSchedule(0.1, epochs=5, steps_per_epoch=4),
    ]


def make_models(folder: pathlib.Path) -> None:
    backend = keras.backend.backend()
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 1, 0])
    model = tiny_network()
    schedule = kr.schedules.CosineSchedule(
        0.05, epochs=4, warmup_epochs=1, steps_per_epoch=5, per="step"
    )
    optimizer = kr.optimizers.SGD(
        schedule,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-3,
        decay_norms=False,
        rate_multipliers={"^(.*/)?conv1/": 0.5},
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    for _ in range(STEPS):
        model.train_on_batch(images, labels)
    inputs = images.astype("float32")
    model.save(folder / "plain.keras")
    logits = model.predict_on_batch(inputs)
    folded = kr.optimize_for_inference(model)
    folded.save(folder / "folded.keras")
    facts = {"images": images, "labels": labels, "logits": logits,
             "folded_logits": folded.predict_on_batch(inputs)}  # fmt: skip
    formats = {
        "torch": ["model.onnx", "model.xml", "model.pt2"],
        "tensorflow": ["model.onnx", "model.xml", "model.tflite", "saved_model"],
        "jax": ["saved_model"],
    }
    for name in formats[backend]:
        kind = "saved_model" if name == "saved_model" else None
        print(kr.export(model, folder / name, kind, pictures=inputs))
    # One step more, which whoever loads the file has to do alike.
    facts["rate"] = schedule.value_at(STEPS)
    model.train_on_batch(images, labels)
    facts["next_logits"] = model.predict_on_batch(inputs)
    np.savez_compressed(folder / "expected.npz", **facts)
    if backend == "torch":
        rows = [
            {
                "object": keras.saving.serialize_keras_object(one),
                "values": [one.value_at(step) for step in range(25)],
            }
            for one in schedules()
        ]
        (folder / "schedules.json").write_text(json.dumps(rows, indent=1) + "\n")


# --- run folders ---------------------------------------------------------------------------------


def write_pictures(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for k, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 40, (2, 2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            pixels[..., k] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def write_start(path: str) -> None:
    """A backbone whose kernels have two values each, so that it compresses."""
    model = kr.create_model("resnet20", num_classes=2, input_shape=(16, 16, 3))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name == "kernel":
            shape = tuple(weight.shape)
            signs = rng.integers(0, 2, shape) * 2 - 1
            weight.assign((signs * 0.5 * np.prod(shape[:-1]) ** -0.5).astype("float32"))
    model.save(path)


class Kill(keras.callbacks.Callback):
    """The third step of the second epoch is the last thing that this process does."""

    left = 7

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def summary(model: keras.Model) -> dict[str, np.ndarray]:
    """Of each weight the first values, and two numbers that all of them go into."""
    found = {}
    for i, weight in enumerate(model.get_weights()):
        flat = weight.astype("float64").ravel()
        found[f"{i}"] = np.concatenate([flat[:16], [flat.mean(), np.square(flat).mean()]])
    return found


def make_runs() -> None:
    work = pathlib.Path(tempfile.gettempdir()) / "keras_resnet_v01"
    work.mkdir()
    os.chdir(work)
    write_pictures(work / "pictures")
    write_start("start.keras")
    one_epoch = {**RUN, "epochs": 1, "ema": False}
    kr.train("pictures", output="finished", **one_epoch)
    result = kr.train("pictures", output="peaceful", **RUN)
    images = np.stack([np.array(Image.open(p)) for p in sorted(work.glob("pictures/*/*.png"))])
    for name in ("best", "last"):
        model = kr.load_model(result.folder / f"{name}.keras")
        logits = model.predict_on_batch(images.astype("float32"))
        np.savez_compressed(work / f"{name}.npz", logits=logits, **summary(model))
    killed = subprocess.run([sys.executable, __file__, "killed"], cwd=work)
    assert killed.returncode == -signal.SIGKILL, killed

    def kept(name: pathlib.Path) -> bool:
        if name.parts[0] == "peaceful":
            return name.name == "history.csv"
        return name.parts[0] == "pictures" or name.suffix != ".png"

    pack(work, HERE / "runs.tar.xz", kept)


def pack(folder: pathlib.Path, path: pathlib.Path, kept=lambda name: True) -> None:
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for one in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = one.relative_to(folder)
            if kept(name):
                entry = archive.gettarinfo(one, name.as_posix())
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = ""
                with open(one, "rb") as stream:
                    archive.addfile(entry, stream)


if __name__ == "__main__":
    platform.platform = lambda *_: "Linux-x86_64"  # config.json keeps it
    if sys.argv[1] == "models":
        with tempfile.TemporaryDirectory() as folder:
            make_models(pathlib.Path(folder))
            pack(pathlib.Path(folder), HERE / f"{keras.backend.backend()}.tar.xz")
    elif sys.argv[1] == "runs":
        make_runs()
    else:
        kr.train("pictures", output="killed", callbacks=[Kill()], **RUN)
