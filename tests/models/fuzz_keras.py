"""Damages small `.keras` files where they mean something, and loads them; run alone for long.

    python tests/models/fuzz_keras.py --count 2000 --seed 0
    python tests/models/fuzz_keras.py --minutes 30 --seed 1

Every damaged file must load, or end in one of this package's errors, in one line. A file that
loads is also inspected, and predicts an image. `test_model_files.py` runs a short session; the
frame is `tests/fuzzing.py`.
"""

from __future__ import annotations

import io
import json
import pathlib
import random
import sys
import tempfile
import warnings
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fuzzing
import keras
import numpy as np

import keras_resnet as kr
from keras_resnet.models.files import model_class_names, model_input
from keras_resnet.system.errors import KerasResNetError
from keras_resnet.weights.keras_files import inspect_keras_file

IMAGE = np.zeros((16, 16, 3), np.uint8)
WORDS = (b"\x89HDF\r\n\x1a\n", b"TREE", b"HEAP", b"SNOD", b"GCOL", b"OHDR", b"PK\1\2", b"PK\3\4")


def samples() -> dict[str, bytes]:
    """Models of this package, of Keras' layers, a Sequential one, and one inside another."""
    tiny = kr.create_model("resnet_tiny", num_classes=3, input_shape=(None, None, 3))
    prepared = kr.Preprocess(16, 16).get_config()
    weights = {"source": "x.pth", "sha256": "0" * 64, "num_batches_tracked": 7}
    training = {"recipe": "scratch", "epoch": 1, "epochs": 2, "val_accuracy": 0.5}
    tiny.info.update(class_names=["a", "b", "c"], preprocess=prepared, weights=weights)
    tiny.info["training"] = training
    small = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, strides=2, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    x = keras.Input((8, 8, 3))
    outer = kr.ImageModel(x, keras.ops.add(small(x), small(x)), info={"preprocess": prepared})
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in {"own": tiny, "sequential": small, "outer": outer}.items():
            path = pathlib.Path(folder, f"{name}.keras")
            model.save(path)
            files[path.name] = path.read_bytes()
    return files


def mutate(name: str, data: bytes, random: random.Random) -> bytes:
    """A file damaged in its description, its info, its weights, its parts or its bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    at = {name: index for index, (name, _) in enumerate(parts)}
    packed = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    match random.randrange(10):
        case 0:
            return fuzzing.damaged(data, random, WORDS)
        case 1 | 2:
            name, numbers = parts[at["model.weights.h5"]]
            parts[at[name]] = name, fuzzing.damaged(numbers, random, WORDS, ends=(4_000, 900))
        case 3:
            _shuffle(parts, random)
        case kind:
            name = "config.json" if kind > 4 else random.choice(("config.json", "metadata.json"))
            text = json.loads(parts[at[name]][1])
            inside = text.get("config", {})
            some = inside["info"] if kind > 7 and "info" in inside else text
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                fuzzing.change(some, random)
            parts[at[name]] = name, json.dumps(text).encode("utf-8", "surrogatepass")
    return _zipped(parts, packed)


def _zipped(parts: list[tuple[str, bytes]], packed: int) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packed) as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in parts:
            archive.writestr(name, data)
    return out.getvalue()


def _shuffle(parts: list[tuple[str, bytes]], random: random.Random) -> None:
    """Takes parts away, doubles, renames, empties or fills them."""
    index = random.randrange(len(parts))
    name, data = parts[index]
    other = random.choice(parts)
    match random.randrange(7):
        case 0:
            del parts[index]
        case 1:
            parts.append((random.choice((name, name.upper())), other[1]))
        case 2:
            parts[index] = random.choice(("../" + name, "/" + name, name + "\0", "assets/x")), data
        case 3:
            parts[index] = name, other[1]
        case 4:
            parts[index] = name, data + b" " * random.choice((1, 1_000, 5_000_000))
        case 5:
            parts += [(f"assets/{i}", b"") for i in range(random.choice((1, 10, 2_000)))]
        case 6:
            parts[index] = name, b""


def read(path: pathlib.Path) -> str:
    """Loads and inspects a file; "read", or where it was refused."""
    told = "read"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = inspect_keras_file(path)
            json.loads(found.to_json())
            assert "\x1b" not in str(found)
        except KerasResNetError as error:
            told = _refused(error, "refused by inspect")
        try:
            model = kr.load_model(path)
        except KerasResNetError as error:
            return _refused(error, "refused")
        try:
            model_class_names(model)
            if model_input(model)[0].pixels(IMAGE).size < 64 * 64 * 4:
                kr.predict(model, IMAGE)
        except KerasResNetError as error:
            return _refused(error, "refused in use")
    return told


def _refused(error: KerasResNetError, told: str) -> str:
    assert "\n" not in str(error) and "\x1b" not in str(error)
    return told


def memory(size: int) -> float:
    """Bytes that a file may take: a model with all of Keras around it needs its 300 MB."""
    return 4 * size + 300e6


if __name__ == "__main__":
    fuzzing.main(__doc__, samples, mutate, read, memory=memory)
