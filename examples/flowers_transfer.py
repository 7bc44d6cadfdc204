"""Transfer learning: torchvision's ResNet-34 gets a new head for five kinds of flowers.

On a folder that holds train/ and val/, each with a folder a class:
    python examples/flowers_transfer.py --data flower_data --picture tulip.jpg

Where the program's parts are: model.py is `kr.ResNet34` (keras_resnet/models/resnet.py); train.py
is `load_data`, `transfer` (three ways to a new head) and `train`; predict.py and batch_predict.py
are `predict` and `predict_folder`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import keras

import keras_resnet as kr
from keras_resnet.cli.demo import write_digits


def load_data(data, size, batch_size):
    """train/ and val/ where the folder has them, else a fifth of every class is held out."""
    # transforms["train"] and transforms["val"]; Normalize is inside the model.
    augment = kr.Augment([kr.RandomResizedCrop(size), kr.RandomHorizontalFlip()])
    preprocess = kr.Preprocess(resize_size=round(size * 256 / 224), crop_size=size)
    common = {"batch_size": batch_size, "preprocess": preprocess, "seed": 0}
    training = {"augment": augment, "drop_last": "auto", **common}
    if not (data / "train").is_dir():
        return kr.image_dataset_from_directory(
            data, validation_split=0.2, subset="both", **training
        )
    train_set = kr.image_dataset_from_directory(data / "train", **training)
    names = train_set.class_names
    return train_set, kr.image_dataset_from_directory(
        data / "val", class_names=names, shuffle=False, **common
    )


def transfer(way, weights, classes, size):
    """A network for `classes` classes that starts from weights of another number of them."""
    options = {"input_shape": (size, size, 3), "include_preprocessing": True}
    if way == 3:  # one more layer behind the head of 1,000 classes, and it alone trains
        whole = kr.ResNet34(**options)
        print(kr.load_torchvision(whole, weights))
        logits = keras.layers.Dense(classes, name="new_head")(whole.output)
        return kr.ImageModel(whole.input, logits, name="resnet34_and_one_layer", info=whole.info)
    net = kr.ResNet34(num_classes=classes, **options)
    if way == 1:  # net.load_state_dict(torch.load(...)), then net.fc = nn.Linear(in_channel, 5)
        print(kr.load_torchvision(net, weights, head="replace"))
        return net
    # Delete the "fc" entries of the file, then load_state_dict(..., strict=False).
    report = kr.load_torchvision(net, weights, head="skip")
    # What the network has and the file, without its "fc", lacks; and the other way round.
    print("[missing_keys]:", *sorted({**report.missing, **report.skipped}, reverse=True), sep="\n")
    print("[unexpected_keys]:", *sorted(report.unexpected), sep="\n")
    return net


def train(net, train_set, val_set, epochs, save_path):
    """Trains, and saves the best epoch: `if val_accurate > best_acc: torch.save(...)`."""
    net.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    def line(epoch, logs):
        print(
            f"\n[epoch {epoch + 1}] train_loss: {logs['loss']:.3f} "
            f"val_accuracy: {logs['val_accuracy']:.3f}"
        )

    best = keras.callbacks.ModelCheckpoint(
        save_path, monitor="val_accuracy", mode="max", save_best_only=True
    )
    report = keras.callbacks.LambdaCallback(on_epoch_end=line)
    net.fit(
        train_set, validation_data=val_set, epochs=epochs, shuffle=False, callbacks=[best, report]
    )
    print("Finished Training")
    return kr.load_model(save_path)


def predict(model, picture, output):
    """Every class with its probability, and the picture under its title."""
    [prediction] = kr.predict(model, picture, top=1000)
    for name, probability in prediction.classes:
        print(f"class: {name:10} prob: {probability:.3}")
    kr.save_predictions([prediction], output / "predicted.png")


def predict_folder(model, folder):
    """A whole folder, 8 pictures at a time; the last batch need not be full."""
    for prediction in kr.iter_predictions(model, folder, top=1, batch_size=8):
        [(name, probability)] = prediction.classes
        print(f"image: {prediction.path}  class: {name}  prob: {probability:.3}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with train/ and val/, or class folders")
    parser.add_argument("--picture", help="one of your own to predict (default: of the data)")
    parser.add_argument("--output", default="runs/flowers_transfer")
    parser.add_argument("--weights", default="DEFAULT", help="a .pth, or DEFAULT to download it")
    parser.add_argument("--way", type=int, default=2, choices=[1, 2, 3], help="to a new head")
    parser.add_argument("--freeze", action="store_true", help="train the new head alone")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--smoke", action="store_true", help="a trial: few digits, no download")
    args = parser.parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.data, args.image_size, args.epochs = write_digits("runs/digits-10", each=10), 64, 1
        args.weights = output / "resnet34-pre.pth"
        kr.save_torchvision(kr.ResNet34(), args.weights)

    data = Path(args.data or write_digits("runs/digits"))
    train_set, val_set = load_data(data, args.image_size, args.batch_size)
    names = train_set.class_names
    class_indices = json.dumps(dict(enumerate(names)), indent=4)
    (output / "class_indices.json").write_text(class_indices, encoding="utf-8")
    print(f"using {train_set.num_samples} images for training, {val_set.num_samples} images for "
          "validation.")  # fmt: skip

    net = transfer(args.way, args.weights, len(names), args.image_size)
    # param.requires_grad = False. Frozen batch norms also keep their statistics, unlike torch's.
    print(kr.freeze(net, until="head" if args.freeze or args.way == 3 else None))
    # What predicting needs travels in the model's file.
    net.info.update(class_names=names, preprocess=val_set.preprocess.get_config())
    best = train(net, train_set, val_set, args.epochs, output / "resNet34.keras")
    if args.way != 3:  # which is no ResNet-34 any more
        kr.save_torchvision(best, output / "resNet34.pth")

    predict(best, args.picture or val_set.file_paths[0], output)
    predict_folder(best, Path(val_set.file_paths[0]).parent)
    print(f"Look into {output}: resNet34.keras, class_indices.json, predicted.png")


if __name__ == "__main__":
    main()
