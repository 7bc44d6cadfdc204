"""ResNet-50 written out by hand from its two blocks, then trained on photographs of birds.

On a folder that holds a folder of pictures a class:
    python examples/bird_photos_resnet50.py --data bird_photos

Where the program's parts are: `ResNet50` is `resnet50` below, its two blocks are
`kr.identity_block` and `kr.conv_block` (keras_resnet/models/blocks.py); `ImageFolder`,
`random_split` and the loaders are `kr.image_dataset_from_directory`; torchsummary is `kr.summary`;
`train`, `test` and the loop over the epochs are `model.fit` with `line`; the charts are
`plots.curves`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras

import keras_resnet as kr
from keras_resnet import plots
from keras_resnet.cli.demo import write_digits

COUNTING = """\
Beside torchsummary's table: the parameters are the same. It calls all of them trainable and leaves
out the batch norms' moving means and variances, which are the non-trainable ones here. A ReLU has a
row there, and here belongs to the batch norm or the addition in front of it; a Bottleneck is a row
there that repeats the output of its last ReLU. So its forward/backward size (286.56 for 224x224,
MiB although it says MB) is larger than the one above. It counts no multiply-adds."""


def resnet50(input_shape, num_classes, stride_on="1x1", longest=6):
    """The paper's ResNet-50; a stage has `longest` blocks at most (6 is all of them)."""
    img = keras.Input(input_shape)

    # ZeroPadding2d, Conv2d(3, 64, 7, stride=2), BatchNorm2d, ReLU, MaxPool2d(3, 2, padding=1)
    x = kr.layers.Conv2D(64, 7, strides=2, pad=3, use_bias=False, name="conv1")(img)
    x = kr.layers.BatchNormalization(activation="relu", name="bn1")(x)
    x = kr.layers.MaxPooling2D(3, strides=2, pad=1, name="maxpool")(x)

    # Stages 2, 3, 4 and 5: one conv_block, then identity_blocks.
    on = {"stride_on": stride_on}
    x = kr.conv_block(x, 3, [64, 64, 256], stage=2, block="a", strides=(1, 1), **on)
    for block in "abc"[1:longest]:
        x = kr.identity_block(x, 3, [64, 64, 256], stage=2, block=block)
    x = kr.conv_block(x, 3, [128, 128, 512], stage=3, block="a", **on)
    for block in "abcd"[1:longest]:
        x = kr.identity_block(x, 3, [128, 128, 512], stage=3, block=block)
    x = kr.conv_block(x, 3, [256, 256, 1024], stage=4, block="a", **on)
    for block in "abcdef"[1:longest]:
        x = kr.identity_block(x, 3, [256, 256, 1024], stage=4, block=block)
    x = kr.conv_block(x, 3, [512, 512, 2048], stage=5, block="a", **on)
    for block in "abc"[1:longest]:
        x = kr.identity_block(x, 3, [512, 512, 2048], stage=5, block=block)

    # AdaptiveAvgPool2d((1, 1)), flatten, Linear. No softmax: the loss below takes logits.
    x = keras.layers.GlobalAveragePooling2D(name="avgpool")(x)
    x = keras.layers.Dense(num_classes, name="fc")(x)
    return kr.ImageModel(img, x, name="resnet50_by_hand")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with a folder a class (default: digits)")
    parser.add_argument("--output", default="runs/bird_photos_resnet50")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--weights", help="a .pth file to start from; its head is left out")
    parser.add_argument("--stride-on", default="1x1", help="3x3 where --weights is torchvision's")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=6, help="of a stage, at most; 6 is all")
    parser.add_argument("--smoke", action="store_true", help="a trial: few digits, tiny, shallow")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.epochs = write_digits("runs/digits-10", each=10), 1
        args.image_size, args.blocks = 32, 1
    size, output = args.image_size, Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    # ImageFolder and the transforms: Resize([224, 224]), ToTensor, Normalize.
    data = args.data or write_digits("runs/digits")
    preprocess = kr.Preprocess(resize_size=(size, size), crop_size=None)  # ImageNet's mean and std
    # random_split 80/20 and the two DataLoaders; shuffled for training, in order for testing.
    train_set, test_set = kr.image_dataset_from_directory(
        data, validation_split=0.2, subset="both", seed=0, preprocess=preprocess,
        output="float32", batch_size=args.batch_size, drop_last="auto",
    )  # fmt: skip
    names = train_set.class_names
    print(train_set)
    print("Classes:", names)
    print("Pictures:", train_set.num_samples, "for training,", test_set.num_samples, "for testing")
    X, y = test_set[0]
    print("Shape of X [N, H, W, C]:", X.shape, "Shape of y:", y.shape, y.dtype)

    # A grid of a batch, as it is fed, before the normalisation.
    images, labels, _ = train_set.take_samples(8)
    plots.picture_grid(images, [names[label] for label in labels], output / "batch.png")

    # The model, and torchsummary.summary(model, (3, 224, 224)).
    model = resnet50((size, size, 3), len(names), args.stride_on, longest=args.blocks)
    model.info.update(class_names=names, preprocess=preprocess.get_config())
    print(kr.summary(model))
    print(COUNTING)
    # load_state_dict(torch.load(...)): the layers are named as torchvision's modules.
    if args.weights is not None:
        print(kr.load_torchvision(model, args.weights, head="skip"))

    # loss_fn and opt.
    model.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    # train() and test() once an epoch, and the line they end with.
    def line(epoch, logs):
        print(
            f"\nEpoch:{epoch + 1:2d}, Train_acc:{logs['accuracy'] * 100:.1f}%, "
            f"Train_loss:{logs['loss']:.3f}, Test_acc:{logs['val_accuracy'] * 100:.1f}%, "
            f"Test_loss:{logs['val_loss']:.3f}"
        )

    report = keras.callbacks.LambdaCallback(on_epoch_end=line)
    history = model.fit(
        train_set, validation_data=test_set, epochs=args.epochs, shuffle=False, callbacks=[report]
    )
    model.save(output / "model.keras")
    print("Done")

    # Accuracy and loss over the epochs, side by side.
    plots.curves(history.history, output / "curves.png")
    print(f"Look into {output}: batch.png, curves.png, model.keras")


if __name__ == "__main__":
    main()
