"""What a recipe makes of a folder of images: datasets, model, learning rates, optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet.data import augment, transforms, warps
from keras_resnet.data.dataset import ImageDataset
from keras_resnet.data.folders import listed, stratified_split
from keras_resnet.data.items import Source, taken
from keras_resnet.data.labels import check_classes, class_weights
from keras_resnet.data.listing import fingerprint
from keras_resnet.data.looking import constant_line
from keras_resnet.data.opening import Parts, find_parts, opened, place
from keras_resnet.data.preprocess import SMALL, Preprocess, imagenet_colors
from keras_resnet.data.statistics import measured_on
from keras_resnet.models.zoo import create_model
from keras_resnet.recipes import Recipe
from keras_resnet.system.device import image_shape, in_data_format
from keras_resnet.system.errors import DataError, InputError
from keras_resnet.training.freeze import load_pretrained, starting_weights
from keras_resnet.training.metrics import AveragePrecision, LabelAccuracy
from keras_resnet.training.optimizers import SGD
from keras_resnet.variants import get_spec

logger = logging.getLogger("keras_resnet")

_NORMALIZATIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "imagenet": imagenet_colors,
    "half": lambda channels: {"mean": (0.5,) * channels, "std": (0.5,) * channels},
    "dataset": lambda channels: {"mean": None, "std": None},  # measured, on the training images
}

_LOOK = 20_000  # images to validate on, up to which all are decoded before the first step

# --- data ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """The datasets of a run."""

    train: ImageDataset  # shuffled, augmented
    val: ImageDataset | None  # in order, as `evaluate` sees it; `None` where nothing is held out
    test: ImageDataset | None  # of `test/`; without labels where its folders say none
    names: list[str]  # of the classes, in the order of the model's outputs
    preprocess: Preprocess  # of `val`, and of every later prediction
    train_size: int  # side of the training images, pixels
    task: str  # "single-label", "binary" or "multi-label"
    objective: dict[str, Any]  # what `compile_model` makes of it: task, `soft_labels`, `focal`
    fingerprint: str  # of all paths, training and validation; of a `Source` also of its labels
    notes: list[str]  # what was taken as what, and what was not read


def prepare_data(
    directory: str | os.PathLike | Source,
    recipe: Recipe,
    *,
    seed: int = 0,
    workers: int | None = None,
    cache: str | os.PathLike | None = None,
    exclude: Any = None,
    strict: bool = False,
    exif: bool = False,
    look: bool = True,
) -> Data:
    """The datasets of a recipe over a folder; the arguments are those of `train`.

    With `look` images are opened: up to 20,000 validation images are decoded once, to drop what
    cannot be read, and mean and deviation are measured where the recipe asks. Without, names alone
    are looked at.

    Raises:
        NotFoundError: The directory does not exist.
        DataError: No class folders, one class only, an empty class, no readable image.
        InputError: Images too small for the network, or classes that do not fit.
    """
    size = recipe.image_size or get_spec(recipe.model).input_size
    eval_size = recipe.eval_size or size
    _check_sizes(recipe.model, image_size=size, eval_size=eval_size)
    options = {"exif": exif, "color_mode": recipe.channels}
    options |= _NORMALIZATIONS[recipe.normalization](recipe.channels)
    source = opened(directory)
    found = find_parts(source, exclude)
    parts, names, notes = _split(found, recipe, seed), found.names, list(found.notes)
    task, mode = _task(recipe, parts["train"][1], names)
    common = {
        "batch_size": 1 if recipe.batch_size == "auto" else recipe.batch_size,  # till it is settled
        "seed": seed,
        "workers": workers,
        "cache": cache if look else None,
        "on_error": "raise" if strict else "skip",
        "label_mode": mode,
    }
    training = ImageDataset(
        *parts["train"],
        names,
        preprocess=evaluation_preprocess(recipe, size, **options),
        augment=recipe_augment(recipe, size),
        drop_last="auto",  # batch norm cannot train on one image
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
        repeats=recipe.repeats,
        sampler=recipe.sampler,
        **common,
    )
    training.weights = _image_weights(training, recipe)
    check_classes(training.class_counts, repr(place(source)))
    preprocess = evaluation_preprocess(recipe, eval_size, **options)
    if recipe.normalization == "dataset" and look:
        preprocess = dataclasses.replace(preprocess, **measured_on(training, workers))
    evaluation = {"preprocess": preprocess, "shuffle": False, **common}
    validation = ImageDataset(*parts["val"], names, **evaluation) if "val" in parts else None
    evaluation["label_mode"] = "int" if task != "multi-label" else mode  # mixed only in training
    test = ImageDataset(*parts["test"], names, **evaluation) if "test" in parts else None
    for part in filter(None, (validation, test)):
        part.weights = None  # which are those of the training loss
    held_out = [] if validation is None else validation.file_paths
    if look:
        for part in (validation, test if strict else None):
            # An unreadable last batch would end the first epoch; of many images there is none.
            if part is not None and (strict or part.num_samples <= _LOOK):
                part.verify()
        if recipe.channels == 3:
            notes += [constant_line(p, training.threads) for p in (training.file_paths, held_out)]
    return Data(
        *(training, validation, test, names, preprocess),
        size,
        task,
        {"task": task, "soft_labels": mode != "int", "focal": recipe.focal},
        fingerprint(training.file_paths, held_out),
        [line for line in notes if line],
    )


def _image_weights(training: ImageDataset, recipe: Recipe) -> np.ndarray | None:
    """What each image counts: as its table says, times the weight of its class."""
    own = training.weights
    weights = class_weights(recipe.class_weights, training.class_counts)
    if weights is None:
        return own
    several = training.labels.dtype == object  # of several labels the one that counts most
    each = training.labels if several else training.labels[:, None]
    of_class = np.asarray([max((weights[k] for k in of), default=1) for of in each], np.float32)
    return of_class if own is None else of_class * own


def _task(recipe: Recipe, labels: np.ndarray, names: Sequence[str]) -> tuple[str, str]:
    """What the model shall say of an image, and the `label_mode` that it learns by."""
    several = labels.dtype == object
    task = recipe.task or ("multi-label" if several else "single-label")
    if several and task != "multi-label":
        raise InputError(
            f"The images have several labels each: task={task!r} takes one. Leave it out, or give "
            "one label an image."
        )
    if task == "binary" and len(names) != 2:
        raise InputError(
            f"task='binary' is for two classes. Received: {len(names)} ({listed(list(names))})."
        )
    soft = recipe.mixup or recipe.cutmix or recipe.label_smoothing or recipe.focal
    modes = {"binary": "binary", "multi-label": "multi_hot"}
    return task, modes.get(task, "categorical" if soft else "int")


def _check_sizes(variant: str, **sizes: int) -> None:
    spec = get_spec(variant)
    least, side = spec.min_size, min(sizes.values())
    maps = [at for _, shapes, at in spec.weighted_layers(2) if len(shapes["weight"]) == 4]
    stride = spec.input_size // min(at for at in maps if at > 1)  # 1: squeeze and excitation
    if least <= side < min(2 * stride, spec.input_size):
        logger.warning(
            "Images of %dx%d are tiny for %s, whose last feature map has one value for %dx%d "
            "pixels: enlarge them, image_size=%d (--image-size) or more, or take a network for "
            "small images, such as resnet20.", side, side, variant, stride, stride, 2 * stride,
        )  # fmt: skip
    for name, side in sizes.items():
        if side < least:
            raise InputError(
                f"{name}={side} is too small: {variant} needs images of at least {least}x{least} "
                "pixels."
            )


def _split(found: Parts, recipe: Recipe, seed: int) -> dict[str, tuple[Sequence[str], np.ndarray]]:
    """The images of each part, with some of the training ones held out where the recipe says so."""
    parts = dict(found.of)
    if "val" not in parts and recipe.val_split:
        paths, labels = parts["train"]
        kept, held = stratified_split(labels, recipe.val_split, seed)
        for name, those in (("train", kept), ("val", held)):
            parts[name] = taken(paths, those), labels[those]
    elif "val" not in parts and (recipe.calibrate or recipe.patience is not None):
        what = "calibrate=True" if recipe.calibrate else f"patience={recipe.patience}"
        raise InputError(f"{what} needs images to validate on: pass a val_split above 0.")
    return parts


def evaluation_preprocess(recipe: Recipe, size: int, **options: Any) -> Preprocess:
    """How a recipe's images are evaluated at a size; options as `Preprocess` takes them."""
    options["interpolation"] = recipe.interpolation
    if recipe.resize_exact:
        return Preprocess((size, size), None, **options)
    return Preprocess.for_size(size, recipe.eval_resize, **options)


