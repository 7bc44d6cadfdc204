"""Training recipes as rows: a published way to train, every number with its source."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any, Literal

from keras_resnet.system.errors import InputError, between, did_you_mean, one_of, whole
from keras_resnet.variants import get_spec

TASKS = ("single-label", "binary", "multi-label")

_CHOICES = {
    "task": (None, *TASKS),
    "optimizer": ("sgd", "adam", "adamw", "rmsprop"),
    "schedule": ("constant", "step", "multistep", "cosine", "onecycle"),
    "schedule_per": ("epoch", "step"),
    "crop": ("auto", "random_resized", "padded", "none"),
    "policy": (None, "ta_wide", "ra", "imagenet", "cifar10", "svhn", "augmix"),
    "precision": ("fp32", "bf16", "fp16"),
    "normalization": ("imagenet", "half", "dataset"),
    "sampler": (None, "balanced"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained, apart from the data and the seed.

    Weights `"auto"` are the published ones, where there are any and the cache or the network has
    them, and random ones else; all others insist.

    Attributes:
        name: The name in `train(recipe=...)`.
        source: Where the numbers come from.
        aim: The accuracy that was published for it.
        model: The network: see `keras-resnet models`.
        weights: `"auto"`, `None` (random), `"DEFAULT"`, a file, a run.
        epochs: Passes over the training data.
        batch_size: Images a step on all devices; `"auto"`: what fits.
        image_size: Side in training, pixels; `None` is the variant's own.
        eval_size: Side of the evaluated images; `None` is `image_size`.
        eval_resize: Short side before the evaluation's centre crop; `None` is 256/224 of
            `eval_size`, or for images up to 64 pixels a plain resize to it.
        resize_exact: Resize to a square without a crop, `Resize([h, w])`, for evaluation too.
        interpolation: Of every resize.
        crop: `"random_resized"`, `"padded"` (4 pixels of padding and a random crop), `"none"`
            (the evaluation's own), or `"auto"`: padded for 32-pixel variants, else resized.
        crop_scale: Area of the random resized crop, from and to, as fractions of the image.
        flip: Probability of a horizontal flip.
        policy: `"ta_wide"` (TrivialAugmentWide), `"ra"` (RandAugment), `"imagenet"`, `"cifar10"` or
            `"svhn"` (AutoAugment's), `"augmix"` or `None`.
        color_jitter: Brightness, contrast and saturation change by up to this fraction.
        random_erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none; with both, one of the two a batch.
        label_smoothing: Fraction of the label spread over all classes.
        repeats: Repeated augmentation: copies of an image in an epoch of unchanged length.
        normalization: `"imagenet"`, `"half"` (mean and deviation 0.5) or `"dataset"` (measured).
        optimizer: `"sgd"` (torch's arithmetic), `"adam"`, `"adamw"` or `"rmsprop"`.
        learning_rate: Highest rate.
        momentum: Of SGD and RMSprop.
        nesterov: With Nesterov's momentum.
        weight_decay: L2 factor in the gradient; `adamw`: decoupled.
        norm_decay: Batch norms' weights decay too.
        bias_decay: Biases decay too.
        schedule: `"constant"`, `"step"`, `"multistep"`, `"cosine"` or `"onecycle"`.
        schedule_per: The rate changes every `"epoch"` or every `"step"`.
        step_size: Epochs between two drops of `"step"`.
        milestones: Drops of `"multistep"`: epochs, or below 1 fractions of all epochs.
        gamma: Factor of a drop.
        warmup_epochs: Linear warm-up.
        warmup_decay: Where it starts, as a fraction of the rate.
        clip_norm: Highest norm of all gradients together; `None` for no clipping.
        accumulate: Batches whose gradients are averaged into one step.
        ema: Keep an exponential moving average of weights and batch-norm statistics, and evaluate
            with that.
        ema_steps: Steps between two of its updates.
        ema_decay: Its decay, adjusted to batch size and epochs as torchvision does.
        unfreeze: What is trained: `"head"`, `"layer4"` and on, ...; `None` is all.
        gradual: Epochs after which one stage more is unfrozen; 0 for never.
        backbone_rate: Factor on the learning rate of everything but the head.
        freeze_norms: Batch norms keep their statistics and weights.
        dropout: Rate in the head; `None` is the variant's own.
        precision: `"fp32"`, `"bf16"` or `"fp16"` (mixed).
        patience: Stop after so many epochs without a better accuracy.
        val_split: Fraction held out where there is no `val/`; 0: none.
        class_weights: How much each class counts in the loss: `"balanced"` (scikit-learn's
            `n / (classes * images of the class)`), or `"ant=1,bee=20"`; others count 1.
        sampler: `"balanced"` draws each class equally often, in epochs of unchanged length.
        task: `"single-label"`, `"binary"` (one output, which speaks for the second of two classes)
            or `"multi-label"` (each class for itself, yes or no); `None`: as the labels are.
        focal: Gamma of the focal loss, which counts what is right already for less; 0: none.
        calibrate: At the end measure on the validation images how sure the best model may be (see
            `kr.calibrate`); thresholds of binary and multi-label models are chosen in any case.
        vertical_flip: Probability of a vertical flip.
        rotation: Images are turned by up to so many degrees, either way.
        grayscale: Probability of losing the colour.
        blur: Probability of a Gaussian blur, over a tenth of the side, sigma 0.1 to 2 pixels.
        key: Which network of a file of weights, where it holds several: see `inspect`.
        channels: 1 (gray), 3, 4 (RGBA) or more (TIFF, `.npy`); 16 bits are kept but of 3.
    """

    name: str
    source: str
    aim: str
    model: str
    weights: str | None = None
    epochs: int = 90
    batch_size: int | Literal["auto"] = 32
    image_size: int | None = None
    eval_size: int | None = None
    eval_resize: int | None = None
    resize_exact: bool = False
    interpolation: str = "bilinear"
    crop: str = "auto"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    policy: str | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    repeats: int = 1
    normalization: str = "imagenet"
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    norm_decay: bool = True
    bias_decay: bool = True
    schedule: str = "step"
    schedule_per: str = "epoch"
    step_size: int = 30
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    warmup_decay: float = 0.01
    clip_norm: float | None = None
    accumulate: int = 1
    ema: bool = False
    ema_steps: int = 32
    ema_decay: float = 0.99998
    unfreeze: str | None = None
    gradual: int = 0
    backbone_rate: float = 1.0
    freeze_norms: bool = False
    dropout: float | None = None
    precision: str = "fp32"
    patience: int | None = None
    val_split: float = 0.2
    # Younger than 0.1, as every further one: see `younger_fields`.
    class_weights: str | dict[str, float] | None = None
    sampler: str | None = None
    task: str | None = None
    focal: float = 0.0
    calibrate: bool = False
    vertical_flip: float = 0.0
    rotation: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    key: str | None = None
    channels: int = 3

    def __post_init__(self):
        get_spec(self.model)
        for name, allowed in _CHOICES.items():
            one_of(name, getattr(self, name), allowed)
        for name in ("epochs", "batch_size", "accumulate", "repeats", "ema_steps", "step_size",
                     "channels"):  # fmt: skip
            if getattr(self, name) != "auto" or name != "batch_size":
                whole(name, getattr(self, name), 1)
        for name in ("image_size", "eval_size", "eval_resize", "patience"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        for name in ("flip", "random_erasing", "label_smoothing", "vertical_flip", "grayscale",
                     "blur"):  # fmt: skip
            between(name, getattr(self, name), 0, 1)
        between("val_split", self.val_split, 0, 1, ends="[)")
        between("repeats", self.repeats, 1, 1000)
        for name in ("learning_rate", "backbone_rate"):
            between(name, getattr(self, name), 0, ends="(]")
        for name in ("mixup", "cutmix", "weight_decay", "warmup_epochs", "gradual", "focal",
                     "rotation"):  # fmt: skip
            between(name, getattr(self, name), 0)
        if self.weight_decay and self.optimizer not in ("sgd", "adamw"):
            raise InputError(
                f"weight_decay={self.weight_decay:g} needs optimizer 'sgd' or 'adamw', not "
                f"{self.optimizer!r}: pass --weight-decay 0, or --optimizer adamw."
            )
        if self.backbone_rate != 1 and self.optimizer != "sgd":
            raise InputError(
                f"backbone_rate={self.backbone_rate:g} needs optimizer 'sgd', not "
                f"{self.optimizer!r}."
            )
        if self.gradual and self.unfreeze is None:
            raise InputError(
                f"gradual={self.gradual} needs a part to begin with: pass --unfreeze head."
            )
        object.__setattr__(self, "class_weights", _named_weights(self.class_weights))
        if self.sampler and self.class_weights == "balanced":
            raise InputError(
                "sampler='balanced' and class_weights='balanced' both make up for uneven classes: "
                "give one of them."
            )
        if self.warmup_epochs >= self.epochs:
            # A short trial of a long recipe: keep the warm-up's share.
            object.__setattr__(self, "warmup_epochs", 0 if self.epochs == 1 else 1)

    def with_options(self, **options: Any) -> Recipe:
        """The recipe with some fields changed.

        Raises:
            InputError: A field that there is not, or a value that cannot work.
        """
        known = {field.name for field in dataclasses.fields(self)} - {"name", "source", "aim"}
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known)
                if name == "devices":
                    hint = (
                        " torchrun --nproc-per-node N SCRIPT runs a script's train on N devices of "
                        "torch; docs/devices.md has TensorFlow's and jax' way."
                    )
                raise InputError(f"Unknown training option {name!r}.{hint}")
        return dataclasses.replace(self, **options)

    def __str__(self) -> str:
        lines = [f"Recipe {self.name}"]
        for label in ("source", "aim"):
            lines += textwrap.wrap(
                f"{label}: {getattr(self, label)}",
                96,
                initial_indent="  ",
                subsequent_indent="    ",
            )
        for field in dataclasses.fields(self)[3:]:
            value = getattr(self, field.name)
            mark = "" if value == field.default else "  *"
            lines.append(f"    {field.name:16} {value if value != () else '-'}{mark}")
        lines.append("  (* differs from the default)")
        return "\n".join(lines)


