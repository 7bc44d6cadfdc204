"""AlexNet: the sizes of its layers, the paper's network, and one for CIFAR-10, trained and tested.

On CIFAR-10 as Keras downloads it, or a folder that holds train/ and test/ with a folder a class:
    python examples/alexnet_cifar10.py --data cifar10

Where the program's parts are: the table of sizes and the formula are `print_sizes`;
`AlexNet_Paper` and `AlexNet_CIFAR10` are `kr.AlexNetPaper` and `kr.AlexNetCIFAR10`
(keras_resnet/models/alexnet.py); `get_CIFAR10_mean_std` is `kr.dataset_statistics`; the training
and validation loop is `model.fit` with `line`; the test is `kr.evaluate`; the two charts are
`plots.curves`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
from PIL import Image

import keras_resnet as kr
from keras_resnet import plots
from keras_resnet.cli.demo import write_digits

# Kernel size, stride and padding of AlexNet_Paper's convolutions and poolings.
PAPER = {
    "Conv1": (11, 4, 2), "Maxpool1": (3, 2, 0), "Conv2": (5, 1, 2), "Maxpool2": (3, 2, 0),
    "Conv3": (3, 1, 1), "Conv4": (3, 1, 1), "Conv5": (3, 1, 1), "Maxpool3": (3, 2, 0),
}  # fmt: skip


def print_sizes(size=224):
    """The size behind every layer: o = (i - k + 2p) / s + 1, rounded down."""
    print("224 or 227? Conv1 gives", kr.conv_output_size(224, 11, strides=4), "from 224,",
          kr.conv_output_size(227, 11, strides=4), "from 227, and",
          kr.conv_output_size(224, 11, strides=4, padding=2), "from 224 padded by 2.")  # fmt: skip
    print(f"{'Input':9} {size}*{size}")
    for name, (kernel, strides, padding) in PAPER.items():
        size = kr.conv_output_size(size, kernel, strides, padding)
        print(f"{name:9} {size}*{size}")


def write_cifar10(folder, arrays=None):
    """CIFAR-10 as PNG files: `train/` and `test/`, with a folder a class in each."""
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    arrays = arrays or keras.datasets.cifar10.load_data()  # which downloads 170 MB once
    for part, (images, labels) in zip(("train", "test"), arrays, strict=True):
        for i, (pixels, label) in enumerate(zip(images, labels[:, 0], strict=True)):
            path = Path(folder, part, names[label], f"{i:05}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=32, help="batch size in training")
    parser.add_argument("--num_epochs", type=int, default=20, help="epochs in training")
    parser.add_argument("--softmax", action="store_true", help="make the well-known mistake")
    parser.add_argument("--data", help="cifar10, or a folder (default: handwritten digits)")
    parser.add_argument("--output", default="runs/alexnet_cifar10")
    parser.add_argument("--smoke", action="store_true", help="a trial: few digits, one epoch")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.num_epochs = write_digits("runs/digits-10", each=10), 1
    if args.data == "cifar10":
        args.data = write_cifar10("runs/cifar10")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    # The sizes by the formula, and AlexNet_Paper's own. (No --gpu: Keras finds the device.)
    print_sizes()
    print(kr.summary(kr.AlexNetPaper()))

    # The data sets: random_split of train/ into 80 % and 20 %, and test/.
    data = Path(args.data or write_digits("runs/digits"))
    options = {"image_size": 32, "batch_size": args.batch_size}
    train_set, eval_set = kr.image_dataset_from_directory(
        data / "train" if (data / "train").is_dir() else data,
        validation_split=0.2, subset="both", seed=0, drop_last="auto", **options,
    )  # fmt: skip
    names = train_set.class_names
    test_set = eval_set  # a folder without test/ has nothing better
    if (data / "test").is_dir():
        test_set = kr.image_dataset_from_directory(
            data / "test", class_names=names, shuffle=False, **options
        )

    # get_CIFAR10_mean_std: over all pixels, so that the last, smaller batch counts as it should.
    mean, std = kr.dataset_statistics(train_set)
    print("Mean", mean.round(4), "standard deviation", std.round(4))

    # model = AlexNet_CIFAR10(). It takes pixels and normalises them itself.
    model = kr.AlexNetCIFAR10(
        num_classes=len(names),
        include_preprocessing=True,
        mean=mean,
        std=std,
        classifier_activation="softmax" if args.softmax else None,
    )
    model.info.update(class_names=names, preprocess=train_set.preprocess.get_config())

    # criterion and optimizer. As torch.nn.CrossEntropyLoss, this loss applies a softmax itself: a
    # network that ends in one as well learns badly, and nobody says a word.
    if args.softmax:
        print("WARNING: softmax in the network and in the loss; expect it not to converge.")
    model.compile(
        optimizer=kr.optimizers.SGD(learning_rate=0.01, momentum=0.9),  # torch's arithmetic
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    # The training loop. Keras calls model.train() and model.eval(), so to speak, by itself, and
    # divides the epoch's loss by its batches. The program divides by batch_idx, the last batch's
    # index, which is one less: its losses are larger by N / (N - 1), and one batch is an error.
    def line(epoch, logs):
        print(
            f"\n[Epoch {epoch + 1:3d}] train_loss: {logs['loss']:.3f} "
            f"train_acc: {logs['accuracy']:.3%} eval_loss: {logs['val_loss']:.3f} "
            f"eval_acc: {logs['val_accuracy']:.3%}"
        )

    report = keras.callbacks.LambdaCallback(on_epoch_end=line)
    history = model.fit(
        train_set, validation_data=eval_set, epochs=args.num_epochs, shuffle=False,
        callbacks=[report],
    )  # fmt: skip
    print("Training process has finished. Saving trained model.")
    # torch.save(model.state_dict(), ...): the PyTorch class of these layers loads this file.
    kr.save_torchvision(model, output / "AlexNet_CIFAR10.pth")

    print("------Starting testing------")
    result = kr.evaluate(model, test_set, output=output)
    print(f"[Test ] loss: {result.loss:.3f} acc: {result.top1:.3%}")

    plots.curves(history.history, output / "curves.png")
    print(f"Look into {output}: AlexNet_CIFAR10.pth, curves.png, confusion_matrix.png")


if __name__ == "__main__":
    main()
