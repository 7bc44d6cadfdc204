"""A ResNet-34 for CIFAR-10 with numbered runs: parameters, log and figures of each are kept.

On CIFAR-10 as Keras downloads it, or a folder that holds train/ (and perhaps test/) with a folder
a class:
    python examples/resnet34_cifar10.py --data cifar10 --epochs 1000

Where the program's parts are: `Residualblock` and `ResNet` are `kr.ResNet34CIFAR10` (its blocks:
keras_resnet/models/blocks.py); `Train.__init__` and the loop of `Train.train` are the arguments of
`kr.train`; the loss of every part in the log is `PartLosses`; `Train.derease_lr` is `rate_drops`;
`generate_path` and `save` are the run folders that `kr.train` numbers by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras

import keras_resnet as kr
from keras_resnet.cli.demo import write_digits


def rate_drops(epochs):
    """Epochs, from 0, at whose beginning the rate becomes a tenth: `(epoch + 1) % int(epochs / 2)`.

    Of 4 epochs those are 1 and 3, so that the rates are 0.01, 0.001, 0.001, 0.0001. As posted the
    line that lowers the rate ends the program: `self.opti.param_groups()[0]` calls a list. What
    was meant is `param_groups[0]`. One epoch would divide by zero; here its rate stays.
    """
    half = int(epochs / 2)
    return tuple(epoch for epoch in range(epochs) if half and (epoch + 1) % half == 0)


class PartLosses(keras.callbacks.Callback):
    """Writes the mean loss of every part of an epoch, of half as many steps as a batch has images.

    `Train.log`: a part is `int(batch_size / 2)` steps, 64 of them for batches of 128.
    """

    def __init__(self, batch_size, path):
        super().__init__()
        self.part, self.path = max(1, batch_size // 2), Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, line):
        """Adds a line to the file."""
        with open(self.path, "a", encoding="utf8") as file:
            file.write(f"{line}\n")

    def on_epoch_begin(self, epoch, logs=None):
        """Begins to count."""
        self.epoch, self.before = epoch, 0.0

    def on_train_batch_end(self, batch, logs=None):
        """Writes the part that is through."""
        if (batch + 1) % self.part == 0:
            total = float(logs["loss"]) * (batch + 1)  # Keras gives the mean since the epoch began
            loss, self.before = (total - self.before) / self.part, total
            self.log(f"epoch {self.epoch:<3} part {batch:<5} loss: {loss:<.7f}")

    def on_epoch_end(self, epoch, logs=None):
        """Writes the epoch's accuracy."""
        self.log(f"Accuracy of the network on the train images: {float(logs['accuracy']):.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="cifar10, or a folder (default: handwritten digits)")
    parser.add_argument("--output", default="runs/resnet34_cifar10")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--smoke", action="store_true", help="a trial: few digits, four epochs")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.epochs, args.batch_size = write_digits("runs/digits-2", each=2), 4, 4

    # class ResNet: Residualblocks with biases and a ReLU before the addition, a bare 1x1
    # convolution at the start of every stage.
    print(kr.summary(kr.ResNet34CIFAR10()))

    logs = Path(args.output) / "logs"
    number = len(list(logs.glob("ResNet*.txt")))
    result = kr.train(
        args.data or write_digits("runs/digits"),
        recipe="resnet34_cifar10",
        # CIFAR10(train=True): all 50,000 images. Nothing is held out, so the last epoch is the
        # best; a test/ in the folder is only measured, at the end.
        val_split=0,
        # transform=ToTensor, Normalize((0.5, ...), (0.5, ...)), no augmentation.
        normalization="half",
        crop="none",
        flip=0.0,
        # DataLoader(batch_size=128, shuffle=True)
        batch_size=args.batch_size,
        epochs=args.epochs,
        # Train.__init__: torch.optim.SGD, with torch's arithmetic on every backend. At the
        # paper's rate of 0.1 this network diverges.
        optimizer="sgd",
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=0.0001,
        # Train.derease_lr. (The recipe's own is once, at half-time.)
        schedule="multistep",
        milestones=rate_drops(args.epochs),
        gamma=0.1,
        callbacks=[PartLosses(args.batch_size, logs / f"ResNet{number}.txt")],
        # Train.generate_path: a finished run is kept, and the next gets the next number. A run
        # that was killed goes on instead.
        output=args.output,
        name="ResNet",
    )
    # paras/ResNet0.pt, the state dict that the class ResNet loads; best.keras holds the same.
    kr.save_torchvision(result.model, result.folder / "ResNet.pt")

    # infos/ResNet0.npy is history.csv, also here:
    print("acc_rates:", [round(value, 4) for value in result.history["accuracy"]])
    print("errors:", [round(value, 4) for value in result.history["loss"]])
    print("learning rates:", [float(f"{rate:.4g}") for rate in result.history["learning_rate"]])
    print(f"Look into {result.folder}: ResNet.pt, train.log, history.csv, curves.png")
    print(f"The loss of every part: {logs / f'ResNet{number}.txt'}")


if __name__ == "__main__":
    main()