def _named_weights(given: Any) -> str | dict[str, float] | None:
    """`class_weights` as they are kept: `None`, `"balanced"` or numbers by name."""
    if given is None or given == "balanced":
        return given
    try:
        pairs = given
        if isinstance(given, str):
            pairs = [pair.rpartition("=")[::2] for pair in given.split(",")]
        weights = {str(name).strip(): float(weight) for name, weight in dict(pairs).items()}
    except (TypeError, ValueError):
        weights = {}
    if not weights or "" in weights or not all(0 < w < math.inf for w in weights.values()):
        raise InputError(
            "class_weights is 'balanced', or a number above 0 a class: 'ant=1,bee=20'. "
            f"Received: {given!r}."
        )
    return weights


def younger_fields() -> dict[str, Any]:
    """The fields that 0.1 did not have, and their defaults: so a run is what it was then."""
    fields = dataclasses.fields(Recipe)
    last = [field.name for field in fields].index("val_split")
    return {field.name: field.default for field in fields[last + 1 :]}


_REFERENCES = "pytorch/vision references/classification"

# A row is part of a run's fingerprint, its words included: other words, and an unfinished run of an
# earlier version would not be found (tests/test_files_of_v01.py).
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "finetune",
            source="this package's default for a folder of a few hundred to some ten thousand "
            "pictures: torchvision's resnet_v1 recipe at its rate per picture (0.1 for 256) with "
            "one epoch of warm-up, a cosine, and milder crops",
            aim="none published: it depends on the data; start from weights='DEFAULT'",
            model="resnet18",
            weights="auto",
            epochs=15,
            learning_rate=0.01,
            crop_scale=(0.35, 1.0),
            schedule="cosine",
            schedule_per="step",
            warmup_epochs=1,
            warmup_decay=0.1,
        ),
        Recipe(
            "resnet_v1",
            source=f"{_REFERENCES}, README 'ResNet': 8 GPUs, 32 pictures each",
            aim="ImageNet top-1 of the IMAGENET1K_V1 files: resnet18 69.758, resnet34 73.314, "
            "resnet50 76.130, resnet101 77.374, resnet152 78.312",
            model="resnet50",
            epochs=90,
            batch_size=256,
            crop="random_resized",
        ),
        Recipe(
            "resnet50_v2",
            source=f"{_REFERENCES}, README 'Weights update'; 8 GPUs, 128 pictures each",
            aim="ImageNet top-1 80.858 (resnet50 IMAGENET1K_V2)",
            model="resnet50",
            epochs=600,
            batch_size=1024,
            image_size=176,
            eval_size=224,
            eval_resize=232,
            crop="random_resized",
            policy="ta_wide",
            random_erasing=0.1,
            mixup=0.2,
            cutmix=1.0,
            label_smoothing=0.1,
            repeats=4,
            learning_rate=0.5,
            weight_decay=2e-5,
            norm_decay=False,
            schedule="cosine",
            warmup_epochs=5,
            ema=True,
        ),
        Recipe(
            "alexnet",
            source=f"{_REFERENCES}, README 'AlexNet and VGG': the rate is 0.01",
            aim="ImageNet top-1 56.522 (alexnet IMAGENET1K_V1)",
            model="alexnet",
            epochs=90,
            batch_size=256,
            learning_rate=0.01,
            crop="random_resized",
        ),
        Recipe(
            "cifar",
            source="He et al. 2015, arXiv:1512.03385, section 4.2: 64,000 steps of 128 out of "
            "45,000 pictures (182 epochs), the rate divided by 10 at 32,000 and 48,000",
            aim="CIFAR-10 test accuracy 91.25 (resnet20), 92.49 (32), 92.83 (44), 93.03 (56), "
            "93.57 (110; after a warm-up at 0.01)",
            model="resnet20",
            epochs=182,
            batch_size=128,
            crop="padded",
            normalization="dataset",
            schedule="multistep",
            milestones=(0.5, 0.75),
            val_split=0.1,
        ),
        Recipe(
            "bird_photos",
            source="a common tutorial's ResNet-50 on 568 photographs of birds: Resize([224, 224]) "
            "and no augmentation, 80/20, batch 32, 20 epochs; it does not name its optimizer, "
            "Adam at 1e-4 is the course's habit",
            aim="none stated",
            model="resnet50",
            epochs=20,
            crop="none",
            flip=0.0,
            resize_exact=True,
            optimizer="adam",
            learning_rate=1e-4,
            weight_decay=0.0,
            schedule="constant",
        ),
        Recipe(
            "alexnet_cifar10",
            source="a common tutorial's AlexNet on CIFAR-10: batch 32, 20 epochs, SGD at 0.01 with "
            "momentum 0.9, mean and deviation 0.5, 80/20",
            aim="none stated",
            model="alexnet_cifar10",
            epochs=20,
            crop="none",
            flip=0.0,
            normalization="half",
            learning_rate=0.01,
            weight_decay=0.0,
            schedule="constant",
        ),
        Recipe(
            "resnet34_cifar10",
            source="a common tutorial's ResNet-34 on CIFAR-10: batch 128, 1000 epochs, SGD at 0.01 "
            "(0.1 diverged), momentum 0.9, weight decay 1e-4, a tenth at half-time",
            aim="none stated",
            model="resnet34_cifar10",
            epochs=1000,
            batch_size=128,
            crop="none",
            flip=0.0,
            normalization="half",
            learning_rate=0.01,
            schedule="multistep",
            milestones=(0.5,),
        ),
        Recipe(
            "flowers",
            source="a common tutorial's transfer learning, ResNet-34 on five kinds of flowers: "
            "RandomResizedCrop and flip, batch 16, Adam at 1e-4, 3 epochs from torchvision's "
            "weights",
            aim="none stated",
            model="resnet34",
            weights="DEFAULT",
            epochs=3,
            batch_size=16,
            crop="random_resized",
            optimizer="adam",
            learning_rate=1e-4,
            weight_decay=0.0,
            schedule="constant",
        ),
        Recipe(
            "resnet50_v1_relu",
            source="a common tutorial's ResNet-50 with a ReLU before the addition; it describes no "
            "training, so this is resnet_v1's",
            aim="none stated",
            model="resnet50_v1_relu",
            epochs=90,
            batch_size=256,
            crop="random_resized",
        ),
    )
}


def get_recipe(name: str | Recipe) -> Recipe:
    """The row of a recipe; a recipe is given back as it is.

    Raises:
        InputError: The name is unknown; the message names near ones.

    Examples:
        >>> get_recipe("cifar").milestones
        (0.5, 0.75)
    """
    if isinstance(name, Recipe):
        return name
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES) or f" There are: {', '.join(RECIPES)}."
        raise InputError(f"Unknown recipe {name!r}.{hint}")
    return RECIPES[name]
