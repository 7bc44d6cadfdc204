"""Transfer learning: torchvision's ResNet-34 gets a new head for five kinds of flowers.

On a folder that holds train/ and val/, each with a folder a class:
    python examples/flowers_transfer.py --data flower_data
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import keras

import keras_resnet as kr
from keras_resnet.cli.demo import write_digits
from keras_resnet.inference.predict import save_predictions


def load_data(data, size, args):
    """train/ and val/ where the folder has them, else a fifth of every class is held out."""
    few = [p for i, p in enumerate(sorted(data.rglob("*.*"))) if args.smoke and i % 15]
    # transforms["train"] and transforms["val"]; Normalize is inside the model.
    augment = kr.Augment([kr.RandomResizedCrop(size), kr.RandomHorizontalFlip()])
    preprocess = kr.Preprocess(resize_size=round(size * 256 / 224), crop_size=size)
    common = {"batch_size": args.batch_size, "preprocess": preprocess, "seed": 0, "exclude": few}
    training = {"augment": augment, "drop_last": args.smoke or "auto", **common}
    if not (data / "train").is_dir():
        return kr.image_dataset_from_directory(
            data, validation_split=0.2, subset="both", **training
        )
    train_set = kr.image_dataset_from_directory(data / "train", **training)
    names = train_set.class_names
    return train_set, kr.image_dataset_from_directory(
        data / "val", class_names=names, shuffle=False, **common
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with train/ and val/, or class folders")
    parser.add_argument("--output", default="runs/flowers_transfer")
    parser.add_argument("--weights", default="DEFAULT", help="a .pth, or DEFAULT to download it")
    parser.add_argument("--freeze", action="store_true", help="train the new head alone")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--smoke", action="store_true", help="small pictures, random weights")
    args = parser.parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    size, epochs = (64, 1) if args.smoke else (224, args.epochs)
    data = Path(args.data or write_digits("runs/digits")).resolve()

    # 1. Train. The data, and class_indices.json.
    train_set, val_set = load_data(data, size, args)
    names = train_set.class_names
    class_indices = json.dumps(dict(enumerate(names)), indent=4)
    (output / "class_indices.json").write_text(class_indices, encoding="utf-8")
    print(f"using {train_set.num_samples} images for training, {val_set.num_samples} images for "
          "validation.")  # fmt: skip

    weights = args.weights
    if args.smoke:  # no download: a file of the same kind
        weights = output / "resnet34-pre.pth"
        kr.save_torchvision(kr.ResNet34(num_classes=100), weights)

    net = kr.ResNet34(
        num_classes=len(names), input_shape=(size, size, 3), include_preprocessing=True
    )
    # Way 1: net.load_state_dict(torch.load(...)), then net.fc = nn.Linear(in_channel, 5).
    print(kr.load_torchvision(net, weights, head="replace"))
    # Way 2 (either is enough): delete the "fc" entries, then load with strict=False.
    report = kr.load_torchvision(net, weights, head="skip")
    print("[left out]:", *sorted(report.skipped), sep="\n")
    print("[missing_keys]:", *sorted(report.missing), sep="\n")
    print("[unexpected_keys]:", *sorted(report.unexpected), sep="\n")

    # param.requires_grad = False. Frozen batch norms also keep their statistics, unlike torch's.
    print(kr.freeze(net, until="head" if args.freeze else None))
    # What predicting needs travels in the model's file.
    net.info.update(class_names=names, preprocess=val_set.preprocess.get_config())
    net.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # if val_accurate > best_acc: torch.save(net.state_dict(), save_path)
    save_path = output / "resNet34.keras"
    best = keras.callbacks.ModelCheckpoint(
        save_path, monitor="val_accuracy", mode="max", save_best_only=True
    )
    history = net.fit(
        train_set, validation_data=val_set, epochs=epochs, shuffle=False, callbacks=[best]
    ).history
    for epoch, loss in enumerate(history["loss"]):
        accuracy = history["val_accuracy"][epoch]
        print(f"[epoch {epoch + 1}] train_loss: {loss:.3f} val_accuracy: {accuracy:.3f}")
    kr.save_torchvision(net, output / "resNet34.pth")
    print("Finished Training")

    # 2. Predict one picture, every class with its probability, and the figure with its title.
    model = kr.load_model(save_path)
    [prediction] = kr.predict(model, val_set.file_paths[0], top=len(names))
    for name, probability in prediction.classes:
        print(f"class: {name:10} prob: {probability:.3}")
    save_predictions([prediction], output / "predicted.png")

    # 3. Predict a whole folder, 8 at a time; the last batch need not be full.
    folder = Path(val_set.file_paths[0]).parent
    for prediction in kr.iter_predictions(model, folder, top=1, batch_size=8):
        [(name, probability)] = prediction.classes
        print(f"image: {prediction.path}  class: {name}  prob: {probability:.3}")
    print(f"Look into {output}: resNet34.keras, class_indices.json, predicted.png")


if __name__ == "__main__":
    main()
