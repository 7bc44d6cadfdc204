"""The main job from end to end on real data that comes with scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from keras_resnet.inference.predict import predict
from keras_resnet.inference.prediction_files import save_predictions
from keras_resnet.system.files import printable
from keras_resnet.training.train import TrainResult, train


def write_digits(folder: str | os.PathLike, each: int | None = None) -> Path:
    """Writes scikit-learn's 1,797 handwritten digits as PNG files, a folder a digit.

    The images are 8x8 with 17 levels of gray (Alpaydin and Kaynak 1998, UCI's Optical
    Recognition of Handwritten Digits, test part); they are enlarged to 32x32.

    Args:
        folder: Where; images that are there already are left alone.
        each: So many of each digit; all by default.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    seen = [int((digits.target[:i] == digit).sum()) for i, digit in enumerate(digits.target)]
    few = np.asarray(seen) < (each or len(seen))
    names = [str(digit) for digit in range(10)]
    return write_images(folder, levels[few], digits.target[few], names, side=32)


def write_images(
    folder: str | os.PathLike,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    side: int | None = None,
) -> Path:
    """Writes arrays, shaped as those of `keras.datasets`, as PNG files, a folder a class.

    Args:
        folder: Where; images that are there already are left alone.
        images: uint8 `(n, height, width)` or `(n, height, width, 3)`.
        labels: `(n,)` or `(n, 1)`.
        class_names: Names in the order of the labels.
        side: Enlarge them to so many pixels a side.
    """
    folder = Path(folder)
    for index, (pixels, label) in enumerate(zip(images, np.ravel(labels), strict=True)):
        path = folder / class_names[int(label)] / f"{index:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels)
            if side is not None:
                image = image.resize((side, side), Image.Resampling.BICUBIC)
            image.save(path)
    return folder


def write_cifar10(folder: str | os.PathLike, arrays: tuple | None = None) -> Path:
    """Writes CIFAR-10 as PNG files: `train/` and `test/`, with a folder a class in each.

    Args:
        folder: Where; images that are there already are left alone.
        arrays: `(x_train, y_train), (x_test, y_test)`; by default those of
            `keras.datasets.cifar10`, which downloads 170 MB once.
    """
    import keras

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
             "truck"]  # fmt: skip
    train, test = keras.datasets.cifar10.load_data() if arrays is None else arrays
    write_images(Path(folder) / "train", *train, names)
    write_images(Path(folder) / "test", *test, names)
    return Path(folder)


def run_demo(output: str | os.PathLike = "demo", epochs: int | None = None) -> TrainResult:
    """Trains a ResNet-20 on handwritten digits, evaluates it and predicts three files.

    Images (`digits`) and run are in one folder; `epochs` is in place of the demo's own number.
    """
    output = Path(output)
    digits = write_digits(output / "digits")
    print(f"Wrote scikit-learn's handwritten digits to {printable(digits)}")
    result = train(
        digits,
        recipe="finetune",
        model="resnet20",
        output=output,
        name="run",
        epochs=epochs or 8,
        batch_size=64,
        image_size=32,
        learning_rate=0.1,
        flip=0.0,  # a mirrored digit is none
        normalization="dataset",
        cache="ram",
    )
    if result.interrupted:
        return result
    paths = [sorted((digits / digit).glob("*.png"))[0] for digit in ("2", "5", "8")]
    print("\nThree files predicted by best.keras alone:")
    predictions = predict(result.folder / "best.keras", paths, top=3)
    for prediction in predictions:
        print(prediction)
    save_predictions(predictions, result.folder / "predicted.png")
    print(f"Look at the images in {printable(result.folder)}")
    return result
