"""The main job from end to end on real data that comes with scikit-learn."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from keras_resnet.inference.predict import predict, save_predictions
from keras_resnet.system.files import printable
from keras_resnet.training.train import TrainResult, train


def write_digits(folder: str | os.PathLike) -> Path:
    """Writes scikit-learn's 1,797 handwritten digits as PNG files, a folder a digit.

    The images are 8x8 with 17 levels of gray (Alpaydin and Kaynak 1998, UCI's Optical
    Recognition of Handwritten Digits, test part); they are enlarged to 32x32.

    Args:
        folder: Where; images that are there already are left alone.

    Returns:
        The folder.
    """
    from sklearn.datasets import load_digits

    folder = Path(folder)
    digits = load_digits()
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(digit) / f"{index:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            levels = np.round(pixels * (255 / 16)).astype(np.uint8)
            Image.fromarray(levels).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return folder


def run_demo(output: str | os.PathLike = "demo", epochs: int | None = None) -> TrainResult:
    """Trains a ResNet-20 on handwritten digits, evaluates it and predicts three files.

    Args:
        output: Folder for the images (`digits`) and the run.
        epochs: In place of the demo's own number.

    Returns:
        The run's result.
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
