"""A ResNet-34 for CIFAR-10 with numbered runs: parameters, log and figures of each are kept.

On a folder that holds train/ (and perhaps test/), each with a folder a class:
    python examples/resnet34_cifar10.py --data CIFAR10 --epochs 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras_resnet as kr
from keras_resnet.cli.demo import write_digits


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with train/, or class folders (default: digits)")
    parser.add_argument("--output", default="runs/resnet34_cifar10")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--smoke", action="store_true", help="two epochs on a few pictures")
    args = parser.parse_args()
    data = Path(args.data or write_digits("runs/digits")).resolve()
    few = [p for i, p in enumerate(sorted(data.rglob("*.*"))) if args.smoke and i % 15]

    # class ResNet: Residualblocks with biases and a ReLU before the addition, a bare 1x1
    # convolution at the start of every stage.
    model = kr.ResNet34CIFAR10()
    print(kr.summary(model))

    # Everything below stands in the recipe of this name already; it is written out to be seen.
    result = kr.train(
        data,
        recipe="resnet34_cifar10",
        # CIFAR10(transform=ToTensor, Normalize((0.5, ...), (0.5, ...))), no augmentation.
        normalization="half",
        crop="none",
        flip=0.0,
        # DataLoader(batch_size=128, shuffle=True)
        batch_size=args.batch_size,
        epochs=2 if args.smoke else args.epochs,
        # Train.__init__: torch.optim.SGD, with torch's arithmetic on every backend. At the
        # paper's rate of 0.1 this network diverges.
        optimizer="sgd",
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=0.0001,
        # Train.derease_lr: a tenth at half-time.
        schedule="multistep",
        milestones=(0.5,),
        gamma=0.1,
        # Train.generate_path: a finished run is kept, and the next gets the next number. A run
        # that was killed goes on instead.
        output=args.output,
        name="ResNet",
        exclude=few,
    )
    # paras/ResNet0.pt, the state dict that the class ResNet loads; best.keras holds the same.
    kr.save_torchvision(result.model, result.folder / "ResNet.pt")

    # logs/ResNet0.txt is train.log, infos/ResNet0.npy is history.csv, also here:
    print("acc_rates:", [round(value, 4) for value in result.history["accuracy"]])
    print("errors:", [round(value, 4) for value in result.history["loss"]])
    print("learning rates:", result.history["learning_rate"])
    print(f"Look into {result.folder}: ResNet.pt, train.log, history.csv, curves.png")


if __name__ == "__main__":
    main()