def recipe_augment(recipe: Recipe, size: int) -> augment.Augment | None:
    """The random changes of a recipe's training images, or `None` for none."""
    how = recipe.interpolation
    small = get_spec(recipe.model).input_size <= SMALL
    crop = {"auto": "padded" if small else "random_resized"}.get(recipe.crop, recipe.crop)
    changes: list[transforms.Transform] = []
    if recipe.flip:
        changes.append(transforms.RandomHorizontalFlip(recipe.flip))
    turned = how if how in warps.TURNING else "bicubic"
    if recipe.vertical_flip:
        changes.append(warps.RandomVerticalFlip(recipe.vertical_flip))
    if recipe.rotation:
        changes.append(warps.RandomRotation(recipe.rotation, turned))
    if recipe.policy is not None:
        known = {"ta_wide": augment.TrivialAugmentWide, "ra": augment.RandAugment,
                 "augmix": augment.AugMix}  # fmt: skip
        kind = known.get(recipe.policy, functools.partial(augment.AutoAugment, recipe.policy))
        changes.append(kind(interpolation=turned))
    if recipe.color_jitter:
        changes.append(transforms.ColorJitter(*(recipe.color_jitter,) * 3))
    if recipe.grayscale:
        changes.append(warps.RandomGrayscale(recipe.grayscale))
    if recipe.blur:
        changes.append(warps.GaussianBlur(size // 20 * 2 + 1, p=recipe.blur))
    if recipe.random_erasing:
        changes.append(transforms.RandomErasing(recipe.random_erasing))

    if crop == "random_resized":
        first = [transforms.RandomResizedCrop(size, tuple(recipe.crop_scale), interpolation=how)]
    elif crop == "padded":
        # He et al. 2015, section 4.2: 4 pixels on each side of 32.
        first = [
            transforms.Resize((size, size), how),
            transforms.RandomCrop(size, padding=max(1, size // 8)),
        ]
    elif not changes:
        return None  # the evaluation's own pixels
    else:
        fixed = evaluation_preprocess(recipe, size)
        first = [transforms.Resize(fixed.resize_size, how)]
        if fixed.crop_size:
            first.append(transforms.CenterCrop(fixed.crop_size))
    return augment.Augment([*first, *changes])


# --- model ---------------------------------------------------------------------------------------

_POLICIES = {"fp32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}


@contextlib.contextmanager
def _dtype_policy(precision: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(_POLICIES[precision])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def build_model(
    recipe: Recipe,
    data: Data,
    say: Callable[[str], None] = print,
    start: tuple[str | None, str] | None = None,
) -> keras.Model:
    """The model of a recipe, which normalises inside, with its first weights.

    `say` gets a line about the weights, and `start` is what `starting_weights` gives.

    Raises:
        InputError: Weights of another network.
        NotFoundError: No such file of weights.
    """
    weights, why = starting_weights(recipe.model, recipe.weights) if start is None else start
    model = new_model(recipe, data)
    if weights is not None:
        say(f"Weights: {load_pretrained(model, weights, data.names, recipe.key)}")
    elif why:
        say(f"Weights: random, for there are no others: {why}.")
    else:
        say("Weights: random (weights='DEFAULT' starts from torchvision's, where there are any).")
    _describe(model, data)
    return model


def new_model(recipe: Recipe, data: Data) -> keras.Model:
    """The model of a recipe, with random weights."""
    eval_size = data.preprocess.output_shape[0]
    sides = (data.train_size,) * 2 if data.train_size == eval_size else (None, None)
    with _dtype_policy(recipe.precision):
        model = create_model(
            recipe.model,
            num_classes=1 if data.task == "binary" else len(data.names),
            input_shape=image_shape(*sides, recipe.channels),
            include_preprocessing=True,
            mean=data.preprocess.mean,
            std=data.preprocess.std,
            dropout=recipe.dropout,
        )
    _describe(model, data)
    return model


def _describe(model: keras.Model, data: Data) -> None:
    # Once more after the weights: a published file brings names and preprocessing of its own.
    model.info["class_names"] = list(data.names)
    model.info["preprocess"] = data.preprocess.get_config()
    if data.task != "single-label":
        model.info["options"]["task"] = data.task


def compile_model(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    soft_labels: bool,
    jit: bool = False,
    from_logits: bool = True,
    task: str = "single-label",
    focal: float = 0.0,
) -> None:
    """Compiles a model, and makes the optimizer's variables.

    `soft_labels` are vectors, not numbers. `focal` is gamma of the focal loss of Lin et al. 2017
    (arXiv:1708.02002), which needs such; 0 for the cross-entropy. `jit` compiles the step; jax
    always does.
    """
    losses, given, metrics = keras.losses, {"from_logits": from_logits}, ["accuracy"]
    if task != "single-label":
        several = [AveragePrecision(model.output_shape[-1])] if task == "multi-label" else []
        metrics = [LabelAccuracy(), *several]
        loss = losses.BinaryCrossentropy(**given)
        if focal:
            loss = losses.BinaryFocalCrossentropy(gamma=focal, **given)
    elif focal:  # alpha of all classes alike, so that gamma 0 is the cross-entropy
        loss = losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=focal, **given)
    elif soft_labels:
        loss = losses.CategoricalCrossentropy(**given)
    else:
        loss = losses.SparseCategoricalCrossentropy(**given)
    if any(layer.dtype_policy.name == "mixed_float16" for layer in model.layers):
        # Keras asks the model's own policy, which is another where it is built of given layers.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    model.compile(
        optimizer=optimizer,
        loss=loss,
        metrics=metrics,
        # "auto" compiles on TensorFlow, where XLA's convolutions are slow on a CPU.
        jit_compile=jit or keras.backend.backend() == "jax",
    )
    model.optimizer.build(model.trainable_variables)


# --- optimizer -----------------------------------------------------------------------------------


def make_optimizer(
    recipe: Recipe, learning_rate: Any, head: str | None = None
) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe, at a rate or by a schedule.

    `head` is the name of the classification layer, which `backbone_rate` spares; `None` where it
    trains alone.
    """
    shared = {
        "global_clipnorm": recipe.clip_norm,
        "gradient_accumulation_steps": recipe.accumulate if recipe.accumulate > 1 else None,
    }
    if recipe.optimizer == "sgd":
        multipliers = None
        if recipe.backbone_rate != 1 and head is not None:
            multipliers = {rf"^(?!(.*/)?{head}/)": recipe.backbone_rate}
        return SGD(
            learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            decay_norms=recipe.norm_decay,
            decay_biases=recipe.bias_decay,
            rate_multipliers=multipliers,
            **shared,
        )
    # torch's epsilon: Keras' is 1e-7.
    if recipe.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(
            learning_rate, weight_decay=recipe.weight_decay, epsilon=1e-8, **shared
        )
        spared = [] if recipe.norm_decay else ["gamma", "beta"]
        spared += [] if recipe.bias_decay else ["bias", "beta"]
        if spared:
            # TensorFlow hands its own variables over, which it names "dense/bias:0".
            patterns = [rf"(^|/){name}(:\d+)?$" for name in spared]
            optimizer.exclude_from_weight_decay(var_names=patterns)
        return optimizer
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(learning_rate, epsilon=1e-8, **shared)
    return keras.optimizers.RMSprop(learning_rate, momentum=recipe.momentum, **shared)


def readable_batch(dataset: ImageDataset, index: int) -> tuple:
    """Batch `index` as the model takes it, or where nothing of it can be read, the next that can.

    Raises:
        DataError: Nothing can be read at all, or the dataset is strict.
    """
    count = len(dataset)
    for offset in range(count):
        try:
            images, *others = dataset[(index + offset) % count]
        except DataError:
            if dataset.on_error == "raise" or offset == count - 1:
                raise
        else:
            dataset.failure = None
            return in_data_format(images), *others
    raise AssertionError("a dataset has a batch at least")
