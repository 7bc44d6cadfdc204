"""Models by name: `create_model`, a named builder for every row, and what can be asked of them."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

import keras

from keras_resnet.models.image_model import ImageModel, image_input
from keras_resnet.system.errors import InputError, between, one_of, whole
from keras_resnet.variants import get_spec

P = ParamSpec("P")


def create_model(
    variant: str | None = None,
    /,
    *,
    weights: str | Mapping[str, Any] | None = None,
    key: str | None = None,
    num_classes: int | None = None,
    input_shape: Sequence[int | None] | None = None,
    include_top: bool = True,
    pooling: str | None = None,
    classifier_activation: str | None = None,
    include_preprocessing: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_tensor=None,
    dropout: float | None = None,
    name: str | None = None,
    classes: int | None = None,
) -> ImageModel:
    """Builds a model of the table as a Functional Keras model.

    Initialisation, epsilon, momentum and padding are the reference implementation's. Keras' global
    data format decides between `(batch, height, width, channels)` and channels first.

    Args:
        variant: A name out of `list_models()`, such as `"resnet50"`.
        weights: `None` for random ones; `"DEFAULT"`, `"IMAGENET1K_V1"` or `"IMAGENET1K_V2"` for
            torchvision's (downloaded once, checked, kept); `"timm/resnet50.a1_in1k"` or
            `"hf://ORG/NAME@REVISION"` for those of Hugging Face's hub; a checkpoint's path; or a
            state dict.
            Where those have no head of their own, `num_classes` makes a new one, with a warning.
        key: Which network of a checkpoint, where it holds several: `inspect` lists them.
        num_classes: Width of the last layer; by default that of the variant's data set.
        input_shape: Height, width and channels (in the data format's order); sides may be `None`.
        include_top: With the classification head; without, the last feature map is the output.
        pooling: Without the head: `None`, `"avg"` or `"max"` over the image.
        classifier_activation: `None` gives logits, `"softmax"` probabilities; as all that is the
            head's, it counts with `include_top` alone.
        include_preprocessing: Take pixel values 0..255 and normalise inside the model.
        mean: Means for that, one a channel, in 0..1; those of the weights by
            default, else ImageNet's.
        std: Standard deviations for that, one a channel, in 0..1; the same by default.
        input_tensor: A Keras tensor to build on, in place of `input_shape`.
        dropout: Rate of the dropout in the head: 0 for ResNets, 0.5 for AlexNets by default.
        name: Name of the model; the variant's by default.
        classes: `num_classes`, as `keras.applications` calls it.

    Returns:
        The model. Its `info` names variant, options and the origin of its weights.

    Raises:
        InputError: An unknown name, a size too small, weights that do not fit, and the like.

    Examples:
        >>> model = create_model("resnet20", num_classes=10)
        >>> model.output_shape, model.count_params()  # 269,722 train, the rest are statistics
        ((None, 10), 271098)
    """
    if variant is None:  # create_model(name="resnet50")
        variant, name = name, None
    spec = get_spec(variant)
    if classes is not None and num_classes not in (None, classes):
        raise InputError(
            f"classes and num_classes are one thing. Received: {classes!r} and {num_classes!r}."
        )
    asked = classes if num_classes is None else num_classes
    num_classes = whole("num_classes", spec.num_classes if asked is None else asked, 1)
    dropout = between("dropout", spec.dropout if dropout is None else dropout, 0, 1, ends="[)")
    one_of("pooling", pooling, (None, "avg", "max"))
    if not include_top:
        classifier_activation = None

    family = importlib.import_module(f"keras_resnet.models.{spec.family}")
    inputs, x = image_input(spec, input_shape, input_tensor, include_preprocessing, mean, std)
    x = family.features(x, spec)
    if include_top:
        x = family.head(x, spec, num_classes, dropout, classifier_activation)
    elif pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(name="avgpool")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(name="maxpool_top")(x)
    options = {
        "num_classes": num_classes if include_top else None,
        "include_top": include_top,
        "include_preprocessing": bool(include_preprocessing),
        "classifier_activation": classifier_activation,
        "dropout": dropout,
    }
    info = {"variant": spec.name, "options": options}
    sources = keras.utils.get_source_inputs(inputs)
    inputs = sources[0] if len(sources) == 1 else sources
    model = ImageModel(inputs=inputs, outputs=x, name=name or spec.name, info=info)
    if weights is not None:
        colors = (mean, std) if include_preprocessing else None
        _load_weights(model, spec, weights, key, asked is not None, colors)
    return model


def _load_weights(
    model: ImageModel, spec, weights, key: str | None, new_head: bool, colors: tuple | None
) -> None:
    """Loads a published file by its tag, a checkpoint or a state dict into a fresh model."""
    # Not at the top: most models need no files.
    from keras_resnet.weights import download, load, mapping, published, sources

    with_head = model.info["options"]["include_top"]
    if isinstance(weights, str) and not os.path.exists(weights) and published.is_tag(weights):
        entry = published.resolve_weights(spec.name, weights)
        num_classes = model.info["options"]["num_classes"]
        # Said before 100 MB are fetched.
        if with_head and num_classes != entry.num_classes:
            raise InputError(
                f"{entry.file_name} has {entry.num_classes} classes, num_classes is "
                f"{num_classes}: build the model without weights, then "
                f'load_torchvision(model, "{entry.tag}", head="skip").'
            )
        weights = download.weights_path(entry)
    wanted, own_head = mapping.expected_keys(model), sources.own_head_of(model)
    found = sources.read_source(weights, key, wanted, own_head, spec.name)
    headless = with_head and found.whole and f"{own_head}.weight" not in found.tensors
    if headless and not new_head:
        raise InputError(
            f"{found.label} has no {own_head!r} as {model.name} has it: num_classes=N makes a new "
            "one, include_top=False none."
        )
    if colors is not None:
        sources.normalise_as_told(model, found, *colors)
    report = load.load_torchvision(
        model, found, head="skip" if headless or not with_head else "strict"
    )
    if headless:
        warnings.warn(f"{str(report).splitlines()[0]}: {own_head!r} is new.", stacklevel=3)


def _named(
    name: str, variant: str, build: Callable[Concatenate[str | None, P], ImageModel]
) -> Callable[P, ImageModel]:
    """`create_model` with the variant filled in, under the variant's name and signature."""

    def builder(*args: P.args, **options: P.kwargs) -> ImageModel:
        return build(variant, *args, **options)

    signature = inspect.signature(build)
    parameters = list(signature.parameters.values())[1:]
    builder.__name__ = builder.__qualname__ = name
    builder.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    builder.__doc__ = f"Builds `{variant}`; the arguments are those of `create_model`."
    return builder


ResNet18 = _named("ResNet18", "resnet18", create_model)
ResNet34 = _named("ResNet34", "resnet34", create_model)
ResNet50 = _named("ResNet50", "resnet50", create_model)
ResNet101 = _named("ResNet101", "resnet101", create_model)
ResNet152 = _named("ResNet152", "resnet152", create_model)
ResNeXt50_32x4d = _named("ResNeXt50_32x4d", "resnext50_32x4d", create_model)
ResNeXt101_32x8d = _named("ResNeXt101_32x8d", "resnext101_32x8d", create_model)
ResNeXt101_64x4d = _named("ResNeXt101_64x4d", "resnext101_64x4d", create_model)
WideResNet50_2 = _named("WideResNet50_2", "wide_resnet50_2", create_model)
WideResNet101_2 = _named("WideResNet101_2", "wide_resnet101_2", create_model)
ResNet50D = _named("ResNet50D", "resnet50d", create_model)
ResNet18D = _named("ResNet18D", "resnet18d", create_model)
ResNet34D = _named("ResNet34D", "resnet34d", create_model)
ResNet26D = _named("ResNet26D", "resnet26d", create_model)
ResNet101D = _named("ResNet101D", "resnet101d", create_model)
ResNet152D = _named("ResNet152D", "resnet152d", create_model)
ResNet10T = _named("ResNet10T", "resnet10t", create_model)
ResNet14T = _named("ResNet14T", "resnet14t", create_model)
ResNet26T = _named("ResNet26T", "resnet26t", create_model)
SEResNet50 = _named("SEResNet50", "seresnet50", create_model)
SEResNeXt50_32x4d = _named("SEResNeXt50_32x4d", "seresnext50_32x4d", create_model)
ResNet50GN = _named("ResNet50GN", "resnet50_gn", create_model)
ResNetV2_18 = _named("ResNetV2_18", "resnetv2_18", create_model)
ResNetV2_34 = _named("ResNetV2_34", "resnetv2_34", create_model)
ResNetV2_50 = _named("ResNetV2_50", "resnetv2_50", create_model)
ResNetV2_101 = _named("ResNetV2_101", "resnetv2_101", create_model)
ResNetV2_152 = _named("ResNetV2_152", "resnetv2_152", create_model)
ResNet50V2 = _named("ResNet50V2", "resnet50_v2", create_model)
ResNet101V2 = _named("ResNet101V2", "resnet101_v2", create_model)
ResNet152V2 = _named("ResNet152V2", "resnet152_v2", create_model)
ResNet50V1 = _named("ResNet50V1", "resnet50_v1", create_model)
ResNet101V1 = _named("ResNet101V1", "resnet101_v1", create_model)
ResNet152V1 = _named("ResNet152V1", "resnet152_v1", create_model)
ResNet50V1ReLU = _named("ResNet50V1ReLU", "resnet50_v1_relu", create_model)
ResNet20 = _named("ResNet20", "resnet20", create_model)
ResNet32 = _named("ResNet32", "resnet32", create_model)
ResNet44 = _named("ResNet44", "resnet44", create_model)
ResNet56 = _named("ResNet56", "resnet56", create_model)
ResNet110 = _named("ResNet110", "resnet110", create_model)
ResNet34CIFAR10 = _named("ResNet34CIFAR10", "resnet34_cifar10", create_model)
AlexNet = _named("AlexNet", "alexnet", create_model)
AlexNetPaper = _named("AlexNetPaper", "alexnet_paper", create_model)
AlexNetCIFAR10 = _named("AlexNetCIFAR10", "alexnet_cifar10", create_model)
