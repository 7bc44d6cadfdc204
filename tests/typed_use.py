"""What users write, for mypy: nothing here is run. `make test` checks it.

A line with `type: ignore` is a mistake that mypy must find; `warn_unused_ignores` says if it does
not.
"""

from __future__ import annotations

import numpy as np

import keras_resnet as kr


def builders() -> None:
    model: kr.ImageModel = kr.ResNet18(num_classes=3, input_shape=(None, None, 3))
    kr.create_model("resnet50", include_top=False, pooling="avg")
    kr.AlexNet(dropout=0.5, classifier_activation="softmax")
    kr.ResNet18(num_clases=3)  # type: ignore[call-arg]
    kr.create_model("resnet18", num_classes="3")  # type: ignore[arg-type]
    kr.ResNet81()  # type: ignore[attr-defined]
    model.info["class_names"] = ["ant", "bee"]


def weights() -> None:
    tensors = kr.read_checkpoint("resnet50.pth")
    array: np.ndarray = tensors["conv1.weight"]
    print(array.shape, kr.inspect_checkpoint("resnet50.pth"))
    model = kr.ResNet50()
    report: kr.LoadReport = kr.load_torchvision(model, "resnet50.pth", head="skip")
    print(report, kr.verify(model, "resnet50.pth"), kr.to_torchvision(model))
    kr.load_torchvision(model, "resnet50.pth", hed="skip")  # type: ignore[call-arg]


def training() -> None:
    result: kr.TrainResult = kr.train("photos", model="resnet18", epochs=3)
    evaluation: kr.Evaluation = kr.evaluate("runs/a", "photos/val")
    print(result, evaluation.top1)
    for prediction in kr.predict("best.keras", ["a.jpg", "more/"]):
        print(prediction.path, prediction.classes)
    kr.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
    kr.evaluate("runs/a", "photos/val", batchsize=3)  # type: ignore[call-arg]


def images() -> None:
    preprocess = kr.Preprocess(256, 224)
    pixels: np.ndarray = preprocess("cat.jpg")
    print(pixels, kr.grad_cam(kr.ResNet18(), pixels[None]))
    kr.image_dataset_from_directory("photos", image_size=(224, 224), batch_size=8)
