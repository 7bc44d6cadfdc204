"""The main job from end to end on real data that comes with scikit-learn."""

from __future__ import annotations

import os
from collections import Counter
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
    Images that are there already are left alone; so many of each are written, all by default.
    """
    from sklearn.datasets import load_digits

    folder, digits, seen = Path(folder), load_digits(), Counter[int]()
    for levels, digit in zip(digits.images, digits.target.tolist(), strict=True):
        if seen[digit] == each:
            continue
        path = folder / str(digit) / f"{seen.total():04d}.png"
        seen[digit] += 1
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.round(levels * (255 / 16)).astype(np.uint8))
            image.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return folder


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
